"""The exercises with their solutions put in, and each check on the mistake that it names."""

import ast
import functools
import math
import os
import pathlib
import re
import subprocess
import sys

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import sparse
from addition_toy import evaluate, problems
from exercises import checks, make_models
from geco import GECO
from model import Config, Transformer
from patching import attention_maps, edge_attribution, gradients, head_outputs, patch, record
from plumbing import copying, tasks, tokens
from plumbing.copying import find_heads

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "exercises").glob("[0-9]_*.py"))

# -----------------------------------------------------------------------------
# solutions: the repository's functions, or what they say


def batch(*tensors):
    return [t[None, None] for t in tensors]


def logits(q, k):
    s = q @ k.T / math.sqrt(q.shape[-1])
    return s.masked_fill(~sparse.allowed_pairs(len(q), causal=True), -torch.inf)


def head(q, k, v, b, u):
    s = logits(q, k)
    return sparse.gates(s, b, u) * s.softmax(-1) @ v


def count(s):
    return len(s) * (len(s) + 1) / 2


def slope(s, b):
    p = torch.sigmoid(s + b)
    return p * (1 - p) / count(s)


def error(c, tau, width):
    return min(1.0, max(-1.0, (c - tau) / width))


def update(h, c, C, tau, width, nu, ema, h_min, h_max):
    c = C if c is None else ema * c + (1 - ema) * C
    return min(h_max, max(h_min, h + nu * error(c, tau, width))), c


def carry():
    x, y = torch.arange(10000) // 100, torch.arange(10000) % 100
    return x % 10 + y % 10 >= 10


def carry_edge(gates, carry):
    agrees = {(l, i, j, sign): (gates[:, l].any(1)[:, i, j] == (carry == sign)).float().mean()
              for l in range(1, gates.shape[1]) for i in (8, 9) for j in range(11) if i != j for sign in (True, False)}
    return max(agrees, key=agrees.get)


def set_gate(model, idx, l, i, j, is_open):
    seen = {}

    def tap(name, t):
        seen[name] = t
        if name == f"h{l}.attn.z":
            q, k, v = (seen[f"h{l}.attn.{x}"][:, :, 0] for x in "qkv")  # (N, 11, D)
            s = q @ k.mT / math.sqrt(q.shape[-1])
            A = (s + model.config.gate_bias > 0).float()
            t = t.clone()
            t[:, i, 0] += ((is_open - A) * s.softmax(-1))[:, i, j, None] * v[:, j]
        return t

    return model(idx, tap=tap)[0]


def right_pairs(T):
    kinds = copying.kinds(T)
    return {"previous token": kinds["the token before"], "induction": kinds["what came next the last time"]}


def table(gates, pairs):
    others = ~pairs & sparse.allowed_pairs(len(pairs), causal=True)
    return torch.tensor([[gates[:, p].sum() / len(gates), (~gates[:, p]).sum() / len(gates)] for p in (pairs, others)])


def fit(table):
    return table[0, 0] / (table.sum() - table[1, 1])


def two_heads(gates):
    L, H = gates.shape[1:3]
    return {role: max(((l, h) for l in range(L) for h in range(H)), key=lambda at: fit(table(gates[:, *at], pairs)))
            for role, pairs in right_pairs(gates.shape[-1]).items()}


def silence(model, idx, heads):
    return model(idx, tap=copying.shut(heads))[0]


def share_right(logits, idx):
    half = idx.shape[1] // 2
    return (logits[:, half:-1].argmax(-1) == idx[:, half + 1:]).float().mean()


def effects(model, idx):
    whole, (L, H) = share_right(model(idx)[0], idx), (model.config.n_layer, model.config.n_head)
    return torch.tensor([[whole - share_right(silence(model, idx, [(l, h)]), idx) for h in range(H)] for l in range(L)])


def writes(model, run, l, h):
    return head_outputs(model.h[l], run[f"h{l}.attn.z"])[:, h]


def gradient(model, idx, metric):
    seen = {}

    def tap(name, t):
        seen[name] = t.detach().requires_grad_() if name == "final" else t
        return seen[name]

    return torch.autograd.grad(metric(model(idx, tap=tap)[0]).sum(), seen["final"])[0]


def exact(model, run, change, metric):
    before, after = (metric(model.lm_head(model.ln_f(x))) for x in (run["final"], run["final"] + change))
    return (after - before).mean()


def most_missed(scores, effects, edges):
    gap = (scores - effects).abs().masked_fill(~edges, -1)
    return divmod(gap.argmax().item(), gap.shape[1])


def strongest(scores, edges, n):
    kept = torch.zeros_like(edges)
    kept.view(-1)[scores.abs().where(edges, -torch.inf).flatten().topk(n).indices] = True
    return kept


