"""The toy: its data, what it reads off the gates, and a short run that learns."""

import json
import os
import subprocess
import sys

import torch

import addition_toy as toy
from model import Config, Transformer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def decode(ids):
    return "".join(toy.CHARACTERS[i] for i in ids)


def tiny(**more):
    torch.manual_seed(0)
    return Transformer(Config(block_size=11, vocab_size=13, n_layer=2, n_head=2, n_embd=16, causal=False,
                              sparse=True, gate_bias=0.0, init_std=0.5, **more))


def test_every_problem_is_there_once_with_its_answer():
    idx, targets = toy.problems()
    assert idx.shape == targets.shape == (10000, 11)
    seen = set()
    for ids, target in zip(idx.tolist(), targets.tolist()):
        text = decode(ids)
        x, y = int(text[:2]), int(text[3:5])
        assert text == f"{x:02}+{y:02}=?????" and target[:6] == [-1] * 6
        assert int(decode(target[6:])) == x + y
        seen.add((x, y))
    assert len(seen) == 10000
    assert decode(idx[3628]) == "36+28=?????" and decode(targets[3628, 6:]) == "00064"


def test_the_held_out_thousand_never_change():
    mask = toy.held_out()
    assert mask.sum() == 1000 and torch.equal(mask, toy.held_out())
    train = (~mask).nonzero().flatten()
    drawn = torch.cat([toy.batch(step, seed, 500, train) for step in range(20) for seed in (0, 3)])
    assert not mask[drawn].any()
    assert torch.equal(toy.batch(4, 0, 9, train), toy.batch(4, 0, 9, train))
    assert not torch.equal(toy.batch(4, 0, 9, train), toy.batch(5, 0, 9, train))


def test_carries():
    carry = toy.carries()
    for problem, want in ((5321, [False, False]), (3628, [True, False]), (4359, [True, True]),
                          (9111, [False, True]), (9901, [True, True])):
        assert carry[problem].tolist() == want
    assert carry.sum(0).tolist() == [4500, 4950]


def test_open_gates_are_the_ones_the_model_used():
    model, idx = tiny(), toy.problems()[0][::997]
    gates = toy.evaluate(model, idx, idx)[2]
    assert gates.shape == (len(idx), 2, 2, 11, 11)
    share = model(idx)[2].open
    torch.testing.assert_close(gates.double().mean((0, 3, 4)).float(), share)
    assert 0 < share.mean() < 1


def test_exact_needs_every_digit():
    idx, targets = (t[:50] for t in toy.problems())
    model = tiny()
    exact, ce, gates = toy.evaluate(model, idx, targets)
    assert not exact.any() and ce > 1 and gates.shape == (50, 2, 2, 11, 11)
    guesses = model(idx)[0].argmax(-1)
    assert toy.evaluate(model, idx, torch.where(targets == -1, -1, guesses))[0].all()
    guesses[7, 10] = (guesses[7, 10] + 1) % 13
    exact = toy.evaluate(model, idx, torch.where(targets == -1, -1, guesses))[0]
    assert not exact[7] and exact.sum() == 49


def test_shut_edges_have_no_weight_and_dense_rows_sum_to_one():
    model, idx = tiny(), toy.problems()[0][::997]
    weights, gates = toy.edge_weights(model, idx), toy.evaluate(model, idx, idx)[2]
    assert torch.equal(weights > 0, gates.any(2))
    one_head = Transformer(Config(block_size=11, vocab_size=13, n_layer=2, n_head=1, n_embd=16, causal=False))
    rows = toy.edge_weights(one_head, idx).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_words_and_table_of_a_circuit_made_by_hand():
    """Layer 0: units read both units. Layer 1: tens read the units when there is a carry."""
    gates = torch.zeros(10000, 2, 1, 11, 11, dtype=torch.bool)
    gates[:, 0, 0, toy.UNITS, [1, 4]] = True
    gates[toy.carries()[:, 0], 1, 0, toy.TENS, toy.UNITS] = True
    gates[:, 1, 0, toy.HUNDREDS, toy.HUNDREDS] = True  # reading oneself is not reading a carry
    assert toy.describe(gates) == [
        "layer 0: units reads y units 100.0%, x units 100.0%",
        "layer 1: hundreds reads hundreds 100.0%",
        "layer 1: tens reads units 45.0%",
    ]
    gates[:, 1, 0, toy.TENS, 6] = torch.arange(10000) % 100 < 10  # a detour, in a tenth
    table = toy.carry_table(gates)
    assert list(table) == [
        "tens <- units", "tens <- units, own sum < 10", "tens <- units, own sum >= 10",
        "tens <- answer 1", "tens <- answer 1, own sum < 10", "tens <- answer 1, own sum >= 10",
        "hundreds <- units", "hundreds <- tens"]
    assert table["tens <- units"] == {"carry": {"reads": 4500, "does_not": 0},
                                      "no_carry": {"reads": 0, "does_not": 5500}}
    assert table["tens <- units, own sum >= 10"]["carry"] == {"reads": 2025, "does_not": 0}
    assert table["tens <- units, own sum < 10"]["no_carry"] == {"reads": 0, "does_not": 3025}
    assert table["hundreds <- tens"]["carry"] == {"reads": 0, "does_not": 4950}
    assert table["hundreds <- units"]["carry"] == {"reads": 0, "does_not": 4500}
    assert sum(table["tens <- answer 1"][c]["reads"] for c in ("carry", "no_carry")) == 1000


def test_a_short_run_learns_and_writes_everything(tmp_path):
    """Half a minute: dense training learns to add, post-training shuts most edges."""
    command = f"addition_toy.py --dense-steps 900 --tries 1 --steps 600 --loose 0.3 --threads 1 --out {tmp_path}"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, capture_output=True)
    results = json.load(open(tmp_path / "results.json"))
    assert results["dense_exact"] > 0.9
    assert results["exact"] > 0.2  # far from done; guessing gives 0.01
    assert results["mean_open_edges"] < 40 < results["allowed_edges"] == 242
    for name in ("circuits.png", "training.png", "log.jsonl", "dense.pt", "sparse.pt"):
        assert os.path.getsize(tmp_path / name) > 1000
    model = Transformer.from_pretrained(str(tmp_path / "sparse.pt"))
    exact, _, gates = toy.evaluate(model, *toy.problems())
    assert exact.double().mean().item() == results["exact"]
    assert toy.mean_edges(gates) == results["mean_open_edges"]
