"""
A Hugging Face tokenizer.json (byte-level BPE: GPT-2, SmolLM2, LLaMA-3) by tiktoken, with equal ids.

Both cut a text into pieces by a regex, then merge the bytes of each piece. `tokenizers` merges the
pairs of a list, in its order; tiktoken any two neighbours that make a token, lowest id first. A file
where that differs is refused. What remains: letters and digits newer than Unicode 16 may be cut in
another way, and a million spaces in a row are too many for tiktoken's regex.
"""

import hashlib
import json
import os

import regex  # a dependency of tiktoken
import tiktoken

from plumbing.files import read_json

EOT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # the usual names; the first that there is
GPT2_VOCABULARY = "0e95d799649ea6a89fdaebc83cf93a3166764ca6268067780e6f07cbcab4a8e9"  # its sha256, see `read`


CHECKS = 20_000_000  # squared bytes of all tokens, at most; GPT-2 and SmolLM2 have below 3 million
IDS = 2**24  # more tokens than any tokenizer has


class Unsupported(ValueError):
    """What a file has, and tiktoken no exact counterpart for."""


# -----------------------------------------------------------------------------
# pieces: the pre_tokenizer as one regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits cuts every digit out before the regex of GPT-2 sees what lies between them: no space goes
# with a digit, and the spaces in front of one are the end of a text, so they stay together.
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def piece_pattern(pre_tokenizer):
    """The regex that finds the pieces."""
    step = pre_tokenizer or {}
    match step.get("pretokenizers", [step]):
        case [{"type": "ByteLevel", "add_prefix_space": False}] if step.get("use_regex", True):
            return GPT2  # older files do not say use_regex
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return DIGITS
        case [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}] if r == LLAMA3:
            return LLAMA3
    raise Unsupported(f"the pre_tokenizer {json.dumps(pre_tokenizer)[:300]}")


# -----------------------------------------------------------------------------
# merges

# A tokenizer.json writes a byte as the character of that number or, if that is not visible, as the
# next one from U+0100 on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
BYTE = {chr(b): b for b in VISIBLE} | {chr(0x100 + i): b for i, b in enumerate(HIDDEN)}


def to_bytes(token):
    return bytes(BYTE[c] for c in token)


def last_parts(token, ranks):
    """The two parts of which tiktoken makes a token at last, as (b"t", b"he") of b"the".

    This is tiktoken's loop on the token's own bytes: merge the neighbours of the lowest rank, until no
    merge has a lower rank than the token. More than two parts: tiktoken never makes this token.
    """
    parts, rank = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        made = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
        if min(made) >= rank:
            break
        i = made.index(min(made))  # the leftmost
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def check_merges(ranks, merges, ignore_merges):
    """Raises Unsupported unless merging by rank does the same as merging by the list.

    The list must go by the ranks of what it makes, and hold every pair that tiktoken merges. Before it
    merges two parts to a token, nothing was merged across the token's ends, so the bytes between them
    were merged as if alone: the two are the token's last_parts. Only that pair is looked up.
    """
    made = [ranks.get(a + b) if a in ranks and b in ranks else None for a, b in merges]
    if None in made:
        raise Unsupported(f"the merge {merges[made.index(None)]}, not of two tokens to one")
    if made != sorted(made):
        raise Unsupported("merges in another order than the ids of what they make")
    if sum(len(token) ** 2 for token in ranks) > CHECKS:
        raise Unsupported("tokens too long to check")
    listed = set(merges)
    for token in ranks:
        parts = last_parts(token, ranks)
        # tiktoken takes a piece that is a token as a whole; with ignore_merges, tokenizers does too
        if len(parts) == 2 and parts not in listed or len(parts) > 2 and not ignore_merges:
            raise Unsupported(f"the token {token}, which no merge makes of {parts}")


# -----------------------------------------------------------------------------
# tokenizer


