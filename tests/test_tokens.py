"""Tokenizers, token files, preparation and the order of the blocks."""

import hashlib
import json
import os

import numpy as np
from pydoc_data.topics import topics

import pytest
import torch

from plumbing import bpe, flags, hub, tokens

TRICKY = "naïve 😀 日本語\n\n  <|endoftext|> \ttabs, don't 1234567 é\x00"


def documents(n, words=30):
    return [f"Document {i}.\n\n" + f"word{i} " * words + "é😀" for i in range(n)]


def write_text(path, docs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n<|endoftext|>\n".join(docs) + "\n", encoding="utf-8")
    return str(path)


def decoded(folder, name="bytes"):
    """{split: [documents]} of a prepared folder; every document ends with eot."""
    tok, splits = tokens.tokenizer(name), {}
    for path in tokens.split_paths(str(folder)):
        ids = tokens.open_tokens(path)[0].tolist()
        docs = [[]]
        for i in ids:
            docs.append([]) if i == tok.eot else docs[-1].append(i)
        assert docs.pop() == []
        splits[os.path.basename(path)[:-4]] = [tok.decode(doc) for doc in docs]
    return splits


def one_line(error):
    return "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# tokenizers


def test_bytes_come_back_whatever_the_text():
    tok = tokens.tokenizer("bytes")
    ids = tok.encode(TRICKY)
    assert (tok.name, tok.vocab_size, tok.eot) == ("bytes", 257, 256)
    assert list(ids) == list(TRICKY.encode()) and tok.decode(ids) == TRICKY
    assert tok.decode(torch.tensor([72, 105, 256])) == "Hi<|endoftext|>"
    assert list(tok.encode("")) == [] and tok.decode([]) == ""
    assert tok.decode([0xFF]) == "\ufffd" and tok.decode(tok.encode("\udc80")) == "?"


def test_an_unknown_tokenizer_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="'gpt3'.*gpt2, bytes") as error:
        tokens.tokenizer("gpt3")
    assert one_line(error)


def test_gpt2_without_its_files_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("a long\nstory")

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*'bytes'") as error:
        tokens.tokenizer("gpt2").encode("a")
    assert one_line(error)


@pytest.fixture
def gpt2_files(monkeypatch):
    assets = os.environ.get("SPARSE_ASSETS")
    if not assets:
        pytest.skip("set SPARSE_ASSETS to the folder that plumbing.assets wrote")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(assets, "tiktoken"))


def test_gpt2_knows_its_ids_and_treats_special_text_as_text(gpt2_files):
    tok = tokens.tokenizer("gpt2")
    assert list(tok.encode("Hello world")) == [15496, 995]
    assert tok.eot not in tok.encode(TRICKY) and tok.decode(tok.encode(TRICKY)) == TRICKY
    assert tok.decode(torch.tensor([tok.eot])) == "<|endoftext|>"
    assert max(tok.encode(TRICKY)) < tok.vocab_size == tok.bpe.n_vocab and tok.eot == tok.bpe.eot_token


def test_gpt2_prepares_and_reads_back(gpt2_files, tmp_path):
    docs = documents(45)
    folder = tokens.prepare([write_text(tmp_path / "a.txt", docs)], str(tmp_path / "out"), "gpt2")
    assert decoded(folder, "gpt2")["val"] == docs[::20]
    assert tokens.load_data(folder, "gpt2")["val"].dtype == np.uint16


@pytest.fixture
def own(tmp_path):
    """A tokenizer.json with ids as high as GPT-2's, in a folder of its own."""
    vocab = {c: i for i, c in enumerate(bpe.BYTE)}
    special = {"id": 50256, "content": "<|endoftext|>", "special": True}
    file = {"model": {"vocab": vocab, "merges": []}, "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "post_processor": None}
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(file))
    return str(path)


def test_a_model_of_gpt2s_size_gets_its_own_tokenizer(own, monkeypatch):
    folder = os.path.dirname(own)
    checkpoint = os.path.join(folder, "best.pt")
    open(checkpoint, "w").close()
    assert tokens.tokenizer(own).vocab_size == 50257
    assert tokens.name_for(50257, model=folder) == own == tokens.name_for(50257, model=checkpoint)
    monkeypatch.setattr(hub, "fetch_model", {"owner/polish-gpt2": folder}.get)
    assert tokens.name_for(50257, model="owner/polish-gpt2") == own
    assert tokens.name_for(50257, "gpt2", folder) == "gpt2" and tokens.name_for(50257, "bytes", folder) == "bytes"


