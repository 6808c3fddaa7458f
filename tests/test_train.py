"""train.py: what a run does to the weights, to lambda and to its numbers, and input that is wrong."""

import json
import math
import os
import signal
import sys
from functools import partial

import pytest
import torch

import train
from geco import GECO
from model import Transformer
from plumbing import figures, flags, tokens

SMALL = ["--batch-size", "4", "--context", "32", "--eval-every", "10", "--data", "python-docs"]
NO_AUTOCAST = partial(torch.autocast, "cpu", enabled=False)
TINY = ["--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--dense-steps", "4"]


def command(*argv, draw=False):
    """A run of train.py in this process, as from the command line, with short evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EVAL_SEQUENCES", 8)
        if not draw:  # pictures take longer than the steps
            patch.setattr(figures, "draw_training", lambda *_: None)
        before = signal.getsignal(signal.SIGINT)
        try:
            train.main(flags.parse(train.Flags, list(map(str, argv))))
        finally:
            signal.signal(signal.SIGINT, before)  # a run that failed keeps its frame, and its handler


def log_of(folder, key=None):
    """The records of log.jsonl, those that have the key, without what a clock wrote."""
    records = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))][1:]
    for record in records:
        record.pop("tokens_per_second", None)
    return [record for record in records if key is None or key in record]


def results_of(folder):
    with open(os.path.join(folder, "results.json")) as f:
        return json.load(f)


def last_of(folder):
    return torch.load(os.path.join(folder, "last.pt"), weights_only=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny dense byte model, a few steps old, as train.py makes it from scratch."""
    folder = tmp_path_factory.mktemp("base")
    command(*SMALL, "--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--dense-steps", 40, "--steps",
            1,
            "--no-sparse", "--out", folder)
    return str(folder / "dense" / "last.pt")


