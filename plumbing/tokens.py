"""
From text to batches: tokenizers, memory-mapped token files, and the order of the training blocks.

`prepare` turns .txt files, and folders of them, into {train,val,test}.bin in a folder. A line that
holds only <|endoftext|>, or the end of a file, ends a document. Of the documents 0, 1, 2, ... (files
in the order given, folders sorted) 0, 20, 40, ... are held out for validation (lambda, and which
state to keep) and 10, 30, 50, ... for test (reported numbers). Fewer than 20 documents are cut first,
at blank lines, into pieces of about 20 kB or a 40th of the text; each counts as a document.
"""

import contextlib
import functools
import json
import math
import os
import struct
import sys

import numpy as np
import torch
from tqdm import tqdm

from plumbing import flags, hub
from plumbing.copying import SHORTEST, repeat_pieces

# -----------------------------------------------------------------------------
# tokenizers: name, vocab_size, eot (the id behind every document), bos (the id in front of every
# text, or None), encode, decode

SEPARATOR = "<|endoftext|>"  # between documents; inside a text it is text like any other


class Bytes:
    """One token a byte of UTF-8; needs no download."""

    name, vocab_size, eot, bos = "bytes", 257, 256, None

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)

    def decode(self, ids):
        names = [SEPARATOR.encode() if i == self.eot else bytes([i]) for i in map(int, ids)]
        return b"".join(names).decode("utf-8", "replace")


class GPT2:
    """GPT-2's byte pair encoding, by tiktoken."""

    name, vocab_size, eot, bos = "gpt2", 50257, 50256, None

    @functools.cached_property
    def bpe(self):
        import tiktoken

        from plumbing.bpe import BPE

        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            tiktokens = type(error).__name__
        try:  # the hub has the same table
            own = BPE(hub.download("openai-community/gpt2", "tokenizer.json"))
            if own.name != self.name:
                raise ValueError("its tokenizer.json is another one")
            return own.bpe
        except (OSError, ValueError) as error:
            raise ValueError(f"tiktoken can not download its gpt2 files ({tiktokens}), nor are they on the "
                             f"hub ({error}): set TIKTOKEN_CACHE_DIR to a folder that holds them, or "
                             "choose the tokenizer 'bytes', which needs no download") from None

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])


TOKENIZERS = {"gpt2": GPT2, "bytes": Bytes}


def tokenizer(name):
    """The tokenizer of that name, or of a tokenizer.json or the folder that holds one.

    encode(text) -> ids, a list or array; decode(ids) -> text.
    """
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    if not os.path.exists(name):
        raise ValueError(f"unknown tokenizer {name!r}, there are: {', '.join(TOKENIZERS)}, or a "
                         "tokenizer.json")
    from plumbing.bpe import BPE

    return BPE(name)


def name_for(vocab_size, name=None, model=None):
    """What `tokenizer` takes for a model of that many tokens.

    It is `name` if given, else the tokenizer.json in or beside `model` (a hub name, a folder or a
    checkpoint; None or "scratch" for no model), else the usual one of that size.
    """
    if name is None and model not in (None, "scratch"):
        path = hub.fetch_model(model)
        own = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "tokenizer.json")
        name = own if os.path.exists(own) else None
    name = name or {257: "bytes", 50257: "gpt2", 50304: "gpt2"}.get(vocab_size)
    if name is None:
        raise ValueError(f"the model has {vocab_size} tokens and no tokenizer.json: give its "
                         "--tokenizer")
    if tokenizer(name).vocab_size > vocab_size:
        raise ValueError(f"--tokenizer {name} has more tokens than the model's {vocab_size}")
    return name


# -----------------------------------------------------------------------------
# token files: 1024 bytes of header, then the tokens, all little-endian

HEADER, VERSION = 1024, 1
OURS = struct.Struct("<8sIIIQ64s")  # magic, version, bytes a token, vocab_size, count, tokenizer
PUBLIC = struct.Struct("<iii")  # the GPT-2 shards on the hub: magic, version, count
MAGIC, PUBLIC_MAGIC = b"tokens\r\n", 20240520


def joined(parts, tok):
    """One array of lists and arrays of ids: uint16, or uint32 where that is too small (LLaMA)."""
    dtype = "<u2" if tok.vocab_size <= 2**16 else "<u4"
    return np.concatenate(parts, dtype=dtype, casting="unsafe")


