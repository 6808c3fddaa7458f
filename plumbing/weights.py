"""Models in and out of files: which tensor goes where, and what the settings are called there.

Everywhere "fields" are those of model.py's Config as a dict, and "weights" is {our name: tensor};
"settings" are a config.json as a dict, and "tensors" is {their name: tensor}.
"""

import json
import math
import os
import re

import torch

from plumbing import files, hub, lora
from plumbing.flags import open_folder, replace_text
from plumbing.plan import KNOWN

# -----------------------------------------------------------------------------
# reading and writing a model


def read_model(name_or_path, adapter=None, merge=True):
    """(fields, weights) of all that Transformer.from_pretrained opens.

    adapter: a file of train.py --lora, which is added to the weights, or without merge put beside
    those of a dense base. Tensors have the file's dtype; most are mapped and not read yet. A bad
    file: ValueError.
    """
    fields, weights = read_checkpoint(name_or_path)
    if fields.get("tied_head", True) and "wte.weight" in weights:
        weights["lm_head.weight"] = weights["wte.weight"]
    if adapter:
        if fields.get("sparse") and not merge:
            raise ValueError(f"{name_or_path} has gates of its own: only the adapter of a dense model is trained on")
        gates, adapters = lora.read(adapter, weights)
        weights, fields = lora.merge(weights, adapters) if merge else weights | adapters, fields | gates
    return fields, weights


def read_fields(name_or_path):
    """The fields alone; a name in plumbing/plan.py's KNOWN needs no download."""
    if os.path.isfile(checkpoint_in(name_or_path)):
        return read_checkpoint(name_or_path)[0]
    settings = None if os.path.isdir(name_or_path) else KNOWN.get(name_or_path)
    return fields_from(name_or_path, settings or read_json(name_or_path))


def read_checkpoint(name_or_path):
    """(fields, weights) as the file has them."""
    path = checkpoint_in(hub.fetch_model(name_or_path))
    if os.path.isdir(path):
        settings = read_json(path)
        fields = fields_from(path, settings)
        weights = weights_from(settings, files.read_weights(path))
        if fields.get("tied_head", True) and not same_head(weights):
            raise ValueError(f"{path} has an lm_head.weight of its own, which config.json ties")
        return fields, weights
    content = files.read_pickle(path)
    content = content if isinstance(content, dict) else {}
    fields, weights = content.get("config"), content.get("model", content)
    table = isinstance(weights, dict) and all(map(torch.is_tensor, weights.values()))
    if not table or not isinstance(fields, dict) or "gate_bias" not in fields:  # nanoGPT has a config too
        return from_nanogpt(path, weights if table else {}, content.get("model_args"))
    if unknown := fields.keys() - set(" ".join(FIELDS).split()):
        raise ValueError(f"{path} has the unknown setting {min(unknown)}: another version wrote it")
    if any(name.endswith("lora_a") for name in weights):
        raise ValueError(f"{path} holds adapters without their base: give the base, and "
                         "--adapter with the adapter.safetensors beside it")
    return fields, weights


def checkpoint_in(path):
    """The checkpoint in a folder of train.py: best.pt, else last.pt. Any other path as it is."""
    for name in ("best.pt", "config.json", "last.pt"):  # config.json: a Hugging Face folder
        if os.path.isfile(os.path.join(path, name)):
            return path if name == "config.json" else os.path.join(path, name)
    return path


def read_json(name):
    """config.json of a Hugging Face folder, or of a repository on the hub."""
    local = os.path.join(name, "config.json") if os.path.isdir(name) else None
    try:
        return files.read_json(local or hub.download(name, "config.json"))
    except FileNotFoundError:
        raise ValueError(f"{name} has no config.json: give a Hugging Face folder (config.json + "
                         "model.safetensors), a checkpoint file or a hub name") from None


def write_model(folder, fields, weights):
    """Write config.json and model.safetensors. Neither a GPT-2 nor a LLaMA: ValueError."""
    settings = settings_from(fields)
    open_folder(folder)
    files.write_safetensors(os.path.join(folder, "model.safetensors"), tensors_from(fields, weights))
    replace_text(os.path.join(folder, "config.json"), json.dumps(settings, indent=2) + "\n")
    if fields["sparse"]:
        print(f"note: transformers opens {folder} as a dense model; RESULTS.md adds its gates")


