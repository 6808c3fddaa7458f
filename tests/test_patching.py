"""Edge attribution, patching and circuits against a forward pass written out edge by edge.

The oracle, `by_hand`, keeps the contribution of every source as a tensor of its own and lets every
destination add up its own input, so any edge can carry any value. Its first tests hold it against
model.py; all others hold patching.py against it. Everything is float64.
"""

import importlib
import math
from functools import cache

import pytest
import torch

from model import Config, Transformer, rope_angle

GPT2 = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, n_inner=12)
LLAMA = GPT2 | dict(n_kv_head=1, norm="rmsnorm", position="rope", mlp="swiglu", attention_bias=False,
                    mlp_bias=False, tied_head=False)
GROUPS = LLAMA | dict(n_head=4, n_kv_head=2, n_embd=16, attention_bias=True, mlp_bias=True)
GATED = dict(sparse=True, gate_bias=0.2)
MODELS = {"gpt2": GPT2, "gpt2-gated": GPT2 | GATED, "llama": LLAMA, "llama-gated": LLAMA | GATED,
          "two-groups-gated": GROUPS | GATED, "both-ways-gated": GPT2 | GATED | dict(causal=False)}
UNGATED = ["gpt2", "llama"]

every_model = pytest.mark.parametrize("name", MODELS)
both_qkv = pytest.mark.parametrize("qkv", ["split", "merged"])


@pytest.fixture
def patching():
    return importlib.import_module("patching")


@cache
def build(name):
    """A float64 model with large random weights and biases, and clean and corrupt prompts."""
    torch.manual_seed(4)
    config = Config(**MODELS[name])
    model = Transformer(config).double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            scale = 0.5 if p.dim() == 1 else 1.5 / math.sqrt(p.shape[1])
            p.normal_(std=scale)
            if "ln_" in key and key.endswith("weight"):
                p.mul_(0.3).add_(1)
        model.wte.weight.mul_(2).add_(torch.randn(config.n_embd))  # away from 0: norms bend there
    clean, corrupt = torch.randint(11, (2, 3, 5))
    return model, clean, corrupt


def metric(logits):
    """Not linear, and not of the last position alone: (n, T, vocab) -> (n,)."""
    logp = logits.log_softmax(-1)
    return logp[:, -1, 1] + torch.tanh(logits[:, 2, 4] / 3) - 0.3 * logp[:, -2, 7]


def close(got, want, rel=1e-5, atol=None):
    """Each number of got to the relative accuracy rel; float32 of sums that cancel to 1e-7."""
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    scale = want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=rel, atol=1e-7 * scale if atol is None else atol)


# -----------------------------------------------------------------------------
# the oracle


def destination(config, qkv, l, letter, h):
    """Who reads the residual stream for the q, k or v that query head h of layer l works with."""
    group, grouped = h // (config.n_head // config.n_kv_head), config.n_kv_head < config.n_head
    if qkv == "merged":
        return f"a{l}.g{group}" if grouped else f"a{l}.h{h}"
    return f"a{l}.g{group}<{letter}>" if grouped and letter in "kv" else f"a{l}.h{h}<{letter}>"


def normed(x, norm, config):
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * norm.weight
    return x + norm.bias if config.norm == "layernorm" else x


