"""Circuits in numbers: curves and counts with known answers, and the Study of one model."""

import itertools

import pytest
import torch

import patching
from model import Config, Transformer
from plumbing import circuit_report as report
from plumbing import curves
from plumbing import tasks

TOY = dict(block_size=11, vocab_size=13, n_layer=2, n_head=2, n_embd=16, causal=False, init_std=0.3)
GROUPS = TOY | dict(n_head=4, n_kv_head=2)


def study(n=12, flags=(), **config):
    """A Study of a random gated model, checked but not analysed, and two draws of the addition task."""
    torch.manual_seed(0)
    model = Transformer(Config(**TOY | config, sparse=True, gate_bias=-0.1)).requires_grad_(False)
    options = dict(task="addition", n=n, device="cpu", force=True, ranking="eap", per_decade=3) | dict(flags)
    options = patching.Flags(**options)
    graph = patching.Graph(model.config, options.qkv)
    made = report.Study("sparse", model, graph, options, patching)
    task, second = (tasks.make("addition", tasks.Digits(), n, seed) for seed in (0, 1))
    made.check(task)
    return made, task, second


# -----------------------------------------------------------------------------
# curves


def test_explained_effect():
    """A ratio of means, not a mean of ratios: full 1, empty 0, half way .5."""
    full, empty = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0.0, 1.0, -1.0])
    assert float(curves.explained_effect(full, full, empty)) == 1
    assert float(curves.explained_effect(empty, full, empty)) == 0
    m = torch.tensor([1.0, 1.0, -1.0])  # ratios 1, 0, 0; of the means 1/3 over 3
    assert float(curves.explained_effect(m, full, empty)) == pytest.approx(1 / 9, rel=1e-5)


@pytest.mark.parametrize("f, want", [([0.0] * 9 + [1.0], (0.25, 0.749)), ([1.0] * 10, (0.999, 0.0)),
                                     ([2.0] * 10, (1.998, 0.999))])
def test_cpr_known_answers(f, want):
    """f = 0 but for f(1) = 1; f = 1; f = 2: the two areas to three digits."""
    assert tuple(curves.FRACTIONS) == (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1)
    assert tuple(round(float(x), 3) for x in curves.cpr(f)) == want


def test_sizes_and_intervals():
    assert curves.grid(100, 1) == [1, 10, 100] and curves.grid(46, 20)[-1] == 46
    assert curves.first_above([1, 10, 100], [0.95, 0.5, 1.0]) == 100  # from which it stays above
    assert curves.first_above([1, 10, 100], [0.95, 0.92, 0.91]) == 1
    assert curves.between([0, 1, 10, 100], [0, 0, 0.95, 1], points=2) == [2, 5]
    assert curves.between([1, 10], [0.95, 1]) == [] and curves.between([0, 1], [0, 1]) == []
    assert report.interval([1.0] * 50 + [3.0] * 50) == [1.0, 3.0]


def test_a_curve_gets_more_sizes_where_it_crosses():
    """The metric grows with the size: 0.9 of the effect is crossed between 10 and 100, near 60."""
    asked = []

    def run(sizes):
        asked.append(sizes)
        return torch.tensor([[min(1, size / 66), 2 * min(1, size / 66)] for size in sizes])

    curve = curves.trace([1, 10, 100], run, torch.tensor([1.0, 2.0]), torch.zeros(2))
    assert len(asked) == 2 and curve.sizes == sorted(asked[0] + asked[1])
    assert curve.needed() == min(size for size in curve.sizes if size / 66 >= 0.9) < 100
    assert curve.effect() == pytest.approx([min(1, size / 66) for size in curve.sizes])
    assert curve.needed(torch.tensor([1, 1])) == curve.needed()


def test_quartiles_leave_out_prompts_without_an_effect():
    full, empty = torch.tensor([1.0, 1.0, 1.0, 0.01]), torch.zeros(4)
    curve = curves.Curve([1], torch.tensor([[0.0, 0.5, 1.0, 5.0]]), full, empty)
    effects, left_out = curve.quartiles()
    assert effects.flatten().tolist() == [0.25, 0.75] and left_out == 1


