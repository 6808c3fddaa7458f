"""The toy: its data, what it reads off the gates, and a short run that learns."""

import contextlib
import io
import itertools
import json
import os

import pytest
import torch

import addition_toy as toy
from model import Config, Transformer
from plumbing import addition
from plumbing.flags import in_processes, parse, run
from plumbing.tasks import Digits

TINY = dict(block_size=11, vocab_size=13, n_layer=2, n_head=2, n_embd=16, causal=False, init_std=0.5)


def tiny(**more):
    torch.manual_seed(0)
    return Transformer(Config(**TINY | dict(sparse=True, gate_bias=0.0) | more))


def test_every_problem_is_there_once_with_its_answer():
    idx, targets = toy.problems()
    decode, seen = Digits().decode, set()
    assert idx.shape == targets.shape == (10000, 11)
    for ids, target in zip(idx.tolist(), targets.tolist()):
        text = decode(ids)
        x, y = int(text[:2]), int(text[3:5])
        assert text == f"{x:02}+{y:02}=?????" and target[:6] == [-1] * 6
        assert int(decode(target[6:])) == x + y
        seen.add((x, y))
    assert len(seen) == 10000
    assert decode(idx[3628]) == "36+28=?????" and decode(targets[3628, 6:]) == "00064"


def test_batches_are_a_function_of_seed_and_step():
    idx = toy.problems()[0][~toy.HELD_OUT]
    assert torch.equal(toy.batch(4, 0, idx), toy.batch(4, 0, idx))
    assert not torch.equal(toy.batch(4, 0, idx), toy.batch(5, 0, idx))
    assert not torch.equal(toy.batch(4, 0, idx), toy.batch(4, 1, idx))
    drawn = torch.cat([toy.batch(step, 3, idx) for step in range(400)])
    assert drawn.min() >= 0 and drawn.max() < 9000 and len(drawn.unique()) > 8800


def test_problems_whose_tens_add_up_to_nine_come_five_times_as_often():
    idx = toy.problems()[0]
    drawn = idx[torch.cat([toy.batch(step, 1, idx) for step in range(400)])]
    nine = [Digits().decode(row)[0::3][:2] for row in drawn.tolist()]
    share = sum(int(x) + int(y) == 9 for x, y in nine) / len(nine)
    assert share == pytest.approx(5 / 14, abs=0.01)  # a tenth of the problems: .5 of .5 + .9


def test_layer_0_alone_is_a_model_whose_upper_attention_writes_nothing():
    model, idx = tiny(sparse=False), toy.problems()[0][::997]
    alone, whole = model(idx, tap=toy.layer_0_alone)[0], model(idx)[0]
    with torch.no_grad():
        for p in model.h[1].attn.c_proj.parameters():
            p.zero_()
    torch.testing.assert_close(alone, model(idx)[0])
    assert (alone - whole).abs().max() > 1e-3


def test_the_tries_end_with_one_that_is_good_enough(tmp_path, monkeypatch):
    idx, targets = toy.problems()
    models = {"dense": tiny(sparse=False), "sparse": tiny()}
    trace = [{"step": 1, "bound": 1.0, "ce_sampled": 1.0, "ce": 1.0, "lam": 1.0, "exact": 0.5, "edges": 9.0, "kept": 9.0}]
    edges, asked = [9.0, float("inf"), 5.9, 3.0], []

    def one_try(task):
        asked.append(task[1:])
        return edges[task[2]], 0.1, trace, models

    monkeypatch.setattr(toy, "one_try", one_try)
    monkeypatch.setattr(toy, "in_processes", map)
    toy.main(toy.Flags(seeds=2, tries=4, out=str(tmp_path)))
    assert asked == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [r["tries"] for r in json.load(open(tmp_path / "results.json"))["per_seed"]] == [[9.0, None, 5.9]] * 2


