"""SmolLM2 in a GGUF file, the format of llama.cpp, as a Hugging Face folder. Needs the package gguf."""

import json
import pathlib

import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize

from plumbing import files

# Hugging Face's names, then GGUF's
SETTINGS = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv", "vocab_size": "vocab_size",
            "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base"}
# of the tensors: GGUF's, then Hugging Face's
PARTS = {"token_embd": "embed_tokens", "output_norm": "norm",
         "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def write_folder(folder, path):
    """config.json, model.safetensors (bfloat16) and tokenizer.json of the GGUF file, in a new folder."""
    folder, reader = pathlib.Path(folder), GGUFReader(path)
    about = {name: field.contents() for name, field in reader.fields.items()}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
              "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
              "rms_norm_eps": float(f"{about['llama.attention.layer_norm_rms_epsilon']:.6g}")}  # was float32
    config |= {name: about[f"llama.{theirs}"] for name, theirs in SETTINGS.items()}
    config |= {name: about[f"tokenizer.ggml.{name}"] for name in ("bos_token_id", "eos_token_id")}
    folder.mkdir()
    files.write_safetensors(folder / "model.safetensors", tensors_of(reader, config))
    for name, content in (("config.json", config), ("tokenizer.json", tokenizer_of(about))):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def tensors_of(reader, config):
    """{Hugging Face's name: bfloat16 tensor}; numbers of few bits are unpacked."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for packed in reader.tensors:
        *block, part, kind = packed.name.split(".")  # blk.0.attn_q.weight, or output_norm.weight
        t = torch.tensor(dequantize(packed.data, packed.tensor_type)).bfloat16()
        if part in heads:
            # RoPE turns pairs of rows: in GGUF two neighbours, in Hugging Face's files one of each half
            t = t.view(heads[part], -1, 2, t.shape[1]).transpose(1, 2).reshape(t.shape)  # (H * D, n_embd)
        layer = f"layers.{block[1]}." if block else ""
        tensors[f"model.{layer}{PARTS[part]}.{kind}"] = t
    return tensors


def tokenizer_of(about):
    """A tokenizer.json. How text is cut, GGUF only names, "smollm": single digits, the rest as GPT-2."""
    tokens, kinds = (about[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    special = [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True}
               for i, kind in enumerate(kinds) if kind == TokenType.CONTROL]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    cut = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "vocab": {token: i for i, token in enumerate(tokens)}, "merges": about["tokenizer.ggml.merges"]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": None, "pre_tokenizer": cut, "post_processor": None,
            "decoder": level | {"add_prefix_space": True}, "model": model}
