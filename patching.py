"""
Which heads and edges does a model need for a task? Dense beside sparse.

    python patching.py                      how the model of `python train.py` copies, a minute
    python patching.py --dense gpt2 --sparse out/gpt2 --task ioi --n 100 --out out/ioi
    python patching.py --dense BASE --sparse BASE --adapter FILE --task greater-than --fast

A task is pairs of prompts: a clean one, which the model can do, and a corrupt one with another
answer. Its metric is high where the logits give the clean answer. To patch is to run one prompt with
some activations of the other, and to see how far the metric moves. Gates are deterministic.

First whole heads are patched. Then edges u -> v: the embedding, each head and each MLP write to the
residual stream; each head (by q, k and v), each MLP and the logits read from it. One gradient
estimates the effect of every edge when v alone reads u's corrupt value (EAP, arXiv 2310.10348; with
ig_steps EAP-IG, arXiv 2403.17806). Last a circuit runs: the n strongest edges, all others corrupt; how
they are ranked: plumbing/rerun.py.
"""

import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import Transformer, rope_angle, rotate
from plumbing import circuit_report as report
from plumbing import tasks, tokens
from plumbing.flags import check, results_folder, pick_device, run, write_results
from sparse import allowed_pairs, gate_map

# -----------------------------------------------------------------------------
# one run, and one patch


@torch.no_grad()
def record(model, idx):
    """{name: activation} of a run on idx (N, T): what flows at each tap of model.py."""
    seen = {}
    model(idx, tap=seen.setdefault)  # setdefault(name, t) stores t and returns it
    return seen


@torch.no_grad()
def patch(model, idx, patches):
    """Logits (N, T, vocab) of a run on idx that has the activations of patches {name: t}."""
    return model(idx, tap=patches.get)[0]  # get(name, t) is the patch of that name, else t


# -----------------------------------------------------------------------------
# heads


@torch.no_grad()
def head_patching(model, clean, corrupt, metric):
    """(N, n_layer, n_head): the metric of the corrupt run in which that head writes its clean z.

    clean, corrupt (N, T) int64; metric(logits (N, T, vocab)) -> (N,).
    """
    check_pair(clean, corrupt)
    config, clean_run, corrupt_run = model.config, record(model, clean), record(model, corrupt)
    values = torch.zeros(len(clean), config.n_layer, config.n_head)
    angle = rope_angle(config, clean.shape[1], clean.device) if config.position == "rope" else None
    for l in range(config.n_layer):
        for h in range(config.n_head):
            z = corrupt_run[f"h{l}.attn.z"].clone()  # (N, T, H, D)
            z[:, :, h] = clean_run[f"h{l}.attn.z"][:, :, h]
            # as patch(model, corrupt, {f"h{l}.attn.z": z}), but the layers before it do not change
            x, patches = corrupt_run[f"h{l}.attn.in"], {"attn.z": z}
            for block in model.h[l:]:
                x, _ = block(x, angle, None, patches.get)
                patches = {}
            values[:, l, h] = metric(model.lm_head(model.ln_f(x))).cpu()
    return values


def keep_heads(model, clean, clean_run, corrupt_run, kept):
    """Logits of the clean prompts when heads in `kept` write their clean z, all others the corrupt z.

    clean_run, corrupt_run: what `record` returned; kept: bool (N, n_layer, n_head).
    """
    names = [f"h{l}.attn.z" for l in range(model.config.n_layer)]
    return patch(model, clean, {
        name: torch.where(kept[:, None, l, :, None], clean_run[name], corrupt_run[name])
        for l, name in enumerate(names)})


def check_pair(clean, corrupt):
    if clean.shape != corrupt.shape:
        raise ValueError("clean and corrupt prompts must have one length, got "
                         f"{tuple(clean.shape)} and {tuple(corrupt.shape)}")


# -----------------------------------------------------------------------------
# the graph


