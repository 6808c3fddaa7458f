"""
Prompt pairs for circuit analysis: a clean prompt, a corrupt one of equal length, and a metric.

    task = make("ioi", tokenizer("gpt2"), n=100)
    logits = model(task.clean[rows])[0]
    task.metric(logits, rows)             (len(rows),), differentiable, high on clean prompts
    task.correct(logits, rows)            (len(rows),) bool

ioi            When Mary and John went to the park, John gave a ball to -> Mary, not John
greater-than   The war lasted from the year 1737 to the year 17 -> 38 or more; or its next digit
induction      random tokens, then the same again -> the token that came next the first time
bracket        size = [index -> ], not )
addition       36+28=????? -> 00064, the problems that addition_toy.py learns

Prompts are drawn at random and checked with their tokenizer, until n of them have the same length.
"""

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Task:
    name: str
    clean: torch.Tensor  # (N, T) int64, the beginning-of-text id in front if the tokenizer has one
    corrupt: torch.Tensor  # (N, T) int64
    metric: Callable  # (logits (n, T, vocab), rows) -> (n,); rows: which prompts, by default all
    correct: Callable  # (logits, rows) -> bool (n,): is the model right? meant for clean prompts
    floor: float  # the task makes sense for models that are right on this share of the prompts
    units: str  # label of the metric's axis
    made: int  # how many were drawn, repeats left out, until N had the same length
    about: str  # what is corrupted, what the metric is


def make(name, tok, n, seed=0, corrupt=None, **options):
    """A Task of exactly n different prompts, a function of the arguments. Impossible: ValueError.

    tok: a tokenizer; addition has its own, Digits, whatever tok is. corrupt: see CORRUPTIONS, the
    first is the default. options: length=16 of induction, tokens before the repetition.
    """
    if name not in GENERATORS:
        raise ValueError(f"unknown task {name!r}, there are: {', '.join(NAMES)}")
    corrupt = CORRUPTIONS[name][0] if corrupt is None else corrupt
    if corrupt not in CORRUPTIONS[name]:
        raise ValueError(f"{name} has no corruption {corrupt!r}, only {', '.join(CORRUPTIONS[name])}")
    if type(n) is not int or n < 1:
        raise ValueError(f"the number of prompts must be a positive integer, not {n!r}")
    return GENERATORS[name](tok, n, random.Random(seed), corrupt, **options)


def asked(tok, n=64):
    """What a model is asked while it trains: ioi and greater-than where tok can ask them; of bytes nothing."""
    found = []
    for name in () if tok.name == "bytes" else ("ioi", "greater-than"):
        with contextlib.suppress(ValueError):  # names or years are not cut as the task needs
            found.append(make(name, tok, n))
    return found


@torch.no_grad()
def accuracies(model, asked, amp=contextlib.nullcontext):
    """{task: share of the clean prompts that the model is right on}; amp: as in copying.accuracy."""
    found = {}
    for task in asked:
        if task.clean.shape[1] <= model.config.block_size:
            right = []
            for rows in torch.arange(len(task.clean)).split(8):  # all logits of a large vocabulary at once are much
                with amp():
                    logits = model(task.clean[rows].to(model.wte.weight.device))[0]
                right += task.correct(logits, rows).tolist()
            found[task.name] = sum(right) / len(right)
    return found


# -----------------------------------------------------------------------------
# what the tasks share


def encode(tok, text):
    return [int(i) for i in tok.encode(text)]


def begin(tok):
    return [] if tok.bos is None else [tok.bos]


def single(tok, texts):
    """{id: text} of the texts that are one token; of texts with the same token the first."""
    table = {}
    for text in texts:
        if len(ids := encode(tok, text)) == 1:
            table.setdefault(ids[0], text)
    return table


def collect(what, n, draw):
    """n different prompts of one length: clean, corrupt and the other values as tensors; made.

    draw() -> (clean ids, corrupt ids, values...), or None if the tokens are not as they should be.
    Gives up after 10,000 draws in a row that brought nothing new.
    """
    by_length, made, idle = defaultdict(dict), 0, 0
    while idle < 10_000:
        prompt, idle = draw(), idle + 1
        if prompt is None or len(prompt[0]) != len(prompt[1]):
            made += 1
            continue
        clean, group = tuple(prompt[0]), by_length[len(prompt[0])]
        if clean not in group:
            group[clean], made, idle = prompt, made + 1, 0
        if len(group) == n:
            return [torch.tensor(column) for column in zip(*group.values())], made
    most = max(map(len, by_length.values()), default=0)
    raise ValueError(f"{what} has only about {most} different prompts of one length with this "
                     f"tokenizer, not {n}")


