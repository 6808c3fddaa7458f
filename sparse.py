"""
Gated attention: softmax attention in which every edge i <- j passes a Bernoulli gate.

For one head with queries q_i, keys k_j, values v_j of size D, and one constant b:

    s_ij = q_i . k_j / sqrt(D)                  logit, shared by the softmax and the gate
    a_ij = softmax_j(s_ij)                      over all allowed keys, gates or not        (1)
    A_ij ~ Bernoulli(p_ij)                      the gate, p_ij = sigmoid(s_ij + b)         (2)
    y_i  = sum_j A_ij a_ij v_j                  not renormalised: no open gate, no output  (3)
    E    = mean of p_ij over allowed pairs      expected share of open edges: the penalty  (4)

The gate has no parameters of its own, so a pretrained transformer's weights load unchanged.
Training samples A and sends the gradient straight through it; evaluation and analysis use
A = 1[s + b > 0]. Source: arXiv 2512.05865; the gate comes from SPARTAN, arXiv 2411.06890.

`naive` is the specification. `chunked` is the same in tiles, with memory linear in T.

    python sparse.py        checks chunked against naive, then measures speed and memory
"""

import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# -----------------------------------------------------------------------------
# noise: one uniform number for each (sequence seed, head, i, j), whatever the tiles and the batch


def fold_in(seed, n):
    """A new int64 seed from a seed and a number, int64 tensors that broadcast (splitmix64).

    Its constants, 0x9E37... and so on, are written as signed numbers; products wrap at 2^64.
    """
    z = torch.as_tensor(seed) + (torch.as_tensor(n) + 1) * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # the masks make shifts logical
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def sequence_seeds(seed, B, device):
    """The int64 (B,) seeds of a batch: a tensor stays as it is, an int means seed, seed + 1, ..."""
    if isinstance(seed, int) and not isinstance(seed, bool) and abs(seed) < 2**62:
        return torch.arange(seed, seed + B, device=device)
    if not torch.is_tensor(seed) or seed.dtype != torch.int64 or seed.shape != (B,):
        got = f"{seed.dtype} {tuple(seed.shape)}" if torch.is_tensor(seed) else repr(seed)
        raise ValueError(f"seed must be None, an int or an int64 tensor of shape ({B},), got {got}")
    return seed.to(device)


def noise_keys(seeds, H, T):
    """int32 keys for `uniform`: start and stride of every row (B, H, T, 1), and columns (T,)."""
    numbers = torch.arange(max(H, T), device=seeds.device)
    heads = fold_in(seeds[:, None], numbers[:H])
    rows = fold_in(heads[..., None, None], numbers[:T, None])
    return rows.int(), (rows >> 32).int() | 1, fold_in(0, numbers[:T]).int()


HALF = torch.tensor(0.5 + 2.0**-24)  # a tensor, for torch.add takes no number first


def uniform(start, stride, column, buffers=(None, None)):
    """u_ij in (0, 1), float32, from noise_keys: rows (..., R, 1), columns (K,) -> (..., R, K).

    Each row is a random multiply-add of the scrambled column number modulo 2^32, of which the top
    23 bits stay: multiply-shift hashing (Dietzfelbinger 1996), any two columns are independent. The
    number is the middle of its cell, (bits + 1/2) / 2^23: exact in float32, never 0 and never 1.
    """
    x, u = buffers
    x = torch.mul(stride, column, out=x).add_(start)
    x >>= 9  # an arithmetic shift: bits - 2^22
    u = x.float() if u is None else u.copy_(x)
    return torch.add(HALF, u, alpha=2.0**-23, out=u)


# -----------------------------------------------------------------------------
# the specification


def allowed_pairs(T, causal, device=None):
    """Which keys j (columns) query i (row) may read, bool (T, T)."""
    pairs = torch.ones(T, T, dtype=torch.bool, device=device)
    return pairs.tril() if causal else pairs


def gates(s, bias, seeds):
    """The gates A of logits s (B, H, T, T): exactly 0 or 1, with the straight-through gradient.

    A gate is open when s + b + n > 0 with n ~ Logistic(0, 1): probability sigmoid(s + b), (2).
    In the backward pass it is sigmoid(s + b + n). Deterministic gates (no seeds) have n = 0.
    """
    x = s + bias
    if seeds is not None:
        u = uniform(*noise_keys(seeds, s.shape[1], s.shape[2]))
        x = x - torch.logit(u.to(s.dtype))
    soft = torch.sigmoid(x)
    return (x > 0).to(s.dtype) + (soft - soft.detach())  # the bracket is 0, its gradient is not


