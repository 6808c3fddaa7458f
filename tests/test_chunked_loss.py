"""The chunked losses: the same numbers and gradients as torch's, without batch x T x vocabulary in memory."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from plumbing import chunked_loss
from plumbing.chunked_loss import chunked_loss as loss_of

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
    found, want = loss_of(x, weight, targets), plain(x, weight, targets)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(3 * loss, (x, weight)) for loss in (found, want)]
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("ignored", [[], [0, 5, 6, 20]])
def test_with_dense_logits_the_gradient_is_that_of_the_divergence(chunk, ignored, monkeypatch):
    """Of all tokens, with a target or without; the cross-entropy has none."""
    monkeypatch.setattr(chunked_loss, "CHUNK", chunk)
    x, weight, targets = case(ignored=ignored)
    dense = 3 * torch.randn(3, 7, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ce, kl = loss_of(x, weight, targets, dense)
    torch.testing.assert_close(ce, plain(x, weight, targets), rtol=1e-12, atol=0)
    assert not ce.requires_grad
    t, p = (logits.log_softmax(-1).flatten(0, 1) for logits in (dense, x @ weight.mT))
    want = F.kl_div(p, t, reduction="batchmean", log_target=True)
    torch.testing.assert_close(kl, want, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(3 * loss, (x, weight)) for loss in (kl, want)]
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


def test_the_divergence_of_a_model_from_itself_is_nothing():
    x, weight, targets = case(torch.float32)
    _, kl = loss_of(x, weight, targets, (x @ weight.mT).detach())
    assert abs(kl) < 1e-7 and all(g.abs().max() < 1e-7 for g in torch.autograd.grad(kl, (x, weight)))


def test_without_a_target_the_loss_is_nan_and_the_gradient_zero():
    x, weight, targets = case(ignored=range(21))
    for loss in (loss_of, plain):
        found = loss(x, weight, targets)
        assert found.isnan() and not any(g.any() for g in torch.autograd.grad(found, (x, weight)))


def test_only_the_gradients_that_are_asked_for():
    x, weight, targets = case()
    weight.requires_grad_(False)  # a frozen head
    found, want = (torch.autograd.grad(loss(x, weight, targets), x)[0] for loss in (loss_of, plain))
    torch.testing.assert_close(found, want)
    with torch.no_grad():
        assert not loss_of(x, weight, targets).requires_grad
        assert not any(loss.requires_grad for loss in loss_of(x, weight, targets, x @ weight.mT))


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_multiplies_in_bfloat16_and_the_rest_is_float32(frozen):
    """As close to float64 as torch's own loss under autocast, or closer."""
    x, weight, targets = case(torch.float32)
    exact = torch.autograd.grad(plain(x.double(), weight.double(), targets), (x, weight))
    head = weight.detach().to(torch.bfloat16) if frozen else weight
    wanted = (x,) if frozen else (x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = loss_of(x, head, targets), plain(x, weight, targets.clone())
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
    for loss, most in ((loss_of, V * max(4, C)), (plain, 21 * V)):
        with Largest() as largest:
            loss(x, weight, targets).backward()
        assert largest.numel == most
    dense = (x @ weight.mT).to(torch.bfloat16)  # which is as large, but not in float32
    with Largest() as largest:
        loss_of(x, weight, targets, dense)[1].backward()
    assert largest.numel == V * max(4, C)


PEAK = """
import sys, torch
from plumbing.chunked_loss import CHUNK, chunked_loss
from plumbing.runs import peak_memory
torch.set_num_threads(1)
T, V, C = 8 * CHUNK, 8192, 16
x, targets = torch.randn(1, T, C, requires_grad=True), torch.randint(V, (1, T))
weight = torch.randn(V, C, requires_grad=True)
chunked_loss(x[:, :8], weight, targets[:, :8]).backward()
before = peak_memory()
chunked_loss(x, weight, targets).backward()
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
