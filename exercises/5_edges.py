# %% [markdown]
# # 5. Edges between heads: attribution, the exact effect, and a circuit
#
# **Goal:** compute one attribution score by hand, compare it with the exact effect, find where it
# is blind, and cut a circuit out of the model.
# **About 45 minutes. Difficulty 5 of 5.** You need exercise 4 and what a gradient is.
#
# All that heads and MLPs write is *added* to one vector a token, the *residual stream*, and all
# that they read comes from it. So a model is a graph: *sources* write (the embedding `input`, heads
# `a1.h0`, MLPs `m2`), *destinations* read (a head's query, key and value `a2.h1<q>`, `a2.h1<k>`,
# `a2.h1<v>`, an MLP `m3`, the `logits`), and an *edge* u -> v is what v reads of what u wrote. (In
# exercises 1 to 4 edges were between tokens.)
#
# The question: which edges does copying need? Each *clean* prompt, 16 characters and the same
# again, has a *corrupt* partner with other characters in the first half, where there is nothing to
# copy. The *metric* M is the logit of the right character minus the mean of all others: high on
# clean prompts. To *patch* an edge: run the clean prompt, but let v alone read of u what u writes
# on the corrupt prompt. The change of M is the edge's *exact effect*.
#
# The solution is in `patching.py` and `plumbing/curves.py`; look at them afterwards.

# %%
import pathlib
import sys

