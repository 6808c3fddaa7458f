"""Tokenizers, token files, preparation and the order of the blocks."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from plumbing import flags, tokens

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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
        pytest.skip("set SPARSE_ASSETS to the folder that get.py wrote")
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
    docs = list(tokens.python_docs())
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

    monkeypatch.setitem(sys.modules, "plumbing.hub", types.SimpleNamespace(download=download))
    data = tokens.load_data("fineweb", "gpt2", shards=2)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert asked == [("kjj0/fineweb10B-gpt2", "dataset", name) for name in names]
    assert data["val"].tolist() == [0, 1, 2, 3, 4] and data["test"].tolist() == [5, 6, 7, 8, 9]
    assert [len(shard) for shard in data["train"]] == [20, 30]
    for shards in (0, 104):
        with pytest.raises(ValueError, match="103"):
            tokens.load_data("fineweb", "gpt2", shards)


# -----------------------------------------------------------------------------
# batches


def order(n, seed=0, epoch=0):
    key = np.full(n, seed * 1000 + epoch, np.uint64)
    return tokens.permute(np.arange(n, dtype=np.uint64), n, key).tolist()


def test_the_order_is_a_permutation_for_every_size():
    for n in [*range(1, 130), 255, 256, 257, 1000, 1023, 1025, 4097, 50_000]:
        assert sorted(order(n)) == list(range(n)), n


def test_the_order_looks_random():
    n = 10_000
    x = np.array(order(n))
    assert abs(np.corrcoef(x, np.arange(n))[0, 1]) < 0.04  # 4 sigma
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.04
    assert np.sum(np.abs(np.diff(x)) == 1) < 12  # 2 are expected


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
    idx, targets = tokens.fixed_blocks(data, 10, 4)
    assert idx[:, 0].tolist() == [0, 250, 500, 750] and targets.equal(idx + 1)
    assert tokens.fixed_blocks(data, 10, 4)[0].equal(idx)
    assert tokens.fixed_blocks(data, 10, 1000)[0][:, 0].tolist() == list(range(0, 1000, 10))
    assert tokens.fixed_blocks([data, data + 2000], 10, 2)[0][:, 0].tolist() == [0, 2000]


@pytest.mark.parametrize("data", [np.arange(10), np.arange(0), [np.arange(10), np.arange(5)]])
def test_too_few_tokens_for_a_block_are_refused(data):
    for make in (lambda: tokens.Blocks(data, 10), lambda: tokens.fixed_blocks(data, 10, 1)):
        with pytest.raises(ValueError, match="too few for a block of 10") as error:
            make()
        assert one_line(error)


# -----------------------------------------------------------------------------
# the command line


def prepare_command(*argv):
    return subprocess.run([sys.executable, "-m", "plumbing.tokens", *argv], cwd=ROOT,
                          capture_output=True, text=True)


def test_the_command_prints_counts_and_paths(tmp_path):
    path, out = write_text(tmp_path / "a.txt", documents(20)), str(tmp_path / "out")
    run = prepare_command("prepare", path, "--tokenizer=bytes", "--out", out)
    assert run.returncode == 0 and run.stderr == ""
    assert "bytes of text a token" in run.stdout and os.path.join(out, "test.bin") in run.stdout
    assert json.load(open(os.path.join(out, "meta.json")))["documents"]["train"] == 18


def test_bad_input_ends_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    good, out = write_text(tmp_path / "a.txt", documents(20)), str(tmp_path / "out")
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("\n<|endoftext|>\n\n")
    short.write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.pdf").write_text("x")
    to = ["--tokenizer", "bytes", "--out", out]
    cases = [(["prepare", str(empty), *to], "empty.txt: 0 characters"), (["prepare", *to], "FILE_OR_FOLDER"),
             (["prepare", str(short), *to], "short.txt: 5 characters"), (["prepare", good], "--out"),
             (["prepare", str(tmp_path / "folder"), *to], ".txt"), (["prepare", good, *to, "--x"], "--x"),
             (["prepare", str(tmp_path / "a.pdf"), *to], "a.pdf"), (["prepair", good, *to], "prepair"),
             (["prepare", str(tmp_path / "nowhere.txt"), *to], "nowhere.txt"), ([], "command"),
             (["prepare", good, "--tokenizer", "gpt3", "--out", out], "gpt3"),
             (["prepare", good, "--tokenizer", "bytes", "--out", "/proc/nowhere"], "output folder")]
    for argv, message in cases:
        monkeypatch.setattr(sys, "argv", ["tokens", *argv])
        with pytest.raises(SystemExit) as stop:
            tokens.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2, argv
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    run = prepare_command("prepare", str(empty), *to)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
