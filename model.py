"""
One transformer. GPT-2, LLaMA and the addition toy are settings of its Config.

    tokens -> embedding -> n_layer x (attention, MLP), each reading the normed residual stream
    and adding to it -> norm -> logits

With config.sparse every attention edge passes a gate (sparse.py). The gates bring no parameters,
so a sparse and a dense model have the same state dict.

    python model.py --init gpt2 --prompt "The dog"        goes on with a text
"""

import json
import math
import os
from collections import namedtuple
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from plumbing import hub, lora
from plumbing.flags import open_folder, replace_text
from plumbing.plan import KNOWN
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
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.n_inner = 4 * self.n_embd if self.n_inner is None else self.n_inner
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        choices = {"norm": ("layernorm", "rmsnorm"), "position": ("learned", "rope"),
                   "mlp": ("gelu", "swiglu")}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, "
                             f"and n_head of n_kv_head {self.n_kv_head}")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"rope turns pairs: the head size {self.head_size} must be even")
        if self.position == "rope":
            rope_frequencies(self)  # ValueError here rather than at the first forward pass

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
    frequency = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    kind = scaling.get("rope_type", scaling.get("type"))
    try:
        if kind == "default":
            return frequency
        if kind == "linear":
            return frequency / scaling["factor"]
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return keep * frequency + (1 - keep) * frequency / scaling["factor"]
    except KeyError as error:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {error.args[0]!r}") from None
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
        """x (B, T, C) normed -> (B, T, C), and [open_prob, open_frac], each (n_head,), or None."""
        config, D = self.config, self.config.head_size
        q, k, v = (z.unflatten(-1, (-1, D)) for z in self.c_attn(x).split(self.sizes, dim=-1))
        q, k, v = tap("q", q), tap("k", k), tap("v", v)  # (B, T, n_head or n_kv_head, D)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, n_head or n_kv_head, T, D)
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        if config.sparse:
            z, *edges = gated_attention(q, k, v, config.gate_bias, seed, config.causal)
            edges = [share.mean(0) for share in edges]
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
        """x (B, T, C) -> (B, T, C), the attention's edges. A tap on .in does not touch the skip."""
        read = self.ln_1(tap("attn.in", x))
        out, edges = self.attn(read, angle, seed, lambda name, t: tap("attn." + name, t))
        x = x + tap("attn.out", out)
        out = self.mlp(self.ln_2(tap("mlp.in", x)))
        return x + tap("mlp.out", out), edges


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # keep no activations inside a block, run it again in the backward pass
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
            seed_l = None if seed is None else fold_in(seeds, l)  # the same gates in both runs
            inputs = x, angle, seed_l, lambda name, t, l=l: tap(f"h{l}.{name}", t)
            if self.recompute and torch.is_grad_enabled():
                x, edges_l = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, edges_l = block(*inputs)
            edges.append(edges_l)
        logits = self.lm_head(self.ln_f(tap("final", x)))
        loss = None
        if targets is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            loss = F.cross_entropy(wide, targets.flatten(), ignore_index=-1)
        if not config.sparse:
            return logits, loss, None
        return logits, loss, Edges(*(torch.stack(share) for share in zip(*edges)))

    # -------------------------------------------------------------------------
    # weights in and out; the tables of names are below

    @classmethod
    def from_pretrained(cls, name_or_path, adapter=None, **overrides):
        """A model with the weights of `name_or_path`, float32; overrides replace Config fields.

        A hub name ("gpt2", "owner/name") or a local Hugging Face folder of a GPT-2 or a LLaMA; the
        paper authors' final.pth; a checkpoint of train.py, its folder, or one of addition_toy.py. adapter: a file of
        train.py --lora, which is added to them. Every tensor is accounted for, by name and shape:
        ValueError says what is missing, left over or of another shape.
        """
        config, weights = read_model(name_or_path, adapter, **overrides)
        with torch.device("meta"):  # shapes without memory: the weights are held once
            model = cls(config)
        return model.take(weights)

    def take(self, weights):
        """Have the weights {name: tensor}, in the default dtype, in place of one's own; on meta too."""
        weights = {name: t.to(torch.get_default_dtype()) for name, t in weights.items()}
        self.load_state_dict(weights, assign=True)
        if self.config.tied_head:
            self.lm_head.weight = self.wte.weight
        return self

    def save_pretrained(self, folder):
        """A Hugging Face folder, config.json and model.safetensors, that transformers opens.

        transformers knows no gates: it runs a sparse model as the dense one of the same weights.
        The README has the lines that give it the gate.
        """
        to_theirs = to_llama if self.config.norm == "rmsnorm" else to_gpt2
        settings, weights = to_theirs(self.config, self.state_dict())
        if self.config.sparse:
            settings["sparse_attention"] = {"gate_bias": self.config.gate_bias}
        open_folder(folder)
        hub.write_safetensors(os.path.join(folder, "model.safetensors"), weights)
        text = json.dumps(settings, indent=2) + "\n"
        replace_text(os.path.join(folder, "config.json"), text)
        if self.config.sparse:
            print(f"note: transformers opens {folder} as a dense model; the README adds its gates")

    def save_checkpoint(self, path, **more):
        """Config, weights and plain data in one file that from_pretrained opens."""
        hub.write_pickle(path, {"config": asdict(self.config), "model": self.state_dict()} | more)