def test_rank_correlation_gives_equal_values_their_mean_place():
    a, b = torch.tensor([0.0, 0.0, 0.0, 3.0, 5.0]), torch.tensor([1.0, 7.0, 3.0, 8.0, 9.0])
    want = torch.tensor([[2.0, 2, 2, 4, 5], [1, 3, 2, 4, 5]]).corrcoef()[0, 1].item()
    assert curves.rank_correlation(a, b) == pytest.approx(want) and curves.rank_correlation(b, -b) == pytest.approx(-1)
    assert curves.rank_correlation(a.flip(0), b.flip(0)) == pytest.approx(want)  # whatever the order of the edges


def test_cumulative_shares():
    shares = curves.cumulative(torch.tensor([[1.0, -5.0, 4.0], [0.0, 0.0, 0.0]]))
    assert shares[0].tolist() == [0.5, 0.9, 1.0] and shares[1].tolist() == [0, 0, 0]
    assert curves.holding(shares[0]) == 2 and curves.holding(shares[0], 0.95) == 3


# -----------------------------------------------------------------------------
# circuits as sets of edges


def on_paths(graph, edges):
    """Edges on a path from input to logits, by walking along all of them."""
    nodes = {"input": [], **graph.reads}
    readers = lambda v: [u for u, names in nodes.items() if v in names]  # nodes that read by v
    names = {(graph.sources[u], graph.destinations[v]) for u, v in edges.nonzero().tolist()}
    found = set()

    def walk(u, path):
        for edge in names:
            if edge[0] == u:
                if edge[1] == "logits":
                    found.update([*path, edge])
                for node in readers(edge[1]):
                    walk(node, [*path, edge])

    walk("input", [])
    kept = torch.zeros_like(edges)
    for u, v in found:
        kept[graph.sources.index(u), graph.column[v]] = True
    return kept


@pytest.mark.parametrize("config, qkv", [*itertools.product([TOY, GROUPS], ["split", "merged"])])
def test_pruning_keeps_the_paths_from_input_to_logits(config, qkv):
    """No other edge stays, and the pruned circuit computes what the whole one does."""
    torch.manual_seed(1)
    model = Transformer(Config(**config, sparse=True)).double()
    graph = patching.Graph(model.config, qkv)
    clean, corrupt = torch.randint(13, (2, 3, 11))
    instead, changed = patching.ablated(model, corrupt), 0
    for share in (0.1, 0.2, 0.3, 0.5):
        edges = graph.edges & (torch.rand(graph.edges.shape) < share)
        pruned = curves.prune(graph, edges)
        assert torch.equal(pruned, on_paths(graph, edges))
        whole, part = (patching.patch_edges(model, graph, clean, instead, e) for e in (edges, pruned))
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-9)
        changed += int((edges != pruned).sum())
    assert changed > 10


def test_circuits_are_the_largest_edges():
    graph = patching.Graph(Config(**TOY))
    value = torch.rand(graph.edges.shape)
    value[graph.sources.index("input"), graph.column["logits"]] = 2
    value[~graph.edges] = 3  # pairs that are no edge do not count
    assert curves.circuit(graph, value, 1).nonzero().tolist() == [[0, graph.column["logits"]]]
    assert not curves.circuit(graph, value, 0).any()
    assert torch.equal(curves.circuit(graph, value, len(graph)), graph.edges)


def test_edges_are_counted_by_what_they_join():
    """Three layers of two heads: a head reads by q, k and v what the heads and MLPs of earlier layers wrote."""
    graph = patching.Graph(Config(**TOY | dict(n_layer=3, n_head=2)))
    assert curves.classes(graph, graph.edges) == {
        "input to head": 18, "input to MLP": 3, "input to logits": 1, "head to head": 2 * 6 * 3, "MLP to head": 6 * 3,
        "head to MLP": 2 * 6, "MLP to MLP": 3, "head to logits": 6, "MLP to logits": 3}
    edges = torch.zeros_like(graph.edges)
    edges[graph.sources.index("a1.h1"), [graph.column["a2.h0<k>"], graph.column["m1"]]] = True
    assert curves.classes(graph, edges) == {"head to head": 1, "head to MLP": 1}