@pytest.fixture
def float64():
    """AdamW divides the rounding noise of gradients that are truly zero by itself: compare in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -----------------------------------------------------------------------------
# whole runs


def test_with_no_init_it_trains_a_base_and_then_shuts_edges(tmp_path, capsys):
    command(*SMALL, "--eval-every", 60, "--n-layer", 2, "--n-head", 2, "--n-embd", 32,
            "--dense-steps", 60,
            "--steps", 60, "--lr", "5e-3", "--slack", 0.5, "--gate-bias", 2, "--out", tmp_path, draw=True)
    printed = capsys.readouterr().out
    assert "ln(257) = 5.5491" in printed and "tau = " in printed and "open edges" in printed
    results = results_of(tmp_path)
    for key in ("command", "commit", "torch", "device", "seconds", "ce_dense", "ce_sparse", "tau",
                "ce_sparse_sampled", "open_frac", "open_edges_per_query", "context_length", "tokens",
                "tokens_per_second"):
        assert key in results
    assert results["ce_dense"] < 4 and results["tokens"] == 60 * 4 * 32
    control, base = results_of(tmp_path / "control"), results_of(tmp_path / "dense")
    assert results["ce_dense_control"] == control["ce"] and control["ce_dense"] == base["ce"] == results["ce_dense"]
    assert results["tau"] == pytest.approx(0.5 + control["ce_val"])
    assert control["trace"] == [[0, last_of(tmp_path)["dense"]["val"]], [60, control["ce_val"]]]
    for key, of in (("copying_dense", base), ("copying_dense_control", control)):
        assert results[key] == of["copying"] and set(results[key]) == {"8", "12", "16"}
    assert set(results["copying_sparse"]) == {"8", "12", "16"} and "copying, % by period: 8 " in printed
    assert abs(results["open_edges_per_query"] - results["open_frac"] * 16.5) < 1e-9
    assert max(line["lr"] for line in log_of(tmp_path / "dense", "lr")) == train.DENSE_LR
    steps = log_of(tmp_path, "open")
    assert steps[-1]["open"] < 0.8 * steps[0]["open"] and results["open_frac_last"] < 0.9
    for name in ("ce_open.png", "heads.png", "lambda.png"):
        assert os.path.getsize(tmp_path / name) > 2000
    last = Transformer.from_pretrained(str(tmp_path / "last.pt"))
    assert last.config.sparse and last.config.gate_bias == 2.0
    dense = Transformer.from_pretrained(str(tmp_path / "dense"))
    assert not dense.config.sparse


def test_the_axis_of_open_edges_has_plain_numbers(tmp_path, monkeypatch):
    """0.6, not 6e-01: a percentage to read."""
    labels = {}

    def keep(figure, path):
        figure.canvas.draw()
        axes = [axis for both in figure.axes for axis in (both.xaxis, both.yaxis)]
        labels[os.path.basename(path)] = [t.get_text() for axis in axes for minor in (False, True)
                                          for t in axis.get_ticklabels(minor=minor)]

    monkeypatch.setattr(figures, "save_figure", keep)
    trace = [{"step": n, "ce": 2.0 - n, "open": share, "lambda": 0.05 * (n + 1), "heads": [[share]]}
             for n, share in enumerate((0.007, 0.004))]
    figures.draw_training(str(tmp_path), trace, None, "ce", 1.2, 2.0, None, 32)
    for name in ("ce_open.png", "lambda.png"):
        assert {"0.4", "0.6"} <= set(labels[name]) and not any("e" in text for text in labels[name]), labels[name]


def test_few_gates_begin_open_from_scratch_and_most_in_a_trained_model(tmp_path, base):
    """The bias of a sparse init, and one that is asked for, stay as they are."""
    bias = lambda **given: train.starting_point(train.Flags(**given))[0].gate_bias
    last = lambda **given: train.phases(train.Flags(out=str(tmp_path), **given))[-1].gate_bias
    assert last() == -8 and last(gate_bias=0.0) == 0 and train.Flags(init=base).gate_bias is None
    assert bias(init=base) == 2 and bias(init=base, gate_bias=-1.0) == -1 and bias(init=base, sparse=False) == 0


def test_base_and_sparse_phase_do_not_see_the_same_first_batches(tmp_path, monkeypatch):
    seen = []

    class Watched(tokens.Blocks):
        def batch(self, start, n):
            rows = super().batch(start, n)[0]
            seen.append((self.seed, {tuple(row) for row in rows.tolist()}))
            return rows, rows

    monkeypatch.setattr(tokens, "Blocks", Watched)
    command(*SMALL, *TINY, "--steps", 4, "--out", tmp_path / "sparse")
    command(*SMALL, *TINY, "--steps", 4, "--no-sparse", "--out", tmp_path / "dense")
    assert len({order for order, _ in seen}) == 2
    base, later = (set().union(*(rows for order, rows in seen if order == one))
                   for one in (seen[0][0], seen[-1][0]))
    assert len(base) == 16 and not base & later
    of_run = [rows for order, rows in seen if order == seen[-1][0]]
    assert of_run[:4] == of_run[4:8] == of_run[8:], "the control, the sparse run, a dense one"


def test_best_is_the_sparsest_state_within_the_bound(base, tmp_path, monkeypatch):
    """The evaluations are made up: (CE, share of open edges) at the start and of steps 1 to 4."""
    script = iter([(2, 0.9), (2, 0.5), (9, 0.1), (4, 0.3), (2, 0.4), (2, 0.4), (4, 0.3)])
    states, real = [], train.evaluate

    def made_up(model, blocks, *rest, sampled=False, **more):
        found = real(model, blocks, *rest, sampled=sampled, **more)
        if "open" in found and not sampled:
            found |= dict(zip(("ce", "open"), next(script)))
            states.append({name: t.clone() for name, t in model.state_dict().items()})
        return found

    monkeypatch.setattr(train, "evaluate", made_up)
    command(*SMALL, "--init", base, "--steps", 4, "--eval-every", 1, "--tau", 4, "--out", tmp_path)
    assert next(script, None) is None
    best, results = torch.load(tmp_path / "best.pt", weights_only=True), results_of(tmp_path)
    assert best["step"] == results["best_step"] == 3 and results["open_frac"] == 0.3
    assert all(torch.equal(best["model"][name], t) for name, t in states[3].items()), "the state of step 3"
    assert all(torch.equal(states[6][name], t) for name, t in states[3].items()), "it is reported"
    assert all(torch.equal(states[5][name], t) for name, t in last_of(tmp_path)["model"].items())


def test_the_results_are_those_of_the_files_on_test_text(base, tmp_path):
    command(*SMALL, "--init", base, "--steps", 12, "--lr", "5e-3", "--slack", 1, "--eval-every", 8,
            "--out", tmp_path)
    results, blocks = results_of(tmp_path), tokens.load_data("python-docs", "bytes")["test"]
    blocks = tokens.Blocks(blocks, 32).evenly(8)
    measure = lambda name: train.evaluate(Transformer.from_pretrained(str(name)), blocks, 8,
                                          NO_AUTOCAST)
    best, last = measure(tmp_path), measure(tmp_path / "last.pt")
    for key, found in (("ce_dense", measure(base)["ce"]), ("ce_sparse", best["ce"]),
                       ("ce_last", last["ce"]),
                       ("open_frac", best["open"]), ("open_frac_last", last["open"])):
        assert results[key] == pytest.approx(found, rel=1e-5), key
    assert torch.tensor(results["heads"]).allclose(torch.tensor(best["heads"]), rtol=1e-4)


def test_a_text_that_repeats_is_learned(base, tmp_path, monkeypatch):
    """The optimiser works: from ln(257) nats to next to nothing, in the base and in the control."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("0123456789" * 400)
    command(*SMALL, "--data", "a.txt", *TINY, "--n-embd", 32, "--dense-steps", 80, "--steps", 60,
            "--lr", "5e-3", "--repeat", 0, "--no-sparse", "--out", "o")
    losses = [r["ce"] for r in log_of(tmp_path / "o" / "dense", "lr") + log_of(tmp_path / "o", "lr")]
    assert losses[0] > 5 and losses[80] < 2 and losses[-1] < 0.5


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    f = train.Flags(steps=1000, lr=2.0)
    rates = [train.learning_rate(step, f) for step in range(1001)]
    assert rates[0] == 0.02 and rates[99] == rates[100] == max(rates) == 2.0
    assert abs(rates[1000] - 0.2) < 1e-9 and abs(rates[550] - 1.1) < 1e-9
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert train.learning_rate(0, train.Flags(steps=1, lr=2.0)) == 2.0


