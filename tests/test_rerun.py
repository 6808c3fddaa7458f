"""Scores of edges whose destination runs again, beside the model's own forward pass."""

import pytest
import torch

import patching
from model import Config, Transformer
from plumbing.rerun import STEPS, rerun_scores

SIZES = dict(block_size=8, vocab_size=13, n_layer=2, n_head=4, n_embd=16, init_std=0.5, sparse=True, gate_bias=-0.1)
LLAMA = dict(n_kv_head=2, position="rope", norm="rmsnorm", mlp="swiglu", attention_bias=False, mlp_bias=False)


def setting(**more):
    """(model, clean, corrupt, metric) in float64."""
    torch.manual_seed(0)
    model = Transformer(Config(**SIZES | more)).double().requires_grad_(False)
    clean, corrupt = torch.randint(13, (2, 3, 8))
    return model, clean, corrupt, lambda logits: logits[:, -1, 1] - logits[:, -1, 2]


def scores_of(model, clean, corrupt, metric, qkv="split"):
    graph = patching.Graph(model.config, qkv)
    return rerun_scores(patching, model, graph, clean, corrupt, metric), graph


def with_shift(model, idx, place, letter, rows, shift):
    """Everything of a run in which those heads of q, k or v, or an MLP, read the stream plus shift."""
    moved = patching.record(model, idx) if letter is None else {}
    if letter:
        model(idx, tap=lambda name, t: moved.setdefault(name, t + shift if name == f"h{place}.attn.in" else t))

    def tap(name, t):
        if letter and name == f"h{place}.attn.{letter}":
            t = t.clone()
            t[:, :, rows] = moved[name][:, :, rows]
        return t + shift if letter is None and name == f"h{place}.mlp.in" else t

    seen = {}
    model(idx, tap=lambda name, t: seen.setdefault(name, tap(name, t)))
    return seen


@pytest.mark.parametrize("more", [{}, LLAMA, {"sparse": False, "position": "rope"}])
def test_a_score_is_the_change_of_the_destination_s_output_times_the_gradient(more):
    model, clean, corrupt, metric = setting(**more)
    scores, graph = scores_of(model, clean, corrupt, metric)
    change = patching.contributions(model, corrupt) - patching.contributions(model, clean)
    before, group = patching.record(model, clean), model.config.n_head // model.config.n_kv_head
    for u, source in enumerate(graph.sources):
        for v in graph.edges[u].nonzero().flatten().tolist():
            node, letter = (graph.destinations[v].removesuffix(">") + "<").split("<")[:2]
            if node == "logits":
                final = before["final"] + change[:, u]
                want = metric(model.lm_head(model.ln_f(final))) - metric(model(clean)[0])
            else:
                l, _, n = node[1:].partition(".")
                name = f"h{l}.attn.z" if n else f"h{l}.mlp.out"
                seen = with_shift(model, clean, int(l), letter or None, int(n[1:]) if n else None, change[:, u])
                want = 0
                for k in range(STEPS):
                    left = 1 - (k + 0.5) / STEPS
                    gradient = patching.gradients(model, clean, metric, [name], left * change[:, 0])[0][name]
                    want = want + ((seen[name] - before[name]) * gradient).flatten(1).sum(1) / STEPS
            torch.testing.assert_close(scores[:, u, v].double(), want, atol=1e-5, rtol=1e-4)
    assert not scores[:, ~graph.edges].any() and scores[:, graph.edges].abs().mean() > 1e-3


def test_merged_scores_are_the_sums_of_q_k_and_v():
    split, by_letter = scores_of(*setting(**LLAMA))
    merged, graph = scores_of(*setting(**LLAMA), qkv="merged")
    for v, name in enumerate(graph.destinations):
        here = [w for w, other in enumerate(by_letter.destinations) if other.split("<")[0] == name]
        if name[1:].partition(".")[2]:  # a group: its two query heads, its k and its v
            g = int(name.split(".g")[1])
            heads = [f"a{name[1]}.h{2 * g}<q>", f"a{name[1]}.h{2 * g + 1}<q>"]
            here += [by_letter.column[head] for head in heads]
        torch.testing.assert_close(merged[:, :, v], split[:, :, here].sum(2))


def test_nothing_corrupt_gives_exact_zeros():
    model, clean, _, metric = setting()
    assert not scores_of(model, clean, clean, metric)[0].any()


def test_a_gate_that_opens_is_seen():
    """One key of each query at most is open: the softmax is flat, and all that changes is gates."""
    model, clean, corrupt, metric = setting(n_layer=1, gate_bias=0.0)
    attn = model.h[0].attn
    attn.c_attn.weight[:32] *= 1e-6  # logits of about 1e-11 have no slope, but a sign
    scores, graph = scores_of(model, clean, corrupt, metric)
    by_eap = patching.edge_scores(model, graph, clean, corrupt, metric)
    q_and_k = [v for name, v in graph.column.items() if name.endswith(("<q>", "<k>"))]
    assert by_eap[:, 0, q_and_k].abs().max() < 1e-6 and scores[:, 0, q_and_k].abs().max() > 0.1
