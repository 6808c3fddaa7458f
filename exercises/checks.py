"""
The checks of the exercises. Each compares a learner's function with this repository's own, which is
the solution: read it here only after you have tried. If the two differ, the check looks for the mistake
among the likely ones and names it.
"""

import copy
import functools
import math
import pathlib
import sys
import traceback
from dataclasses import replace
from types import SimpleNamespace

import torch

import addition_toy
import patching
import sparse
from geco import GECO
from model import Transformer
from plumbing import addition, copying, curves, tasks

ROOT = pathlib.Path(__file__).resolve().parents[1]
PICTURES = ROOT / "out/exercises"


class NotYet(Exception):
    """A task that is not done: shown as its message alone, in a terminal and in a notebook."""

    def _render_traceback_(self):  # what IPython shows
        return [str(self)]


def show(kind, error, trace):
    print(error, file=sys.stderr) if kind is NotYet else sys.__excepthook__(kind, error, trace)


sys.excepthook = show  # what a terminal shows


TAP = {**dict.fromkeys(("'tuple' object", "tuple indices"), "model() returns (logits, loss, edges): take [0]"),
       "NoneType": "does your tap return the tensor, at every name?"}


def check(number, hints={}):
    """A check of task `number`: calls compare(yours, ...), whose AssertionErrors name a mistake.

    hints: {part of an exception's text: what to do}, for code that stops.
    """
    def decorate(compare):
        @functools.wraps(compare)
        def run(yours, *more):
            code = yours.__code__
            file = pathlib.Path(code.co_filename)
            where = f"{file.name}, line {code.co_firstlineno}" if "ipykernel" not in str(file) else "the cell above"

            def stopped(error, what):
                hint = next((f": {hint}" for part, hint in hints.items() if part in str(error)), "")
                return NotYet(f"task {number}, {compare.__name__}() in {where}, {what} ({type(error).__name__}: "
                              f"{str(error).splitlines()[0] if str(error) else ''}){hint}")

            def filled(*inputs):
                try:
                    output = yours(*inputs)
                except NotYet:
                    raise
                except Exception as error:
                    at = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
                    where_it_stops = f"stops at `{at[-1].line}`" if at else "can not be called as its docstring says"
                    raise stopped(error, where_it_stops) from None
                if output is None or output is ...:
                    raise NotYet(f"task {number} is not done: fill in {compare.__name__}() in {where} (or does its "
                                 "last line lack `return`?)")
                return output

            try:
                compare(filled, *more)
            except NotYet:
                raise
            except AssertionError as error:
                raise NotYet(f"task {number}, {compare.__name__}() in {where}, not yet: {error}") from None
            except Exception as error:  # a number for a tensor, a list for a dict
                raise stopped(error, "returns what can not be used: compare it with the docstring's ->") from None
            print(f"task {number}, {compare.__name__}(): ok")

        return run
    return decorate


def tolerance(right):
    """How far a right number may be off: 1e-5 of the largest one."""
    return 1e-5 * right.abs().nan_to_num(posinf=0).max().item()


def same(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=tolerance(b), equal_nan=True)


def compare(yours, right, mistakes):
    """AssertionError unless yours is right; mistakes: {message: what one gets by making it}."""
    yours, right = torch.as_tensor(yours).detach(), torch.as_tensor(right).detach()
    assert yours.shape == right.shape, f"the shape is {tuple(yours.shape)}, it should be {tuple(right.shape)}"
    if not same(yours, right):
        for message, wrong in mistakes.items():
            assert not same(yours, wrong), message
        off = (yours.double() - right.double()).abs()
        wrong = ~(off <= tolerance(right.double()))  # a nan is wrong
        raise AssertionError(f"{int(wrong.sum())} of {off.numel()} numbers are wrong, the worst by {off.max():.3g}")