def test_gradient_accumulation_is_a_larger_batch(base, tmp_path, float64):
    """One step of 2 x 4 sequences and of 1 x 8: the same losses, gradient norm and weights."""
    for batch_size, accumulate in ((8, 1), (4, 2)):
        command(*SMALL, "--init", base, "--batch-size", batch_size, "--accumulate", accumulate,
                "--steps", 1,
                "--out", tmp_path / str(accumulate))
    one, two = (last_of(tmp_path / x)["model"] for x in "12")
    first = Transformer.from_pretrained(base).state_dict()
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-9 < (one[name] - first[name]).abs().max(), name
    one, two = (log_of(tmp_path / x, "norm")[0] for x in "12")
    for name in ("ce", "norm", "open"):
        assert abs(one[name] - two[name]) < 1e-9 and one[name] > 0


def test_evaluation_changes_nothing(base, tmp_path):
    """Evaluated every 3 steps or once: the same weights, moments, lambda and lines of the log."""
    for every in (3, 100):
        command(*SMALL, "--init", base, "--steps", 9, "--eval-every", every, "--out",
                tmp_path / str(every))
    often, once = (last_of(tmp_path / x) for x in ("3", "100"))
    for name in often["model"]:
        assert torch.equal(often["model"][name], once["model"][name])
    for i, slots in often["optimizer"]["state"].items():
        assert all(torch.equal(x, once["optimizer"]["state"][i][name]) for name,
                   x in slots.items())
    assert often["geco"] == once["geco"]
    assert log_of(tmp_path / "3", "norm") == log_of(tmp_path / "100", "norm")
    assert len(log_of(tmp_path / "3", "val_ce")) == 3 and len(log_of(tmp_path / "100", "val_ce")) == 1


def test_an_evaluation_is_the_mean_over_its_blocks(base):
    """Whatever the batch size, also one that does not divide their number; sampled gates too."""
    model = Transformer.from_pretrained(base, sparse=True, gate_bias=1.0)
    idx, targets = tokens.Blocks(tokens.load_data("python-docs", "bytes")["val"], 32).evenly(7)
    targets[2, :30] = targets[4, 5:] = -1  # a mean over the targets that count
    blocks = idx, targets
    for sampled in (False, True):
        found = [train.evaluate(model, blocks, size, NO_AUTOCAST,
                                teacher=model, sampled=sampled) for size in (1, 3, 7)]
        for key in ("ce", "kl", "open"):
            assert found[0][key] == pytest.approx(found[1][key]) == pytest.approx(found[2][key])
        if not sampled:
            assert found[0]["ce"] == pytest.approx(model(idx, targets)[1].item())
        assert torch.tensor(found[0]["heads"]).shape == (2, 2)
        assert sum(map(sum, found[0]["heads"])) / 4 == pytest.approx(found[0]["open"])


