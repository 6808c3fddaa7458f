# %% [markdown]
# # 1. The gate
#
# **Goal:** build one gated attention head yourself, and know why every line is as it is.
# **About 45 minutes. Difficulty 1 of 5.** You need softmax, gradients and some PyTorch.
#
# In *attention* token i reads from tokens j: it takes a weighted sum of their *values* v_j. In a
# dense model every token reads from every one before it, at least a little, so a picture of the
# weights says little about what is needed. Here every pair (i, j), an *edge*, has a *gate* A_ij
# which is 0 or 1: open or shut. What is shut is not read at all. For one head, with queries q, keys
# k and one constant b:
#
#     s_ij = q_i . k_j / sqrt(D)             the logit, for softmax and gate alike
#     a_ij = softmax_j(s_ij)                 over all allowed keys, gates or not
#     A_ij = 1 with probability sigmoid(s_ij + b), else 0
#     y_i  = sum_j A_ij a_ij v_j             what token i has read
#
# Each task below is a function to fill in. Run the cell with the check after each. As a script,
# `python exercises/1_gate.py` stops at the first task that is not done. The solution of tasks 1 to
# 5 is in `sparse.py`, that of task 6 in `checks.py`; look at them afterwards.

# %%
import pathlib
import sys

# where the repository's modules are, for a script and for a notebook in this folder
sys.path.insert(0, str(pathlib.Path(globals().get("__file__", "here")).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch

from exercises import checks
from sparse import gate_map

# %% [markdown]
# ## Task 1: logits
#
# One head, T tokens, D numbers a query or key. The model is *causal*: token i may read token j only
# if j <= i. Such pairs are called *allowed*. All other logits are minus infinity, so that softmax
# gives them no weight, and no gate opens there.


# %%
def logits(q, k):
    """q, k (T, D) -> s (T, T), row i: the query's token, column j: the key's; -inf where j > i."""
    # about 3 lines; tril() and masked_fill() help
    ...


# %%
checks.logits(logits)

# %% [markdown]
# ## Task 2: a gate that is drawn
#
# How does one draw a 0 or 1 so that 1 has the probability sigmoid(s + b)? Draw u evenly from 0 to 1
# and turn it into *logistic noise* n = -logit(u), where logit(u) = log(u / (1 - u)), `torch.logit`.
# The gate is 1 where s + b + n > 0. (Why does that have the right probability? s + b > logit(u)
# says the same as sigmoid(s + b) > u, and u is below p with probability p.)


# %%
def gate(s, b, u):
    """Logits s, constant b, u evenly drawn from (0, 1) and of s's shape -> 1.0 where open, else 0.0."""
    # about 2 lines
    ...


# %%
checks.gate(gate)

# %% [markdown]
# Does it open as often as it should? And a surprise: neural networks are often trained in
# *bfloat16*, a number format with 8 significant bits. What if the noise is drawn in it? **Guess
# first:** what happens to a gate at s + b = -20, which should open once in 500 million times?

# %%
torch.manual_seed(0)
places = [-20.0, -8.0, -6.0, -4.0, -2.0, 0.0, 2.0]
measured = {}
for dtype in (torch.float32, torch.bfloat16):
    drawn = [gate(torch.tensor(x, dtype=dtype), 0.0, torch.rand(1_000_000, dtype=dtype)) for x in places]
    measured[dtype] = [A.float().mean().item() for A in drawn]
print("s + b   expected   float32    bfloat16    (share of open gates, of a million)")
for n, x in enumerate(places):
    print(f"{x:5.0f}   {torch.sigmoid(torch.tensor(x)):.6f}",
          *(f"  {shares[n]:.6f}" for shares in measured.values()))

# %% [markdown]
# In bfloat16 the largest number below 1 is 0.996. What would round to 1 comes out of torch.rand as 0,
# once in 500 draws: then n is infinite, and the gate opens wherever it stands. If you cut u off at
# 1/256 instead, the gate at -6 never opens. Rare events need fine numbers, so `sparse.py` computes
# gates and noise in float32, whatever the model is in.
#
# ## Task 3: a gradient for a step
#
# Training needs to know: should this logit be higher or lower? But a step is flat, its slope is 0
# almost everywhere. The *straight-through* trick: forward use the step, backward pretend that it
# was the *soft gate* sigmoid(s + b + n). In PyTorch: add something that is 0 but has the soft
# gate's gradient. (`x.detach()` is x without its gradient.)


# %%
def straight_through(s, b, u):
    """As gate(), exactly 0.0 or 1.0, but with the gradient of sigmoid(s + b + n)."""
    # about 3 lines
    ...


# %%
checks.straight_through(straight_through)

# %% [markdown]
# ## Task 4: the head
#
# Put it together. What happens in a row whose gates are all shut? Decide before you run the check.


# %%
def head(q, k, v, b, u):
    """q, k, v (T, D), u (T, T) -> y (T, D), as in the equations above, with gates that have a gradient."""
    # about 4 lines; use logits() and straight_through()
    ...


# %%
checks.head(head)

# %%
torch.manual_seed(1)
q, k, v = torch.randn(3, 8, 16)
u = torch.rand(8, 8)
b = -1.0
drawn = gate(logits(q, k), b, u)
print("token   open gates   length of y")
for i, y in enumerate(head(q, k, v, b, u)):
    print(f"{i:5} {int(drawn[i].sum()):10} {y.norm():13.3f}")

# %% [markdown]
# With all gates shut a token reads exactly nothing: y is 0.0. A dense head can not be silent: its
# weights sum to 1, so it always writes something, and dense models park attention on some token
# that says little. This is why the rows of A a are *not renormalised*, scaled up to sum to 1 again:
# an open gate would then change the weight of all others in its row, and a single open one would
# always count in full.
#
# ## Task 5: the penalty
#
# Training makes edges rare by a *penalty* E: the expected share of open edges, which is the mean of
# sigmoid(s + b). Mind what the mean is over: pairs that can never be open do not count.


# %%
def open_share(s, b):
    """s (T, T) from logits() -> E, a number: the mean probability over allowed pairs."""
    # about 2 lines
    ...


# %%
checks.open_share(open_share)

# %% [markdown]
# ## Task 6: what the penalty does to a logit
#
# Write down dE / ds_ij, by hand and without autograd. With p = sigmoid(x), dp/dx = p (1 - p).


# %%
def penalty_slope(s, b):
    """s (T, T) from logits() -> dE/ds (T, T), 0 where j > i."""
    # about 3 lines
    ...


# %%
checks.penalty_slope(penalty_slope)

# %% [markdown]
# The slope is largest where the gate is undecided and vanishes where it is wide open. How much
# longer does it take to shut a gate that begins at s + b = 8 than one that begins at 2? **Guess**,
# then look: logits that follow the penalty alone, x <- x - p (1 - p).

# %%
starts = [0.5, 2.0, 4.0, 6.0, 8.0]
x, paths = torch.tensor(starts), []
for step in range(4000):
    paths.append(x)
    x = x - torch.sigmoid(x) * (1 - torch.sigmoid(x))
paths = torch.stack(paths)  # (steps, starts)
steps_to_shut = (paths > 0).sum(0).tolist()
for start, steps in zip(starts, steps_to_shut):
    print(f"s + b = {start}: shut after {steps} steps")

# %% [markdown]
# The picture. The two on the left: the eight tokens' gates, as drawn and without noise (n = 0), as
# models are evaluated. Third: your measurement. Fourth: the penalty at work.

# %%
figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
without_noise = gate_map(q[None, None], k[None, None], b)[0, 0]
for axis, A, title in ((axes[0], drawn, "drawn"), (axes[1], without_noise, "s + b > 0")):
    axis.imshow(A.float() + torch.ones(8, 8).tril(), cmap="Blues", vmin=0, vmax=2)
    axis.set(title=f"gates, {title}\n(dark open, light shut, white not allowed)", xlabel="key j", ylabel="query i")
line = torch.linspace(-20, 2, 200)
axes[2].semilogy(line, torch.sigmoid(line), color="0.6", label="sigmoid(s + b)")
for (dtype, shares), mark in zip(measured.items(), "ox"):
    axes[2].semilogy(places, [share or 1e-9 for share in shares], mark, label=f"drawn in {str(dtype)[6:]}")
axes[2].set(title="how often a gate opens (never: 1e-9)", xlabel="s + b", ylabel="share of a million")
axes[2].legend()
for start, path in zip(starts, paths.T):
    axes[3].semilogx(range(1, 4001), path, label=f"{start:g}")
axes[3].axhline(0, color="black", linewidth=0.8)
axes[3].legend(title="begins at s + b =", loc="upper center", ncols=5, columnspacing=1, handlelength=1)
axes[3].set(title="a logit under the penalty alone\n(below 0 the gate is shut)", xlabel="steps", ylabel="s + b", ylim=(-4, 12))
checks.picture(figure, "1_gate.png")

# %% [markdown]
# ## Two questions without an answer key
#
# 1. Gate and softmax share one logit. Softmax does not mind a constant added to a whole row of s;
#    the gate does. What can a head say by such a constant? What can a head not do that has no gate
#    parameters of its own?
# 2. The straight-through gradient is not the gradient of anything. The soft gate could be made
#    steeper, sigmoid((s + b + n) / t) with a small t. What would get better, and what worse?