def test_without_a_tokenizer_of_its_own_the_size_decides(tmp_path, own):
    for size, name in ((257, "bytes"), (50257, "gpt2"), (50304, "gpt2")):
        assert tokens.name_for(size) == tokens.name_for(size, model="scratch") == name
        assert tokens.name_for(size, model=str(tmp_path)) == name
    for arguments, message in (((999,), "999 tokens and no tokenizer.json.*--tokenizer"),
                               ((300, "gpt2"), "gpt2 has more tokens than the model's 300"),
                               ((300, None, os.path.dirname(own)), "more tokens than the model's 300")):
        with pytest.raises(ValueError, match=message) as error:
            tokens.name_for(*arguments)
        assert one_line(error)


def test_gpt2s_vocabulary_in_a_tokenizer_json_fits_gpt2s_token_files(own, tmp_path, monkeypatch):
    """With another vocabulary the same files are refused; tiktoken's own files are not asked for."""
    monkeypatch.setattr("tiktoken.get_encoding", None)
    shard = public_shard(tmp_path / "s.bin", range(4))
    monkeypatch.setattr(hub, "download", lambda *args, **more: shard)
    with pytest.raises(ValueError, match="fineweb holds tokens of 'gpt2', not of 'bpe-"):
        tokens.load_data("fineweb", own)
    vocabulary = [[i, f"{b:02x}"] for i, b in enumerate(bpe.BYTE.values())], {"<|endoftext|>": 50256}
    digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
    monkeypatch.setattr(bpe, "GPT2_VOCABULARY", digest)
    assert tokens.load_data("fineweb", own)["tokenizer"] == "gpt2"
    folder = tokens.prepare([write_text(tmp_path / "a.txt", documents(20))], str(tmp_path / "out"), own)
    assert tokens.load_data(folder, "gpt2")["tokenizer"] == "gpt2"


def test_without_tiktokens_host_the_hub_has_gpt2s_table(own, monkeypatch):
    def no_network(_):
        raise ConnectionError("no route")

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    monkeypatch.setattr(hub, "download", lambda *file: {("openai-community/gpt2", "tokenizer.json"): own}[file])
    with pytest.raises(ValueError, match="ConnectionError.*another one.*TIKTOKEN_CACHE_DIR"):
        tokens.tokenizer("gpt2").encode("a")
    vocabulary = [[i, f"{b:02x}"] for i, b in enumerate(bpe.BYTE.values())], {"<|endoftext|>": 50256}
    monkeypatch.setattr(bpe, "GPT2_VOCABULARY", hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest())
    gpt2 = tokens.tokenizer("gpt2")
    assert gpt2.decode(gpt2.encode("a b")) == "a b"


# -----------------------------------------------------------------------------
# prepare


def test_every_document_is_whole_and_in_exactly_one_split(tmp_path):
    docs = documents(45)
    path = write_text(tmp_path / "a.txt", docs)
    assert tokens.prepare([path], str(tmp_path / "out"), "bytes") == str(tmp_path / "out")
    splits = decoded(tmp_path / "out")
    assert splits["val"] == docs[::20] and splits["test"] == docs[10::20]
    assert splits["train"] == [doc for i, doc in enumerate(docs) if i % 10]
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "test.bin", "train.bin", "val.bin"]


def test_a_document_larger_than_the_memory_for_it_stays_whole(tmp_path, monkeypatch):
    docs = documents(21, words=200)
    docs[3] = "  indented" + "\n\n" * 300 + "one line " * 200 + "\n\nend"
    path = write_text(tmp_path / "a.txt", docs)
    monkeypatch.setattr(tokens, "CHUNK", 100)
    tokens.prepare([path], str(tmp_path / "out"), "bytes")
    splits = decoded(tmp_path / "out")
    assert splits["train"] == [doc for i, doc in enumerate(docs) if i % 10]
    assert splits["val"] == [docs[0], docs[20]] and splits["test"] == [docs[10]]


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])  # paragraphs, lines, one line, a blob
@pytest.mark.parametrize("repeats", [150, 4000, 20000])
def test_one_long_file_is_cut_into_pieces_that_fill_every_split(tmp_path, separator, repeats):
    text = separator.join(f"sentence number {i}." for i in range(repeats))
    path = write_text(tmp_path / "one.txt", [text])
    tokens.prepare([path], str(tmp_path / "out"), "bytes")
    splits = decoded(tmp_path / "out")
    pieces = [splits[tokens.split_of(n)].pop(0) for n in range(sum(map(len, splits.values())))]
    assert "".join(pieces).strip() == text and len(pieces) >= 11
    assert max(map(len, pieces)) <= 60_000
    if "\n" in separator:
        assert all(piece.endswith(separator) for piece in pieces[:-1])


