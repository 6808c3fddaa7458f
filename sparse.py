"""
Gated attention: softmax attention in which every edge i <- j passes a Bernoulli gate.

For one head with queries q_i, keys k_j, values v_j of size D, and one constant b:

    s_ij = q_i . k_j / sqrt(D)                  logit, shared by the softmax and the gate
    a_ij = softmax_j(s_ij)                      over all allowed keys, gates or not
    A_ij ~ Bernoulli(p_ij)                      the gate, p_ij = sigmoid(s_ij + b)         (1)
    y_i  = sum_j A_ij a_ij v_j                  not renormalised: no open gate, no output  (2)
    E    = mean of p_ij over allowed pairs      expected share of open edges: the penalty  (3)

The gate has no parameters of its own, so a pretrained transformer's weights load unchanged. Training
samples A and sends the gradient straight through it. Evaluation and analysis use A = 1[s + b > 0].
Source: arXiv 2512.05865; the gate comes from SPARTAN, arXiv 2411.06890.

    python sparse.py        the gates of eight tokens, and how well the fast forms agree with `naive`
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from plumbing import kernel
from plumbing.chunked import chunked
from plumbing.flags import run


def allowed_pairs(T, causal, device=None):
    """Which keys j (columns) query i (row) may read, bool (T, T)."""
    pairs = torch.ones(T, T, dtype=torch.bool, device=device)
    return pairs.tril() if causal else pairs


def gates(s, bias, u=None):
    """The gates A of logits s, equation 1: exactly 0 or 1, with the straight-through gradient.

    u: uniform numbers in (0, 1), one a logit. A gate is open when s + b + n > 0, where
    n = -logit(u) ~ Logistic(0, 1), so its probability is sigmoid(s + b). The backward pass sees
    sigmoid(s + b + n) in its place. Without u the gates are deterministic: n = 0.
    """
    x = s + bias if u is None else s + bias - torch.logit(u.to(s.dtype))
    soft = torch.sigmoid(x)
    return (x > 0).to(s.dtype) + (soft - soft.detach())  # the bracket is 0, its gradient is not


def naive(q, k, v, bias, keys, causal):
    """Equations 1-3 as they stand: the specification. It holds several (B, H, T, T) tensors."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, T, D)
    T, D = q.shape[-2:]
    allowed = allowed_pairs(T, causal, q.device)
    s = (q @ k.mT / math.sqrt(D)).masked_fill(~allowed, -torch.inf)  # (B, H, T, T)
    a = torch.softmax(s, dim=-1)
    A = gates(s, bias, uniform(*keys) if keys else None)  # (1)
    y = (A * a) @ v  # (2)
    E = torch.sigmoid(s + bias).sum((-2, -1)) / allowed.sum()  # (3), one a head
    return y, E, A.detach().sum((-2, -1)) / allowed.sum()


# -----------------------------------------------------------------------------
# what the rest of the project calls


def gated_attention(q, k, v, bias=0.0, seed=None, causal=True, impl="auto"):
    """Attention through Bernoulli gates, equations 1-3.

    q (B, H, T, D); k, v (B, H_kv, T, D), H a multiple of H_kv, one gate a query head; any float
    dtype. bias: the constant b. seed: None for deterministic gates A = 1[s + b > 0]; int64 (B,), or
    an int that means seed, seed + 1, ..., for sampled ones. impl: see `choose`.
    Returns y (B, H, T, D) in q's dtype; open_prob (B, H), E of each head, differentiable; and
    open_frac (B, H), the share of allowed pairs whose gate is 1, without gradient. Everything
    inside, and both shares, are float32 whatever q is (float64 if q is). Bad input: ValueError.
    """
    kernel.check_inputs(q, k, v, bias)
    form, dtype = choose(impl, q)
    keys = noise_keys(sequence_seeds(seed, len(q), q.device), *q.shape[1:3])
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
        y, open_prob, open_frac = form(q_, k_, v_, float(bias), keys, causal)
    return y.to(q.dtype), open_prob, open_frac


@torch.no_grad()
def gate_map(q, k, bias=0.0, seed=None, causal=True):
    """The gates themselves, bool (B, H, T, T), False on pairs that are not allowed; no gradient."""
    kernel.check_inputs(q, k, k, bias)
    keys = noise_keys(sequence_seeds(seed, len(q), q.device), *q.shape[1:3])
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    with torch.autocast(q.device.type, enabled=False):
        A = gates(q @ k.mT / math.sqrt(q.shape[-1]), bias, uniform(*keys) if keys else None)
    return A.bool() & allowed_pairs(q.shape[2], causal, q.device)


SMALL = 2**17  # logits up to which naive is faster than chunked on a CPU, measured


