"""
sparse.naive as one Triton kernel forward and two backward: no T x T matrix in memory.

A program of the forward kernel holds BM queries of one head and goes over their keys in blocks of
BN, as flash attention does (arXiv 2205.14135): a running maximum and sum make the softmax, and the
gate is applied to its unnormalised weights, for the sum counts shut edges too. Saved are q, k, v, y,
the rows' log-sum-exp and the seeds; the backward kernels compute the blocks again:

    a = exp(s - lse),  dA = dy V^T,  ds = a ((A + slope) dA - dy . y) + r p (1 - p)
    dQ = ds K,  dK = ds^T Q,  dV = (A a)^T dy,  r = d(sum of p)

Nothing is added up by atomics, so equal blocks give equal bits; which blocks is timed at the first
call. Products of float32 inputs are float32 (not TF32), shorter ones accumulate in float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def logits_and_gates(q, k, i, j, start, stride, column, T, scale, bias,
                     CAUSAL: tl.constexpr, SAMPLED: tl.constexpr):
    """s, p = sigmoid(s + b), 1 - p, A, u and which pairs are allowed, all (BM, BN) float32 or bool."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    allowed = (i[:, None] < T) & (j[None, :] < T)
    if CAUSAL:
        allowed = allowed & (j[None, :] <= i[:, None])
    x = s + bias
    p, shut = tl.sigmoid(x), tl.sigmoid(-x)  # 1 - p without cancellation
    u = s
    if SAMPLED:  # sparse.uniform
        bits = stride[:, None] * column[None, :] + start[:, None]
        u = (bits >> 9).to(tl.float32) * (1.0 / 8388608) + (0.5 + 1.0 / 16777216)
        A = (u < p) & allowed
    else:
        A = (x > 0) & allowed
    return s, p, shut, A, u, allowed