def scored(score, places, *values):
    """The function (logits, rows) -> score(logits at those places, the values of those rows)."""

    def function(logits, rows=slice(None)):
        rows = rows.cpu() if torch.is_tensor(rows) else rows
        picked = [v[rows].to(logits.device) for v in values]
        if len(picked[0]) != len(logits):
            raise ValueError(f"logits of {len(logits)} prompts, but {len(picked[0])} rows: give the "
                             "rows that the logits are of")
        logits = logits[:, places]
        return score(logits.to(torch.promote_types(logits.dtype, torch.float32)), *picked)

    return function


def exceeds(function, least):
    return lambda logits, rows=slice(None): function(logits, rows) > least


def above_the_rest(choices):
    """The answer's logit minus the mean of the others of the first `choices`; mean over places."""

    def score(logits, answers):  # (n, places, vocab), (n, places)
        logits = logits[..., :choices]  # a model's vocabulary may be padded
        right = logits.gather(-1, answers[..., None])[..., 0]
        rest = (logits.sum(-1) - right) / (logits.shape[-1] - 1)
        return (right - rest).mean(1)

    return score


def logit_difference(logits, right, wrong):
    """Of logits (n, vocab) and ids (n,): (n,)."""
    return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]


def share_right(logits, answers):
    return (logits.argmax(-1) == answers).float().mean(1)


# -----------------------------------------------------------------------------
# indirect object identification, arXiv 2211.00593: who is named once?

TEMPLATES = (  # as many words each; names have a space in front of them
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} met at the {place}, {s} handed the {thing} to",
    "While {a} and {b} were at the {place}, {s} passed a {thing} to",
    "Once {a} and {b} arrived at the {place}, {s} offered the {thing} to",
    "Today {a} and {b} came to the {place}. {s} showed a {thing} to",
    "Then {a} and {b} walked to the {place}. {s} brought the {thing} to",
    "Later {a} and {b} sat in the {place}. {s} gave the {thing} to",
    "Before {a} and {b} left the {place} again, {s} sold a {thing} to",
)
PEOPLE = """Mary John Tom James Robert Michael David William Richard Charles Joseph Thomas Daniel
Matthew Anthony Mark Paul Steven Andrew Kenneth George Kevin Brian Edward Ronald Jason Ryan Gary
Jacob Eric Stephen Frank Scott Gregory Samuel Patrick Alexander Jack Dennis Peter Henry Adam
Douglas Simon Martin Anna Lisa Sarah Karen Emily Laura Susan Linda Jennifer Elizabeth Jessica
Margaret Michelle Amanda Rebecca Rachel Catherine Maria Emma Alice Jane Kate Helen Ruth Julia Diana
Victoria Lucy Amy Rose Claire""".split()
PLACES = """park store school restaurant hospital office station library garden house beach museum
market church hotel farm theater airport bank castle""".split()
THINGS = """ball book drink ring letter key bag box cup pen coat knife map phone watch ticket
flower camera gift lamp""".split()


def ioi(tok, n, draws, corrupt):
    names = {name[1:]: i for i, name in single(tok, [" " + name for name in PEOPLE]).items()}
    if len(names) < 5:
        raise ValueError(f"ioi needs 5 names of one token each, the tokenizer {tok.name} has "
                         f"{len(names)}; the task induction works with any tokenizer")

    def draw():
        io, s, *fresh = draws.sample(list(names), 5)
        template = draws.choice(TEMPLATES)
        words = {"place": draws.choice(PLACES), "thing": draws.choice(THINGS)}
        a, b = draws.choice([(io, s), (s, io)])  # ABBA or BABA
        others = fresh if corrupt == "abc" else [a, b, io]
        clean, other = (begin(tok) + encode(tok, template.format(a=a, b=b, s=s, **words))
                        for a, b, s in ([a, b, s], others))
        # the names must differ and no other token
        differ = [(i, j) for i, j in zip(clean, other) if i != j]
        replaced = [(names[x], names[y]) for x, y in zip([a, b, s], others) if x != y]
        return (clean, other, names[io], names[s]) if differ == replaced else None

    (clean, other, io, s), made = collect("ioi", n, draw)

    metric = scored(logit_difference, -1, io, s)
    change = {"abc": "all names become three fresh ones",
              "flip": "the second mention is of the indirect object (IO), not of the subject (S)"}
    return Task("ioi", clean, other, metric, exceeds(metric, 0), 0.75, "logit difference", made,
                f"corrupt: {change[corrupt]}; metric: logit of IO minus logit of S, last token")