def test_a_folder_is_read_below_in_sorted_order_and_each_file_once(tmp_path):
    docs = documents(25)
    write_text(tmp_path / "texts" / "b" / "2.txt", docs[9:])
    write_text(tmp_path / "texts" / "a.val.txt", docs[:9])
    (tmp_path / "texts" / "not.md").write_text("no")
    again = str(tmp_path / "texts" / "a.val.txt")
    tokens.prepare([str(tmp_path / "texts"), again], str(tmp_path / "out"), "bytes")
    splits = decoded(tmp_path / "out")
    assert splits["val"] == docs[::20] and sum(map(len, splits.values())) == 25


def test_windows_text_blank_documents_and_a_byte_order_mark(tmp_path):
    docs = documents(20)
    text = "\ufeff<|endoftext|>\n\n \n<|endoftext|>\n" + "\n <|endoftext|> \n".join(docs) + "\n<|endoftext|>"
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode())
    tokens.prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), "bytes")
    splits = decoded(tmp_path / "out")
    assert splits["val"] == docs[:1] and sum(map(len, splits.values())) == 20


def test_text_that_is_not_utf8_is_read_with_one_line_of_warning(tmp_path, capsys):
    path = tmp_path / "latin.txt"
    path.write_bytes("\n<|endoftext|>\n".join(["caf\xe9"] * 20).encode("latin-1"))
    tokens.prepare([str(path)], str(tmp_path / "out"), "bytes")
    warning = capsys.readouterr().err.strip().splitlines()[-1]
    assert warning.startswith("warning: ") and "latin.txt" in warning
    assert decoded(tmp_path / "out")["val"] == ["caf\ufffd"]


def test_prepared_files_are_used_again_until_a_source_or_the_tokenizer_changes(tmp_path, capsys):
    path, out = write_text(tmp_path / "a.txt", documents(20)), str(tmp_path / "out")
    tokens.prepare([path], out, "bytes")
    first = os.stat(tmp_path / "out" / "train.bin").st_mtime_ns
    tokens.prepare([path], out, "bytes")
    assert os.stat(tmp_path / "out" / "train.bin").st_mtime_ns == first
    assert "prepared before" in capsys.readouterr().out
    write_text(tmp_path / "a.txt", documents(21))
    tokens.prepare([path], out, "bytes")
    assert len(decoded(out)["val"]) == 2
    (tmp_path / "out" / "val.bin").unlink()
    tokens.prepare([path], out, "bytes")
    (tmp_path / "out" / "meta.json").write_text("{")
    tokens.prepare([path], out, "bytes")
    assert len(decoded(out)["val"]) == 2