@triton.jit
def forward_kernel(q_, k_, v_, y_, lse_, prob_, open_, start_, stride_, column_, T, scale, bias,
                   H, GROUP, SIZE, CAUSAL: tl.constexpr, SAMPLED: tl.constexpr, D: tl.constexpr,
                   DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)  # of all sequences
    key_head = head // H * (H // GROUP) + head % H // GROUP
    i, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, DP)
    rows = head * T + i
    q = tl.load(q_ + rows[:, None] * D + d[None, :], (i[:, None] < T) & (d[None, :] < D), 0.0)
    start = tl.load(start_ + rows, i < T, 0)
    stride = tl.load(stride_ + rows, i < T, 0)
    top = tl.full([BM], float("-inf"), tl.float32)
    total, prob, opened = (tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32),
                           tl.zeros([BM], tl.float32))
    y = tl.zeros([BM, DP], tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BM, T) if CAUSAL else T
    for first in range(0, end, BN):
        j = first + tl.arange(0, BN)
        at = (key_head * T + j)[:, None] * D + d[None, :]
        inside = (j[:, None] < T) & (d[None, :] < D)
        k = tl.load(k_ + at, inside, 0.0)
        v = tl.load(v_ + at, inside, 0.0)
        column = tl.load(column_ + j, j < T, 0)
        s, p, shut, A, u, allowed = logits_and_gates(q, k, i, j, start, stride, column, T, scale, bias,
                                                     CAUSAL, SAMPLED)
        prob += tl.sum(tl.where(allowed, p, 0.0), 1)
        opened += tl.sum(A.to(tl.float32), 1)
        s = tl.where(allowed, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows beyond T have no pair at all
        a, shrink = tl.exp(s - safe[:, None]), tl.exp(top - safe)
        total = total * shrink + tl.sum(a, 1)  # of all edges, open or shut
        y = y * shrink[:, None] + tl.dot(tl.where(A, a, 0.0).to(v.dtype), v, input_precision="ieee")
        top = new_top
    total = tl.where(i < T, total, 1.0)
    tl.store(y_ + rows[:, None] * D + d[None, :], (y / total[:, None]).to(y_.dtype.element_ty),
             (i[:, None] < T) & (d[None, :] < D))
    tl.store(lse_ + rows, top + tl.log(total), i < T)
    tl.store(prob_ + rows, prob, i < T)
    tl.store(open_ + rows, opened, i < T)


@triton.jit
def gradient_of_logits(q, k, v, dy, lse, delta, r, i, j, start, stride, column, T, scale, bias,
                       CAUSAL: tl.constexpr, SAMPLED: tl.constexpr):
    """A a and ds, (BM, BN) float32, 0 where a pair is not allowed."""
    s, p, shut, A, u, allowed = logits_and_gates(q, k, i, j, start, stride, column, T, scale, bias,
                                                 CAUSAL, SAMPLED)
    a = tl.where(allowed, tl.exp(s - lse[:, None]), 0.0)
    dA = tl.dot(dy, tl.trans(v), input_precision="ieee")
    w = p * shut
    slope = w
    if SAMPLED:  # g (1 - g) of g = sigmoid(s + b - logit(u)), whose odds are x : z
        x, z = p * (1.0 - u), u * shut
        slope = x * z / ((x + z) * (x + z))
    ds = a * ((A.to(tl.float32) + slope) * dA - delta[:, None]) + r * w
    return tl.where(A, a, 0.0), tl.where(allowed, ds, 0.0)


@triton.jit
def backward_q_kernel(q_, k_, v_, dy_, lse_, delta_, r_, start_, stride_, column_, dq_, T, scale, bias,
                      H, GROUP, SIZE, CAUSAL: tl.constexpr, SAMPLED: tl.constexpr, D: tl.constexpr,
                      DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    key_head = head // H * (H // GROUP) + head % H // GROUP
    i, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, DP)
    rows = head * T + i
    at_q, inside_q = rows[:, None] * D + d[None, :], (i[:, None] < T) & (d[None, :] < D)
    q, dy = tl.load(q_ + at_q, inside_q, 0.0), tl.load(dy_ + at_q, inside_q, 0.0)
    lse, delta = tl.load(lse_ + rows, i < T, 0.0), tl.load(delta_ + rows, i < T, 0.0)
    start, stride = tl.load(start_ + rows, i < T, 0), tl.load(stride_ + rows, i < T, 0)
    r = tl.load(r_ + head)
    dq = tl.zeros([BM, DP], tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BM, T) if CAUSAL else T
    for first in range(0, end, BN):
        j = first + tl.arange(0, BN)
        at = (key_head * T + j)[:, None] * D + d[None, :]
        inside = (j[:, None] < T) & (d[None, :] < D)
        k, v = tl.load(k_ + at, inside, 0.0), tl.load(v_ + at, inside, 0.0)
        column = tl.load(column_ + j, j < T, 0)
        _, ds = gradient_of_logits(q, k, v, dy, lse, delta, r, i, j, start, stride, column, T, scale, bias,
                                   CAUSAL, SAMPLED)
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(dq_ + at_q, (dq * scale).to(dq_.dtype.element_ty), inside_q)


@triton.jit
def backward_kv_kernel(q_, k_, v_, dy_, lse_, delta_, r_, start_, stride_, column_, dk_, dv_, T, scale,
                       bias, H, GROUP, SIZE, CAUSAL: tl.constexpr, SAMPLED: tl.constexpr, D: tl.constexpr,
                       DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    key_head = tl.program_id(1).to(tl.int64)
    groups = H // GROUP  # key-value heads of a sequence
    j, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, DP)
    at, inside = (key_head * T + j)[:, None] * D + d[None, :], (j[:, None] < T) & (d[None, :] < D)
    k, v = tl.load(k_ + at, inside, 0.0), tl.load(v_ + at, inside, 0.0)
    column = tl.load(column_ + j, j < T, 0)
    dk, dv = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    begin = tl.program_id(0) * BN // BM * BM if CAUSAL else 0  # queries before see none of these keys
    for h in range(0, GROUP):  # one program adds up all query heads of its group
        head = key_head // groups * H + key_head % groups * GROUP + h
        r = tl.load(r_ + head)
        for first in range(begin, T, BM):
            i = first + tl.arange(0, BM)
            rows = head * T + i
            at_q, inside_q = rows[:, None] * D + d[None, :], (i[:, None] < T) & (d[None, :] < D)
            q, dy = tl.load(q_ + at_q, inside_q, 0.0), tl.load(dy_ + at_q, inside_q, 0.0)
            lse, delta = tl.load(lse_ + rows, i < T, 0.0), tl.load(delta_ + rows, i < T, 0.0)
            start, stride = tl.load(start_ + rows, i < T, 0), tl.load(stride_ + rows, i < T, 0)
            Aa, ds = gradient_of_logits(q, k, v, dy, lse, delta, r, i, j, start, stride, column, T, scale,
                                        bias, CAUSAL, SAMPLED)
            dv += tl.dot(tl.trans(Aa).to(dy.dtype), dy, input_precision="ieee")
            dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    tl.store(dk_ + at, (dk * scale).to(dk_.dtype.element_ty), inside)
    tl.store(dv_ + at, dv.to(dv_.dtype.element_ty), inside)


INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on the CPU, slowly


def tuned(kernel, *blocks):
    """The kernel, with the fastest of a few (queries, keys, warps) a program, found at its first call
    with a head size, a kind of gates and a SIZE, the power of two that T fits in, which it does not read.

    From reports of registers: those of head size 64 in 16 bits spill none (tests/test_triton.py); the
    last is for larger heads and float32. The interpreter, which has no clock to go by, takes it.
    """
    blocks = blocks[-1:] if INTERPRETED else blocks
    configs = [triton.Config({"BM": m, "BN": n}, num_warps=w) for m, n, w in blocks]
    return triton.autotune(configs, key=["SIZE", "D", "SAMPLED", "CAUSAL"])(kernel)


FORWARD = (64, 32, 4), (128, 32, 8), (64, 64, 8), (32, 32, 4)
BACKWARD_Q = (64, 32, 4), (128, 32, 8), (32, 32, 4)
BACKWARD_KV = (64, 32, 8), (32, 32, 4)
forward = tuned(forward_kernel, *FORWARD)
backward_q = tuned(backward_q_kernel, *BACKWARD_Q)
backward_kv = tuned(backward_kv_kernel, *BACKWARD_KV)


# As operators of torch: torch.compile takes them whole, and asks the fake ones for shapes.


def how(q, k, bias, causal, sampled):
    """The last arguments of all three kernels, but for the sizes of their blocks."""
    (_, H, T, D), G, power = q.shape, k.shape[1], triton.next_power_of_2
    return T, 1 / math.sqrt(D), bias, H, H // G, power(T), causal, sampled, D, max(16, power(D))


@torch.library.custom_op("sparse_attention::gated", mutates_args=())
def gated(q: Tensor, k: Tensor, v: Tensor, start: Tensor, stride: Tensor, column: Tensor, bias: float,
          causal: bool, sampled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, log-sum-exp (B, H, T), and of each head (B, H): sum of p, number of open gates."""
    B, H, T, _ = q.shape
    y, lse, prob, opened = torch.empty_like(q), *(torch.empty(B, H, T, device=q.device) for _ in range(3))
    forward[lambda block: (triton.cdiv(T, block["BM"]), B * H)](
        q, k, v, y, lse, prob, opened, start, stride, column, *how(q, k, bias, causal, sampled))
    return y, lse, prob.sum(-1), opened.sum(-1)


@torch.library.custom_op("sparse_attention::gated_backward", mutates_args=())
def gated_backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, lse: Tensor, delta: Tensor, r: Tensor,
                   start: Tensor, stride: Tensor, column: Tensor, bias: float, causal: bool,
                   sampled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    (B, H, T, _), inputs = q.shape, (q, k, v, dy, lse, delta, r, start, stride, column)
    dq, dk, dv = map(torch.empty_like, (q, k, v))
    rest = how(q, k, bias, causal, sampled)
    backward_q[lambda block: (triton.cdiv(T, block["BM"]), B * H)](*inputs, dq, *rest)
    backward_kv[lambda block: (triton.cdiv(T, block["BN"]), B * k.shape[1])](*inputs, dk, dv, *rest)
    return dq, dk, dv


def save(ctx, inputs, output):
    (q, k, v, *keys, ctx.bias, ctx.causal, ctx.sampled), (y, lse, *_) = inputs, output
    ctx.save_for_backward(q, k, v, y, lse, *keys)


def backward(ctx, dy, _, dprob, __):
    q, k, v, y, lse, *keys = ctx.saved_tensors
    delta = (dy.float() * y.float()).sum(-1)
    return *gated_backward(q, k, v, dy.contiguous(), lse, delta, dprob.contiguous(), *keys, ctx.bias,
                           ctx.causal, ctx.sampled), *6 * [None]


gated.register_fake(lambda q, *_: (
    torch.empty_like(q), *(q.new_empty(q.shape[:dims], dtype=torch.float32) for dims in (3, 2, 2))))
gated_backward.register_fake(lambda q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))))
gated.register_autograd(backward, setup_context=save)


def triton_gated(q, k, v, bias, keys, causal):
    """sparse.naive for q (B, H, T, D), k and v (B, H_kv, T, D) in their own dtype, on a GPU.

    keys: of the noise, from sparse.noise_keys, or None for deterministic gates.
    """
    T = q.shape[2]
    pairs = T * (T + 1) // 2 if causal else T * T
    sampled = keys is not None
    if not sampled:  # nobody reads them
        rows = torch.zeros(*q.shape[:3], 1, dtype=torch.int32, device=q.device)
        keys = rows, rows, rows[0, 0, :, 0]
    y, _, prob, opened = gated(*(x.contiguous() for x in (q, k, v, *keys)), bias, causal, sampled)
    return y, prob / pairs, opened.detach() / pairs