# -----------------------------------------------------------------------------
# greater-than, arXiv 2305.00586: a war ends after it began

NOUNS = """war siege reign strike voyage famine drought campaign expedition rebellion dispute
conflict alliance dynasty plague trial project lease occupation crisis treaty ban boom festival
exile marriage partnership journey mission restoration boycott epidemic revolt investigation
embargo""".split()
CENTURIES = range(11, 19)


def greater_than(tok, n, draws, corrupt):
    def ids_of(year):
        """The ids of the last two digits of a year: one, or one a digit."""
        return [i for part in ([year] if whole else year) for i in encode(tok, part)]

    for whole in (True, False):
        choices = [f"{y:02}" for y in range(100)] if whole else list("0123456789")
        table = single(tok, choices)
        if len(table) == len(choices) and encode(tok, " 1737") == encode(tok, " 17") + ids_of("37"):
            break
    else:
        raise ValueError(f"the tokenizer {tok.name} cuts the year 1737 neither into 17 and 37 nor "
                         "into digits, which greater-than needs")

    def draw():
        noun, century = draws.choice(NOUNS), draws.choice(CENTURIES)
        year = f"{draws.randint(2, 98) if whole else draws.randint(10, 89):02}"
        start, end = f"The {noun} lasted from the year {century}", f" to the year {century}"
        clean, other = (encode(tok, start + y + end) for y in (year, "01"))
        before, behind = encode(tok, start), encode(tok, end)
        if clean != before + ids_of(year) + behind or other != before + ids_of("01") + behind:
            return None  # as for 1100, which may be a single token
        return begin(tok) + clean, begin(tok) + other, int(year) if whole else int(year[0])

    (clean, other, begun), made = collect("greater-than", n, draw)
    ids = torch.tensor(list(table))  # of the numbers 0, 1, 2, ...

    def difference(logits, begun):
        sign = (torch.arange(len(ids), device=begun.device) - begun[:, None]).sign()
        if whole:
            sign[sign == 0] = -1  # no war lasts from 1737 to 1737
        return (logits.softmax(-1)[:, ids.to(logits.device)] * sign).sum(1)

    metric = scored(difference, -1, begun)
    meaning = ("P(years above) - P(years up to it), two-digit tokens" if whole else
               "P(next digit above its tens digit) - P(below), the same digit counts for neither")
    return Task("greater-than", clean, other, metric, exceeds(metric, 0), 0.75,
                "probability difference", made,
                f"corrupt: the first year ends in 01; metric: {meaning}, last token")


# -----------------------------------------------------------------------------
# induction, arXiv 2209.11895: what came after this token the last time?


def usable(tok):
    """Ids that text can have: no special tokens, no parts of a character. Bytes: those of a keyboard."""
    if tok.name == "bytes":
        return [*range(ord(" "), ord("~") + 1)]

    def comes_back(i):
        try:
            return encode(tok, tok.decode([i])) == [i]
        except KeyError:  # an id that no token has
            return False

    return [i for i in range(tok.vocab_size) if comes_back(i)]


