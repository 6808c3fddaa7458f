"""Files of weights: safetensors against the safetensors package, .bin, shards, and hostile ones."""

import io
import json
import multiprocessing
import os
import pickle
import sys
import time
import zipfile

import pytest
import safetensors.torch
import torch
from test_hub import full_disk, one_line

import model
from model import Config, Transformer
from plumbing import bpe, files, flags
from plumbing.runs import peak_memory

# -----------------------------------------------------------------------------
# safetensors: the package is the oracle


def every_kind():
    random = torch.Generator().manual_seed(0)
    tensors = {"flags": torch.tensor([True, False, True])}  # 3 bytes: what follows is not aligned
    for kind, dtype in files.DTYPES.items():
        x = torch.randn(3, 5, generator=random) * 100
        x = x > 0 if dtype == torch.bool else x.abs().to(dtype) if kind == "U8" else x.to(dtype)
        tensors |= {f"{kind}.matrix": x, f"{kind}.scalar": x[1, 2].clone(),
                    f"{kind}.empty": torch.zeros(0, 7, dtype=dtype)}
    tensors["ünïcode 'name'"] = torch.tensor([torch.inf, -0.0, 1e-45])
    return tensors


def assert_same(got, want):
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert torch.equal(got[name], want[name]), name


def test_reads_what_the_package_writes(tmp_path):
    assert len(files.DTYPES) == 10
    safetensors.torch.save_file(every_kind(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert_same(files.read_safetensors(tmp_path / "x.safetensors"), every_kind())


def test_the_package_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, every_kind(), {"note": "hi"})
    assert_same(safetensors.torch.load_file(path), every_kind())
    with safetensors.safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt", "note": "hi"}
    assert_same(files.read_safetensors(path), every_kind())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_writes_views_and_parameters(tmp_path):
    x = torch.arange(24.0).view(4, 6)
    tensors = {"t": x.T, "cut": x[1:3, ::2], "same": x, "p": torch.nn.Parameter(x[:, 0]),
               "bf16": x.bfloat16().T}
    files.write_safetensors(tmp_path / "x.safetensors", tensors)
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), tensors)


def test_an_empty_table(tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", {})
    assert files.read_safetensors(tmp_path / "x.safetensors") == {}
    assert safetensors.torch.load_file(tmp_path / "x.safetensors") == {}


def test_the_file_is_mapped_and_stays_as_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, {"a": torch.ones(1000), "b": torch.zeros(1000)})
    before = path.read_bytes()
    tensors = files.read_safetensors(path)
    assert tensors["b"].data_ptr() - tensors["a"].data_ptr() == 4000  # views of one mapping
    tensors["a"].fill_(7)
    assert path.read_bytes() == before
    assert files.read_safetensors(path)["a"].sum() == 1000 and tensors["a"].sum() == 7000


def test_a_file_can_replace_the_one_it_is_read_from(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, {"a": torch.arange(5.0), "b": torch.arange(3)})
    files.write_safetensors(path, {k: v + 1 for k, v in files.read_safetensors(path).items()})
    files.write_safetensors(path, files.read_safetensors(path))
    assert_same(files.read_safetensors(path),
                {"a": torch.arange(5.0) + 1, "b": torch.arange(3) + 1})


def file_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_off_their_alignment(tmp_path):
    data = torch.tensor([1.5, 2.5])
    for pad in range(4):
        header = json.dumps({"b": entry(0, 1, [1], "BOOL"), "a": entry(1, 9, [2])}) + " " * pad
        path = file_of(tmp_path / "x.safetensors", header.encode(), b"\1" + data.numpy().tobytes())
        assert_same(files.read_safetensors(path), {"b": torch.tensor([True]), "a": data})