# -----------------------------------------------------------------------------
# which tensor of which checkpoint goes where


def read_model(name_or_path, adapter=None, **overrides):
    """(Config, {our name: tensor}) of anything that from_pretrained opens, names and shapes checked.

    The tensors have the dtype of the file; most of them are mapped and not read from it yet.
    """
    settings, weights = read_checkpoint(name_or_path)
    if settings.get("tied_head", True) and "wte.weight" in weights:
        weights["lm_head.weight"] = weights["wte.weight"]
    if adapter:
        gates, weights = lora.merged(adapter, weights)
        settings = settings | gates
    config = Config(**settings | overrides)
    with torch.device("meta"):
        check_names(name_or_path, weights, Transformer(config).state_dict())
    return config, weights


def read_checkpoint(name_or_path):
    """(Config fields, {our name: tensor}) of anything that from_pretrained opens."""
    path = best_of(hub.fetch_model(name_or_path))
    if os.path.isfile(path):
        content = hub.read_pickle(path)
        settings = content.get("config") if isinstance(content, dict) else None
        if isinstance(settings, dict) and settings.keys() <= Config.__dataclass_fields__.keys():
            if content.get("flags", {}).get("lora"):
                raise ValueError(f"{path} holds adapters without their base: give the base, and "
                                 "--adapter with the adapter.safetensors beside it")
            return settings, content["model"]
        return from_nanogpt(path, content)
    return from_hugging_face(path, read_json(path), hub.read_weights(path))


def best_of(path):
    """The best checkpoint of a folder that train.py wrote; any other path as it is."""
    best = os.path.join(path, "best.pt")
    return best if os.path.isfile(best) else path


def from_hugging_face(source, settings, weights):
    """(Config fields, {our name: tensor}) of a config.json, as a dict, and its tensors."""
    family = settings.get("model_type") if isinstance(settings, dict) else None
    if family not in ("gpt2", "llama"):
        raise ValueError(f"{source} is a {family!r} model, known are gpt2 and llama")
    read = from_gpt2 if family == "gpt2" else from_llama
    fields, weights = read(source, settings, weights)
    if "sparse_attention" in settings:
        fields |= {"sparse": True, "gate_bias": settings["sparse_attention"].get("gate_bias", 0.0)}
    if fields["tied_head"] and "wte.weight" in weights and not same_head(weights):
        raise ValueError(f"{source} has an lm_head.weight of its own, but its config.json ties it")
    return fields, weights


