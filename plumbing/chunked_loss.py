"""Cross-entropy over a large vocabulary without its logits: they are made for 512 tokens at a time.

With z = W x of one token, p = softmax(z) and n tokens that count, the mean loss and its gradients are

    loss = mean(log sum exp z - z_target),   dx = W^T (p - onehot(target)) / n,   dW = sum of dz x^T

all of which the forward pass computes while the logits of a chunk are there; the backward pass scales.
"""

import torch
from torch.autograd.function import once_differentiable

CHUNK = 512  # tokens; fewer would not fill the matmuls


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        wide, W = torch.promote_types(dtype, torch.float32), weight.to(dtype)  # (V, C)
        needs_dx, needs_dW, *_ = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs_dx else None
        dW = torch.zeros_like(weight, dtype=wide) if needs_dW else None
        counts, loss = targets != -1, torch.zeros((), dtype=wide, device=x.device)
        share = counts.to(wide) / counts.sum().clamp(min=1)  # of each token in the mean; 0 if it is ignored
        for begin in range(0, len(x), CHUNK):
            rows = slice(begin, begin + CHUNK)
            target, x_rows = targets[rows, None].clamp(min=0), x[rows].to(dtype)
            log_p = torch.log_softmax(x_rows @ W.mT, -1, dtype=wide)  # (CHUNK, V)
            loss -= torch.where(counts[rows], log_p.gather(1, target)[:, 0], 0).sum()
            if not (needs_dx or needs_dW):
                continue
            dz = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0)).to(dtype)
            if needs_dx:
                dx[rows] = (dz @ W) * share[rows, None]
            if needs_dW:
                dW += dz.mT @ (x_rows * share[rows, None]).to(dtype)
        ctx.save_for_backward(dx, dW)
        return loss / counts.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        dx, dW = ctx.saved_tensors
        return *(None if d is None else d * d_loss.to(d.dtype) for d in (dx, dW)), None, None


def cross_entropy(x, weight, targets):
    """Mean cross-entropy in nats of the logits x W^T. x (B, T, C), W (V, C), targets (B, T), -1 is ignored.

    Multiplies in autocast's dtype if there is one; softmax and sum are float32 (float64 if x is).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()  # no gradients to compute
    return ChunkedLoss.apply(x.flatten(0, 1), weight, targets.flatten(), dtype)
