"""
From text to batches: tokenizers, memory-mapped token files, and the order of the training blocks.

    python -m plumbing.tokens prepare FILES_OR_FOLDERS... --tokenizer gpt2 --out data/NAME

turns .txt files, and folders of them, into data/NAME/{train,val,test}.bin. A line that holds only
<|endoftext|>, or the end of a file, ends a document. Of the documents 0, 1, 2, ... (files in the
order given, folders sorted) 0, 20, 40, ... are held out for validation (tau, which checkpoint) and
10, 30, 50, ... for test (reported numbers). Fewer than 20 documents are cut first, at blank lines,
into pieces of about 20 kB or a 40th of the text, and each piece counts as a document.
"""

import argparse
import contextlib
import functools
import json
import os
import struct
import sys

import numpy as np
import torch
from tqdm import tqdm

from plumbing import flags, hub

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

        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise ValueError(f"tiktoken can not download its gpt2 files ({type(error).__name__}): "
                             "set TIKTOKEN_CACHE_DIR to a folder that holds them, or choose the "
                             "tokenizer 'bytes', which needs no download") from None

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
    """What `tokenizer` takes for a model of that many tokens: `name` if given, else by its size.

    Else its own: the tokenizer.json in or beside `model`, a hub name, folder or checkpoint.
    """
    name = name or {257: "bytes", 50257: "gpt2", 50304: "gpt2"}.get(vocab_size)
    if name is None and model:
        path = hub.fetch_model(model)
        own = os.path.join(os.path.dirname(path) if os.path.isfile(path) else path, "tokenizer.json")
        name = own if os.path.exists(own) else None
    if name is None:
        raise ValueError(f"the model has {vocab_size} tokens and no tokenizer.json: say of which "
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
        if not os.path.exists(path):
            raise ValueError(f"there is no file or folder {path!r}")
        if not below and not (os.path.isfile(path) and path.endswith(".txt")):
            raise ValueError(f"{path!r} is neither a .txt file nor a folder with .txt files, nor a "
                             "folder prepared to the end (one that holds a meta.json)")
        files += below or [path]
    # a file that came twice would be in the training and in the held-out documents
    return list(dict.fromkeys(map(os.path.realpath, files)))


def pieces(files, size, cut):
    """Yields (file, text, last): the documents, in pieces of `size` characters, none of them blank.

    A piece ends behind the first blank line after `size`, or the first line after twice that, but a
    line longer than `size` anywhere. The newline at a document's end is not part of it. last: the
    document ends here, as it does after every piece with `cut`.
    """
    for file in files:
        with open(file, encoding="utf-8-sig", errors="replace") as f:
            text, begun, line = "", False, "\n"
            while line:
                fresh, line = line.endswith("\n"), f.readline(size)
                end = not line or fresh and line.strip() == SEPARATOR
                text = text.removesuffix("\n") if end else text + line
                if end or len(text) >= (size if line.isspace() else 2 * size):
                    if begun or text.strip():
                        yield file, text, end or cut
                        begun = not (end or cut)
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


def python_docs():
    """The help topics in every installation of Python: about 80 documents of English, 465 kB."""
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def fineweb(shards=1):
    """Paths of a validation and `shards` training files of web text, 100M gpt2 tokens each."""
    from plumbing.hub import download

    if not 1 <= shards <= 103:
        raise ValueError(f"fineweb has 1 to 103 training shards, not {shards}")
    names = ["val_000000", *(f"train_{i:06}" for i in range(1, shards + 1))]
    return [download("kjj0/fineweb10B-gpt2", f"fineweb_{n}.bin", kind="dataset") for n in names]


def load_data(data, tokenizer_name, shards=1):
    """{"train": [tokens, ...], "val": tokens, "test": tokens, "tokenizer": name}, tokens 1-D.

    data: "fineweb" (its validation shard is halved into val and test), "python-docs" (in memory),
    a prepared folder, or .txt files and folders with commas between, prepared in a folder of data/
    that is named after the first. Missing or damaged files, tokens of another tokenizer, shards
    that do not exist: ValueError or OSError.
    """
    tok = tokenizer(tokenizer_name)
    if data == "python-docs":
        parts = {split: [] for split in SPLITS}
        for n, text in enumerate(python_docs()):
            parts[split_of(n)] += [tok.encode(text), [tok.eot]]
        *train, val, test = (joined(part, tok) for part in parts.values())
    elif data == "fineweb":
        if tok.name != "gpt2":
            raise ValueError(f"fineweb holds tokens of 'gpt2', not of {tok.name!r}: give .txt files "
                             "to --data")
        val, *train = (open_tokens(path, "gpt2")[0] for path in fineweb(shards))
        val, test = val[: len(val) // 2], val[len(val) // 2 :]
    else:
        if not os.path.exists(os.path.join(data, "meta.json")):
            sources = [data] if os.path.exists(data) else data.split(",")
            name = os.path.splitext(os.path.basename(os.path.realpath(sources[0])))[0]
            data = os.path.join("data", f"{name}-{tok.name}")
            prepare(sources, data, tokenizer_name)
        *train, val, test = (open_tokens(path, tok.name)[0] for path in split_paths(data))
    return {"train": train, "val": val, "test": test, "tokenizer": tok.name}


# -----------------------------------------------------------------------------
# batches: every block once an epoch, in an order that needs no table and one integer of state


def mix(x):
    """splitmix64: scrambles a uint64 array."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


def permute(x, n, key):
    """Where the positions x go in the order `key` of n items; uint64 arrays, x < n, in and out.

    Four rounds of a Feistel network permute [0, 4^half); whoever lands at n or above goes on until
    it is below, which leaves a permutation of [0, n).
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    x, mask, outside = x.copy(), 2**half - 1, np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & mask
        for r in range(4):
            left, right = right, left ^ mix(mix(key[outside] + r) ^ right) & mask
        x[outside] = left << half | right
        outside = x >= n
    return x


class Blocks:
    """Blocks of block_size + 1 tokens, block_size apart, so every token but the first is a target.

    tokens: a 1-D integer array, or a list of them, which no block straddles. Block number i of
    the training is in epoch i // n_blocks; each epoch has all the blocks once, in an order of its
    own that follows from (seed, epoch). The state is the count of blocks consumed.
    """

    def __init__(self, tokens, block_size, seed=0):
        self.tokens = tokens if isinstance(tokens, list) else [tokens]
        self.block_size, self.seed = block_size, seed
        self.ends = np.cumsum([max(0, len(t) - 1) // block_size for t in self.tokens])
        self.n_blocks = int(self.ends[-1])
        if not self.n_blocks:
            held = max(map(len, self.tokens))
            raise ValueError(f"{held} tokens are too few for a block of {block_size} + 1: "
                             "give more text, or a smaller block size")

    def batch(self, start, n):
        """idx, targets of the blocks number start ... start + n - 1: int64 (n, block_size), CPU.

        Rank r of w ranks that consume n blocks each calls batch(start + r * n, n), and then adds
        w * n to start.
        """
        epoch, x = np.divmod(np.arange(start, start + n, dtype=np.uint64), self.n_blocks)
        key = mix(mix(np.array([self.seed % 2**64], np.uint64)) + epoch)
        return self.read(permute(x, self.n_blocks, key))

    def read(self, blocks):
        """idx, targets of blocks in the order of the data."""
        rows = []
        for block in map(int, blocks):
            i = int(np.searchsorted(self.ends, block, "right"))
            first = (block - (int(self.ends[i - 1]) if i else 0)) * self.block_size
            rows.append(self.tokens[i][first : first + self.block_size + 1])
        rows = torch.from_numpy(np.stack(rows).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def fixed_blocks(tokens, block_size, count):
    """idx, targets, int64 (count, block_size): evenly spaced blocks, for evaluation.

    Always the same ones; all that there are where `count` is more.
    """
    blocks = Blocks(tokens, block_size)
    count = min(count, blocks.n_blocks)
    return blocks.read(np.arange(count) * blocks.n_blocks // count)


# -----------------------------------------------------------------------------
# the command line


def main():
    parser = flags.Parser("python -m plumbing.tokens", description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare"])
    parser.add_argument("sources", metavar="FILE_OR_FOLDER", nargs="+", help=".txt files, folders")
    parser.add_argument("--tokenizer", default="gpt2", help=f"{', '.join(TOKENIZERS)} or a tokenizer.json [gpt2]")
    parser.add_argument("--out", required=True, help="folder to write, for example data/NAME")
    try:
        args = parser.parse_args()
        prepare(args.sources, args.out, args.tokenizer)
    except (ValueError, OSError) as error:  # as flags.run, which knows no positional arguments
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped")


if __name__ == "__main__":
    main()
