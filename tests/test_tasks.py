"""Prompt pairs: what is in them, and every metric on logits whose answer is known.

Opt-in: SPARSE_ASSETS, a folder with tiktoken/ and smollm2-135m/, for two real tokenizers and a model.
"""

import os
import re

import pytest
import torch

from model import Config
from plumbing import tasks
from plumbing.tokens import tokenizer

ASSETS = os.environ.get("SPARSE_ASSETS", "")
real = pytest.mark.skipif(not ASSETS, reason="SPARSE_ASSETS: a folder with tiktoken and smollm2-135m")
BYTES = tokenizer("bytes")


class Words:
    """A word with the space in front of it is a token; the pattern says what a year is."""

    name, eot, bos, vocab_size, year = "words", 1, 0, 4000, r" \d\d(?=\d\d)|\d\d| \d\d| ?\w+|[^\w]"

    def __init__(self):
        self.texts = ["<bos>", "<eot>"]

    def encode(self, text):
        pieces = re.findall(self.year, text)
        assert "".join(pieces) == text
        self.texts += [p for p in dict.fromkeys(pieces) if p not in self.texts]
        return [self.texts.index(p) for p in pieces]

    def decode(self, ids):
        return "".join(self.texts[i] for i in map(int, ids))


class Digits(Words):
    name, year = "digits", r"\d| ?[^\W\d]+|[^\w]"


class Years(Words):
    name, year = "years", r" ?\w+|[^\w]"


class Closed(Words):
    """Eleven tokens: two special ones and nine letters."""

    name, vocab_size = "closed", 11

    def __init__(self):
        self.texts = ["<bos>", "<eot>", *"abcdefghi"]

    def encode(self, text):
        return [self.texts.index(c) for c in text if c in self.texts]


@pytest.fixture
def words():
    return Words()


def texts(tok, idx):
    return [tok.decode(row) for row in idx]


def changes(task):
    """How many tokens of every pair differ."""
    return (task.clean != task.corrupt).sum(1).tolist()


def refused(match, *args, **options):
    with pytest.raises(ValueError, match=match) as error:
        tasks.make(*args, **options)
    assert "\n" not in str(error.value)


def every(n=20, seed=0):
    for name, tok in (("ioi", Words()), ("greater-than", Words()), ("greater-than", Digits()),
                      ("greater-than", BYTES), ("induction", Closed()), ("induction", BYTES),
                      ("bracket", BYTES), ("addition", tasks.Digits())):
        more = {"length": 5} if tok.name == "closed" else {}
        for corrupt in tasks.CORRUPTIONS[name]:
            yield tok, tasks.make(name, tok, n, seed, corrupt, **more)


# -----------------------------------------------------------------------------
# all tasks


def test_shapes_counts_and_no_prompt_twice():
    assert tasks.NAMES == ("ioi", "greater-than", "induction", "bracket", "addition")
    for tok, task in every():
        assert task.clean.shape == task.corrupt.shape and len(task.clean) == 20
        assert task.clean.dtype == task.corrupt.dtype == torch.int64 and task.made >= 20
        assert len(task.clean.unique(dim=0)) == 20 and all(changes(task))
        assert 0 < task.floor < 1 and task.units and "corrupt:" in task.about and "\n" not in task.about
        if tok.bos is not None:
            assert (task.clean[:, 0] == 0).all() and (task.corrupt[:, 0] == 0).all()
            assert (task.clean[:, 1:] > 1).all() and (task.corrupt[:, 1:] > 1).all()  # no special ones


def test_the_seed_decides():
    for (_, a), (_, b), (_, c) in zip(every(), every(), every(seed=1)):
        assert torch.equal(a.clean, b.clean) and torch.equal(a.corrupt, b.corrupt)
        assert a.clean.shape != c.clean.shape or not torch.equal(a.clean, c.clean)


def test_rows_choose_the_prompts_the_logits_are_of():
    for tok, task in every():
        vocab = tok.vocab_size
        logits = torch.randn(20, task.clean.shape[1], vocab, generator=torch.Generator().manual_seed(0))
        whole, right = task.metric(logits), task.correct(logits)
        assert whole.shape == right.shape == (20,) and right.dtype == torch.bool
        for rows in (slice(3, 9), torch.tensor([7, 0, 19]), torch.arange(20) % 3 == 0):
            assert torch.allclose(task.metric(logits[rows], rows), whole[rows], atol=1e-6)
            assert torch.equal(task.correct(logits[rows], rows), right[rows])
        with pytest.raises(ValueError, match="logits of 20 prompts, but 3 rows"):
            task.metric(logits, slice(3))


