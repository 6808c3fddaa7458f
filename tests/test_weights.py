"""Weights in and out: GPT-2 and LLaMA against transformers, the authors' layout, and files that are wrong."""

import json
import os
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM)

from model import Config, Transformer
from plumbing.tokens import Blocks, open_tokens, tokenizer
from plumbing.weights import read_fields

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = [  # n_layer, n_head, n_embd, vocabulary, context, n_inner
    (1, 1, 8, 11, 5, None),
    (2, 4, 32, 97, 40, None),
    (3, 3, 48, 50, 64, 100),
    (4, 8, 128, 1000, 128, None),
]


def reference(size, folder, seed=0, **more):
    """A random transformers GPT-2, saved; biases and norms random too, so that each one counts."""
    n_layer, n_head, n_embd, vocabulary, context, n_inner = size
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocabulary, n_positions=context,
        n_inner=n_inner, bos_token_id=0, eos_token_id=0, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 / n_embd**0.5 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model, torch.randint(vocabulary, (2, context))


@torch.no_grad()
def same_logits(ours, theirs, idx):
    for T in (1, 3, idx.shape[1]):
        got, want = ours(idx[:, :T])[0], theirs(idx[:, :T]).logits
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["safetensors", "shards", "bin", "bin without prefix", "mask buffers"])
def test_logits_equal_transformers(size, layout, tmp_path):
    theirs, idx = reference(size, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if layout == "shards":
        file.unlink()
        names = sorted(weights)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, held in parts.items():
            save_file({name: weights[name] for name in held}, tmp_path / part)
        index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if layout.startswith("bin"):
        file.unlink()
        if "without" in layout:
            weights = {name.removeprefix("transformer."): t for name, t in weights.items()}
        torch.save(weights, tmp_path / "pytorch_model.bin")
    if layout == "mask buffers":  # as the first GPT-2 files on the hub have them
        for l in range(size[0]):
            weights[f"transformer.h.{l}.attn.bias"] = torch.ones(1, 1, 5, 5)
            weights[f"transformer.h.{l}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(weights, file)
    same_logits(Transformer.from_pretrained(str(tmp_path)), theirs, idx)


def test_an_untied_head_is_read(tmp_path):
    theirs, idx = reference(SIZES[1], tmp_path, tie_word_embeddings=False)
    ours = Transformer.from_pretrained(str(tmp_path))
    assert ours.lm_head.weight is not ours.wte.weight
    same_logits(ours, theirs, idx)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_save_pretrained_opens_in_transformers(size, tied, tmp_path):
    _, idx = reference(size, tmp_path / "theirs", tie_word_embeddings=tied)
    ours = Transformer.from_pretrained(str(tmp_path / "theirs"))
    ours.save_pretrained(str(tmp_path / "ours"))
    same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), idx)
    again = Transformer.from_pretrained(str(tmp_path / "ours"))
    assert again.config == ours.config
    assert torch.equal(again(idx)[0], ours(idx)[0])


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LLAMAS = {
    "grouped queries, tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "all heads, untied": dict(num_key_value_heads=8),
    "one key-value head, biases": dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama3 scaling": dict(rope_parameters={"rope_theta": 5e4, **LLAMA3}, num_key_value_heads=2),
    "linear scaling": dict(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 3.0}),
    "another theta and eps": dict(rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
                                  rms_norm_eps=1e-3, tie_word_embeddings=True),
}


