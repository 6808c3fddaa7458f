"""
One transformer. GPT-2, LLaMA and the addition toy are settings of its Config.

    x = embed(tokens);  n_layer times: x += attention(norm(x)), x += MLP(norm(x));  head(norm(x))

config.sparse puts a gate on every attention edge (sparse.py); gates have no parameters.

    python model.py --init gpt2 --prompt "The dog"        continues a text
"""

import math
from collections import namedtuple
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from plumbing import files
from plumbing.chunked_loss import chunked_loss
from plumbing.flags import check, run
from plumbing.tokens import name_for, tokenizer
from plumbing.weights import check_fields, check_names, read_model, scale_rope, write_model
from sparse import fold_in, gated_attention, sequence_seeds


@dataclass
class Config:
    """Plain values, saved as a dict. The defaults are GPT-2 124M. A bad value: ValueError."""
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
    mlp: str = "gelu"  # in GPT-2's tanh approximation; or "swiglu" (LLaMA)
    attention_bias: bool = True
    mlp_bias: bool = True
    tied_head: bool = True  # the output matrix is the token embedding
    causal: bool = True  # False: every position reads every other
    sparse: bool = False  # gate the attention edges
    gate_bias: float = 0.0  # b: a gate is open with probability sigmoid(s + b)
    init_std: float = 0.02  # of the random initial weights; small models need more

    def __post_init__(self):
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.n_inner = 4 * self.n_embd if self.n_inner is None else self.n_inner
        check_fields(vars(self))

    @property
    def head_size(self):
        return self.n_embd // self.n_head


def rope_angle(config, T, device):
    """How far RoPE turns each pair at each position, radians, float32 (T, head_size / 2)."""
    pair = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu")
    frequency = scale_rope(config.rope_theta ** -(pair / config.head_size), config.rope_scaling)
    return torch.arange(T, device=device)[:, None] * frequency.to(device)


def rotate(x, angle):
    """RoPE, arXiv 2104.09864: rotate the pairs (d, d + D/2) of x (B, H, T, D) by angle (T, D/2)."""
    cos, sin = torch.cat([angle, angle], dim=-1).cos(), torch.cat([-angle, angle], dim=-1).sin()  # (T, D)
    y = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    return (y * cos + y.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)  # x1 cos - x2 sin, x2 cos + x1 sin


Edges = namedtuple("Edges", "prob open")  # of gated_attention, each (n_layer, n_head) float32
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def untapped(name, t):
    return t


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        C, kv = config.n_embd, config.n_kv_head * config.head_size
        self.sizes = [C, kv, kv]  # columns of q, k and v
        self.c_attn = nn.Linear(C, sum(self.sizes), bias=config.attention_bias)
        self.c_proj = nn.Linear(C, C, bias=config.attention_bias)

    def forward(self, x, angle, seed, tap):
        """x (B, T, C) normed -> (B, T, C), and [open_prob, open_frac], each (n_head,), or None."""
        config, D = self.config, self.config.head_size
        q, k, v = (y.unflatten(-1, (-1, D)) for y in self.c_attn(x).split(self.sizes, dim=-1))
        q, k, v = tap("attn.q", q), tap("attn.k", k), tap("attn.v", v)  # (B, T, n_head or n_kv_head, D)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, n_head or n_kv_head, T, D)
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        if config.sparse:
            z, *edges = gated_attention(q, k, v, config.gate_bias, seed, config.causal)
            edges = [share.mean(0) for share in edges]
        else:
            group = config.n_head // config.n_kv_head  # query heads that share a k and a v
            k, v = (y.repeat_interleave(group, dim=1) for y in (k, v)) if group > 1 else (k, v)
            z, edges = F.scaled_dot_product_attention(q, k, v, is_causal=config.causal), None
        z = tap("attn.z", z.transpose(1, 2))  # (B, T, n_head, D)
        return self.c_proj(z.flatten(2)), edges


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner, bias = config.n_embd, config.n_inner, config.mlp_bias
        self.c_fc = nn.Linear(C, inner, bias=bias)
        self.c_gate = nn.Linear(C, inner, bias=bias) if config.mlp == "swiglu" else None
        self.c_proj = nn.Linear(inner, C, bias=bias)

    def forward(self, x):
        if self.c_gate is None:
            return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ln_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, angle, seed, tap):
        """x (B, T, C) -> (B, T, C), the attention's edges. A tap on .in leaves the skip alone."""
        out, edges = self.attn(self.ln_1(tap("attn.in", x)), angle, seed, tap)
        x = x + tap("attn.out", out)
        return x + tap("mlp.out", self.mlp(self.ln_2(tap("mlp.in", x)))), edges


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # keep no activations of a block, run it again in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.wte.weight
        self.apply(self.init_weights)

    def init_weights(self, module):
        """GPT-2's initialisation: what adds to the residual stream is scaled down with depth."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):
            std = self.config.init_std / math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.c_proj.weight, std=std)

    def forward(self, idx, targets=None, seed=None, tap=None, logits=True, dense=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size), or None if they are not wanted, loss, edges.

        targets (B, T) int64, -1 is ignored: loss is the mean cross-entropy in nats, else None; with a
        dense model's logits the pair (cross-entropy without gradient, KL(dense, this model)). seed as
        in gated_attention; each layer draws its own noise. edges is an Edges, or None if dense.
        tap(name, tensor) -> tensor sees, and may replace, what flows at: embed; h{l}.attn.in, .q,
        .k, .v, .z (B, T, heads, head_size), .out; h{l}.mlp.in, .out; final (before the last norm).
        q and k come by before RoPE turns them (patching.attend shows how to go on).
        """
        config, (B, T) = self.config, idx.shape
        if T > config.block_size:
            raise ValueError(f"{T} tokens do not fit the model's context of {config.block_size}")
        x, angle = self.wte(idx), None  # (B, T, C)
        if config.position == "learned":
            x = x + self.wpe(torch.arange(T, device=idx.device))
        else:
            angle = rope_angle(config, T, idx.device)
        x = (tap or untapped)("embed", x)
        edges, seeds = [], sequence_seeds(seed, B, idx.device)
        for l, block in enumerate(self.h):
            tap_l = untapped if tap is None else lambda name, t, l=l: tap(f"h{l}.{name}", t)
            inputs = x, angle, None if seeds is None else fold_in(seeds, l), tap_l
            if self.recompute and torch.is_grad_enabled():
                x, edges_l = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, edges_l = block(*inputs)
            edges.append(edges_l)
        x = self.ln_f((tap or untapped)("final", x))
        loss = None if targets is None else chunked_loss(x, self.lm_head.weight, targets, dense)
        edges = Edges(*(torch.stack(share) for share in zip(*edges))) if config.sparse else None
        return self.lm_head(x) if logits else None, loss, edges

    @classmethod
    def from_pretrained(cls, name_or_path, adapter=None, **overrides):
        """A float32 model with the weights of `name_or_path`; overrides replace Config fields.

        A hub name ("gpt2", "owner/name") or a Hugging Face folder of a GPT-2 or a LLaMA; the paper
        authors' final.pth; a checkpoint of train.py, its folder, or one of addition_toy.py. adapter:
        a file of train.py --lora, added to the weights. Files that do not fit together: ValueError.
        """
        fields, weights = read_model(name_or_path, adapter)
        with torch.device("meta"):  # shapes without memory: the weights are held once
            model = cls(Config(**fields | overrides))
        return model.load_weights(weights, name_or_path)

    def load_weights(self, weights, source="the weights"):
        """Make {name: tensor} the parameters, in the default dtype. What misfits: ValueError."""
        check_names(source, weights, self.state_dict())
        weights = {name: t.to(torch.get_default_dtype()) for name, t in weights.items()}
        self.load_state_dict(weights, assign=True)
        if self.config.tied_head:
            self.lm_head.weight = self.wte.weight
        return self

    def save_pretrained(self, folder):
        """Write a Hugging Face folder; transformers runs it dense, RESULTS.md adds the gates."""
        write_model(folder, asdict(self.config), self.state_dict())

    def save_checkpoint(self, path, **more):
        """Write Config, weights and plain data to one file that from_pretrained opens."""
        files.write_pickle(path, {"config": asdict(self.config), "model": self.state_dict()} | more)