EIGHT = bytes(8)
BAD = {
    "cut or no safetensors": (b"", None, "is cut"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", None, "Git LFS pointer"),
    "header beyond the file": ((1000).to_bytes(8, "little") + b"{}", None, "header of 1000"),
    "broken JSON": (b'{"a": ', EIGHT, "its header is no table"),
    "no UTF-8": (b'{"\xff": 1}', EIGHT, "its header is no table"),
    "a list": ([1], EIGHT, "its header is no table"),
    "deep": (b"[" * 100_000, EIGHT, "its header is no table"),
    "not a table inside": ({"a": 5}, EIGHT, "its header is no table"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT, "its header is no table"),
    "shape of text": ({"a": entry(0, 8, "2")}, EIGHT, "its header is no table"),
    "negative shape": ({"a": entry(0, 8, [-1, -2])}, EIGHT, "its header is no table"),
    "fraction": ({"a": entry(0, 8, [2.0])}, EIGHT, "its header is no table"),
    "three offsets": ({"a": {**entry(0, 8, [2]), "data_offsets": [0, 4, 8]}}, EIGHT, "no table"),
    "negative offset": ({"a": entry(-8, 0, [2])}, EIGHT, "its header is no table"),
    "unknown dtype": ({"a": entry(0, 8, [2], "F8_E4M3")}, EIGHT, "unknown dtype F8_E4M3"),
    "dtype of another kind": ({"a": entry(0, 8, [2], [])}, EIGHT, "unknown dtype"),
    "shape against offsets": ({"a": entry(0, 8, [3])}, EIGHT, "'a' has 8 bytes, which F32 [3]"),
    "backwards": ({"a": entry(8, 0, [2])}, EIGHT, "'a' has -8 bytes"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, EIGHT, "'b' begins at byte 4"),
    "twice the same": ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, EIGHT, "overlap"),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, EIGHT + b"1234", "hole"),
    "hole in front": ({"a": entry(4, 8, [1])}, EIGHT, "overlap or hole"),
    "truncated": ({"a": entry(0, 12, [3])}, EIGHT, "download it again"),
    "bytes left over": ({"a": entry(0, 4, [1])}, EIGHT, "download it again"),
    "huge": ({"a": entry(0, 0, [0, 2**47, 2**47, 2**47])}, b"", "its header is no table"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file_is_one_line(tmp_path, case):
    header, data, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(header) if data is None else file_of(path, header, data)
    with pytest.raises(ValueError) as raised:
        files.read_weights(path)
    one_line(raised, "bad.safetensors", message)


def test_a_truncated_file_names_both_sizes(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, {"a": torch.ones(100)})
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)) as raised:
            files.read_safetensors(path)
    one_line(raised, f"has {size} bytes, its header promises {len(whole)}")


def test_a_damaged_header_never_breaks_the_reader(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, {"a": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bool)})
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole) - 26):
        for byte in b"\0\xff9-[":
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                files.read_safetensors(path)
            except ValueError as error:
                refused += str(path) in str(error)
    assert refused > 400


# -----------------------------------------------------------------------------
# folders, shards, .bin


def two_tensors():
    return {"wte.weight": torch.arange(12.0).view(3, 4), "ln_f.bias": torch.ones(4).bfloat16()}


def write_index(folder, name, files):
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("ext", ["safetensors", "bin"])
def test_a_folder_in_one_file_and_in_shards(tmp_path, ext):
    write = files.write_safetensors if ext == "safetensors" else lambda p, t: torch.save(t, p)
    name = "model.safetensors" if ext == "safetensors" else "pytorch_model.bin"
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    write(one / name, two_tensors())
    for n, (key, tensor) in enumerate(two_tensors().items()):
        write(many / f"part-{n}.{ext}", {key: tensor})
    write_index(many, name, {"wte.weight": f"part-0.{ext}", "ln_f.bias": f"part-1.{ext}"})
    for path in (one, str(one), one / name, many, many / f"{name}.index.json"):
        assert_same(files.read_weights(path), two_tensors())

    stale = {"wte.weight": torch.zeros(1), "old": torch.zeros(1)}
    write(many / f"part-1.{ext}", two_tensors() | stale)  # the index decides what counts
    assert_same(files.read_weights(many), two_tensors())
    write(many / f"part-1.{ext}", {"ln_f.other": torch.ones(4)})
    with pytest.raises(ValueError) as raised:
        files.read_weights(many)
    one_line(raised, f"part-1.{ext} lacks ln_f.bias")
    os.remove(many / f"part-1.{ext}")
    with pytest.raises(ValueError) as raised:
        files.read_weights(many)
    one_line(raised, f"names the file part-1.{ext}, which is not beside it")


