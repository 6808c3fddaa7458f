"""python patching.py: what it writes, and what it says to bad input."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from model import Config, Transformer
from patching import Flags, around, edge_attribution, exact_edges, first_above, grid, interval, main
from plumbing.flags import parse

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOY = dict(block_size=11, vocab_size=13, n_layer=2, n_head=2, n_embd=16, causal=False, init_std=0.3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random dense and a sparse model of the toy's shape."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    dense = Transformer(Config(**TOY))
    dense.save_checkpoint(str(folder / "dense.pt"))
    sparse = Transformer(Config(**TOY, sparse=True, gate_bias=-0.1))
    sparse.load_state_dict(dense.state_dict())
    sparse.save_checkpoint(str(folder / "sparse.pt"))
    Transformer(Config(**TOY | dict(n_layer=1))).save_checkpoint(str(folder / "other.pt"))
    return folder


def run(pair, out, *flags):
    main(parse(Flags, ["--dense", str(pair / "dense.pt"), "--sparse", str(pair / "sparse.pt"), "--task",
                       "addition", "--threads", "1", "--out", str(out), *flags]))


def test_it_writes_results_edges_and_figures(pair, tmp_path):
    run(pair, tmp_path / "out", "--n", "12", "--per-decade", "3", "--force", "--ig-steps", "2")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("dense", "sparse"):
        r = results[name]
        assert r["n"] == 12 and r["edges"] == 46 and r["nodes"] == 6
        assert {"accuracy", "metric_clean", "metric_corrupt", "heads_for_0.9_per_sentence",
                "heads_for_0.9_global", "edges_for_0.9", "nodes_for_0.9", "edges_for_0.9_cumulative",
                "jaccard_of_two_draws", "explained_effect_on_other_prompts"} <= r.keys()
        curve = r["curves"]["edges"]
        assert curve["requested"][-1] == 46 and curve["explained_effect"][-1] == pytest.approx(1)
        at = curve["requested"].index(r["edges_for_0.9"])
        assert min(curve["explained_effect"][at:]) >= 0.9 and (not at or curve["explained_effect"][at - 1] < 0.9)
    assert sum(results["token_graph"].values()) == 2 * 2 * 11 * 11  # every pair is of one class
    rows = list(csv.DictReader(open(tmp_path / "out" / "edges.csv")))
    assert len(rows) == 46 and {"input", "m1"} <= {row["source"] for row in rows}
    for name in ("heads", "edges", "circuits", "attention", "circuit_heads", "tokens"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_the_empty_circuit_explains_nothing_whatever_the_batches(pair, tmp_path, ablation):
    curves = []
    for batch in ("1024", "40"):  # 12 or 3 prompts at a time
        run(pair, tmp_path / batch, "--n", "12", "--per-decade", "3", "--force", "--ablation", ablation, "--batch-tokens", batch)
        results = json.loads((tmp_path / batch / "results.json").read_text())
        curves.append([f for name in ("dense", "sparse")
                       for f in results[name]["curves"]["edges"]["explained_effect"]])
        assert curves[-1][0] == pytest.approx(0, abs=1e-5)  # one edge, which leads nowhere
    assert curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-3)  # float32 over a gap of only 0.006


def test_cpr_needs_a_thousand_edges(tmp_path):
    torch.manual_seed(0)
    for name in ("dense", "sparse"):
        Transformer(Config(**TOY | dict(n_layer=6, n_head=4), sparse=name == "sparse")).save_checkpoint(
            str(tmp_path / f"{name}.pt"))
    run(tmp_path, tmp_path / "out", "--n", "4", "--per-decade", "1", "--force", "--ig-steps", "0")
    for name in ("dense", "sparse"):
        r = json.loads((tmp_path / "out" / "results.json").read_text())[name]
        assert r["edges"] > 1000 and {"cpr", "cmd"} <= r.keys()


def test_a_model_of_nan_is_refused_even_with_force(pair, tmp_path):
    model = Transformer.from_pretrained(str(pair / "dense.pt"))
    torch.nn.init.constant_(model.ln_f.weight, float("nan"))
    model.save_checkpoint(str(tmp_path / "nan.pt"))
    with pytest.raises(ValueError, match="dense: the logit .* nan and nan: there is no effect"):
        run(pair, tmp_path / "out", "--n", "4", "--force", "--dense", str(tmp_path / "nan.pt"))


@pytest.mark.parametrize("flags, message", [
    (["--n", "12"], "right on 0% of the addition prompts, below 90%.*--force"),
    (["--n", "12", "--qkv", "both"], "--qkv must be one of split, merged"),
    (["--n", "10000000", "--force"], "addition|prompts"),
    (["--n", "12", "--task", "ioi", "--tokenizer", "gpt3"], "unknown tokenizer"),
    (["--n", "12", "--sparse", "dense"], "has no gates"),
    (["--n", "12", "--dense", "sparse"], "has gates: give the model before"),
    (["--n", "12", "--dense", "other"], "--dense has n_layer 1 and --sparse 2"),
    (["--n", "12", "--device", "abacus"], "--device abacus: this machine has none"),
    (["--n", "0"], "--n must be at least 1"),
])
def test_bad_input_is_one_clear_line(pair, tmp_path, flags, message):
    flags = [str(pair / f"{flag}.pt") if flag in ("dense", "sparse", "other") else flag for flag in flags]
    with pytest.raises(ValueError, match=message) as error:
        run(pair, tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_command_line_exits_with_2(pair):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "patching.py"), "--dense",
                           str(pair / "dense.pt")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--sparse" in done.stderr


def test_estimates_are_the_exact_effects_of_small_changes():
    """Prompts that differ by a small change of the embedding: to first order EAP is exact."""
    torch.manual_seed(0)
    model = Transformer(Config(**TOY | dict(vocab_size=14))).double().requires_grad_(False)
    model.wte.weight[13] = model.wte.weight[3] + 1e-4 * torch.randn(16)  # token 13 is nearly token 3
    clean = torch.randint(13, (4, 11))
    clean[:, 2] = 3
    corrupt = clean.clone()
    corrupt[:, 2] = 13
    metric = lambda logits: logits[:, -1, 1] - logits[:, -1, 2]
    scores, graph = edge_attribution(model, clean, corrupt, metric)
    exact = exact_edges(model, graph, clean, corrupt, metric)
    assert (scores - exact).abs().max() < 1e-3 * exact.abs().max() and exact.abs().max() > 0


def test_sizes_and_intervals():
    assert grid(100, 1) == [1, 10, 100] and grid(46, 20)[-1] == 46
    assert first_above([1, 10, 100], [0.95, 0.5, 1.0]) == 100  # from which it stays above
    assert first_above([1, 10, 100], [0.95, 0.92, 0.91]) == 1
    assert around([0, 1, 10, 100], [0, 0, 0.95, 1], points=2) == [2, 5]
    assert around([1, 10], [0.95, 1]) == [] and around([0, 1], [0, 1]) == []
    assert interval([1.0] * 50 + [3.0] * 50) == [1.0, 3.0]
