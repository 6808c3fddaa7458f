"""tokenizer.json by tiktoken against the tokenizers package, on small tokenizers trained here."""

import hashlib
import json
import os
import random

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from plumbing import bpe

ASSETS = os.environ.get("SPARSE_ASSETS")  # a folder with smollm2-135m/tokenizer.json and news.txt
TEXT = """\
Don't they'll we've I'M you'RE he'd it's. In 1984, 12 of 345 cost $6,789.01!! x = y[0] != 2**31
    for i in range(10):\n\t\treturn {"a": [1, 22, 333]}\r\n\r\n  naïve café 日本語 中文 한국어 Привет
مرحبا ١٢٣ नमस्ते १२३ Ⅻ ½ ² 😀 👨‍👩‍👧 é e\u0301 <|endoftext|> <|begin_of_text|> !!!! .... ---- ==== \n\n\n
"""
HARD = [
    "", " ", "\n", "  \n \n", "a", "5", " 5", "   5", "\n5", "\n\n 5", " \t5", "\t\t55a", "a  5 5  b",
    "12345678", "1 2  3   4", "3.14", "x1y22z333", "don't", "DON'T we'LL", "'s's 's  's", "it's5",
    "5's", "'5", "''s", "'ſ", "'ll5've", "\r\n\r\n", "a\r\n b\n\n\nc", " \r\n \r5", "a\u00a0\u00a05",
    "\u3000x\u20285\u0085", "\x00", "a\x00b \x01\x02!\x04!\x1f5", "!\x04!", " \x04", "  \x04 5", "a\x04b",
    "\x7f\x80\x9f\xad", "\ufffd", "\ufeffa", "👨‍👩‍👧‍👦 👍🏽", "🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇩🇪", "日本語テキスト、中文。", "e\u0301 n\u0303o", "\u0301",
    "क्षत्रिय १२३", "السلام ١٢٣ ۴۵", "Ⅷ Ⅻ ½ ² ㊿ 一二三", "ⅧⅫ  Ⅷ",
    "\U00040000!\U000f0000\U0010ffff",
    "ﬆ'ﬅ 'K ß", "_x __y__", " .\n\n", "?!\r\r\n5", "<|endoftext|>", "a<|begin_of_text|>b</s>",
    "<|end_of_text|>5", "a zebra", "a" * 3000, " " * 3000 + "5", "1" * 3000, "=" * 999, "\n" * 999 + "x",
    "ab" * 1500,
]
FRAGMENTS = [text for text in HARD if 0 < len(text) < 30]
FRAGMENTS += [*"abstdlmrve'  \t\n\r.!-=015é\u0301日語😀\u200d١Ⅷ½\x00\x04\x13\u00a0\u2028", "the", "'ll", "   ",
              "\n\n", "!!", "in", "re"]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LAYOUTS = {
    "gpt2": BYTE_LEVEL,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama3": pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(bpe.LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
}


def trained(layout, alphabet=None, vocab_size=600, eot="<|endoftext|>"):
    """The content of a tokenizer.json, trained on TEXT; alphabet None: all 256 bytes."""
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = LAYOUTS[layout], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[eot, "<|begin_of_text|>"], show_progress=False,
        initial_alphabet=BYTE_LEVEL.alphabet() if alphabet is None else [])
    hf.train_from_iterator([TEXT if alphabet is None else alphabet], trainer)
    return json.loads(hf.to_str())


def llama3():
    """As LLaMA-3's: special tokens behind the vocabulary, every split of a token a merge, bos."""
    file = trained("llama3", eot="<|end_of_text|>")
    names = [token["content"] for token in file["added_tokens"]]
    tokens = [t for t in file["model"]["vocab"] if t not in names]
    tokens.append("Ġzebra")  # the merges do not get there, as to some tokens of LLaMA-3
    vocab = {t: i for i, t in enumerate(tokens)}
    splits = [[t[:i], t[i:]] for t in tokens for i in range(1, len(t))]
    merges = [[a, b] for a, b in splits if a in vocab and b in vocab]
    file["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": True}
    for i, token in enumerate(file["added_tokens"]):
        token["id"] = len(vocab) + i
    bos = file["added_tokens"][1]["id"]
    template = processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", bos)])
    hf = Tokenizer.from_str(json.dumps(file))
    hf.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return json.loads(hf.to_str())