def test_a_cut_off_preparation_leaves_the_earlier_files(tmp_path, monkeypatch):
    path, out = write_text(tmp_path / "a.txt", documents(20)), tmp_path / "out"
    tokens.prepare([path], str(out), "bytes")
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    write_text(tmp_path / "a.txt", documents(30))

    written = []

    def encode(self, text):
        written.append(text)
        if len(written) == 25:
            raise OSError(28, "No space left on device")
        return list(text.encode())

    monkeypatch.setattr(tokens.Bytes, "encode", encode)
    with pytest.raises(OSError, match="No space"):
        tokens.prepare([path], str(out), "bytes")
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_a_folder_whose_files_were_not_all_renamed_does_not_count_as_prepared(tmp_path, monkeypatch):
    path, out = write_text(tmp_path / "a.txt", documents(20)), str(tmp_path / "out")
    tokens.prepare([path], out, "bytes")
    write_text(tmp_path / "a.txt", documents(30))
    replace = flags.replace

    def killed(path, write):
        if path.endswith("meta.json"):
            raise KeyboardInterrupt
        replace(path, write)

    monkeypatch.setattr(flags, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tokens.prepare([path], out, "bytes")
    with pytest.raises(ValueError, match="meta.json"):
        tokens.load_data(out, "bytes")


def test_prepare_prints_counts_and_paths(tmp_path, capsys):
    out = tokens.prepare([write_text(tmp_path / "a.txt", documents(20))], str(tmp_path / "out"), "bytes")
    printed = capsys.readouterr().out
    assert "bytes of text a token" in printed and os.path.join(out, "test.bin") in printed
    assert json.load(open(os.path.join(out, "meta.json")))["documents"]["train"] == 18


def test_bad_input_is_refused_in_one_line_before_anything_is_written(tmp_path):
    good, out = write_text(tmp_path / "a.txt", documents(20)), str(tmp_path / "out")
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n\n")
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.pdf").write_text("x")
    cases = [("empty.txt", "empty.txt: 0 characters"), ("short.txt", "short.txt: 5 characters"),
             ("folder", "no .txt file or folder"), ("a.pdf", "a.pdf"), ("nowhere.txt", "nowhere.txt")]
    for name, message in cases:
        with pytest.raises(ValueError) as error:
            tokens.prepare([str(tmp_path / name)], out, "bytes")
        assert message in str(error.value) and one_line(error)
    for arguments, message in (((out, "gpt3"), "gpt3"), (("/proc/nowhere", "bytes"), "output folder")):
        with pytest.raises(ValueError, match=message) as error:
            tokens.prepare([good], *arguments)
        assert one_line(error)
    assert not os.path.exists(out) or os.listdir(out) == []


# -----------------------------------------------------------------------------
# token files


class Wide(tokens.Bytes):
    """Bytes with the ids of a large vocabulary."""

    name, vocab_size, eot = "wide", 128256, 128000

    def encode(self, text):
        return super().encode(text).astype(np.int64) + 100_000


def prepared(tmp_path, name="bytes"):
    path = write_text(tmp_path / "a.txt", documents(20))
    return tokens.prepare([path], str(tmp_path / name), name)


def test_ids_of_a_large_vocabulary_are_kept_in_32_bits(tmp_path, monkeypatch):
    monkeypatch.setitem(tokens.TOKENIZERS, "wide", Wide)
    wide, name = tokens.open_tokens(os.path.join(prepared(tmp_path, "wide"), "val.bin"))
    narrow, _ = tokens.open_tokens(os.path.join(prepared(tmp_path), "val.bin"))
    assert (name, wide.dtype, narrow.dtype) == ("wide", np.uint32, np.uint16)
    assert wide[-1] == Wide.eot and (wide[:-1] - 100_000 == narrow[:-1]).all()
    assert isinstance(wide, np.memmap) and wide.ndim == 1 and not wide.flags.writeable


def public_shard(path, ids, count=None, version=1, magic=20240520):
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(head.tobytes() + np.array(ids, "<u2").tobytes())
    return str(path)


def test_a_public_gpt2_shard_is_read(tmp_path):
    shard, name = tokens.open_tokens(public_shard(tmp_path / "s.bin", [50256, 1, 65535]))
    assert name == "gpt2" and shard.tolist() == [50256, 1, 65535] and shard.dtype == np.uint16


def test_every_damaged_file_is_refused_by_name(tmp_path):
    good = open(os.path.join(prepared(tmp_path), "train.bin"), "rb").read()
    cases = {"empty": b"", "in the header": good[:500], "in the magic": good[:4], "a token": good[:-2],
             "half a token": good[:-1], "one more": good + b"\0\0", "no magic": b"X" + good[1:],
             "version": good[:8] + b"\2" + good[9:], "bits": good[:12] + b"\7" + good[13:],
             "text": b"hello\n" * 400, "zeros": bytes(3000)}
    for case, content in cases.items():
        path = tmp_path / f"{case}.bin"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{case}.*prepare or download it again") as error:
            tokens.open_tokens(str(path))
        assert one_line(error)
    for change in ({"count": 4}, {"count": 2}, {"count": -1}, {"version": 2}, {"magic": 20240521}):
        with pytest.raises(ValueError, match="s.bin.*prepare or download it again"):
            tokens.open_tokens(public_shard(tmp_path / "s.bin", [1, 2, 3], **change))
    with pytest.raises(OSError, match="nowhere"):
        tokens.open_tokens(str(tmp_path / "nowhere.bin"))


# -----------------------------------------------------------------------------
# load_data


def test_python_docs_need_neither_network_nor_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tokens.load_data("python-docs", "bytes")
    docs = [topics[name] for name in sorted(topics)]
    ends = bytes(data["val"].astype(np.uint8))  # 256 becomes 0, which is in no document
    assert ends == b"".join(doc.encode() + b"\0" for doc in docs[::20])
    assert sum(len(data[s]) for s in ("val", "test")) + len(data["train"][0]) > 200_000
    assert data["tokenizer"] == "bytes" and os.listdir(tmp_path) == []


def test_text_files_with_commas_between_prepare_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docs = documents(40)
    paths = [write_text(tmp_path / "a.txt", docs[:20]), write_text(tmp_path / "b.txt", docs[20:])]
    data = tokens.load_data(",".join(paths), "bytes")
    assert isinstance(data["train"], list) and isinstance(data["val"], np.memmap)
    assert decoded(tmp_path / "data" / "a-bytes")["val"] == docs[::20]
    again = tokens.load_data("data/a-bytes", "bytes")
    assert (again["train"][0] == data["train"][0]).all() and (again["test"] == data["test"]).all()
    comma = write_text(tmp_path / "c,d.txt", docs)
    assert len(tokens.load_data(comma, "bytes")["val"]) == len(data["val"])


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    folder = prepared(tmp_path)
    for data in (folder, "fineweb"):
        wrong = "bytes" if data == "fineweb" else "gpt2"
        with pytest.raises(ValueError, match="'gpt2'.*'bytes'|'bytes'.*'gpt2'") as error:
            tokens.load_data(data, wrong)
        assert one_line(error)


def test_fineweb_halves_its_validation_shard(tmp_path, monkeypatch):
    asked = []

    def download(repo, filename, revision="main", kind="model"):
        asked.append((repo, kind, filename))
        return public_shard(tmp_path / filename, range(len(asked) * 10))

    monkeypatch.setattr(hub, "download", download)
    data = tokens.load_data("fineweb", "gpt2", n_tokens=100_000_001)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert asked == [("kjj0/fineweb10B-gpt2", "dataset", name) for name in names]
    assert data["val"].tolist() == [0, 1, 2, 3, 4] and data["test"].tolist() == [5, 6, 7, 8, 9]
    assert [len(shard) for shard in data["train"]] == [20, 30]


@pytest.mark.parametrize("n_tokens, files", [(None, 1), (0, 1), (10**8, 1), (25 * 10**7, 3), (10**11, 103)])
def test_fineweb_downloads_as_many_files_as_the_training_needs(n_tokens, files, tmp_path, monkeypatch):
    path = public_shard(tmp_path / "s.bin", range(4))
    monkeypatch.setattr(hub, "download", lambda *args, **more: path)
    assert len(tokens.load_data("fineweb", "gpt2", n_tokens)["train"]) == files


# -----------------------------------------------------------------------------
# batches


def order(n, seed=0, epoch=0):
    """The numbers of n blocks of one token in the order of an epoch."""
    return tokens.Blocks(np.arange(n + 1), 1, seed).batch(n * epoch, n)[0].flatten().tolist()


def test_the_order_is_a_permutation_for_every_size():
    for n in [*range(1, 130), 255, 256, 257, 1000, 1023, 1025, 4097, 50_000]:
        assert sorted(order(n)) == list(range(n)), n


def test_the_order_looks_random():
    n = 10_000
    x = np.array(order(n))
    assert abs(np.corrcoef(x, np.arange(n))[0, 1]) < 0.04  # 4 sigma
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.04
    assert np.sum(np.abs(np.diff(x)) == 1) < 12  # 2 are expected


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    """Whatever was asked before; negative seeds and seeds that differ by their high bits too."""
    blocks = tokens.Blocks(np.arange(101), 1, seed=-3)
    first, later = blocks.batch(0, 100), blocks.batch(700, 100)
    assert blocks.batch(0, 100)[0].equal(first[0]) and not first[0].equal(later[0])
    assert first[0].flatten().tolist() == order(100, seed=-3) == order(100, seed=2**64 - 3)
    assert later[0].flatten().tolist() == order(100, seed=-3, epoch=7)
    seeds = [0, 1, -1, 2**62, 2**32, 2**33]
    assert len({tuple(order(100, seed, epoch)) for seed in seeds for epoch in (0, 1)}) == 12


def test_a_batch_over_the_end_of_an_epoch_is_the_end_of_one_and_the_start_of_the_next():
    blocks = tokens.Blocks(np.arange(101), 1, seed=4)
    over = blocks.batch(90, 25)[0].flatten().tolist()
    assert over == order(100, seed=4)[90:] + order(100, seed=4, epoch=1)[:15]


def test_each_epoch_has_every_block_once_in_an_order_of_its_own():
    data = np.arange(1001, dtype=np.uint16)
    blocks = tokens.Blocks(data, 10, seed=1)
    assert blocks.n_blocks == 100
    firsts = blocks.batch(0, 300)[0][:, 0].view(3, 100)
    assert all(epoch.sort().values.equal(torch.arange(0, 1000, 10)) for epoch in firsts)
    assert not firsts[0].equal(firsts[1]) and not firsts[1].equal(firsts[2])
    other = tokens.Blocks(data, 10, seed=2).batch(0, 100)[0][:, 0]
    assert not other.equal(firsts[0]) and not other.equal(firsts[1])
    assert tokens.Blocks(data, 10, seed=-1).n_blocks == 100


def test_targets_are_the_inputs_shifted_by_one():
    data = np.random.default_rng(0).integers(0, 2**17, 1000).astype(np.uint32)
    idx, targets = tokens.Blocks(data, 7).batch(0, 5)
    assert idx.shape == targets.shape == (5, 7) and idx.dtype == targets.dtype == torch.int64
    assert idx[:, 1:].equal(targets[:, :-1]) and idx.is_contiguous() and targets.is_contiguous()
    for first, last in zip(idx, targets[:, -1]):
        at = next(i for i in range(0, 1000, 7) if (data[i : i + 7] == first.numpy()).all())
        assert data[at + 7] == last


def test_every_token_but_the_first_of_a_shard_is_a_target_once_an_epoch():
    shards = [np.arange(0, 61), np.arange(100, 104), np.arange(200, 241)]  # the second is too short
    blocks = tokens.Blocks(shards, 10)
    idx, targets = blocks.batch(0, blocks.n_blocks)
    assert blocks.n_blocks == 10
    assert targets.flatten().sort().values.tolist() == [*range(1, 61), *range(201, 241)]
    assert (targets - idx).eq(1).all()  # no block straddles two shards


def test_ranks_cover_everything_once_and_an_integer_is_the_whole_state():
    data = np.arange(2001, dtype=np.uint16)
    whole = tokens.Blocks(data, 10, seed=3).batch(0, 240)[0]
    ranks, start, n, w = [tokens.Blocks(data, 10, seed=3) for _ in range(4)], 0, 5, 4
    for step in range(12):  # over the end of an epoch of 200 blocks
        batch = torch.cat([blocks.batch(start + r * n, n)[0] for r, blocks in enumerate(ranks)])
        assert batch.equal(whole[start : start + w * n])
        if step == 6:
            ranks = [tokens.Blocks(data, 10, seed=3) for _ in range(4)]  # resumed
        start += w * n


def test_a_batch_may_be_larger_than_the_data_and_far_along():
    blocks = tokens.Blocks(np.arange(31), 10)
    assert blocks.batch(0, 7)[0].shape == (7, 10)
    assert sorted(blocks.batch(3 * 10**12, 3)[0][:, 0].tolist()) == [0, 10, 20]


def test_fixed_blocks_are_evenly_spaced_and_no_more_than_there_are():
    data = np.arange(1001)
    idx, targets = tokens.Blocks(data, 10).evenly(4)
    assert idx[:, 0].tolist() == [0, 250, 500, 750] and targets.equal(idx + 1)
    assert tokens.Blocks(data, 10).evenly(4)[0].equal(idx)
    assert tokens.Blocks(data, 10).evenly(1000)[0][:, 0].tolist() == list(range(0, 1000, 10))
    assert tokens.Blocks([data, data + 2000], 10).evenly(2)[0][:, 0].tolist() == [0, 2000]


@pytest.mark.parametrize("data", [np.arange(10), np.arange(0), [np.arange(10), np.arange(5)]])
def test_too_few_tokens_for_a_block_are_refused(data):
    for make in (lambda: tokens.Blocks(data, 10), lambda: tokens.Blocks(data, 10).evenly(1)):
        with pytest.raises(ValueError, match="too few for a block of 10") as error:
            make()
        assert one_line(error)
