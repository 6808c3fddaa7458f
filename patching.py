"""
Which heads and edges does a model need for a task? Dense beside sparse.

    python patching.py --dense BASE --sparse CHECKPOINT --task ioi --n 100 --out out/ioi
    python patching.py --dense BASE --sparse BASE --adapter FILE --task greater-than --fast

A circuit is a subgraph of the residual stream's graph: the embedding, every head and every MLP write
to it, and every head (by q, k and v), every MLP and the logits read from it. A prompt (clean) is run
beside one that has another answer (corrupt); an edge u -> v counts by what happens to the metric, which
asks for the clean answer, when v alone reads u's corrupt value. That is estimated for all edges at a
time by one gradient (EAP, arXiv 2310.10348; with ig_steps EAP-IG, arXiv 2403.17806), and checked by
running the circuit: all edges outside of it carry corrupt values. Gates are deterministic throughout.
"""

import csv
import os
import time
from collections import namedtuple
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import addition_toy
from model import Transformer, rope_frequencies, rotate
from plumbing import figures
from plumbing import tasks, tokens
from plumbing.flags import open_folder, pick_device, replace, run, write_results
from sparse import allowed_pairs, gate_map

# -----------------------------------------------------------------------------
# the graph


class Graph:
    """Sources and destinations of the residual stream, and which pairs are edges.

    sources: input, a0.h0, ..., m0, ...; destinations: a0.h0<q>, a0.h0<k>, a0.h0<v>, ..., m0, ...,
    logits. Under grouped queries k and v are read once a group: a0.g0<k>. qkv="merged": one
    destination a head or group. edges: bool (n_sources, n_destinations): written before it is read.
    """

    def __init__(self, config, qkv="split"):
        if qkv not in ("split", "merged"):
            raise ValueError(f"qkv must be split or merged, got {qkv!r}")
        self.config, self.qkv = config, qkv
        L, H, G = config.n_layer, config.n_head, config.n_kv_head
        group = "h" if G == H else "g"
        letters = [("q", "h", H), ("k", group, G), ("v", group, G)]
        if qkv == "merged":
            letters = [("", group, G)]
        self.sources, self.destinations, written, read = ["input"], [], [0], []
        self.columns = []  # of each layer: {letter: slice of destinations}, "m": the MLP's
        for l in range(L):
            self.sources += [f"a{l}.h{h}" for h in range(H)] + [f"m{l}"]
            written += [2 * l + 1] * H + [2 * l + 2]
            self.columns.append({})
            names = [[f"a{l}.{kind}{n}" + f"<{letter}>" * bool(letter) for n in range(count)]
                     for letter, kind, count in letters]
            if H == G:  # q, k and v of one head beside each other
                step, order = len(names), [name for head in zip(*names) for name in head]
            else:
                step, order = 1, sum(names, [])
            for (letter, _, count), own in zip(letters, names):
                begin = len(self.destinations) + order.index(own[0])
                self.columns[l][letter] = slice(begin, begin + step * count, step)
            self.destinations += order
            read += [2 * l + 1] * len(order)
            self.columns[l]["m"] = slice(len(self.destinations), len(self.destinations) + 1)
            self.destinations.append(f"m{l}")
            read.append(2 * l + 2)
        self.destinations.append("logits")
        self.edges = torch.tensor(written)[:, None] < torch.tensor(read + [2 * L + 1])

    def __len__(self):
        return int(self.edges.sum())

    def before(self, l, mlp=False):
        """How many sources are written before layer l's heads, or its MLP, read."""
        return 1 + l * (self.config.n_head + 1) + self.config.n_head * mlp

    def readers(self, source):
        """Columns by which a source's own node reads; none for the input."""
        if source == "input":
            return []
        if source[0] == "m":
            return [self.destinations.index(source)]
        l, h = (int(part[1:]) for part in source.split("."))
        g = h * self.config.n_kv_head // self.config.n_head
        return [columns.start + columns.step * (h if letter == "q" else g)
                for letter, columns in self.columns[l].items() if letter != "m"]

    def prune(self, edges):
        """Without edges from nodes that read nothing, and to nodes that reach no logits."""
        edges = edges & self.edges
        readers = [self.readers(source) for source in self.sources]
        while True:
            read = edges.any(0)
            feeds = torch.zeros(len(self.destinations), dtype=torch.bool)
            feeds[-1] = True
            for source, columns in enumerate(readers):
                if source > 0 and not read[columns].any():
                    edges[source] = False
                if edges[source].any():
                    feeds[columns] = True
            kept = edges & feeds
            if torch.equal(kept, edges) and torch.equal(kept.any(0), read):
                return kept
            edges = kept

    def nodes(self, edges):
        """(heads, MLPs) that write into these edges."""
        names = [name for name, kept in zip(self.sources, edges.any(1)) if kept]
        return sum(name[0] == "a" for name in names), sum(name[0] == "m" for name in names)


# -----------------------------------------------------------------------------
# one run of the model, and what flows in it

# z: per layer (N, T, H, D), the heads' outputs before W_O; m: per layer (N, T, C), the MLPs' outputs;
# embed (N, T, C); seen: {tap name: tensor} of the rest; logits (N, T, vocab)
Run = namedtuple("Run", "embed z m seen logits")