# -----------------------------------------------------------------------------
# the bound and the multiplier


@pytest.mark.parametrize("bound", ["ce", "kl"])
def test_the_multiplier_sees_on_held_out_text_what_the_loss_weighs(bound, base, tmp_path):
    """CE or KL(dense model, sparse model) of a held-out batch through deterministic gates, after the step."""
    with pytest.raises(SystemExit):
        command(*SMALL, "--init", base, "--bound", bound, "--steps", 9, "--lr", "1e-2",
                "--sitting", 1,
                "--out", tmp_path)
    saved = last_of(tmp_path)
    dense, model = Transformer.from_pretrained(base), Transformer.from_pretrained(str(tmp_path / "last.pt"))
    held_out = tokens.Blocks(tokens.load_data("python-docs", "bytes")["val"], 32).evenly(8)  # as for tau
    idx, targets = (x[:4] for x in held_out)
    with torch.no_grad():
        logits, ce, _ = model(idx, targets)
        p, q = dense(idx)[0].log_softmax(-1), logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert kl > 0.001
    assert saved["geco"]["c"] == pytest.approx((ce if bound == "ce" else kl).item(), rel=1e-4)

    command("--resume", tmp_path)  # and lambda follows from what was seen, every fourth step
    tau = results_of(tmp_path)["tau"]
    assert tau == pytest.approx(train.Flags.slack + (saved["dense"]["val"] if bound == "ce" else 0))
    geco = GECO(tau, nu=0.04)
    lines = log_of(tmp_path, "lambda")
    for n, line in enumerate(lines):
        geco.tau = tau - train.Flags.slack * (1 - train.LOOSE ** min(1, (0.7 - n / 9) / 0.6 if n / 9 < 0.7 else 0))
        if n % train.LOOK_EVERY == 0:
            geco.ema = 0.0
            geco.update(line["held_out"])
        assert (line["held_out"], line["lambda"]) == (geco.c, pytest.approx(geco.lam))
    assert len({line["held_out"] for line in lines}) == 3


def test_the_bound_is_on_text_without_copies(base, tmp_path):
    """Whatever --repeat puts into the training text; at copies a sparse model makes up for what text loses."""
    command(*SMALL, "--init", base, "--steps", 1, "--repeat", 1, "--out", tmp_path)
    idx, targets = tokens.Blocks(tokens.load_data("python-docs", "bytes")["val"], 32).evenly(8)
    with torch.no_grad():
        ce = Transformer.from_pretrained(base)(idx, targets)[1].item()
    assert last_of(tmp_path)["dense"]["val"] == pytest.approx(ce, rel=1e-5)


@pytest.mark.parametrize("more", [[], ["--lora", 2]])
def test_the_divergence_is_from_the_dense_model_that_it_began_as(more, base, tmp_path):
    """Without its adapters, and not trained: nearly 0 with gates wide open, and then a real divergence."""
    command(*SMALL, "--init", base, "--bound", "kl", "--gate-bias", 30, "--steps", 1, *more,
            "--out", tmp_path / "open")
    trace = last_of(tmp_path / "open")["trace"]
    assert trace[0]["open"] == 1 and abs(trace[0]["kl"]) < 1e-6
    out = tmp_path / "out"
    command(*SMALL, "--init", base, "--bound", "kl", "--steps", 10, "--lr", 0.2, "--tau", 99,
            *more, "--out", out)
    dense = Transformer.from_pretrained(base)
    model = (Transformer.from_pretrained(base, str(out / "adapter.safetensors")) if more
             else Transformer.from_pretrained(str(out / "best.pt")))
    idx, _ = tokens.Blocks(tokens.load_data("python-docs", "bytes")["test"], 32).evenly(8)
    with torch.no_grad():
        p, q = dense(idx)[0].log_softmax(-1), model(idx)[0].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl > 0.01 and results_of(out)["kl_sparse"] == pytest.approx(kl, rel=1e-3)