def picture(figure, name):
    """Save a figure under out/exercises/; a notebook shows it, too."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / name, dpi=110)
    print("wrote", PICTURES / name)


def load(name):
    """One of the small models in exercises/models/."""
    path = ROOT / f"exercises/models/{name}.pt"
    if not path.exists():
        raise NotYet(f"{path} is missing: python -m exercises.make_models writes it")
    return Transformer.from_pretrained(str(path)).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# 1: the gate. Inputs are of one head, (T, D) and (T, T)


def naive_share(s, bias):
    """E of sparse.naive for the logits s (T, T): q = s sqrt(T) and k = 1 give just these."""
    q, k = s * math.sqrt(len(s)), torch.eye(len(s))
    return sparse.naive(q[None, None], k[None, None], k[None, None], bias, None, causal=True)[1][0, 0]


def random_logits():
    s = 2 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    return s.masked_fill(~sparse.allowed_pairs(16, causal=True), -torch.inf), s


@check(1)
def logits(yours):
    q, k = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2))
    allowed, products = sparse.allowed_pairs(6, causal=True), q @ k.T
    s, never = yours(q, k), -torch.inf
    assert s.shape == (6, 6), f"the shape is {tuple(s.shape)}, it should be (6, 6): a query a row, a key a column"
    assert not s.isnan().any(), "there is a nan: 0 times infinity? Use masked_fill"
    masked = s.isneginf()
    assert not torch.equal(masked, allowed), "you masked the pairs that are allowed: j > i is what must not be"
    assert not masked.diagonal().any(), "a token may read itself, too: j = i is allowed, -inf is for j > i"
    # with the identity as values and all gates open, the output is the softmax itself
    right = sparse.naive(q[None, None], k[None, None], torch.eye(6)[None, None], 1e9, None, True)[0][0, 0]
    compare(s.softmax(-1), right, {message: wrong.softmax(-1) for message, wrong in {
        "did you divide by sqrt(D)?": products.masked_fill(~allowed, never),
        "you divided by D: it is the square root of D": (products / 16).masked_fill(~allowed, never),
        "a token reads later ones: did you put -inf where j > i?": products / 4,
        "your mask is 0, and softmax gives a logit of 0 some weight: it is -inf": products / 4 * allowed,
        "you masked the pairs that are allowed: j > i is what must not be":
            (products / 4).masked_fill(~allowed.T, never),
        "row and column are exchanged: s[i, j] is query i times key j":
            (products.T / 4).masked_fill(~allowed, never),
    }.items()})
    for bias in (-0.5, 0.0, 0.5):
        assert torch.equal(s + bias > 0, sparse.gate_map(q[None, None], k[None, None], bias)[0, 0]), (
            "the softmax is right, but the logits have a constant too much, which it does not see")


def gate_inputs():
    random = torch.Generator().manual_seed(3)
    return 2 * torch.randn(30, 30, generator=random), torch.rand(30, 30, generator=random)


@check(2)
def gate(yours):
    s, u = gate_inputs()
    b, n = 1.0, torch.logit(u)
    assert same(yours(s, b, u), yours(s, b, u)), "twice the same u, and the gates differ: the noise is u's, draw no other"
    compare(yours(s, b, u), sparse.gates(s, b, u), {
        "your noise is log(u): logit(u) is log(u / (1 - u))": s + b - u.log() > 0,
        "there is no noise in it: the gate depends on u, too": s + b > 0,
        "your noise has the other sign: n = -logit(u)": s + b + n > 0,
        "did you forget b?": s - n > 0,
        "u itself is no logistic noise: it is -logit(u)": s + b + u > 0,
        "this is the probability: the gate itself is 0 or 1": torch.sigmoid(s + b),
        "this is soft: the gate is 1 where s + b + n is above 0, else 0": torch.sigmoid(s + b - n),
        "open and shut are exchanged": s + b - n <= 0})


@check(3)
def straight_through(yours):
    s, u = gate_inputs()
    b, up = 1.0, torch.linspace(-1, 2, 900).view(30, 30)  # up: a gradient that comes from above
    s = s.requires_grad_()
    A, right = yours(s, b, u), sparse.gates(s, b, u)
    assert A.requires_grad, ("no gradient arrives: a step is flat. Add something that is 0 and has the "
                             "gradient of sigmoid(s + b + n)")
    if not torch.equal(A, right):
        soft = torch.sigmoid(s + b - torch.logit(u))
        assert not same(A, soft), "did you return the soft gate? Forward it must be exactly 0 or 1"
        off = (A - right).abs().max().item()
        assert off > 1e-5, (f"your gates miss 0 and 1 by up to {off:.0e}: (hard + soft) - soft is rounded. Put "
                            "brackets around soft - soft.detach()")
        raise AssertionError("forward it must be the gate of task 2")
    slope = torch.autograd.grad(right, s, up)[0]
    compare(torch.autograd.grad(A, s, up)[0], slope, {
        "did you let gradients flow through the hard gate? The two softs cancel: detach one of them": 0 * up,
        "the slope is that of sigmoid(s + b + n), yours has no noise in it": up * torch.autograd.grad(
            torch.sigmoid(s + b).sum(), s)[0],
        "did you forget b in the soft gate?": up * torch.autograd.grad(
            torch.sigmoid(s - torch.logit(u)).sum(), s)[0],
        "the noise of the soft gate has the other sign: n = -logit(u), as in the gate": up * torch.autograd.grad(
            torch.sigmoid(s + b + torch.logit(u)).sum(), s)[0],
        "this is the straight-through estimator with slope 1: here it is the slope of the soft gate": up,
        "the sign of the gradient is wrong": -slope})


@check(4)
def head(yours):
    q, k, v = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(4))
    keys = sparse.noise_keys(sparse.sequence_seeds(7, 1, q.device), 1, 12)
    u, allowed = sparse.uniform(*keys)[0, 0], sparse.allowed_pairs(12, causal=True)
    q_, k_, v_ = q[None, None], k[None, None], v[None, None]
    right, y = sparse.naive(q_, k_, v_, -1.0, keys, True)[0][0, 0], yours(q, k, v, -1.0, u)
    A = sparse.gate_map(q_, k_, -1.0, 7)[0, 0]
    assert not A.any(-1).all() and A.any()  # a row with all gates shut is what this is about
    assert not y.isnan().any(), ("there is a nan: 0 / 0 in a row whose gates are all shut, did you renormalise after "
                                 "the gate? Or 0 times -inf: the gate multiplies a, not s")
    s = (q @ k.T / 4).masked_fill(~allowed, -torch.inf)
    a, shares = s.softmax(-1), A / A.sum(-1, keepdim=True).clamp(min=1)
    some = (A * a) / (A * a).sum(-1, keepdim=True).clamp(min=1e-9)
    compare(y, right, {
        "did you renormalise after the gate? The rows of A a need not sum to 1": some @ v,
        "where is the softmax? An open gate lets a_ij v_j through, not v_j": A.float() @ v,
        "this is the mean over open gates: it should be A a, times v": shares @ v,
        "where is the gate? This is dense attention": a @ v,
        "the gate comes after the softmax: it multiplies a, not s": (s.nan_to_num(neginf=-1e9) * A).masked_fill(
            ~allowed, -torch.inf).softmax(-1) @ v})
    mine, naives = q.clone().requires_grad_(), q_.clone().requires_grad_()
    slope = torch.autograd.grad(yours(mine, k, v, -1.0, u).sum(), mine)[0]
    right = torch.autograd.grad(sparse.naive(naives, k_, v_, -1.0, keys, True)[0].sum(), naives)[0][0, 0]
    assert same(slope, right), ("y is right, its gradient to q is not: it should pass the gate, by "
                                "straight_through(), and the softmax")


@check(5)
def open_share(yours):
    (s, full), b = random_logits(), 0.5
    p, count = torch.sigmoid(s + b), len(s) * (len(s) + 1) / 2
    compare(yours(s, b), naive_share(full, b), {
        "is your mean over allowed pairs only? There are T (T + 1) / 2 of them": p.mean(),
        "did you forget b?": torch.sigmoid(s).sum() / count,
        "this is the sum: the penalty is a mean": p.sum(),
        "did you average the gates? Their steps have no gradient: average the probabilities":
            (s + b > 0).sum() / count})


@check(6)
def penalty_slope(yours):
    (s, full), b = random_logits(), 0.5
    full = full.requires_grad_()
    right = torch.autograd.grad(naive_share(full, b), full)[0]
    p, count = torch.sigmoid(s + b), len(s) * (len(s) + 1) / 2
    compare(yours(s, b), right, {
        "E is a mean: did you divide by the number of allowed pairs?": p * (1 - p),
        "is your mean over allowed pairs only? There are T (T + 1) / 2 of them": p * (1 - p) / len(s) ** 2,
        "this is p, not its slope: the slope of a sigmoid is p (1 - p)": p / count,
        "the sign is wrong: a higher logit opens the gate, so E rises": -right,
        "did you forget b?": torch.sigmoid(s) * (1 - torch.sigmoid(s)) / count})


# -----------------------------------------------------------------------------
# 2: GECO


@check(1)
def point_at(yours):
    for lam in (0.2, 1.0, 5.0):
        found = yours(lam)
        assert hasattr(found, "__len__") and len(found) == 2, "return the two coordinates, (x, y)"
        found = torch.tensor([float(x) for x in found])
        p, centre = found.clone().requires_grad_(), torch.tensor([3.0, 4.0])
        geco = GECO(tau=1.0, lam=lam, lam_max=100.0)
        geco.loss(p.square().sum(), (p - centre).square().sum()).backward()
        if p.grad.norm() > 1e-3:
            for message, wrong in {
                "did you divide by 1 + lambda? The gradient is 2 p + 2 lambda (p - centre)": lam * centre,
                "lambda is on the wrong term: it is C that it weights, so a large lambda goes to (3, 4)":
                    centre / (1 + lam),
                "this is where C alone is smallest, lambda without end": centre,
            }.items():
                assert not same(found, wrong), message
            raise AssertionError(f"for lambda = {lam} the gradient at your point is {p.grad.tolist()}, not 0")


@check(2)
def loss(yours):
    E, C, lam = 0.25, 3.0, 4.0
    compare(yours(E, C, lam), GECO(tau=1.0, lam=lam, lam_max=10.0).loss(E, C), {
        "did you divide by 1 + lambda? Two weights that sum to 1": E + lam * C,
        "lambda weights C, not E": (lam * E + C) / (1 + lam),
        "you divided by lambda: the weights are 1 / (1 + lambda) and lambda / (1 + lambda)": (E + lam * C) / lam})


@check(3)
def error(yours):
    width, cases, right = 0.4, (1.9, 2.2, 9.0, 0.1), []
    geco = GECO(tau=2.0, width=width)
    for geco.c in cases:
        right.append(geco.error)
    plain = torch.tensor([(c - 2.0) / width for c in cases])
    compare([float(yours(c, 2.0, width)) for c in cases], right, {
        "the sign is wrong: above 0 where c is above tau": -torch.tensor(right),
        "did you cut it off at -1 and 1?": plain, "it is cut off above only, not at -1": plain.clamp(max=1),
        "did you divide by the width?": (plain * width).clamp(-1, 1),
        "you multiplied by the width: divide by it": (plain * width**2).clamp(-1, 1),
        "you divided by tau: it is the width": (plain * width / 2.0).clamp(-1, 1),
        "you cut off first and then divided": (plain * width).clamp(-1, 1) / width})


@check(4, {"NoneType": "c is None at the very first step"})
def update(yours):
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()
    losses = [2.3] + [1.8 + x for x in losses] + [9.0] * 40 + [0.1] * 80

    def course(ema=0.8, nu=0.1):
        geco, found = GECO(tau=2.0, width=0.5, nu=nu, ema=ema, lam=1.0, lam_min=0.1, lam_max=20.0), []
        for C in losses:
            geco.update(C)
            found.append((geco.h, geco.c))
        return torch.tensor(found)  # (steps, 2)

    h, c, found = 0.0, None, []
    for C in losses:
        h, c = yours(h, c, C, 2.0, 0.5, 0.1, 0.8, math.log(0.1), math.log(20.0))
        found.append((float(h), float(c)))
    mine, right = torch.tensor(found), course()
    assert same(mine[0], right[0]) or not same(mine[0].flip(0), right[0]), "h and c are exchanged: return h, c"
    assert abs(found[0][1] - 0.2 * losses[0]) > 1e-4, "at the first step c is C itself: an average that begins at 0 lags"
    assert not same(mine[:, 1], course(ema=0.2)[:, 1]), "ema and 1 - ema are exchanged: the old average weighs ema"
    compare(mine[:, 1], right[:, 1], {"you do not average: c is a moving average of C": torch.tensor(losses)})
    h, right_h = mine[:, 0], right[:, 0]
    assert not same(h, course(ema=0.0)[:, 0]), "the error is that of the average c, not of one batch's C"
    assert not same(h[1:], right_h[:-1]), "you used the old c: average first, then take the error"
    assert h[0] * right_h[0] >= 0, "h goes down where it should go up: h + nu e"
    assert h.max() <= math.log(20.0) + 1e-5 and h.min() >= math.log(0.1) - 1e-5, (
        f"h goes from {h.min():.1f} to {h.max():.1f}: did you cut h off at h_min ({math.log(0.1):.1f}) and h_max "
        f"({math.log(20.0):.1f})?")
    compare(h, right_h, {"nu is missing: h + nu e": course(nu=1.0)[:, 0]})


@check(5)
def multipliers(yours, solve, swing):
    both = yours()
    assert set(both) == {"bad", "good"}, 'return {"bad": {"nu": ..., "kp": 0}, "good": {"nu": ..., "kp": ...}}'
    bad, good = both["bad"], both["good"]
    assert bad["kp"] == 0 and bad["nu"] == good["nu"], "bad has kp = 0, and both have the same nu"
    found = swing(solve(**bad))
    assert found >= 10, f"the bad one swings by {found:.1f} only: make nu larger, so that lambda outruns the delay"
    found = swing(solve(**good))
    if found > 3:
        calmer = swing(solve(good["nu"], min(19, good["kp"] * 1.5 + 0.1)))
        assert calmer > found, f"the good one still swings by {found:.1f}, in slow waves: make kp larger, or, if none helps, nu smaller"
        raise AssertionError(f"the good one shakes by {found:.1f}: kp passes on the noise of single batches, or nu is "
                             "too large for any kp")


@check(6)
def steps_back(yours):
    for h, lam, nu in ((8.0, 1.5, 0.01), (3.0, 0.5, 0.02)):
        geco, steps = GECO(tau=9.0, width=1.0, nu=nu, kp=0.0, ema=0.0, lam=math.exp(h), lam_max=1e30), 0
        while geco.lam > lam:
            geco.update(1.0)
            steps += 1
        found = float(yours(h, lam, nu))
        assert abs(found - (h - lam) / nu) > 1, "h is a logarithm, lam is not: take log(lam)"
        assert abs(found - (math.exp(h) - lam) / nu) > 1, "it is h that falls by nu a step, not lambda"
        assert abs(found - h / nu) > 1, "that is the way down to lambda = 1: it stops at lam"
        assert abs(found - steps) <= 1, f"from h = {h} to lambda = {lam} GECO needs {steps} steps, not {found:.0f}"


# -----------------------------------------------------------------------------
# 3: addition


def tapped(model, idx):
    """{name: activation}, and per layer the logits s (N, heads, T, T)."""
    seen = patching.record(model, idx)
    qk = [[seen[f"h{l}.attn.{x}"].transpose(1, 2) for x in "qk"] for l in range(model.config.n_layer)]
    return seen, torch.stack([q @ k.mT / math.sqrt(q.shape[-1]) for q, k in qk], dim=1)


@check(1, TAP)
def gates(yours, model):
    idx, targets = (t[::61] for t in tasks.problems())
    _, s = tapped(model, idx)
    b, right = model.config.gate_bias, addition_toy.evaluate(model, idx, targets).gates
    mine = yours(model, idx)
    assert same(mine, yours(model, idx)), "twice the same problems, and the gates differ: these are drawn, and n = 0 here"
    compare(mine, right, {
        "did you forget b?": s > 0,
        "rows and columns are exchanged: [..., i, j] is the gate from j to i, query i": right.mT,
        "did you divide s by sqrt(D)? Without it b counts too little": s * math.sqrt(model.config.head_size) + b > 0,
        "this is causal, but in this model every token may read every other": right.tril()})


@check(2)
def reads(yours, gates):
    lines, shares = addition.describe(gates), gates.any(2).double().mean(0)  # (layers, 11, 11)
    for l in range(gates.shape[1]):
        for i in range(gates.shape[3]):
            mine, right = yours(gates, l, i), shares[l, i]
            compare(mine, right, {
                "rows and columns are exchanged: who reads is [..., i, :]": shares[l, :, i],
                "this is of all layers together: it is of layer l": shares.mean(0)[i],
                "these are numbers of problems: it is the share of them": right * len(gates)})
            order = sorted(zip(torch.as_tensor(mine).tolist(), range(11)), reverse=True)
            said = ", ".join(f"{addition.NAMES[j]} {share:.1%}" for share, j in order if share >= 0.005)
            assert not said or f"layer {l}: {addition.NAMES[i]} reads {said}" in lines
    two = torch.rand(20, 2, 2, 11, 11, generator=torch.Generator().manual_seed(0)) < 0.3  # a model with two heads
    mine, heads = yours(two, 1, 9), two[:, 1, :, 9].double()
    compare(mine, heads.amax(1).mean(0), {
        "with two heads: this is the mean over heads, count a problem in which either is open": heads.mean((0, 1)),
        "with two heads: this is the sum over heads, a problem in which both are open counts once": heads.sum(1).mean(0),
        "with two heads: this is the first one alone": heads[:, 0].mean(0),
        "with two heads: this is open in both, it should be in either": heads.amin(1).mean(0)})


@check(3)
def carry(yours):
    numbers = torch.arange(10000)
    x, y, targets = numbers // 100, numbers % 100, tasks.problems()[1]
    right = targets[:, 9] != (x // 10 + y // 10) % 10  # the tens of the sum are not the sum of the tens
    mine = torch.as_tensor(yours())
    assert mine.dtype == torch.bool, "return True or False of each problem: as an index 0 and 1 would be two problems"
    compare(mine, right, {
        "did you use > 10? 4 + 6 carries, too": x % 10 + y % 10 > 10,
        "that is the carry into the hundreds: take the units": x + y >= 100,
        "these are the tens digits: take the units, % 10": x // 10 + y // 10 >= 10,
        "problem 100 x + y: x is the number // 100, y is the number % 100": numbers // 10 % 10 + y % 10 >= 10,
        "with and without are exchanged": ~right})


@check(4)
def carry_edge(yours, gates):
    numbers, table = torch.arange(10000), addition.carry_table(gates)
    carries = numbers // 100 % 10 + numbers % 10 >= 10
    l, i, j, sign = yours(gates, carries)
    names = addition.NAMES

    def agreement(l, i, j, sign=True):
        return (gates[:, l, :, i, j].any(1) == (carries == bool(sign))).double().mean().item()

    assert l >= 1, "layer 0 reads digits: the carry is read above it"
    assert i != j, "j is i itself: an edge is read from another position"
    assert i in (addition.HUNDREDS, addition.TENS), (
        "the reader i is the tens (9) or the hundreds (8), and j is another position: are i and j exchanged?")
    listed = [(a, b) for a in (addition.HUNDREDS, addition.TENS) for b in range(11)
              if f"{names[a]} <- {names[b]}" in table]
    above = range(1, gates.shape[1])
    best = max(agreement(m, *edge, s) for m in above for edge in listed for s in (True, False))
    mine = agreement(l, i, j, sign)
    if mine < best - 0.002:
        assert agreement(l, i, j, not sign) < best - 0.002, (
            "the edge is right, the sign is not: is it open with a carry?")
        share = gates.any(2).double().mean(0)  # (layers, 11, 11)
        often = max((share[m, a, b].item(), m, a, b) for m in above for a, b in listed)[1:]
        assert (l, i, j) != often, ("this is the edge that is open most often: an edge that is always open says "
                                    "nothing. Compare it with the carry, problem by problem")
        raise AssertionError(f"{names[i]} <- {names[j]} agrees with the carry in {mine:.1%} of the problems, another "
                             f"edge in {best:.1%}: did you count edges that are open when there is none?")


@check(5, TAP)
def set_gate(yours, model, l, i, j):
    idx = tasks.problems()[0][::97]
    open_everywhere = SimpleNamespace(config=replace(model.config, sparse=False))

    def logits(change, l):
        """Of a run in which change(z, A a, a, v) -> z replaces what the heads of layer l have read."""
        seen = {}

        def tap(name, t):
            seen[name] = t
            if name != f"h{l}.attn.z":
                return t
            q, k, v = (seen[f"h{l}.attn.{x}"] for x in "qkv")
            a = patching.attend(open_everywhere, q, k, v)[1][:, 0]  # (N, 11, 11)
            return change(t.clone(), patching.attend(model, q, k, v)[1][:, 0], a, v[:, :, 0])  # head 0

        return model(idx, tap=tap)[0]

    def put(z, read):
        z[:, i, 0] = read
        return z

    def set_to(wanted, j):
        def change(z, weights, a, v):
            weights[:, i, j] = wanted * a[:, i, j]
            return put(z, (weights[:, i, None] @ v)[:, 0])
        return change

    def scaled(wanted, j):
        def change(z, weights, a, v):
            weights[:, i, j] = wanted * a[:, i, j]
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
            return put(z, (weights[:, i, None] @ v)[:, 0])
        return change

    def everywhere(wanted, j):
        def change(z, weights, a, v):
            weights[:, :, j] = wanted * a[:, :, j]
            z[:, :, 0] = weights @ v
            return z
        return change

    def relative(wanted, j):  # as if the gate had been open, or shut, before
        def change(z, weights, a, v):
            return put(z, z[:, i, 0] + (1 if wanted else -1) * a[:, i, j, None] * v[:, j])
        return change

    def full(wanted, j):
        def change(z, weights, a, v):
            weights[:, i, j] = wanted
            return put(z, (weights[:, i, None] @ v)[:, 0])
        return change

    # tens <- x tens in layer 0, too, because there the tens read two digits
    for l_, j_, wanted in ((l, j, 0.0), (0, 0, 0.0), (0, 0, 1.0), (l, j, 1.0)):
        compare(yours(model, idx, l_, i, j_, wanted), logits(set_to(wanted, j_), l_), {
            message: logits(change, l_) for message, change in {
                "no logit has changed: does your tap return the new z, is the layer l yours, is the row i, or is your "
                "term zero where a gate is to be shut?": lambda z, *_: z,
                "this is the run with the gate " + ("shut" if wanted else "open"): set_to(1 - wanted, j_),
                "did you renormalise after the gate? Only the one term changes": scaled(wanted, j_),
                "you have shut all that i reads: take away the one term from j": lambda z, *_: put(z, 0.0),
                "you have changed what all positions read from j: only position i should": everywhere(wanted, j_),
                "the gate was open in some problems already: add (is_open - A_ij) a_ij v_j": relative(wanted, j_),
                "an open gate lets a_ij v_j through, not v_j": full(wanted, j_)}.items()})


# -----------------------------------------------------------------------------
# 4: copying


@check(1)
def right_pairs(yours):
    for T in (12, 32):
        found, kinds = yours(T), copying.kinds(T)
        i, j = torch.arange(T)[:, None], torch.arange(T)
        assert set(found) == {"previous token", "induction"}, 'return {"previous token": ..., "induction": ...}'
        compare(found["previous token"], kinds["the token before"], {
            "rows and columns are exchanged: the reader i is the row, and it reads j = i - 1": j - i == 1,
            "this is the token itself": i == j})
        compare(found["induction"], kinds["what came next the last time"], {
            "this is the same token, the last time: its successor is what should be read": i - j == T // 2,
            "you went one too far back: the token after the last occurrence is T/2 - 1 before i": i - j == T // 2 + 1,
            "the last token of the first half has not come before: no edge to j = 0": i - j == T // 2 - 1,
            "rows and columns are exchanged: the reader i is the row": kinds["what came next the last time"].T})


@check(2)
def table(yours, maps):
    T = maps.shape[-1]
    pairs, allowed = copying.kinds(T)["what came next the last time"], sparse.allowed_pairs(T, causal=True)
    for l in range(maps.shape[1]):
        for h in range(maps.shape[2]):
            gates = maps[:, l, h] > 0
            right = torch.tensor(copying.story(maps, {"previous token": (l, h), "induction": (l, h)})["table"])
            compare(yours(gates, pairs), right, {
                "is your count over allowed pairs only? A key j > i is neither open nor shut": right + torch.tensor(
                    [[0, 0], [0, int((~allowed).sum())]]),
                "these are counts of all prompts together: take the mean": right * len(gates),
                "rows and columns are exchanged: first the right pairs, [open, shut]": right.T,
                "these are shares: they should be numbers of pairs": right / right.sum()})


@check(3)
def fit(yours):
    for numbers in ([[15.0, 1.0], [3.0, 509.0]], [[2.0, 14.0], [40.0, 472.0]], [[0.0, 16.0], [0.0, 512.0]]):
        t = torch.tensor(numbers)
        (a, b), (c, d) = numbers
        mine = yours(t)
        compare(float(mine), a / (a + b + c), {
            "this is the share of right pairs that are open: a head that opens everything gets 1": a / (a + b),
            "this is the share of open pairs that are right: one lucky gate gets 1": a / max(a + c, 1e-9),
            "did you count the pairs that are shut and not right? They are nearly all, and any head gets them":
                (a + d) / (a + b + c + d),
            "this is the share of all pairs: divide by those that are open or right": a / (a + b + c + d)})


@check(4)
def two_heads(yours, maps):
    found, teams = yours(maps > 0), copying.find_teams(maps)
    assert all(isinstance(head, tuple) and len(head) == 2 for head in found.values()), (
        "a head is a tuple (l, h), of two numbers, so that it can be looked up in a list")
    found = {role: tuple(int(x) for x in head) for role, head in found.items()}
    assert set(found) == set(teams), 'return {"previous token": (l, h), "induction": (l, h)}'
    previous, induction = (found[role] in teams[other] for role, other in zip(teams, reversed(teams)))
    assert not (previous and induction), "the two roles are exchanged"
    most = divmod(int((maps > 0).sum((0, 3, 4)).argmax()), maps.shape[2])
    for role, team in teams.items():
        here = found[role] in team
        assert here or found[role][::-1] not in team, f"{role}: layer and head are exchanged, it is (l, h)"
        assert here or found[role] != most, (
            f"{role}: this is the head with the most open gates: does your fit count the wrong ones?")
        assert here, (f"{role}: other heads have more weight on these edges than {found[role]}; "
                      "did you take the best fit over all layers and heads?")
    T = maps.shape[-1]
    made_up = torch.zeros(1, 2, 3, T, T, dtype=torch.bool)  # head 0 opens all, 1 one right pair, 2 nearly the right ones
    for l, kind in enumerate(("the token before", "what came next the last time")):
        pairs = copying.kinds(T)[kind]
        made_up[0, l, 0], made_up[0, l, 1, -1] = sparse.allowed_pairs(T, causal=True), pairs[-1]
        made_up[0, l, 2, :-1], made_up[0, l, 2, 0, 0] = pairs[:-1], True
    for l, (role, place) in enumerate(yours(made_up).items()):
        message = f"{role}: right in this model, but on gates made up for this check you took "
        assert place[1] != 0, message + "a head that opens everything: use fit()"
        assert place[1] != 1, message + "a head with one lucky gate: use fit()"
        assert tuple(place) == (l, 2), message + f"{tuple(place)}, and {(l, 2)} fits best"


@check(5, TAP)
def silence(yours, model):
    idx = tasks.problems()[0][:6, :10] + 40  # any tokens will do
    n_head, zero = model.config.n_head, lambda name, t, ends: 0 * t if name.endswith(ends) else t
    seen = patching.record(model, idx)
    loud = torch.stack([seen[f"h{l}.attn.z"].square().sum((0, 1, 3)) for l in range(model.config.n_layer)])
    loud = [divmod(int(n), n_head) for n in loud.flatten().argsort(descending=True)]  # a quiet head would not be missed
    for heads in (loud[:3], loud[3:4]):
        layers = tuple(f"h{l}.attn.z" for l, _ in heads)
        names = {f"h{l}.attn.q": [h for m, h in heads if m == l] for l, _ in heads}

        def without_q(name, t):
            t = t.clone()
            t[:, :, names.get(name, [])] = 0
            return t

        def at_positions(name, t):
            t = t.clone()
            for l, h in heads:
                if name == f"h{l}.attn.z":
                    t[:, h] = 0  # (N, T, heads, D): the second is the position
            return t

        compare(yours(model, idx, heads), model(idx, tap=copying.shut(heads))[0], {
            "nothing has changed: does your tap return the new z?": model(idx)[0],
            "with q = 0 the logit is 0, and s + b > 0: you have opened all gates of the head. Set z to 0": model(
                idx, tap=without_q)[0],
            "you have silenced all heads of the layer: z is (N, T, heads, D)": model(
                idx, tap=lambda name, t: zero(name, t, layers))[0],
            "you have silenced positions, not heads: z is (N, T, heads, D)": model(idx, tap=at_positions)[0],
            "layer and head are exchanged: heads are (l, h)": model(idx, tap=copying.shut([(h, l) for l, h in heads]))[0],
            "only the last head of the list is silent": model(idx, tap=copying.shut(heads[-1:]))[0],
            "only the first head of the list is silent": model(idx, tap=copying.shut(heads[:1]))[0],
            "you have silenced all the others": model(idx, tap=copying.shut(
                {(l, h) for l in range(model.config.n_layer) for h in range(n_head)} - set(heads)))[0]})


@check(6, TAP)
def effects(yours, model, idx):
    L, H, half = model.config.n_layer, model.config.n_head, idx.shape[1] // 2
    worse = copy.deepcopy(model)  # it is right on fewer than all, as the dense model
    random = torch.Generator().manual_seed(0)
    worse.wte.weight.data += worse.wte.weight.std() * torch.randn(worse.wte.weight.shape, generator=random)

    def right(heads, model=worse):
        logits = model(idx, tap=copying.shut(heads))[0]
        return (logits[:, half:-1].argmax(-1) == idx[:, half + 1:]).float().mean()

    places = [(l, h) for l in range(L) for h in range(H)]
    without = torch.stack([right([place]) for place in places]).view(L, H)
    so_far = torch.stack([right(places[:n + 1]) for n in range(len(places))]).view(L, H)
    here = torch.stack([right([place], model) for place in places]).view(L, H)
    compare(yours(worse, idx), right([]) - without, {
        "this is another model's: use the model that is given": right([], model) - here,
        "take what is right without the head from what this model has right, not from 1": 1 - without,
        "this is a share of what the model has right: take the difference": (right([]) - without) / right([]),
        "this is the share that is still right: the effect is what is lost": without,
        "the sign is wrong: above 0 where copying suffers": without - right([]),
        "rows and columns are exchanged: a row is a layer, [l, h]": (right([]) - without).T,
        "each head alone: yours stay silent while the next one is tried": right([]) - so_far})


# -----------------------------------------------------------------------------
# 5: edges


@check(1)
def writes(yours, model, idx):
    run, a = patching.record(model, idx), patching.contributions(model, idx)
    H, sources = model.config.n_head, patching.Graph(model.config).sources
    for l, h in ((0, 0), (1, H - 1), (model.config.n_layer - 1, 1)):
        z, W = run[f"h{l}.attn.z"], model.h[l].attn.c_proj.weight
        D, b, right = z.shape[-1], model.h[l].attn.c_proj.bias, a[:, sources.index(f"a{l}.h{h}")]
        part = slice(h * D, (h + 1) * D)
        mistakes = {
            "you took rows of the matrix: it is (C, heads * D), a head has columns": z[:, :, h] @ W[part],
            "these are all heads of the layer: take the columns of one": z.flatten(2) @ W.T,
            "these are the columns of the first head": z[:, :, h] @ W[:, :D].T,
            "every number of the head goes through its own column: h * D to (h + 1) * D": z[:, :, h] @ W[:, h::H].T}
        if b is not None:
            mistakes = {"did you add the bias? It belongs to no head": right + b} | mistakes
        compare(yours(model, run, l, h), right, mistakes)


@check(2, TAP | {"does not require grad": "at `final` put in t.detach().requires_grad_(), and return that copy"})
def gradient(yours, model, idx, metric):
    right = patching.gradients(model, idx, metric, ["final"])[0]["final"]
    early = patching.gradients(model, idx, metric, [f"h{model.config.n_layer - 1}.mlp.in"])[0]
    compare(yours(model, idx, metric), right, {
        "you took the mean over prompts: each prompt's own gradient comes from the sum": right / len(idx),
        "the sign is wrong": -right,
        "this is the gradient at the last MLP's input: it is at final": [*early.values()][0]})


def into_logits(model, task, place):
    """(change of what head `place` writes, dM/dx at the logits, graph, source, column)."""
    graph = patching.Graph(model.config)
    u, v = graph.sources.index("a{}.h{}".format(*place)), graph.column["logits"]
    before, after = (patching.contributions(model, idx)[:, u] for idx in (task.clean, task.corrupt))
    return after - before, patching.gradients(model, task.clean, task.metric, ["final"])[0]["final"], graph, u, v


@check(3)
def score(yours, model, task):
    place = copying.find_heads(patching.attention_maps(model, task.clean))["induction"]
    change, slope, _, u, v = into_logits(model, task, place)
    right, (N, T, C) = patching.edge_attribution(model, task.clean, task.corrupt, task.metric)[0][u, v], change.shape
    compare(float(yours(change, slope)), right, {
        "this is the sum over prompts: take their mean": right * N,
        "this is the mean over tokens and width, too: sum over those": right / (T * C),
        "this is the mean over tokens, too: sum over them": right / T,
        "the sign is wrong: the change is corrupt minus clean": -right,
        "did you take absolute values? What pulls both ways cancels": (change * slope).abs().sum() / N})


@check(4)
def exact(yours, model, task):
    place = copying.find_heads(patching.attention_maps(model, task.clean))["induction"]
    change, slope, graph, u, v = into_logits(model, task, place)
    run, one = patching.record(model, task.clean), patching.Graph(model.config)
    one.edges &= torch.zeros_like(one.edges).index_put((torch.tensor(u), torch.tensor(v)), torch.tensor(True))
    right = patching.exact_edges(model, one, task.clean, task.corrupt, task.metric)[u, v]
    full, name = task.metric(model(task.clean)[0]).mean(), f"h{place[0]}.attn.out"
    node = task.metric(patching.patch(model, task.clean, {name: run[name] + change})).mean() - full
    with torch.no_grad():
        bare, changed = (task.metric(model.lm_head(x)).mean() for x in (run["final"], run["final"] + change))
    compare(float(yours(model, run, change, task.metric)), right, {
        "the sign is wrong: M with the patch minus M without": -right,
        "this is M with the patch: subtract M without": right + full,
        "the layers in between have read the change, too: only the logits should": node,
        "this is the attribution score: run the model's end": (change * slope).sum() / len(change),
        "where is the norm? The logits are lm_head(ln_f(x))": changed - bare,
        "where is the norm? The logits of the patched run are lm_head(ln_f(x)), too": changed - full,
        "this is the sum over prompts: take their mean": right * len(change)})


@check(5)
def most_missed(yours, scores, effects, edges):
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 6, 9, generator=random)
    for scores, effects, edges in ((scores, effects, edges), (*drawn, torch.arange(9) > torch.arange(6)[:, None])):
        gap = (effects - scores).abs().masked_fill(~edges, -1.0)
        (u, v), place = yours(scores, effects, edges), lambda x: divmod(int(x.argmax()), x.shape[1])
        if gap[u, v] < gap.max():
            everywhere = (effects - scores).abs()
            for message, wrong in {
                "did you stay with the edges? Elsewhere no effect was measured": everywhere,
                "this is the edge with the largest effect: ask where the score is wrong":
                    effects.abs().masked_fill(~edges, -1),
                "this is the edge with the largest score: ask where it is wrong": scores.abs().masked_fill(~edges, -1),
                "did you take the absolute difference? The score can be wrong either way": (effects - scores).masked_fill(
                    ~edges, -torch.inf),
                "this is where they differ least": -gap.masked_fill(~edges, torch.inf),
                "did you take the absolute difference? It can be wrong either way": (scores - effects).masked_fill(
                    ~edges, -torch.inf)}.items():
                assert (int(u), int(v)) != place(wrong), message
            raise AssertionError(f"there the two differ by {gap[u, v]:.2f}, elsewhere by {gap.max():.2f}")


@check(6)
def strongest(yours, graph, scores):
    for n in (1, 20, 60):
        mine = yours(scores, graph.edges, n)
        assert mine.dtype == torch.bool and mine.shape == scores.shape, (
            "return bool (S, V), True on the edges that are kept")
        right = curves.circuit(graph, scores.abs(), n)  # without the edges that lead nowhere
        outside = scores.abs()[graph.edges & ~mine].max()
        if (mine.sum() == n and not (mine & ~graph.edges).any() and scores.abs()[mine].min() >= outside
                and torch.equal(curves.prune(graph, mine), right)):
            continue
        wrong = {name: torch.zeros_like(graph.edges) for name in ("largest", "smallest", "weakest")}
        for kept, value in zip(wrong.values(), (scores, -scores, -scores.abs())):
            kept.view(-1)[value.masked_fill(~graph.edges, -torch.inf).flatten().topk(n).indices] = True
        assert not torch.equal(mine, wrong["largest"]) and not torch.equal(mine, wrong["smallest"]), (
            "did you forget the absolute value? An edge that lowers M counts, and one that raises it, too")
        assert not torch.equal(mine, wrong["weakest"]), "these are the weakest edges"
        assert not (mine & ~graph.edges).any(), "some of these pairs are no edges: only where `edges` is True"
        assert mine.sum() == n, f"{int(mine.sum())} edges are kept, it should be {n}"
        raise AssertionError("an edge outside has a larger |score| than one inside")
