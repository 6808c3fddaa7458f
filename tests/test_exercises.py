"""The exercises with their solutions put in, and each check on the mistake that it names."""

import ast
import math
import os
import pathlib
import subprocess
import sys

import matplotlib
import pytest
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import sparse
from addition_toy import evaluate
from exercises import checks
from geco import GECO
from patching import gradients, head_outputs
from plumbing import copying

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
    "5_edges": dict(writes=writes, gradient=lambda model, idx, metric: gradients(model, idx, metric, ["final"])[0]["final"],
                    score=lambda change, slope: (change * slope).sum() / len(change), exact=exact,
                    most_missed=most_missed, strongest=strongest),
}

# -----------------------------------------------------------------------------
# the files as they stand, and with the solutions


def fill(path, solutions):
    """The source, in which each function of `solutions` is taken from there."""
    lines = path.read_text().splitlines()
    for node in reversed(ast.parse(path.read_text()).body):
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
