"""What the gate costs: time and memory of each form beside F.scaled_dot_product_attention.

    python -m plumbing.attention_cost --rounds 9

Heads of 64, causal, float32 on a CPU and bfloat16 on a GPU. Times are medians of interleaved rounds,
forward + backward and forward alone; memory is what one pass holds beyond its inputs.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from plumbing import kernel
from plumbing.figures import draw_cost
from plumbing.flags import check, results_folder, run, write_results
from plumbing.runs import peak_memory
from sparse import choose, gated_attention, naive, noise_keys


@dataclass
class Flags:
    out: str = "out/attention"  # folder for results.json and cost.png
    rounds: int = 5  # timings of each case, interleaved; the median counts
    threads: int = 1  # CPU threads

    def __post_init__(self):
        check(self, {"rounds threads": "at least 1"})


# B, H, H_kv, T: the shapes of GPT-2 small and medium, LLaMA-1B and a long context
ON_CPU = [(B, 12, 12, T) for T in (256, 512, 1024) for B in (1, 4)] + [
    (1, 16, 16, 1024), (1, 32, 8, 1024), (1, 12, 12, 4096)]
ON_GPU = [(1, 12, 12, T) for T in (256, 512, 1024, 2048, 4096, 8192)] + [
    (16, 12, 12, 1024), (16, 16, 16, 1024), (16, 32, 8, 1024), (2, 32, 8, 4096)]


def one_pass(impl, B, H, H_kv, T, dtype=torch.float32, backward=True):
    """A function that runs causal attention, and its gradients, once and returns everything."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(B, heads, T, 64, generator=random).to(device, dtype)
                   for heads in (H, H_kv, H_kv, H))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]

    def run_once():
        if impl == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H_kv < H)
            return y, *(torch.autograd.grad(y, inputs, dy) if backward else ())
        y, E, _ = gated_attention(q, k, v, bias=0.5, seed=0, impl=impl)
        return y, E, *(torch.autograd.grad([y, E.sum()], inputs, [dy, E.new_ones(())]) if backward else ())

    return run_once


def seconds(run_once):
    """Wall time of one pass."""
    start = time.perf_counter()
    result = run_once()
    if result[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_memory(impl, *shape):
    """Peak MiB held beyond the inputs by one forward and backward pass, in a fresh process."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        one_pass(impl, 1, 12, 12, 8, torch.bfloat16)()
        run_once = one_pass(impl, *shape, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    one_pass(impl, 1, 12, 12, 8)()
    run_once = one_pass(impl, *shape)
    before = peak_memory()
    run_once()
    return 1024 * (peak_memory() - before)


def measure(shape, impls, rounds, dtype):
    """A row of the table: medians of interleaved rounds, and the memory of each impl."""
    row = dict(zip(("B", "H", "H_kv", "T"), shape))
    B, H, _, T = shape
    impls = [impl for impl in impls if impl != "naive" or B * H * T * T < 2**27]  # 36 bytes a logit
    for name, backward in (("", True), ("forward_", False)):
        passes = {impl: one_pass(impl, *shape, dtype, backward) for impl in impls}
        times = {impl: [] for impl in impls}
        for n in range(rounds + 1):
            for impl in impls:
                took = seconds(passes[impl])
                if n > 0:  # the first is warm-up
                    times[impl].append(took)
        for impl in impls:
            row[f"ms_{name}{impl}"] = round(1e3 * statistics.median(times[impl]), 3)
            row[f"ratio_{name}{impl}"] = round(row[f"ms_{name}{impl}"] / row[f"ms_{name}sdpa"], 3)
    for impl in impls:
        code = f"from plumbing.attention_cost import extra_memory; print(extra_memory({impl!r}, *{shape}))"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                               cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        row[f"mib_{impl}"] = round(float(child.stdout), 1) if child.returncode == 0 else None
    return row


def print_row(row, impls):
    times = [f"{row[f'ratio_{i}']:.2f} ({row[f'ratio_forward_{i}']:.2f})" if f"ratio_{i}" in row else "-"
             for i in impls[1:]]
    memory = [str(row.get(f"mib_{impl}") or "-") for impl in impls]
    print("{B:3} {H:3} {H_kv:4} {T:5} | {ms_sdpa:8.2f} ".format(**row)
          + " ".join(f"{cell:>14}" for cell in times) + " |      "
          + " ".join(f"{cell:>8}" for cell in memory), flush=True)


def main(flags):
    started, device = time.time(), "cuda" if torch.cuda.is_available() else "cpu"
    picture = os.path.join(results_folder(flags.out), "cost.png")
    torch.set_num_threads(flags.threads)
    impls, dtype, shapes = ["sdpa", "naive", "chunked"], torch.float32, ON_CPU
    if device == "cuda":
        impls, dtype, shapes = [*impls, "triton"], torch.bfloat16, ON_GPU
    errors = {}
    for impl in impls[2:]:
        form, _ = choose(impl, torch.empty(1, 1, 1, 64, device=device))
        errors[impl] = kernel.errors(form, naive, noise_keys, device)
        print(f"{impl} against naive in float64, relative errors of y, E, dq, dk, dv:",
              " ".join(f"{error:.0e}" for error in errors[impl]))
    where = torch.cuda.get_device_name() if device == "cuda" else f"{flags.threads} CPU thread(s)"
    print(f"\ncausal, heads of 64, {str(dtype)[6:]}, {where}: time over F.scaled_dot_product_attention's, "
          "forward + backward (forward), medians;\nMiB held beyond the inputs")
    print(f"{'B':>3} {'H':>3} {'H_kv':>4} {'T':>5} | {'sdpa ms':>8} "
          + " ".join(f"{impl:>14}" for impl in impls[1:]) + " | MiB: "
          + " ".join(f"{impl:>8}" for impl in impls))
    table = []
    for shape in shapes:
        table.append(measure(shape, impls, flags.rounds, dtype))
        print_row(table[-1], impls)
    draw_cost(table, impls, picture)
    print("\nwrote", write_results(flags.out, started, device, relative_errors=errors, table=table), picture)


if __name__ == "__main__":
    run(main, Flags, __doc__)
