# %% [markdown]
# # 4. A model that copies: two heads, found from their gates
#
# **Goal:** find the two heads by which a language model copies, from open gates alone; then prove
# that they do it.
# **About 45 minutes. Difficulty 4 of 5.** You need exercise 1; exercise 3 for taps.
#
# A model that has seen `AB` and now sees `A` again should say `B`: *induction*. Two heads can do it
# together:
#
# - a *previous-token head* reads, at each token, the token before it, and writes down which one it
#   was;
# - an *induction head*, in a later layer, then looks from `A` for the token that says "before me
#   was A". That is the `B` of the first time, and this head copies it.
#
# The models are small byte models, 4 layers of 4 heads, trained by `python train.py --n-head 4
# --dense-steps 3000 --steps 3000 --gate-bias 2`: `dense`, and `sparse` with few open gates. (The
# README's model has 8 heads a layer, so its heads have other numbers.) The prompts: 16 random characters, then the same
# 16 again, so the *period* is 16.
#
# The solution is in `plumbing/copying.py`, that of `fit` in `checks.py`; look at them afterwards.

# %%
import pathlib
import sys

# where the repository's modules are, for a script and for a notebook in this folder
sys.path.insert(0, str(pathlib.Path(globals().get("__file__", "here")).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch

from exercises import checks
from patching import attention_maps
from plumbing import tasks, tokens

sparse, dense = checks.load("copying_sparse"), checks.load("copying_dense")
idx = tasks.make("induction", tokens.Bytes(), 16).clean  # (16, 32) tokens
maps = {"sparse": attention_maps(sparse, idx), "dense": attention_maps(dense, idx)}  # A a, (N, L, H, T, T)
gates = maps["sparse"] > 0  # [n, l, h, i, j]: in prompt n, layer l, head h: open from j to i?
T = idx.shape[1]

for name, model in (("dense", dense), ("sparse", sparse)):
    right = (model(idx)[0][:, 15:-1].argmax(-1) == idx[:, 16:])[:, 1:].float().mean()
    share = (maps[name] > 0).sum() / (maps[name][..., 0, 0].numel() * T * (T + 1) / 2)
    print(f"{name}: copies {right:.1%} of the tokens, {share:.2%} of the edges are open on these prompts")
print("a prompt:", tokens.Bytes().decode(idx[0].tolist()))

# %% [markdown]
# ## Task 1: which edges would they open?
#
# Before you look, write down where each head's gates should be, as bool (T, T): row i the reader
# (query), column j what is read (key). Put your finger on a prompt such as `ABCD ABCD`: standing on
# the second `A`, which token must the induction head read? It helps nothing to read the first `A`
# itself.


# %%
def right_pairs(T):
    """-> {"previous token": bool (T, T), "induction": bool (T, T)} for prompts of two equal halves."""
    # about 4 lines; begin with i, j = torch.arange(T)[:, None], torch.arange(T) and look at i - j.
    # The induction head can only look for what has come before: the first half has no such edge
    ...


# %%
checks.right_pairs(right_pairs)

# %% [markdown]
# ## Task 2: count
#
# For one head: how many pairs are open and right, shut and right, open and not right, shut and not
# right? Count allowed pairs only (j <= i), as a mean over prompts.


# %%
def table(gates, pairs):
    """One head's gates bool (N, T, T), pairs bool (T, T) -> 2 x 2 numbers a prompt:

    [[right and open, right and shut], [others open, others shut]]
    """
    # about 4 lines; torch.tensor([[...], [...]])
    ...


# %%
checks.table(table, maps["sparse"])

# %% [markdown]
# ## Task 3: how well does a head fit?
#
# The share of right pairs that are open is no good measure: a head that opens everything gets 1.
# The share of open pairs that are right is none either: one lucky gate gets 1. Use both at once: of
# all the pairs that are open or right, how many are open and right?


# %%
def fit(table):
    """The 2 x 2 numbers -> one number: 1 if exactly the right pairs are open, 0 if none of them is."""
    # about 2 lines
    ...


# %%
checks.fit(fit)

# %% [markdown]
# ## Task 4: find them


# %%
def two_heads(gates):
    """Gates (N, L, H, T, T) -> {"previous token": (l, h), "induction": (l, h)}, the best fit of all heads."""
    # about 5 lines; use right_pairs(), table() and fit()
    ...


# %%
checks.two_heads(two_heads, maps["sparse"])

# %%
heads = two_heads(gates)
for role, (l, h) in heads.items():
    pairs = right_pairs(T)[role]
    print(f"{role}: head {h} of layer {l}, fit {fit(table(gates[:, l, h], pairs)):.2f}")
    (a, b), (c, d) = table(gates[:, l, h], pairs).tolist()
    print(f"    right pairs: {a:5.1f} open, {b:5.1f} shut; others: {c:5.1f} open, {d:5.1f} shut")

# %% [markdown]
# ## Task 5: silence a head
#
# A head whose gates are all shut writes exactly nothing, so z, what it has read, is 0
# (`h{l}.attn.z`, (N, T, heads, D)). Silence any set of heads. Do not do it by setting q to 0: then
# s = 0, and s + b = b > 0 *opens all gates of the head*!


# %%
def silence(model, idx, heads):
    """heads: a list of (l, h) -> logits (N, T, vocab) of a run in which these heads write nothing."""
    # about 7 lines
    ...


# %%
checks.silence(silence, sparse)


# %%
def share_right(logits, idx):
    """The share of the second half that is foreseen, without its first token, which nothing foretells."""
    half = idx.shape[1] // 2
    return (logits[:, half:-1].argmax(-1) == idx[:, half + 1 :]).float().mean().item()


print("nothing silenced:", f"{share_right(sparse(idx)[0], idx):.1%}")
for role, head in heads.items():
    print(f"the {role} head silenced:", f"{share_right(silence(sparse, idx, [head]), idx):.1%}")
others = [(l, h) for l in range(4) for h in range(sparse.config.n_head) if (l, h) not in heads.values()]
print(f"the {len(others)} others silenced, all at once:", f"{share_right(silence(sparse, idx, others), idx):.1%}")

# %% [markdown]
# ## Task 6: looks like, and matters
#
# Now without looking at any map: by how much does copying suffer when one head alone is silenced?


# %%
def effects(model, idx):
    """-> (L, H): share_right as it is, minus share_right without that head."""
    # about 5 lines; use silence() and share_right()
    ...


# %%
checks.effects(effects, sparse, idx)

# %% [markdown]
# **Predict first:** in the dense model, which of these heads will you find by looking at the
# attention maps? How many put more than a tenth of their weight on the token before, and how many
# of those matter?

# %%
matters = {"dense": torch.as_tensor(effects(dense, idx)), "sparse": torch.as_tensor(effects(sparse, idx))}
looks = {}  # of each head: the weight that a right pair gets, of both roles the larger
for name in matters:
    weight = {role: maps[name][..., pairs].mean((0, -1)) for role, pairs in right_pairs(T).items()}
    looks[name] = torch.maximum(*weight.values())
    suspects = weight["previous token"] > 0.1
    convicted = suspects & (matters[name] > 0.1)
    print(f"{name}: heads with more than a tenth of their weight on the token before: {int(suspects.sum())}; "
          f"of these, copying loses more than 10 points without one of them: {int(convicted.sum())}")
is_open = torch.stack([gates[..., pairs].float().mean((0, -1)) for pairs in right_pairs(T).values()])
print("sparse: open in more than 90% of the right pairs, previous token and induction:",
      ", ".join(str(n) for n in (is_open > 0.9).sum((1, 2)).tolist()), "heads")

# %% [markdown]
# A map shows where a head looks, not whether anybody needs it. In the dense model every map shows
# something, and most of it does not matter for copying. Even an open gate is only a *may*: it can
# let through a weight near 0. Gates make the list of suspects short. Does silencing one head at a
# time convict them? Silence all heads that are open where the induction head should be:

# %%
team = [(l, h) for l, h in (is_open[1] > 0.9).nonzero().tolist()]
for heads_of_team in [[head] for head in team] + [team]:
    print(f"silenced: {', '.join(f'head {h} of layer {l}' for l, h in heads_of_team):34}",
          f"copies {share_right(silence(sparse, idx, heads_of_team), idx):.1%}")

# %% [markdown]
# **The surprise:** where two heads do the same work, one stands in for the other. Silence either and
# little is lost; silence both and copying is gone. One head at a time can acquit a guilty pair.

# %%
figure, axes = plt.subplots(2, 3, figsize=(12, 8), layout="constrained")
for row, name in zip(axes, ("dense", "sparse")):
    for axis, (role, (l, h)) in zip(row, heads.items()):
        axis.imshow(maps[name][0, l, h], cmap="Blues", vmin=0, vmax=1)
        axis.set(title=f"{name}, layer {l}, head {h}\n({role} in sparse)", xlabel="key j", ylabel="query i")
    row[2].scatter(looks[name].flatten(), matters[name].flatten(), color="tab:blue", zorder=2)
    marked = (looks[name] > 0.3) | (matters[name].abs() > 0.1)
    y = -1.0
    for m, x, l, h in sorted((matters[name][l, h].item(), looks[name][l, h].item(), l, h) for l, h in marked.nonzero().tolist()):
        y = max(m, y + 0.09)  # the names one above the other, each with a line to its point
        row[2].annotate(f"a{l}.h{h}", (x, m), (1.15, y), va="center", arrowprops={"arrowstyle": "-", "color": "0.7"})
    row[2].set(title=f"{name}: every head (a3.h0: layer 3, head 0)", xlabel="looks like it: mean weight on the right pairs",
               ylabel="matters: copying lost without it", xlim=(-0.05, 1.35), ylim=(-0.15, 1.1))
    row[2].grid(color="0.9")
checks.picture(figure, "4_copying.png")

# %% [markdown]
# ## Two questions without an answer key
#
# 1. Could one layer copy, with as many heads as you like? What does the induction head need that
#    must have been written by an earlier layer?
# 2. You have shown which heads copying needs, and how well the model copies with two of them alone
#    (all others silenced). What do the other heads do? Which experiment could still prove your
#    story wrong?
