"""train.py: a run and its parts, stopping and going on, and input that is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from model import Config, Transformer
from plumbing import flags as plumbing_flags
from plumbing import tokens

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ["--threads", "1", "--batch-size", "4", "--context", "32", "--eval-every", "10", "--eval-sequences",
         "6", "--log-every", "1", "--data", "python-docs", "--warmup", "5"]


def start(*argv, **how):
    return subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def command(*argv):
    """A run of train.py in this process, as from the command line."""
    torch.set_num_threads(1)
    train.main(plumbing_flags.parse(train.Flags, list(map(str, argv))))


def log_of(folder):
    """The records of log.jsonl without what a clock wrote."""
    records = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))][1:]
    for record in records:
        record.pop("tokens_per_second", None)
    return records


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny dense byte model, a few steps old."""
    folder = tmp_path_factory.mktemp("base")
    command(*SMALL, "--no-sparse", "--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--steps", 30,
            "--lr", "3e-3", "--out", folder)
    return str(folder / "last.pt")


def test_with_no_init_it_trains_a_base_and_then_shuts_edges(tmp_path, capsys):
    command(*SMALL, "--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--dense-steps", 60, "--steps", 60,
            "--slack", 0.5, "--width", 0.3, "--out", tmp_path)
    shown = capsys.readouterr().out
    assert "ln(257) = 5.5491 expected" in shown and "tau = " in shown and "open edges" in shown
    results = json.load(open(tmp_path / "results.json"))
    for key in ("command", "commit", "torch", "device", "seconds", "ce_dense", "ce_sparse", "tau",
                "ce_sparse_sampled", "open_frac", "open_edges_per_query", "context_length", "tokens",
                "tokens_per_second"):
        assert key in results
    assert results["ce_dense"] < 4 and results["tokens"] == 60 * 4 * 32
    assert abs(results["open_edges_per_query"] - results["open_frac"] * 16.5) < 1e-9
    first = next(r for r in log_of(tmp_path) if "open" in r and "heads" in r)
    assert results["open_frac_last"] < 0.8 * first["open"]
    for name in train.FIGURES:
        assert os.path.getsize(tmp_path / name) > 5000
    last = Transformer.from_pretrained(str(tmp_path / "last.pt"))
    assert last.config.sparse and last.config.gate_bias == 2.0


def test_best_is_the_sparsest_state_within_the_bound(base, tmp_path):
    command(*SMALL, "--init", base, "--steps", 40, "--slack", 0.3, "--width", 0.1, "--out", tmp_path)
    looks = [r for r in log_of(tmp_path) if "heads" in r]
    results = json.load(open(tmp_path / "results.json"))
    within = [r for r in looks if r["val_ce"] <= results["tau"]]
    want = min(within, key=lambda r: r["open"])
    assert [r["step"] for r in looks] == [0, 10, 20, 30, 40]
    assert results["best_step"] == want["step"]
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert saved["step"] == want["step"]


def test_the_bound_is_on_the_held_out_loss(base, tmp_path):
    """After an evaluation a batch's CE is held to tau less half of (held-out CE - average CE)."""
    command(*SMALL, "--init", base, "--steps", 20, "--out", tmp_path)
    tau = json.load(open(tmp_path / "results.json"))["tau"]
    log = log_of(tmp_path)
    steps = {r["step"]: r for r in log if "lr" in r}
    looks = {r["step"]: r for r in log if "val_ce" in r}
    assert looks[0]["gap"] == 0 and {steps[n]["bound"] for n in range(1, 11)} == {tau}
    gap = (looks[10]["val_ce"] - steps[10]["ce_ema"]) / 2
    assert gap != 0 and looks[10]["gap"] == gap
    assert {steps[n]["bound"] for n in range(11, 21)} == {tau - gap}
    assert looks[20]["gap"] == gap + (looks[20]["val_ce"] - steps[20]["ce_ema"] - gap) / 2


def test_twenty_steps_are_ten_and_ten(base, tmp_path):
    """Weights, optimiser, lambda and log, bit for bit."""
    how = [*SMALL, "--init", base, "--steps", 20, "--slack", 0.3]
    command(*how, "--out", tmp_path / "whole")
    with pytest.raises(SystemExit) as stop:
        command(*how, "--sitting", 7, "--out", tmp_path / "parts")
    assert stop.value.code == 0
    with pytest.raises(SystemExit):
        command("--resume", tmp_path / "parts", "--sitting", 6)
    command("--resume", tmp_path / "parts")
    a, b = (torch.load(tmp_path / x / "last.pt", weights_only=True) for x in ("whole", "parts"))
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for i, slots in a["optimizer"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, b["optimizer"]["state"][i][name])
    assert a["geco"] == b["geco"]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    whole, parts = (json.load(open(tmp_path / x / "results.json")) for x in ("whole", "parts"))
    for key in ("ce_sparse", "ce_last", "open_frac", "tau", "heads"):
        assert whole[key] == parts[key]


