"""What is looked at before attention runs: the input, and whether the Triton kernel may be used.

A kernel that has never run on this GPU, driver and compiler is not trusted. At its first use for a
dtype it is compared with sparse.naive on a small case; if it errs or differs, "auto" does without it.
"""

import math

import torch

AGREED = {}  # {dtype: has the kernel given naive's numbers on this machine?}


def fits(q):
    """Can the kernel compute with such tensors?"""
    return q.dtype != torch.float64 and q.shape[-1] <= 128


def load(q):
    """The kernel's form for q, see plumbing/triton_gated.py; ValueError where it can not run."""
    try:
        from plumbing.triton_gated import INTERPRETED, triton_gated
    except ImportError:
        raise ValueError("impl='triton' needs the package triton, which is not here") from None
    if not fits(q) or not (q.is_cuda or INTERPRETED):
        raise ValueError("impl='triton' needs tensors on a GPU, float32 or shorter, and heads of at "
                         f"most 128: got {q.device.type}, {q.dtype}, {q.shape[-1]}")
    return triton_gated


def agrees(q, naive, noise_keys):
    """Does the kernel give naive's numbers in q's dtype? If it errs or differs, one line says so.

    torch.compile can not trace the comparison: there the answer is no until it was made once outside.
    """
    if q.dtype not in AGREED and not torch.compiler.is_compiling():
        problem = None
        try:
            worst = max(errors(load(q), naive, noise_keys, q.device, q.dtype))
            if not worst <= (1e-4 if q.dtype == torch.float32 else 2e-2):  # nan, too
                problem = f"it differs from naive by {worst:.0e}"
        except Exception as error:  # a compiler, a driver, the kernel itself: anything can go wrong
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        AGREED[q.dtype] = problem is None
        if problem:
            print(f"note: chunked attention takes the place of the Triton kernel: {problem}")
    return AGREED.get(q.dtype, False)


def errors(form, naive, noise_keys, device="cpu", dtype=torch.float32):
    """Relative errors of a form's y, E, dq, dk, dv against naive in float64, as five floats.

    One sequence of 100 tokens, 4 heads of 64, 2 key-value heads, sampled gates, b = 0.5.
    """
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 100, 64, generator=random).to(device, dtype) for heads in (4, 2, 2, 4)]
    keys = noise_keys(torch.zeros(1, dtype=torch.int64, device=device), 4, 100)
    found = []
    for one, kind in ((naive, torch.float64), (form, dtype)):
        *qkv, dy = (x.to(kind, copy=True) for x in inputs)
        with torch.enable_grad():
            y, E, _ = one(*(x.requires_grad_() for x in qkv), 0.5, keys, True)
            gradients = torch.autograd.grad([y, E], qkv, [dy, torch.ones_like(E)])
        found.append([x.detach().double() for x in (y, E, *gradients)])
    return [((fast - exact).norm() / exact.norm()).item() for exact, fast in zip(*found)]


def check_inputs(q, k, v, bias):
    """ValueError in one line unless the tensors fit together and b is a number."""
    if not all(torch.is_tensor(x) for x in (q, k, v)):
        raise ValueError("q, k and v must be tensors")
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if not all(x.dim() == 4 and x.is_floating_point() for x in (q, k, v)):
        raise ValueError(f"q, k, v must be float tensors (batch, heads, T, head size), got {shapes}")
    if k.shape != v.shape or q.shape[0::2] != k.shape[0::2] or q.shape[3] != k.shape[3] or not k.numel():
        raise ValueError(f"q (B, H, T, D) and k, v (B, H_kv, T, D) do not fit together: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key-value heads")
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
        raise ValueError(f"the gate bias must be a finite number, got {bias!r}")