# -----------------------------------------------------------------------------
# one model


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_the_empty_circuit_explains_nothing_whatever_the_batches(monkeypatch, ablation):
    curves = []
    for batch in (1024, 40):  # 12 or 3 prompts at a time
        monkeypatch.setattr(report, "BATCH_TOKENS", batch)
        made, task, second = study(flags={"ablation": ablation})
        made.analyse(task, second)
        assert made.edges.effect()[0] == pytest.approx(0, abs=1e-5)  # one edge, which leads nowhere
        curves.append(made.edges.effect() + made.heads["per_sentence"].effect() + made.heads["global"].effect())
    assert curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-3)  # float32 over a small gap


@pytest.mark.parametrize("qkv", ["split", "merged"])
def test_all_heads_or_edges_explain_everything(qkv):
    made, task, second = study(flags={"qkv": qkv})
    made.analyse(task, second)
    for curve in (made.edges, *made.heads.values()):
        assert curve.effect()[-1] == pytest.approx(1, abs=1e-5)
    assert made.edges.sizes[-1] == made.numbers["edges"] == {"split": 46, "merged": 26}[qkv]


def test_rankings_are_compared_on_the_prompts_of_the_exact_effects(monkeypatch):
    """Scores that are the exact effects there correlate fully, whatever they are on the other prompts."""
    made, task, _ = study()
    exact, some = torch.rand(len(made.graph)), report.SOME
    monkeypatch.setattr(made, "score_edges", lambda task, how: torch.cat(
        [exact.expand(some, -1), torch.randn(12 - some, len(exact))]))
    assert [found["spearman"] for found in made.rankings(task, made.empty).values()] == [pytest.approx(1)] * 4


def test_cpr_needs_a_thousand_edges():
    made, task, second = study(n=4, n_layer=6, n_head=4, flags={"per_decade": 1})
    made.analyse(task, second)
    assert made.numbers["edges"] > 1000 and {"cpr", "cmd"} <= made.numbers.keys()


def test_a_model_whose_edges_all_score_nothing_is_refused(monkeypatch):
    made, task, second = study()
    monkeypatch.setattr(patching, "edge_scores", lambda model, graph, clean, *_: torch.zeros(
        len(clean), *graph.edges.shape))
    with pytest.raises(ValueError, match="every edge of the sparse model has the score 0"):
        made.analyse(task, second)


def test_intervals_follow_from_the_seed_whatever_it_is():
    made, task, second = study()
    made.analyse(task, second)
    draws = [made.bootstrap(seed, draws=20) for seed in (3, 3, 4, -1, 10**30)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(values) == 20 and {*values} <= {*made.edges.sizes} for values in (
        d["edges_for_0.9"] for d in draws))
    both = report.compare({"dense": made, "sparse": made}, seed=0)
    assert set(both["ratio"].values()) == {1} and both["interval"]["edges_for_0.9"] == [1, 1]


def test_gates_are_counted_in_four_classes():
    """Of two heads over three tokens: what is not allowed is in no class."""
    before, after = torch.zeros(2, 1, 2, 3, 3)
    before[0, 0, 2, 0] = before[0, 0, 1, 1] = before[0, 1, 2, 2] = 0.5
    after[0, 0, 2, 0] = after[0, 1, 0, 0] = 0.25
    want = {"open in both": 1, "closes": 2, "opens": 1}
    assert report.count_gates(before, after, causal=True) == want | {"shut in both": 12 - 4}
    assert report.count_gates(before, after, causal=False) == want | {"shut in both": 18 - 4}