class BPE:
    """The tokenizer of a tokenizer.json, or of a folder that holds one.

    name: "gpt2" for GPT-2's, else "bpe-" and a hash of the file. special: {name: id}. bos: the id in
    front of every text, or None; encode leaves it out. Special tokens in a text are text, and the
    file's truncation and padding are not applied.
    """

    def __init__(self, path):
        path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        with open(path, "rb") as f:
            self.name = "bpe-" + hashlib.file_digest(f, "sha256").hexdigest()[:12]
        try:
            self.read(read_json(path))
        except Unsupported as what:
            raise ValueError(f"{path} has {what!s:.400}: only byte-level BPE with an end-of-text token, as of "
                             "GPT-2, SmolLM2 and LLaMA-3, can be read") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is no tokenizer.json or damaged: download it again") from None

    def read(self, file):
        model, added = file["model"], file["added_tokens"]
        if model.get("type", "BPE") != "BPE":
            raise Unsupported(f"a model of type {model['type']}")
        for key in "dropout unk_token continuing_subword_prefix end_of_word_suffix byte_fallback".split():
            if model.get(key):
                raise Unsupported(f"a model with {key} {model[key]!r}")
        if file["normalizer"]:
            raise Unsupported(f"the normalizer {json.dumps(file['normalizer'])[:300]}")
        if plain := [token["content"] for token in added if not token["special"]]:
            raise Unsupported(f"the added token {plain[0]!r}, which is not special")
        self.pattern = piece_pattern(file["pre_tokenizer"])
        self.special = {token["content"]: token["id"] for token in added}
        self.bos = self.first_token(file["post_processor"])
        self.eot = next((self.special[name] for name in EOT if name in self.special), None)
        if self.eot is None:
            raise Unsupported(f"no special token {' or '.join(EOT)}")
        ids = [*model["vocab"].values(), *self.special.values()]
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < IDS]:
            raise Unsupported(f"the token id {wrong[0]!r:.40}")
        self.vocab_size = max(ids) + 1

        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        ignore_merges, made = model.get("ignore_merges", False), {a + b for a, b in merges}
        # a special token may be in the vocabulary too, where no merge leads to it
        ranks = {to_bytes(token): i for token, i in model["vocab"].items()
                 if token not in self.special or token in made or token in BYTE or ignore_merges}
        check_merges(ranks, [(to_bytes(a), to_bytes(b)) for a, b in merges], ignore_merges)

        # tokenizers drops bytes that the vocabulary lacks; here they get ids behind all others
        self.missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        if self.missing and ignore_merges:
            raise Unsupported("ignore_merges and a vocabulary without some of the 256 bytes")
        ranks |= {bytes([b]): self.vocab_size + i for i, b in enumerate(self.missing)}
        if len(set(ranks.values())) < len(ranks):
            raise Unsupported("two tokens of the same id")
        table = json.dumps([sorted((i, token.hex()) for token, i in ranks.items()), self.special])
        if self.pattern == GPT2 and hashlib.sha256(table.encode()).hexdigest() == GPT2_VOCABULARY:
            self.name = "gpt2"  # the name that its token files carry
        self.bpe = tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=ranks,
                                     special_tokens=self.special)

    def first_token(self, post_processor):
        """The id that the post_processor puts in front of every text."""
        step = post_processor or {"type": "ByteLevel"}
        steps = [s for s in step.get("processors", [step]) if s["type"] != "ByteLevel"]
        match [s.get("single") for s in steps]:
            case [] | [[{"Sequence": _}]]:
                return None
            case [[{"SpecialToken": {"id": name}}, {"Sequence": _}]]:
                return self.special[name]
        raise Unsupported(f"the post_processor {json.dumps(post_processor)[:300]}")

    def encode(self, text):
        ids = self.bpe.encode_ordinary(text)
        if max(ids, default=0) < self.vocab_size:
            return ids
        # within a piece, what stands on both sides of a dropped byte may merge
        pieces = (piece.encode("utf-8", "replace").translate(None, self.missing)
                  for piece in regex.findall(self.pattern, text))
        return [i for piece in pieces if piece for i in self.bpe._encode_single_piece(piece)]

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])