SOLUTIONS = {
    "1_gate": dict(logits=logits, gate=lambda s, b, u: sparse.gates(s, b, u), straight_through=sparse.gates,
                   head=head, open_share=lambda s, b: torch.sigmoid(s + b).sum() / count(s), penalty_slope=slope),
    "2_geco": dict(point_at=lambda lam: (3 * lam / (1 + lam), 4 * lam / (1 + lam)),
                   loss=lambda E, C, lam: GECO(1.0, lam=lam, lam_max=lam + 1).loss(E, C), error=error, update=update,
                   multipliers=lambda: dict(bad=dict(nu=0.1, kp=0), good=dict(nu=0.1, kp=1)),
                   steps_back=lambda h, lam, nu: (h - math.log(lam)) / nu),
    "3_addition": dict(gates=lambda model, idx: evaluate(model, idx, idx).gates,
                       reads=lambda gates, l, i: gates[:, l].any(1)[:, i].double().mean(0), carry=carry,
                       carry_edge=carry_edge, set_gate=set_gate),
    "4_copying": dict(right_pairs=right_pairs, table=table, fit=fit, two_heads=two_heads, silence=silence, effects=effects),
    "5_edges": dict(writes=writes, gradient=gradient,
                    score=lambda change, slope: (change * slope).sum() / len(change), exact=exact,
                    most_missed=most_missed, strongest=strongest),
}

# -----------------------------------------------------------------------------
# the files as they stand, and with the solutions


def fill(path, solutions, source=None):
    """The source, in which each function of `solutions` is taken from there."""
    source = source or path.read_text()
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in solutions:
            lines[node.lineno - 1 : node.end_lineno] = [f"{node.name} = solutions[{node.name!r}]"]
    return compile("\n".join(lines), str(path), "exec")


