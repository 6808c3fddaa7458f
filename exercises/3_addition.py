# %% [markdown]
# # 3. Two-digit addition: find the carry
#
# **Goal:** read an algorithm off the gates of a small model, find the one edge that says "carry",
# and prove it by shutting and opening it.
# **About 45 minutes. Difficulty 3 of 5.** You need exercise 1.
#
#     reads     3 6 + 2 8 = ? ? ? ? ?        11 tokens, a character each; every token may read all others
#     answers               0 0 0 6 4        at the five question marks, all at once
#
# There are two models of the same shape, two layers of one head: `dense`, ordinary attention, and
# `sparse`, the same weights trained on with gates, until few edges were left (`addition_toy.py`, of
# one wave; its default of five leaves a simpler circuit).
# Gates here are *deterministic*: open where s + b > 0, no noise.
#
# The solution is in `addition_toy.py` (task 1), `plumbing/addition.py` and `patching.py`; look at
# them afterwards.

# %%
import pathlib
import sys

# where the repository's modules are, for a script and for a notebook in this folder
sys.path.insert(0, str(pathlib.Path(globals().get("__file__", "here")).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch

from addition_toy import evaluate, problems
from exercises import checks
from patching import record
from plumbing.addition import NAMES

sparse, dense = checks.load("addition_sparse"), checks.load("addition_dense")
idx, targets = problems()  # (10000, 11) tokens; problem number 100 x + y is x + y
sums = torch.arange(10000) // 100 + torch.arange(10000) % 100
print("positions:", ", ".join(f"{i} {name}" for i, name in enumerate(NAMES)))

# %% [markdown]
# ## Task 1: read the gates
#
# A *tap* sees everything that flows in a model: `model(idx, tap=tap)` calls tap(name, tensor) at
# each place and goes on with what it returns. The queries of layer l come by as `h0.attn.q`,
# `h1.attn.q`, ..., the keys as `h0.attn.k`, ..., each (N, T, heads, D). The constant b is
# `model.config.gate_bias`.


# %%
def gates(model, idx):
    """idx (N, 11) -> bool (N, layers, heads, 11, 11), [..., i, j]: is the gate from j to i open?"""
    # about 8 lines: a tap that keeps q and k, the run, then s of each layer, and where s + b > 0
    ...


# %%
checks.gates(gates, sparse)

# %%
found = evaluate(sparse, idx, targets)  # answers, gates and more, of all 10,000 problems
print(f"right: {found.exact:.2%}; of {found.gates[0].numel()} edges {found.open_edges:.2f} are open in a problem")

# %% [markdown]
# ## Task 2: who reads whom
#
# A gate is open in some problems and shut in others. In what share of them?


# %%
def reads(gates, l, i):
    """Gates (N, layers, heads, 11, 11) -> (11,): the share of problems in which i reads each j in layer l.

    With more than one head: in which any head does.
    """
    # about 1 line
    ...


# %%
checks.reads(reads, found.gates)

# %%
for l in range(2):
    for i in range(11):
        shares = reads(found.gates, l, i)
        if shares.max() >= 0.005:
            print(f"layer {l}: {NAMES[i]:9} reads", ", ".join(
                f"{NAMES[j]} {shares[j]:.0%}" for j in shares.argsort(descending=True) if shares[j] >= 0.005))

# %% [markdown]
# Read it as an algorithm. Which reads bring the two digits of a column together? Which reads are
# open in only some problems, and in which ones? An edge that opens *depending on the problem*
# carries information by being open: the gate itself is a computation.
#
# ## Task 3: the carry
#
# 36 + 28: the units, 6 + 8, give 4 and *carry* a 1 to the tens. In which of the 10,000 problems do
# they?


# %%
def carry():
    """-> bool (10000,): do the units of problem 100 x + y carry a 1 to the tens?"""
    # about 2 lines
    ...


# %%
checks.carry(carry)

# %% [markdown]
# ## Task 4: the edge that knows it
#
# Layer 0 brings the digits together; the carry can be read above it. Search layer 1 for the edge
# i <- j that knows the carry best, where i is the tens (9) or the hundreds (8) and j another
# position. An edge that is open exactly when there is *no* carry knows it just as well.


# %%
def carry_edge(gates, carry):
    """-> (l, i, j, sign): in layer l >= 1 the gate from j to i agrees with the carry in most problems.

    sign: True if open means carry, False if open means none.
    """
    # about 6 lines
    ...


# %%
checks.carry_edge(carry_edge, found.gates)

# %%
has_carry = carry()
l, i, j, sign = carry_edge(found.gates, has_carry)
is_open = found.gates[:, l].any(1)[:, i, j]
with_carry, without = (is_open[rows].float().mean() for rows in (has_carry, ~has_carry))
print(f"layer {l}: {NAMES[i]} <- {NAMES[j]}, open in {with_carry:.1%} of the problems with a carry "
      f"and in {without:.1%} of the others")

# %% [markdown]
# ## Task 5: lie to the model
#
# So far it is a correlation. Now change nothing but this gate, and see whether the sum changes.
# What head h at position i has read is z_i = sum_j A_ij a_ij v_j, and it comes by at the tap
# `h{l}.attn.z` (N, T, heads, D), just after q, k and v. Setting A_ij by hand changes one term of the
# sum, at one position, and nothing else.


# %%
def set_gate(model, idx, l, i, j, is_open):
    """Logits (N, 11, 13) of a run in which the gate from j to i in layer l (head 0) is open or shut.

    is_open: 1.0 or 0.0, the same for all N problems; a is the softmax over all 11 keys, gates or not.
    """
    # about 10 lines: keep q, k and v in the tap; at z, change z[:, i, 0] and return it
    ...


# %%
checks.set_gate(set_gate, sparse, l, i, j)

# %% [markdown]
# **Predict first:** in which state does your edge say "carry" (`sign` of task 4)? What will the model
# answer to 36 + 28 and to 31 + 25 when the edge is always shut, and what when it is always open?

# %%
some = torch.arange(0, 10000, 7)  # every seventh problem


def answers(logits):
    """Logits (N, 11, 13) -> the five digits as a number (N,)."""
    return (logits[:, 6:, :10].argmax(-1) * 10 ** torch.arange(4, -1, -1)).sum(-1)


off = {}  # answer minus sum
for what, state in (("as it is", None), ("always shut", 0.0), ("always open", 1.0)):
    logits = sparse(idx[some])[0] if state is None else set_gate(sparse, idx[some], l, i, j, state)
    off[what] = answers(logits) - sums[some]
    for name, rows in (("with a carry", has_carry[some]), ("without", ~has_carry[some])):
        values, counts = off[what][rows].unique(return_counts=True)
        most = counts.argsort(descending=True)[:4].tolist()
        print(f"{what:12} {name:13}", ", ".join(f"{values[n]:+d}: {counts[n] / rows.sum():.0%}" for n in most))
    two = idx[[3628, 3125]]
    two = sparse(two)[0] if state is None else set_gate(sparse, two, l, i, j, state)
    print(f"{what:12} 36 + 28 = {answers(two)[0]}, 31 + 25 = {answers(two)[1]}")

# %% [markdown]
# The numbers are answer minus sum: +0 is right, -10 is "forgot the carry", +10 is "saw one that is
# not there". Where the tens turn over, from 9 to 0 or back, and the hundreds do not follow, the same two
# mistakes are +90 and -90. What does shutting do? Before, it was a correlation; now you know that the
# answer needs this edge.
#
# And opening? If it does as much harm as shutting, the open gate itself is the message. If it does
# little, look at what the gate lets through: a_ij v_j.

# %%
seen = record(sparse, idx[some])
q, k, v = (seen[f"h{l}.attn.{x}"][:, :, 0] for x in "qkv")  # (N, 11, D)
a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, i, j]
for name, rows in (("with a carry", has_carry[some]), ("without", ~has_carry[some])):
    print(f"{name:13} mean a_ij {a[rows].mean():.3f}, mean length of v_j {v[rows, j].norm(dim=-1).mean():.2f}")

# %% [markdown]
# **The surprise:** an edge that tells a carry from none has three parts, and any of them can be the message.
# The *gate*: open or shut. The *weight* a_ij: gate and softmax share a logit, so where the gate is
# shut the weight is often low as well, and forcing the gate open lets less through. The *value*
# v_j: what j writes can itself be "carry" or "no carry", and then an edge opened by hand tells the
# truth, and does no harm.
#
# The picture. Left: the edge over the two units digits, sparse and dense; the carry is the triangle
# above the red line. The dense model adds just as well: can you see its carry in this attention
# weight?

# %%
figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
units = torch.arange(10000) // 100 % 10 * 10 + torch.arange(10000) % 10  # 10 x_units + y_units
dense_weight = evaluate(dense, idx[some], targets[some]).weights[:, l, 0, i, j]
for axis, values, rows, title, label in (
        (axes[0], is_open.float(), torch.arange(10000), "sparse: gate open", "share of the problems"),
        (axes[1], dense_weight, some, "dense: attention weight", "mean weight")):
    grid = torch.zeros(100).index_add_(0, units[rows], values) / torch.bincount(units[rows], minlength=100)
    shown = axis.imshow(grid.view(10, 10), origin="lower", cmap="Blues", vmin=0)
    axis.plot([9.5, 0], [0, 9.5], color="tab:red", linewidth=1)
    axis.set(title=f"{title}\n{NAMES[i]} <- {NAMES[j]}, layer {l}", xlabel="units of y", ylabel="units of x")
    figure.colorbar(shown, ax=axis, shrink=0.8, label=label)
for axis, name, rows in ((axes[2], "problems with a carry", has_carry[some]),
                         (axes[3], "problems without", ~has_carry[some])):
    for n, (what, errors) in enumerate(off.items()):
        values = [int((errors[rows] == value).sum()) for value in (-90, -10, 0, 10, 90)]
        values.append(int(rows.sum()) - sum(values))
        axis.bar([x + 0.27 * (n - 1) for x in range(6)], values, width=0.27, label=f"gate {what}")
    axis.set_xticks(range(6), ["-90", "-10", "right", "+10", "+90", "other"])
    axis.set(title=name, xlabel="answer minus sum", ylabel="problems")
    axis.margins(y=0.4)  # room for the legend
    axis.legend(loc="upper left")
checks.picture(figure, "3_addition.png")

# %% [markdown]
# ## Two questions without an answer key
#
# 1. 45 of 100 pairs of digits carry. Is it cheaper, counted in open edges, to have an edge that
#    opens with a carry or one that opens without? Which one did this model learn, and what could
#    have decided it?
# 2. Is the carry told by the gate, by the weight a_ij, or by the value v_j? Think of an experiment
#    that separates the three, such as values taken from another problem. Where does the carry come
#    from, in layer 0?
