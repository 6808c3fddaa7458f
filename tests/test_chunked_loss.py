"""The chunked cross-entropy: the same loss and gradients, without batch x T x vocabulary in memory."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from plumbing import chunked_loss
from plumbing.chunked_loss import cross_entropy

V, C = 41, 8


def case(dtype=torch.float64, ignored=()):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, C, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (3, 7), generator=random)
    targets.view(-1)[list(ignored)] = -1
    return x, weight, targets


def plain(x, weight, targets):
    return F.cross_entropy((x @ weight.mT).flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 512])
@pytest.mark.parametrize("ignored", [[], [0, 5, 6, 20], range(8), range(20)])
def test_loss_and_gradients_are_those_of_torch(chunk, ignored, monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK", chunk)
    x, weight, targets = case(ignored=ignored)
    found, want = cross_entropy(x, weight, targets), plain(x, weight, targets)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(3 * loss, (x, weight)) for loss in (found, want)]
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


def test_without_a_target_the_loss_is_nan_and_the_gradient_zero():
    x, weight, targets = case(ignored=range(21))
    for loss in (cross_entropy, plain):
        found = loss(x, weight, targets)
        assert found.isnan() and not any(g.any() for g in torch.autograd.grad(found, (x, weight)))


def test_only_the_gradients_that_are_asked_for():
    x, weight, targets = case()
    weight.requires_grad_(False)  # a frozen head
    found, want = (torch.autograd.grad(loss(x, weight, targets), x)[0] for loss in (cross_entropy, plain))
    torch.testing.assert_close(found, want)
    with torch.no_grad():
        assert not cross_entropy(x, weight, targets).requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_multiplies_in_bfloat16_and_the_rest_is_float32(frozen):
    """As close to float64 as torch's own loss under autocast, or closer."""
    x, weight, targets = case(torch.float32)
    exact = torch.autograd.grad(plain(x.double(), weight.double(), targets), (x, weight))
    head = weight.detach().to(torch.bfloat16) if frozen else weight
    wanted = (x,) if frozen else (x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = cross_entropy(x, head, targets), plain(x, weight, targets.clone())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, theirs.float(), rtol=1e-3, atol=0)
    for g, want in zip(torch.autograd.grad(found, wanted), exact):
        assert g.dtype == torch.float32 and (g - want).norm() < 0.02 * want.norm()


class Largest(TorchDispatchMode):
    """How many numbers the largest float32 or float64 tensor has that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.dtype in (torch.float32, torch.float64):
                self.numel = max(self.numel, t.numel())
        return out


def test_no_tensor_holds_all_tokens_and_the_vocabulary(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK", 4)
    x, weight, targets = case(torch.float32)
    for loss, most in ((cross_entropy, V * max(4, C)), (plain, 21 * V)):
        with Largest() as largest:
            loss(x, weight, targets).backward()
        assert largest.numel == most


PEAK = """
import sys, torch
from plumbing.chunked_loss import CHUNK, cross_entropy
from plumbing.runs import peak_memory
torch.set_num_threads(1)
T, V, C = 8 * CHUNK, 8192, 16
x, targets = torch.randn(1, T, C, requires_grad=True), torch.randint(V, (1, T))
weight = torch.randn(V, C, requires_grad=True)
cross_entropy(x[:, :8], weight, targets[:, :8]).backward()
before = peak_memory()
cross_entropy(x, weight, targets).backward()
print((peak_memory() - before) * 2**30 / (4 * T * V))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells its peak memory")
def test_the_memory_is_that_of_a_chunk():
    """Of eight chunks: not even half of the float32 logits."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": root, "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.5
