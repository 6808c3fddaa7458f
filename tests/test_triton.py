"""The GPU kernel in Triton's interpreter, on the CPU: values and gradients against naive."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import model
from model import Config, Transformer
from plumbing import triton_gated
from sparse import gated_attention, noise_keys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def compare(T, D, H, H_kv, bias, seed, causal, dtype=torch.float32, tolerance=1e-5):
    random = torch.Generator().manual_seed(T + D)
    q, k, v = (torch.randn(2, heads, T, D, generator=random).to(dtype) for heads in (H, H_kv, H_kv))
    dy, dE = torch.randn(2, H, T, D, generator=random), torch.randn(2, H, generator=random)
    found = []
    for impl, kind in (("naive", torch.float64), ("triton", dtype)):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)]
        y, E, share = gated_attention(*inputs, bias, seed, causal, impl)
        found.append([y, E, share, *torch.autograd.grad([y, E], inputs, [dy.to(y.dtype), dE.to(E.dtype)])])
    for name, want, got in zip(("y", "E", "share", "dq", "dk", "dv"), *found):
        error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-3)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("T, D", [(1, 16), (17, 128), (64, 64), (70, 128), (130, 16)])
def test_values_and_gradients(T, D, seed):
    """Sampled gates have the noise of the specification: they are the same gates."""
    compare(T, D, 2, 2, 0.3, seed, True)


@pytest.mark.parametrize("H, H_kv", [(4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_queries_and_both_directions(H, H_kv, causal):
    compare(37, 16, H, H_kv, -0.5, 3, causal)


@pytest.mark.parametrize("bias", [30.0, -30.0])
@pytest.mark.parametrize("seed", [None, 7])
def test_all_open_and_all_shut(bias, seed):
    compare(33, 16, 2, 1, bias, seed, True)


def test_head_sizes_that_are_no_power_of_two():
    compare(20, 24, 2, 2, 0.0, 5, True)
    compare(20, 8, 2, 2, 0.0, 5, True)


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Triton 3.9's interpreter multiplies the bits of bfloat16 as integers; this mends it."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def exact(self, a, b, *rest):
        a, b = (interpreter.TensorHandle(self.cast_impl(x, tl.float32).data, tl.float32)
                if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", exact)


@pytest.mark.parametrize("seed", [None, 7])
def test_float16(seed):
    compare(64, 16, 2, 2, 0.5, seed, True, torch.float16, tolerance=2e-3)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("D", [64, 128])
def test_bfloat16(bfloat16_products, D, seed):
    compare(70, D, 2, 1, 0.5, seed, True, torch.bfloat16, tolerance=1e-2)


def test_the_same_twice():
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    runs = [gated_attention(q, k, v, 0.0, 1, True, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_what_the_kernel_can_not_do_is_refused_or_left_to_chunked():
    q = torch.randn(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="impl='triton' needs"):
        gated_attention(q, q, q, impl="triton")
    assert gated_attention(q, q, q)[0].dtype == torch.float64  # auto on a CPU
    code = ("import os, torch; os.environ.pop('TRITON_INTERPRET', None); from sparse import *; "
            "q = torch.randn(1, 1, 4, 16); gated_attention(q, q, q, impl='triton')")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "impl='triton' needs tensors on a GPU" in run.stderr


# -----------------------------------------------------------------------------
# inside a model, as train.py runs it


@pytest.fixture
def llama(monkeypatch):
    """A random gated LLaMA with grouped queries, and a way to choose the form of its attention."""
    torch.manual_seed(0)
    net = Transformer(Config(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=64,
                             n_inner=48, norm="rmsnorm", position="rope", mlp="swiglu", sparse=True,
                             attention_bias=False, mlp_bias=False, init_std=0.1))
    idx = torch.randint(50, (2, 21))

    def gradients(impl, call=net, dtype=None):
        monkeypatch.setattr(model, "gated_attention", partial(gated_attention, impl=impl))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits, loss, edges = call(idx, idx, seed=3)
        found = torch.autograd.grad(loss + edges.prob.mean(), list(net.parameters()))
        return torch.cat([x.flatten().float() for x in (logits, *found)])

    return net, gradients


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_it_is_the_model_with_the_other_form(llama):
    _, gradients = llama
    assert error(gradients("triton"), gradients("chunked")) < 1e-5


def test_autocast(llama, bfloat16_products):
    """Of the same bfloat16 inputs chunked, in float32, makes the same gates; 0.008 apart is rounding."""
    _, gradients = llama
    kernel, reference = (gradients(impl, dtype=torch.bfloat16) for impl in ("triton", "chunked"))
    assert error(kernel, reference) < 2e-2


def test_activation_checkpointing(llama):
    net, gradients = llama
    kept = gradients("triton")
    net.recompute = True
    assert torch.equal(gradients("triton"), kept)


def test_torch_compile(llama):
    """One graph, without a break: the kernels are operators that the compiler takes whole."""
    net, gradients = llama
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert error(gradients("triton", compiled), gradients("triton")) < 1e-5


def test_the_operators_are_what_they_say():
    q, k, v = (torch.randn(2, heads, 9, 16).requires_grad_() for heads in (4, 2, 2))
    keys = [x.contiguous() for x in noise_keys(torch.tensor([5, 6]), 4, 9)]
    torch.library.opcheck(triton_gated.gated, (q, k, v, *keys, 0.5, True, True))


# -----------------------------------------------------------------------------
# registers, opt-in: compiles for GPUs that need not be here

REPORT = """
import os, re, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plumbing import triton_gated as K

def report(kernel, D, blocks, capability):
    BM, BN, warps = blocks
    fixed = dict(CAUSAL=True, SAMPLED=True, D=D, DP=D, BM=BM, BN=BN)
    kinds = dict(lse_="*fp32", prob_="*fp32", open_="*fp32", delta_="*fp32", r_="*fp32", start_="*i32",
                 stride_="*i32", column_="*i32", T="i32", H="i32", GROUP="i32", SIZE="i32", scale="fp32", bias="fp32")
    names = kernel.arg_names
    signature = {n: "constexpr" if n in fixed else kinds.get(n, "*bf16") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
    source = ASTSource(kernel, signature, fixed, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        open(path, "wb").write(built.asm["cubin"])
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\\d+)", usage)[1], re.search(r"STACK:(\\d+)", usage)[1]
    print(f"sm_{capability} D={D} {blocks} {kernel.fn.__name__}: {registers} registers, "
          f"spilled {stack} bytes")

for capability in (80, 90):
    for kernel, several in ((K.forward_kernel, K.FORWARD), (K.backward_q_kernel, K.BACKWARD_Q),
                            (K.backward_kv_kernel, K.BACKWARD_KV)):
        for blocks in several:
            report(kernel, 64, blocks, capability)
"""


@pytest.mark.skipif(not os.environ.get("SPARSE_COMPILE"), reason="SPARSE_COMPILE=1: minutes of compiling")
def test_no_registers_spill_at_head_size_64():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", REPORT], cwd=ROOT, env=env, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 18
    assert set(re.findall(r"spilled (\d+) bytes", run.stdout)) == {"0"}
