"""The dry run: LLaMA-1B's size without its weights, and activations against what a small model takes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from model import Config, Transformer
from plumbing.plan import KNOWN, activation_bytes
from plumbing.weights import read_fields

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GPT2 = dict(block_size=512, vocab_size=1000, n_layer=6, n_head=4, n_embd=256, sparse=True)
LLAMA = GPT2 | dict(n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu", attention_bias=False,
                    mlp_bias=False)
MEASURE = """
import sys, torch
from model import Config, Transformer
from plumbing.runs import peak_memory
torch.set_num_threads(1)
model = Transformer(Config(**eval(sys.argv[1])))
model.recompute = sys.argv[2] == "True"
idx = torch.randint(1000, (8, 512))
model(idx[:1, :64], targets=idx[:1, :64], seed=0)[1].backward()  # gradients are there, buffers warm
before = peak_memory()
logits, loss, edges = model(idx, targets=idx, seed=0)
(loss + edges.prob.mean()).backward()
print((peak_memory() - before) * 2**30)
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
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [GPT2, LLAMA, GPT2 | dict(vocab_size=20000, n_layer=2)])
def test_activations_are_what_a_small_model_takes(kind, recompute):
    env = os.environ | {"PYTHONPATH": ROOT, "MALLOC_MMAP_THRESHOLD_": "65536"}  # give back what is freed
    run = subprocess.run([sys.executable, "-c", MEASURE, repr(kind), str(recompute)], env=env,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ratio = 8 * activation_bytes(Transformer, Config(**kind), 512)[recompute] / float(run.stdout)
    assert 0.8 < ratio < 1.3, ratio


def test_the_command_prints_the_plan(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--fsdp", "--dry-run", "--dtype", "float32"]
    Transformer(Config(**LLAMA | dict(sparse=False))).save_pretrained(str(tmp_path / "model"))
    run = subprocess.run([*command, "--init", "model", "--context", "64", "--batch-size", "16"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "out/model-dry-run/results.json").read_text())["bytes_per_rank"]
    n = sum(p.numel() for p in meta_model(Config(**LLAMA)).parameters())
    assert f"model: {n:,} parameters" in run.stdout
    assert rows["1"]["weights"] == 4 * n and rows["4"]["optimizer"] == 2 * n
    assert rows["8"]["batch"] == 2 and rows["8"]["activations"] * 8 == rows["1"]["activations"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--init" in run.stderr