def choose(impl, q):
    """(form, the dtype it computes in). chunked is naive in tiles, with memory linear in T; triton is
    one kernel on a GPU; "auto" is the fastest, the kernel only once it has agreed with naive.
    """
    if impl == "auto":
        small = q.shape[:3].numel() * q.shape[2] <= SMALL and not torch.compiler.is_compiling()
        impl = "naive" if small else "chunked"  # torch's CPU compiler crashes on naive's backward pass
        if q.is_cuda and kernel.fits(q):
            impl = "triton" if kernel.agrees(q, naive, noise_keys) else "chunked"
    if impl == "triton":
        return kernel.load(q), q.dtype
    if impl not in ("naive", "chunked"):
        raise ValueError(f"impl must be one of naive, chunked, triton, auto, got {impl!r}")
    form = naive if impl == "naive" else partial(chunked, uniform=uniform)
    return form, torch.promote_types(q.dtype, torch.float32)


# -----------------------------------------------------------------------------
# The noise of a gate is a hash of (sequence seed, head, i, j), because torch.rand would depend on how
# the work is cut up: here every tile, batch split, rank and backward pass sees the same gates.


def fold_in(seed, n):
    """A new int64 seed from a seed and a number, int64 tensors that broadcast (splitmix64).

    Its constants, 0x9E37... and so on, are written as signed numbers; products wrap at 2^64.
    """
    z = torch.as_tensor(seed) + (torch.as_tensor(n) + 1) * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # the masks make shifts logical
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def sequence_seeds(seed, B, device):
    """The int64 (B,) seeds of a batch: an int means seed, seed + 1, ...; None stays None."""
    if seed is None:
        return None
    if isinstance(seed, int) and not isinstance(seed, bool) and abs(seed) < 2**62:
        return torch.arange(seed, seed + B, device=device)
    if not torch.is_tensor(seed) or seed.dtype != torch.int64 or seed.shape != (B,):
        got = f"{seed.dtype} {tuple(seed.shape)}" if torch.is_tensor(seed) else repr(seed)
        raise ValueError(f"seed must be None, an int or an int64 tensor of shape ({B},), got {got}")
    return seed.to(device)


def noise_keys(seeds, H, T):
    """int32 keys for `uniform`: start and stride of every row (B, H, T, 1), and columns (T,)."""
    if seeds is None:
        return None
    numbers = torch.arange(max(H, T), device=seeds.device)
    heads = fold_in(seeds[:, None], numbers[:H])
    rows = fold_in(heads[..., None, None], numbers[:T, None])
    return rows.int(), (rows >> 32).int() | 1, fold_in(0, numbers[:T]).int()


HALF = torch.tensor(0.5 + 2.0**-24)  # a tensor, because torch.add takes no number first


def uniform(start, stride, column, buffers=(None, None)):
    """u_ij in (0, 1), float32, from noise_keys: rows (..., R, 1), columns (K,) -> (..., R, K).

    Each row is a random multiply-add of the scrambled column number modulo 2^32, of which the top
    23 bits stay: multiply-shift hashing (Dietzfelbinger 1996), nearly all pairs of columns are independent. The
    number is the middle of its cell, (bits + 1/2) / 2^23: exact in float32, never 0 and never 1.
    """
    x, u = buffers
    x = torch.mul(stride, column, out=x).add_(start)
    x >>= 9  # an arithmetic shift: bits - 2^22
    u = x.float() if u is None else u.copy_(x)
    return torch.add(HALF, u, alpha=2.0**-23, out=u)


# -----------------------------------------------------------------------------
# run as a script


@dataclass
class Flags:
    bias: float = 0.0  # b: a gate is open with probability sigmoid(s + b)
    seed: int = 0  # of the sampled gates


def main(flags):
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 8, 16, generator=random)  # one sequence, one head, eight tokens
    sampled, deterministic = (gate_map(q, k, flags.bias, seed)[0, 0] for seed in (flags.seed, None))
    print(f"gates from token j to token i, b = {flags.bias:g}, # is open\n\n"
          "  i  sampled   s + b > 0")
    for i in range(8):
        rows = ("".join(".#"[int(A[i, j])] for j in range(i + 1)) for A in (sampled, deterministic))
        print("  {}  {:8}  {:8}".format(i, *rows))
    _, E, share = gated_attention(q, k, v, flags.bias, flags.seed)
    print(f"\nexpected share of open gates {E.item():.3f}, sampled {share.item():.3f}\n\n"
          "relative errors of y, E, dq, dk, dv against naive in float64")
    for impl, device in [("chunked", "cpu")] + [("triton", "cuda")] * torch.cuda.is_available():
        form, dtype = choose(impl, q.to(device))
        found = kernel.errors(form, naive, noise_keys, device, dtype)
        print(f"  {impl}  " + "  ".join(f"{error:.0e}" for error in found))


if __name__ == "__main__":
    run(main, Flags, __doc__)
