"""sparse.naive in tiles: some heads by 64 query rows at a time, computed again in the backward pass.

Memory is linear in T, because no T x T matrix is kept. A tile holds whole rows, so it can take their
softmax by itself. With w = p (1 - p), g = sigmoid(s + b + n) and r = dE / pairs the gradients are

    ds = a ((A + g (1 - g)) (dy V^T) - dy . y) + r w,   dQ = ds K,   dK = ds^T Q,   dV = (A a)^T dy

The code works in place in a few buffers, because allocating each intermediate takes half as long again.
"""

import math

import torch
from torch.autograd.function import once_differentiable

ROWS, TILE = 64, 2**18  # query rows and logits (1 MiB of float32) in a tile, measured


def tiles(N, T, causal):
    """Slices (heads, queries, keys) that cover N heads, TILE logits each or one head's rows.

    Under the causal mask the keys end with the tile's last query, which skips the upper triangle.
    """
    rows = min(ROWS, T)
    heads = max(1, TILE // (rows * T))
    for n in range(0, N, heads):
        for i in range(0, T, rows):
            end = min(i + rows, T)
            yield slice(n, min(n + heads, N)), slice(i, end), slice(0, end if causal else T)


class Tile:
    """Computes the logits and gates of one tile after another in the same buffers."""

    def __init__(self, q, k, bias, causal, keys, uniform):
        (N, T, D), rows = q.shape, min(ROWS, q.shape[1])
        self.q, self.k, self.bias, self.causal = q / math.sqrt(D), k, bias, causal
        self.keys, self.uniform = keys, uniform
        self.mask = torch.full((rows, rows), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        size = min(N, max(1, TILE // (rows * T))) * rows * T
        dtypes = [q.dtype] * 6 + [torch.int32]
        self.memory = [torch.empty(size, dtype=dtype, device=q.device) for dtype in dtypes]

    def __call__(self, n, i, j):
        """s, p, A, u (None for deterministic gates) and two free buffers, each (heads, R, K)."""
        q, k = self.q[n, i], self.k[n, j]  # (heads, R, D), (heads, K, D)
        shape = len(q), q.shape[1], k.shape[1]
        s, p, A, u, free1, free2, bits = (x[: math.prod(shape)].view(shape) for x in self.memory)
        torch.bmm(q, k.mT, out=s)
        if self.causal:  # only the last R x R square holds pairs that are not allowed
            R = q.shape[1]
            s[..., -R:].add_(self.mask[:R, :R])
        torch.add(s, self.bias, out=p)
        if not self.keys:
            torch.gt(p, 0, out=A)
            return s, p.sigmoid_(), A, None, free1, free2
        start, stride, column = self.keys
        self.uniform(start[n, i], stride[n, i], column[j], (bits, u))
        torch.lt(u, p.sigmoid_(), out=A)  # the same event as s + b - logit(u) > 0
        return s, p, A, u, free1, free2


class Chunked(torch.autograd.Function):
    """`naive` for q (B * H, T, D) and k, v (B * H_kv, T, D). Saves q, k, v, y and the noise's keys."""

    @staticmethod
    def forward(ctx, bias, causal, uniform, q, k, v, *keys):
        ctx.save_for_backward(q, k, v, y := torch.empty_like(q), *keys)
        ctx.constants = bias, causal, uniform
        group, (N, T, _) = len(q) // len(k), q.shape
        k, v = (x.repeat_interleave(group, dim=0) if group > 1 else x for x in (k, v))
        E, opened = q.new_zeros(N), q.new_zeros(N)
        tile = Tile(q, k, bias, causal, keys, uniform)
        for n, i, j in tiles(N, T, causal):
            s, p, A, *_ = tile(n, i, j)
            a = torch.softmax(s, -1, out=s)
            y[n, i] = torch.bmm(a.mul_(A), v[n, j])  # bmm(out=) into a slice takes the heads one by one
            E[n].add_(p.sum((-2, -1)))
            opened[n].add_(A.sum((-2, -1)))
        ctx.pairs = T * (T + 1) // 2 if causal else T * T
        ctx.mark_non_differentiable(opened)
        return y, E.div_(ctx.pairs), opened.div_(ctx.pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dE, _):
        (q, k, v, y, *keys), (bias, causal, uniform) = ctx.saved_tensors, ctx.constants
        with torch.autocast(dy.device.type, enabled=False):
            gradients = backward(dy, dE / ctx.pairs, q, k, v, y, keys, bias, causal, uniform)
        return None, None, None, *gradients, *(None for _ in keys)


def backward(dy, r, q, k, v, y, keys, bias, causal, uniform):
    """dq, dk, dv by the equations at the top of this file; r (N,)."""
    group = len(q) // len(k)
    k, v = (x.repeat_interleave(group, dim=0) if group > 1 else x for x in (k, v))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta, r = (dy * y).sum(-1, keepdim=True), r[:, None, None]  # (N, T, 1), (N, 1, 1)
    tile = Tile(q, k, bias, causal, keys, uniform)
    for n, i, j in tiles(*q.shape[:2], causal):
        s, p, A, u, w, dA = tile(n, i, j)
        a = torch.softmax(s, -1, out=s)
        torch.addcmul(p, p, p, value=-1, out=w)  # p (1 - p)
        g = sampled_gate(p, u, dA) if keys else p  # in p's place
        slope = g.addcmul_(g, g, value=-1).add_(A)  # A + g (1 - g), in g's place
        dv[n, j].baddbmm_(A.mul_(a).mT, dy[n, i])
        torch.bmm(dy[n, i], v[n, j].mT, out=dA)
        ds = slope.mul_(dA)
        ds.sub_(delta[n, i]).mul_(a)
        ds.addcmul_(w, r[n])
        torch.div(torch.bmm(ds, k[n, j]), math.sqrt(q.shape[-1]), out=dq[n, i])
        dk[n, j].baddbmm_(ds.mT, tile.q[n, i])
    if group > 1:
        dk, dv = (x.unflatten(0, (-1, group)).sum(1) for x in (dk, dv))
    return dq, dk, dv


def sampled_gate(p, u, work):
    """g = sigmoid(s + b - logit(u)) without a logarithm, in place of p; overwrites all three.

    The odds of g are those of p over those of u: g = x / (x + z), x = p (1 - u), z = u (1 - p).
    """
    pu = torch.mul(p, u, out=work)
    x, z = p.sub_(pu), u.sub_(pu)
    return x.div_(z.add_(x))


def chunked(q, k, v, bias, keys, causal, uniform):
    """`naive` by tiles. uniform: sparse.uniform, which makes the noise of a tile from keys."""
    start, stride, *column = keys or (None, None)
    keys = (start.flatten(0, 1), stride.flatten(0, 1), *column) if keys else ()
    y, *edges = Chunked.apply(bias, causal, uniform, *(x.flatten(0, 1) for x in (q, k, v)), *keys)
    return y.view(q.shape), *(x.view(q.shape[:2]) for x in edges)