def test_the_accuracy_on_the_tasks_is_measured_before_and_at_every_evaluation(base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train.tasks, "accuracies", lambda model, asked, amp: (
        seen.append(model.config.sparse), {"ioi": len(seen) / 8})[1])
    for kind in ("--sparse", "--no-sparse"):
        seen.clear()
        command(*SMALL, "--init", base, "--steps", 20, kind, "--out", tmp_path / kind)
        results, sparse = results_of(tmp_path / kind), kind == "--sparse"
        assert seen == [False, sparse, sparse, sparse] and results["accuracy_dense"] == {"ioi": 0.125}
        assert results["accuracy"] == [[0, {"ioi": 0.25}], [10, {"ioi": 0.375}], [20, {"ioi": 0.5}]]
        lines = log_of(tmp_path / kind, "val_accuracy")
        assert [line["val_accuracy"] for line in lines] == [{"ioi": 0.375}, {"ioi": 0.5}]


def test_the_dense_control_needs_no_second_model(base, tmp_path, monkeypatch):
    build, built = train.build, []
    monkeypatch.setattr(train, "build", lambda *how: built.append(build(*how)) or built[-1])
    command(*SMALL, "--init", base, "--bound", "kl", "--no-sparse", "--steps", 2, "--out", tmp_path)
    assert len(built) == 1 and "kl" not in last_of(tmp_path)["trace"][-1]


def test_without_repeats_nobody_asks_which_tokens_can_be_copied(base, tmp_path, monkeypatch):
    """Because it takes the tokenizer, which a machine without a network may not have."""
    monkeypatch.setattr(train.tasks, "usable", None)
    command(*SMALL, "--init", base, "--steps", 1, "--out", tmp_path)


@pytest.mark.parametrize("tau", [1e-9, 1e9])
@pytest.mark.parametrize("bound, lam_max", [("ce", 0.5), ("kl", 0.5), ("kl", 5.0)])
def test_a_bound_that_is_far_off_never_errs(tau, bound, lam_max, base, tmp_path):
    """lambda stays within its limits and goes the right way, whether no state is within the bound or each."""
    command(*SMALL, "--init", base, "--bound", bound, "--tau", tau, "--lam-max", lam_max, "--steps", 9,
            "--eval-every", 5, "--lr", "1e-2", "--out", tmp_path)
    geco, lambdas = GECO(tau, lam=lam_max, lam_max=lam_max), [line["lambda"] for line in log_of(tmp_path, "lambda")]
    low, high = math.exp(geco.log_min - geco.kp), math.exp(geco.log_max + geco.kp)
    assert all(low <= x <= high * (1 + 1e-9) for x in lambdas)
    assert lambdas[-1] > lam_max if tau < 1 else lambdas[-1] < 0.4 * lam_max
    assert (last_of(tmp_path)["geco"]["h"] < geco.log_max) == (tau > 1)  # it starts at its limit
    results = results_of(tmp_path)
    assert results["tau"] == tau and (results["best_step"] is None) == (tau < 1)


def test_a_sparse_init_needs_a_bound_of_its_own(base, tmp_path):
    """The loss of its weights without gates means nothing: --tau says what to keep."""
    sparse = str(tmp_path / "sparse.pt")
    model = Transformer.from_pretrained(base, sparse=True, gate_bias=1.5)
    model.save_checkpoint(sparse)
    for more in ([], ["--bound", "kl", "--tau", 0.1]):
        with pytest.raises(ValueError, match="is sparse already.*--tau, of --bound ce"):
            command(*SMALL, "--init", sparse, *more, "--steps", 1, "--out", tmp_path / "x")
    command(*SMALL, "--init", sparse, "--tau", 4, "--steps", 1, "--out", tmp_path / "on")
    assert results_of(tmp_path / "on")["tau"] == 4 and last_of(tmp_path / "on")["config"]["gate_bias"] == 1.5


def test_a_loss_that_is_not_finite_stops_the_run(base, tmp_path):
    """One line that says what to do, and no state that it spoiled is saved."""
    for n, more in enumerate((["--no-sparse"], [], ["--eval-every", 1],
                              ["--no-sparse", "--eval-every", 1])):
        out = tmp_path / str(n)
        with pytest.raises(ValueError, match=r"step \d+: the .*(nan|inf).*" + f"{out}.*lower --lr") as error:
            command(*SMALL, "--init", base, "--steps", 50, "--lr", "1e30", *more, "--out", out)
        assert "\n" not in str(error.value)
        model = Transformer.from_pretrained(str(out / "last.pt"))
        assert all(p.abs().max() < 100 for p in model.parameters())


# -----------------------------------------------------------------------------
# input that is wrong