# where the repository's modules are, for a script and for a notebook in this folder
sys.path.insert(0, str(pathlib.Path(globals().get("__file__", "here")).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch

from exercises import checks
from patching import Graph, ablated, attention_maps, edge_attribution, exact_edges, patch_edges, record
from plumbing import tasks, tokens
from plumbing.curves import circuit, first_above
from plumbing.copying import find_heads

model = checks.load("copying_sparse")
task = tasks.make("induction", tokens.Bytes(), 8)
clean, corrupt, metric = task.clean, task.corrupt, task.metric  # (8, 32), (8, 32), logits -> (8,)
graph = Graph(model.config)
full, empty = metric(model(clean)[0]), metric(model(corrupt)[0])
heads = find_heads(attention_maps(model, clean))
previous, induction = ("a{}.h{}".format(*heads[role]) for role in ("previous token", "induction"))
print(f"{len(graph.sources)} sources, {len(graph.destinations)} destinations, {len(graph)} edges")
print(f"M {full.mean():.2f} on clean prompts, {empty.mean():.2f} on corrupt ones")
print(f"most weight on the token before: {previous}; on what came next the last time: {induction}")
# this model has two induction heads: exercise 4 took the one with the best fit, here it is the one with most weight

# %% [markdown]
# ## Task 1: what a head writes
#
# Head h of layer l has read z (`h{l}.attn.z`, (N, T, heads, D)). It writes z through its part of
# the output matrix: `model.h[l].attn.c_proj.weight` is (C, heads * D), columns in the order of the
# heads, and y = W z. The matrix's bias belongs to no head.


# %%
def writes(model, run, l, h):
    """run: record(model, idx), {tap name: tensor} -> (N, T, C), what head h of layer l adds to the stream."""
    # about 3 lines
    ...


# %%
checks.writes(writes, model, clean)

# %% [markdown]
# ## Task 2: the gradient at a reader
#
# How would M change if the logits read a slightly different stream? What they read comes by at the
# tap `final`, (N, T, C). Its gradient: in the tap, put in a copy that asks for one
# (`t.detach().requires_grad_()`), and call `torch.autograd.grad`. Sum M over prompts first: they do
# not touch each other, so each row gets its own gradient.


# %%
def gradient(model, idx, metric):
    """-> dM/dx (N, T, C), where x is what the logits read."""
    # about 6 lines; metric(logits) is (N,)
    ...


# %%
checks.gradient(gradient, model, clean, metric)

# %% [markdown]
# ## Task 3: the attribution score
#
# If M were a straight line, its change would be the change of the input times the slope. *Edge
# attribution patching* pretends that it is one:
#
#     score(u -> v) = (what u writes on corrupt - what u writes on clean) . dM/dx_v
#
# summed over tokens and width, then the mean over prompts. One gradient gives the scores of all
# edges.


# %%
def score(change, slope):
    """change, slope (N, T, C) -> a number."""
    # about 1 line
    ...


# %%
checks.score(score, model, task)

# %% [markdown]
# ## Task 4: the exact effect
#
# For an edge into the logits one need not pretend: put the change in, and run what comes after
# `final`, which is `model.lm_head(model.ln_f(x))`.


# %%
def exact(model, run, change, metric):
    """run: record(model, clean); change (N, T, C) -> the mean change of M when only the logits read it."""
    # about 4 lines
    ...


# %%
checks.exact(exact, model, task)

# %%
runs = record(model, clean), record(model, corrupt)
slope = gradient(model, clean, metric)
print("edge             score    exact")
for l, h in sorted({*heads.values(), (3, 0), (3, 1)}):
    change = writes(model, runs[1], l, h) - writes(model, runs[0], l, h)
    print(f"a{l}.h{h} -> logits {score(change, slope):8.3f} {exact(model, runs[0], change, metric):8.3f}")

# %% [markdown]
# The score guesses from the slope at one point. A norm and a saturated answer bend the line: look
# at the edges from the heads of layer 3, their size and their sign.
#
# ## Task 5: where is attribution blind?
#
# Now the edges into the induction head's key and value, and into the logits, by this repository's
# functions. Which edge does attribution miss most? **Guess first:** which edge makes copying work,
# of all?

# %%
scores, _ = edge_attribution(model, clean, corrupt, metric)  # (sources, destinations)
few = Graph(model.config)  # a graph with some of the edges: exact effects take a run each
readers = [f"{induction}<k>", f"{induction}<v>", "logits"]
few.edges[:, [v for v, name in enumerate(graph.destinations) if name not in readers]] = False
effects = exact_edges(model, few, clean, corrupt, metric)  # 0 where there is no edge


# %%
def most_missed(scores, effects, edges):
    """scores, effects, edges (S, V) -> (u, v), the edge whose score is furthest from its exact effect."""
    # about 3 lines; only where edges is True
    ...


# %%
checks.most_missed(most_missed, scores, effects, few.edges)

# %%
u, v = most_missed(scores, effects, few.edges)
for source, reader in ((graph.sources[u], graph.destinations[v]), (previous, f"{induction}<k>")):
    edge = graph.sources.index(source), graph.column[reader]
    print(f"{source} -> {reader}: score {scores[edge]:.2f}, exact {effects[edge]:.2f}")
l, h = heads["induction"]
before, after = (attention_maps(model, idx)[:, l, h] > 0 for idx in (clean, corrupt))
right = torch.arange(32)[:, None] - torch.arange(32) == 15
right[15] = False
print(f"{induction}'s gates to the token after the last occurrence: {before[:, right].float().mean():.0%} open "
      f"on clean prompts, {after[:, right].float().mean():.0%} on corrupt ones")

# %% [markdown]
# **The surprise:** there are two kinds of blindness. Into the *logits* the score follows the slope of a
# norm and of an answer that is nearly certain, and both bend. The other one is the second line: the
# edge from the previous-token head to the induction
# head's *key* is the heart of the circuit, and its score is next to nothing. Why? First, the
# *gate*: with the corrupt key it shuts, and the head reads nothing. But a gate is a step: its slope
# is 0 on both sides, so a gradient does not see it flip. Second, the *softmax*: its weight is
# nearly 1, and there it is flat as well. A dense model has this second blindness, too.
#
# A cure for the second: take the gradient at several places between corrupt and clean, where the
# softmax is not flat, and average (*EAP-IG*, `ig_steps`). A cure for both: run the head that reads
# again, with the changed key (`plumbing/rerun.py`).
#
# ## Task 6: a circuit
#
# A *circuit* is a set of edges: only they carry what their sources write, all others carry what is
# written on corrupt prompts. Which n edges? Those with the largest |score|: an edge that lowers M
# is needed as well.


# %%
def strongest(scores, edges, n):
    """Scores (S, V), edges bool (S, V) -> bool (S, V), the n edges with the largest |score|."""
    # about 4 lines; topk() of the flattened scores
    ...


# %%
checks.strongest(strongest, graph, scores)

# %%
sizes = [1, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 100, 150, 200, 300, len(graph)]
instead = ablated(model, corrupt)  # what edges outside of the circuit carry
guided, _ = edge_attribution(model, clean, corrupt, metric, ig_steps=5)
explained = {}
for name, ranking in (("EAP", scores), ("EAP-IG", guided)):
    explained[name] = []
    for n in sizes:
        M = metric(patch_edges(model, graph, clean, instead, strongest(ranking, graph.edges, n)))
        explained[name].append(((M - empty).mean() / (full - empty).mean()).item())
    n = first_above(sizes, explained[name])
    kept = circuit(graph, ranking.abs(), n)  # without edges that lead nowhere
    heart = ranking[graph.sources.index(previous), graph.column[f"{induction}<k>"]].abs()
    print(f"{name}: {n} edges of {len(graph)} explain 0.9 of the effect, {int(kept.sum())} of them on a way "
          f"from the input to the logits; {previous} -> {induction}<k> is number "
          f"{1 + int((ranking.abs() > heart).sum())}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
for reader, mark in zip(readers, "os^"):
    column = graph.column[reader]
    rows = few.edges[:, column]
    axes[0].scatter(effects[rows, column], scores[rows, column], marker=mark, label=f"read by {reader}")
    for u in rows.nonzero()[:, 0].tolist():
        if torch.maximum(effects[u, column].abs(), scores[u, column].abs()) > 1:
            axes[0].annotate(graph.sources[u], (effects[u, column], scores[u, column]), xytext=(5, 5),
                             textcoords="offset points")
low, high = effects.min().item(), effects.max().item()
axes[0].plot([low, high], [low, high], color="0.7", label="score = exact effect")
axes[0].set(title="one edge each", xlabel="exact effect on M", ylabel="attribution score")
for name, values in explained.items():
    axes[1].semilogx(sizes, values, "o-", markersize=4, label=f"ranked by {name}")
axes[1].axhline(0.9, color="0.7", linestyle=":", label="0.9 of the effect")
axes[1].set(title="circuits", xlabel="edges kept", ylabel="explained effect: 0 corrupt, 1 clean")
for axis in axes:
    axis.legend()
checks.picture(figure, "5_edges.png")

# %% [markdown]
# ## Two questions without an answer key
#
# 1. Averaging gradients between corrupt and clean cures the flat softmax. Does it cure the gate?
#    What would a score look like that sees a gate flip, and what would it cost?
# 2. One can count the edges that hold 0.9 of the scores, or those that explain 0.9 of the effect,
#    with this ranking or that one. The numbers differ by a lot. Which would you put into a paper,
#    and what could a reader wrongly conclude from each?
