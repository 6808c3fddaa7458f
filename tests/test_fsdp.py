"""FSDP on two gloo ranks: the same training as in one process, and the same after an accident."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from model import Config, Transformer

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "train_in_float64.py")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random LLaMA (grouped queries, tied head) as model/, and flags to train it."""
    folder = tmp_path_factory.mktemp("fsdp")
    torch.manual_seed(0)
    Transformer(Config(block_size=32, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                       n_inner=48, norm="rmsnorm", position="rope", mlp="swiglu", attention_bias=False,
                       mlp_bias=False, init_std=0.1)).save_pretrained(str(folder / "model"))
    words = "".join(f"{n} times {n} is {n * n}; " for n in range(3000))
    (folder / "text.txt").write_text(words)
    flags = ["--init", str(folder / "model"), "--data", str(folder / "text.txt"), "--steps", "4",
             "--batch-size", "4", "--accumulate", "2", "--context", "24", "--eval-every", "2",
             "--eval-sequences", "7", "--threads", "1", "--lr", "0.01", "--warmup", "1", "--device", "cpu"]
    return folder, flags


def alone(folder, *flags):
    return subprocess.run([sys.executable, PROGRAM, *flags], cwd=folder, env=ENV, capture_output=True,
                          text=True)


def command(*flags, ranks=2):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            PROGRAM, "--fsdp", *flags]


def together(folder, *flags):
    return subprocess.run(command(*flags), cwd=folder, env=ENV, capture_output=True, text=True)


def told(folder, rank):
    """(step, lambda, tau, share of open sampled gates) of each step on one rank."""
    return [json.loads(line) for line in open(folder / f"rank{rank}.jsonl")]


def parameters(folder, file="last.pt"):
    return torch.load(folder / file, weights_only=True)["model"]


def assert_same_training(one, two):
    a, b = parameters(one), parameters(two)
    assert a.keys() == b.keys() and a["wte.weight"].dtype == torch.float64
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-9
    torch.testing.assert_close(torch.tensor(told(one, 0)), torch.tensor(told(two, 0)), rtol=1e-9, atol=0)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    for key in ("ce_dense", "tau", "ce_last", "ce_sparse", "ce_sparse_sampled", "open_frac"):
        assert abs(results[0][key] - results[1][key]) < 1e-9, key


@pytest.fixture(scope="module")
def one_process(base):
    folder, flags = base
    run = alone(folder, *flags, "--out", "one")
    assert run.returncode == 0, run.stderr
    return folder / "one"


def test_two_ranks_stop_and_one_process_goes_on(base, one_process):
    """Steps 1 and 2 on two ranks, 3 and 4 in one process: the run of one process alone."""
    folder, flags = base
    run = together(folder, *flags, "--out", "two", "--sitting", "2")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step      1") == 1, "only rank 0 prints"
    assert told(folder / "two", 0) == told(folder / "two", 1), "lambda and tau are the same on all ranks"
    assert os.path.isdir(folder / "two" / "last")
    run = alone(folder, "--resume", "two")
    assert run.returncode == 0, run.stderr
    assert_same_training(one_process, folder / "two")


def test_one_process_stops_and_two_ranks_go_on(base, one_process):
    """And the reverse, with activations recomputed in the backward pass."""
    folder, flags = base
    run = alone(folder, *flags, "--out", "reverse", "--sitting", "2")
    assert run.returncode == 0, run.stderr
    run = together(folder, "--resume", "reverse", "--recompute")
    assert run.returncode == 0, run.stderr
    assert_same_training(one_process, folder / "reverse")
    best = Transformer.from_pretrained(str(folder / "reverse" / "last.pt"))
    assert best.config.sparse and best.lm_head.weight is best.wte.weight


def test_a_killed_rank_ends_the_run_and_leaves_a_checkpoint(base):
    folder, flags = base
    flags = [*flags, "--lora", "2", "--steps", "100000", "--out", "killed"]
    with open(folder / "output", "w") as output:
        run = subprocess.Popen(command(*flags), cwd=folder, env=ENV, stdout=output, stderr=output)
        try:
            log = folder / "killed" / "rank1.jsonl"
            deadline = time.time() + 60
            while not log.exists() or len(log.read_text().splitlines()) < 4:
                assert run.poll() is None and time.time() < deadline, (folder / "output").read_text()
                time.sleep(0.1)
            ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout
            began = time.time()
            os.kill(int(ranks.split()[-1]), signal.SIGKILL)
            assert run.wait(60) != 0 and time.time() - began < 60
        finally:
            run.kill()
    text = (folder / "output").read_text()
    assert "another one has failed; the last checkpoint is in killed" in text, text
    run = alone(folder, "--resume", "killed", "--sitting", "1")
    assert run.returncode == 0, run.stderr


def test_bad_input_is_one_line(base):
    folder, flags = base
    run = alone(folder, *flags, "--fsdp", "--out", "x")
    assert run.returncode == 2 and "start it as torchrun" in run.stderr and run.stderr.count("\n") == 1
    run = together(folder, *flags, "--batch-size", "3", "--out", "x")
    assert run.stderr.count("error: --batch-size 3 is over all ranks and must be a multiple") == 1, run.stderr
