"""The dry run: LLaMA-1B's size without its weights, and activations against what a small model takes."""

import json
import os
import subprocess
import sys

import pytest
import torch

import train
from model import Config, Transformer
from plumbing import flags
from plumbing.plan import KNOWN, activation_bytes, loss_bytes
from plumbing.weights import read_fields

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GPT2 = dict(block_size=256, vocab_size=1000, n_layer=3, n_head=4, n_embd=256, sparse=True)
LLAMA = GPT2 | dict(n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu",
                    attention_bias=False,
                    mlp_bias=False)
CASES = [(kind, recompute) for kind in (GPT2, LLAMA, GPT2 | dict(vocab_size=10000, n_layer=1))
         for recompute in (False, True)]
MEASURE = """
import os, sys, torch
from model import Config, Transformer
from plumbing.runs import peak_memory
torch.set_num_threads(1)
for kind, recompute in eval(sys.argv[1]):
    if os.fork() == 0:  # each in a process of its own, because a peak never goes down
        model = Transformer(Config(**kind))
        model.recompute = recompute
        idx = torch.randint(1000, (4, 256))
        model(idx[:1, :64], targets=idx[:1, :64], seed=0, logits=False)[1].backward()  # gradients are there, buffers warm
        before = peak_memory()
        _, loss, edges = model(idx, targets=idx, seed=0, logits=False)
        (loss + edges.prob.mean()).backward()
        print((peak_memory() - before) * 2**30, flush=True)
        os._exit(0)
    os.wait()
"""


def meta_model(config):
    with torch.device("meta"):
        return Transformer(config)


def test_known_sizes():
    count = {name: sum(p.numel() for p in meta_model(Config(**read_fields(name))).parameters())
             for name in KNOWN}
    assert count["meta-llama/Llama-3.2-1B"] == 1_235_814_400
    assert count["meta-llama/Llama-3.2-3B"] == 3_212_749_824
    assert count["gpt2"] == 124_439_808 and count["gpt2-xl"] == 1_557_611_200


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells its peak memory")
def test_activations_are_what_a_small_model_takes():
    env = os.environ | {"PYTHONPATH": ROOT, "MALLOC_MMAP_THRESHOLD_": "65536"}  # give back what is freed
    run = subprocess.run([sys.executable, "-c", MEASURE, repr(CASES)], env=env,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    planned = [4 * n + loss_bytes(Config(**kind), 4 * 256) for kind, recompute in CASES if not recompute
               for n in activation_bytes(Transformer, Config(**kind), 256)]
    for case, plan, found in zip(CASES, planned, run.stdout.split(), strict=True):
        assert 0.8 < plan / float(found) < 1.3, (case, plan, found)


def test_the_command_prints_the_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Transformer(Config(**LLAMA | dict(sparse=False))).save_pretrained("model")
    n = sum(p.numel() for p in meta_model(Config(**LLAMA)).parameters())
    found = []
    for more in (["--dtype", "float32"], [], ["--lora", "2"], ["--no-sparse"], ["--bound", "kl"]):
        train.main(flags.parse(train.Flags, ["--fsdp", "--dry-run", "--init", "model", "--context",
                                             "64",
                                             "--batch-size", "16", *more]))
        assert f"model: {n:,} parameters" in capsys.readouterr().out
        out = "out/model-dry-run" + "-control" * (more == ["--no-sparse"])
        assert os.listdir(out) == ["results.json"]
        with open(out + "/results.json") as f:
            found.append(json.load(f)["bytes_per_rank"])
    wide, rows, adapters, dense, beside = found
    assert rows["1"]["weights"] == 4 * n and rows["4"]["optimizer"] == 2 * n
    assert rows["8"]["batch"] == 2
    assert 8 * rows["8"]["activations"] > rows["1"]["activations"] > rows["8"]["activations"]
    assert rows["1"]["activations"] < wide["1"]["activations"] and rows["1"]["gathered"] < wide["1"]["gathered"]
    assert adapters["1"]["optimizer"] < rows["1"]["optimizer"] / 10
    assert dense["1"]["activations"] < rows["1"]["activations"]
    assert beside["1"]["weights"] == 2 * rows["1"]["weights"] and beside["1"]["optimizer"] == rows["1"]["optimizer"]
    assert beside["8"]["activations"] - rows["8"]["activations"] == 2 * 64 * 1000 * 2  # the dense logits, bfloat16