def test_a_wave_begins_with_the_sparsest_state_and_is_a_third_as_loose(monkeypatch):
    """Five waves of one step, which adds 1 to a weight: the first does not qualify, the fourth is not sparser."""
    states = iter([(1.0, 3.0), (0.0, 9.0), (1.0, 3.0), (0.0, 9.5), (0.0, 8.0), (0.0, 5.0)])  # CE, open edges
    idx, targets = (t[:9] for t in toy.problems())
    starts, seeds, first = [], [], lambda model: toy.make_optimizer(model).param_groups[0]["params"][0]

    def evaluate(model, *_):
        ce, edges = next(states)
        return toy.Evaluation(1.0, ce, edges, None, None, None)

    def descend(optimizer, *_, lr):
        with torch.no_grad():
            weight = optimizer.param_groups[0]["params"][0]
            starts.append((weight - first(dense)).mean().item())
            weight.add_(1)

    def forward(model, idx, targets, seed):
        seeds.append((idx.tolist(), seed.tolist()))
        return Transformer.forward(model, idx, targets, seed=seed)

    monkeypatch.setattr(toy, "Transformer", type("Recorded", (Transformer,), {"forward": forward}))
    monkeypatch.setattr(toy, "evaluate", evaluate)
    monkeypatch.setattr(toy, "descend", descend)
    dense, flags = tiny(sparse=False), toy.Flags(steps=1, waves=5, loose=0.3, enough=5.0, n_embd=16)
    sparse, edges, trace = toy.train_sparse(flags, 0, dense, 0.01, idx, targets)
    assert edges == 8.0 and [point["kept"] for point in trace] == [None, 9.0, 9.0, 9.0, 8.0]
    assert [point["step"] for point in trace] == [1, 2, 3, 4, 5]
    assert [point["bound"] for point in trace] == pytest.approx([0.3, 0.3, 0.1, 0.1, 0.1])
    assert starts == pytest.approx([0, 0, 1, 1, 1], abs=1e-6)  # twice the dense model, then the second wave's
    torch.testing.assert_close(first(sparse), first(dense) + 2)
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.combinations(seeds, 2))  # problems and noise
    _, edges, trace = toy.train_sparse(flags, 0, dense, 0.01, idx, targets)
    assert edges == 5.0 and len(trace) == 1  # few enough: no other wave


def test_a_seed_decides_the_whole_try():
    idx, targets = (t[::9] for t in toy.problems())
    flags = toy.Flags(dense_steps=3, steps=3, n_embd=16)

    def a_try(seed, torch_seed):
        torch.manual_seed(torch_seed)
        dense = toy.train_dense(flags, seed, idx, targets)
        sparse, _, trace = toy.train_sparse(flags, seed, dense, 0.1, idx, targets)
        return sparse.state_dict(), trace

    (a, trace), (b, again), (c, other) = a_try(5, 0), a_try(5, 1), a_try(6, 1)
    assert trace == again and all(torch.equal(a[name], b[name]) for name in a)
    assert trace != other and not torch.equal(a["wte.weight"], c["wte.weight"])


def test_tries_in_processes_are_those_of_one_process_in_order():
    flags = toy.Flags(dense_steps=2, steps=2, n_embd=8)
    tasks = [(flags, 3, number) for number in range(2)]
    for found, task in zip(in_processes(toy.one_try, tasks), tasks, strict=True):
        edges, tau, trace, models = toy.one_try(task)
        assert (found[0], found[2]) == (edges, trace) and found[1] == pytest.approx(tau)
        for name, t in models["sparse"].state_dict().items():
            torch.testing.assert_close(found[3]["sparse"].state_dict()[name], t)


def test_an_error_in_one_of_the_processes_arrives():
    with pytest.raises(TypeError):
        list(in_processes(len, [1, 2]))


def test_open_gates_are_the_ones_the_model_used():
    model, idx = tiny(), toy.problems()[0][::997]
    e = toy.evaluate(model, idx, idx)
    assert e.gates.shape == e.weights.shape == (len(idx), 2, 2, 11, 11)
    share = model(idx)[2].open
    torch.testing.assert_close(e.gates.double().mean((0, 3, 4)).float(), share)
    assert 0 < share.mean() < 1
    assert e.open_edges == pytest.approx(share.sum().item() * 121)
    assert toy.evaluate(tiny(sparse=False), idx, idx).gates.all()


def test_exact_needs_every_digit():
    idx, targets = (t[:50] for t in toy.problems())
    model = tiny()
    e = toy.evaluate(model, idx, targets)
    assert e.exact == 0 and e.ce > 1 and e.gates.shape == (50, 2, 2, 11, 11)
    guesses = model(idx)[0].argmax(-1)
    assert torch.equal(e.answers, guesses[:, 6:])
    assert toy.evaluate(model, idx, torch.where(targets == -1, -1, guesses)).exact == 1
    guesses[7, 10] = (guesses[7, 10] + 1) % 13
    assert toy.evaluate(model, idx, torch.where(targets == -1, -1, guesses)).exact == 49 / 50


