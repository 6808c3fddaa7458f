"""Losses over a large vocabulary without its logits: they are made for 512 tokens at a time.

With z = W x of one token, p = softmax(z), t the softmax of a dense model and n tokens that count:

    CE = mean(log sum exp z - z_target),       dz = (p - onehot(target)) / n
    KL = mean(sum over v of t (log t - log p)),     dz = (p - t) / n,     dx = W^T dz,   dW = sum of dz x^T

All are computed in the forward pass while the logits of a chunk are there; the backward pass scales.
"""

import torch
from torch.autograd.function import once_differentiable

CHUNK = 512  # tokens; fewer would not fill the matmuls


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, dense, dtype):
        wide, W = torch.promote_types(dtype, torch.float32), weight.to(dtype)  # (V, C)
        needs_dx, needs_dW, *_ = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs_dx else None
        dW = torch.zeros_like(weight, dtype=wide) if needs_dW else None
        counts, (ce, kl) = targets != -1, torch.zeros(2, dtype=wide, device=x.device)
        share = counts if dense is None else torch.ones_like(counts)  # tokens without a target diverge, too
        share = share.to(wide) / share.sum().clamp(min=1)  # of each token in the mean
        for begin in range(0, len(x), CHUNK):
            rows = slice(begin, begin + CHUNK)
            target, x_rows = targets[rows, None].clamp(min=0), x[rows].to(dtype)
            log_p = torch.log_softmax(x_rows @ W.mT, -1, dtype=wide)  # (CHUNK, V)
            ce -= torch.where(counts[rows], log_p.gather(1, target)[:, 0], 0).sum()
            if dense is not None:
                log_t = torch.log_softmax(dense[rows], -1, dtype=wide)
                t = log_t.exp()
                kl += log_t.sub_(log_p).mul_(t).sum()
            if not (needs_dx or needs_dW):
                continue
            if dense is None:
                dz = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0)).to(dtype)
            else:
                dz = log_p.exp_().sub_(t).to(dtype)
            if needs_dx:
                dx[rows] = (dz @ W) * share[rows, None]
            if needs_dW:
                dW += dz.mT @ (x_rows * share[rows, None]).to(dtype)
        ctx.save_for_backward(dx, dW)
        ce = ce / counts.sum()
        if dense is None:
            return ce, None
        ctx.mark_non_differentiable(ce)
        return ce, kl / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_ce, d_kl):
        dx, dW = ctx.saved_tensors
        d_loss = d_ce if d_kl is None else d_kl
        return *(None if d is None else d * d_loss.to(d.dtype) for d in (dx, dW)), None, None, None


def chunked_loss(x, weight, targets, dense=None):
    """Mean cross-entropy of the logits x W^T, nats. x (B, T, C), W (V, C), targets (B, T), -1 is ignored.

    With a dense model's logits (B, T, V) the pair of it, without gradient, and of the mean divergence
    KL(dense, this), of all tokens. Multiplies in autocast's dtype if there is one; softmax and sum are
    float32 (float64 if x is).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()  # no gradients to compute
    dense_rows = None if dense is None else dense.flatten(0, 1)
    ce, kl = ChunkedLoss.apply(x.flatten(0, 1), weight, targets.flatten(), dense_rows, dtype)
    return ce if dense is None else (ce, kl)