def naive(q, k, v, bias, seeds, causal):
    """Equations 1-4 as they stand, q, k, v (B, H, T, D); holds several (B, H, T, T) tensors."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    T, D = q.shape[-2:]
    allowed = allowed_pairs(T, causal, q.device)
    s = (q @ k.mT / math.sqrt(D)).masked_fill(~allowed, -torch.inf)
    a = torch.softmax(s, dim=-1)  # (1)
    A = gates(s, bias, seeds)  # (2)
    y = (A * a) @ v  # (3)
    E = torch.sigmoid(s + bias).sum((-2, -1)) / allowed.sum()  # (4), one a head
    return y, E, A.detach().sum((-2, -1)) / allowed.sum()


# -----------------------------------------------------------------------------
# the same in tiles: some heads by 64 query rows at a time, computed again in the backward pass

ROWS, TILE = 64, 2**18  # query rows and logits (1 MiB of float32) in a tile, measured


def tiles(N, T, causal):
    """Slices (heads, queries, keys) that cover N heads, TILE logits each or one head's rows.

    Rows are whole, so a tile holds its softmax. Under the causal mask they end with the tile's
    last query, which skips the upper triangle.
    """
    rows = min(ROWS, T)
    heads = max(1, TILE // (rows * T))
    for n in range(0, N, heads):
        for i in range(0, T, rows):
            end = min(i + rows, T)
            yield slice(n, min(n + heads, N)), slice(i, end), slice(0, end if causal else T)


class Tile:
    """Computes one tile after another in the same few buffers, which is faster than allocating."""

    def __init__(self, q, k, bias, seeds, causal):
        (N, T, D), rows = q.shape, min(ROWS, q.shape[1])
        self.q, self.k, self.bias, self.keys = q / math.sqrt(D), k, bias, None
        if seeds is not None:
            start, stride, column = noise_keys(seeds, N // len(seeds), T)
            self.keys = start.flatten(0, 1), stride.flatten(0, 1), column
        self.corner = torch.full((rows, rows), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        self.causal = causal
        size = min(N, max(1, TILE // (rows * T))) * rows * T
        dtypes = [q.dtype] * 6 + [torch.int32]
        self.memory = [torch.empty(size, dtype=dtype, device=q.device) for dtype in dtypes]
        self.shaped = {}

    def buffers(self, *shape):
        if shape not in self.shaped:
            self.shaped[shape] = [x[: math.prod(shape)].view(shape) for x in self.memory]
        return self.shaped[shape]

    def __call__(self, n, i, j):
        """s, p, A, u (None for deterministic gates) and two free buffers, all (G, R, K)."""
        q, k = self.q[n, i], self.k[n, j]  # (G, R, D), (G, K, D)
        s, p, A, u, free1, free2, bits = self.buffers(len(q), q.shape[1], k.shape[1])
        torch.bmm(q, k.mT, out=s)
        if self.causal:  # only the last rows x rows square holds pairs that are not allowed
            R = q.shape[1]
            s[..., -R:].add_(self.corner[:R, :R])
        torch.add(s, self.bias, out=p)
        if self.keys is None:
            torch.gt(p, 0, out=A)
            return s, p.sigmoid_(), A, None, free1, free2
        start, stride, column = self.keys
        uniform(start[n, i], stride[n, i], column[j], (bits, u))
        torch.lt(u, p.sigmoid_(), out=A)  # the same event as s + b - logit(u) > 0
        return s, p, A, u, free1, free2


class Chunked(torch.autograd.Function):
    """`naive` for q (B * H, T, D) and k, v (B * H_kv, T, D), one seed for each of the B sequences.

    Saves q, k, v, y and the seeds; a tile holds whole rows, so the backward pass takes their softmax
    again. With r = dE / pairs, w = p (1 - p) and g = sigmoid(s + b + n), the gradients are
        ds = a ((A + g (1 - g)) (dy V^T) - dy . y) + r w,  dQ = ds K,  dK = ds^T Q,  dV = (A a)^T dy
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, seeds, causal):
        inputs, group = (q, k, v), len(q) // len(k)
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        N, T, _ = q.shape
        y, E, share = torch.empty_like(q), q.new_zeros(N), q.new_zeros(N)
        tile = Tile(q, k, bias, seeds, causal)
        for n, i, j in tiles(N, T, causal):
            s, p, A, *_ = tile(n, i, j)
            a = torch.softmax(s, -1, out=s)
            torch.bmm(a.mul_(A), v[n, j], out=y[n, i])
            E[n].add_(p.sum((-2, -1)))
            share[n].add_(A.sum((-2, -1)))
        pairs = T * (T + 1) // 2 if causal else T * T
        ctx.save_for_backward(*inputs, y, seeds)
        ctx.bias, ctx.causal, ctx.pairs = bias, causal, pairs
        ctx.mark_non_differentiable(share)
        return y, E.div_(pairs), share.div_(pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dE, _):
        with torch.autocast(dy.device.type, enabled=False):
            return Chunked.gradients(ctx, dy, dE)

    @staticmethod
    def gradients(ctx, dy, dE):
        q, k, v, y, seeds = ctx.saved_tensors
        group = len(q) // len(k)
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (dy * y).sum(-1, keepdim=True)  # the softmax's own term, (N, T, 1)
        r = (dE / ctx.pairs)[:, None, None]
        tile = Tile(q, k, ctx.bias, seeds, ctx.causal)
        for n, i, j in tiles(*q.shape[:2], ctx.causal):
            # in place, so the order counts: g takes p's place, A a takes A's, dA is free until then
            s, p, A, u, w, dA = tile(n, i, j)
            a = torch.softmax(s, -1, out=s)
            torch.addcmul(p, p, p, value=-1, out=w)  # p (1 - p)
            g = p if u is None else sampled_gate(p, u, dA)
            slope = g.addcmul_(g, g, value=-1).add_(A)  # A + g (1 - g)
            dv[n, j].baddbmm_(A.mul_(a).mT, dy[n, i])
            torch.bmm(dy[n, i], v[n, j].mT, out=dA)
            ds = slope.mul_(dA).sub_(delta[n, i]).mul_(a).addcmul_(w, r[n])
            torch.div(torch.bmm(ds, k[n, j]), math.sqrt(q.shape[-1]), out=dq[n, i])
            dk[n, j].baddbmm_(ds.mT, tile.q[n, i])
        if group > 1:
            dk, dv = (x.unflatten(0, (-1, group)).sum(1) for x in (dk, dv))
        return dq, dk, dv, None, None, None