def open_tokens(path, wanted=None):
    """(tokens, tokenizer name) of a file that `prepare` wrote, or of a public GPT-2 shard.

    tokens: 1-D read-only memmap, uint16 or uint32. No token file, a damaged one, or one of another
    tokenizer than `wanted`: ValueError.
    """
    mend = "delete it, then prepare or download it again"
    with open(path, "rb") as f:
        head, size = f.read(HEADER).ljust(HEADER), os.fstat(f.fileno()).st_size
    magic, version, width, _, count, name = OURS.unpack_from(head)
    if magic != MAGIC:
        (magic, version, count), width, name = PUBLIC.unpack_from(head), 2, b"gpt2"
    if magic not in (MAGIC, PUBLIC_MAGIC) or version != VERSION or width not in (2, 4):
        raise ValueError(f"{path} is no token file of version {VERSION}: {mend}")
    expected, name = HEADER + count * width, name.rstrip(b"\0").decode("utf-8", "replace")
    if size != expected:
        raise ValueError(f"{path} is cut off or damaged, {size:,} bytes where its header announces "
                         f"{count:,} tokens, {expected:,} bytes: {mend}")
    if wanted not in (None, name):
        raise ValueError(f"{path} holds tokens of the tokenizer {name!r}, not of {wanted!r}: "
                         f"choose {name!r}, or prepare the text again with {wanted!r}")
    return np.memmap(path, f"<u{width}", "r", HEADER, (count,)), name


# -----------------------------------------------------------------------------
# prepare: text to train.bin, val.bin, test.bin, and at the very end meta.json

SPLITS = ("train", "val", "test")
PIECE, CHUNK = 20_000, 2**20  # characters in a piece of a cut document; in memory of a whole one


def split_of(n):
    """The split of document n."""
    return {0: "val", 10: "test"}.get(n % 20, "train")


def split_paths(folder):
    return [os.path.join(folder, f"{split}.bin") for split in SPLITS]


def text_files(paths):
    """The .txt files among `paths` and, sorted, in the folders among them and below."""
    files = []
    for path in paths:
        below = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path)
                       for name in names if name.endswith(".txt"))
        if not below and not (os.path.isfile(path) and path.endswith(".txt")):
            raise ValueError(f"there is no .txt file or folder with .txt files {path!r}, nor is it a "
                             "folder prepared to the end (one that holds a meta.json)")
        files += below or [path]
    # a file that came twice would be in the training and in the held-out documents
    return list(dict.fromkeys(map(os.path.realpath, files)))


def lines(file, size):
    """The lines of a file, and None where a document ends; a line longer than `size` in parts."""
    with open(file, encoding="utf-8-sig", errors="replace") as f:
        whole = True  # the line before this one came to its end
        while line := f.readline(size):
            yield None if whole and line.strip() == SEPARATOR else line
            whole = line.endswith("\n")
    yield None


def pieces(files, size, cut):
    """Yields (file, text, last): the documents, in pieces of `size` characters, none of them blank.

    A piece ends behind the first blank line after `size`, or the first line after twice that. The
    newline at a document's end is not part of it. last: the document ends with this piece; with
    `cut` every piece counts as a document.
    """
    for file in files:
        text, begun = "", False  # begun: a piece of this document was yielded before
        for line in lines(file, size):
            if line is None:
                text = text.removesuffix("\n")
                if begun or text.strip():
                    yield file, text, True
                text, begun = "", False
                continue
            text += line
            if len(text) >= (size if line.isspace() else 2 * size):
                if begun or text.strip():
                    yield file, text, cut
                    begun = not cut
                text = ""


