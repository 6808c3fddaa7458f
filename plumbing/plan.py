"""What a run needs before it is paid for: python train.py --init meta-llama/Llama-3.2-1B --fsdp --dry-run

Everything is counted on tensors that have shapes and no memory: the parameters of the real model,
and what its forward pass keeps for the backward pass.
"""

import time
from dataclasses import replace

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from plumbing import lora
from plumbing.chunked_loss import CHUNK
from plumbing.flags import open_folder, write_results

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072,
         "num_key_value_heads": 8, "intermediate_size": 8192, "rms_norm_eps": 1e-5,
         "rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
KNOWN = {  # config.json of what needs no download
    "meta-llama/Llama-3.2-1B": LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16,
                                        "num_attention_heads": 32},
    "meta-llama/Llama-3.2-3B": LLAMA | {"hidden_size": 3072, "num_hidden_layers": 28,
                                        "num_attention_heads": 24},
    "gpt2": GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}


def saved_bytes(make_model, config, context, half):
    """Bytes that autograd saves in one forward pass of one sequence, each storage once."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # constants of the code
        model, held = make_model(config), {}
        for layer in list(model.h.modules()) if half else ():
            if isinstance(layer, torch.nn.Linear):  # whose .to() fails on tensors without memory
                for name, p in list(layer.named_parameters()):
                    setattr(layer, name, torch.nn.Parameter(p.to(torch.bfloat16)))
        model.lm_head.weight.requires_grad_(False)  # its gradient, made in the forward pass: loss_bytes
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(t):
            held[t.untyped_storage()._cdata] = t
            return t

        idx = torch.zeros(1, context, dtype=torch.int64)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        with autocast, saved_tensors_hooks(keep, lambda t: t):
            model(idx, targets=idx, seed=0, logits=False)
        return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)


def activation_bytes(make_model, config, context, half=False):
    """Peak bytes a sequence, beyond weights and gradients, of a forward and backward pass:
    (as it is, with --recompute).

    What autograd saves, as found on one layer and on two. With --recompute every block keeps its
    input, and the one that runs again all of its own.
    """
    one, two = (saved_bytes(make_model, replace(config, n_layer=n), context, half) for n in (1, 2))
    width = 2 if half else 4  # bytes a number
    return [one + (config.n_layer - 1) * layer for layer in (two - one, context * config.n_embd * width)]


def loss_bytes(config, tokens, half=False, head_trains=True):
    """Bytes of chunked_loss, when all activations are there: the logits of a chunk, and their logarithm,
    in float32 and if half in bfloat16; the gradient of the head, and what a chunk adds to it."""
    logits = min(CHUNK, tokens) * config.vocab_size * (2 * 4 + 2 * half)
    return logits + 2 * 4 * config.vocab_size * config.n_embd * head_trains


def memory(model, flags, world, half, context, per_sequence):
    """Bytes on each of `world` ranks, by purpose, of train.py's FSDP run of a model on meta."""
    config = model.config
    n = trained = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.h[0].parameters())
    if flags.lora:
        trained = lora.count(model, flags.lora)
    width = 2 if half else 4  # bytes a number of a gathered block
    root = n - config.n_layer * block
    batch = max(1, flags.batch_size // world)
    loss = loss_bytes(config, batch * context, half, head_trains=trained == n)
    loss -= 4 * config.vocab_size * config.n_embd * (trained == n)  # the gradient is in "gathered" already
    beside = flags.sparse and (flags.bound == "kl" or bool(flags.lora and flags.adapter))  # the dense model, with its logits
    loss += batch * context * config.vocab_size * width * beside
    return {
        "weights": 4 * n * (1 + beside) // world,
        "gradients": 4 * trained // world,
        "optimizer": 8 * trained // world,
        # the root, one block and the next; the gradients of the root and of one block
        "gathered": 4 * root * (1 + beside) + width * 2 * block + (4 * root + width * block if trained == n else 0),
        "activations": batch * per_sequence[0] + loss,
        "activations_recompute": batch * per_sequence[1] + loss,
        "batch": batch, "parameters": n, "trained": trained}


def show(flags, make_model, config):
    """Print, and write to --out, the memory per rank on 1, 2, 4 and 8 ranks."""
    started, half = time.time(), flags.dtype != "float32"
    with torch.device("meta"):
        model = make_model(config)
    context = flags.context or min(1024, config.block_size)
    per_sequence = activation_bytes(make_model, config, context, half)
    rows = {world: memory(model, flags, world, half, context, per_sequence) for world in (1, 2, 4, 8)}
    first, gib = rows[1], 2**30
    print(f"{flags.init}: {first['parameters']:,} parameters, {first['trained']:,} trained; "
          f"{config.n_layer} layers, {config.n_head} heads ({config.n_kv_head} key-value heads) of "
          f"{config.head_size}, width {config.n_embd}, vocabulary {config.vocab_size:,}")
    print(f"sharding: each of the {config.n_layer} blocks, then embeddings, last norm and head together; "
          f"parameters and AdamW float32, blocks compute in {'bfloat16' if half else 'float32'}, "
          "gates and gradient sums in float32")
    print(f"--batch-size {flags.batch_size} over all ranks, context {context}\n\nGiB per rank")
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "activations_recompute")
    titles = ("weights", "gradients", "optimizer", "gathered", "activations", "recomputed")
    print("".join(f"{title:>13}" for title in ("ranks", *titles, "sum", "recomp. sum")))
    for world, row in rows.items():
        fixed = sum(row[part] for part in parts[:4])
        row["total"], row["total_recompute"] = fixed + row[parts[4]], fixed + row[parts[5]]
        figures = [row[part] / gib for part in (*parts, "total", "total_recompute")]
        print(f"{world:13}" + "".join(f"{figure:13.2f}" for figure in figures))
    print("\nrecomputed: with --recompute. The allocator and the collectives take some more.")
    open_folder(flags.out)
    print("wrote", write_results(flags.out, started, init=flags.init, context_length=context,
                                 batch_size=flags.batch_size, bytes_per_rank=rows))
