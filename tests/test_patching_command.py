"""python patching.py: what it writes, and what it says to bad input."""

import csv
import json
import os
import runpy
import sys

import pytest
import torch

from model import Config, Transformer
from patching import Flags, edge_attribution, exact_edges, main
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
                       "addition", "--out", str(out), *flags]))


def test_it_writes_results_edges_and_figures(pair, tmp_path, capsys):
    run(pair, tmp_path / "out", "--n", "12", "--per-decade", "3", "--force", "--ranking", "eap-ig")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("dense", "sparse"):
        r = results[name]
        assert r["n"] == 12 and r["edges"] == 46 and r["nodes"] == 6
        assert set(r) == {
            "n", "accuracy", "metric_clean", "metric_corrupt", "edges", "nodes", "curves", "classes",
            "rankings", "heads_for_0.9_per_sentence", "heads_for_0.9_global", "sentences_left_out_of_quartiles",
            "edges_for_0.9", "edges_for_0.9_after_pruning", "heads_in_circuit", "mlps_in_circuit",
            "nodes_for_0.9", "accuracy_on_other_prompts", "explained_effect_on_other_prompts",
            "edges_for_0.9_cumulative", "edges_for_0.9_cumulative_mean_of_curves", "jaccard_of_two_draws",
            "edges_for_0.9_interval", "edges_for_0.9_cumulative_mean_of_curves_interval"}
        counts = {way: sum(found.values()) for way, found in r["classes"].items()}
        assert counts == {"all": 46, "score": r["edges_for_0.9_cumulative"], "effect": r["edges_for_0.9_after_pruning"]}
        assert r["curves"].keys() == {"heads_per_sentence", "heads_global", "edges"}
        curve = r["curves"]["edges"]
        assert curve["requested"][-1] == 46 and curve["explained_effect"][-1] == pytest.approx(1, abs=1e-5)
        at = curve["requested"].index(r["edges_for_0.9"])
        assert min(curve["explained_effect"][at:]) >= 0.9 and (not at or curve["explained_effect"][at - 1] < 0.9)
    assert results.keys() >= {"task", "about", "tokens", "prompts_made", "flags", "ratio", "interval"}
    assert results["ratio"].keys() == {key for key in r if "_for_0.9" in key and "interval" not in key}
    assert results["interval"].keys() == {"edges_for_0.9", "edges_for_0.9_cumulative_mean_of_curves"}
    assert results["token_graph"].keys() == {"open in both", "closes", "opens", "shut in both"}
    assert sum(results["token_graph"].values()) == 2 * 2 * 11 * 11  # every pair is of one class
    rows = list(csv.DictReader(open(tmp_path / "out" / "edges.csv")))
    assert len(rows) == 46 and {"input", "m1"} <= {row["source"] for row in rows}
    assert sum(float(row[name]) != 0 for row in rows for name in ("dense", "sparse")) > 46
    for name in ("heads", "edges", "circuits", "attention", "circuit_heads", "tokens"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    html = (tmp_path / "out" / "circuit.html").read_text()
    edges = json.loads(html.split('id="data">')[1].split("</script")[0])["models"]["sparse"]["edges"]
    assert len(edges) == results["token_graph"]["open in both"] + results["token_graph"]["closes"] > 0
    printed = capsys.readouterr().out
    assert "edges_for_0.9_cumulative" in printed and "0.9 by score, head to MLP" in printed and "dense: accuracy 0.0%" in printed


def test_a_model_of_nan_is_refused_even_with_force(pair, tmp_path):
    model = Transformer.from_pretrained(str(pair / "dense.pt"))
    torch.nn.init.constant_(model.ln_f.weight, float("nan"))
    model.save_checkpoint(str(tmp_path / "nan.pt"))
    with pytest.raises(ValueError, match="dense: the logit .* nan and nan: there is no effect"):
        run(pair, tmp_path / "out", "--n", "4", "--force", "--dense", str(tmp_path / "nan.pt"))


@pytest.mark.parametrize("flags, message", [
    (["--n", "12"], "right on 0% of the addition prompts, below 90%.*--force"),
    (["--n", "12", "--qkv", "both"], "--qkv must be one of split, merged"),
    (["--n", "12", "--ablation", "half"], "--ablation must be one of resample, mean, zero"),
    (["--n", "12", "--task", "chess"], "--task must be one of ioi, greater-than, induction, bracket, addition"),
    (["--n", "12", "--ranking", "best"], "--ranking must be one of exact, rerun, eap-ig, eap"),
    (["--n", "10000000", "--force"], "addition has 10000 problems, not 10000000"),
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


def test_without_a_demo_run_it_says_what_to_run_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["patching.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(os.path.join(ROOT, "patching.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "run `python train.py` first" in error


COPYING = dict(block_size=48, vocab_size=257, n_layer=2, n_head=2, n_embd=16, position="rope", init_std=0.3)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Random models where train.py would leave those of its demo."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dense = Transformer(Config(**COPYING))
    sparse = Transformer(Config(**COPYING, sparse=True, gate_bias=0.5))
    sparse.load_state_dict(dense.state_dict())
    for folder, name, model in (("dense", "last", dense), ("control", "last", dense), ("", "best", sparse)):
        os.makedirs(os.path.join("out/scratch", folder), exist_ok=True)
        model.save_checkpoint(os.path.join("out/scratch", folder, f"{name}.pt"))


def test_without_flags_it_opens_the_demo(demo, capsys):
    main(parse(Flags, ["--n", "8", "--force", "--per-decade", "3"]))
    results = json.load(open("out/patching-induction/results.json"))
    assert results["control"] == results["dense"] and results["ratio_control"] == results["ratio"]
    assert results["copying"].keys() == {"story", "surgery"}
    assert results["copying"]["surgery"].keys() == {"dense", "control", "sparse"}
    story = results["copying"]["story"]
    assert sum(map(sum, story["table"])) == pytest.approx(32 * 33 / 2)
    assert 0 < story["induction_right"] < 1 and set(story["heads"]) == {"previous token", "induction"}
    for name in ("dense", "sparse"):
        ranked = results[name]["rankings"]
        assert ranked.keys() == {"exact", "rerun", "eap-ig", "eap"} and ranked["exact"]["spearman"] == pytest.approx(1)
        assert 0 < ranked["eap"]["spearman"] < 1 and 1 <= ranked["eap"]["edges_for_0.9"] <= 46
    printed = capsys.readouterr().out
    assert "What the gates of the sparse model say" in printed and "edges_for_0.9 by eap-ig" in printed
    assert open("out/patching-induction/copying.png", "rb").read(4) == b"\x89PNG"


def test_a_model_that_can_not_copy_is_refused(demo):
    with pytest.raises(ValueError, match="dense: right on 0% of the induction prompts, below 50%"):
        main(parse(Flags, ["--n", "8"]))


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