# -----------------------------------------------------------------------------
# checks

FIELDS = {  # of Config, and what they must be
    "block_size vocab_size n_layer n_head n_kv_head n_embd n_inner": "a positive integer",
    "norm": "layernorm | rmsnorm", "position": "learned | rope", "mlp": "gelu | swiglu",
    "norm_eps rope_theta gate_bias init_std": "a finite number",
    "attention_bias mlp_bias tied_head causal sparse": "true or false",
    "rope_scaling": "a dict or null"}


def check_fields(fields):
    """ValueError in one line unless every field is as FIELDS says and the sizes fit together."""
    holds = {"a positive integer": lambda x: type(x) is int and x > 0,
             "a finite number": lambda x: isinstance(x, (int, float)) and math.isfinite(x),
             "true or false": lambda x: isinstance(x, bool),
             "a dict or null": lambda x: x is None or isinstance(x, dict)}
    for name, rule in ((name, rule) for names, rule in FIELDS.items() for name in names.split()):
        value, choices = fields[name], rule.split(" | ")
        if not (holds[rule](value) if rule in holds else value in choices):
            raise ValueError(f"{name} must be {rule if rule in holds else f'one of {choices}'}, got {value!r}")
    n_embd, n_head, n_kv_head = (fields[name] for name in ("n_embd", "n_head", "n_kv_head"))
    if n_embd % n_head or n_head % n_kv_head:
        raise ValueError(f"n_embd {n_embd} must be a multiple of n_head {n_head}, "
                         f"and n_head of n_kv_head {n_kv_head}")
    if fields["position"] == "rope":
        if n_embd // n_head % 2:
            raise ValueError(f"rope rotates pairs: the head size {n_embd // n_head} must be even")
        scale_rope(torch.ones(1), fields["rope_scaling"])


def check_names(source, weights, wanted):
    """ValueError unless weights has the names and shapes of wanted, one for one."""
    missing, extra = wanted.keys() - weights.keys(), weights.keys() - wanted.keys()
    for problem, names in (("lacks", missing), ("has the unknown", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{source} {problem} tensor {min(names)}{more}: its settings and its "
                             "weights are not of the same model")
    for name, t in weights.items():
        if t.shape != wanted[name].shape:
            raise ValueError(f"{source}: {name} has shape {tuple(t.shape)}, the settings ask for "
                             f"{tuple(wanted[name].shape)}")


# -----------------------------------------------------------------------------
# Hugging Face: GPT-2 and LLaMA, by model_type. In all tables our name comes first.

ARCHITECTURE = {"gpt2": dict(norm="layernorm", position="learned", mlp="gelu", causal=True,
                             attention_bias=True, mlp_bias=True),
                "llama": dict(norm="rmsnorm", position="rope", mlp="swiglu", causal=True)}
SETTINGS = {
    "gpt2": dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer",
                 n_head="n_head", n_embd="n_embd", n_inner="n_inner",
                 norm_eps="layer_norm_epsilon", tied_head="tie_word_embeddings"),
    "llama": dict(block_size="max_position_embeddings", vocab_size="vocab_size",
                  n_layer="num_hidden_layers", n_head="num_attention_heads",
                  n_kv_head="num_key_value_heads", n_embd="hidden_size",
                  n_inner="intermediate_size", norm_eps="rms_norm_eps", tied_head="tie_word_embeddings",
                  **{name: name for name in ("rope_theta", "rope_scaling", "attention_bias", "mlp_bias")})}
ABSENT = {"gpt2": {},  # what a missing setting means, where that is not the default of Config
          "llama": dict(norm_eps=1e-6, tied_head=False, attention_bias=False, mlp_bias=False)}