def run(path, solutions):
    names = {"__name__": "__main__", "__file__": str(path), "solutions": solutions}
    exec(fill(path, solutions), names)
    plt.close("all")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_with_the_solutions_every_check_says_ok(path, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "PICTURES", tmp_path)
    run(path, SOLUTIONS[path.stem])
    said = capsys.readouterr().out
    assert said.count("(): ok") == len(SOLUTIONS[path.stem]) and 4 <= said.count("(): ok") <= 6
    assert os.listdir(tmp_path) == [f"{path.stem}.png"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_unfilled_it_stops_at_the_first_task_that_is_not_done(path):
    names = list(SOLUTIONS[path.stem])
    for number in (1, 2):
        with pytest.raises(checks.NotYet) as stopped:
            run(path, {name: SOLUTIONS[path.stem][name] for name in names[: number - 1]})
        assert re.fullmatch(rf"task {number} is not done: fill in {names[number - 1]}\(\) in {path.name}, line \d+ "
                            r"\(or does its last line lack `return`\?\)",
                            str(stopped.value))


@pytest.mark.parametrize("folder, file", [(ROOT, "exercises/3_addition.py"), (ROOT / "exercises", "1_gate.py")])
def test_as_a_script_that_is_one_line_and_no_traceback(folder, file):
    done = subprocess.run([sys.executable, file], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("task 1 is not done: fill in ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_goal_minutes_and_difficulty_and_ends_with_two_questions(path):
    text = path.read_text()
    tasks = re.findall(r"^# ## Task (\d)", text, re.M)
    assert tasks == [str(n + 1) for n in range(len(SOLUTIONS[path.stem]))] and 4 <= len(tasks) <= 6
    assert text.startswith(f"# %% [markdown]\n# # {path.stem[0]}. ") and "\n# **Goal:** " in text
    assert f"**About 45 minutes. Difficulty {path.stem[0]} of 5.**" in text
    questions = text.split("# ## Two questions without an answer key\n")[1]
    assert re.findall(r"^# (\d)\. ", questions, re.M) == ["1", "2"] and "# %%" not in questions
    bodies = [ast.get_source_segment(text, node) for node in ast.parse(text).body
              if isinstance(node, ast.FunctionDef) and node.name in SOLUTIONS[path.stem]]
    for body in bodies:
        assert re.search(r'"""\n    # about \d+ lines?[^\n]*(\n    #[^\n]*)*\n    \.\.\.$', body), body


def test_the_models_are_small():
    found = list((ROOT / "exercises/models").iterdir())
    assert len(found) == 4 and sum(file.stat().st_size for file in found) <= 4e6


# -----------------------------------------------------------------------------
# each check on the mistakes that it names


@functools.cache
def model(name):
    return checks.load(name)


@functools.cache
def induction():
    """(prompts (4, 32), A a of the sparse model, the Task)."""
    task = tasks.make("induction", tokens.Bytes(), 4)
    return task.clean, attention_maps(model("copying_sparse"), task.clean), task


@functools.cache
def scores():
    _, _, task = induction()
    return edge_attribution(model("copying_sparse"), task.clean, task.corrupt, task.metric)


def adder():
    """Gates of a made-up circuit: units and tens read their digits, the tens the carry, the hundreds always the tens."""
    gates = torch.zeros(10000, 2, 1, 11, 11, dtype=torch.bool)
    for i, j in ((10, 1), (10, 4), (9, 0), (9, 3)):
        gates[:, 0, 0, i, j] = True
    gates[:, 1, 0, 8, 9], gates[:, 1, 0, 9, 10], gates[:, 1, 0, 8, 10] = True, carry(), carry() & (torch.arange(10000) % 3 > 0)
    return gates


def swinging(nu, kp):
    """As solve() of exercise 2: lambda of the disc problem, as (steps, 3)."""
    return run_two()["solve"](GECO(4.0, width=4.0, lam_min=0.01, lam_max=20.0, nu=nu, kp=kp))


@functools.cache
def run_two():
    path = ROOT / "exercises/2_geco.py"
    source = path.read_text().split("# ## Task 6")[0]
    names = {"__name__": "__main__", "__file__": str(path), "solutions": SOLUTIONS["2_geco"]}
    exec(fill(path, SOLUTIONS["2_geco"], source), names)
    return names


ARGUMENTS = {
    "multipliers": lambda: (swinging, run_two()["swing"]), "gates": lambda: (model("addition_sparse"),),
    "reads": lambda: (adder(),), "carry_edge": lambda: (adder(),), "set_gate": lambda: (model("addition_sparse"), 1, 9, 10),
    "table": lambda: (induction()[1],), "two_heads": lambda: (induction()[1],),
    "silence": lambda: (model("copying_sparse"),), "effects": lambda: (model("copying_sparse"), induction()[0]),
    "writes": lambda: (model("copying_sparse"), induction()[0]),
    "gradient": lambda: (model("copying_sparse"), induction()[0], induction()[2].metric),
    "score": lambda: (model("copying_sparse"), induction()[2]), "exact": lambda: (model("copying_sparse"), induction()[2]),
    "most_missed": lambda: missed(), "strongest": lambda: scores()[::-1],
}


def missed():
    """Scores and effects of four edges out of six pairs; the largest gap has a negative effect."""
    given = torch.tensor([[0.0, 3.0, 0.1], [9.0, -2.0, 2.5]]), torch.tensor([[0.0, 3.1, -7.0], [0.0, -8.0, 4.5]])
    return *given, torch.tensor([[True, True, True], [False, True, True]])


def hard(s, b, u):
    return (s + b - torch.logit(u) > 0).float()


def soft(s, b, u):
    return torch.sigmoid(s + b - torch.logit(u))


def weights(q, k, v, b, u):
    return sparse.gates(logits(q, k), b, u), logits(q, k).softmax(-1), v


def renormalised(q, k, v, b, u):
    A, a, v = weights(q, k, v, b, u)
    return (A * a) / (A * a).sum(-1, keepdim=True).clamp(min=1e-9) @ v


def controller(average=True, first=False, cut=True, sign=1, old=False, nu=1.0, swap=False):
    """Task 4 of exercise 2 with one thing wrong."""
    def wrong(h, c, C, tau, width, rate, ema, h_min, h_max):
        ema = 1 - ema if swap else ema
        new = C if c is None or not average else ema * c + (1 - ema) * C
        seen = (new if c is None else c) if old else new
        h = h + sign * (rate if nu else 1.0) * error(C if first else seen, tau, width)
        return (min(h_max, max(h_min, h)) if cut else h), new
    return wrong


def late(h, c, C, tau, width, nu, ema, h_min, h_max):
    """The error of the average before this step; at the first there is none."""
    e = 0.0 if c is None else error(c, tau, width)
    return min(h_max, max(h_min, h + nu * e)), C if c is None else ema * c + (1 - ema) * C


def at_z(change):
    """set_gate() with change(t, A, a, v, i, j, is_open), which may write to z (N, 11, D) of head 0."""
    def wrong(model, idx, l, i, j, is_open):
        seen = {}

        def tap(name, t):
            seen[name] = t
            if name == f"h{l}.attn.z":
                q, k, v = (seen[f"h{l}.attn.{x}"][:, :, 0] for x in "qkv")
                s, t = q @ k.mT / math.sqrt(q.shape[-1]), t.clone()
                change(t[:, :, 0], (s + model.config.gate_bias > 0).float(), s.softmax(-1), v, i, j, is_open)
            return t

        return model(idx, tap=tap)[0]
    return wrong


def put(z, A, a, v, i, j, is_open, scale=False):
    w = A * a
    w[:, i, j] = is_open * a[:, i, j]
    w = w / w.sum(-1, keepdim=True).clamp(min=1e-9) if scale else w
    z[:, i] = (w @ v)[:, i]


def everywhere(z, A, a, v, i, j, is_open):
    z += ((is_open - A) * a)[:, :, j, None] * v[:, None, j]


def relative(z, A, a, v, i, j, is_open):
    z[:, i] += (2 * is_open - 1) * a[:, i, j, None] * v[:, j]


def unscaled(z, A, a, v, i, j, is_open):
    w = A * a
    w[:, i, j] = is_open
    z[:, i] = (w @ v)[:, i]


def from_s(function):
    """gates() from function(s, b)."""
    def wrong(model, idx):
        seen = record(model, idx)
        qk = [[seen[f"h{l}.attn.{x}"].transpose(1, 2) for x in "qk"] for l in range(2)]
        return torch.stack([function(q @ k.mT / math.sqrt(q.shape[-1]), model.config.gate_bias) for q, k in qk], dim=1)
    return wrong


def pairs(previous=None, induction=None):
    def wrong(T):
        i, j, right = torch.arange(T)[:, None], torch.arange(T), right_pairs(T)
        return {"previous token": previous(i, j) if previous else right["previous token"],
                "induction": induction(i, j, T) if induction else right["induction"]}
    return wrong


def counted(change):
    return lambda gates, pairs: change(table(gates, pairs), gates)


def best(measure):
    """two_heads() by another measure of the table."""
    def wrong(gates):
        places = [(l, h) for l in range(gates.shape[1]) for h in range(gates.shape[2])]
        return {role: max(places, key=lambda at: measure(table(gates[:, *at], pairs)))
                for role, pairs in right_pairs(gates.shape[-1]).items()}
    return wrong


def at_taps(ends, change):
    """silence() with change(t, l, h) at the taps of that name."""
    def wrong(model, idx, heads):
        def tap(name, t):
            for l, h in heads:
                if name == f"h{l}.attn.{ends}":
                    t = t.clone()
                    change(t, h)
            return t
        return model(idx, tap=tap)[0]
    return wrong


def zero_head(t, h):
    t[:, :, h] = 0


def zero_position(t, h):
    t[:, h] = 0


def effect_of(silent):
    """effects() that silences silent(l, h, H)."""
    def wrong(model, idx):
        whole, H = share_right(model(idx)[0], idx), model.config.n_head
        return torch.tensor([[whole - share_right(silence(model, idx, silent(l, h, H)), idx) for h in range(H)]
                             for l in range(model.config.n_layer)])
    return wrong


def matrix(function):
    """writes() from function(z (N, T, H, D), W, h, D)."""
    def wrong(model, run, l, h):
        z = run[f"h{l}.attn.z"]
        return function(z, model.h[l].attn.c_proj.weight, h, z.shape[-1])
    return wrong


def whole_node(model, run, change, metric):
    l = find_heads(induction()[1])["induction"][0]
    logits = patch(model, induction()[0], {f"h{l}.attn.out": run[f"h{l}.attn.out"] + change})
    return (metric(logits) - metric(model.lm_head(model.ln_f(run["final"])))).mean()


def topk(value):
    def wrong(scores, edges, n):
        kept = torch.zeros_like(edges)
        kept.view(-1)[value(scores, edges).flatten().topk(n).indices] = True
        return kept
    return wrong


def only(edges, value):
    return value.where(edges, -torch.inf)


def share(t):
    return t[0, 0] / t[0].sum()


WRONG = [  # (check, a wrong solution, what the message must say)
    ("logits", lambda q, k: logits(q, k) * 4, "divide by sqrt"),
    ("logits", lambda q, k: logits(q, k) / 4, "divided by D"),
    ("logits", lambda q, k: q @ k.T / 4, "-inf where j > i"),
    ("logits", lambda q, k: (q @ k.T / 4).tril(), "it is -inf"),
    ("logits", lambda q, k: logits(k, q), "exchanged"),
    ("logits", lambda q, k: (q @ k.T / 4).masked_fill(sparse.allowed_pairs(6, True).T.logical_not(), -torch.inf), "j > i is what"),
    ("logits", lambda q, k: logits(q, k) + 1, "a constant too much"),
    ("logits", lambda q, k: q @ k.T / 4 + sparse.allowed_pairs(6, True).float() * -torch.inf, "Use masked_fill"),
    ("logits", lambda q, k: logits(q, k)[0], "the shape is"),
    ("logits", lambda q, k: (q @ k.T / 4).masked_fill(~torch.ones(6, 6).tril(-1).bool(), -torch.inf), "may read itself"),
    ("gate", lambda s, b, u: torch.bernoulli(torch.sigmoid(s + b)), "draw no other"),
    ("gate", lambda s, b, u: s + b - u.log() > 0, "noise is log"),
    ("gate", lambda s, b, u: s + b > 0, "no noise"),
    ("gate", lambda s, b, u: s + b + torch.logit(u) > 0, "other sign"),
    ("gate", lambda s, b, u: hard(s, 0.0, u), "forget b"),
    ("gate", lambda s, b, u: s + b + u > 0, "no logistic noise"),
    ("gate", lambda s, b, u: torch.sigmoid(s + b), "the gate itself is 0 or 1"),
    ("gate", soft, "soft"),
    ("gate", lambda s, b, u: 1 - hard(s, b, u), "exchanged"),
    ("straight_through", hard, "no gradient arrives"),
    ("straight_through", soft, "return the soft gate"),
    ("straight_through", lambda s, b, u: soft(s, b, u) + (hard(s, b, u) - soft(s, b, u)).detach() * 0.5, "gate of task 2"),
    ("straight_through", lambda s, b, u: (hard(s, b, u) + soft(s, b, u)) - soft(s, b, u).detach(), "Put brackets"),
    ("straight_through", lambda s, b, u: hard(s, b, u) + (soft(s, b, u) - soft(s, b, u)), "let gradients flow through the hard gate"),
    ("straight_through", lambda s, b, u: hard(s, b, u) + (torch.sigmoid(s + b) - torch.sigmoid(s + b).detach()), "no noise"),
    ("straight_through", lambda s, b, u: hard(s, b, u) + (s - s.detach()), "with slope 1"),
    ("straight_through", lambda s, b, u: hard(s, b, u) + (soft(s, 0.0, u) - soft(s, 0.0, u).detach()), "forget b in the soft"),
    ("straight_through", lambda s, b, u: hard(s, b, u) + (soft(s, b, 1 - u) - soft(s, b, 1 - u).detach()), "the other sign"),
    ("straight_through", lambda s, b, u: hard(s, b, u) + (soft(s, b, u).detach() - soft(s, b, u)), "sign"),
    ("head", lambda q, k, v, b, u: ((logits(q, k) + b - torch.logit(u) > 0).float() * logits(q, k).softmax(-1)) @ v, "its gradient to q is not"),
    ("logits", lambda q, k: (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(torch.ones(len(q), len(q)).tril().bool(), -torch.inf), "masked the pairs"),
    ("head", renormalised, "renormalise after the gate"),
    ("head", lambda *x: logits(*x[:2]).masked_fill(weights(*x)[0] == 0, -torch.inf).softmax(-1) @ x[2], "renormalise after the gate"),
    ("head", lambda *x: weights(*x)[0] @ x[2], "where is the softmax"),
    ("head", lambda *x: weights(*x)[0] / weights(*x)[0].sum(-1, keepdim=True).clamp(min=1) @ x[2], "mean over open gates"),
    ("head", lambda *x: weights(*x)[1] @ x[2], "where is the gate"),
    ("head", lambda *x: (logits(*x[:2]).clamp(min=-1e9) * weights(*x)[0]).masked_fill(
        ~sparse.allowed_pairs(12, True), -torch.inf).softmax(-1) @ x[2], "after the softmax"),
    ("open_share", lambda s, b: torch.sigmoid(s + b).mean(), "is your mean over allowed pairs only"),
    ("open_share", lambda s, b: torch.sigmoid(s).sum() / count(s), "forget b"),
    ("open_share", lambda s, b: torch.sigmoid(s + b).sum(), "this is the sum"),
    ("open_share", lambda s, b: (s + b > 0).sum() / count(s), "average the gates"),
    ("penalty_slope", lambda s, b: slope(s, b) * count(s), "divide by the number"),
    ("penalty_slope", lambda s, b: slope(s, b) * count(s) / len(s) ** 2, "is your mean over allowed pairs only"),
    ("penalty_slope", lambda s, b: torch.sigmoid(s + b) / count(s), "not its slope"),
    ("penalty_slope", lambda s, b: -slope(s, b), "sign"),
    ("penalty_slope", lambda s, b: slope(s, 0), "forget b"),
    ("point_at", lambda lam: (3 * lam, 4 * lam), "divide by 1"),
    ("point_at", lambda lam: (3 / (1 + lam), 4 / (1 + lam)), "wrong term"),
    ("point_at", lambda lam: (3, 4), "C alone"),
    ("point_at", lambda lam: (1, 1), "the gradient at your point"),
    ("point_at", lambda lam: 3 * lam / (1 + lam), "the two coordinates"),
    ("loss", lambda E, C, lam: E + lam * C, "divide by 1 .* lambda"),
    ("loss", lambda E, C, lam: (lam * E + C) / (1 + lam), "not E"),
    ("loss", lambda E, C, lam: (E + lam * C) / lam, "divided by lambda"),
    ("error", lambda c, tau, width: -error(c, tau, width), "sign"),
    ("error", lambda c, tau, width: (c - tau) / width, "cut it off"),
    ("error", lambda c, tau, width: min(1, (c - tau) / width), "above only"),
    ("error", lambda c, tau, width: error(c, tau, 1), "divide by the width"),
    ("error", lambda c, tau, width: error(c, tau, tau), "divided by tau"),
    ("error", lambda c, tau, width: error(c, tau, 1 / width), "multiplied by the width"),
    ("error", lambda c, tau, width: error(c, tau, 1) / width, "cut off first"),
    ("update", controller(swap=True), "exchanged"),
    ("update", controller(average=False), "do not average"),
    ("update", controller(first=True), "not of one batch"),
    ("update", late, "the old c"),
    ("update", controller(sign=-1), "h goes down"),
    ("update", controller(cut=False), "cut h off"),
    ("update", controller(nu=0), "nu is missing"),
    ("update", lambda *x: update(x[0], x[1] or 0.0, *x[2:]), "begins at 0"),
    ("update", lambda *x: update(*x)[::-1], "return h, c"),
    ("multipliers", lambda: dict(bad=dict(nu=0.01, kp=0), good=dict(nu=0.01, kp=1)), "make nu larger"),
    ("multipliers", lambda: dict(bad=dict(nu=0.1, kp=0), good=dict(nu=0.1, kp=0.1)), "make kp larger"),
    ("multipliers", lambda: dict(bad=dict(nu=0.1, kp=0), good=dict(nu=0.1, kp=12)), "noise of single batches"),
    ("multipliers", lambda: dict(bad=dict(nu=0.1, kp=0), good=dict(nu=0.01, kp=1)), "the same nu"),
    ("multipliers", lambda: (0.1, 1), "return"),
    ("steps_back", lambda h, lam, nu: (h - lam) / nu, "take log"),
    ("steps_back", lambda h, lam, nu: (math.exp(h) - lam) / nu, "not lambda"),
    ("steps_back", lambda h, lam, nu: h / nu, "stops at lam"),
    ("steps_back", lambda h, lam, nu: 7, "GECO needs"),
    ("gates", from_s(lambda s, b: s > 0), "forget b"),
    ("gates", from_s(lambda s, b: (s + b > 0).mT), "exchanged"),
    ("gates", from_s(lambda s, b: s * 32**0.5 + b > 0), "sqrt"),
    ("gates", from_s(lambda s, b: (s + b > 0).tril()), "causal"),
    ("gates", from_s(lambda s, b: sparse.gates(s, b, torch.rand_like(s)) > 0), "these are drawn"),
    ("reads", lambda gates, l, i: gates[:, l].any(1)[:, :, i].double().mean(0), "exchanged"),
    ("reads", lambda gates, l, i: gates.any(2).double().mean((0, 1))[i], "all layers"),
    ("reads", lambda gates, l, i: gates[:, l].any(1)[:, i].double().sum(0), "numbers of problems"),
    ("reads", lambda gates, l, i: gates[:, l, :, i].double().mean((0, 1)), "mean over heads"),
    ("reads", lambda gates, l, i: gates[:, l, :, i].double().sum(1).mean(0), "sum over heads"),
    ("reads", lambda gates, l, i: gates[:, l, 0, i].double().mean(0), "the first one alone"),
    ("reads", lambda gates, l, i: gates[:, l].all(1)[:, i].double().mean(0), "it should be in either"),
    ("carry", lambda: torch.arange(10000) // 100 % 10 + torch.arange(10000) % 10 > 10, "use > 10"),
    ("carry", lambda: torch.arange(10000) // 100 + torch.arange(10000) % 100 >= 100, "into the hundreds"),
    ("carry", lambda: torch.arange(10000) // 1000 + torch.arange(10000) // 10 % 10 >= 10, "tens digits"),
    ("carry", lambda: torch.arange(10000) // 10 % 10 + torch.arange(10000) % 10 >= 10, "number // 100"),
    ("carry", lambda: ~carry(), "with and without"),
    ("carry", lambda: carry().long(), "True or False"),
    ("carry_edge", lambda gates, carry: (0, 9, 0, True), "layer 0 reads digits"),
    ("carry_edge", lambda gates, carry: (1, 10, 9, True), "i and j exchanged"),
    ("carry_edge", lambda gates, carry: (1, 9, 9, True), "j is i itself"),
    ("carry_edge", lambda gates, carry: (1, 9, 10, False), "sign is not"),
    ("carry_edge", lambda gates, carry: (1, 8, 9, True), "open most often"),
    ("carry_edge", lambda gates, carry: (1, 8, 10, True), "open when there is none"),
    ("set_gate", lambda model, idx, *_: model(idx)[0], "no logit has changed"),
    ("set_gate", lambda model, idx, l, i, j, is_open: set_gate(model, idx, l, i, j, 1 - is_open), "this is the run with the gate"),
    ("set_gate", at_z(lambda *x: put(*x, scale=True)), "renormalise after the gate"),
    ("set_gate", at_z(lambda z, A, a, v, i, j, is_open: z[:, i].zero_()), "shut all that i reads"),
    ("set_gate", at_z(everywhere), "all positions"),
    ("set_gate", at_z(relative), "open in some problems already"),
    ("set_gate", at_z(unscaled), "not v_j"),
    ("right_pairs", pairs(previous=lambda i, j: j - i == 1), "exchanged"),
    ("right_pairs", pairs(previous=lambda i, j: j == i), "the token itself"),
    ("right_pairs", pairs(induction=lambda i, j, T: i - j == T // 2), "the same token"),
    ("right_pairs", pairs(induction=lambda i, j, T: i - j == T // 2 + 1), "one too far back"),
    ("right_pairs", pairs(induction=lambda i, j, T: i - j == T // 2 - 1), "no edge to j = 0"),
    ("right_pairs", pairs(induction=lambda i, j, T: (j - i == T // 2 - 1) & (i > 0)), "exchanged"),
    ("right_pairs", lambda T: dict(enumerate(right_pairs(T).values())), "return .*previous token"),
    ("table", lambda gates, pairs: table(gates, pairs) + torch.tensor([[0, 0], [0, 496]]), "over allowed pairs only"),
    ("table", counted(lambda t, gates: t * len(gates)), "take the mean"),
    ("table", counted(lambda t, gates: t.T), "exchanged"),
    ("table", counted(lambda t, gates: t / t.sum()), "shares"),
    ("fit", share, "share of right pairs that are open"),
    ("fit", lambda t: t[0, 0] / t[:, 0].sum().clamp(min=1e-9), "one lucky gate"),
    ("fit", lambda t: (t[0, 0] + t[1, 1]) / t.sum(), "shut and not right"),
    ("fit", lambda t: t[0, 0] / t.sum(), "divide by those"),
    ("two_heads", best(lambda t: t[:, 0].sum()), "the most open gates"),
    ("two_heads", best(lambda t: -fit(t)), "the best fit"),
    ("two_heads", lambda gates: dict(enumerate(two_heads(gates).values())), "return .*previous token"),
    ("two_heads", lambda gates: two_heads(induction()[1] > 0), "fits best"),
    ("two_heads", best(share), "a head that opens everything"),
    ("two_heads", best(lambda t: t[0, 0] / t[:, 0].sum().clamp(min=1e-9)), "one lucky gate"),
    ("two_heads", lambda gates: {role: [*at] for role, at in two_heads(gates).items()}, "a head is a tuple"),
    ("two_heads", lambda gates: dict(zip(("induction", "previous token"), two_heads(gates).values())), "roles are exchanged"),
    ("two_heads", lambda gates: {role: at[::-1] for role, at in two_heads(gates).items()}, "layer and head are exchanged"),
    ("silence", lambda model, idx, heads: model(idx)[0], "nothing has changed"),
    ("silence", at_taps("q", zero_head), "opened all gates"),
    ("silence", at_taps("z", lambda t, h: t.zero_()), "all heads of the layer"),
    ("silence", at_taps("z", zero_position), "silenced positions"),
    ("silence", lambda model, idx, heads: silence(model, idx, heads[-1:]), "only the last"),
    ("silence", lambda model, idx, heads: silence(model, idx, heads[:1]), "only the first"),
    ("silence", lambda model, idx, heads: silence(model, idx, [(h, l) for l, h in heads]), "layer and head are exchanged"),
    ("silence", lambda model, idx, heads: silence(model, idx, {(l, h) for l in range(4) for h in range(4)} - {*heads}), "all the others"),
    ("effects", lambda model, idx: share_right(model(idx)[0], idx) - effects(model, idx), "still right"),
    ("effects", lambda model, idx: -effects(model, idx), "sign"),
    ("effects", lambda model, idx: effects(model, idx).T, "a row is a layer"),
    ("effects", lambda _, idx: effects(model("copying_sparse"), idx), "use the model that is given"),
    ("effects", lambda model, idx: 1 - share_right(model(idx)[0], idx) + effects(model, idx), "not from 1"),
    ("effects", lambda model, idx: effects(model, idx) / share_right(model(idx)[0], idx), "take the difference"),
    ("effects", effect_of(lambda l, h, H: [divmod(n, H) for n in range(l * H + h + 1)]), "stay silent"),
    ("writes", matrix(lambda z, W, h, D: z[:, :, h] @ W[h * D:(h + 1) * D]), "rows of the matrix"),
    ("writes", matrix(lambda z, W, h, D: z.flatten(2) @ W.T), "all heads of the layer"),
    ("writes", lambda model, run, l, h: writes(model, run, l, h) + model.h[l].attn.c_proj.bias, "add the bias"),
    ("writes", matrix(lambda z, W, h, D: z[:, :, h] @ W[:, :D].T), "first head"),
    ("writes", matrix(lambda z, W, h, D: z[:, :, h] @ W[:, h::z.shape[2]].T), "its own column"),
    ("gradient", lambda model, idx, metric: gradient(model, idx, metric) / len(idx), "mean over prompts"),
    ("gradient", lambda model, idx, metric: -gradient(model, idx, metric), "sign"),
    ("gradient", lambda model, idx, metric: gradients(model, idx, metric, ["h3.mlp.in"])[0]["h3.mlp.in"], "the last MLP"),
    ("score", lambda change, slope: (change * slope).sum(), "sum over prompts"),
    ("score", lambda change, slope: (change * slope).mean(), "tokens and width"),
    ("score", lambda change, slope: (change * slope).sum(-1).mean(), "mean over tokens, too"),
    ("score", lambda change, slope: -(change * slope).sum() / len(change), "sign"),
    ("score", lambda change, slope: (change * slope).abs().sum() / len(change), "absolute values"),
    ("exact", lambda *x: -exact(*x), "sign"),
    ("exact", lambda model, run, change, metric: metric(model.lm_head(model.ln_f(run["final"] + change))).mean(), "subtract M"),
    ("exact", whole_node, "only the logits should"),
    ("exact", lambda model, run, change, metric: (change * gradient(model, induction()[0], metric)).sum() / len(change), "attribution score"),
    ("exact", lambda model, run, change, metric: (metric(model.lm_head(run["final"] + change)) - metric(
        model.lm_head(model.ln_f(run["final"])))).mean(), "where is the norm"),
    ("exact", lambda model, run, change, metric: (metric(model.lm_head(run["final"] + change)) - metric(
        model.lm_head(run["final"]))).mean(), "where is the norm"),
    ("exact", lambda *x: exact(*x) * 4, "sum over prompts"),
    ("most_missed", lambda s, e, edges: most_missed(s, e, edges | True), "stay with the edges"),
    ("most_missed", lambda s, e, edges: most_missed(0 * s, e, edges), "largest effect"),
    ("most_missed", lambda s, e, edges: divmod((s - e).where(edges, -torch.inf).argmax().item(), s.shape[1]), "absolute"),
    ("most_missed", lambda s, e, edges: most_missed(s, 0 * e, edges), "largest score"),
    ("most_missed", lambda s, e, edges: divmod((e - s).where(edges, -torch.inf).argmax().item(), 3), "absolute difference"),
    ("most_missed", lambda s, e, edges: divmod((e - s).abs().where(edges, torch.inf).argmin().item(), 3), "differ least"),
    ("most_missed", lambda s, e, edges: most_missed(s, e, edges) if s.shape == (2, 3) else divmod(
        (s - e).abs().where(edges, -1).flatten().topk(10).indices[9].item(), 9), "elsewhere by"),
    ("strongest", lambda scores, edges, n: strongest(scores, edges, n + 1) & ~strongest(scores, edges, 1), "larger .score. than one inside"),
    ("strongest", topk(lambda scores, edges: only(edges, scores)), "forget the absolute value"),
    ("strongest", topk(lambda scores, edges: only(edges, -scores)), "forget the absolute value"),
    ("strongest", topk(lambda scores, edges: only(edges, -scores.abs())), "weakest"),
    ("strongest", lambda scores, edges, n: strongest(scores, edges, n + 1), "it should be"),
    ("strongest", lambda scores, edges, n: scores, "return bool"),
    ("strongest", topk(lambda scores, edges: scores.where(~edges, -torch.inf)), "are no edges"),
]


@pytest.mark.parametrize("name, wrong, says", WRONG, ids=[f"{name}: {says}" for name, _, says in WRONG])
def test_a_check_names_the_mistake(name, wrong, says):
    with pytest.raises(checks.NotYet) as found:
        getattr(checks, name)(wrong, *ARGUMENTS.get(name, tuple)())
    assert re.match(rf"task \d, {name}\(\) in .*, line \d+, not yet: ", str(found.value)) and re.search(says, str(found.value))


def no_return(ends):
    def wrong(model, *_):
        def tap(name, t):
            if name.endswith(ends):
                return t
        return model(induction()[0] if model.config.causal else torch.zeros(1, 11, dtype=torch.long), tap=tap)[0]
    return wrong


STOPS = [  # (check, code that stops, or returns what is no answer, what the message must say)
    ("update", lambda h, c, C, tau, width, nu, ema, *_: (h, ema * c + (1 - ema) * C), "c is None at the very first step"),
    ("gates", no_return("q"), "does your tap return the tensor"),
    ("set_gate", no_return("q"), "does your tap return the tensor"),
    ("silence", no_return("z"), "does your tap return the tensor"),
    ("silence", lambda model, idx, heads: model(idx).argmax(-1), r"take \[0\]"),
    ("effects", lambda model, idx: share_right(model(idx), idx), r"take \[0\]"),
    ("gradient", lambda model, idx, metric: metric(model(idx)), r"take \[0\]"),
    ("gradient", lambda model, idx, metric: torch.autograd.grad(metric(model(idx)[0]).sum(), torch.zeros(1)), "return that copy"),
    ("head", lambda q, k, v, b, u: q @ k @ v, "stops at `.*q @ k @ v.* .RuntimeError"),
    ("update", lambda h, c: (h, c), "can not be called as its docstring says"),
    ("table", lambda gates, pairs: [["many", "few"]], "the docstring's ->"),
    ("score", lambda change, slope: (change * slope).sum((1, 2)), "the docstring's ->"),
    ("strongest", lambda scores, edges, n: [0] * n, "the docstring's ->"),
]


@pytest.mark.parametrize("name, wrong, says", STOPS, ids=[f"{name}: {says}" for name, _, says in STOPS])
def test_code_that_stops_is_one_line_with_its_place(name, wrong, says):
    with pytest.raises(checks.NotYet) as found:
        getattr(checks, name)(wrong, *ARGUMENTS.get(name, tuple)())
    said = str(found.value)
    assert re.match(rf"task \d, {name}\(\) in .*, line \d+, ", said) and re.search(says, said) and "\n" not in said


def test_every_check_has_a_mistake():
    assert {name for solutions in SOLUTIONS.values() for name in solutions} == {name for name, *_ in WRONG}


def test_every_message_of_a_check_has_its_mistake():
    """Those of assert and raise, and the keys of the tables of mistakes."""
    def text(node):
        return " ".join(n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))

    shown, count = {}, 0
    for name, _, says in WRONG:
        shown.setdefault(name, []).append(says)
    for function in ast.parse(pathlib.Path(checks.__file__).read_text()).body:
        for node in ast.walk(function) if function.__class__ is ast.FunctionDef and function.name in shown else ():
            said = [node.msg] if isinstance(node, ast.Assert) else [node.exc] if isinstance(node, ast.Raise) else (
                node.keys if isinstance(node, ast.Dict) and node not in ast.walk(function.decorator_list[0]) else [])
            for message in (text(part) for part in said if part is not None):
                if message.count(" ") > 2:  # no names
                    count += 1
                    assert any(re.search(says, message) for says in shown[function.name]), (function.name, message)
    assert count > 130


def test_an_edge_that_is_open_without_a_carry_is_an_answer_too(capsys):
    gates = adder()
    gates[:, 1, 0, 9, 10] = ~carry()
    checks.carry_edge(lambda gates, carry: (1, 9, 10, False), gates)
    checks.carry_edge(carry_edge, gates)
    assert capsys.readouterr().out.count("ok") == 2


def test_the_small_models_are_made_from_finished_runs(tmp_path, capsys):
    random = {"dense": Config(11, 13, 2, 1, n_embd=16, causal=False, tied_head=False),
              "copying": Config(128, 257, 1, 2, n_embd=16, position="rope", sparse=True, gate_bias=2.0)}
    models = {name: Transformer(config) for name, config in random.items()}
    for name, path in (("dense", "dense.pt"), ("dense", "sparse.pt"), ("copying", "best.pt"), ("copying", "dense/last.pt")):
        os.makedirs((tmp_path / path).parent, exist_ok=True)
        models[name].save_checkpoint(str(tmp_path / path))
    make_models.main(make_models.Flags(str(tmp_path), str(tmp_path), str(tmp_path / "small")))
    assert capsys.readouterr().out.count("open gates change") == 4
    small = Transformer.from_pretrained(str(tmp_path / "small/copying_sparse.pt"))
    assert small.config == random["copying"]
    for name, t in models["copying"].state_dict().items():
        assert torch.equal(small.state_dict()[name], t.half().float()), name


def test_the_page_names_the_edges_of_the_addition_model_here():
    found = evaluate(model("addition_sparse"), *problems())
    assert f"| addition (toy of one wave, {found.open_edges:.2f} edges), 100 prompts |" in (ROOT / "RESULTS.md").read_text()