def test_metrics_have_a_gradient_and_keep_float64():
    for tok, task in every(n=2):
        vocab = 13 if tok.name == "addition" else 4000
        logits = torch.randn(2, task.clean.shape[1], vocab, dtype=torch.float64, requires_grad=True)
        task.metric(logits).sum().backward()
        assert logits.grad.any() and task.metric(logits).dtype == torch.float64
        assert task.metric(logits.bfloat16()).dtype == torch.float32


def test_ids_that_no_token_has_are_not_used():
    class Gaps(type(BYTES)):
        name, vocab_size = "gaps", 400

        def decode(self, ids):
            if ids[0] > 256:
                raise KeyError(f"Invalid token for decoding: {ids[0]}")
            return super().decode(ids)

    assert tasks.usable(Gaps()) == [*range(128)]  # bytes above are parts of a character


@torch.no_grad()
def test_accuracies_are_those_of_the_tasks_that_can_be_asked(words):
    class Knows(torch.nn.Module):
        """Says what it was told for a prompt, and the first id of all others."""

        config, wte = Config(64, 4000, 1, 1), torch.nn.Embedding(1, 1)

        def forward(self, idx):
            logits = torch.zeros(*idx.shape, 4000)
            for n, row in enumerate(idx.tolist()):
                logits[n, -1, told.get(tuple(row), 0)] = 1
            return logits, None, None

    task = tasks.make("ioi", words, 64)
    told = {}
    for n in range(48):
        scores = [(task.metric(torch.zeros(1, task.clean.shape[1], 4000).index_fill(2, torch.tensor(i), 1), [n]), i)
                  for i in task.clean[n].tolist()]
        told[tuple(task.clean[n].tolist())] = max(scores)[1]
    early = tasks.make("greater-than", words, 64)  # for who knows nothing, a war may end in most years after it
    early = early.correct(torch.zeros(64, early.clean.shape[1], 4000)).float().mean().item()
    asked = tasks.asked(words)
    assert 0.3 < early < 0.6 and tasks.accuracies(Knows(), asked) == {"ioi": 0.75, "greater-than": early}
    assert [t.name for t in tasks.asked(Years())] == ["ioi"] and tasks.asked(BYTES) == []
    Knows.config = Config(task.clean.shape[1] - 1, 4000, 1, 1)
    assert "ioi" not in tasks.accuracies(Knows(), asked)


def test_what_can_not_be_made_is_said_in_one_line(words):
    refused("unknown task 'iio', there are: ioi, greater-than", "iio", words, 5)
    refused("ioi has no corruption 'abd', only abc, flip", "ioi", words, 5, corrupt="abd")
    refused("positive integer, not 0", "ioi", words, 0)
    refused("5 names of one token each, the tokenizer bytes has 0.*induction", "ioi", BYTES, 5)
    refused("years cuts the year 1737 neither into 17 and 37", "greater-than", Years(), 5)
    refused("from 2 to the 9 usable tokens of the tokenizer closed, not 16", "induction", Closed(), 5)
    refused("only about 72 different prompts .* not 5000", "induction", Closed(), 5000, length=2)
    refused("10000 problems, not 10001", "addition", tasks.Digits(), 10001)


# -----------------------------------------------------------------------------
# each task


def test_ioi_prompts(words):
    abc, flip = (tasks.make("ioi", words, 200, corrupt=c) for c in ("abc", "flip"))
    assert torch.equal(abc.clean, flip.clean)
    assert set(changes(abc)) == {3} and set(changes(flip)) == {1}
    orders, openings = set(), set()
    for clean, other, flipped in zip(*(texts(words, t) for t in (abc.clean, abc.corrupt, flip.corrupt))):
        a, b, s = (w for w in re.findall(r"\w+", clean) if w in tasks.PEOPLE)
        fresh = [w for w in re.findall(r"\w+", other) if w in tasks.PEOPLE]
        assert a != b and s in (a, b) and clean.startswith("<bos>") and clean.endswith(" to")
        assert len({*fresh, a, b}) == 5
        io = b if s == a else a
        where = clean.rindex(s)
        assert flipped == clean[:where] + io + clean[where + len(s):]
        orders.add(s == a)
        openings.add(clean.split()[0])
    assert orders == {True, False} and len(openings) == len(tasks.TEMPLATES) >= 6


def test_ioi_metric(words):
    task = tasks.make("ioi", words, 30)
    logits = torch.zeros(30, task.clean.shape[1], 4000)
    logits[:, :-1] = torch.randn(30, task.clean.shape[1] - 1, 4000)  # only the last token counts
    for row, text in enumerate(texts(words, task.clean)):
        a, b, s = (w for w in re.findall(r"\w+", text) if w in tasks.PEOPLE)
        io = b if s == a else a
        logits[row, -1, words.texts.index(" " + io)] = 2.5
        logits[row, -1, words.texts.index(" " + s)] = 1.0 if row % 2 else 4.0
    assert task.metric(logits).tolist() == [1.5 if row % 2 else -1.5 for row in range(30)]
    assert task.correct(logits).tolist() == [row % 2 == 1 for row in range(30)]