SUPPORTED = {  # the values that our model covers, first the one that a missing setting means
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "add_cross_attention": (False,),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    "llama": {"hidden_act": ("silu",), "pretraining_tp": (1,)}}
TENSORS = {  # parts of their names
    "gpt2": {part: "transformer." + part for part in ("wte.", "wpe.", "h.", "ln_f.")},
    "llama": {"wte.": "model.embed_tokens.", "ln_f.": "model.norm.", "h.": "model.layers.",
              ".ln_1.": ".input_layernorm.", ".ln_2.": ".post_attention_layernorm.",
              ".attn.c_proj.": ".self_attn.o_proj.", ".mlp.c_proj.": ".mlp.down_proj.",
              ".mlp.c_gate.": ".mlp.gate_proj.", ".mlp.c_fc.": ".mlp.up_proj."}}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # in GPT-2: Conv1D stores (in, out)
QKV = [f".self_attn.{x}_proj." for x in "qkv"]  # in LLaMA: three matrices, our one .attn.c_attn.
NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # stored by old versions


def fields_from(source, settings):
    """The fields of a config.json, a dict; ValueError for an architecture that our model is not."""
    try:
        if (family := settings.get("model_type")) not in ARCHITECTURE:
            raise ValueError(f"{source} is a {family!r} model, known are gpt2 and llama")
        for key, values in SUPPORTED[family].items():
            if settings.get(key, values[0]) not in values:
                raise ValueError(f"{source} has {key} = {settings[key]!r}, which is not built here")
        fields = {ours: settings[theirs] for ours, theirs in SETTINGS[family].items() if theirs in settings}
        fields = ABSENT[family] | ARCHITECTURE[family] | fields
        if family == "llama":
            rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
            fields["rope_theta"] = rope.pop("rope_theta", settings.get("rope_theta", 10000.0))
            fields["rope_scaling"] = rope or None
            head_size = fields["n_embd"] // fields["n_head"]
            if settings.get("head_dim") not in (None, head_size):
                raise ValueError(f"{source} has heads of {settings['head_dim']}, where hidden_size / "
                                 f"num_attention_heads is {head_size}: not built here")
        if "sparse_attention" in settings:
            fields |= {"sparse": True, "gate_bias": settings["sparse_attention"].get("gate_bias", 0.0)}
        return fields
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{source} has a setting of the wrong kind, or lacks one: {error!r:.200}") from None


def settings_from(fields):
    """The inverse of fields_from. Neither a GPT-2 nor a LLaMA: ValueError."""
    family = "llama" if fields["norm"] == "rmsnorm" else "gpt2"
    if any(fields[name] != value for name, value in ARCHITECTURE[family].items()) or (
            family == "gpt2" and fields["n_kv_head"] != fields["n_head"]):
        raise ValueError("only the architectures of GPT-2 and LLaMA have a Hugging Face layout: causal; "
                         "layernorm, learned positions, gelu, biases, as many key-value heads as "
                         "heads; or rmsnorm, rope, swiglu")
    end = min(fields["vocab_size"], 50257) - 1 if family == "gpt2" else None  # more ids only fill up a matrix
    settings = {"model_type": family, "torch_dtype": "float32", "bos_token_id": end, "eos_token_id": end,
                "architectures": ["GPT2LMHeadModel" if family == "gpt2" else "LlamaForCausalLM"]}
    settings |= {key: values[0] for key, values in SUPPORTED[family].items()}
    settings |= {theirs: fields[ours] for ours, theirs in SETTINGS[family].items()}
    if fields["sparse"]:
        settings["sparse_attention"] = {"gate_bias": fields["gate_bias"]}
    return settings


def weights_from(settings, tensors):
    """Our weights from the tensors beside a config.json."""
    family, tensors, weights = settings["model_type"], dict(tensors), {}
    for name in [name for name in tensors if QKV[0] in name]:
        parts = [name.replace(QKV[0], part) for part in QKV]
        if all(part in tensors for part in parts):
            tensors[name.replace(QKV[0], ".attn.c_attn.")] = torch.cat([tensors.pop(p) for p in parts])
    for name, t in tensors.items():
        for ours, theirs in TENSORS[family].items():
            name = name.replace(theirs, ours)
        if not name.endswith(NO_WEIGHTS):
            weights[name] = t.t().contiguous() if family == "gpt2" and name.endswith(TRANSPOSED) else t
    return weights