class Graph:
    """Who writes to the residual stream (sources), who reads from it (destinations), and the edges.

    sources, in the order of writing: input, a0.h0, a0.h1, ..., m0, a1.h0, ...; destinations, in the
    order of reading: a0.h0<q>, a0.h0<k>, a0.h0<v>, ..., m0, ..., logits. Heads that share k and v
    read them as a group: a0.g0<k>. qkv="merged": a head reads once, a0.h0, or its group, a0.g0.
    edges: bool (n_sources, n_destinations), True where the source is written before it is read.
    """

    def __init__(self, config, qkv="split"):
        if qkv not in ("split", "merged"):
            raise ValueError(f"qkv must be split or merged, got {qkv!r}")
        self.config, self.qkv, self.group = config, qkv, config.n_head // config.n_kv_head
        self.sources, self.destinations = ["input"], []
        self.reads = {"input": []}  # {source: destinations by which what writes it reads}
        written = []  # of each destination: how many sources there are when it reads
        for l in range(config.n_layer):
            heads = {f"a{l}.h{h}": [self.reader(l, h, x) for x in "qkv"] for h in range(config.n_head)}
            for nodes in (heads, {f"m{l}": [f"m{l}"]}):  # all of them read, then all of them write
                # head by head; where heads share, first all q, then all k, then all v
                rows = nodes.values() if self.group == 1 else zip(*nodes.values())
                names = dict.fromkeys(name for row in rows for name in row)  # each once
                written += [len(self.sources)] * len(names)
                self.destinations += names
                self.sources += nodes
                self.reads |= nodes
        self.destinations.append("logits")
        written.append(len(self.sources))
        self.edges = torch.arange(len(self.sources))[:, None] < torch.tensor(written)
        self.column = {name: v for v, name in enumerate(self.destinations)}

    def reader(self, l, h, letter):
        """The destination by which head h of layer l reads its q, k or v."""
        shared = self.group > 1 and (self.qkv == "merged" or letter != "q")
        name = f"a{l}.g{h // self.group}" if shared else f"a{l}.h{h}"
        return name if self.qkv == "merged" else f"{name}<{letter}>"

    def columns(self, l):
        """Destination numbers of layer l's q, k and v, each in the order of c_attn's rows."""
        heads = range(self.config.n_head)
        names = [self.reader(l, h, "q") for h in heads]
        names += [self.reader(l, h, x) for x in "kv" for h in heads[::self.group]]
        return [self.column[name] for name in names]

    def __len__(self):
        return int(self.edges.sum())


# -----------------------------------------------------------------------------
# edge attribution


def edge_attribution(model, clean, corrupt, metric, qkv="split", ig_steps=0):
    """EAP: of every edge the estimate of metric(edge corrupted) - metric(clean), and the Graph.

    clean, corrupt (N, T) int64; metric(logits (N, T, vocab)) -> (N,), high on clean. Scores: (n_sources,
    n_destinations) float32, the mean over prompts; 0 where there is no edge. s(u -> v) is
    (a_u^corrupt - a_u^clean) . dM/dx_v, the gradient at the clean run, gates held; with ig_steps = m
    the gradient is the mean of m runs whose embeddings lie between corrupt and clean (midpoints).
    """
    graph = Graph(model.config, qkv)
    return edge_scores(model, graph, clean, corrupt, metric, ig_steps).mean(0), graph


def edge_scores(model, graph, clean, corrupt, metric, ig_steps=0):
    """As edge_attribution, but of each prompt: (N, n_sources, n_destinations) float32."""
    check_pair(clean, corrupt)
    steps = max(1, ig_steps)
    change = contributions(model, corrupt).sub_(contributions(model, clean))  # (N, S, T, C)
    scores = change.new_zeros(len(clean), *graph.edges.shape)
    for k in range(steps):  # of the way from the corrupt embedding to the clean one
        left = 1 - (k + 0.5) / ig_steps if ig_steps else 0.0
        for columns, g in stream_gradients(model, graph, clean, metric, left * change[:, 0]):
            n = int(graph.edges[:, columns[0]].sum())  # sources that are written when these read
            score = change[:, :n].flatten(2) @ g.flatten(2).mT / steps  # (N, n, len(columns))
            # a column that comes more than once, of merged destinations, gets the sum
            scores[:, :n].index_add_(2, torch.tensor(columns, device=score.device), score)
    return scores.float()