@pytest.mark.parametrize("tok", [Words(), Digits(), BYTES], ids=["two digits", "digits", "bytes"])
def test_greater_than_prompts(tok):
    task = tasks.make("greater-than", tok, 300)
    years = set()
    for clean, other in zip(texts(tok, task.clean), texts(tok, task.corrupt)):
        sentence = r"(?:<bos>)?The \w+ lasted from the year (\d\d)(\d\d) to the year (\d\d)"
        century, year, again = re.fullmatch(sentence, clean).groups()
        assert century == again and other == clean.replace(f"{century}{year} ", f"{century}01 ")
        years.add(int(year))
    low, high = (2, 98) if tok.name == "words" else (10, 89)
    assert min(years) < low + 5 and max(years) > high - 5 and low <= min(years) and max(years) <= high
    assert max(changes(task)) == (1 if tok.name == "words" else 2)


def test_greater_than_metric_of_two_digit_tokens(words):
    task = tasks.make("greater-than", words, 50)
    years = [int(re.search(r"\d\d(\d\d) ", text)[1]) for text in texts(words, task.clean)]
    ids = [words.texts.index(f"{y:02}") for y in range(100)]
    flat = torch.zeros(50, task.clean.shape[1], 4000)
    want = torch.tensor([(99 - y) - (y + 1.0) for y in years]) / 4000  # the full softmax
    assert torch.allclose(task.metric(flat), want, atol=1e-6)
    for offset, sign in ((1, 1), (0, -1), (-1, -1)):
        logits = torch.full((50, task.clean.shape[1], 4000), -100.0)
        for row, y in enumerate(years):
            logits[row, -1, ids[y + offset]] = 100.0
        assert torch.allclose(task.metric(logits), torch.full((50,), float(sign)))
        assert task.correct(logits).all() == (sign > 0)


@pytest.mark.parametrize("tok", [Digits(), BYTES], ids=["digits", "bytes"])
def test_greater_than_metric_of_the_next_digit(tok):
    task = tasks.make("greater-than", tok, 50)
    tens = [int(re.search(r"\d\d(\d)\d ", text)[1]) for text in texts(tok, task.clean)]
    digit = [int(tok.encode(str(d))[0]) for d in range(10)]
    for offset, want in ((1, 1.0), (0, 0.0), (-1, -1.0)):
        logits = torch.full((50, task.clean.shape[1], 300), -100.0)
        for row, d in enumerate(tens):
            logits[row, -1, digit[d + offset]] = 100.0
        assert torch.allclose(task.metric(logits), torch.full((50,), want), atol=1e-6)
        assert task.correct(logits).all() == (want > 0)
    flat = torch.zeros(50, task.clean.shape[1], 300)
    assert torch.allclose(task.metric(flat), torch.tensor([(9 - d) - d for d in tens]) / 300)


@pytest.mark.parametrize("tok, length", [(BYTES, 16), (Closed(), 6)], ids=["bytes", "closed"])
def test_induction_prompts(tok, length):
    task = tasks.make("induction", tok, 100, length=length)
    start = 0 if tok.bos is None else 1
    assert task.clean.shape[1] == start + 2 * length
    first, second = task.clean[:, start:].split(length, 1)
    other, same = task.corrupt[:, start:].split(length, 1)
    assert torch.equal(first, second) and torch.equal(second, same) and (first != other).all()
    for half, half_ in zip(first.tolist(), other.tolist()):
        assert len(set(half)) == len(set(half_)) == length
        assert not set(zip(half, half[1:])) & set(zip(half_, half_[1:]))
    if tok is BYTES:
        assert set("".join(texts(tok, task.clean))) == {*map(chr, range(32, 127))}
    else:
        assert set(task.clean[:, 1:].flatten().tolist()) == set(range(2, 11))


def test_induction_metric_and_share_right():
    task, L = tasks.make("induction", BYTES, 4, length=5), 5
    logits = torch.zeros(4, 10, 300)
    logits[..., 257:] = 50.0  # the padding of a model's vocabulary is none of the others
    logits[:, : L, :257] = torch.randn(4, L, 257)  # the first half does not count, nor the last token
    logits[:, -1, :257] = torch.randn(4, 257)
    wanted = task.clean[:, L + 1 :]
    logits[:, L:-1].scatter_(2, wanted[..., None], 8.0)
    assert torch.allclose(task.metric(logits), torch.full((4,), 8.0))
    assert not task.correct(logits).any()  # the padding is what the model says
    logits[..., 257:] = 0.0
    assert task.correct(logits).all()
    logits[:2, L : L + 2] = logits[:2, L : L + 2].neg()  # two of four places: no more than half
    assert task.correct(logits).tolist() == [False, False, True, True]
    assert torch.allclose(task.metric(logits), torch.tensor([0.0, 0.0, 8.0, 8.0]), atol=1e-5)