def test_resume_forgets_what_was_logged_after_the_checkpoint(base, tmp_path):
    """Killed between two checkpoints: the lines behind the last one come again, once."""
    how = [*SMALL, "--init", base, "--steps", 20, "--slack", 0.3, "--out", tmp_path]
    with pytest.raises(SystemExit):
        command(*how, "--sitting", 10)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 11, "ce": 0.0}) + "\n")
    command("--resume", tmp_path)
    steps = [r["step"] for r in log_of(tmp_path) if "lr" in r]
    assert steps == list(range(1, 21))


def test_gradient_accumulation_is_a_larger_batch(base):
    """One step of 2 x 4 sequences and of 1 x 8: the same gradient, KL and CE."""
    gradients, lines = [], []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        flags = train.Flags(init=base, data="python-docs", batch_size=batch_size, accumulate=accumulate,
                            context=32, eval_sequences=4, threads=1, distill=0.5)
        r = train.start(flags)
        lines.append(train.step_once(r, flags, r["model"]))
        gradients.append([p.grad.clone() for p in r["model"].parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    for name in ("ce", "kl", "open"):
        assert abs(lines[0][name] - lines[1][name]) < 1e-5 and lines[0][name] > 0


def test_overfitting_one_batch_drives_the_loss_down(base, tmp_path):
    command(*SMALL, "--init", base, "--no-sparse", "--overfit", "--steps", 80, "--lr", "1e-2", "--out", tmp_path)
    losses = [r["ce"] for r in log_of(tmp_path) if "lr" in r]
    assert losses[-1] < 0.6 * losses[0]


def test_the_control_and_distillation(base, tmp_path):
    command(*SMALL, "--init", base, "--no-sparse", "--steps", 10, "--out", tmp_path / "control")
    control = json.load(open(tmp_path / "control" / "results.json"))
    command(*SMALL, "--init", base, "--distill", 1.0, "--steps", 10, "--control", tmp_path / "control",
            "--out", tmp_path / "sparse")
    results = json.load(open(tmp_path / "sparse" / "results.json"))
    assert results["ce_dense_control"] == control["ce"] and results["ce_dense"] == control["ce_dense"]
    kl = [r["kl"] for r in log_of(tmp_path / "sparse") if "lr" in r]
    assert all(k > 0 for k in kl)


def test_evaluation_uses_no_training_randomness(base, tmp_path):
    """Looking more often changes neither weights nor lambda."""
    saved = []
    for every in (3, 100):
        folder = tmp_path / str(every)
        command(*SMALL[:6], "--context", 32, "--data", "python-docs", "--init", base, "--steps", 9,
                "--eval-sequences", 4, "--eval-every", every, "--out", folder)
        saved.append(torch.load(folder / "last.pt", weights_only=True))
    for name in saved[0]["model"]:
        assert torch.equal(saved[0]["model"][name], saved[1]["model"][name])
    assert saved[0]["geco"] == saved[1]["geco"]


def wait_for(path, process, pattern):
    for _ in range(2400):
        if path.exists() and re.search(pattern, path.read_text()):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"{pattern} never came")


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_at_any_moment_it_goes_on(how, code, base, tmp_path):
    """Ctrl-C finishes the step and saves; after kill -9 the last checkpoint still loads."""
    process = start(*SMALL, "--init", base, "--steps", "100000", "--out", str(tmp_path))
    wait_for(tmp_path / "log.jsonl", process, r'"step": 2[1-9], "ce"')
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["state"]["step"] >= 20
    if how == signal.SIGINT:
        assert f"--resume {tmp_path}" in out
    with pytest.raises(SystemExit):
        command("--resume", tmp_path, "--sitting", 3)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["state"]["step"] == saved["state"]["step"] + 3


def test_a_loss_that_is_not_finite_stops_the_run(base, tmp_path):
    process = start(*SMALL, "--init", base, "--steps", "50", "--lr", "1e30", "--clip", "1e30", "--out", str(tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("error: ") == 1
    assert re.search(r"step \d+: the loss is (nan|inf)", err) and "lower --lr" in err and str(tmp_path) in err
    model = Transformer.from_pretrained(str(tmp_path / "last.pt"))
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_unfinished_run_is_not_overwritten_and_a_control_must_fit(base, tmp_path):
    with pytest.raises(SystemExit):
        command(*SMALL, "--init", base, "--steps", 6, "--sitting", 3, "--out", tmp_path / "a")
    with pytest.raises(ValueError, match="holds a run that is not finished"):
        command(*SMALL, "--init", base, "--steps", 6, "--out", tmp_path / "a")
    command(*SMALL, "--init", base, "--steps", 6, "--no-sparse", "--out", tmp_path / "control")
    with pytest.raises(ValueError, match="had --steps 6, not 7: it is no control"):
        command(*SMALL, "--init", base, "--steps", 7, "--control", tmp_path / "control",
                "--out", tmp_path / "b")


def test_stopped_in_its_dense_phase_the_same_command_goes_on(tmp_path):
    how = [*SMALL, "--n-layer", 1, "--n-head", 1, "--n-embd", 16, "--dense-steps", 12, "--steps", 10,
           "--out", tmp_path]
    with pytest.raises(SystemExit):
        command(*how, "--sitting", 5)
    command(*how)
    assert json.load(open(tmp_path / "results.json"))["tokens"] == 10 * 4 * 32


# -----------------------------------------------------------------------------
# input that is wrong


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lr", "abc"], "--lr: invalid float value"),
        (["--init", "gpt5"], "no file or folder here and no hub name"),
        (["--init", "BASE", "--context", "64"], "the model takes 1 to 32"),
        (["--init", "BASE", "--tokenizer", "klingon"], "unknown tokenizer 'klingon'"),
        (["--init", "BASE", "--data", "nowhere.txt"], "there is no file or folder 'nowhere.txt'"),
        (["--init", "BASE", "--device", "tpu"], "--device must be"),
        (["--init", "BASE", "--out", "/proc/nowhere"], "output folder"),
        (["--init", "BASE", "--tau", "-1"], "tau must be a positive number"),
        (["--init", "BASE", "--ema", "1"], "0 <= ema < 1"),
        (["--init", "BASE", "--sitting", "0"], "--sitting must be at least 1"),
        (["--init", "BASE", "--control", "nowhere"], "--control nowhere: no results.json"),
        (["--init", "BASE", "--distill", "-1"], "--distill must not be negative"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--resume", "nowhere"], "no last.pt"),
    ],
)
def test_bad_input_is_one_line_and_code_2(argv, message, base, tmp_path):
    argv = [base if a == "BASE" else a for a in argv]
    out = [] if "--out" in argv or "--resume" in argv else ["--out", str(tmp_path / "out")]
    data = [] if "--data" in argv else ["--data", "python-docs"]
    process = start(*argv, *out, *data, "--threads", "1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda(base, tmp_path):
    with pytest.raises(ValueError, match="--device cuda: this machine has none"):
        command(*SMALL, "--init", base, "--device", "cuda", "--out", tmp_path)


def test_resume_with_another_configuration_is_refused(base, tmp_path):
    with pytest.raises(SystemExit):
        command(*SMALL, "--init", base, "--steps", 6, "--sitting", 3, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="--lr 0.5: the run in .* has 0.0001"):
        command("--resume", tmp_path, "--lr", "0.5")
    assert (tmp_path / "last.pt").read_bytes() == before


def test_resume_on_changed_text_is_refused(base, tmp_path):
    """The same number of blocks, but other held-out ones."""
    text, folder = tmp_path / "a.txt", str(tmp_path / "data")
    for letter in "ab":
        text.write_text("\n<|endoftext|>\n".join(f"{letter * 300} {i:03}" for i in range(100)))
        tokens.prepare([str(text)], folder, "bytes")
        if letter == "a":
            with pytest.raises(SystemExit):
                command(*SMALL[:-4], "--init", base, "--data", folder, "--steps", 6, "--sitting", 3,
                        "--out", tmp_path / "o")
    with pytest.raises(ValueError, match="the data has changed since"):
        command("--resume", tmp_path / "o")


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"PK\3\4 this is no checkpoint")
    with pytest.raises(ValueError, match="can not be read"):
        command("--resume", tmp_path)
    Transformer(Config(n_layer=1, n_head=1, n_embd=8, vocab_size=257, block_size=4)).save_checkpoint(
        str(tmp_path / "last.pt"))
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        command("--resume", tmp_path)


def test_tokens_of_another_tokenizer_are_refused(base, tmp_path, monkeypatch):
    """A prepared folder says whose ids it holds: no training on numbers that mean something else."""
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"line {i} of a long enough text" for i in range(400)))
    monkeypatch.setitem(tokens.TOKENIZERS, "other", type("Other", (tokens.Bytes,), {"name": "other"}))
    folder = tokens.prepare([str(text)], str(tmp_path / "data"), "other")
    with pytest.raises(ValueError, match="holds tokens of the tokenizer 'other', not of 'bytes'"):
        command(*SMALL[:-4], "--init", base, "--data", folder, "--out", tmp_path / "o")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(base, tmp_path, monkeypatch):
    large = type("Large", (tokens.Bytes,), {"name": "large", "vocab_size": 5000})
    monkeypatch.setitem(tokens.TOKENIZERS, "large", large)
    with pytest.raises(ValueError, match="--tokenizer large has more tokens than the model's 257"):
        command(*SMALL, "--init", base, "--tokenizer", "large", "--out", tmp_path / "o")


def test_an_empty_text_is_one_clear_line(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="too few"):
        command(*SMALL[:-4], "--init", base, "--data", tmp_path / "empty.txt", "--out", tmp_path / "o")


def test_a_full_disk_leaves_the_last_checkpoint(base, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        command(*SMALL, "--init", base, "--steps", 20, "--sitting", 10, "--out", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()

    real = torch.save

    def full(content, path):  # what torch does when the disk is full half-way
        real(content, path)
        os.truncate(path, 500)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 500 vs 1000")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="is the disk full"):
        command("--resume", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