def pair(file, folder):
    """(ours, a function to the ids of tokenizers) of the content of a tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    ours, hf = bpe.BPE(path), Tokenizer.from_file(str(path))
    hf.encode_special_tokens = True
    return ours, lambda text: hf.encode(text, add_special_tokens=False).ids


def random_texts(n, seed):
    draw = random.Random(seed)
    for _ in range(n):
        yield "".join(draw.choices(FRAGMENTS, k=draw.randint(1, 12)))


FILES = {
    "gpt2": lambda: trained("gpt2"),
    "smollm2": lambda: trained("smollm2"),
    "llama3": llama3,
    "gpt2, bytes missing": lambda: trained("gpt2", alphabet="the!! in re... 'll 's 日本語 éè 12 --==" * 3),
    "smollm2, bytes missing": lambda: trained("smollm2", alphabet="the!! a. in re. 'll 日本 😀 é 12" * 3),
}


@pytest.mark.parametrize("kind", FILES)
def test_ids_are_those_of_tokenizers(kind, tmp_path):
    ours, ids = pair(FILES[kind](), tmp_path)
    assert bool(ours.missing) == ("missing" in kind)
    for text in [*HARD, TEXT, *random_texts(3000, seed=0)]:
        assert ours.encode(text) == ids(text), repr(text)
        if not ours.missing:
            assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_character_is_of_the_same_kind(kind, tmp_path):
    """Beside a letter, a digit, a space and a mark, a thousand characters a time."""
    ours, ids = pair(FILES[kind](), tmp_path)
    draw = random.Random(1)
    newer = {*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)}  # digits since Unicode 17
    points = [*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200), 0x40000, 0x10FFFF]
    points = [p for p in points if p not in newer]
    for start in range(0, len(points), 1000):
        text = "".join(chr(p) + draw.choice(["a", "1", "  ", "!", "'s", "", "\n"])
                       for p in points[start : start + 1000])
        assert ours.encode(text) == ids(text)


def test_a_changed_file_has_the_same_ids_or_is_refused(tmp_path):
    """Random changes to vocabulary and merges; tokenizers has the last word."""
    draw, texts, accepted = random.Random(2), [TEXT, *random_texts(30, seed=3)], 0
    for i in range(150):
        file = FILES[draw.choice(list(FILES))]()
        vocab, merges = file["model"]["vocab"], file["model"]["merges"]
        a, b = draw.sample(range(len(merges)), 2)
        change = i % 5
        if change == 0:
            merges[a], merges[b] = merges[b], merges[a]
        elif change == 1:
            del merges[a]
        elif change == 2:
            x, y = ("".join(merges[n]) for n in (a, b))
            vocab[x], vocab[y] = vocab[y], vocab[x]
        elif change == 3:  # one more way to make a token, among those that are there
            token = "".join(merges[a])
            cut = draw.randrange(1, len(token))
            merges.insert(a + draw.randint(0, 1), [token[:cut], token[cut:]])
        else:
            file["model"]["ignore_merges"] = not file["model"]["ignore_merges"]
        try:
            ours, ids = pair(file, tmp_path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            accepted += 1
            assert all(ours.encode(text) == ids(text) for text in texts)
    assert 20 < accepted < 130


def test_names_and_numbers(tmp_path):
    file = llama3()
    ours, _ = pair(file, tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    assert ours.name == bpe.BPE(str(tmp_path)).name == "bpe-" + hashlib.sha256(content).hexdigest()[:12]
    names = {token["content"]: token["id"] for token in file["added_tokens"]}
    assert ours.special == names
    assert (ours.eot, ours.bos) == (names["<|end_of_text|>"], names["<|begin_of_text|>"])
    assert ours.vocab_size == len(file["model"]["vocab"]) + 2 == max(names.values()) + 1
    text = "<|begin_of_text|>a 1<|end_of_text|>"
    assert ours.decode([ours.bos, *ours.encode("a 1"), ours.eot]) == text
    assert len(ours.encode(" zebra")) == 1
    assert ours.encode("<|end_of_text|>") != [ours.eot]

    ours, _ = pair(trained("smollm2"), tmp_path)
    assert (ours.eot, ours.bos) == (0, None)
    ours, _ = pair(trained("gpt2", eot="</s>"), tmp_path)
    assert (ours.eot, ours.bos) == (0, None)


def vocabulary_hash(vocab, special):
    ranks = sorted((i, bytes(bpe.BYTE[c] for c in token).hex()) for token, i in vocab.items())
    return hashlib.sha256(json.dumps([ranks, special]).encode()).hexdigest()


def test_gpt2s_vocabulary_is_named_gpt2_whatever_the_file(tmp_path, monkeypatch):
    """Here the one trained in this test stands for GPT-2's."""
    file, special = trained("gpt2"), {"<|endoftext|>": 0, "<|begin_of_text|>": 1}
    vocab = {token: i for token, i in file["model"]["vocab"].items() if token not in special}
    assert pair(file, tmp_path)[0].name.startswith("bpe-")
    monkeypatch.setattr(bpe, "GPT2_VOCABULARY", vocabulary_hash(vocab, special))
    assert pair(file, tmp_path)[0].name == "gpt2"
    file["model"]["vocab"] = dict(reversed(file["model"]["vocab"].items()))
    file["model"]["merges"] = [" ".join(merge) for merge in file["model"]["merges"]]
    assert pair(file, tmp_path)[0].name == "gpt2"
    digits = file | {"pre_tokenizer": trained("smollm2")["pre_tokenizer"]}  # the same ids, other cuts
    assert pair(digits, tmp_path)[0].name.startswith("bpe-")
    file["model"]["merges"].pop()
    last = max(file["model"]["vocab"], key=file["model"]["vocab"].get)
    del file["model"]["vocab"][last]
    assert pair(file, tmp_path)[0].name.startswith("bpe-")