def test_the_tokenizer_of_the_problems():
    tok = tasks.Digits()
    assert (tok.name, tok.vocab_size, tok.bos) == ("addition", 13, None)
    assert tok.encode("36+28=?????") == [3, 6, 10, 2, 8, 11, *[12] * 5] == tasks.problems()[0][3628].tolist()
    assert tok.decode(torch.tensor([0, 0, 0, 6, 4])) == "00064"


def test_addition_prompts():
    task = tasks.make("addition", tasks.Digits(), 500)
    idx, _ = tasks.problems()
    assert set(changes(task)) == {1}
    where = (task.clean != task.corrupt).nonzero()[:, 1]
    assert set(where.tolist()) == {0, 1, 3, 4}
    for rows in (task.clean, task.corrupt):
        x, y = rows[:, 0] * 10 + rows[:, 1], rows[:, 3] * 10 + rows[:, 4]
        assert torch.equal(idx[100 * x + y], rows)
    assert len(tasks.make("addition", tasks.Digits(), 10000).clean) == 10000


def test_addition_metric():
    task = tasks.make("addition", tasks.Digits(), 6)
    logits = torch.zeros(6, 11, 13)
    logits[..., 10:] = -7.0  # + = ? are no digits
    for row, (a, b, _, c, d, *_) in enumerate(task.clean.tolist()):
        for place, digit in enumerate(f"{10 * a + b + 10 * c + d:05}"):
            logits[row, 6 + place, int(digit)] = 3.0
    assert torch.allclose(task.metric(logits), torch.full((6,), 3.0)) and task.correct(logits).all()
    logits[2, 8, :10] = logits[2, 8, :10].roll(1)  # one wrong digit: 0 there, 3 at one of nine
    assert task.correct(logits).tolist() == [True, True, False, True, True, True]
    assert torch.allclose(task.metric(logits)[2], torch.tensor((4 * 3.0 + (0 - 3 / 9)) / 5))


def test_bracket_prompts_and_metric():
    task = tasks.make("bracket", BYTES, 40)
    pairs = {"(": ")", "[": "]"}
    for n, (clean, corrupt) in enumerate(zip(texts(BYTES, task.clean), texts(BYTES, task.corrupt))):
        opened, = set(clean) & set(pairs)
        assert corrupt == clean.replace(opened, "([".replace(opened, "")) and not set(clean) & set(")]")
        logits = torch.zeros(1, len(clean), 257)
        logits[0, -1, ord(pairs[opened])] = 2.0
        assert task.metric(logits, slice(n, n + 1)).item() == 2 and task.correct(logits, slice(n, n + 1)).all()
    refused(r"bracket needs \) and \] to be one token each", "bracket", type("Two", (), {
        "name": "two", "bos": None, "encode": lambda self, text: [0, 1]})(), 5)


# -----------------------------------------------------------------------------
# real tokenizers, a real model


@real
@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
def test_real_tokenizers(name, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(ASSETS, "tiktoken"))
    tok = tokenizer("gpt2" if name == "gpt2" else os.path.join(ASSETS, "smollm2-135m"))
    for task in ("ioi", "greater-than", "induction"):
        made = tasks.make(task, tok, 100)
        assert len(made.clean) == 100 and made.made < 150
        if task != "induction":  # text, as a model reads it
            for rows in (made.clean, made.corrupt):
                assert [list(tok.encode(t)) for t in texts(tok, rows)] == rows.tolist()
    assert tasks.make("greater-than", tok, 9).clean.shape[1] == (12 if name == "gpt2" else 17)
    assert ("two-digit" in tasks.make("greater-than", tok, 9).about) == (name == "gpt2")


@real
def test_smollm2_does_the_tasks():
    from model import Transformer

    folder = os.path.join(ASSETS, "smollm2-135m")
    model, tok = Transformer.from_pretrained(folder).eval(), tokenizer(folder)
    for name, accuracy, least in (("ioi", 0.9, 3.0), ("greater-than", 0.9, 0.4)):
        task = tasks.make(name, tok, 60)
        with torch.no_grad():
            logits, other = model(task.clean)[0], model(task.corrupt)[0]
        assert task.correct(logits).double().mean() >= accuracy
        assert task.metric(logits).mean() > least and task.metric(other).mean() < 0.5 * least