@torch.no_grad()
def contributions(model, idx):
    """What each source writes to the residual stream, (N, n_sources, T, C)."""
    seen = record(model, idx)
    parts = [seen["embed"][:, None]]
    for l, block in enumerate(model.h):
        parts += [head_outputs(block, seen[f"h{l}.attn.z"]), seen[f"h{l}.mlp.out"][:, None]]
    return torch.cat(parts, dim=1)


def head_outputs(block, z):
    """z (N, T, H, D) of each head through its part of W_O, without the bias: (N, H, T, C)."""
    return torch.einsum("nthd,chd->nhtc", z, block.attn.c_proj.weight.unflatten(1, z.shape[2:]))


def stream_gradients(model, graph, clean, metric, shift):
    """Yields (columns, dM/dx (N, len(columns), T, C)), x the stream that each of these reads.

    No head needs a stream of its own: dM/dx of its q is dM/dq, taken back through W_q and the norm.
    """
    names = [f"h{l}.{x}" for l in range(len(model.h)) for x in ("attn.q", "attn.k", "attn.v", "mlp.in")]
    grads, seen = gradients(model, clean, metric, names + ["final"], shift)
    for l, block in enumerate(model.h):
        g = torch.cat([grads[f"h{l}.attn.{x}"] for x in "qkv"], dim=2)  # (N, T, H + 2 G, D)
        W = block.attn.c_attn.weight.detach().unflatten(0, g.shape[2:])  # (H + 2 G, D, C)
        g = g.transpose(1, 2) @ W  # (N, H + 2 G, T, C)
        _, back = torch.func.vjp(block.ln_1, seen[f"h{l}.attn.in"].detach()[:, None].expand_as(g))
        yield graph.columns(l), back(g)[0]
        yield [graph.column[f"m{l}"]], grads[f"h{l}.mlp.in"][:, None]
    yield [graph.column["logits"]], grads["final"][:, None]


def gradients(model, idx, metric, names, shift=0.0):
    """({name: dM/d activation} of names, what was recorded); shift (N, T, C): of the embedding."""
    seen = {}

    def tap(name, t):
        if name == "embed":
            t = (t + shift).detach().requires_grad_()
        if name.endswith(("mlp.in", "final")):
            t = t.clone()  # the gradient of reading, without that of the stream that goes on
        if name.endswith(".z") and model.config.sparse:
            q, k, v = (seen[name[:-1] + x] for x in "qkv")
            t, _ = checkpoint(attend, model, q, k, v, use_reentrant=False)  # keeps no T x T map
        seen[name] = t
        return t

    with torch.enable_grad():
        M = metric(model(idx, tap=tap)[0]).sum()
    return dict(zip(names, torch.autograd.grad(M, [seen[name] for name in names]))), seen