def read_config(name_or_path):
    """The Config alone; a name in plumbing/plan.py's KNOWN needs no download."""
    if os.path.isfile(best_of(name_or_path)):
        return Config(**read_checkpoint(name_or_path)[0])
    settings = KNOWN.get(name_or_path)
    if settings is None:
        folder = name_or_path
        if not os.path.isdir(folder):
            folder = os.path.dirname(hub.download(folder, "config.json"))
        settings = read_json(folder)
    return Config(**from_hugging_face(name_or_path, settings, {})[0])


def read_json(folder):
    """config.json of a Hugging Face folder."""
    try:
        with open(os.path.join(folder, "config.json")) as f:
            return json.load(f)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json: give a Hugging Face folder (config.json + "
                         "model.safetensors), a checkpoint file or a hub name") from None
    except ValueError:
        raise ValueError(f"{folder}/config.json is not valid JSON: get it again") from None


def check_names(source, weights, wanted):
    """ValueError unless weights has the names and shapes of wanted, one for one."""
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    for problem, names in (("lacks", missing), ("has the unknown", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{source} {problem} tensor {names[0]}{more}: its settings and its "
                             "weights are not of the same model")
    for name, t in weights.items():
        if t.shape != wanted[name].shape:
            raise ValueError(f"{source}: {name} has shape {tuple(t.shape)}, the settings ask for "
                             f"{tuple(wanted[name].shape)}")


def read_fields(source, settings, names, built):
    """Config fields under the names of another config.json; ValueError unless settings are `built`.

    built: {their key: the values that are built here, the first of them is what absence means}.
    """
    for key, values in built.items():
        if settings.get(key, values[0]) not in values:
            raise ValueError(f"{source} has {key} = {settings[key]!r}, which is not built here")
    return {ours: settings[theirs] for ours, theirs in names.items() if theirs in settings}


# Config's fields by their names in a GPT-2 config.json
GPT2_FIELDS = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
               "n_head": "n_head", "n_embd": "n_embd", "n_inner": "n_inner",
               "norm_eps": "layer_norm_epsilon"}
GPT2_BUILT = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
              "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D stores (in, out)


def from_gpt2(source, settings, weights):
    """A Hugging Face GPT-2: config.json and tensors, names with or without "transformer."."""
    fields = read_fields(source, settings, GPT2_FIELDS, GPT2_BUILT)
    fields["tied_head"] = settings.get("tie_word_embeddings", True)
    ours = {}
    for name, t in weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, stored by old versions
        ours[name] = t.t().contiguous() if name.endswith(TRANSPOSED) else t
    return fields, ours


def to_gpt2(config, weights):
    """The inverse of from_gpt2: (config.json as a dict, {their name: tensor})."""
    if (config.norm, config.position, config.mlp) != ("layernorm", "learned", "gelu") or not (
            config.causal and config.attention_bias and config.mlp_bias
            and config.n_kv_head == config.n_head):
        raise ValueError("only the architectures of GPT-2 and LLaMA have a Hugging Face layout: causal; "
                         "layernorm, learned positions, gelu, biases, as many key-value heads as "
                         "heads; or rmsnorm, rope, swiglu")
    settings = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                "activation_function": "gelu_new", "tie_word_embeddings": config.tied_head,
                "torch_dtype": "float32", "bos_token_id": config.vocab_size - 1,
                "eos_token_id": config.vocab_size - 1}
    settings |= {theirs: getattr(config, ours) for ours, theirs in GPT2_FIELDS.items()}
    theirs = {}
    for name, t in weights.items():
        if name == "lm_head.weight":
            if not config.tied_head:
                theirs[name] = t
            continue
        theirs["transformer." + name] = t.t().contiguous() if name.endswith(TRANSPOSED) else t
    return settings, theirs


