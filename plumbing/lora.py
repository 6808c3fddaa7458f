"""Low-rank adapters (LoRA, arXiv 2106.09685): y = W x + B A x, W frozen, A (rank, in), B (out, rank).

A sparse model is then a file of a few MB beside its public base.
"""

import json
import math
import os
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.files import read_metadata, read_safetensors, write_safetensors

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_gate", "mlp.c_proj")  # of every block


class Adapted(nn.Module):
    """A linear layer, under its own names, with an adapter beside it."""

    def __init__(self, linear, rank):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.weight.shape[1]))
        self.lora_b = nn.Parameter(self.weight.new_empty(self.weight.shape[0], rank))

    def forward(self, x):
        x = x.to(self.weight.dtype)  # once for both, where autocast would do it for each
        return F.linear(x, self.weight, self.bias).add_(F.linear(F.linear(x, self.lora_a), self.lora_b))


def add(model, rank, seed=0, earlier=None):
    """Freeze the model, give every matrix of its blocks an adapter and return their first weights.

    {name: tensor}, float32 on the CPU, with B = 0: the model computes what it did. The adapters hold no
    values, and may be on the meta device, until these are loaded. earlier: {name: tensor} with adapters
    that will take their place; another rank: ValueError.
    """
    model.requires_grad_(False)
    random, first = torch.Generator().manual_seed(seed), {}
    for name, linear in list(model.named_modules()):
        if name.endswith(MATRICES):
            parent, child = name.rsplit(".", 1)
            adapted = Adapted(linear, rank)
            setattr(model.get_submodule(parent), child, adapted)
            a, b = adapted.lora_a.shape, adapted.lora_b.shape
            first[name + ".lora_a"] = torch.randn(a, generator=random) / math.sqrt(a[1])
            first[name + ".lora_b"] = torch.zeros(b)
    for name in first.keys() & (earlier or {}).keys():
        if earlier[name].shape != first[name].shape:
            old = earlier[name].shape[name.endswith("lora_b")]
            raise ValueError(f"the adapter to train on has rank {old}: give this to --lora, not {rank}")
    return first


def halve(model):
    """Keep frozen matrices in bfloat16: autocast would cast them anew in every step, to the same numbers.

    A tied head gets a matrix of its own, because the embedding stays float32.
    """
    for module in model.modules():
        if isinstance(module, (Adapted, nn.Linear)) and not module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)
    return model


def count(model, rank):
    """How many numbers `add` would train."""
    shapes = [m.weight.shape for name, m in model.named_modules() if name.endswith(MATRICES)]
    return sum(rank * (n_out + n_in) for n_out, n_in in shapes)


def fingerprint(weights):
    """A number of the base: the first 1,024 values of each tensor."""
    crc = 0
    for name in sorted(name for name in weights if not name.endswith(("lora_a", "lora_b"))):
        crc = zlib.crc32(weights[name].flatten()[:1024].to(torch.float32).numpy(), crc)
    return f"{crc:08x}"


def save(path, adapters, base, config):
    """The adapter file: {name: tensor} in bfloat16, the base's fingerprint, and the gates they were trained with."""
    adapters = {name: t.to(torch.bfloat16) for name, t in adapters.items()}
    gates = {"sparse": config.sparse, "gate_bias": config.gate_bias}
    write_safetensors(path, adapters, {"base": base, "gates": json.dumps(gates)})


def read(path, weights):
    """(Config fields of the gates, {name: tensor} of the adapters); no file, a wrong file or base: ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"--adapter {path}: there is no such file; a train.py --lora run leaves adapter.safetensors in its --out")
    adapters, about = read_safetensors(path), read_metadata(path)
    try:
        base, gates = about["base"], json.loads(about["gates"])
        if gates.keys() - {"sparse", "gate_bias"}:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is no adapter file of train.py --lora") from None
    layers = sorted({name.rsplit(".", 1)[0] for name in adapters})
    if adapters.keys() != {f"{layer}.lora_{x}" for layer in layers for x in "ab"}:
        raise ValueError(f"{path} lacks one of the two matrices of a layer, or holds others")
    for layer in layers:
        W, a, b = weights.get(layer + ".weight"), adapters[layer + ".lora_a"], adapters[layer + ".lora_b"]
        if not a.dim() == b.dim() == 2 or len(a) != b.shape[1]:
            raise ValueError(f"{path} has no two matrices of one rank for {layer}, but {[*a.shape]} and {[*b.shape]}")
        shape = (len(b), a.shape[1])
        if W is None or W.shape != shape:
            raise ValueError(f"{path} adapts {layer}, {shape[0]} x {shape[1]}, which this base has not: "
                             "give the base that it was trained on")
    if fingerprint(weights) != base:
        raise ValueError(f"{path} was trained on a base of the same shape but with other weights "
                         f"({base}, these are {fingerprint(weights)})")
    return gates, adapters


def merge(weights, adapters):
    """weights + B A, in float32 where there is an adapter."""
    weights = dict(weights)
    for layer in {name.rsplit(".", 1)[0] for name in adapters}:
        a, b = (adapters[f"{layer}.lora_{x}"].to(torch.float32) for x in "ab")
        weights[layer + ".weight"] = weights[layer + ".weight"].to(torch.float32) + b @ a
    return weights