def observe(model, idx, embed=None, held=False):
    """A Run. embed replaces the embedding. held: gradients flow, with the gates held as they are.

    The model's own gradient of a deterministic gate is a surrogate (straight-through); a gate that
    is held has slope 0, the true derivative wherever there is one.
    """
    config, seen = model.config, {}

    def tap(name, t):
        if name == "embed" and embed is not None:
            t = embed
        if held and name == "embed":
            t = t.detach().requires_grad_()
        if held and name.endswith(("mlp.in", "final")):
            t = t.clone()  # its gradient is that of reading, without the residual stream's
        if held and config.sparse and name.endswith(".z"):
            q, k, v = (seen[name[:-1] + x] for x in "qkv")
            t = checkpoint(attend, model, q, k, v, use_reentrant=False)[0]  # T x T maps are not kept
        seen[name] = t
        return t

    with torch.set_grad_enabled(held):
        logits = model(idx, tap=tap)[0]
    layers = range(config.n_layer)
    return Run(seen["embed"], [seen[f"h{l}.attn.z"] for l in layers],
               [seen[f"h{l}.mlp.out"] for l in layers], seen, logits)


def attend(model, q, k, v):
    """(z (N, T, H, D), A a (N, H, T, T)) of q, k, v (N, T, heads, D) as taps see them; gates held."""
    config, T = model.config, q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if config.position == "rope":
        q, k = (rotate(x, rope_angles(model, T)) for x in (q, k))
    A = allowed_pairs(T, config.causal, q.device)
    if config.sparse:
        A = gate_map(q, k, config.gate_bias, causal=config.causal)
    k, v = (x.repeat_interleave(config.n_head // config.n_kv_head, dim=1) for x in (k, v))
    s = q @ k.mT / config.head_size**0.5
    s = s.masked_fill(~allowed_pairs(T, config.causal, q.device), -torch.inf)
    weights = A * s.softmax(-1)
    return (weights @ v).transpose(1, 2), weights


def rope_angles(model, T):
    device = model.wte.weight.device
    return torch.arange(T, device=device)[:, None] * rope_frequencies(model.config).to(device)


def written(model, run):
    """Each source's contribution to the residual stream: (n_sources, N, T, C)."""
    parts = [run.embed[None]]
    for block, z, m in zip(model.h, run.z, run.m):
        W = block.attn.c_proj.weight.unflatten(1, z.shape[2:])  # (C, H, D)
        parts += [torch.einsum("nthd,chd->hntc", z, W), m[None]]
    return torch.cat(parts)


def norm_backward(norm, x, g):
    """Gradients g (..., C) of a norm's output, taken back to its input x (..., C)."""
    eps = norm.eps
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    x, g = x * scale, g * norm.weight
    out = g - x * (g * x).mean(-1, keepdim=True)
    if isinstance(norm, torch.nn.LayerNorm):
        out = out - g.mean(-1, keepdim=True)
    return out * scale


# -----------------------------------------------------------------------------
# attribution


def edge_attribution(model, clean, corrupt, metric, qkv="split", ig_steps=0):
    """EAP: for every edge the estimate of metric(edge corrupted) - metric(clean), (S, V) float32.

    clean, corrupt (N, T) int64; metric(logits (N, T, vocab)) -> (N,). Returns the mean over the N
    prompts and the Graph. s(u -> v) = (a_u^corrupt - a_u^clean) . dM/dx_v at the clean run, gates
    held; with ig_steps = m, dM/dx_v is the mean over m inputs between corrupt and clean (midpoints).
    """
    scores, graph = edge_scores(model, clean, corrupt, metric, qkv, ig_steps)
    return scores.mean(0), graph


def edge_scores(model, clean, corrupt, metric, qkv="split", ig_steps=0):
    """As edge_attribution, of each prompt: (N, S, V) float32, and the Graph."""
    check_pair(model, clean, corrupt)
    graph = Graph(model.config, qkv)
    with torch.no_grad():
        run = observe(model, corrupt)
        change, corrupted = written(model, run), run.embed
        run = observe(model, clean)  # one run in memory at a time: long prompts
        change, embed = change.sub_(written(model, run)), run.embed
        change = change.transpose(0, 1).flatten(2)  # (N, S, T C)
        del run
    scores = torch.zeros(len(clean), *graph.edges.shape, dtype=change.dtype, device=change.device)
    for k in range(max(1, ig_steps)):
        share = (k + 0.5) / ig_steps if ig_steps else 1.0
        run = observe(model, clean, torch.lerp(corrupted, embed, share), held=True)
        for columns, g in gradients(model, graph, run, metric):  # g (N, v, T, C)
            before = int(graph.edges[:, columns].any(1).sum())  # sources come in the order of writing
            scores[:, :before, columns] += change[:, :before] @ g.flatten(2).mT
    return scores.float() * graph.edges.to(scores.device) / max(1, ig_steps), graph


def gradients(model, graph, run, metric):
    """Yields (columns (v,), dM/dx_v (N, v, T, C)) of a layer's destinations, then of the logits.

    dM/dx of a head's q is the norm's backward of dM/dq W_q^T: no head needs a residual stream of its
    own. A merged destination reads for all its letters, so their gradients add up.
    """
    config = model.config
    names = [f"h{l}.{x}" for l in range(config.n_layer) for x in ("attn.q", "attn.k", "attn.v", "mlp.in")]
    wanted = [run.seen[name] for name in [*names, "final"]]
    grads = dict(zip([*names, "final"], torch.autograd.grad(metric(run.logits).sum(), wanted)))
    with torch.no_grad():
        for l, block in enumerate(model.h):
            x, columns = run.seen[f"h{l}.attn.in"][:, None], graph.columns[l]
            parts = {}
            for letter, W in zip("qkv", block.attn.c_attn.weight.split(block.attn.sizes)):
                g = grads[f"h{l}.attn.{letter}"]  # (N, T, heads, D)
                g = g.transpose(1, 2) @ W.unflatten(0, g.shape[2:])  # (N, heads, T, C)
                parts[letter] = norm_backward(block.ln_1, x, g)
            if graph.qkv == "merged":
                parts["q"] = parts["q"].unflatten(1, (config.n_kv_head, -1)).sum(2)
                parts = {"": parts["q"] + parts["k"] + parts["v"]}
            parts["m"] = grads[f"h{l}.mlp.in"][:, None]
            numbers = torch.arange(len(graph.destinations))
            yield torch.cat([numbers[columns[letter]] for letter in parts]), torch.cat([*parts.values()], 1)
        yield torch.tensor([len(graph.destinations) - 1]), grads["final"][:, None]


def node_scores(model, clean, corrupt, metric):
    """(S,): (a_u^corrupt - a_u^clean) . dM/da_u, the mean over prompts, gates held.

    Equals the sum of the source's outgoing edge scores.
    """
    check_pair(model, clean, corrupt)
    with torch.no_grad():
        two = observe(model, corrupt)
    one = observe(model, clean, held=True)
    mine, theirs = ([run.embed, *run.z, *run.m] for run in (one, two))
    grads = torch.autograd.grad(metric(one.logits).sum(), mine)
    with torch.no_grad():
        change = [(g * (b - a)).flatten(1) if a.dim() == 3 else (g * (b - a)).transpose(1, 2).flatten(2)
                  for a, b, g in zip(mine, theirs, grads)]  # (N, T C) or (N, H, T D)
        embed, L = change[0].sum(-1).mean(0)[None], model.config.n_layer
        heads = [c.sum(-1).mean(0) for c in change[1:1 + L]]
        mlps = [c.sum(-1).mean(0)[None] for c in change[1 + L:]]
    return torch.cat([embed, *(x for pair in zip(heads, mlps) for x in pair)]).float()


def token_edges(model, clean, corrupt, metric):
    """(N, n_layer, n_head, T, T): what each token-to-token edge j -> i of each head does to the metric.

    s_ij = (m^corrupt - m^clean)_ij . dM/dresid_i with m_ij = A_ij a_ij v_j W_O. Exactly 0.0 where
    the gate is shut in both runs: only pairs that are open in one of them are computed. The sum over
    j is the head's score at position i.
    """
    check_pair(model, clean, corrupt)
    one, two = observe(model, clean, held=True), observe(model, corrupt)
    grads = torch.autograd.grad(metric(one.logits).sum(), one.z)
    config, (N, T) = model.config, clean.shape
    scores = torch.zeros(N, config.n_layer, config.n_head, T, T, dtype=one.logits.dtype, device=clean.device)
    with torch.no_grad():
        for l, g in enumerate(grads):  # g (N, T, H, D) = dM/dresid W_O^T
            maps, values = [], []
            for run in (one, two):
                q, k, v = (run.seen[f"h{l}.attn.{x}"] for x in "qkv")
                maps.append(attend(model, q, k, v)[1])
                values.append(v.repeat_interleave(config.n_head // config.n_kv_head, dim=2))
            n, h, i, j = ((maps[0] != 0) | (maps[1] != 0)).nonzero(as_tuple=True)
            moved = [m[n, h, i, j, None] * v[n, j, h] for m, v in zip(maps, values)]
            scores[n, l, h, i, j] = ((moved[1] - moved[0]) * g[n, i, h]).sum(-1)
    return scores


@torch.no_grad()
def head_patching(model, clean, corrupt, metric):
    """(N, n_layer, n_head): the metric after patching that head's clean z into the corrupt run."""
    check_pair(model, clean, corrupt)
    config, z, before = model.config, observe(model, clean).z, observe(model, corrupt).seen
    values = torch.zeros(len(clean), config.n_layer, config.n_head)
    angle = rope_angles(model, clean.shape[1]) if config.position == "rope" else None
    at_a_time = max(1, 1024 // clean.numel())  # heads in one pass, each with a batch of its own
    for l in range(config.n_layer):
        for heads in torch.arange(config.n_head).split(at_a_time):

            def tap(name, t):
                if name == "attn.z":
                    t = t.unflatten(0, (len(heads), -1)).clone()
                    for own, h in zip(t, heads):
                        own[:, :, h] = z[l][:, :, h]
                    t = t.flatten(0, 1)
                return t

            x = before[f"h{l}.attn.in"].repeat(len(heads), 1, 1)  # nothing before this layer has changed
            for n, block in enumerate(model.h[l:]):
                x, _ = block(x, angle, None, (lambda name, t: t) if n else tap)
            for own, h in zip(x.chunk(len(heads)), heads):
                values[:, l, h] = metric(model.lm_head(model.ln_f(own))).cpu()
    return values


@torch.no_grad()
def keep_heads(model, clean, z, z_corrupt, kept):
    """Logits of the clean prompts when the heads in kept write their clean z, all others the corrupt z.

    z and z_corrupt: those of two Runs, per layer (N, T, H, D). kept: bool (N, n_layer, n_head). Only
    the MLPs are computed anew.
    """
    def tap(name, t):
        if name.endswith(".z"):
            l = int(name[1:].split(".")[0])
            t = torch.where(kept[:, None, l, :, None], z[l], z_corrupt[l])
        return t

    return model(clean, tap=tap)[0]


# -----------------------------------------------------------------------------
# circuits


@torch.no_grad()
def patch_edges(model, graph, clean, corrupt, edges, ablation="resample", target=None):
    """Logits (N, T, vocab) of the clean run in which every edge outside of `edges` is ablated.

    x_v = residual + sum over u not kept of (a_u^ablation - a_u^current): each destination reads a
    residual stream of its own. edges: bool (S, V). ablation: "resample" takes a_u of the corrupt run,
    "mean" its mean over the N prompts at each position, "zero" 0. target: what `ablated` returned, to
    compute it once for many circuits.
    """
    check_pair(model, clean, corrupt)
    if target is None:
        target = ablated(model, corrupt, ablation)
    config, seen = model.config, {}  # seen: of the layer that runs
    cut = (graph.edges & ~edges.cpu()).to(target).mT  # (V, S)
    moved = target.expand(-1, len(clean), -1, -1).clone()  # becomes a_u^ablation - a_u^current

    def read(columns, sources):
        """What destinations read beyond the residual stream: (v, N, T, C) of each of some columns."""
        change = torch.cat([cut[c, :sources] for c in columns]) @ moved[:sources].flatten(1)
        counts = [len(cut[c]) for c in columns]
        return change.unflatten(1, moved.shape[1:]).split(counts)

    def tap(name, t):
        if name == "embed":
            moved[0] -= t
        elif name == "final":
            return t + read([slice(-1, None)], len(moved))[0][0]
        if not name.startswith("h"):
            return t
        l, part = int(name[1:].split(".")[0]), name.split(".", 1)[1]
        block, begin = model.h[l], graph.before(l)
        if part == "attn.in":
            letters = [letter for letter in graph.columns[l] if letter != "m"]
            changes = read([graph.columns[l][letter] for letter in letters], begin)
            seen.update(zip(letters, changes), x=t)
        elif part in ("attn.q", "attn.k", "attn.v"):
            which = "qkv".index(part[-1])
            W = block.attn.c_attn.weight.split(block.attn.sizes)[which].unflatten(0, t.shape[2:])
            change = seen[part[-1] if graph.qkv == "split" else ""]
            if graph.qkv == "merged" and part == "attn.q":
                change = change.repeat_interleave(config.n_head // config.n_kv_head, dim=0)
            t = block.ln_1(seen["x"] + change).flatten(1, 2) @ W.mT  # (heads, N T, D)
            t = t.unflatten(1, clean.shape).permute(1, 2, 0, 3)
            if block.attn.c_attn.bias is not None:
                t = t + block.attn.c_attn.bias.split(block.attn.sizes)[which].unflatten(0, t.shape[2:])
        elif part == "attn.z":
            W = block.attn.c_proj.weight.unflatten(1, t.shape[2:])
            moved[begin:begin + config.n_head] -= torch.einsum("nthd,chd->hntc", t, W)
        elif part == "mlp.in":
            t = t + read([graph.columns[l]["m"]], graph.before(l, mlp=True))[0][0]
        elif part == "mlp.out":
            moved[graph.before(l, mlp=True)] -= t
        return t

    return model(clean, tap=tap)[0]


@torch.no_grad()
def ablated(model, corrupt, ablation):
    """a_u^ablation of each source, (S, N or 1, T, C)."""
    target = written(model, observe(model, corrupt))
    return {"resample": target, "mean": target.mean(1, keepdim=True), "zero": target * 0}[ablation]


@torch.no_grad()
def exact_edges(model, graph, clean, corrupt, metric):
    """(S, V): metric(edge corrupted) - metric(clean), the mean over prompts, of every edge.

    One forward pass an edge: for small graphs, and to see what the estimates are worth.
    """
    effects = torch.zeros(graph.edges.shape)
    full, target = metric(model(clean)[0]), ablated(model, corrupt, "resample")
    for u, v in tqdm(graph.edges.nonzero().tolist(), desc="edges", disable=None, leave=False):
        kept = graph.edges.clone()
        kept[u, v] = False
        changed = metric(patch_edges(model, graph, clean, corrupt, kept, target=target))
        effects[u, v] = (changed - full).mean()
    return effects


def circuit(graph, value, n):
    """bool (S, V): the n edges of largest value, pruned to those between input and logits."""
    flat = torch.where(graph.edges, value, -torch.inf).flatten()
    edges = torch.zeros(graph.edges.numel(), dtype=torch.bool)
    edges[flat.topk(n).indices] = True
    return graph.prune(edges.view_as(graph.edges))


def explained_effect(m, m_full, m_empty):
    """(m - empty) / (full - empty), a ratio of means over sentences."""
    return ((m.mean() - m_empty.mean()) / (m_full.mean() - m_empty.mean())).item()


FRACTIONS = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1)


def cpr(f):
    """(CPR, CMD) of explained effects at FRACTIONS of the edges: the areas of f and of |1 - f|."""
    f, x = np.asarray(f, dtype=float), np.asarray(FRACTIONS)
    return float(np.trapezoid(f, x)), float(np.trapezoid(abs(1 - f), x))


def grid(total, per_decade):
    """Numbers of edges, about per_decade a factor of ten, from 1 to all of them."""
    exponents = np.arange(0, np.log10(total), 1 / per_decade)
    return sorted({*(int(round(10**e)) for e in exponents), total})


def first_above(numbers, f, level=0.9):
    """The first of `numbers` from which f stays at or above the level, as it does at the last one."""
    return numbers[max((i + 1 for i, value in enumerate(f[:-1]) if value < level), default=0)]


def around(numbers, f, points=4):
    """Numbers between first_above and the one before it, evenly in the logarithm."""
    last = numbers.index(first_above(numbers, f))
    if last == 0:
        return []
    inner = np.geomspace(max(1, numbers[last - 1]), numbers[last], points + 2).round().astype(int)
    return sorted({*inner.tolist()} - {*numbers})


def cumulative(scores):
    """Share of the sum of |scores| (..., E) that its n largest hold, n = 1 .. E."""
    ordered = scores.abs().sort(-1, descending=True).values.double()
    total = ordered.sum(-1, keepdim=True)
    return (ordered.cumsum(-1) / total.clamp(min=1e-300))


def check_pair(model, clean, corrupt):
    if clean.shape != corrupt.shape:
        raise ValueError(f"clean and corrupt prompts must have one length, got {tuple(clean.shape)} and "
                         f"{tuple(corrupt.shape)}")
    if clean.shape[1] > model.config.block_size:
        raise ValueError(f"prompts of {clean.shape[1]} tokens do not fit the model's context of "
                         f"{model.config.block_size}")


# -----------------------------------------------------------------------------
# one model on one task


def rows_at_a_time(task, flags):
    return max(1, flags.batch_tokens // task.clean.shape[1])


def parts(task, flags, progress=None):
    """Yields (clean, corrupt, metric, correct) of some prompts at a time."""
    rows = torch.arange(len(task.clean)).split(rows_at_a_time(task, flags))
    for r in tqdm(rows, desc=progress, disable=None if progress else True, leave=False):
        clean, corrupt = (x[r].to(flags.device) for x in (task.clean, task.corrupt))
        yield (clean, corrupt, lambda logits, r=r: task.metric(logits, r),
               lambda logits, r=r: task.correct(logits, r))


@torch.no_grad()
def runs_of(model, task, flags):
    """The metric of each clean and of each corrupt prompt (N,), and the share of clean ones that are right."""
    full, empty, right = [], [], []
    for clean, corrupt, metric, correct in parts(task, flags):
        logits = model(clean)[0]
        full.append(metric(logits).cpu())
        right.append(correct(logits).cpu())
        empty.append(metric(model(corrupt)[0]).cpu())
    return torch.cat(full), torch.cat(empty), torch.cat(right).float().mean().item()


def behaviour(name, model, task, flags):
    """runs_of, printed; ValueError if the model can not do the task or there is no effect."""
    full, empty, accuracy = runs_of(model, task, flags)
    print(f"{name}: accuracy {accuracy:.1%}, {task.units} {full.mean():.3f} on clean prompts, "
          f"{empty.mean():.3f} on corrupt ones", flush=True)
    if accuracy < task.floor and not flags.force:
        raise ValueError(f"{name}: right on {accuracy:.0%} of the {task.name} prompts, below {task.floor:.0%}: "
                         "its circuit would say little; --force goes on")
    gap = full.mean() - empty.mean()
    if not gap.abs() >= 1e-3 or (gap < 0 and not flags.force):  # nan, too
        raise ValueError(f"{name}: the {task.units} is not higher on clean prompts than on corrupt ones, "
                         f"{full.mean():.4f} and {empty.mean():.4f}: there is no effect to explain")
    return full, empty, accuracy


def scores_of(model, task, flags, progress=None):
    """Scores of all edges on each prompt, (N, E) on the CPU."""
    return torch.cat([scores[:, graph.edges].cpu() for scores, graph in (
        edge_scores(model, clean, corrupt, metric, flags.qkv, flags.ig_steps)
        for clean, corrupt, metric, _ in parts(task, flags, progress))])


@torch.no_grad()
def metrics_of_heads(model, task, order, counts, flags, progress):
    """(counts, N): the metric with the first k heads of each prompt's order (N, heads) kept."""
    found = []
    for rows, (clean, corrupt, metric, _) in zip(order.split(rows_at_a_time(task, flags)), parts(task, flags)):
        z, z_corrupt, some = observe(model, clean).z, observe(model, corrupt).z, []
        for k in tqdm(counts, desc=progress, disable=None, leave=False):
            kept = torch.zeros(rows.shape, dtype=torch.bool).scatter_(1, rows[:, :k], True)
            kept = kept.view(len(rows), model.config.n_layer, -1).to(flags.device)
            some.append(metric(keep_heads(model, clean, z, z_corrupt, kept)).cpu())
        found.append(torch.stack(some))
    return torch.cat(found, 1)


@torch.no_grad()
def metrics_of_circuits(model, graph, task, circuits, flags, progress=None):
    """(circuits, N): the metric under each circuit; one that equals the last is not run again."""
    found, target = [], None
    if flags.ablation == "mean":  # over all prompts
        target = sum(ablated(model, corrupt, "mean") * len(corrupt)
                     for _, corrupt, *_ in parts(task, flags)) / len(task.clean)
    for clean, corrupt, metric, _ in parts(task, flags):
        values = ablated(model, corrupt, flags.ablation) if target is None else target
        some, last = [], None
        for edges in tqdm(circuits, desc=progress, disable=None if progress else True, leave=False):
            if last is None or not torch.equal(edges, last):
                logits = patch_edges(model, graph, clean, corrupt, edges, target=values)
            some.append(metric(logits).cpu())
            last = edges
        found.append(torch.stack(some))
    return torch.cat(found, 1)


def refined(numbers, measure, full, empty):
    """(numbers, metrics (numbers, N), explained effects), with more numbers where 0.9 is crossed.

    measure(numbers) -> (numbers, N).
    """
    metrics = measure(numbers)
    more = around(numbers, [explained_effect(m, full, empty) for m in metrics])
    if more:
        metrics = torch.cat([metrics, measure(more)])[torch.tensor(numbers + more).argsort()]
        numbers = sorted(numbers + more)
    return numbers, metrics, [explained_effect(m, full, empty) for m in metrics]


def analyse(name, model, task, second, first_runs, flags):
    """Everything about one model: (results, what the figures need).

    second: another draw of the task; first_runs: behaviour on the first.
    """
    full, empty, accuracy = first_runs
    graph = Graph(model.config, flags.qkv)
    if len(graph) * len(full) > 2**28:
        raise ValueError(f"--n {len(full)} prompts times {len(graph):,} edges are too many: lower --n")
    results = {"n": len(full), "accuracy": accuracy, "metric_clean": full.mean().item(),
               "metric_corrupt": empty.mean().item(), "edges": len(graph), "nodes": len(graph.sources) - 1,
               "curves": {}}
    shown = {"graph": graph, "full": full, "empty": empty}
    analyse_heads(name, model, task, flags, results, shown)
    analyse_edges(name, model, task, second, flags, results, shown)
    return results, shown


def analyse_heads(name, model, task, flags, results, shown):
    """Heads ranked by patching each of them; then the best k are kept."""
    patched = torch.cat([head_patching(model, clean, corrupt, metric) for clean, corrupt, metric, _ in
                         parts(task, flags, f"{name}: heads")])
    ranks = {"per_sentence": patched.flatten(1).argsort(1, descending=True)}
    ranks["global"] = patched.flatten(1).mean(0).argsort(descending=True).expand(len(patched), -1)
    shown["patched"], shown["heads"] = patched.mean(0), {}
    for rank, order in ranks.items():

        def measure(counts):
            return metrics_of_heads(model, task, order, counts, flags, f"{name}: heads kept")

        counts, metrics, f = refined([0, *grid(order.shape[1], flags.per_decade)], measure, shown["full"],
                                     shown["empty"])
        results[f"heads_for_0.9_{rank}"] = first_above(counts, f)
        results["curves"][f"heads_{rank}"] = {"kept": counts, "explained_effect": f}
        quartiles, left_out = over_sentences(metrics, shown["full"], shown["empty"])
        results["sentences_left_out_of_quartiles"] = left_out
        shown["heads"][rank] = counts, f, *quartiles


def analyse_edges(name, model, task, second, flags, results, shown):
    """Scores of all edges on each prompt; then circuits of the n largest of their mean."""
    graph, full = shown["graph"], shown["full"]
    scores = scores_of(model, task, flags, f"{name}: edges")
    mean = torch.zeros(graph.edges.shape)
    mean[graph.edges] = scores.mean(0)
    if not mean.any():
        raise ValueError(f"every edge of the {name} model has the score 0: only gates that open or close "
                         "between the prompts carry the effect, and gradients do not see those")

    def measure(numbers):
        circuits = [circuit(graph, mean.abs(), n) for n in numbers]
        return metrics_of_circuits(model, graph, task, circuits, flags, f"{name}: circuits")

    none = measure([0])[0]
    numbers, metrics, f = refined(grid(len(graph), flags.per_decade), measure, full, none)
    found = first_above(numbers, f)
    needs = circuit(graph, mean.abs(), found)
    heads, mlps = graph.nodes(needs)
    of_mean, of_each = cumulative(scores.mean(0)), cumulative(scores)
    full_2, _, accuracy_2 = runs_of(model, second, flags)
    none_2, metrics_2 = metrics_of_circuits(model, graph, second, [circuit(graph, mean, 0), needs], flags)
    results |= {
        "edges_for_0.9": found, "edges_for_0.9_after_pruning": int(needs.sum()), "heads_in_circuit": heads,
        "mlps_in_circuit": mlps, "nodes_for_0.9": heads + mlps,
        "accuracy_on_other_prompts": accuracy_2,
        "explained_effect_on_other_prompts": explained_effect(metrics_2, full_2, none_2),
        "edges_for_0.9_cumulative": needed(of_mean),
        "edges_for_0.9_cumulative_mean_of_curves": needed(of_each.mean(0))}
    results["curves"]["edges"] = {"requested": numbers, "explained_effect": f}

    of_others = scores_of(model, second, flags).mean(0)
    top = [{*x.abs().topk(needed(of_mean)).indices.tolist()} for x in (scores.mean(0), of_others)]
    results["jaccard_of_two_draws"] = len(top[0] & top[1]) / len(top[0] | top[1])
    if not flags.fast and len(graph) >= 1 / min(FRACTIONS):
        areas = []
        for value in (-mean, mean.abs()):
            circuits = [circuit(graph, value, round(share * len(graph))) for share in FRACTIONS]
            m = metrics_of_circuits(model, graph, task, circuits, flags, f"{name}: CPR")
            areas.append(cpr([explained_effect(x, full, none) for x in m]))
        results |= {"cpr": areas[0][0], "cmd": areas[1][1]}

    # bootstrap over prompts; the ranking of the edges stays
    boot = {"edges_for_0.9": [], "edges_for_0.9_cumulative_mean_of_curves": []}
    for d in torch.randint(len(full), (200, len(full)), generator=torch.Generator().manual_seed(flags.seed)):
        again = [explained_effect(m[d], full[d], none[d]) for m in metrics]
        boot["edges_for_0.9"].append(first_above(numbers, again))
        boot["edges_for_0.9_cumulative_mean_of_curves"].append(needed(of_each[d].mean(0)))
    shown |= {"numbers": numbers, "f": f, "of_mean": of_mean, "of_each": of_each.mean(0), "mean": mean,
              "boot": boot, "needs": needs, "circuit": circuit(graph, mean.abs(), needed(of_mean))}


def over_sentences(metrics, full, empty):
    """Quartiles (2, counts) of the explained effect of each sentence, and how many had too small a gap."""
    gap = full - empty
    wide = gap.abs() > 0.05 * gap.abs().mean()
    f = ((metrics - empty) / gap)[:, wide]
    return f.quantile(torch.tensor([0.25, 0.75]), dim=1), int((~wide).sum())


def needed(share, level=0.9):
    """How many of the largest hold the level: cumulative shares (E,) -> int."""
    return int((share < level).sum()) + 1


def interval(values):
    """The middle 90% of bootstrap values: [low, high]."""
    return [float(x) for x in np.quantile(np.asarray(values, dtype=float), (0.05, 0.95))]


# -----------------------------------------------------------------------------
# one sentence


@torch.no_grad()
def attention_maps(model, idx):
    """A a of one prompt (1, T): (n_layer, n_head, T, T) on the CPU, 0.0 where a gate is shut."""
    seen = observe(model, idx).seen
    return torch.stack([attend(model, *(seen[f"h{l}.attn.{x}"] for x in "qkv"))[1][0]
                        for l in range(model.config.n_layer)]).cpu()


def token_graph(model, clean, corrupt, metric):
    """Token edges of one prompt: |score| (n_layer, T, T), summed over heads, nan where no gate is open;
    and how many gates are open in both runs, close, open, or are shut in both."""
    maps = [attention_maps(model, idx) > 0 for idx in (clean, corrupt)]
    classes = {"open in both": maps[0] & maps[1], "closes": maps[0] & ~maps[1],
               "opens": ~maps[0] & maps[1], "shut in both": ~(maps[0] | maps[1])}
    allowed = allowed_pairs(clean.shape[1], model.config.causal)
    strength = token_edges(model, clean, corrupt, metric)[0].cpu().abs().sum(1)
    return (strength.where((maps[0] | maps[1]).any(1), torch.nan),
            {name: int((pairs & allowed).sum()) for name, pairs in classes.items()})


# -----------------------------------------------------------------------------
# the command


@dataclass
class Flags:
    dense: str = "gpt2"  # the dense model: hub name, Hugging Face folder or checkpoint
    sparse: str | None = None  # the sparse one: a checkpoint of train.py, or a folder
    adapter: str | None = None  # adapter.safetensors on top of --sparse
    task: str = "ioi"  # ioi, greater-than, induction or addition
    corrupt: str | None = None  # which corruption of the task, see plumbing/tasks.py
    n: int = 100  # prompts
    out: str | None = None  # folder for results.json, edges.csv and the figures
    qkv: str = "split"  # split: a head reads by q, k and v; merged: once
    ig_steps: int = 5  # 0: plain EAP; m: EAP-IG with m midpoints
    ablation: str = "resample"  # of edges outside a circuit: resample, mean or zero
    fast: bool = False  # at most 8 prompts, a coarse grid and no CPR: about two minutes
    force: bool = False  # go on with a model that can not do the task
    tokenizer: str | None = None  # gpt2, bytes or a tokenizer.json; default: the model's own
    seed: int = 0  # of prompts and bootstrap
    batch_tokens: int = 1024  # tokens in one forward pass
    per_decade: int = 20  # circuit sizes tried in each factor of ten
    device: str = "auto"  # auto, cpu, cuda or mps
    threads: int = 2  # CPU threads

    def __post_init__(self):
        if self.fast:
            self.n, self.per_decade = min(self.n, 8), min(self.per_decade, 4)
        for name in ("n", "batch_tokens", "per_decade", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.ig_steps < 0:
            raise ValueError("--ig-steps must not be negative")
        for name, values in (("qkv", ("split", "merged")), ("task", tasks.NAMES),
                             ("ablation", ("resample", "mean", "zero"))):
            if getattr(self, name) not in values:
                raise ValueError(f"--{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")


def load(flags):
    """({"dense": model, "sparse": model}, tokenizer); of addition the module itself, for its problems."""
    if not flags.sparse:
        raise ValueError("give --sparse, the post-trained model to compare with --dense")
    models = {"dense": Transformer.from_pretrained(flags.dense),
              "sparse": Transformer.from_pretrained(flags.sparse, flags.adapter)}
    dense, sparse = (m.config for m in models.values())
    if dense.sparse:
        raise ValueError(f"--dense {flags.dense} has gates: give the model before its post-training, or "
                         "its dense control")
    if not sparse.sparse:
        raise ValueError(f"--sparse {flags.sparse} has no gates: give a checkpoint of a sparse run, or "
                         "its --adapter")
    for name in ("vocab_size", "n_layer", "n_head", "n_kv_head"):
        if getattr(dense, name) != getattr(sparse, name):
            raise ValueError(f"--dense has {name} {getattr(dense, name)} and --sparse "
                             f"{getattr(sparse, name)}: not of one family")
    if flags.task == "addition" and dense.vocab_size != len(addition_toy.CHARACTERS):
        raise ValueError("--task addition is for the models of addition_toy.py")
    tok = addition_toy
    if flags.task != "addition":
        tok = tokens.tokenizer(tokens.name_for(dense.vocab_size, flags.tokenizer, flags.dense))
    return {name: m.eval().requires_grad_(False).to(flags.device) for name, m in models.items()}, tok


def compare(results, shown):
    """Adds the ratios dense / sparse, and the bootstrap intervals of them and of their parts."""
    dense, sparse = results["dense"], results["sparse"]
    results["ratio"] = {key: dense[key] / sparse[key] for key in dense
                        if "_for_0.9" in key and not key.endswith("_interval")}
    results["interval"] = {}
    for key in shown["dense"]["boot"]:
        pair = [shown[name]["boot"][key] for name in ("dense", "sparse")]
        dense[key + "_interval"], sparse[key + "_interval"] = map(interval, pair)
        results["interval"][key] = interval(np.divide(*pair))


def print_table(results):
    print(f"\n{'':42}{'dense':>10}{'sparse':>10}{'ratio':>8}  90% interval")
    for key in [key for key, value in results["dense"].items() if isinstance(value, int | float)]:
        cells = [f"{v:.3f}" if isinstance(v, float) else f"{v:,}"
                 for v in (results[name][key] for name in ("dense", "sparse"))]
        ratio, limits = results["ratio"].get(key), results["interval"].get(key)
        print(f"{key:42}{cells[0]:>10}{cells[1]:>10}{f'{ratio:.1f}' if ratio else '':>8}"
              + (f"  {limits[0]:.2g} to {limits[1]:.2g}" if limits else ""))


def draw(models, task, tok, results, shown, flags):
    """All figures; returns their paths. The sentence of the maps is the first clean prompt."""
    path = {name: os.path.join(flags.out, f"{name}.png") for name in (
        "heads", "edges", "circuits", "attention", "circuit_heads", "tokens")}
    figures.draw_heads(shown, results, path["heads"])
    figures.draw_edges(shown, results, path["edges"])
    figures.draw_circuits(shown, path["circuits"])

    clean, corrupt = (idx[:1].to(flags.device) for idx in (task.clean, task.corrupt))
    labels = [tok.CHARACTERS[i] if tok is addition_toy else tok.decode([i]) for i in clean[0].tolist()]
    maps = {name: attention_maps(model, clean) for name, model in models.items()}
    heads = [node for node in shown["sparse"]["graph"].sources if node[0] == "a"]

    def row(name, numbers):
        return [(f"{name} {heads[n]}", maps[name].flatten(0, 1)[n]) for n in numbers.tolist()]

    strongest = {name: (s["patched"] - s["empty"].mean()).abs().flatten().argsort(descending=True)[:6]
                 for name, s in shown.items()}
    figures.draw_maps([row(name, numbers) for name, numbers in strongest.items()], labels, path["attention"])
    s = shown["sparse"]
    weight = (s["mean"].abs() * s["needs"]).sum(1)[[node[0] == "a" for node in s["graph"].sources]]
    needed_heads = weight.argsort(descending=True)[:max(1, int((weight > 0).sum()))]
    title = f"all {len(needed_heads)} heads of the circuit that explains 0.9 of the effect"
    if len(needed_heads) > 144:
        title = title.replace("all", "the 144 strongest of the")
    figures.draw_maps([row("sparse", numbers) for numbers in needed_heads[:144].split(8)], labels,
                      path["circuit_heads"], title)

    strength, results["token_graph"] = token_graph(models["sparse"], clean, corrupt,
                                                   lambda logits: task.metric(logits, slice(0, 1)))
    figures.draw_tokens(strength, results["token_graph"], labels, path["tokens"])
    return list(path.values())


def write_edges(shown, path):
    """edges.csv: every edge by name, with its mean score in both models."""
    def write(temporary):
        with open(temporary, "w", newline="") as f:
            rows = csv.writer(f)
            rows.writerow(["source", "destination", "dense", "sparse"])
            graph = shown["dense"]["graph"]
            for u, v in graph.edges.nonzero().tolist():
                rows.writerow([graph.sources[u], graph.destinations[v],
                               *(f"{s['mean'][u, v].item():.4g}" for s in shown.values())])

    replace(path, write)


def main(flags):
    started = time.time()
    torch.set_num_threads(flags.threads)
    flags.device = pick_device(flags.device)
    models, tok = load(flags)
    task, second = (tasks.make(flags.task, tok, flags.n, seed, flags.corrupt)
                    for seed in (flags.seed, flags.seed + 1))
    flags.out = open_folder(flags.out or os.path.join("out", f"patching-{flags.task}"))
    print(f"{task.name}: {len(task.clean)} prompts of {task.clean.shape[1]} tokens, kept of {task.made}; "
          f"{task.about}")
    results, shown = {"task": task.name, "about": task.about, "tokens": task.clean.shape[1],
                      "prompts_made": task.made, "flags": asdict(flags)}, {}
    runs = {name: behaviour(name, model, task, flags) for name, model in models.items()}
    for name, model in models.items():
        results[name], shown[name] = analyse(name, model, task, second, runs[name], flags)
    compare(results, shown)
    pictures = draw(models, task, tok, results, shown, flags)
    edges = os.path.join(flags.out, "edges.csv")
    write_edges(shown, edges)
    print_table(results)
    print("wrote", write_results(flags.out, started, flags.device, **results), edges, *pictures)


if __name__ == "__main__":
    run(main, Flags, __doc__)