def test_shut_edges_have_no_weight_and_dense_rows_sum_to_one():
    idx = toy.problems()[0][::997]
    e = toy.evaluate(tiny(), idx, idx)
    assert torch.equal(e.weights > 0, e.gates)
    rows = toy.evaluate(tiny(sparse=False), idx, idx).weights.sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_words_and_table_of_a_circuit_made_by_hand():
    """Layer 0: units read both units. Layer 1: tens read the units when there is a carry."""
    x, y = torch.arange(10000) // 100, torch.arange(10000) % 100
    gates = torch.zeros(10000, 2, 1, 11, 11, dtype=torch.bool)
    gates[:, 0, 0, addition.UNITS, [1, 4]] = True
    gates[x % 10 + y % 10 >= 10, 1, 0, addition.TENS, addition.UNITS] = True
    gates[:, 1, 0, addition.HUNDREDS, addition.HUNDREDS] = True  # reading oneself is not reading a carry
    assert addition.describe(gates) == [
        "layer 0: units reads y units 100.0%, x units 100.0%",
        "layer 1: hundreds reads hundreds 100.0%",
        "layer 1: tens reads units 45.0%",
    ]
    gates[:, 1, 0, addition.TENS, 6] = y < 10  # a detour, in a tenth
    gates[x + y >= 100, 1, 0, addition.HUNDREDS, 0] = True
    table = addition.carry_table(gates)
    assert table == {
        "tens <- units": {"carry": {"reads": 4500, "does_not": 0},
                          "no_carry": {"reads": 0, "does_not": 5500}},
        "tens <- answer 1": {"carry": {"reads": 450, "does_not": 4050},
                             "no_carry": {"reads": 550, "does_not": 4950}},
        "hundreds <- units": {"carry": {"reads": 0, "does_not": 4500},
                              "no_carry": {"reads": 0, "does_not": 5500}},
        "hundreds <- tens": {"carry": {"reads": 0, "does_not": 4950},
                             "no_carry": {"reads": 0, "does_not": 5050}},
        "hundreds <- x tens": {"carry": {"reads": 4950, "does_not": 0},
                               "no_carry": {"reads": 0, "does_not": 5050}},
    }
    assert list(table)[0] == "tens <- units"


@pytest.mark.parametrize("bad, message", [
    (["--tries", "0"], "--tries must be at least 1"), (["--slack", "0"], "--slack must be positive"),
    (["--loose", "nan"], "--loose"), (["--gate-bias", "inf"], "--gate-bias"),
    (["--seed", str(2**62)], "--seed"), (["--n-head", "3"], "n_head")])
def test_bad_flags_are_refused(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(toy.Flags, bad)
    assert "\n" not in str(error.value)


def test_an_error_during_training_has_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise ValueError("no more")

    monkeypatch.setattr(toy, "evaluate", fails)
    monkeypatch.setattr("sys.argv", ["addition_toy.py", "--dense-steps", "2", "--tries", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        run(toy.main, toy.Flags)
    assert stop.value.code == 2
    bar, *_, error, end = capsys.readouterr().err.split("\n")
    assert "tries: " in bar and error == "error: no more" and end == ""


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """(folder, what was printed, the problems that each training got) of a run of a few seconds."""
    folder, problems, printed = tmp_path_factory.mktemp("toy"), [], io.StringIO()
    train_dense, train_sparse = toy.train_dense, toy.train_sparse

    def dense(flags, seed, idx, targets):
        problems.append(idx)
        return train_dense(flags, seed, idx, targets)

    def sparse(flags, seed, dense, tau, idx, targets):
        problems.append(idx)
        return train_sparse(flags, seed, dense, tau, idx, targets)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(toy, "train_dense", dense)
        patch.setattr(toy, "train_sparse", sparse)
        toy.main(toy.Flags(dense_steps=500, tries=1, waves=1, steps=250, loose=1.0, out=str(folder)))
    return folder, printed.getvalue(), problems


def test_a_short_run_learns_and_writes_everything(short_run):
    """Dense training learns to add, post-training shuts most edges."""
    folder, printed, _ = short_run
    results = json.load(open(folder / "results.json"))
    assert results["dense_exact"] > 0.9
    assert results["exact"] > 0.5  # far from done; guessing gives 0.01
    assert results["mean_open_edges"] < 80 < results["allowed_edges"] == 242
    [seed] = results["per_seed"]
    assert seed["exact"] == results["exact"] and seed["tries"] == [None]
    assert {"exact_heldout", "circuit", "carry_table", "tau"} <= seed.keys()
    assert "no state qualified" in printed and all(line in printed for line in seed["circuit"])
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    assert [line["step"] for line in lines[1:]] == [100, 200, 250] and lines[3]["bound"] == pytest.approx(seed["tau"])
    for name in ("circuits.png", "training.png", "dense.pt", "sparse.pt"):
        assert os.path.getsize(folder / name) > 1000
    e = toy.evaluate(Transformer.from_pretrained(str(folder / "sparse.pt")), *toy.problems())
    assert (e.exact, e.open_edges) == (results["exact"], results["mean_open_edges"])


def test_the_held_out_thousand_never_change_and_are_never_trained_on(short_run):
    idx, held_out = toy.problems()[0], toy.HELD_OUT
    assert held_out.sum() == 1000 and held_out.nonzero().flatten()[:5].tolist() == [3, 7, 10, 15, 26]
    assert len(short_run[2]) == 2  # dense and sparse training
    assert all(torch.equal(problems, idx[~held_out]) for problems in short_run[2])
