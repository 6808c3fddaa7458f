"""Adapters: nothing changes at first, only they train, and base + file is the trained model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from model import Config, Transformer
from plumbing import hub, lora
from plumbing.weights import read_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def base(folder, seed=0, **more):
    torch.manual_seed(seed)
    model = Transformer(Config(**dict(
        block_size=32, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, norm="rmsnorm",
        position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False, init_std=0.1) | more))
    model.save_pretrained(str(folder))
    return model


def adapted(folder, sparse=True):
    """The base in `folder` with adapters, as train.py builds it, and the first adapter weights."""
    fields, weights = read_model(str(folder))
    model = Transformer(Config(**fields | {"sparse": sparse, "gate_bias": 0.5}))
    first = lora.add(model, 3)
    return model.load_weights(weights | first), weights, first


def test_adapters_change_nothing_at_first_and_alone_are_trained(tmp_path):
    dense = base(tmp_path)
    model, _, first = adapted(tmp_path, sparse=False)
    idx = torch.randint(257, (2, 20))
    assert torch.equal(model(idx)[0], dense(idx)[0])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == first.keys() and len(trained) == 2 * 2 * 5
    model(idx, targets=idx)[1].backward()
    assert all((p.grad is not None) == (name in first) for name, p in model.named_parameters())


@pytest.mark.parametrize("layers", ["attn", "attn mlp"])
def test_base_and_file_are_the_trained_model(layers, tmp_path):
    """Also a file that holds adapters of the attention alone, as earlier versions wrote."""
    base(tmp_path / "base")
    model, weights, first = adapted(tmp_path / "base")
    trained = {name: torch.randn_like(t) * 0.1 for name, t in first.items() if name.split(".")[2] in layers}
    model.load_state_dict(trained, strict=False)
    path = str(tmp_path / "adapter.safetensors")
    lora.save(path, trained, lora.fingerprint(weights), model.config)
    merged = Transformer.from_pretrained(str(tmp_path / "base"), path)
    idx = torch.randint(257, (2, 20))
    with torch.no_grad():
        want, got = model(idx)[0], merged(idx)[0]
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
        assert (want - base(tmp_path / "base")(idx)[0]).abs().max() > 0.1 * want.abs().max()
    assert merged.config.sparse and merged.config.gate_bias == 0.5
    merged.save_pretrained(str(tmp_path / "merged"))  # for export
    assert torch.equal(Transformer.from_pretrained(str(tmp_path / "merged"))(idx)[0], got)


def test_the_wrong_base_or_file_is_one_clear_line(tmp_path):
    base(tmp_path / "base")
    _, weights, first = adapted(tmp_path / "base")
    path = str(tmp_path / "adapter.safetensors")
    lora.save(path, first, lora.fingerprint(weights), Config(sparse=True))
    base(tmp_path / "other", seed=1)
    base(tmp_path / "wide", n_embd=64)
    base(tmp_path / "shallow", n_layer=1)
    for folder, message in (("other", "of the same shape but with other weights"),
                            ("wide", "128 x 64|adapts h.0.attn.c_attn, 64 x 32, which this base has not"),
                            ("shallow", "adapts h.1.attn.c_attn")):
        with pytest.raises(ValueError, match=message) as error:
            Transformer.from_pretrained(str(tmp_path / folder), path)
        assert "\n" not in str(error.value)
    hub.write_safetensors(path, first)
    with pytest.raises(ValueError, match="is no adapter file"):
        Transformer.from_pretrained(str(tmp_path / "base"), path)
    del first["h.0.attn.c_attn.lora_b"]
    hub.write_safetensors(path, first, {"base": lora.fingerprint(weights), "gates": "{}"})
    with pytest.raises(ValueError, match="lacks"):
        Transformer.from_pretrained(str(tmp_path / "base"), path)


def train(folder, *flags):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *flags], cwd=folder, env=env,
                          capture_output=True, text=True)


def test_train_writes_an_adapter_that_every_script_reloads(tmp_path):
    """A run in two sittings is the run in one; base + adapter has its numbers."""
    base(tmp_path / "base")
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n} is {n + n}; " for n in range(2000)))
    flags = ["--init", "base", "--data", "text.txt", "--batch-size", "4", "--context", "24",
             "--eval-every", "4", "--eval-sequences", "8", "--threads", "1", "--warmup", "1"]
    tuned = ["--lora", "2", "--steps", "8", "--slack", "0.5", "--lr", "0.01"]
    for out, more in (("whole", []), ("halves", ["--sitting", "5"])):
        run = train(tmp_path, *flags, *tuned, "--out", out, *more)
        assert run.returncode == 0, run.stderr
    run = train(tmp_path, "--resume", "halves")
    assert run.returncode == 0, run.stderr
    one, two = (load_file(tmp_path / out / "adapter.safetensors") for out in ("whole", "halves"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert os.path.getsize(tmp_path / "whole" / "last.pt") < os.path.getsize(tmp_path / "base/model.safetensors")

    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    run = train(tmp_path, *flags, "--adapter", "whole/adapter.safetensors", "--steps", "1", "--out", "again")
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in open(tmp_path / "again" / "log.jsonl")]
    best = next(json.loads(line) for line in open(tmp_path / "whole" / "log.jsonl")
                if f'"step": {whole["best_step"]}, "val_ce"' in line)
    start = next(line for line in lines if "val_ce" in line)
    for key in ("val_ce", "val_ce_sampled", "open"):
        assert abs(start[key] - best[key]) < 1e-5, key

    run = train(tmp_path, *flags, "--init", "whole/last.pt", "--out", "x")
    assert run.returncode == 2 and "holds adapters without their base" in run.stderr
    run = train(tmp_path, *flags, "--adapter", "whole/adapter.safetensors", "--lora", "2", "--out", "x")
    assert run.returncode == 2 and "no --adapter" in run.stderr