def test_safetensors_come_before_bin(tmp_path):
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(files.read_weights(tmp_path)) == {"old"}
    files.write_safetensors(tmp_path / "model.safetensors", two_tensors())
    assert_same(files.read_weights(tmp_path), two_tensors())


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError) as raised:
        files.read_weights(tmp_path)
    one_line(raised, tmp_path, *files.WEIGHTS)
    with pytest.raises(OSError, match="nowhere.bin"):
        files.read_weights(tmp_path / "nowhere.bin")


def test_an_index_can_not_name_files_elsewhere(tmp_path):
    for name in ["../../evil.safetensors", "/etc/evil.bin", "..", "model.safetensors.index.json"]:
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError) as raised:
            files.read_weights(tmp_path)
        one_line(raised, "model.safetensors.index.json is damaged")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b"\xff",
                                  b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": ""}}'])
def test_a_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(ValueError) as raised:
        files.read_weights(tmp_path)
    one_line(raised, "model.safetensors.index.json is damaged")


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_old_and_new_whole_and_cut(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    torch.save(two_tensors(), path, _use_new_zipfile_serialization=zipped)
    assert_same(files.read_weights(tmp_path), two_tensors())
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as raised:
            files.read_weights(tmp_path)
        one_line(raised, "pytorch_model.bin can not be read: cut")


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_bin_file_can_not_run_code(tmp_path):
    evil = Evil()
    evil.path = str(tmp_path / "owned")
    for write in (lambda p: torch.save({"a": evil}, p),
                  lambda p: p.write_bytes(pickle.dumps({"a": evil}, protocol=2))):
        write(tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError) as raised:
            files.read_weights(tmp_path)
        one_line(raised, "pytorch_model.bin can not be read")
        assert not os.path.exists(evil.path)


def test_a_bin_file_without_names(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is not a table of named tensors"):
        files.read_weights(tmp_path)
    torch.save({"step": 3, "model": {"w": torch.ones(2)}}, tmp_path / "last.pth")
    with pytest.raises(ValueError, match="last.pth is not a table of named tensors"):
        files.read_weights(tmp_path / "last.pth")
    assert files.read_pickle(tmp_path / "last.pth")["step"] == 3


# -----------------------------------------------------------------------------
# writing


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    files.write_safetensors(path, two_tensors())
    monkeypatch.setattr(files, "open", full_disk, raising=False)
    with pytest.raises(OSError) as raised:
        files.write_safetensors(path, {"big": torch.ones(1000)})
    one_line(raised, f"can not write {path}", "No space left", "is as it was")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert_same(files.read_safetensors(path), two_tensors())


def test_what_can_not_be_written(tmp_path):
    with pytest.raises(ValueError) as raised:
        files.write_safetensors(tmp_path / "x.safetensors", {"z": torch.ones(2, dtype=torch.cfloat)})
    one_line(raised, "x.safetensors", "'z' is torch.complex64")
    with pytest.raises(OSError) as raised:
        files.write_safetensors(tmp_path / "no/x.safetensors", two_tensors())
    one_line(raised, "can not write", "No such file or directory")
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# hostile files: one line, exit code 2, and neither much time nor memory


def in_a_process(send, arguments):
    """What model.py says to a command line: (exit code, stderr, seconds, GiB)."""
    sys.argv, sys.stderr = ["model.py", *arguments], io.StringIO()
    began, code = time.process_time(), None
    try:
        flags.run(model.main, model.Flags)
    except SystemExit as end:
        code = end.code
    send.send((code, sys.stderr.getvalue(), time.process_time() - began, peak_memory()))


def refused(folder, *arguments):
    """The line that model.py --init folder ends with."""
    fork = multiprocessing.get_context("fork")
    get, send = fork.Pipe(False)
    process = fork.Process(target=in_a_process, args=(send, ["--init", str(folder), *arguments]))
    process.start()
    send.close()
    try:
        assert get.poll(60), "it hangs"
        code, text, seconds, gib = get.recv()
    finally:
        process.kill()
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1 and len(text) < 1000, text[:2000]
    assert seconds < 2 and gib < 1, (seconds, gib)
    return text


def a_model(folder):
    torch.manual_seed(0)
    small = Transformer(Config(n_layer=1, n_head=1, n_embd=8, vocab_size=257, block_size=8))
    small.save_pretrained(str(folder))
    return small


def a_tokenizer(vocab, merges=()):
    special = {"id": 256, "content": "<|endoftext|>", "special": True}
    return json.dumps({"model": {"vocab": {c: i for i, c in enumerate(bpe.BYTE)} | vocab, "merges": [*merges]},
                       "added_tokens": [special], "normalizer": None, "post_processor": None,
                       "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}})


def doubled(last):
    """Vocabulary and merges of aa, aaaa, ... with 128 letters, and a token of `last` letters."""
    tokens = ["a" * 2**n for n in range(1, 8)]
    vocab = {token: 257 + i for i, token in enumerate(dict.fromkeys([*tokens, "a" * last]))}
    return vocab, [[token[: len(token) // 2]] * 2 for token in tokens]


def packed(folder, content=bytes(10**9)):
    """A .bin of 4 MB that unpacks to 1 GB."""
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        z.writestr("x/data.pkl", content)
        z.writestr("x/version", "3")


class Filled:
    def __reduce__(self):
        return bytearray, (3 * 10**9,)


def saved(folder, content, name="pytorch_model.bin", **how):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / name, **how)


DEEP = "[" * 200_000
HOSTILE = {
    "header of 1 GB": lambda f: open(f / "model.safetensors", "r+b").write((10**9).to_bytes(8, "little"))
    and os.truncate(f / "model.safetensors", 2 * 10**9),
    "header of lists": lambda f: file_of(f / "model.safetensors", b"[" + b"[]," * 30_000_000 + b"1]"),
    "shape of many digits": lambda f: file_of(
        f / "model.safetensors", {"a": entry(0, 8, [int("9" * 4000)] * 4000)}),
    "tensor with a long name": lambda f: file_of(f / "model.safetensors", {"a" * 10**6: entry(0, 8, [3])}, bytes(8)),
    "deep config.json": lambda f: (f / "config.json").write_text(DEEP),
    "config.json of lists": lambda f: (f / "config.json").write_text("[" + "[]," * 30_000_000 + "1]"),
    "deep index": lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json").write_text(DEEP),
    "deep tokenizer.json": lambda f: (f / "tokenizer.json").write_text(DEEP),
    "large id": lambda f: (f / "tokenizer.json").write_text(a_tokenizer({"ab": 10**30}, [["a", "b"]])),
    "id above 32 bits": lambda f: (f / "tokenizer.json").write_text(a_tokenizer({"ab": 2**32}, [["a", "b"]])),
    "negative id": lambda f: (f / "tokenizer.json").write_text(a_tokenizer({"ab": -1}, [["a", "b"]])),
    "fraction as id": lambda f: (f / "tokenizer.json").write_text(a_tokenizer({"ab": 257.5}, [["a", "b"]])),
    "token of 20 kB": lambda f: (f / "tokenizer.json").write_text(a_tokenizer(*doubled(20_000))),
    "packed .bin": packed,
    "filled .bin": lambda f: saved(f, {"a": Filled()}),
    "old filled .bin": lambda f: saved(f, {"a": Filled()}, _use_new_zipfile_serialization=False),
    "repeated number": lambda f: saved(f, {"a": torch.zeros(1).expand(10**6, 10**6)}),
    "repeated number in a checkpoint": lambda f: saved(
        f, {"model": {"a": torch.zeros(1).expand(10**6, 10**6)}, "config": {"gate_bias": 1.0}}, "best.pt"),
    "config.json of text": lambda f: (f / "config.json").write_text('{"model_type": "gpt2", "n_embd": "a"}'),
    "config.json of lists for numbers": lambda f: (f / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": [1], "rope_parameters": [2]}'),
    "heads of nothing": lambda f: (f / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}'),
    "checkpoint of numbers": lambda f: saved(
        f, {"wte.weight": 1, "wpe.weight": 2, "ln_f.weight": 3}, "best.pt"),
    "checkpoint with a config of lists": lambda f: saved(f, {"model": {}, "config": {"gate_bias": [1]}}, "best.pt"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_line_and_takes_little(tmp_path, case):
    a_model(tmp_path)
    HOSTILE[case](tmp_path)
    line = refused(tmp_path)
    assert str(tmp_path) in line or "must be" in line


def test_long_tokens_of_real_tokenizers_are_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text(a_tokenizer(*doubled(128)))
    assert bpe.BPE(str(tmp_path)).encode("a" * 128) == [263]