# the same for LLaMA, and the parts of its tensors' names
LLAMA_FIELDS = {"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
                "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
                "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
                "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps",
                "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
LLAMA_BUILT = {"hidden_act": ("silu",), "pretraining_tp": (1,)}
LLAMA_NAMES = {"wte.": "model.embed_tokens.", "ln_f.": "model.norm.", "h.": "model.layers.",
               ".ln_1.": ".input_layernorm.", ".ln_2.": ".post_attention_layernorm.",
               ".attn.c_proj.": ".self_attn.o_proj.", ".mlp.c_proj.": ".mlp.down_proj.",
               ".mlp.c_gate.": ".mlp.gate_proj.", ".mlp.c_fc.": ".mlp.up_proj."}
QKV = [f".self_attn.{x}_proj." for x in "qkv"]


def from_llama(source, settings, weights):
    """A Hugging Face LLaMA: config.json and tensors; q, k and v become one matrix."""
    fields = read_fields(source, settings, LLAMA_FIELDS, LLAMA_BUILT)
    defaults = {"norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False}
    fields = defaults | fields | {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"}
    fields["tied_head"] = settings.get("tie_word_embeddings", False)
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    fields["rope_theta"] = rope.pop("rope_theta", settings.get("rope_theta", 10000.0))
    fields["rope_scaling"] = rope or None
    head_size = fields["n_embd"] // fields["n_head"]
    if settings.get("head_dim") not in (None, head_size):
        raise ValueError(f"{source} has heads of {settings['head_dim']}, where hidden_size / "
                         f"num_attention_heads is {head_size}: not built here")
    theirs, ours = dict(weights), {}
    for name in [name for name in weights if QKV[0] in name]:
        parts = [name.replace(QKV[0], part) for part in QKV]
        if all(part in weights for part in parts):
            theirs[name.replace(QKV[0], ".attn.c_attn.")] = torch.cat([theirs.pop(p) for p in parts])
    for name, t in theirs.items():
        for our_part, their_part in LLAMA_NAMES.items():
            name = name.replace(their_part, our_part)
        if not name.endswith(".rotary_emb.inv_freq"):  # computed; stored by old versions
            ours[name] = t
    return fields, ours


def to_llama(config, weights):
    """The inverse of from_llama: (config.json as a dict, {their name: tensor})."""
    if (config.position, config.mlp) != ("rope", "swiglu") or not config.causal:
        raise ValueError("rmsnorm has a Hugging Face layout only with rope, swiglu and causal attention")
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
                "tie_word_embeddings": config.tied_head, "torch_dtype": "float32",
                "bos_token_id": None, "eos_token_id": None, "rope_theta": config.rope_theta,
                "rope_scaling": config.rope_scaling}
    settings |= {theirs: getattr(config, ours) for ours, theirs in LLAMA_FIELDS.items()}
    rows = [config.n_embd] + 2 * [config.n_kv_head * config.head_size]  # of q, k and v
    theirs = {}
    for name, t in weights.items():
        if name == "lm_head.weight" and config.tied_head:
            continue
        for our_part, their_part in LLAMA_NAMES.items():
            name = name.replace(our_part, their_part)
        if ".attn.c_attn." in name:
            for part, piece in zip(QKV, t.split(rows)):
                theirs[name.replace(".attn.c_attn.", part)] = piece
        else:
            theirs[name] = t
    return settings, theirs


def same_head(weights):
    """Is the output matrix the token embedding: not stored, or stored with the same numbers?"""
    head = weights.get("lm_head.weight", weights.get("wte.weight"))
    return head is not None and "wte.weight" in weights and torch.equal(head, weights["wte.weight"])


def from_nanogpt(source, weights):
    """The paper authors' final.pth: a nanoGPT state dict, (out, in) matrices, b = 0, gates on.

    It has no settings beside it: sizes are read off the tensors, heads are 64 wide as in GPT-2.
    """
    weights = weights.get("model", weights) if isinstance(weights, dict) else {}
    ours = {}
    for name, t in weights.items():
        for prefix in ("_orig_mod.", "module.", "transformer."):
            name = name.removeprefix(prefix)
        if not name.endswith(".attn.bias"):  # the causal mask
            ours[name] = t
    if not {"wte.weight", "wpe.weight", "ln_f.weight"} <= ours.keys():
        raise ValueError(f"{source} is neither this project's checkpoint nor a nanoGPT state dict")
    vocab_size, n_embd = ours["wte.weight"].shape
    if n_embd % 64:
        raise ValueError(f"{source} is {n_embd} wide, which heads of 64 do not fill")
    layers = {int(name.split(".")[1]) for name in ours if name.startswith("h.")}
    fields = {"vocab_size": vocab_size, "n_embd": n_embd, "n_head": n_embd // 64,
              "n_layer": len(layers), "block_size": len(ours["wpe.weight"]),
              "attention_bias": "h.0.attn.c_attn.bias" in ours,
              "mlp_bias": "h.0.mlp.c_fc.bias" in ours, "sparse": True, "gate_bias": 0.0,
              "tied_head": same_head(ours)}
    for name in [name for name in ours if ".ln_" in "." + name and name.endswith(".weight")]:
        ours.setdefault(name.replace(".weight", ".bias"), torch.zeros(n_embd))  # trained without
    return fields, ours


# -----------------------------------------------------------------------------
# text


@torch.no_grad()
def generate(model, idx, n, temperature=1.0, top_k=None, seed=0, n_tokens=None):
    """idx (1, T) int64 -> (idx with n tokens more, the last pass's Edges or None).

    temperature 0 takes the likeliest token; top_k keeps that many candidates; n_tokens is the
    tokenizer's size where the model's vocabulary is padded. Gates are deterministic.
    """
    random = torch.Generator().manual_seed(seed)
    for _ in range(n):
        logits, _, edges = model(idx[:, -model.config.block_size:])
        logits = logits[0, -1, :n_tokens].float().cpu()
        if temperature == 0:
            choice = logits.argmax().view(1)
        else:
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
            choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)
        idx = torch.cat([idx, choice.to(idx.device).view(1, 1)], dim=1)
    return idx, edges


@dataclass
class Flags:
    init: str = "gpt2"  # hub name, Hugging Face folder or checkpoint
    adapter: str | None = None  # adapter.safetensors of train.py --lora, on top of it
    prompt: str = "The dog"  # text to go on with
    tokens: int = 50  # how many tokens to add
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None  # only the so many likeliest tokens
    seed: int = 0  # of the choices
    sparse: bool | None = None  # gates on or off; default: as the model was saved
    tokenizer: str | None = None  # gpt2, bytes or a tokenizer.json; default: the model's own

    def __post_init__(self):
        if self.tokens < 1 or self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise ValueError("need --tokens and --top-k of at least 1 and --temperature of at least 0")
        if not self.prompt:
            raise ValueError("--prompt is empty: give the text to go on with")


def main(flags):
    from plumbing.tokens import name_for, tokenizer

    overrides = {} if flags.sparse is None else {"sparse": flags.sparse}
    model = Transformer.from_pretrained(flags.init, flags.adapter, **overrides).eval()
    tok = tokenizer(name_for(model.config.vocab_size, flags.tokenizer, flags.init))
    begin = [] if tok.bos is None else [tok.bos]
    idx = torch.tensor([begin + [int(i) for i in tok.encode(flags.prompt)]])
    idx, edges = generate(model, idx, flags.tokens, flags.temperature, flags.top_k, flags.seed,
                          tok.vocab_size)
    print(tok.decode(idx[0].tolist()))
    if edges is None:
        print("\ndense: every attention edge is open")
    else:
        T = min(idx.shape[1] - 1, model.config.block_size)
        share = edges.open.mean().item()
        count = share * edges.open.numel() * T * (T + 1) / 2
        print(f"\nopen attention edges: {share:.2%}, {count:,.0f} in the last pass of {T} tokens")


if __name__ == "__main__":
    from plumbing import flags

    flags.run(main, Flags, __doc__)
