"""The network: settings, shapes, taps, and gates that leave a dense model as it is."""

import math
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from model import Config, Edges, Flags, Transformer, generate, main, rope_angle, rotate
from plumbing.flags import run

GPT2 = dict(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
LLAMA = GPT2 | dict(n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu", attention_bias=False,
                    mlp_bias=False, n_inner=48, tied_head=False)


def build(settings, **more):
    torch.manual_seed(0)
    return Transformer(Config(**settings | more)), torch.randint(50, (3, 17))


@pytest.mark.parametrize("settings", [GPT2, LLAMA])
def test_shapes_and_loss_at_init(settings):
    """A fresh model knows nothing: its loss is ln(vocab_size)."""
    model, idx = build(settings)
    logits, loss, edges = model(idx, targets=torch.randint(50, (3, 17)))
    assert logits.shape == (3, 17, 50) and edges is None
    assert abs(loss.item() - math.log(50)) < 0.1


@pytest.mark.parametrize("settings", [GPT2, LLAMA])
@pytest.mark.parametrize("causal", [True, False])
def test_open_gates_leave_the_model_as_it_is(settings, causal):
    """b = 30 opens every gate: the same logits; b = -30 shuts all, and no token sees another."""
    dense, idx = build(settings, causal=causal)
    with torch.no_grad():
        want = dense(idx)[0]
        logits = {}
        for b in (30.0, -30.0):
            sparse = Transformer(Config(**settings | dict(causal=causal, sparse=True, gate_bias=b)))
            sparse.load_state_dict(dense.state_dict())
            logits[b], _, edges = sparse(idx)
            assert edges.open.shape == edges.prob.shape == (2, 4)
            assert (edges.open == (b > 0)).all() and ((edges.prob - (b > 0) * 1.0).abs() < 1e-6).all()
        torch.testing.assert_close(logits[30.0], want, rtol=0, atol=1e-5)
        changed = idx.clone()
        changed[:, 0] = (idx[:, 0] + 1) % 50
        torch.testing.assert_close(sparse(changed)[0][:, 1:], logits[-30.0][:, 1:], rtol=0, atol=0)
        assert not torch.equal(dense(changed)[0][:, 1:], want[:, 1:])


@pytest.mark.parametrize("settings", [GPT2, LLAMA])
def test_causal_means_no_look_ahead(settings):
    model, idx = build(settings, sparse=True, gate_bias=1.0)
    changed = idx.clone()
    changed[:, 9] = (idx[:, 9] + 1) % 50
    with torch.no_grad():
        difference = (model(idx)[0] - model(changed)[0]).abs().amax((0, 2))
    assert (difference[:9] == 0).all() and (difference[9:] > 0).any()


def test_gates_follow_the_seed_and_each_layer_draws_its_own():
    model, idx = build(GPT2, sparse=True)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # every logit is 0: gates are coin flips, all differences are noise
        again = [model(idx, seed=seed)[2].open for seed in (5, 5, 6)]
        assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
        assert not torch.equal(again[0][0], again[0][1])
        assert (model(idx)[2].prob == 0.5).all() and (model(idx)[2].open == 0).all()


@pytest.mark.parametrize("settings", [GPT2, LLAMA])
def test_taps_see_everything_once_in_order(settings):
    model, idx = build(settings)
    seen = {}

    def tap(name, tensor):
        assert name not in seen
        seen[name] = tuple(tensor.shape)
        return tensor

    model(idx, tap=tap)
    kv = model.config.n_kv_head
    layer = {"attn.in": (3, 17, 32), "attn.q": (3, 17, 4, 8), "attn.k": (3, 17, kv, 8),
             "attn.v": (3, 17, kv, 8), "attn.z": (3, 17, 4, 8), "attn.out": (3, 17, 32),
             "mlp.in": (3, 17, 32), "mlp.out": (3, 17, 32)}
    want = {"embed": (3, 17, 32)}
    want |= {f"h{l}.{name}": shape for l in range(2) for name, shape in layer.items()}
    want |= {"final": (3, 17, 32)}
    assert list(seen.items()) == list(want.items())


def test_what_a_tap_returns_is_used_and_the_skip_is_left_alone():
    """The residual stream is the sum of what was written to it, whatever the readers are shown."""
    model, idx = build(GPT2)
    parts, final = [], []

    def tap(name, tensor):
        if name == "embed" or name.endswith(".out"):
            parts.append(tensor)
        if name == "final":
            final.append(tensor)
        return torch.zeros_like(tensor) if name == "h1.attn.in" else tensor

    logits = model(idx, tap=tap)[0]
    torch.testing.assert_close(final[0], sum(parts))
    assert not torch.allclose(logits, model(idx)[0])


@pytest.mark.parametrize("settings", [GPT2, LLAMA | dict(sparse=True)])
def test_taps_act_again_when_blocks_are_recomputed(settings):
    """With activation checkpointing the backward pass runs each block again, with its own taps."""
    def gradients(recompute):
        model, idx = build(settings)
        model.recompute = recompute
        scale = {f"h{l}.{name}": 1.5 + l for l in range(2) for name in ("attn.q", "attn.v", "mlp.in")}
        model(idx, idx, seed=1, tap=lambda name, t: t * scale.get(name, 1.0))[1].backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(one, two) for one, two in zip(gradients(False), gradients(True)))