def sampled_gate(p, u, work):
    """g = sigmoid(s + b - logit(u)) without a logarithm, in place of p; overwrites all three.

    The odds of g are those of p over those of u: g = x / (x + z), x = p (1 - u), z = u (1 - p).
    """
    pu = torch.mul(p, u, out=work)
    x, z = p.sub_(pu), u.sub_(pu)
    return x.div_(z.add_(x))


def chunked(q, k, v, bias, seeds, causal):
    """`naive` by tiles: see Chunked."""
    y, *edges = Chunked.apply(*(x.flatten(0, 1) for x in (q, k, v)), bias, seeds, causal)
    return y.view(q.shape), *(x.view(q.shape[:2]) for x in edges)


# -----------------------------------------------------------------------------
# what the rest of the project calls

IMPLEMENTATIONS = ("naive", "chunked", "triton", "auto")


def implementation(impl, q):
    """(function, the dtype that it computes in) for q; "auto" is the kernel where there is a GPU."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    fits = q.dtype != torch.float64 and q.shape[-1] <= 128
    if impl == "triton" or (impl == "auto" and q.is_cuda and fits):
        try:
            from plumbing.triton_gated import INTERPRETED, triton_gated
        except ImportError:
            if impl == "triton":
                raise ValueError("impl='triton' needs the package triton, which is not here") from None
        else:
            if not fits or not (q.is_cuda or INTERPRETED):
                raise ValueError("impl='triton' needs tensors on a GPU, float32 or shorter, and heads of "
                                 f"at most 128: got {q.device.type}, {q.dtype}, {q.shape[-1]}")
            return partial(triton_gated, noise_keys=noise_keys), q.dtype
    return naive if impl == "naive" else chunked, torch.promote_types(q.dtype, torch.float32)


def gated_attention(q, k, v, bias=0.0, seed=None, causal=True, impl="auto"):
    """Attention through Bernoulli gates, equations 1-4.

    q (B, H, T, D); k, v (B, H_kv, T, D), H a multiple of H_kv, one gate a query head; any float
    dtype. bias: the constant b. seed: None for deterministic gates A = 1[s + b > 0]; an int
    (sequence n of the batch has seed + n) or int64 (B,) for sampled ones. impl: IMPLEMENTATIONS.
    Returns y (B, H, T, D) in q's dtype; open_prob (B, H), E of each head, differentiable; and
    open_frac (B, H), the share of allowed pairs whose gate is 1, without gradient. Everything
    inside, and both shares, are float32 whatever q is (float64 if q is). Bad input: ValueError.
    """
    bias, seeds = checked(q, k, v, bias, seed)
    form, dtype = implementation(impl, q)
    with torch.autocast(q.device.type, enabled=False):
        y, open_prob, open_frac = form(*(x.to(dtype) for x in (q, k, v)), bias, seeds, causal)
    return y.to(q.dtype), open_prob, open_frac


def gate_map(q, k, bias=0.0, seed=None, causal=True):
    """The gates themselves, bool (B, H, T, T), False on pairs that are not allowed; no gradient."""
    bias, seeds = checked(q, k, k, bias, seed)
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        open_ = gates(q @ k.mT / math.sqrt(q.shape[-1]), bias, seeds).bool()
    return open_ & allowed_pairs(q.shape[2], causal, q.device)


def checked(q, k, v, bias, seed):
    """The bias as a float and the seeds as a tensor or None, or a ValueError in one line."""
    if not all(torch.is_tensor(x) for x in (q, k, v)):
        raise ValueError("q, k and v must be tensors")
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if not all(x.dim() == 4 and x.is_floating_point() for x in (q, k, v)):
        raise ValueError(f"q, k, v must be float tensors (batch, heads, T, head size), got {shapes}")
    B, H, T, D = q.shape
    if k.shape != v.shape or k.shape != (B, k.shape[1], T, D) or 0 in (*q.shape, *k.shape):
        raise ValueError(f"q (B, H, T, D) and k, v (B, H_kv, T, D) do not fit together: {shapes}")
    if H % k.shape[1]:
        raise ValueError(f"{H} query heads are not a multiple of {k.shape[1]} key-value heads")
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
        raise ValueError(f"the gate bias must be a finite number, got {bias!r}")
    seeds = None if seed is None else sequence_seeds(seed, B, q.device)
    return float(bias), seeds



# -----------------------------------------------------------------------------
# run as a script: the fast form equals the naive one, and what it costs


@dataclass
class Flags:
    out: str = "out/sparse"  # folder for results.json
    rounds: int = 5  # timings of each case, interleaved; the median counts
    threads: int = 1  # CPU threads

    def __post_init__(self):
        if min(self.rounds, self.threads) < 1:
            raise ValueError("--rounds and --threads must be at least 1")


# B, H, H_kv, T of heads of 64. The shapes of GPT-2 small and medium, LLaMA-1B and a long context
ON_CPU = [(B, 12, 12, T) for T in (256, 512, 1024) for B in (1, 4)] + [
    (1, 16, 16, 1024), (1, 32, 8, 1024), (1, 12, 12, 4096)]
ON_GPU = [(1, 12, 12, T) for T in (256, 512, 1024, 2048, 4096, 8192)] + [
    (16, 12, 12, 1024), (16, 16, 16, 1024), (16, 32, 8, 1024), (2, 32, 8, 4096)]


def forward_backward(impl, B, H, H_kv, T, D=64, dtype=torch.float32, backward=True):
    """A function that runs causal attention, and its gradients, once and returns everything."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(B, heads, T, D, generator=random).to(device, dtype)
                   for heads in (H, H_kv, H_kv, H))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]

    def run():
        if impl == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H_kv < H)
            return y, *(torch.autograd.grad(y, inputs, dy) if backward else ())
        y, E, _ = gated_attention(q, k, v, bias=0.5, seed=0, impl=impl)
        return y, E, *(torch.autograd.grad([y, E.sum()], inputs, [dy, E.new_ones(())]) if backward else ())

    return run


