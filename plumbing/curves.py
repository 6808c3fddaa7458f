"""How the effect grows with what is kept: curves, where they cross 0.9, and circuits as sets of edges.

Shapes: N prompts, S sources, V destinations, E edges in the order of graph.edges.nonzero().
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

FRACTIONS = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1)  # of the edges, where CPR is measured


def explained_effect(m, full, empty):
    """(m - empty) / (full - empty), of metrics (N,) a ratio of means and not a mean of ratios."""
    return ((m.mean() - empty.mean()) / (full.mean() - empty.mean())).item()


def first_above(sizes, effect, level=0.9):
    """The first of sizes from which effect stays at or above the level, as it does at the last."""
    return sizes[max((i + 1 for i, value in enumerate(effect[:-1]) if value < level), default=0)]


def between(sizes, effect, points=4):
    """Sizes between first_above and the one before it, evenly in the logarithm."""
    last = sizes.index(first_above(sizes, effect))
    if last == 0:
        return []
    inner = np.geomspace(max(1, sizes[last - 1]), sizes[last], points + 2).round().astype(int)
    return sorted({*inner.tolist()} - {*sizes})


def grid(total, per_decade):
    """Sizes from 1 to total, about per_decade in a factor of ten."""
    exponents = np.arange(0, np.log10(total), 1 / per_decade)
    return sorted({*(int(round(10**e)) for e in exponents), total})


@dataclass
class Curve:
    """The metric when only some heads or edges are left."""

    sizes: list  # how many are left
    metrics: torch.Tensor  # (len(sizes), N)
    full: torch.Tensor  # (N,) with all of them
    empty: torch.Tensor  # (N,) with none

    def effect(self, rows=slice(None)):
        """Explained effect at each size, over these prompts."""
        return [explained_effect(m[rows], self.full[rows], self.empty[rows]) for m in self.metrics]

    def needed(self, rows=slice(None)):
        return first_above(self.sizes, self.effect(rows))

    def quartiles(self):
        """Of each prompt's effect (2, len(sizes)); how many had a gap too small to divide by."""
        gap = self.full - self.empty
        wide = gap.abs() > 0.05 * gap.abs().mean()
        effects = ((self.metrics - self.empty) / gap)[:, wide]
        return effects.quantile(torch.tensor([0.25, 0.75]), dim=1), int((~wide).sum())


def trace(sizes, run, full, empty):
    """The Curve over sizes, and some more where it crosses 0.9; run(sizes) -> (len(sizes), N)."""
    curve = Curve(sizes, run(sizes), full, empty)
    if more := between(sizes, curve.effect()):
        metrics = torch.cat([curve.metrics, run(more)])[torch.tensor(sizes + more).argsort()]
        curve = Curve(sorted(sizes + more), metrics, full, empty)
    return curve


def cpr(effect):
    """(CPR, CMD) of explained effects at FRACTIONS of the edges: the areas of f and of |1 - f|."""
    f, x = np.asarray(effect, dtype=float), np.asarray(FRACTIONS)
    return float(np.trapezoid(f, x)), float(np.trapezoid(abs(1 - f), x))


def cumulative(scores):
    """Share of the sum of |scores| (..., E) that its n largest hold, n = 1 .. E; float64."""
    ordered = scores.abs().sort(-1, descending=True).values.double()
    return ordered.cumsum(-1) / ordered.sum(-1, keepdim=True).clamp(min=1e-300)


def holding(shares, level=0.9):
    """How many of the largest hold the level, of cumulative shares (E,)."""
    return int((shares < level).sum()) + 1


def rank_correlation(a, b):
    """Spearman's, of (E,) and (E,): equal values, such as the many zeros of shut gates, share their mean place."""
    places = []
    for values in (a, b):
        _, group, counts = values.unique(return_inverse=True, return_counts=True)
        places.append((counts.cumsum(0) - (counts - 1) / 2)[group])
    return torch.stack(places).double().corrcoef()[0, 1].item()


# -----------------------------------------------------------------------------
# circuits as sets of edges, bool (S, V)


def circuit(graph, value, n):
    """The n edges of largest value (S, V), pruned."""
    edges = torch.zeros_like(graph.edges)
    edges.view(-1)[value.where(graph.edges, -torch.inf).flatten().topk(n).indices] = True
    return prune(graph, edges)


def prune(graph, edges):
    """The edges that lie on a path from the input to the logits."""
    edges = edges & graph.edges
    reads = [[graph.column[name] for name in names] for names in graph.reads.values()]
    for u in range(1, len(reads)):  # a node that reads nothing writes nothing of its own
        edges[u] &= edges[:, reads[u]].any()
    useful = torch.arange(len(graph.destinations)) == graph.column["logits"]
    for u in reversed(range(len(reads))):  # what nobody reads is of no use
        edges[u] &= useful
        if edges[u].any():
            useful[reads[u]] = True
    return edges


def classes(graph, edges):
    """How many of the edges go from what to what: {"head to MLP": n, ...}."""
    kinds = {"i": "input", "a": "head", "m": "MLP", "l": "logits"}
    return dict(Counter(f"{kinds[graph.sources[u][0]]} to {kinds[graph.destinations[v][0]]}"
                        for u, v in edges.nonzero().tolist()))