def llama(kind, folder, **how):
    """A random transformers LLaMA of one of LLAMAS, saved; norms and biases random too."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**dict(
        hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=8,
        vocab_size=90, max_position_embeddings=400) | LLAMAS[kind])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder, **how)
    return model, torch.randint(90, (2, 400))


@pytest.mark.parametrize("kind", LLAMAS)
def test_llama_equals_transformers(kind, tmp_path):
    """Both ways, at positions within and beyond the original context of llama3's scaling."""
    theirs, idx = llama(kind, tmp_path / "theirs")
    ours = Transformer.from_pretrained(str(tmp_path / "theirs"))
    same_logits(ours, theirs, idx)
    ours.save_pretrained(str(tmp_path / "ours"))
    same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), idx)
    again = Transformer.from_pretrained(str(tmp_path / "ours"))
    assert again.config == ours.config and torch.equal(again(idx)[0], ours(idx)[0])


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"type": "linear", "factor": 2.0}])
def test_llama_settings_of_transformers_4(scaling, tmp_path):
    """rope_theta and rope_scaling beside each other, as all files on the hub have them."""
    llama("another theta and eps", tmp_path)
    settings(tmp_path, rope_parameters=None, rope_theta=1e5, rope_scaling=scaling)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    same_logits(Transformer.from_pretrained(str(tmp_path)), theirs, torch.randint(90, (2, 400)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_llama(dtype, tmp_path):
    theirs, idx = llama("grouped queries, tied", tmp_path / "float32")
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    same_logits(Transformer.from_pretrained(str(tmp_path)), theirs, idx)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"names the file {shards[1].name}, which is not beside"):
        Transformer.from_pretrained(str(tmp_path))


def test_a_padded_vocabulary_ends_its_text_with_an_id_that_is_a_token(tmp_path):
    Transformer(Config(n_layer=1, n_head=1, n_embd=8, vocab_size=50304, block_size=4)).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 50256


BAD_LLAMA = {
    "rope_scaling of type 'yarn' is not known": lambda f: settings(
        f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    "rope_scaling of type 'llama3' lacks 'high_freq_factor'": lambda f: settings(
        f, rope_parameters={k: v for k, v in LLAMA3.items() if "high" not in k}),
    "rope_scaling of type 'linear' needs positive numbers, not": lambda f: settings(
        f, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
    "has heads of 16, where hidden_size": lambda f: settings(f, head_dim=16),
    "hidden_act = 'gelu'": lambda f: settings(f, hidden_act="gelu"),
    "lacks tensor h.1.attn.c_attn.weight": lambda f: damage(
        f, lambda w: w.pop("model.layers.1.self_attn.v_proj.weight")),
    "an lm_head.weight of its own": lambda f: settings(f, tie_word_embeddings=True),
    "h.0.attn.c_attn.weight has shape": lambda f: settings(f, num_key_value_heads=4),
}


@pytest.mark.parametrize("message", BAD_LLAMA)
def test_wrong_llama_folders_are_one_clear_line(message, tmp_path):
    llama("all heads, untied", tmp_path)
    BAD_LLAMA[message](tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Transformer.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sparse_model_comes_back_sparse_and_transformers_gets_its_gates_from_the_readme(family, tmp_path):
    """The README's lines, run as they stand, give transformers our logits."""
    if family == "gpt2":
        reference(SIZES[3], tmp_path / "dense")
    else:
        llama("grouped queries, tied", tmp_path / "dense")
    ours = Transformer.from_pretrained(str(tmp_path / "dense"), sparse=True, gate_bias=0.25)
    folder = str(tmp_path / "sparse")
    ours.save_pretrained(folder)
    again = Transformer.from_pretrained(folder)
    assert again.config.sparse and again.config.gate_bias == 0.25
    idx = torch.randint(90, (2, 50))
    with torch.no_grad():
        want = ours(idx)[0]
        dense = AutoModelForCausalLM.from_pretrained(folder).eval()(idx).logits
        assert (dense - want).abs().max() > 0.01 * want.abs().max()
        readme = open(os.path.join(ROOT, "RESULTS.md")).read()
        code = next(c for c in re.findall(r"```python\n(.*?)```", readme, re.S) if "register" in c)
        names = {}
        exec(code.replace('"out/gpt2-sparse"', repr(folder)), names)
        got = names["model"].eval()(idx).logits
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def nanogpt(model, prefix="transformer.", biases=True):
    """The state dict a nanoGPT-style trainer would have saved for this model."""
    weights = {"lm_head.weight": model.lm_head.weight.data}
    for name, t in model.state_dict().items():
        if name != "lm_head.weight" and (biases or not name.endswith(".bias")):
            weights[prefix + name] = t
    return weights


@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer.", "module.transformer."])
@pytest.mark.parametrize("biases", [True, False])
def test_the_authors_layout(prefix, biases, tmp_path):
    torch.manual_seed(0)
    ours = Transformer(Config(n_layer=2, n_head=2, n_embd=128, vocab_size=90, block_size=16, sparse=True,
                              attention_bias=biases, mlp_bias=biases))
    weights = nanogpt(ours, prefix, biases)
    weights["_orig_mod.lm_head.weight"] = weights.pop("lm_head.weight")
    torch.save(weights, tmp_path / "final.pth")
    read = Transformer.from_pretrained(str(tmp_path / "final.pth"))
    assert read.config.sparse and read.config.gate_bias == 0 and read.config.n_head == 2
    idx = torch.randint(90, (2, 16))
    assert torch.equal(read(idx)[0], ours(idx)[0])


def test_checkpoints_come_back_whole(tmp_path):
    torch.manual_seed(0)
    ours = Transformer(Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50, block_size=16, causal=False,
                              n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu", sparse=True))
    ours.save_checkpoint(str(tmp_path / "x.pt"), step=3)
    read = Transformer.from_pretrained(str(tmp_path / "x.pt"))
    idx = torch.randint(50, (2, 16))
    assert read.config == ours.config and torch.equal(read(idx)[0], ours(idx)[0])
    assert read.lm_head.weight is read.wte.weight
    dense = Transformer.from_pretrained(str(tmp_path / "x.pt"), sparse=False)
    assert dense(idx)[2] is None


def small(gate_bias):
    torch.manual_seed(0)
    return Transformer(Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=4, sparse=True,
                              gate_bias=gate_bias))


def test_a_folder_of_train_opens_by_its_best_state_or_else_its_last(tmp_path):
    """A dense control has no best.pt: it is compared at its last step."""
    for file, gate_bias in (("last.pt", 1.0), ("best.pt", 2.0)):
        small(gate_bias).save_checkpoint(str(tmp_path / file), step=3)
        assert Transformer.from_pretrained(str(tmp_path)).config == small(gate_bias).config
        assert Config(**read_fields(str(tmp_path))) == small(gate_bias).config
    (tmp_path / "best.pt").unlink()
    small(3.0).save_pretrained(str(tmp_path))
    assert Transformer.from_pretrained(str(tmp_path)).config.gate_bias == 3.0


def test_a_nanogpt_checkpoint_is_no_checkpoint_of_ours(tmp_path):
    """nanoGPT's ckpt.pt has a config and a model too, with other settings in it, and is dense."""
    ours = Transformer(Config(n_layer=2, n_head=4, n_embd=48, vocab_size=90, block_size=16))
    content = {"model": nanogpt(ours), "config": {"n_layer": 2, "learning_rate": 6e-4}, "model_args": {"n_head": 4}}
    torch.save(content, tmp_path / "ckpt.pt")
    idx = torch.randint(90, (2, 16))
    assert torch.equal(Transformer.from_pretrained(str(tmp_path / "ckpt.pt"))(idx)[0], ours(idx)[0])


def test_a_known_model_needs_no_download_for_its_fields():
    assert Config(**read_fields("gpt2")) == Config()


# -----------------------------------------------------------------------------
# files that are wrong: one line that says what


def damage(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def settings(folder, **change):
    content = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(content))


BAD = {
    "lacks tensor lm_head.weight and 1 more":
        lambda f: damage(f, lambda w: w.pop("transformer.wte.weight")),
    "unknown tensor h.0.attn.extra": lambda f: damage(
        f, lambda w: w.update({"transformer.h.0.attn.extra": torch.zeros(3)})),
    "has shape": lambda f: damage(f, lambda w: w.update({"transformer.ln_f.bias": torch.zeros(3)})),
    "lacks tensor h.2": lambda f: settings(f, n_layer=3),
    "unknown tensor h.1": lambda f: settings(f, n_layer=1),
    "activation_function = 'relu'": lambda f: settings(f, activation_function="relu"),
    "scale_attn_by_inverse_layer_idx": lambda f: settings(f, scale_attn_by_inverse_layer_idx=True),
    "'bert' model": lambda f: settings(f, model_type="bert"),
    "no config.json": lambda f: (f / "config.json").unlink(),
    "not valid JSON": lambda f: (f / "config.json").write_text("{"),
    "download it again": lambda f: os.truncate(f / "model.safetensors", 3000),
    "holds no weights": lambda f: (f / "model.safetensors").unlink(),
    "must be a multiple": lambda f: settings(f, n_head=5),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_folders_are_one_clear_line(message, tmp_path):
    reference(SIZES[1], tmp_path)
    BAD[message](tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Transformer.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_wrong_names_and_files_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no file or folder here and no hub name"):
        Transformer.from_pretrained("gpt5")
    path = tmp_path / "broken.pt"
    small(0.0).save_checkpoint(str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="can not be read"):
        Transformer.from_pretrained(str(path))
    for content in ({"a": torch.zeros(2)}, [1], {"model": {}, "config": None}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="neither this project's checkpoint nor a nanoGPT"):
            Transformer.from_pretrained(str(path))
    fields, weights = asdict(small(0.0).config), small(0.0).state_dict()
    for content, message in (({"config": fields | {"dropout": 0.1}}, "unknown setting dropout"),
                             ({"config": fields | {"gate_bias": None}}, "gate_bias must be a finite"),
                             ({"model": {"h.0.attn.c_attn.lora_a": torch.zeros(2)}}, "without their base"),
                             ({"model": {"wte.weight": torch.zeros(9, 8)}}, "lacks tensor h.0.attn.c_a")):
        torch.save({"config": fields, "model": weights} | content, path)
        with pytest.raises(ValueError, match=message) as error:
            Transformer.from_pretrained(str(path))
        assert "\n" not in str(error.value)


def test_load_weights_takes_all_tensors_or_says_which_does_not_fit():
    model, weights = small(0.0), small(0.0).state_dict()
    for change, message in (({"ln_f.bias": torch.zeros(3)}, r"ln_f.bias has shape \(3,\)"),
                            ({"extra": torch.zeros(3)}, "unknown tensor extra")):
        with pytest.raises(ValueError, match=message):
            model.load_weights(weights | change)
    half = {name: t.to(torch.bfloat16) for name, t in weights.items()}
    assert model.load_weights(half) is model and model.lm_head.weight is model.wte.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_other_architectures_have_no_hugging_face_layout(tmp_path):
    model = Transformer(Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=4, causal=False))
    with pytest.raises(ValueError, match="only the architectures of GPT-2 and LLaMA"):
        model.save_pretrained(str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not os.environ.get("SPARSE_GPT2"), reason="SPARSE_GPT2: a folder with GPT-2's files")
def test_real_gpt2_goes_on_as_known():
    """Greedy continuation of "The dog" by the 124M weights."""
    model, tok = Transformer.from_pretrained(os.environ["SPARSE_GPT2"]), tokenizer("gpt2")
    idx = torch.tensor([tok.encode("The dog")])
    with torch.no_grad():
        for _ in range(15):
            idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)
    want = "The dog was found in a field near the intersection of West and West Streets.\n\nThe"
    assert tok.decode(idx[0].tolist()) == want


@pytest.mark.parametrize("variable, known", [("SPARSE_FINEWEB", 3.29), ("SPARSE_OPENWEBTEXT", 3.12)])
def test_real_gpt2_has_the_known_loss(variable, known):
    """CE at context 1,024: fineweb_val_000000.bin, or val.bin of OpenWebText as nanoGPT prepares it."""
    if not os.environ.get("SPARSE_GPT2") or not os.environ.get(variable):
        pytest.skip(f"SPARSE_GPT2: a folder with GPT-2's files; {variable}: a file of its tokens")
    data = os.environ[variable]
    data = np.memmap(data, "<u2", "r") if "OPEN" in variable else open_tokens(data, "gpt2")[0]
    idx, targets = Blocks(data, 1024).evenly(128)
    model = Transformer.from_pretrained(os.environ["SPARSE_GPT2"])
    with torch.no_grad():
        ce = [model(i, t)[1].item() for i, t in zip(idx.split(4), targets.split(4))]
    assert abs(sum(ce) / len(ce) - known) < 0.06