def attend(model, q, k, v):
    """z (N, T, H, D) and the weights A a (N, H, T, T) of q, k, v (N, T, heads, D) as at the taps.

    The model's attention, but it shows its weights, and its gates are held: they have no gradient. A
    gate is a step, so that is the truth off the threshold; the model's straight-through one is a surrogate.
    """
    config, T = model.config, q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (N, heads, T, D)
    if config.position == "rope":
        q, k = (rotate(x, rope_angle(config, T, x.device)) for x in (q, k))
    allowed = allowed_pairs(T, config.causal, q.device)
    A = gate_map(q, k, config.gate_bias, causal=config.causal) if config.sparse else allowed
    k, v = (x.repeat_interleave(config.n_head // config.n_kv_head, dim=1) for x in (k, v))
    s = (q @ k.mT / config.head_size**0.5).masked_fill(~allowed, -torch.inf)
    weights = A * s.softmax(-1)
    return (weights @ v).transpose(1, 2), weights


# -----------------------------------------------------------------------------
# circuits, by running them


@torch.no_grad()
def patch_edges(model, graph, clean, instead, edges):
    """Logits (N, T, vocab) of the clean prompts when only `edges` carry what their sources write.

    All other edges carry `instead` (N or 1, n_sources, T, C), see `ablated`. Each destination v reads
    a stream of its own: x_v = x + the sum of instead_u - a_u over the edges u -> v that are cut.
    """
    H, G, D = model.config.n_head, model.config.n_kv_head, model.config.head_size
    cut = (graph.edges & ~edges.cpu()).T.to(instead)  # (n_destinations, n_sources), 1.0 or 0.0
    change = instead.expand(len(clean), -1, -1, -1).clone()  # minus a_u, as soon as u has written
    x = model.wte(clean)
    if model.config.position == "learned":
        x = x + model.wpe.weight[:clean.shape[1]]
    change[:, 0] -= x
    n = 1  # sources that have written

    def read(*columns):  # (N, len(columns), T, C)
        return x[:, None] + (cut[columns, :n] @ change[:, :n].flatten(2)).unflatten(2, x.shape[1:])

    for l, block in enumerate(model.h):
        W = block.attn.c_attn.weight.unflatten(0, (-1, D))  # a q, k or v each, (H + 2 G, D, C)
        y = block.ln_1(read(*graph.columns(l))) @ W.mT  # (N, H + 2 G, T, D)
        if block.attn.c_attn.bias is not None:
            y = y + block.attn.c_attn.bias.view(-1, 1, D)
        z, _ = attend(model, *y.transpose(1, 2).split([H, G, G], dim=2))
        change[:, n:n + H] -= head_outputs(block, z)
        x, n = x + block.attn.c_proj(z.flatten(2)), n + H
        m = block.mlp(block.ln_2(read(graph.column[f"m{l}"])))[:, 0]
        change[:, n] -= m
        x, n = x + m, n + 1
    return model.lm_head(model.ln_f(read(graph.column["logits"])[:, 0]))


def ablated(model, corrupt, ablation="resample"):
    """What cut edges carry, (N or 1, n_sources, T, C): corrupt values, their mean over prompts, 0."""
    a = contributions(model, corrupt)
    return {"resample": a, "mean": a.mean(0, keepdim=True), "zero": torch.zeros_like(a[:1])}[ablation]


@torch.no_grad()
def exact_edges(model, graph, clean, corrupt, metric):
    """What edge_attribution estimates, (n_sources, n_destinations), by one forward pass an edge."""
    effects, instead = torch.zeros(graph.edges.shape), ablated(model, corrupt)
    full = metric(model(clean)[0])
    for u, v in tqdm(graph.edges.nonzero().tolist(), desc="edges", disable=None, leave=False):
        edges = graph.edges.clone()
        edges[u, v] = False
        effects[u, v] = (metric(patch_edges(model, graph, clean, instead, edges)) - full).mean()
    return effects


# -----------------------------------------------------------------------------
# edges between tokens


def token_edges(model, clean, corrupt, metric):
    """(N, n_layer, n_head, T, T): the estimate for each edge from token j to token i of a head.

    s_ij = (m^corrupt - m^clean)_ij . dM/dx_i, and m_ij = A_ij a_ij v_j W_O is what i reads from j.
    Exactly 0.0 where the gate is shut in both runs. The sum over j is the head's score at position i.
    """
    check_pair(clean, corrupt)
    config, corrupt_run, scores = model.config, record(model, corrupt), []
    names = [f"h{l}.attn.z" for l in range(config.n_layer)]
    grads, clean_run = gradients(model, clean, metric, names)
    with torch.no_grad():
        for l, name in enumerate(names):
            g, terms = grads[name].transpose(1, 2), []  # dM/dz = dM/dx W_O^T, (N, H, T, D)
            for seen in (clean_run, corrupt_run):
                q, k, v = (seen[f"h{l}.attn.{x}"] for x in "qkv")
                _, weights = attend(model, q, k, v)
                v = v.repeat_interleave(config.n_head // config.n_kv_head, dim=2).transpose(1, 2)
                terms.append(weights * (g @ v.mT))  # (N, H, T, T)
            scores.append(terms[1] - terms[0])
    return torch.stack(scores, dim=1)


@torch.no_grad()
def attention_maps(model, idx):
    """A a of prompts (N, T): (N, n_layer, n_head, T, T) on the CPU, 0.0 where a gate is shut."""
    seen = record(model, idx)
    return torch.stack([attend(model, *(seen[f"h{l}.attn.{x}"] for x in "qkv"))[1]
                        for l in range(model.config.n_layer)], dim=1).cpu()


# -----------------------------------------------------------------------------
# the command


@dataclass
class Flags:
    dense: str | None = None  # hub name, Hugging Face folder or checkpoint; default SPARSE/dense
    sparse: str = "out/scratch"  # a folder of train.py, or with --dense any checkpoint
    control: str | None = None  # the dense control, to show between them; default SPARSE/control
    adapter: str | None = None  # adapter.safetensors on top of --sparse
    task: str = "induction"  # ioi, greater-than, induction, bracket or addition
    corrupt: str | None = None  # which corruption of the task, see plumbing/tasks.py
    n: int = 32  # prompts
    out: str | None = None  # folder for results.json, edges.csv and the figures
    qkv: str = "split"  # split: a head reads by q, k and v; merged: once
    ranking: str = "rerun"  # of a circuit's edges: exact, rerun, eap-ig or eap; RESULTS.md compares them
    ablation: str = "resample"  # of edges outside a circuit: resample, mean or zero
    fast: bool = False  # at most 8 prompts, a coarse grid and no CPR
    force: bool = False  # go on with a model that can not do the task
    tokenizer: str | None = None  # gpt2, bytes or a tokenizer.json; default: the model's own
    seed: int = 0  # of prompts and bootstrap
    per_decade: int = 20  # circuit sizes tried in each factor of ten
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        check(self, {"n per_decade": "at least 1", "qkv": "split | merged", "ranking": " | ".join(report.RANKINGS),
                     "task": " | ".join(tasks.NAMES), "ablation": "resample | mean | zero"})
        if self.fast:
            self.n, self.per_decade = min(self.n, 8), min(self.per_decade, 4)


def load(flags):
    """({"dense": model, "control": if there is one, "sparse": model}, tokenizer)."""
    flags.dense, flags.control = report.beside(flags)
    models = {"dense": Transformer.from_pretrained(flags.dense)}
    if flags.control:
        models["control"] = Transformer.from_pretrained(flags.control)
    models["sparse"] = Transformer.from_pretrained(flags.sparse, flags.adapter)
    report.check_models(flags, {name: model.config for name, model in models.items()})
    for model in models.values():
        model.eval().requires_grad_(False).to(flags.device)
    if flags.task == "addition":
        return models, tasks.Digits()
    return models, tokens.tokenizer(tokens.name_for(
        models["dense"].config.vocab_size, flags.tokenizer, flags.dense))


def main(flags):
    started = time.time()
    flags.device = pick_device(flags.device)
    models, tok = load(flags)
    task, second = (tasks.make(flags.task, tok, flags.n, seed, flags.corrupt)
                    for seed in (flags.seed, flags.seed + 1))
    flags.out = results_folder(flags.out or f"out/patching-{flags.task}")
    print("{}: {} prompts of {} tokens, kept of {}; {}".format(task.name, *task.clean.shape, task.made, task.about))
    functions = SimpleNamespace(**{f.__name__: f for f in (
        record, head_patching, keep_heads, edge_scores, patch_edges, ablated, exact_edges, attention_maps,
        attend, contributions, gradients, token_edges)})
    studies = {name: report.Study(name, model, Graph(model.config, flags.qkv), flags, functions)
               for name, model in models.items()}
    for study in studies.values():
        study.check(task)
    for study in studies.values():
        study.analyse(task, second)
    results = report.compare(studies, flags.seed)
    pictures = report.draw(studies, task, tok, results)
    report.print_table(results)
    wrote = write_results(flags.out, started, flags.device, task=task.name, about=task.about,
                          tokens=task.clean.shape[1], prompts_made=task.made, flags=asdict(flags), **results)
    print("wrote", wrote, report.write_edges(studies, f"{flags.out}/edges.csv"), *pictures)


if __name__ == "__main__":
    run(main, Flags, __doc__)