def test_older_files(tmp_path):
    """Merges as strings, no model type, no use_regex."""
    file = trained("gpt2")
    file["model"]["merges"] = [" ".join(merge) for merge in file["model"]["merges"]]
    del file["model"]["type"], file["pre_tokenizer"]["use_regex"]
    ours, ids = pair(file, tmp_path)
    assert all(ours.encode(text) == ids(text) for text in HARD)


def put(*keys_and_value):
    """A change of a tokenizer.json: file[key]...[key] = value."""
    *keys, last, value = keys_and_value

    def change(file):
        for key in keys:
            file = file[key]
        file[last] = value

    return change


REFUSED = {
    "type Unigram": put("model", "type", "Unigram"),
    "type WordPiece": put("model", "type", "WordPiece"),
    "dropout": put("model", "dropout", 0.1),
    "unk_token": put("model", "unk_token", "<unk>"),
    "continuing_subword_prefix": put("model", "continuing_subword_prefix", "##"),
    "end_of_word_suffix": put("model", "end_of_word_suffix", "</w>"),
    "byte_fallback": put("model", "byte_fallback", True),
    "the normalizer": put("normalizer", {"type": "NFC"}),
    "the pre_tokenizer null": put("pre_tokenizer", None),
    "Metaspace": put("pre_tokenizer", {"type": "Metaspace", "replacement": "▁"}),
    '"add_prefix_space": true': put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True),
    '"individual_digits": false': put("pre_tokenizer", "pretokenizers", 0, "individual_digits", False),
    '"use_regex": false': put("pre_tokenizer", "pretokenizers", 1, "use_regex", False),
    "the post_processor": put("post_processor", {"type": "RobertaProcessing"}),
    "'<|begin_of_text|>', which is not special": put("added_tokens", 1, "special", False),
    "no special token": put("added_tokens", []),
    "the merge": put("model", "merges", 0, ["qq", "q"]),
    "another order": lambda file: file["model"]["merges"].reverse(),
    "which no merge makes": lambda file: file["model"]["merges"].pop(),
    "some of the 256 bytes": put("model", "ignore_merges", True),
    "two tokens of the same id": put("model", "vocab", "q", 3),
    "damaged": put("model", "vocab", None),
    "is no tokenizer.json": lambda file: file.clear(),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_can_not_be_the_same_is_refused(words, tmp_path):
    file = trained("smollm2")
    if words == "some of the 256 bytes":
        del file["model"]["vocab"]["q"]
    REFUSED[words](file)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        bpe.BPE(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_another_split_regex_is_refused(tmp_path):
    file = llama3()
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += r"|\s"
    with pytest.raises(ValueError, match="the pre_tokenizer"):
        pair(file, tmp_path)


def test_no_json(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\n{")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        bpe.BPE(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        bpe.BPE(tmp_path / "elsewhere")


@pytest.mark.skipif(not ASSETS, reason="SPARSE_ASSETS names no folder")
def test_smollm2():
    folder = os.path.join(ASSETS, "smollm2-135m")
    ours, hf = bpe.BPE(folder), Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    hf.encode_special_tokens = True
    assert (ours.vocab_size, ours.eot, ours.bos) == (49152, 0, None)
    with open(os.path.join(ASSETS, "news.txt"), encoding="utf-8") as f:
        news = f.read(10**6)
    for text in [news, *HARD, *random_texts(3000, seed=4)]:
        assert ours.encode(text) == hf.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(news)) == news


@pytest.mark.skipif(not ASSETS, reason="SPARSE_ASSETS names no folder")
def test_gpt2(tmp_path, monkeypatch):
    """A tokenizer.json made of the vocabulary and the merges that tiktoken downloads."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(ASSETS, "tiktoken"))
    gpt2 = tiktoken.get_encoding("gpt2")
    character = {b: c for c, b in bpe.BYTE.items()}
    write = lambda token: "".join(character[b] for b in token)
    ranks = gpt2._mergeable_ranks
    merges = [[write(part) for part in bpe.last_parts(t, ranks)] for t in sorted(ranks, key=ranks.get) if len(t) > 1]
    eot = {"id": 50256, "content": "<|endoftext|>", "special": True, "single_word": False,
           "lstrip": False, "rstrip": False, "normalized": False}
    vocab = {write(token): i for token, i in ranks.items()} | {"<|endoftext|>": 50256}
    file = trained("gpt2") | {"added_tokens": [eot]}
    file["model"] |= {"vocab": vocab, "merges": merges}
    ours, ids = pair(file, tmp_path)
    assert (ours.name, ours.vocab_size, ours.eot, ours.bos) == ("gpt2", 50257, 50256, None)
    for text in [TEXT, *HARD, *random_texts(300, seed=5)]:
        assert ours.encode(text) == ids(text) == gpt2.encode_ordinary(text)