def piece_size(files):
    """(size, cut) for `pieces`; fewer than 20 documents are to be cut. Too little: ValueError."""
    documents = characters = 0
    for _, text, last in pieces(files, CHUNK, cut=False):
        documents, characters = documents + last, characters + len(text)
        if documents == 20:
            return CHUNK, False
    if characters < 40 * 64:  # more gives 11 pieces or more, as none is longer than 3 * size
        raise ValueError(f"{', '.join(files[:3])}: {characters} characters of text are too few for "
                         "training, validation and test; give 2,560, or 20 documents")
    return min(PIECE, characters // 40), True


def write_splits(files, tok, temporaries):
    """Writes the token files of SPLITS, a piece in memory at a time; returns what they hold."""
    size, cut = piece_size(files)
    n_bytes, broken = 0, set()
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    total = sum(map(os.path.getsize, files))
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=tok.name, disable=None)
    with bar, contextlib.ExitStack() as stack:
        outs = {s: stack.enter_context(open(t, "wb")) for s, t in zip(SPLITS, temporaries)}
        for out in outs.values():
            out.seek(HEADER)
        for file, text, last in pieces(files, size, cut):
            split = split_of(sum(documents.values()))
            ids = joined([tok.encode(text), [tok.eot] * last], tok)
            outs[split].write(ids)
            documents[split] += last
            tokens[split] += len(ids)
            length = len(text.encode())
            n_bytes += length
            bar.update(length)
            if "\ufffd" in text:
                broken.add(file)
        for split, out in outs.items():
            out.seek(0)
            fields = ids.itemsize, tok.vocab_size, tokens[split], tok.name.encode()
            out.write(OURS.pack(MAGIC, VERSION, *fields).ljust(HEADER, b"\0"))
    if broken:
        print("warning: U+FFFD, for bytes that are not UTF-8, in", *sorted(broken), file=sys.stderr)
    return {"documents": documents, "tokens": tokens, "text_bytes": n_bytes}


def replace_all(paths, write, temporaries=()):
    """flags.replace for several files at the same time: write(temporary paths), then rename all."""
    if not paths:
        return write(temporaries)
    flags.replace(paths[0], lambda t: replace_all(paths[1:], write, (*temporaries, t)))


def prepare(paths, out, tokenizer_name):
    """Makes the token files of .txt files and folders in the folder `out`, and returns `out`.

    Keeps what is there if it came from the same files (name, size, time) and tokenizer. Bad input:
    ValueError or OSError, and what is there stays.
    """
    files, bins, meta = text_files(paths), split_paths(out), os.path.join(out, "meta.json")
    sources = [[f, s.st_size, s.st_mtime_ns] for f in files for s in [os.stat(f)]]
    tok = tokenizer(tokenizer_name)
    about = {"version": VERSION, "tokenizer": tok.name, "sources": sources}
    with contextlib.suppress(OSError, ValueError):
        if about.items() <= json.load(open(meta)).items() and all(map(os.path.exists, bins)):
            print(f"{out}: prepared before from the same files")
            return out
    flags.open_folder(out)

    def write(temporaries):
        about.update(write_splits(files, tok, temporaries))
        if os.path.exists(meta):
            os.remove(meta)  # from here until it is back the folder does not count as prepared

    replace_all(bins, write)
    flags.replace_text(meta, json.dumps(about, indent=1))
    print(f"{about['text_bytes'] / sum(about['tokens'].values()):.2f} bytes of text a token")
    for path, n, count in zip(bins, about["documents"].values(), about["tokens"].values()):
        print(f"{n:10,} documents {count:14,} tokens  {path}")
    return out


# -----------------------------------------------------------------------------
# load_data: what train.py calls


def python_docs(tok):
    """{split: tokens} of the help topics in every installation of Python: 80 documents, 465 kB of English."""
    from pydoc_data.topics import topics

    parts = {split: [] for split in SPLITS}
    for n, name in enumerate(sorted(topics)):
        parts[split_of(n)] += [tok.encode(topics[name]), [tok.eot]]
    return {split: joined(part, tok) for split, part in parts.items()}


def fineweb(n_tokens):
    """Paths of a validation file and of enough training files, web text, 100M gpt2 tokens each."""
    files = min(max(1, math.ceil((n_tokens or 0) / 1e8)), 103)  # there are no more
    names = ["val_000000", *(f"train_{i:06}" for i in range(1, files + 1))]
    return [hub.download("kjj0/fineweb10B-gpt2", f"fineweb_{n}.bin", kind="dataset") for n in names]