# -----------------------------------------------------------------------------
# text


@torch.no_grad()
def generate(model, idx, n, temperature=1.0, top_k=None, seed=0, n_tokens=None):
    """idx (1, T) int64 -> (idx with n more tokens, Edges of the last pass or None); gates not sampled.

    temperature 0: the likeliest token; top_k: that many candidates; n_tokens: of them in the tokenizer.
    """
    random = torch.Generator().manual_seed(seed)
    top_k, temperature = (top_k, temperature) if temperature > 0 else (1, 1.0)
    for _ in range(n):
        logits, _, edges = model(idx[:, -model.config.block_size:])
        logits = logits[0, -1, :n_tokens].float().cpu()
        if top_k:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
        choice = torch.multinomial(((logits - logits.max()) / temperature).softmax(-1), 1, generator=random)
        idx = torch.cat([idx, choice.to(idx.device).view(1, 1)], dim=1)
    return idx, edges


@dataclass
class Flags:
    init: str = "gpt2"  # hub name, Hugging Face folder, checkpoint or train.py's folder
    adapter: str | None = None  # adapter.safetensors of train.py --lora, added to the weights
    prompt: str = "The dog"  # text to continue
    tokens: int = 50  # how many tokens to add
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None  # choose among this many likeliest tokens
    seed: int = 0  # of the choices
    sparse: bool | None = None  # gates on or off; default: as the model was saved
    tokenizer: str | None = None  # gpt2, bytes or a tokenizer.json; default: the model's own


def main(flags):
    check(flags, {"tokens top_k": "at least 1", "temperature": "not negative"})
    if not flags.prompt:
        raise ValueError("--prompt is empty: give the text to continue")
    overrides = {} if flags.sparse is None else {"sparse": flags.sparse}
    model = Transformer.from_pretrained(flags.init, flags.adapter, **overrides).eval()
    tok = tokenizer(name_for(model.config.vocab_size, flags.tokenizer, flags.init))
    begin = [] if tok.bos is None else [tok.bos]
    idx = torch.tensor([[*begin, *map(int, tok.encode(flags.prompt))]])
    idx, edges = generate(model, idx, flags.tokens, flags.temperature, flags.top_k, flags.seed, tok.vocab_size)
    print(tok.decode(idx[0].tolist()) + "\n")
    print(f"open attention edges: {edges.open.mean():.2%}" if edges else "dense: every attention edge is open")


if __name__ == "__main__":
    run(main, Flags, __doc__)
