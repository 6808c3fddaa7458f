"""
One transformer. GPT-2, LLaMA and the addition toy are settings of its Config.

    tokens -> embedding -> n_layer x (attention, MLP), each reading the normed residual stream
    and adding to it -> norm -> logits

With config.sparse every attention edge passes a gate (sparse.py). The gates bring no parameters,
so a sparse and a dense model have the same state dict.
"""

import math
from collections import namedtuple
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from sparse import fold_in, gated_attention, sequence_seeds

# -----------------------------------------------------------------------------
# settings


@dataclass
class Config:
    """Plain values, saved as a dict. The defaults are GPT-2 124M."""

    block_size: int = 1024  # longest sequence, tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # None: n_head; fewer is grouped-query attention
    n_embd: int = 768
    n_inner: int | None = None  # width inside the MLP; None: 4 n_embd
    norm: str = "layernorm"  # or "rmsnorm" (LLaMA)
    norm_eps: float = 1e-5
    position: str = "learned"  # or "rope" (LLaMA)
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Hugging Face's dict, rope_type llama3, linear or default
    mlp: str = "gelu"  # GPT-2's tanh form; or "swiglu" (LLaMA)
    attention_bias: bool = True
    mlp_bias: bool = True
    tied_head: bool = True  # the output matrix is the token embedding
    causal: bool = True  # False: every position reads every other
    sparse: bool = False  # gate the attention edges
    gate_bias: float = 0.0  # b: a gate is open with probability sigmoid(s + b)
    init_std: float = 0.02  # of the random initial weights; small models want more

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        choices = {"norm": ("layernorm", "rmsnorm"), "position": ("learned", "rope"),
                   "mlp": ("gelu", "swiglu")}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, "
                             f"and n_head of n_kv_head {self.n_kv_head}")

    @property
    def head_size(self):
        return self.n_embd // self.n_head


# Of every layer and head, (n_layer, n_head) float32: the mean open probability, differentiable
# (equation 4 of sparse.py), and the share of gates that were open.
Edges = namedtuple("Edges", "prob open")

# -----------------------------------------------------------------------------
# positions


def rope_frequencies(config):
    """Angle per position of each of the head_size / 2 rotated pairs, float32 (head_size / 2,).

    rope_scaling "linear" divides all by its factor; "llama3" divides the slow ones, keeps the
    fast ones and blends between, by how often each turns in the original context.
    """
    D, scaling = config.head_size, config.rope_scaling or {"rope_type": "default"}
    frequency = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return frequency
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / scaling["factor"]
    raise ValueError(f"rope_scaling of type {kind!r} is not known, only default, linear and llama3")


def rotate(x, angle):
    """Rotate the pairs (d, d + D/2) of x (B, H, T, D) by angle (T, D/2): RoPE, arXiv 2104.09864."""
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


# -----------------------------------------------------------------------------
# the network


def make_norm(config):
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        C, kv = config.n_embd, config.n_kv_head * config.head_size
        self.sizes = [C, kv, kv]  # columns of q, k and v
        self.c_attn = nn.Linear(C, sum(self.sizes), bias=config.attention_bias)
        self.c_proj = nn.Linear(C, C, bias=config.attention_bias)

    def forward(self, x, angle, seed, tap):
        """x (B, T, C) normed -> (B, T, C), and (open_prob, open_frac) (B, n_head) or None."""
        config, D = self.config, self.config.head_size
        q, k, v = (z.unflatten(-1, (-1, D)) for z in self.c_attn(x).split(self.sizes, dim=-1))
        q, k, v = tap("q", q), tap("k", k), tap("v", v)  # (B, T, n_head or n_kv_head, D)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, n_head or n_kv_head, T, D)
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        if config.sparse:
            z, *edges = gated_attention(q, k, v, config.gate_bias, seed, config.causal)
        else:
            group = config.n_head // config.n_kv_head
            k, v = (y.repeat_interleave(group, dim=1) for y in (k, v)) if group > 1 else (k, v)
            z, edges = F.scaled_dot_product_attention(q, k, v, is_causal=config.causal), None
        z = tap("z", z.transpose(1, 2))  # (B, T, n_head, D)
        return self.c_proj(z.flatten(2)), edges


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        C, inner, bias = config.n_embd, config.n_inner, config.mlp_bias
        self.c_fc = nn.Linear(C, inner, bias=bias)
        if self.gated:
            self.c_gate = nn.Linear(C, inner, bias=bias)
        self.c_proj = nn.Linear(inner, C, bias=bias)

    def forward(self, x):
        if self.gated:
            return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, angle, seed, tap):
        """x (B, T, C) -> (B, T, C) and the attention's edges. A tap on .in leaves the skip as it is."""
        read = self.ln_1(tap("attn.in", x))
        out, edges = self.attn(read, angle, seed, lambda name, t: tap("attn." + name, t))
        x = x + tap("attn.out", out)
        out = self.mlp(self.ln_2(tap("mlp.in", x)))
        return x + tap("mlp.out", out), edges


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.wte.weight
        self.apply(self.init)

    def init(self, module):
        """GPT-2's initialisation; what adds to the residual stream is scaled down with depth."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):
            std = self.config.init_std / math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.c_proj.weight, std=std)

    def forward(self, idx, targets=None, seed=None, tap=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size), loss, edges.

        targets (B, T) int64, -1 is ignored: loss is the mean cross-entropy in nats, else None.
        seed as in gated_attention, each layer draws its own noise: edges is an Edges, or None in
        a dense model. tap(name, tensor) -> tensor sees, and may replace, what flows at: embed,
        h{l}.attn.in, .q, .k, .v (B, T, heads, head_size; before RoPE), .z, .out, h{l}.mlp.in,
        .out, and final (the residual stream before the last norm).
        """
        config, (B, T) = self.config, idx.shape
        if T > config.block_size:
            raise ValueError(f"{T} tokens do not fit the model's context of {config.block_size}")
        tap = tap or (lambda name, tensor: tensor)
        seeds = None if seed is None else sequence_seeds(seed, B, idx.device)
        position = torch.arange(T, device=idx.device)
        x, angle = self.wte(idx), None  # (B, T, C)
        if config.position == "learned":
            x = x + self.wpe(position)
        else:
            angle = position[:, None] * rope_frequencies(config).to(idx.device)  # (T, head_size/2)
        x = tap("embed", x)
        edges = []
        for l, block in enumerate(self.h):
            seed_l = None if seed is None else fold_in(seeds, l)
            x, edges_l = block(x, angle, seed_l, lambda name, t, l=l: tap(f"h{l}.{name}", t))
            edges.append(edges_l)
        logits = self.lm_head(self.ln_f(tap("final", x)))
        loss = None
        if targets is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            loss = F.cross_entropy(wide, targets.flatten(), ignore_index=-1)
        if not config.sparse:
            return logits, loss, None
        prob, open_ = (torch.stack([e.mean(0) for e in share]) for share in zip(*edges))
        return logits, loss, Edges(prob, open_)