def load_data(data, tokenizer_name, n_tokens=None):
    """{"train": [tokens, ...], "val": tokens, "test": tokens, "tokenizer": name}, tokens 1-D.

    data: None for fineweb or python-docs, as the tokenizer is GPT-2's or not; "fineweb" (as much of it as `n_tokens` of training need; its validation file is halved into
    val and test), "python-docs" (in memory), a prepared folder, or .txt files and folders with
    commas between, prepared in a folder of data/ that is named after the first. Missing or damaged
    files, tokens of another tokenizer: ValueError or OSError.
    """
    tok = tokenizer(tokenizer_name)
    if not data:
        data = "fineweb" if tok.name == "gpt2" else "python-docs"
        print(f"data: {data}; --data gives another")
    if data == "python-docs":
        *train, val, test = python_docs(tok).values()
    elif data == "fineweb":
        if tok.name != "gpt2":
            raise ValueError(f"fineweb holds tokens of 'gpt2', not of {tok.name!r}: give .txt files "
                             "to --data")
        val, *train = (open_tokens(path, "gpt2")[0] for path in fineweb(n_tokens))
        val, test = val[: len(val) // 2], val[len(val) // 2 :]
    else:
        if not os.path.exists(os.path.join(data, "meta.json")):
            files = [data] if os.path.exists(data) else data.split(",")
            name = os.path.splitext(os.path.basename(os.path.realpath(files[0])))[0]
            data = prepare(files, os.path.join("data", f"{name}-{tok.name}"), tokenizer_name)
        *train, val, test = (open_tokens(path, tok.name)[0] for path in split_paths(data))
    return {"train": train, "val": val, "test": test, "tokenizer": tok.name}


# -----------------------------------------------------------------------------
# batches: every block once an epoch, and one integer of state


class Blocks:
    """Blocks of block_size + 1 tokens, block_size apart, so every token but the first is a target.

    tokens: a 1-D integer array, or a list of them, which no block straddles. Block number i of
    the training is in epoch i // n_blocks; each epoch has all the blocks once, in an order of its
    own that follows from (seed, epoch). The state is the count of blocks consumed. repeat: the share
    of the blocks in which `repeat_pieces` puts something to copy, of text and of ids in `alphabet`;
    every other one at 0.5, so that each batch has its share. What can not be foreseen has target -1.
    """

    def __init__(self, tokens, block_size, seed=0, repeat=0.0, alphabet=(), fill=False):
        self.tokens = tokens if isinstance(tokens, list) else [tokens]
        self.block_size, self.seed, self.epoch = block_size, seed % 2**64, None
        self.repeat, self.alphabet, self.fill = repeat, np.array(alphabet), fill
        self.ends = np.cumsum([max(0, len(t) - 1) // block_size for t in self.tokens])
        self.n_blocks = int(self.ends[-1])
        if not self.n_blocks:
            most = max(map(len, self.tokens))
            raise ValueError(f"{most} tokens are too few for a block of {block_size} + 1: "
                             "give more text, or a smaller block size")
        if repeat and block_size < 2 * SHORTEST:
            raise ValueError(f"a piece of {SHORTEST} tokens does not come twice in a context of {block_size}: "
                             f"give --context {2 * SHORTEST} or more, or --repeat 0")

    def order(self, epoch):
        """All the blocks, shuffled; the order of the epoch asked for last is kept."""
        if epoch != self.epoch:
            # a spawn key, because the pairs (2^32, 0) and (0, 1) would be the same seed of numpy
            generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            self.epoch, self.shuffled = epoch, generator.permutation(self.n_blocks)
        return self.shuffled

    def batch(self, start, n):
        """idx, targets of the blocks number start ... start + n - 1: int64 (n, block_size), CPU.

        Rank r of w ranks that consume n blocks each calls batch(start + r * n, n), and then adds
        w * n to start.
        """
        numbers = (divmod(i, self.n_blocks) for i in range(start, start + n))
        return self.read([self.order(epoch)[place] for epoch, place in numbers], start)

    def evenly(self, count):
        """idx, targets, int64 (count, block_size): evenly spaced blocks, for evaluation.

        Always the same ones; all that there are where `count` is more.
        """
        count = min(count, self.n_blocks)
        return self.read(np.arange(count) * self.n_blocks // count, 0)

    def read(self, blocks, start):
        """idx, targets of these blocks of the data, which are number start, start + 1, ... of all."""
        rows, ignored = [], np.zeros((len(blocks), self.block_size + 1), bool)
        for n, block in enumerate(map(int, blocks)):
            i = int(np.searchsorted(self.ends, block, "right"))
            first = (block - (int(self.ends[i - 1]) if i else 0)) * self.block_size
            rows.append(self.tokens[i][first : first + self.block_size + 1].astype(np.int64))
            before = (start + n) * self.repeat
            if int(before + self.repeat) > int(before):
                random = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(start + n, 0)))
                ignored[n] = repeat_pieces(rows[n], self.alphabet, random, self.fill)
        rows = torch.from_numpy(np.stack(rows))
        targets = rows.masked_fill(torch.from_numpy(ignored), -1)
        return rows[:, :-1].contiguous(), targets[:, 1:].contiguous()