def test_one_compiled_block_serves_all_layers():
    """Without a tap: nothing in a block's inputs depends on its layer."""
    model, idx = build(GPT2, n_layer=6)
    want, compiled = model(idx)[0], CompileCounter()
    for block in model.h:
        block.compile(backend=compiled)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], want)
    assert compiled.frame_count == 1


def test_targets_of_minus_one_are_ignored():
    model, idx = build(GPT2)
    targets = idx.clone()
    targets[:, :10] = -1
    logits, loss, _ = model(idx, targets)
    want = -logits.log_softmax(-1).gather(2, idx[..., None])[:, 10:].mean()
    torch.testing.assert_close(loss, want)


def test_the_loss_does_not_need_the_logits():
    """Also for the gradient of a tied head, which is that of the embedding as well."""
    found = []
    for wanted in (False, True):
        model, idx = build(GPT2)
        logits, loss, _ = model(idx, idx, logits=wanted)
        if wanted:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten())
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
        assert (logits is not None) == wanted
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_rotation_depends_on_distance_only():
    """q_i . k_j after RoPE is a function of i - j, and position 0 is not rotated."""
    config = Config(**LLAMA)
    angle = rope_angle(config, 20, "cpu")
    q, k = torch.randn(1, 1, 1, 8).expand(1, 1, 20, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 20, 8)
    scores = (rotate(q, angle) @ rotate(k, angle).mT)[0, 0]
    for lag in (0, 3, 11):
        diagonal = scores.diagonal(-lag)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(q, angle)[:, :, 0], q[:, :, 0])


@pytest.mark.parametrize(
    "bad, message",
    [(dict(norm="batchnorm"), "norm must be one of"), (dict(n_embd=30), "must be a multiple"),
     (dict(n_kv_head=3), "must be a multiple"), (dict(mlp="relu"), "mlp must be one of"),
     (dict(position="rope", n_head=32), "head size 1 must be even"),
     (dict(n_layer=0), "n_layer must be a positive integer"), (dict(n_embd=32.0), "n_embd must be a positive"),
     (dict(gate_bias=math.nan), "gate_bias must be a finite number"),
     (dict(tied_head="yes"), "tied_head must be true or false"),
     (dict(position="rope", rope_scaling={"rope_type": "yarn"}), "'yarn' is not known")]
)
def test_bad_settings_are_one_clear_line(bad, message):
    with pytest.raises(ValueError, match=message):
        Transformer(Config(**GPT2 | bad))(torch.zeros(1, 3, dtype=torch.int64))


def test_too_long_a_sequence_is_one_clear_line():
    with pytest.raises(ValueError, match="33 tokens do not fit the model's context of 32"):
        build(GPT2)[0](torch.zeros(1, 33, dtype=torch.int64))


def test_edges_are_named_and_differentiable():
    model, idx = build(LLAMA, sparse=True)
    _, _, edges = model(idx, seed=1)
    assert isinstance(edges, Edges) and edges.prob.dtype == edges.open.dtype == torch.float32
    assert edges.prob.requires_grad and not edges.open.requires_grad
    edges.prob.mean().backward()
    assert model.h[0].attn.c_attn.weight.grad.abs().sum() > 0


def test_generate_is_reproducible_and_greedy_is_the_argmax():
    model, idx = build(GPT2, sparse=True, gate_bias=1.0)
    one, edges = generate(model, idx[:1, :5], 40, temperature=0.9, top_k=5, seed=3)
    again, _ = generate(model, idx[:1, :5], 40, temperature=0.9, top_k=5, seed=3)
    other, _ = generate(model, idx[:1, :5], 40, temperature=0.9, top_k=5, seed=4)
    assert one.shape == (1, 45) and torch.equal(one, again) and not torch.equal(one, other)
    assert edges.open.shape == (2, 4)
    greedy, _ = generate(model, idx[:1, :5], 3, temperature=0)
    want = idx[:1, :5]
    for _ in range(3):
        want = torch.cat([want, model(want)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy, want)
    assert torch.equal(generate(model, idx[:1, :5], 3, temperature=1e-40)[0], want)
    padded, _ = generate(model, idx[:1, :5], 30, temperature=5.0, n_tokens=7)
    assert padded[0, 5:].max() < 7


def test_the_command_continues_a_text(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    path = str(tmp_path / "m.pt")
    Transformer(Config(**GPT2 | dict(vocab_size=257, sparse=True))).save_checkpoint(path)

    def command(*more):
        monkeypatch.setattr(sys, "argv", ["model.py", "--init", path, "--tokens", "5", "--prompt", *more])
        run(main, Flags)
        return capsys.readouterr().out

    for more, word in (([], "open attention edges: "), (["--no-sparse"], "every attention edge is open")):
        out = command("Hello", *more)
        assert out.startswith("Hello") and word in out
    for bad in (["Hello", "--temperature", "-1"], ["Hello", "--tokens", "0"], ["Hello", "--top-k", "0"], [""]):
        with pytest.raises(SystemExit, match="2"):
            command(*bad)
        error = capsys.readouterr().err
        assert error.startswith("error: --") and error.count("\n") == 1