def error_of(argv, capsys, monkeypatch):
    """What train.py wrote to stderr before it ended with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        flags.run(train.main, train.Flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lr", "abc"], "--lr: invalid float value"),
        (["--init", "gpt5"], "no file or folder here and no hub name"),
        (["--init", "BASE", "--context", "64"], "64 tokens do not fit the model's context of 32"),
        (["--init", "BASE", "--tokenizer", "klingon"], "unknown tokenizer 'klingon'"),
        (["--init", "BASE", "--data", "nowhere.txt"], "'nowhere.txt'"),
        (["--init", "BASE", "--device", "tpu"], "--device must be"),
        (["--init", "BASE", "--out", "/proc/nowhere"], "output folder"),
        (["--init", "BASE", "--tau", "-1"], "--tau must be positive"),
        (["--init", "BASE", "--tau", "0"], "--tau must be positive"),
        (["--init", "BASE", "--lr", "0"], "--lr must be positive"),
        (["--init", "BASE", "--bound", "l2"], "--bound must be one of ce, kl"),
        (["--init", "BASE", "--bound", "kl", "--slack", "0"],
         "--bound kl needs a --slack above 0"),
        (["--init", "BASE", "--gate-bias", "nan"], "--gate-bias must be finite"),
        (["--init", "BASE", "--sitting", "0"], "--sitting must be at least 1"),
        (["--init", "BASE", "--control", "nowhere"], "--control nowhere: no results.json"),
        (["--init", "BASE", "--lora", "2", "--adapter", "a", "--no-sparse"], "--adapter with --lora trains gates on"),
        (["--init", "BASE", "--adapter", "nowhere"], "nowhere"),
        (["--init", "BASE", "--seed", str(2**62)], "--seed must be below 2^62"),
        (["--lora", "2"], "--lora needs a trained --init"),
        (["--adapter", "a.safetensors"], "--adapter needs the --init that it was trained on"),
        (["--dry-run"], "--dry-run needs an --init"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--repeat", "1.5"], "--repeat must be from 0 to 1, got 1.5"),
        (["--repeat", "nan"], "--repeat must be from 0 to 1, got nan"),
        (["--noisy", "1.5"], "--noisy must be from 0 to 1, got 1.5"),
        (["--lam-max", "0.001"], "--lam-max must be at least 0.01, got 0.001"),
        (["--lam-max", "nan"], "--lam-max must be at least 0.01, got nan"),
        (["--context", "12"], "does not come twice in a context of 12: give --context 16 or more, or --repeat 0"),
        (["--position", "alibi"], "--position must be one of rope, learned"),
        (["--n-head", "3"], "n_embd 128 must be a multiple of n_head 3"),
        (["--resume", "nowhere"], "no last.pt"),
    ],
)
def test_bad_input_is_one_line_and_code_2(argv, message, base, tmp_path, capsys, monkeypatch):
    argv = [base if a == "BASE" else a for a in argv]
    out = [] if "--out" in argv or "--resume" in argv else ["--out", tmp_path / "out"]
    data = [] if "--data" in argv else ["--data", "python-docs"]
    err = error_of([*argv, *out, *data], capsys, monkeypatch)
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda(base, tmp_path):
    with pytest.raises(ValueError, match="--device cuda: this machine has none"):
        command(*SMALL, "--init", base, "--device", "cuda", "--out", tmp_path)


def test_tokens_of_another_tokenizer_are_refused(base, tmp_path, monkeypatch):
    """A prepared folder says whose ids it holds: no training on numbers that mean something else."""
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"line {i} of a long enough text" for i in range(400)))
    monkeypatch.setitem(tokens.TOKENIZERS, "other",
                        type("Other", (tokens.Bytes,), {"name": "other"}))
    folder = tokens.prepare([str(text)], str(tmp_path / "data"), "other")
    with pytest.raises(ValueError, match="holds tokens of the tokenizer 'other', not of 'bytes'"):
        command(*SMALL, "--init", base, "--data", folder, "--out", tmp_path / "o")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(base, tmp_path, monkeypatch):
    large = type("Large", (tokens.Bytes,), {"name": "large", "vocab_size": 5000})
    monkeypatch.setitem(tokens.TOKENIZERS, "large", large)
    with pytest.raises(ValueError, match="--tokenizer large has more tokens than the model's 257"):
        command(*SMALL, "--init", base, "--tokenizer", "large", "--out", tmp_path / "o")


def test_an_empty_text_is_one_clear_line(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="too few"):
        command(*SMALL, "--init", base, "--data", tmp_path / "empty.txt", "--out", tmp_path / "o")