def tensors_from(fields, weights):
    """The inverse of weights_from."""
    family, tensors = "llama" if fields["norm"] == "rmsnorm" else "gpt2", {}
    kv = fields["n_kv_head"] * fields["n_embd"] // fields["n_head"]
    for name, t in weights.items():
        for ours, theirs in TENSORS[family].items():
            name = name.replace(ours, theirs)
        if family == "llama" and ".attn.c_attn." in name:
            for part, piece in zip(QKV, t.split([fields["n_embd"], kv, kv])):
                tensors[name.replace(".attn.c_attn.", part)] = piece
        elif not (name == "lm_head.weight" and fields["tied_head"]):
            tensors[name] = t.t().contiguous() if family == "gpt2" and name.endswith(TRANSPOSED) else t
    return tensors


def positive(x):
    if not (isinstance(x, int | float) and 0 < x < math.inf):
        raise TypeError
    return x


def scale_rope(frequency, scaling):
    """RoPE's frequencies, radians per position, after the rope_scaling of a config.json, or None.

    "linear" divides all of them. "llama3" divides those that turn seldom in the original context.
    """
    kind = scaling.get("rope_type", scaling.get("type")) if scaling else "default"
    try:
        if kind == "default":
            return frequency
        if kind == "linear":
            return frequency / positive(scaling["factor"])
        if kind == "llama3":
            low, high = positive(scaling["low_freq_factor"]), positive(scaling["high_freq_factor"])
            turns = positive(scaling["original_max_position_embeddings"]) * frequency / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return keep * frequency + (1 - keep) * frequency / positive(scaling["factor"])
    except KeyError as error:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {error.args[0]!r}") from None
    except TypeError:
        raise ValueError(f"rope_scaling of type {kind!r} needs positive numbers, not {scaling}") from None
    raise ValueError(f"rope_scaling of type {kind!r} is not known, only default, linear and llama3")


# -----------------------------------------------------------------------------
# nanoGPT


def same_head(weights):
    """Is the output matrix, if it is stored, the token embedding?"""
    both = [weights[name] for name in ("wte.weight", "lm_head.weight") if name in weights]
    return len(both) < 2 or torch.equal(*both)


def from_nanogpt(source, weights, settings=None):
    """(fields, weights) of a nanoGPT state dict: the paper authors' final.pth, gates on, b = 0.

    It holds no settings: sizes are those of the tensors, heads are 64 wide as in GPT-2. nanoGPT's own
    ckpt.pt has settings, its model_args, and a dense model.
    """
    ours = {}
    for name, t in weights.items():
        for prefix in ("_orig_mod.", "module.", "transformer."):
            name = name.removeprefix(prefix)
        if not name.endswith(".attn.bias"):  # the causal mask
            ours[name] = t
    if not {"wte.weight", "wpe.weight", "ln_f.weight"} <= ours.keys():
        raise ValueError(f"{source} is neither this project's checkpoint nor a nanoGPT state dict")
    vocab_size, n_embd = ours["wte.weight"].shape
    n_head = settings.get("n_head") if isinstance(settings, dict) else None
    if not n_head and n_embd % 64:
        raise ValueError(f"{source} is {n_embd} wide, which heads of 64 do not fill")
    fields = {"vocab_size": vocab_size, "n_embd": n_embd, "n_head": n_head or n_embd // 64,
              "n_layer": len({name.split(".")[1] for name in ours if name.startswith("h.")}),
              "block_size": len(ours["wpe.weight"]), "attention_bias": "h.0.attn.c_attn.bias" in ours,
              "mlp_bias": "h.0.mlp.c_fc.bias" in ours, "tied_head": same_head(ours),
              "sparse": not n_head, "gate_bias": 0.0}
    norms = {name.removesuffix(".weight") for name in ours if re.search(r"\bln_\w+\.weight$", name)}
    return fields, {f"{norm}.bias": torch.zeros(n_embd) for norm in norms} | ours  # has none
