"""The gate: what each equation of sparse.py promises, then chunked against naive."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import sparse
from plumbing import chunked, kernel
from sparse import fold_in, gate_map, gated_attention, noise_keys, uniform


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def random_qkv(B=2, H=4, H_kv=4, T=17, D=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D), (B, H_kv, T, D), (B, H_kv, T, D)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def noise(seeds, H, T):
    return uniform(*noise_keys(torch.as_tensor(seeds), H, T))  # (B, H, T, T)


def constant_logits(x, B, H, T, D=16, dtype=torch.float32):
    """q and k whose logits are all x exactly: one coordinate, powers of two."""
    q, k = torch.zeros(B, H, T, D), torch.zeros(B, H, T, D)
    q[..., 0], k[..., 0] = x, math.sqrt(D)
    return q.to(dtype), k.to(dtype)


# -----------------------------------------------------------------------------
# the specification against a formula written again, one number at a time, in float64


def by_hand(q, k, v, b, u, causal):
    """y, E, open share of one head, with loops and math only. q, k, v (T, D); u (T, T) or None."""
    T, D = q.shape
    y, E, opened, pairs = torch.zeros(T, D, dtype=torch.float64), 0.0, 0, 0
    for i in range(T):
        keys = range(i + 1) if causal else range(T)
        s = [sum(float(q[i, d]) * float(k[j, d]) for d in range(D)) / math.sqrt(D) for j in keys]
        total = sum(math.exp(x) for x in s)
        for j, x in zip(keys, s):
            p = 1 / (1 + math.exp(-(x + b)))
            is_open = x + b > 0 if u is None else float(u[i, j]) < p
            y[i] += is_open * math.exp(x) / total * v[j].double()
            E, opened, pairs = E + p, opened + is_open, pairs + 1
    return y, E / pairs, opened / pairs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("b", [-1.0, 0.0, 2.0])
def test_naive_is_the_formula(causal, seed, b):
    q, k, v = random_qkv(B=2, H=2, H_kv=1, T=6, D=4, dtype=torch.float64)
    y, E, share = gated_attention(q, k, v, b, seed, causal, impl="naive")
    u = None if seed is None else noise([seed, seed + 1], 2, 6)
    for n in range(2):
        for h in range(2):
            u_nh = None if u is None else u[n, h]
            want = by_hand(q[n, h].detach(), k[n, 0].detach(), v[n, 0].detach(), b, u_nh, causal)
            torch.testing.assert_close(y[n, h], want[0], rtol=0, atol=1e-14)
            assert abs(E[n, h].item() - want[1]) < 1e-14
            assert abs(share[n, h].item() - want[2]) < 1e-14


def test_straight_through_gradient_is_the_stated_one():
    """d/ds of the gate is sigmoid'(s + b + n), its value exactly 0 or 1."""
    s = torch.randn(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    A = sparse.gates(s, 0.7, noise([3], 1, 5))
    n = -torch.logit(noise([3], 1, 5).double())
    g = torch.sigmoid(s + 0.7 + n)
    assert set(A.unique().tolist()) <= {0.0, 1.0}
    (ds,) = torch.autograd.grad(A.sum(), s)
    torch.testing.assert_close(ds, g * (1 - g), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_penalty_gradient_against_finite_differences(impl):
    q, k, v = random_qkv(B=1, H=2, H_kv=1, T=7, D=4, dtype=torch.float64)
    weights = torch.tensor([[1.0, -2.0]], dtype=torch.float64)

    def penalty(q, k):
        return (gated_attention(q, k, v, 0.3, 5, True, impl)[1] * weights).sum()

    gradients = torch.autograd.grad(penalty(q, k), (q, k))
    for which, gradient in enumerate(gradients):
        numeric = torch.zeros_like(gradient)
        for at in range(gradient.numel()):
            step = torch.zeros(gradient.numel(), dtype=torch.float64)
            step[at] = 1e-6
            up, down = [q.detach(), k.detach()], [q.detach(), k.detach()]
            up[which] = up[which] + step.view_as(gradient)
            down[which] = down[which] - step.view_as(gradient)
            numeric.view(-1)[at] = (penalty(*up) - penalty(*down)) / 2e-6
        torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", [None, 0])
def test_all_open_is_ordinary_attention_and_all_shut_is_zero(impl, causal, seed):
    q, k, v = random_qkv(T=33)
    y, E, share = gated_attention(q, k, v, 60.0, seed, causal, impl)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(y, want, rtol=0, atol=2e-6)
    got_grad = torch.autograd.grad(y.square().sum(), (q, k, v))
    want_grad = torch.autograd.grad(want.square().sum(), (q, k, v))
    for got, expected in zip(got_grad, want_grad):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (share == 1).all() and (E == 1).all()
    y, E, share = gated_attention(q, k, v, -60.0, seed, causal, impl)
    assert (y == 0).all() and (share == 0).all() and (E < 1e-20).all()


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x", [-8.0, -6.0, 0.0, 6.0, 8.0])
def test_sampled_open_rate_is_sigmoid(impl, dtype, x):
    """Over 1,048,576 pairs the rate is within 4.5 binomial standard deviations of sigmoid(s + b)."""
    q, k = constant_logits(x + 2, 8, 8, 128, dtype=dtype)
    share = gated_attention(q, k, k, -2.0, 1, False, impl)[2].mean().item()
    p, n = 1 / (1 + math.exp(-x)), 8 * 8 * 128 * 128
    assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("x", [-100.0, 100.0])
@pytest.mark.parametrize("seed", [None, 0])
def test_no_nan_far_from_the_threshold(impl, x, seed):
    q, k = constant_logits(x / 2, 1, 2, 20)
    q, k, v = q.requires_grad_(), k.requires_grad_(), torch.randn(1, 2, 20, 16, requires_grad=True)
    y, E, _ = gated_attention(q, k, v, x / 2, seed, True, impl)
    for t in (y, E, *torch.autograd.grad(y.sum() + E.sum(), (q, k, v))):
        assert torch.isfinite(t).all()


# -----------------------------------------------------------------------------
# chunked against naive


def values_and_gradients(impl, q, k, v, bias, seed, causal):
    y, E, share = gated_attention(q, k, v, bias, seed, causal, impl)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    dE = torch.linspace(-3, 5, E.numel()).view_as(E)
    gradients = torch.autograd.grad((y * dy).sum() + (E * dE).sum(), (q, k, v))
    return {"y": y, "E": E, "share": share} | dict(zip(("dq", "dk", "dv"), gradients))


@pytest.mark.parametrize("T", [1, 2, 17, 64, 130])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("H_kv", [1, 2, 4])
def test_chunked_equals_naive(T, causal, seed, H_kv):
    """In float64 to rounding, the noise being the same; in float32 to float32's rounding."""
    for bias in (-30.0, -2.0, 0.0, 3.0, 30.0):
        # float64: the slope holds 1 - p, which cancels where u is near 1 (2e-12 at bias 30)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
            q, k, v = random_qkv(H_kv=H_kv, T=T, dtype=dtype)
            naive = values_and_gradients("naive", q, k, v, bias, seed, causal)
            tiled = values_and_gradients("chunked", q, k, v, bias, seed, causal)
            for name in naive:
                scale = max(1, naive[name].abs().max().item())
                error = (naive[name] - tiled[name]).abs().max().item()
                assert error <= tolerance * scale, (name, bias, dtype, error)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_half_precision_inputs_compute_in_float32(impl):
    """bf16 q, k, v give the float32 result of those values, rounded once; under autocast too."""
    q, k, v = (x.detach() for x in random_qkv(T=40, dtype=torch.bfloat16))
    wide = gated_attention(q.float(), k.float(), v.float(), 1.0, 3, True, impl)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, E, share = gated_attention(q, k, v, 1.0, 3, True, impl)
        assert y.dtype == torch.bfloat16 and E.dtype == share.dtype == torch.float32
        assert torch.equal(y, wide[0].bfloat16())
        assert torch.equal(E, wide[1]) and torch.equal(share, wide[2])


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_gradients_are_float32_under_autocast(impl):
    """The forward pass in autocast, and for chunked the backward pass too."""
    q, k, v = random_qkv(T=40)
    want = torch.autograd.grad(gated_attention(q, k, v, 1.0, 3, True, impl)[0].square().sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gated_attention(q, k, v, 1.0, 3, True, impl)[0]
        loss = y.square().sum()
        if impl == "chunked":
            got = torch.autograd.grad(loss, (q, k, v))
    if impl == "naive":
        got = torch.autograd.grad(loss, (q, k, v))
    for g, w in zip(got, want):
        assert torch.equal(g, w)


# -----------------------------------------------------------------------------
# the noise


def test_noise_does_not_depend_on_tiles_or_batch(monkeypatch):
    """Bit for bit: any tile size, any split of the batch, the same rows of a longer sequence."""
    q, k, v = (x.detach() for x in random_qkv(B=4, T=50))
    seeds = torch.tensor([9, 2**40, -5, 9])
    whole = gate_map(q, k, 0.5, seeds)
    assert not torch.equal(whole[0], whole[3])  # other q and k
    for part in (slice(0, 1), slice(1, 4)):
        assert torch.equal(gate_map(q[part], k[part], 0.5, seeds[part]), whole[part])
    u = noise([9, 2**40], 4, 50)
    assert torch.equal(u[:, :, :20, :20], noise([9, 2**40], 4, 20))
    assert torch.equal(u[1:, :2], noise([2**40], 2, 50))
    drawn = []
    monkeypatch.setattr(sparse, "uniform", lambda *a: drawn.append(uniform(*a).clone()) or a[3][1])
    for rows, tile in ((64, 2**18), (7, 2**10), (16, 1)):
        monkeypatch.setattr(chunked, "ROWS", rows)
        monkeypatch.setattr(chunked, "TILE", tile)
        drawn.clear()
        gated_attention(q, k, v, 0.5, seeds, False, "chunked")
        tiles = list(chunked.tiles(16, 50, False))
        assert len(tiles) == len(drawn)
        want = noise(seeds, 4, 50).flatten(0, 1)
        for (n, i, j), got in zip(tiles, drawn):
            assert torch.equal(got, want[n, i, j])


def test_an_int_seed_means_consecutive_seeds():
    q, k, _ = random_qkv(B=3)
    assert torch.equal(gate_map(q, k, 0.0, 5), gate_map(q, k, 0.0, torch.tensor([5, 6, 7])))
    assert not torch.equal(gate_map(q, k, 0.0, 5), gate_map(q, k, 0.0, 6))


def test_gates_agree_except_below_rounding(monkeypatch):
    """naive's s + b - logit(u) > 0 and chunked's u < p may differ only where |u - p| is rounding."""
    q, k, v = (x.detach() for x in random_qkv(B=4, H=8, H_kv=8, T=200))
    opened = []
    real = chunked.Tile.__call__

    def spy(self, *where):
        tile = real(self, *where)
        opened.append(tile[2].clone())
        return tile

    monkeypatch.setattr(chunked.Tile, "__call__", spy)
    gated_attention(q, k, v, -1.0, 3, False, "chunked")
    tiled = torch.zeros(32, 200, 200)
    for (n, i, j), A in zip(chunked.tiles(32, 200, False), opened):
        tiled[n, i, j] = A
    naive = gate_map(q, k, -1.0, 3, False).flatten(0, 1)
    p = torch.sigmoid(q.double() @ k.double().mT / 4 - 1).flatten(0, 1)
    gap = (noise([3, 4, 5, 6], 8, 200).double().flatten(0, 1) - p).abs()
    differ = naive != tiled.bool()
    assert (gap[differ] < 5e-7).all() and differ.sum() <= 5


def test_uniform_is_uniform():
    """8.4 million numbers: chi-square over 4,096 bins, tails, exact range, rows of fair variance."""
    u = noise(torch.arange(2), 4, 1024)
    n = u.numel()
    assert 0 < u.min() and u.max() < 1
    bins = torch.bincount((u.flatten() * 4096).long(), minlength=4096).double()
    chi = ((bins - n / 4096) ** 2 / (n / 4096)).sum().item()
    assert abs(chi - 4095) < 5 * math.sqrt(2 * 4095)
    for p in (0.3, 1e-2, 1e-3, 1e-5):
        for count in ((u < p).sum().item(), (u > 1 - p).sum().item()):
            assert abs(count - n * p) < 5 * math.sqrt(n * p)
    for p in (0.3, 1e-2):
        spread = ((u < p).sum(-1).double() - 1024 * p).square().mean().item() / (1024 * p * (1 - p))
        assert abs(spread - 1) < 5 * math.sqrt(2 / (n / 1024))


def test_uniform_has_no_correlation_between_neighbours():
    """Lags along keys, queries, heads and seeds, and products of three, within 5 deviations of 0."""
    c = (noise(torch.arange(3), 3, 1024).double() - 0.5) * math.sqrt(12)

    def small(product):
        return abs(product.sum().item()) < 5 * math.sqrt(product.numel())

    for lag in (1, 2, 3, 7, 64):
        assert small(c[..., lag:] * c[..., :-lag])
        assert small(c[..., lag:, :] * c[..., :-lag, :])
        assert small(c[..., : -2 * lag] * c[..., lag:-lag] * c[..., 2 * lag :])
    assert small(c[:, 1:] * c[:, :-1]) and small(c[1:] * c[:-1]) and small(c * c.mT)


def test_uniform_stays_inside_at_the_extreme_bits():
    """The lowest and the highest int32: 2^-24 from 0 and from 1."""
    for x, want in ((-(2**31), 2**-24), (2**31 - 1, 1 - 2**-24)):
        start = torch.tensor([[x]], dtype=torch.int32)
        stride, column = torch.ones_like(start), torch.zeros(1, dtype=torch.int32)
        assert uniform(start, stride, column).item() == want


def test_fold_in_is_splitmix64():
    """Against Python's own big integers."""
    mask = 2**64 - 1
    for seed, n in ((0, 0), (1, 0), (0, 1), (-7, 12), (2**63 - 1, 1000)):
        z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert fold_in(seed, n).item() & mask == z ^ (z >> 31)


# -----------------------------------------------------------------------------
# gate_map and bad input


def test_gate_map_counts_what_attention_reports():
    q, k, v = random_qkv(H_kv=2, T=30)
    for causal, pairs in ((True, 30 * 31 // 2), (False, 900)):
        for seed in (None, 4):
            opened = gate_map(q, k, 0.5, seed, causal)
            share = gated_attention(q, k, v, 0.5, seed, causal, "naive")[2]
            torch.testing.assert_close(opened.sum((-2, -1)) / pairs, share)
            assert opened.dtype == torch.bool and not (causal and opened.triu(1).any())


def good():
    return [torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8)]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(2, 4, 3)), "batch, heads, T, head size"),
        (dict(q=torch.zeros(2, 4, 3, 8, dtype=torch.long)), "float tensors"),
        (dict(q=torch.zeros(2, 4, 5, 8)), "do not fit together"),
        (dict(v=torch.zeros(2, 2, 3, 4)), "do not fit together"),
        (dict(k=torch.zeros(2, 0, 3, 8), v=torch.zeros(2, 0, 3, 8)), "do not fit together"),
        (dict(q=torch.zeros(2, 3, 3, 8)), "3 query heads are not a multiple of 2"),
        (dict(impl="fast"), "impl must be one of"),
        (dict(impl=[]), "impl must be one of"),
        (dict(q=[1.0]), "must be tensors"),
        (dict(seed=2**63), "seed must be None, an int or an int64 tensor"),
        (dict(seed=1.5), "seed must be None, an int or an int64 tensor"),
        (dict(seed=True), "seed must be None, an int or an int64 tensor"),
        (dict(seed=torch.tensor([1])), "seed must be None, an int or an int64 tensor"),
        (dict(seed=torch.tensor([1.0, 2.0])), "seed must be None, an int or an int64 tensor"),
        (dict(bias=math.nan), "gate bias must be a finite number"),
        (dict(bias="0"), "gate bias must be a finite number"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    q, k, v = good()
    with pytest.raises(ValueError, match=message) as error:
        gated_attention(**(dict(q=q, k=k, v=v) | change))
    assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# which form "auto" takes


def test_auto_takes_naive_where_it_is_small_and_chunked_above(monkeypatch):
    called = []
    monkeypatch.setattr(sparse, "naive", lambda *a: called.append("naive") or (a[0], a[0], a[0]))
    monkeypatch.setattr(sparse, "chunked", lambda *a, **k: called.append("chunked") or (a[0], a[0], a[0]))
    for T in (11, 64, 256):
        q = torch.randn(2, 4, T, 8)
        gated_attention(q, q, q)
    assert called == ["naive", "naive", "chunked"]


class OnCuda:
    """What `choose` looks at in a tensor, as if it were on a GPU."""

    is_cuda, dtype, shape, device = True, torch.float32, torch.Size((1, 2, 500, 64)), torch.device("cpu")


def errs(*_):
    raise RuntimeError("no kernel image is available\nfor this device")


def wrong(q, k, v, bias, keys, causal):
    y, E, share = sparse.naive(q, k, v, bias, keys, causal)
    return 1.01 * y, E, share


def wrong_gradient(q, k, v, bias, keys, causal):
    return sparse.naive(q, k, v.detach() + 1.01 * (v - v.detach()), bias, keys, causal)


def not_a_number(q, k, v, bias, keys, causal):
    y, E, share = sparse.naive(q, k, v, bias, keys, causal)
    return y * torch.nan, E, share


@pytest.mark.parametrize("form, problem", [
    (errs, "RuntimeError: no kernel image is available"), (wrong, "differs from naive by"),
    (wrong_gradient, "differs from naive by"), (not_a_number, "differs from naive by nan")])
def test_a_kernel_that_errs_or_is_wrong_is_not_used_and_one_line_says_so(form, problem, monkeypatch, capsys):
    monkeypatch.setattr(kernel, "load", lambda q: form)
    monkeypatch.setattr(kernel, "AGREED", {})
    for _ in range(2):  # it is asked once
        chosen, dtype = sparse.choose("auto", OnCuda)
        assert chosen.func is sparse.chunked and dtype == torch.float32
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "takes the place of the Triton kernel" in out and problem in out


def test_a_kernel_that_agrees_is_used(monkeypatch, capsys):
    monkeypatch.setattr(kernel, "load", lambda q: sparse.naive)
    monkeypatch.setattr(kernel, "AGREED", {})
    assert sparse.choose("auto", OnCuda) == (sparse.naive, torch.float32)
    assert kernel.AGREED == {torch.float32: True} and not capsys.readouterr().out


def test_the_script_shows_gates_and_errors():
    run = subprocess.run([sys.executable, "sparse.py"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "expected share of open gates" in run.stdout
    rows = re.findall(r"^  \d  ([.#]+) +([.#]+)", run.stdout, re.M)
    assert [len(a) for a, b in rows] == [len(b) for a, b in rows] == list(range(1, 9))
    errors = re.search(r"chunked +(.*)", run.stdout)[1].split()
    assert len(errors) == 5 and all(0 < float(e) < 1e-5 for e in errors)