def turned(x, config):
    """RoPE on x (N, T, D), as a product of complex numbers."""
    angle = rope_angle(config, x.shape[1], "cpu")
    half = x.shape[2] // 2
    y = torch.complex(x[..., :half], x[..., half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([y.real, y.imag], -1)


def head(model, l, h, read, gates):
    """One head: (gate (N, T, T), m (N, T, T, C)), m_ij = A_ij a_ij v_j W_O. read(letter) -> x."""
    config, attn, D = model.config, model.h[l].attn, model.config.head_size
    group = h // (config.n_head // config.n_kv_head)
    first = {"q": h * D, "k": config.n_embd + group * D,
             "v": config.n_embd + (config.n_kv_head + group) * D}
    x = {}
    for letter, start in first.items():
        x[letter] = normed(read(letter), model.h[l].ln_1, config) @ attn.c_attn.weight[start:start + D].T
        if config.attention_bias:
            x[letter] = x[letter] + attn.c_attn.bias[start:start + D]
    if config.position == "rope":
        x["q"], x["k"] = turned(x["q"], config), turned(x["k"], config)
    s = torch.einsum("nid,njd->nij", x["q"], x["k"]) / D**0.5
    allowed = torch.ones_like(s[0]).bool()
    if config.causal:
        allowed = torch.tensor([[j <= i for j in range(len(s[0]))] for i in range(len(s[0]))])
    e = torch.where(allowed, s.exp(), 0.0)
    a = e / e.sum(-1, keepdim=True)
    gate = allowed & (s + config.gate_bias > 0) if config.sparse else allowed.expand_as(s)
    if gates is not None:
        gate = gates[l, h]
    moved = x["v"] @ attn.c_proj.weight[:, h * D:(h + 1) * D].T
    return gate, torch.einsum("nij,njc->nijc", gate * a, moved)


def mlp(model, l, x):
    m = model.h[l].mlp
    inner = m.c_fc(x)
    if model.config.mlp == "swiglu":
        gate = m.c_gate(x)
        return m.c_proj(inner * gate / (1 + torch.exp(-gate)))
    cubic = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
    return m.c_proj(0.5 * inner * (1 + torch.tanh(cubic)))


class Run:
    """by_hand's result: logits, and of this run the contributions a[source], gates and m[l, h].

    edges lists the pairs (source, destination) in the order in which they were read.
    """


def embedding(model, idx):
    x = model.wte.weight[idx]
    return x + model.wpe.weight[: idx.shape[1]] if model.config.position == "learned" else x


def by_hand(model, idx, carry=None, gates=None, qkv="split", embed=None):
    """The forward pass in which edge u -> v carries carry(u, v, a), a the contribution of u now.

    gates: {(layer, head): (N, T, T)} to hold fixed, else they follow q and k. embed: in place of
    the embedding of idx.
    """
    config, run, written = model.config, Run(), 0.0
    run.a, run.gates, run.m, run.edges = {}, {}, {}, []
    run.a["input"] = embedding(model, idx) if embed is None else embed

    def read(v):
        total = torch.zeros_like(run.a["input"]) + written  # the biases b_O, which no edge carries
        for u, a in run.a.items():
            if (u, v) not in run.edges:
                run.edges.append((u, v))
            total = total + (a if carry is None else carry(u, v, a))
        return total

    for l in range(config.n_layer):
        heads = {}
        for h in range(config.n_head):
            run.gates[l, h], run.m[l, h] = head(
                model, l, h, lambda letter: read(destination(config, qkv, l, letter, h)), gates)
            heads[f"a{l}.h{h}"] = run.m[l, h].sum(2)
        run.a.update(heads)  # all at once: heads of a layer do not feed each other
        if config.attention_bias:
            written = written + model.h[l].attn.c_proj.bias
        run.a[f"m{l}"] = mlp(model, l, normed(read(f"m{l}"), model.h[l].ln_2, config))
    run.logits = normed(read("logits"), model.ln_f, config) @ model.lm_head.weight.T
    return run


@cache
def runs(name, qkv="split"):
    """The clean and the corrupt run; cached, nobody writes to them."""
    model, clean, corrupt = build(name)
    with torch.no_grad():
        return by_hand(model, clean, qkv=qkv), by_hand(model, corrupt, qkv=qkv)


@cache
def slopes(name, qkv="split", steps=0):
    """{edge: d metric / d share of (corrupt - clean) that this edge carries}, mean over prompts.

    Autograd through the written-out pass, gates held. steps > 0: the mean of the slopes at that many
    midpoints between corrupt and clean embedding, each with the gates of its own run.
    """
    model, clean, _ = build(name)
    at, other = runs(name, qkv)
    change = {u: other.a[u] - at.a[u] for u in at.a}
    share = {edge: torch.zeros((), dtype=torch.float64, requires_grad=True) for edge in at.edges}
    total = dict.fromkeys(share, 0.0)
    for k in range(max(steps, 1)):
        here = other.a["input"] - (k + 0.5) / steps * change["input"] if steps else at.a["input"]
        gates = by_hand(model, clean, embed=here, qkv=qkv).gates
        run = by_hand(model, clean, lambda u, v, a: a + share[u, v] * change[u], gates, qkv, here)
        for edge, g in zip(share, torch.autograd.grad(metric(run.logits).mean(), [*share.values()])):
            total[edge] += g.item() / max(steps, 1)
    return total


def node_slopes(name):
    """{source: the same of all its edges at once}."""
    return {u: sum(slope for (source, _), slope in slopes(name).items() if source == u)
            for u in runs(name)[0].a}


def mask_of(graph, pairs):
    mask = torch.zeros(len(graph.sources), len(graph.destinations), dtype=torch.bool)
    for u, v in pairs:
        mask[graph.sources.index(u), graph.destinations.index(v)] = True
    return mask


def matrix_of(graph, values):
    matrix = torch.zeros(len(graph.sources), len(graph.destinations), dtype=torch.float64)
    for (u, v), value in values.items():
        matrix[graph.sources.index(u), graph.destinations.index(v)] = value
    return matrix


# -----------------------------------------------------------------------------
# the oracle against model.py


@every_model
@both_qkv
def test_oracle_without_a_patch_is_the_model(name, qkv):
    """No edge changed: the model's logits, its gates; every edge corrupt: the corrupt run's."""
    model, clean, corrupt = build(name)
    a, b = runs(name, qkv)
    with torch.no_grad():
        for run, idx in ((a, clean), (b, corrupt)):
            logits, _, edges = model(idx)
            torch.testing.assert_close(run.logits, logits, rtol=0, atol=1e-9)
            if edges is not None:
                share = torch.stack([g.double().mean() for g in run.gates.values()])
                allowed = 0.6 if model.config.causal else 1.0  # 15 of 25 pairs
                torch.testing.assert_close(share / allowed, edges.open.flatten().double())
        swapped = by_hand(model, clean, lambda u, v, _: b.a[u], qkv=qkv)
    torch.testing.assert_close(swapped.logits, b.logits, rtol=0, atol=1e-9)
    assert len(a.edges) == len(set(a.edges))


@pytest.mark.parametrize("name", [name for name in MODELS if "gated" in name])
def test_the_gated_models_have_gates_of_every_kind(name):
    """Open and shut in either run, each often: no test here passes for want of gates."""
    a, b = (torch.stack(list(run.gates.values())) for run in runs(name))
    allowed = torch.ones(a.shape[-2:]).bool()
    allowed = allowed.tril() if build(name)[0].config.causal else allowed
    for kind in (a & b, a & ~b, ~a & b, ~a & ~b):
        assert (kind & allowed).sum() >= 10


@every_model
@both_qkv
def test_oracle_slopes_are_differences(name, qkv):
    """Autograd's slopes, of every seventh edge, against central differences of fourth order."""
    model, clean, _ = build(name)
    at, other = runs(name, qkv)
    eps = 3e-4
    for edge in at.edges[::7]:
        total = 0.0
        for times, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            def carry(u, v, a):
                return a + times * eps * (other.a[u] - at.a[u]) if (u, v) == edge else a

            with torch.no_grad():
                M = metric(by_hand(model, clean, carry, at.gates, qkv).logits).mean().item()
            total += weight * M / (12 * eps)
        assert slopes(name, qkv)[edge] == pytest.approx(total, rel=1e-6, abs=1e-8)


@every_model
def test_oracle_slope_of_a_node_is_the_models(name):
    """All edges of one source at once: the same slope as adding to the model's own activation.

    The model's is a difference, so small that no gate turns: its autograd is straight-through.
    """
    model, clean, _ = build(name)
    at, other = runs(name)
    eps = 1e-6
    for u, slope in node_slopes(name).items():
        change = other.a[u] - at.a[u]

        def run(e):
            place = {"i": "embed", "a": f"h{u[1]}.attn.out", "m": f"h{u[1]}.mlp.out"}[u[0]]
            tap = lambda key, t: t + e * change if key == place else t  # noqa: E731
            with torch.no_grad():
                return metric(model(clean, tap=tap)[0]).mean().item()

        assert slope == pytest.approx((run(eps) - run(-eps)) / (2 * eps), rel=1e-5, abs=1e-7)
    assert len(at.a) == 1 + 2 * (model.config.n_head + 1)


@pytest.mark.parametrize("name", UNGATED)
def test_oracle_slope_of_a_head_is_autograds(name):
    """Without gates the model's own gradient at z gives the same."""
    model, clean, corrupt = build(name)
    kept = {}

    def tap(key, t):
        return kept.setdefault(key, t) if key.endswith(".z") else t

    gradients = torch.autograd.grad(metric(model(clean, tap=tap)[0]).mean(), [
        kept[f"h{l}.attn.z"] for l in range(model.config.n_layer)])
    clean_z, kept = kept, {}
    with torch.no_grad():
        model(corrupt, tap=tap)
    for l, g in enumerate(gradients):
        change = kept[f"h{l}.attn.z"] - clean_z[f"h{l}.attn.z"]
        for h in range(model.config.n_head):
            want = (change * g)[:, :, h].sum().item()
            assert node_slopes(name)[f"a{l}.h{h}"] == pytest.approx(want, rel=1e-6, abs=1e-9)


# -----------------------------------------------------------------------------
# the graph


@every_model
@both_qkv
def test_graph_has_the_edges_of_the_forward_pass(patching, name, qkv):
    """graph.edges holds what the written-out pass reads, no more; edge_attribution returns it."""
    model, clean, corrupt = build(name)
    run = runs(name, qkv)[0]
    scores, graph = patching.edge_attribution(model, clean, corrupt, metric, qkv=qkv)
    assert list(graph.sources) == list(run.a)
    assert sorted(graph.destinations) == sorted({v for _, v in run.edges})
    assert torch.equal(graph.edges, mask_of(graph, run.edges)) and len(graph) == len(run.edges)
    assert scores.dtype == torch.float32 and scores.shape == graph.edges.shape
    assert (scores[~graph.edges] == 0).all()
    again = patching.Graph(model.config, qkv)
    assert (list(again.sources), list(again.destinations)) == (
        list(graph.sources), list(graph.destinations))
    assert torch.equal(again.edges, graph.edges)


def test_names_and_their_order(patching):
    """Sources and destinations in the order of the forward pass, q, k, v of a head together."""
    graph = patching.Graph(Config(**GPT2), "split")
    assert list(graph.sources) == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    layer = ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "a0.h1<q>", "a0.h1<k>", "a0.h1<v>", "m0"]
    assert list(graph.destinations) == layer + [v.replace("0", "1", 1) for v in layer] + ["logits"]
    merged = patching.Graph(Config(**GPT2), "merged")
    assert list(merged.destinations) == ["a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"]
    groups = patching.Graph(Config(**LLAMA), "merged")
    assert list(groups.destinations) == ["a0.g0", "m0", "a1.g0", "m1", "logits"]


@pytest.mark.parametrize("layers, heads, kv_heads, split, merged", [
    (2, 2, 2, 46, 26), (3, 4, 4, 262, 118), (12, 12, 12, 32491, 11611), (16, 32, 8, 195865, None),
    (30, 9, 3, 70651, None)])
def test_sizes_of_graphs(patching, layers, heads, kv_heads, split, merged):
    """Known sizes; GPT-2 small's are 157 x 445. The last two are Llama-3.2-1B and SmolLM2-135M."""
    config = Config(n_layer=layers, n_head=heads, n_kv_head=kv_heads, n_embd=heads * 4)
    graph = patching.Graph(config, "split")
    assert len(graph) == split == graph.edges.sum()
    assert merged is None or len(patching.Graph(config, "merged")) == merged
    if layers == heads == 12:
        assert graph.edges.shape == (157, 445)


# -----------------------------------------------------------------------------
# scores


@every_model
@both_qkv
def test_edge_scores_are_slopes(patching, name, qkv):
    """Each score is the slope of the metric as that one edge moves from clean to corrupt."""
    model, clean, corrupt = build(name)
    scores, graph = patching.edge_attribution(model, clean, corrupt, metric, qkv=qkv)
    close(scores, matrix_of(graph, slopes(name, qkv)))


@every_model
@both_qkv
def test_integrated_edge_scores_are_mean_slopes(patching, name, qkv):
    """ig_steps=3: the mean slope at three midpoints, the embedding alone interpolated.

    Gates are those of each interpolated run, held fixed in its gradient.
    """
    model, clean, corrupt = build(name)
    scores, graph = patching.edge_attribution(model, clean, corrupt, metric, qkv=qkv, ig_steps=3)
    close(scores, matrix_of(graph, slopes(name, qkv, steps=3)))


@pytest.mark.parametrize("name", UNGATED)
@both_qkv
def test_integrated_scores_are_complete(patching, name, qkv):
    """Without gates the edges out of the input sum to M(corrupt) - M(clean)."""
    model, clean, corrupt = build(name)
    with torch.no_grad():
        gap = (metric(model(corrupt)[0]) - metric(model(clean)[0])).mean().item()
    scores, _ = patching.edge_attribution(model, clean, corrupt, metric, qkv=qkv, ig_steps=50)
    assert scores[0].sum().item() == pytest.approx(gap, rel=0.01)


@every_model
@both_qkv
def test_node_scores_are_sums_of_edge_scores(patching, name, qkv):
    """A source's own slope, of all that it writes, is the sum over its outgoing edges."""
    model, clean, corrupt = build(name)
    scores, graph = patching.edge_attribution(model, clean, corrupt, metric, qkv=qkv)
    nodes = node_slopes(name)
    assert list(nodes) == graph.sources
    close(scores.double().sum(1), [*nodes.values()], atol=1e-6 * scores.abs().max().item())


@every_model
def test_merged_scores_are_sums_of_split_ones(patching, name):
    """A head that reads once has the sum of its q, k and v scores; a group, of its members'."""
    model, clean, corrupt = build(name)
    split, fine = patching.edge_attribution(model, clean, corrupt, metric, qkv="split")
    merged, coarse = patching.edge_attribution(model, clean, corrupt, metric, qkv="merged")
    config, parts = model.config, {v: {v} for v in coarse.destinations}
    for l in range(config.n_layer):
        for h in range(config.n_head):
            parts[destination(config, "merged", l, "q", h)].update(
                destination(config, "split", l, letter, h) for letter in "qkv")
    for j, v in enumerate(coarse.destinations):
        columns = [i for i, name_ in enumerate(fine.destinations) if name_ in parts[v]]
        close(merged[:, j], split[:, columns].double().sum(1), atol=1e-6 * split.abs().max().item())


@every_model
def test_scores_are_means_over_prompts(patching, name):
    """Of a batch: the mean of its prompts' own. No gradient is left on the model."""
    model, clean, corrupt = build(name)
    whole = patching.edge_attribution(model, clean, corrupt, metric)[0]
    single = [patching.edge_attribution(model, clean[n:n + 1], corrupt[n:n + 1], metric)[0]
              for n in range(len(clean))]
    close(whole, torch.stack(single).double().mean(0), atol=1e-6 * whole.abs().max().item())
    each = patching.edge_scores(model, patching.Graph(model.config), clean, corrupt, metric)
    close(each, torch.stack(single), atol=1e-6 * whole.abs().max().item())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2-gated", "llama-gated"])
def test_scores_of_a_float32_model(patching, name):
    """What models are run in: the float64 scores to 1e-4 of the largest."""
    model, clean, corrupt = build(name)
    single = Transformer(model.config)
    single.load_state_dict(model.state_dict())
    for function in (patching.edge_attribution, patching.token_edges):
        got, want = function(single, clean, corrupt, metric), function(model, clean, corrupt, metric)
        if function is patching.edge_attribution:
            got, want = got[0], want[0]
        close(got, want, rel=0, atol=1e-4 * want.abs().max().item())


@every_model
@both_qkv
@pytest.mark.parametrize("ig_steps", [0, 2])
def test_nothing_corrupt_gives_exact_zeros(patching, name, qkv, ig_steps):
    """Corrupt equal to clean: every score of every kind is 0.0, not only small."""
    model, clean, _ = build(name)
    scores = patching.edge_attribution(model, clean, clean, metric, qkv=qkv, ig_steps=ig_steps)[0]
    assert (scores == 0).all()
    assert (patching.token_edges(model, clean, clean, metric) == 0).all()


@every_model
def test_token_edges(patching, name):
    """s_ij is the change of what i reads from j along the metric's gradient, summing to the head's.

    It is exactly 0.0 where the gate is shut in both runs, and where j is not allowed.
    """
    model, clean, corrupt = build(name)
    at, other = runs(name)
    push = {u: torch.zeros_like(a, requires_grad=True) for u, a in at.a.items()}
    M = metric(by_hand(model, clean, lambda u, v, a: a + push[u], at.gates).logits).sum()
    gradients = dict(zip(push, torch.autograd.grad(M, list(push.values()))))
    got = patching.token_edges(model, clean, corrupt, metric)
    N, T = clean.shape
    L, H = model.config.n_layer, model.config.n_head
    assert got.shape == (N, L, H, T, T)
    for l, h in at.m:
        g = gradients[f"a{l}.h{h}"]
        want = torch.einsum("nijc,nic->nij", other.m[l, h] - at.m[l, h], g)
        close(got[:, l, h], want)
        assert (got[:, l, h][~(at.gates[l, h] | other.gates[l, h])] == 0).all()
        close(got[:, l, h].sum(-1), ((other.a[f"a{l}.h{h}"] - at.a[f"a{l}.h{h}"]) * g).sum(-1),
              atol=1e-6 * want.abs().max().item())
        node = node_slopes(name)[f"a{l}.h{h}"]
        assert got[:, l, h].sum().item() / N == pytest.approx(node, rel=1e-8, abs=1e-10)


# -----------------------------------------------------------------------------
# patching


@every_model
@both_qkv
def test_full_and_empty_circuits(patching, name, qkv):
    """All edges kept: the clean run; none kept, all carrying corrupt values: the corrupt run."""
    model, clean, corrupt = build(name)
    graph = patching.Graph(model.config, qkv)
    with torch.no_grad():
        want = model(clean)[0], model(corrupt)[0]
        for edges, logits in zip((graph.edges, torch.zeros_like(graph.edges)), want):
            got = patching.patch_edges(model, graph, clean, patching.ablated(model, corrupt), edges)
            assert got.shape == logits.shape
            torch.testing.assert_close(got, logits, rtol=0, atol=1e-8)
            torch.testing.assert_close(metric(got), metric(logits), rtol=0, atol=1e-5)
        for ablation in ("zero", "mean"):
            instead = patching.ablated(model, corrupt, ablation)
            got = patching.patch_edges(model, graph, clean, instead, graph.edges)
            torch.testing.assert_close(got, want[0], rtol=0, atol=1e-8)


@every_model
@both_qkv
def test_one_edge_removed(patching, name, qkv):
    """One edge corrupt, all that follows computed again, gates too: the exact effect of each."""
    model, clean, corrupt = build(name)
    graph = patching.Graph(model.config, qkv)
    at, other = runs(name, qkv)
    instead = patching.ablated(model, corrupt)
    for edge in at.edges:
        with torch.no_grad():
            want = by_hand(model, clean, lambda u, v, a: other.a[u] if (u, v) == edge else a, qkv=qkv)
            got = patching.patch_edges(model, graph, clean, instead, graph.edges & ~mask_of(graph, [edge]))
        torch.testing.assert_close(got, want.logits, rtol=0, atol=1e-8, msg=lambda m: f"{edge}: {m}")


@pytest.mark.parametrize("name", ["gpt2-gated", "llama-gated"])
def test_exact_edges_are_effects(patching, name):
    """Of every edge, metric with it corrupt minus metric without a patch, the mean over prompts."""
    model, clean, corrupt = build(name)
    at, other = runs(name)
    graph, want = patching.Graph(model.config), {}
    for edge in at.edges:
        with torch.no_grad():
            run = by_hand(model, clean, lambda u, v, a: other.a[u] if (u, v) == edge else a)
        want[edge] = (metric(run.logits) - metric(at.logits)).mean().item()
    close(patching.exact_edges(model, graph, clean, corrupt, metric), matrix_of(graph, want))


@every_model
@both_qkv
@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_random_circuits(patching, name, qkv, ablation):
    """Circuits of 10% to 90% of the edges; the others carry corrupt values, zeros or means.

    The mean is over the prompts of the corrupt run, one a position.
    """
    model, clean, corrupt = build(name)
    graph = patching.Graph(model.config, qkv)
    at, other = runs(name, qkv)
    instead = {u: {"resample": a, "zero": torch.zeros_like(a),
                   "mean": a.mean(0, keepdim=True).expand_as(a)}[ablation] for u, a in other.a.items()}
    random = torch.Generator().manual_seed(1)
    for share in (0.0, 0.1, 0.5, 0.9):
        keep = {edge for edge in at.edges if torch.rand((), generator=random) < share}
        with torch.no_grad():
            want = by_hand(model, clean, lambda u, v, a: a if (u, v) in keep else instead[u], qkv=qkv)
            got = patching.patch_edges(model, graph, clean, patching.ablated(model, corrupt, ablation),
                                       mask_of(graph, keep))
        torch.testing.assert_close(got, want.logits, rtol=0, atol=1e-8)


@every_model
def test_head_patching(patching, name):
    """The corrupt run with one head's clean output, for every head: by hand and by the model's tap."""
    model, clean, corrupt = build(name)
    at, other = runs(name)
    got = patching.head_patching(model, clean, corrupt, metric)
    L, H = model.config.n_layer, model.config.n_head
    assert got.shape == (len(clean), L, H)
    clean_z = {}
    with torch.no_grad():
        model(clean, tap=lambda key, t: clean_z.setdefault(key, t))
        for l in range(L):
            for h in range(H):
                name_ = f"a{l}.h{h}"
                run = by_hand(model, corrupt, lambda u, v, a: at.a[u] if u == name_ else a)

                def tap(key, t):
                    if key != f"h{l}.attn.z":
                        return t
                    return torch.stack([clean_z[key][:, :, n] if n == h else t[:, :, n]
                                        for n in range(H)], 2)

                want = metric(model(corrupt, tap=tap)[0])
                torch.testing.assert_close(metric(run.logits), want, rtol=0, atol=1e-9)
                close(got[:, l, h], want)


@every_model
def test_keep_heads(patching, name):
    """Heads that a prompt keeps write what they write in its clean run, the others as in its corrupt one."""
    model, clean, corrupt = build(name)
    at, other = runs(name)
    kept = torch.rand(len(clean), model.config.n_layer, model.config.n_head,
                      generator=torch.Generator().manual_seed(0)) < 0.5

    def change(u, v, a):
        if u[0] != "a":
            return a
        l, h = (int(part[1:]) for part in u.split("."))
        return torch.where(kept[:, l, h, None, None], at.a[u], other.a[u])

    with torch.no_grad():
        want = by_hand(model, clean, change).logits
        both = [patching.record(model, idx) for idx in (clean, corrupt)]
        close(patching.keep_heads(model, clean, *both, kept), want)
        close(patching.keep_heads(model, clean, *both, torch.ones_like(kept)), model(clean)[0])


@pytest.mark.parametrize("call", ["edge_attribution", "head_patching", "token_edges"])
def test_bad_prompts_are_one_clear_line(patching, call):
    """Pairs of two lengths, and prompts that are longer than the context."""
    model, clean, corrupt = build("gpt2")
    with pytest.raises(ValueError, match="must have one length, got .3, 5. and .3, 4.") as error:
        getattr(patching, call)(model, clean, corrupt[:, 1:], metric)
    assert "\n" not in str(error.value)
    long = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="9 tokens do not fit the model's context of 8"):
        getattr(patching, call)(model, long, long, metric)
    with pytest.raises(ValueError, match="qkv must be split or merged, got 'both'"):
        patching.edge_attribution(model, clean, corrupt, metric, qkv="both")