def seconds(run):
    """Wall time of one run."""
    start = time.perf_counter()
    result = run()
    if result[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_memory(impl, *shape):
    """Peak MiB held beyond the inputs by one forward and backward pass, in a fresh process."""
    if torch.cuda.is_available():
        run = forward_backward(impl, *shape, dtype=torch.bfloat16)
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    forward_backward(impl, 1, 12, 12, 8)()
    run = forward_backward(impl, *shape)
    before = peak_memory()
    run()
    return peak_memory() - before


def peak_memory():
    """The most MiB this process has held so far, as Linux counts them."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def measure(shape, impls, rounds, dtype):
    """A row of the table: medians of interleaved rounds, and the memory of each impl."""
    row = dict(zip(("B", "H", "H_kv", "T"), shape))
    B, H, _, T = shape
    impls = [impl for impl in impls if impl != "naive" or B * H * T * T < 2**27]  # 36 bytes a logit
    for name, backward in (("", True), ("forward_", False)):
        runs = {impl: forward_backward(impl, *shape, dtype=dtype, backward=backward) for impl in impls}
        times = {impl: [] for impl in impls}
        for n in range(rounds + 1):
            for impl in impls:
                took = seconds(runs[impl])
                if n > 0:  # the first is warm-up
                    times[impl].append(took)
        for impl in impls:
            row[f"ms_{name}{impl}"] = round(1e3 * statistics.median(times[impl]), 3)
            row[f"ratio_{name}{impl}"] = round(row[f"ms_{name}{impl}"] / row[f"ms_{name}sdpa"], 3)
    for impl in impls:
        code = f"import sparse; print(sparse.extra_memory({impl!r}, *{shape}))"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                               cwd=os.path.dirname(os.path.abspath(__file__)))
        row[f"mib_{impl}"] = round(float(child.stdout), 1) if child.returncode == 0 else None
    return row


def draw(table, impls, path):
    """Time and memory against T, one sequence of 12 heads, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    from plumbing.flags import save_figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, key, label in zip(figure.subplots(1, 2), ("ms", "mib"), (
            "forward + backward (ms)", "memory beyond the inputs (MiB)")):
        for impl in impls:
            rows = [row for row in table if (row["B"], row["H"]) == (1, 12) and row.get(f"{key}_{impl}")]
            axis.plot([row["T"] for row in rows], [row[f"{key}_{impl}"] for row in rows], "o-", label=impl)
        axis.set(xscale="log", yscale="log", xlabel="tokens T, 1 sequence of 12 heads x 64", ylabel=label)
        axis.set_xticks(sorted({row["T"] for row in table}))
        axis.xaxis.set(major_formatter="{x:g}", minor_formatter="")
        axis.yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    save_figure(figure, path)


def main(flags):
    from plumbing.flags import open_folder, write_results

    started = time.time()
    open_folder(flags.out)
    torch.set_num_threads(flags.threads)
    gpu = torch.cuda.is_available()
    impls = ["sdpa", "naive", "chunked"] + ["triton"] * gpu
    dtype, shapes = (torch.bfloat16, ON_GPU) if gpu else (torch.float32, ON_CPU)
    exact = forward_backward("naive", 2, 12, 12, 200, dtype=torch.float64)()
    errors = {}
    print("against naive in float64, 2 x 12 heads x 200 tokens x 64, sampled gates; relative error of "
          "y, E, dq, dk, dv:")
    for impl in impls[2:]:
        fast = forward_backward(impl, 2, 12, 12, 200)()
        errors[impl] = [((f - e).norm() / e.norm()).item() for f, e in zip(fast, exact)]
        print(f"  {impl}:", " ".join(f"{e:.0e}" for e in errors[impl]))

    where = torch.cuda.get_device_name() if gpu else f"{flags.threads} CPU thread(s)"
    print(f"\ncausal, heads of 64, {str(dtype)[6:]}, {where}: time over F.scaled_dot_product_attention's, "
          "forward + backward (forward), medians;\nMiB held beyond the inputs")
    print(f"{'B':>3} {'H':>3} {'H_kv':>4} {'T':>5} | {'sdpa ms':>8} " + " ".join(
        f"{impl:>14}" for impl in impls[1:]) + " | MiB: " + " ".join(f"{impl:>8}" for impl in impls))
    table = []
    for shape in shapes:
        row = measure(shape, impls, flags.rounds, dtype)
        table.append(row)
        times = [f"{row[f'ratio_{i}']:.2f} ({row[f'ratio_forward_{i}']:.2f})" if f"ratio_{i}" in row else "-"
                 for i in impls[1:]]
        print("{:3} {:3} {:4} {:5} | ".format(*shape) + f"{row['ms_sdpa']:8.2f} " + " ".join(
            f"{cell:>14}" for cell in times) + " |      " + " ".join(
            f"{row.get(f'mib_{impl}') or '-':>8}" for impl in impls), flush=True)
    picture = os.path.join(flags.out, "cost.png")
    draw(table, impls, picture)
    print("\nwrote", write_results(flags.out, started, "cuda" if gpu else "cpu", relative_errors=errors,
                                   table=table), picture)


if __name__ == "__main__":
    from plumbing import flags

    flags.run(main, Flags, __doc__)