def induction(tok, n, draws, corrupt, length=16):
    ids = usable(tok)
    if type(length) is not int or length < 2 or length > len(ids):
        raise ValueError(f"induction needs a length from 2 to the {len(ids)} usable tokens of the "
                         f"tokenizer {tok.name}, not {length!r}")

    def draw():
        half, other = draws.sample(ids, length), draws.sample(ids, length)  # no token twice in one
        pairs = set(zip(half, half[1:])) & set(zip(other, other[1:]))
        if pairs or any(i == j for i, j in zip(half, other)):
            return None  # something to copy would be left
        return begin(tok) + half + half, begin(tok) + other + half, half[1:]

    (clean, other, answers), made = collect(f"induction of length {length}", n, draw)
    places = slice(-length, -1)  # the second half; its last token is asked for, and asks nothing
    return Task("induction", clean, other, scored(above_the_rest(tok.vocab_size), places, answers),
                exceeds(scored(share_right, places, answers), 0.5), 0.5,
                "logit above the mean of the others", made,
                "corrupt: other random tokens in the first half; metric: logit of the repeated token "
                "minus the mean of all others, mean of the second half but its first token")


# -----------------------------------------------------------------------------
# bracket: which one is open?

WORDS = """value key default start stop step sequence iterable object index string count name args other
size encoding errors sep maxsplit""".split()


def bracket(tok, n, draws, corrupt):
    closing = [encode(tok, close) for close in ")]"]
    if max(map(len, closing)) > 1:
        raise ValueError(f"bracket needs ) and ] to be one token each, which they are not for {tok.name}")

    def draw():
        (left, right), kind = draws.sample(WORDS, 2), draws.randrange(2)
        template = draws.choice(["{} = {}{}", ">>> {}{}{}"])
        clean, other = (begin(tok) + encode(tok, template.format(left, "(["[k], right)) for k in (kind, 1 - kind))
        differ = [i for i, j in zip(clean, other) if i != j]
        return (clean, other, closing[kind][0], closing[1 - kind][0]) if len(differ) == 1 else None

    (clean, other, right, wrong), made = collect("bracket", n, draw)
    metric = scored(logit_difference, -1, right, wrong)
    return Task("bracket", clean, other, metric, exceeds(metric, 0), 0.75, "logit difference", made,
                "corrupt: the other bracket is open; metric: logit of the closing one that fits minus "
                "logit of the other, last token")


# -----------------------------------------------------------------------------
# addition: the 10,000 problems of two-digit numbers, which addition_toy.py learns

CHARACTERS = "0123456789+=?"
ANSWER = range(6, 11)  # positions of the five answer digits; the last three are the sum's


class Digits:
    """Their tokenizer: a character is a token."""

    name, vocab_size, bos = "addition", len(CHARACTERS), None

    def encode(self, text):
        return [CHARACTERS.index(c) for c in text]

    def decode(self, ids):
        return "".join(CHARACTERS[i] for i in ids)


def problems():
    """idx (10000, 11) int64 and targets (10000, 11), -1 outside the answer; problem 100 x + y."""
    encode, pairs = Digits().encode, [(x, y) for x in range(100) for y in range(100)]
    idx = torch.tensor([encode(f"{x:02}+{y:02}=?????") for x, y in pairs])
    targets = torch.tensor([[-1] * 6 + encode(f"{x + y:05}") for x, y in pairs])
    return idx, targets


def addition(tok, n, draws, corrupt):
    idx, targets = problems()
    if n > len(idx):
        raise ValueError(f"addition has {len(idx)} problems, not {n}")
    clean = draws.sample(range(len(idx)), n)  # problem 100 x + y: its decimal digits are x and y's
    other = []
    for problem in clean:
        place = 10 ** draws.randrange(4)
        digit = problem // place % 10
        other.append(problem + place * (draws.choice([d for d in range(10) if d != digit]) - digit))
    answers = targets[clean][:, ANSWER]
    return Task("addition", idx[clean], idx[other], scored(above_the_rest(10), ANSWER, answers),
                exceeds(scored(share_right, ANSWER, answers), 0.99), 0.9,  # all five
                "logit above the mean of the other digits", n,
                "corrupt: one digit of an addend is another; metric: logit of the right digit minus "
                "the mean of the other nine, mean of the five answer places")


GENERATORS = {"ioi": ioi, "greater-than": greater_than, "induction": induction, "bracket": bracket,
              "addition": addition}
NAMES = tuple(GENERATORS)
CORRUPTIONS = {"ioi": ("abc", "flip"), "greater-than": ("01",), "induction": ("random",),
               "bracket": ("other",), "addition": ("digit",)}
