"""A run's folder: what is refused and left alone, stopping and going on, the dense base and the control."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_train import SMALL, TINY, base, command, last_of, log_of, results_of  # noqa: F401

import train
from model import Config, Transformer
from plumbing import folders, runs, tokens
from plumbing.bpe import BYTE

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def contents(folder):
    """{path: bytes} of all files in a folder and below."""
    return {os.path.join(place, name): open(os.path.join(place, name), "rb").read()
            for place, _, names in os.walk(folder) for name in names}


def stopped(*argv, draw=False):
    """A run that ends before its last step; its exit code."""
    with pytest.raises(SystemExit) as stop:
        command(*argv, draw=draw)
    return stop.value.code


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a finished sparse run; a test copies it if it writes there."""
    folder = tmp_path_factory.mktemp("finished")
    command(*SMALL, "--init", base, "--steps", 3, "--slack", 9, "--out", folder)
    return folder


# -----------------------------------------------------------------------------
# which folder


def test_the_folder_that_is_read_is_not_written(finished, tmp_path, monkeypatch):
    """Given as a folder, as a file, by another path, and as the default of a checkpoint's folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out/run")
    os.symlink("out/run", "link")
    os.symlink("out/run/best.pt", "file.pt")
    before = contents("out")
    assert {"out/run/best.pt", "out/run/last.pt", "out/run/results.json"} < before.keys()
    for argv, flag in (("--init out/run --out out/run", "init"),
                       ("--init out/run/best.pt --out out/run/", "init"),
                       ("--init out/run/last.pt --out link", "init"), ("--init out/run", "init"),
                       ("--init out/run/best.pt", "init"), ("--init link/best.pt --out out/run", "init"),
                       ("--init x --adapter out/run/best.pt --out out/run", "adapter"), ("--init file.pt --out out/run", "init"),
                       ("--init x --control out/run --out out/run", "control")):
        for more in ("", "--overwrite", "--no-sparse --out out/run",
                     "--benchmark 2 --out out/run"):
            with pytest.raises(ValueError, match=f"is the folder that --{flag} reads: give another --out"):
                command(*SMALL, *argv.split(), "--tau", 9, *more.split())
    assert contents("out") == before


@pytest.mark.parametrize("init, more, out", [
    ("gpt2", {}, "gpt2"), ("gpt2", {"sparse": False}, "gpt2-control"), ("owner/name", {}, "name"), ("DIR/a/", {}, "a"),
    ("DIR/a/best.pt", {}, "a"), ("gpt2", {"dry_run": True}, "gpt2-dry-run"), ("scratch", {}, "scratch"),
    ("gpt2", {"benchmark": 3}, "gpt2-benchmark")])
def test_the_default_folder(init, more, out, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "best.pt").touch()
    given = train.Flags(init=init.replace("DIR", str(tmp_path)), **more)
    assert folders.default_out(given) == os.path.join("out", out)


def test_a_finished_run_is_not_overwritten_unless_it_is_asked_for(base, finished, tmp_path):
    before = contents(finished)
    for more in ([], ["--no-sparse"], ["--lora", 2], ["--benchmark", 2], ["--dry-run"]):
        with pytest.raises(ValueError, match="holds a finished run: give another --out, or --overwrite"):
            command(*SMALL, "--init", base, "--steps", 2, *more, "--out", finished)
    assert contents(finished) == before
    out = tmp_path / "o"
    for steps, more in ((2, []), (3, ["--overwrite"])):
        command(*SMALL, "--init", base, "--steps", steps, *more, "--out", out)
    assert last_of(out)["step"] == 3 and results_of(out)["flags"]["steps"] == 3
    assert [line["step"] for line in log_of(out, "lr")] == [1, 2, 3]


def test_results_without_a_checkpoint_are_not_overwritten(tmp_path):
    """Those of a part of a run from scratch whose large file was removed; then the part itself can not go on."""
    os.makedirs(tmp_path / "control")
    (tmp_path / "control" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="control holds results, and no checkpoint .*: give another --out"):
        command(*SMALL, *TINY, "--steps", 2, "--out", tmp_path)
    assert contents(tmp_path) == {str(tmp_path / "control" / "results.json"): b"{}"}


@pytest.mark.parametrize("more", [["--benchmark", 2], ["--dry-run"]])
def test_results_of_another_command_are_not_overwritten(more, base, tmp_path):
    theirs = tmp_path / "results.json"
    theirs.write_text('{"command": "python patching.py"}')
    with pytest.raises(ValueError, match="holds the results of `python patching.py`: give another --out"):
        command(*SMALL, "--init", base, *more, "--out", tmp_path)
    assert theirs.read_text() == '{"command": "python patching.py"}'


def test_an_unfinished_run_has_its_pictures_and_is_not_overwritten(base, tmp_path, recwarn):
    """Stopped before its first evaluation, too."""
    stopped(*SMALL, "--init", base, "--steps", 6, "--sitting", 3, "--out", tmp_path, draw=True)
    assert all((tmp_path / name).exists() for name in ("ce_open.png", "heads.png", "lambda.png"))
    assert not [w for w in recwarn if w.category is UserWarning], [str(w.message) for w in recwarn]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a run that is not finished: go on with --resume"):
        command(*SMALL, "--init", base, "--steps", 6, "--out", tmp_path)
    assert contents(tmp_path) == before


def test_no_state_of_an_earlier_run_is_taken_for_one_of_this_run(base, tmp_path):
    """Adapters over a full run, and a full run over adapters, neither of which finds a state in its bound."""
    full, adapters = ["--slack", 9], ["--lora", 2, "--slack", 9]
    command(*SMALL, "--init", base, "--steps", 2, *full, "--out", tmp_path)
    assert (tmp_path / "best.pt").exists()
    command(*SMALL, "--init", base, "--steps", 2, *adapters, "--overwrite", "--out", tmp_path)
    assert (tmp_path / "adapter.safetensors").exists() and not (tmp_path / "best.pt").exists()
    with pytest.raises(ValueError, match="holds adapters without their base"):
        Transformer.from_pretrained(str(tmp_path))
    command(*SMALL, "--init", base, "--steps", 2, "--tau", "1e-6", "--overwrite", "--out",
            tmp_path)
    assert not (tmp_path / "adapter.safetensors").exists() and not (tmp_path / "best.pt").exists()
    opened, last = Transformer.from_pretrained(str(tmp_path)).state_dict(), last_of(tmp_path)["model"]
    assert all(torch.equal(opened[name], last[name]) for name in last)


def test_the_tokenizer_stays_with_its_model(tmp_path, monkeypatch):
    """Of any file name, and in the base's folder too; it goes with the run that it was for."""
    monkeypatch.chdir(tmp_path)
    vocabulary = {name: n for n, name in enumerate(sorted(BYTE))} | {"<|endoftext|>": 256}
    content = {"added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": True,
                                 "normalized": False}],
               "normalizer": None, "post_processor": None, "decoder": {"type": "ByteLevel"},
               "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
               "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (tmp_path / "own.json").write_text(json.dumps(content))
    command(*SMALL, *TINY, "--tokenizer", "own.json", "--steps", 2, "--out", "o")
    for folder in ("o", "o/dense"):
        name = tokens.name_for(257, None, folder)
        assert name == folder + "/tokenizer.json" and tokens.tokenizer(name).name.startswith("bpe-")
    command(*SMALL, "--init", "o/dense", "--tokenizer", "o", "--steps", 1, "--overwrite", "--out",
            "o")
    assert json.loads((tmp_path / "o/tokenizer.json").read_text()) == content
    command(*SMALL, *TINY, "--steps", 1, "--overwrite", "--out", "o")
    assert tokens.name_for(257, None, "o") == "bytes"


# -----------------------------------------------------------------------------
# stopping and going on


@pytest.mark.parametrize("more", [["--slack", 0.3], ["--bound", "kl", "--lora", 2, "--accumulate",
                                                     2]])
def test_twenty_steps_are_seven_and_six_and_seven(more, base, tmp_path):
    """Weights, optimiser, lambda and log, bit for bit; evaluated on the way or not."""
    flags = [*SMALL, "--init", base, "--steps", 20, *more]
    command(*flags, "--out", tmp_path / "whole")
    assert stopped(*flags, "--sitting", 7, "--out", tmp_path / "parts") == 0
    assert stopped("--resume", tmp_path / "parts", "--sitting", 6) == 0
    assert last_of(tmp_path / "parts")["step"] == 13
    command("--resume", tmp_path / "parts")
    a, b = (last_of(tmp_path / x) for x in ("whole", "parts"))
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for i, slots in a["optimizer"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, b["optimizer"]["state"][i][name])
    for key in ("geco", "step", "best", "trace", "dense", "reached"):
        assert a[key] == b[key]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    whole, parts = (results_of(tmp_path / x) for x in ("whole", "parts"))
    for key in ("ce_sparse", "ce_last", "kl_sparse", "open_frac", "tau", "heads", "best_step"):
        assert whole[key] == parts[key]


def test_resume_forgets_what_was_logged_after_the_checkpoint(base, tmp_path):
    """Killed between two checkpoints: the lines behind the last one come again, once."""
    stopped(*SMALL, "--init", base, "--steps", 20, "--sitting", 10, "--out", tmp_path)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 11, "ce": 0.0}) + '\n{"step": 12, "c')
    command("--resume", tmp_path)
    assert [r["step"] for r in log_of(tmp_path, "lr")] == list(range(1, 21))


def test_a_finished_run_reports_again(base, tmp_path):
    """As after a crash between the last checkpoint and results.json, or to set a control beside it."""
    for out, more in (("sparse", []), ("control", ["--no-sparse"])):
        command(*SMALL, "--init", base, "--steps", 3, *more, "--out", tmp_path / out)
    before = results_of(tmp_path / "sparse")
    with pytest.raises(ValueError, match="this run is finished; remove its results.json to report again"):
        command("--resume", tmp_path / "sparse")
    assert results_of(tmp_path / "sparse") == before
    os.remove(tmp_path / "sparse" / "results.json")
    command("--resume", tmp_path / "sparse", "--control", tmp_path / "control")
    after = results_of(tmp_path / "sparse")
    assert after["ce_dense_control"] == results_of(tmp_path / "control")["ce"]
    for key in ("ce_dense", "ce_sparse", "open_frac", "heads", "best_step", "tokens", "tau"):
        assert after[key] == before[key]


def test_a_control_given_to_a_resumed_run_does_not_move_its_bound(base, tmp_path):
    command(*SMALL, "--init", base, "--steps", 8, "--no-sparse", "--out", tmp_path / "control")
    for out, more in (("alone", []), ("beside", ["--control", tmp_path / "control"])):
        stopped(*SMALL, "--init", base, "--steps", 8, "--sitting", 4, "--out", tmp_path / out)
        command("--resume", tmp_path / out, *more)
    alone, beside = (last_of(tmp_path / out)["model"] for out in ("alone", "beside"))
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert results_of(tmp_path / "alone")["tau"] == results_of(tmp_path / "beside")["tau"]


def interrupt_in_line(monkeypatch, step, times=1):
    """Ctrl-C while train.py is in the middle of a step."""
    real = runs.Run.line

    def line(run, n, *rest, **numbers):
        real(run, n, *rest, **numbers)
        for _ in range(times if n == step else 0):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)  # two signals in no time would count as one

    monkeypatch.setattr(runs.Run, "line", line)


def test_ctrl_c_finishes_the_step_and_saves(base, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--init", base, "--steps", 12]
    command(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_in_line(patch, 5)
        assert stopped(*flags, "--out", tmp_path / "o") == 130
    assert f"saved step 5 of 12; go on with: python train.py --resume {tmp_path}/o" in capsys.readouterr().out
    command("--resume", tmp_path / "o")
    whole, parts = (last_of(tmp_path / x) for x in ("whole", "o"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "o")


def test_a_second_ctrl_c_ends_at_once(base, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_line(patch, 5, times=2)
        command(*SMALL, "--init", base, "--steps", 12, "--out", tmp_path)
    assert signal.getsignal(signal.SIGINT) == before and last_of(tmp_path)["step"] == 0


def start(*argv):
    return subprocess.Popen([sys.executable, "train.py", *map(str, argv)], cwd=ROOT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, process, pattern):
    deadline = time.time() + 120
    while not (path.exists() and re.search(pattern, path.read_text())):
        if process.poll() is not None or time.time() > deadline:
            process.kill()  # one that lives would be waited for
            raise AssertionError(process.communicate()[1])
        time.sleep(0.05)


def test_after_kill_9_the_last_checkpoint_is_there(base, tmp_path, monkeypatch):
    process = start(*SMALL, "--no-sparse", "--init", base, "--steps", 100000, "--out", tmp_path)
    wait_for(tmp_path / "log.jsonl", process, r'"step": 2[1-9], "ce"')
    process.kill()
    process.communicate(timeout=60)
    step = last_of(tmp_path)["step"]
    assert step >= 20
    monkeypatch.setattr(folders, "fingerprint", lambda *_: None)  # of the longer evaluations of a command
    assert stopped("--resume", tmp_path, "--sitting", 3) == 0
    assert last_of(tmp_path)["step"] == step + 3


def test_a_full_disk_leaves_the_last_checkpoint(base, tmp_path, monkeypatch):
    stopped(*SMALL, "--init", base, "--steps", 20, "--sitting", 10, "--out", tmp_path)
    before, real = (tmp_path / "last.pt").read_bytes(), torch.save

    def full(content, path):  # what torch does when the disk is full half-way
        real(content, path)
        os.truncate(path, 500)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 500 vs 1000")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="is the disk full"):
        patch.setattr(torch, "save", full)
        command("--resume", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
    command("--resume", tmp_path)


# -----------------------------------------------------------------------------
# what does not go on


def test_the_seconds_are_of_all_sittings(base, tmp_path):
    stopped(*SMALL, "--init", base, "--steps", 6, "--sitting", 3, "--out", tmp_path)
    saved = last_of(tmp_path)
    torch.save(saved | {"seconds": 1000.0}, tmp_path / "last.pt")
    command("--resume", tmp_path)
    results = results_of(tmp_path)
    assert results["seconds"] >= results["training_seconds"] >= 1000


def test_resume_keeps_the_flags_of_the_run(base, tmp_path):
    """Also a flag whose value is the default: --steps 3600 on a run of 6 steps."""
    stopped(*SMALL, "--init", base, "--steps", 6, "--sitting", 3, "--out", tmp_path)
    before = contents(tmp_path)
    for argv, message in ((["--steps", 3600], "--steps 3600: the run in .* has 6"),
                          (["--lr", 0.5], "--lr 0.5: the run in .* has 0.0001"),
                          (["--seed", 0, "--slack", 0.02], "--slack 0.02: the run in .* has 0.025"),
                          (["--no-sparse"], "--sparse False: the run in .* has True"),
                          (["--benchmark", 3], "--benchmark 3: the run in .* has 0")):
        with pytest.raises(ValueError, match=message):
            command("--resume", tmp_path, *argv)
    assert contents(tmp_path) == before
    command("--resume", tmp_path, "--steps", 6, "--init", base, "--recompute")


def test_resume_on_changed_text_is_refused(base, tmp_path):
    """The same number of blocks, but other held-out ones."""
    text, folder = tmp_path / "a.txt", str(tmp_path / "data")
    flags = [*SMALL, "--init", base, "--data", folder, "--steps", 6, "--sitting", 3]
    for letter in "ab":
        text.write_text("\n<|endoftext|>\n".join(f"{letter * 300} {i:03}" for i in range(100)))
        tokens.prepare([str(text)], folder, "bytes")
        if letter == "a":
            stopped(*flags, "--out", tmp_path / "o")
    with pytest.raises(ValueError, match="the data has changed since"):
        command("--resume", tmp_path / "o")


def test_a_damaged_checkpoint_is_one_clear_line(base, tmp_path):
    out, path = tmp_path / "dense", tmp_path / "dense" / "last.pt"
    out.mkdir()
    for write, message in ((lambda: path.write_bytes(b"PK\3\4 this is no checkpoint"),
                            "can not be read"),
                           (lambda: Transformer(Config(n_layer=1, n_head=1, n_embd=8,
                                                       vocab_size=257, block_size=4)
                                                ).save_checkpoint(str(path)), "no checkpoint of a training run")):
        write()
        with pytest.raises(ValueError, match=message):
            command("--resume", out)
        with pytest.raises(ValueError, match=message):  # as a dense base
            command(*SMALL, *TINY, "--out", tmp_path)


# -----------------------------------------------------------------------------
# the dense base and the control


def test_stopped_in_its_dense_phase_the_same_command_goes_on(tmp_path, capsys):
    flags = [*SMALL, *TINY, "--dense-steps", 9, "--steps", 4]
    command(*flags, "--out", tmp_path / "whole")
    stopped(*flags, "--sitting", 5, "--out", tmp_path / "parts")
    assert "saved step 5 of 9; go on with: the same command" in capsys.readouterr().out
    stopped(*flags, "--sitting", 3, "--out", tmp_path / "parts")  # the sitting of each phase: 4 more, and 3
    assert last_of(tmp_path / "parts" / "dense")["step"] == 8
    stopped(*flags, "--sitting", 2, "--out", tmp_path / "parts")  # the last one, and 2 of the control
    assert "saved step 2 of 4; go on with: the same command" in capsys.readouterr().out
    stopped(*flags, "--sitting", 3, "--out", tmp_path / "parts")  # the control's other 2, and 3 of the sparse run
    assert f"saved step 3 of 4; go on with: python train.py --resume {tmp_path}/parts\n" in capsys.readouterr().out
    command("--resume", tmp_path / "parts")
    for out in ("", "dense", "control"):
        a, b = (last_of(tmp_path / x / out)["model"] for x in ("whole", "parts"))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert log_of(tmp_path / "whole" / out) == log_of(tmp_path / "parts" / out)


def test_stopped_while_it_overwrites_a_run_it_goes_on(tmp_path, capsys):
    """In the dense phase: nothing of the earlier run is there to be resumed, and no step is done twice."""
    flags = [*SMALL, *TINY, "--dense-steps", 5, "--steps", 3, "--out", tmp_path]
    command(*flags, "--seed", 1)
    stopped(*flags, "--overwrite", "--sitting", 3)
    assert "go on with: the same command without --overwrite" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no last.pt in it"):
        command("--resume", tmp_path)
    command(*flags)
    assert [line["step"] for line in log_of(tmp_path / "dense", "lr")] == [1, 2, 3, 4, 5]
    assert results_of(tmp_path)["flags"]["seed"] == results_of(tmp_path / "dense")["flags"]["seed"] == 0


def test_the_base_of_other_flags_is_refused(tmp_path):
    """Whether it is finished or not; what only the sparse phase needs may change."""
    flags = [*SMALL, *TINY, "--dense-steps", 6, "--steps", 3, "--out", tmp_path]
    for sitting in (3, None):
        if sitting:
            stopped(*flags, "--sitting", sitting)
        else:
            command(*flags)
            for name in ("results.json", "last.pt", "best.pt"):  # as if it had ended right after its base
                (tmp_path / name).unlink(missing_ok=True)
        before = contents(tmp_path)
        for argv, message in ((["--n-embd", 24], "--n-embd 16, not 24"),
                              (["--seed", 1], "--seed 0, not 1"),
                              (["--dense-steps", 7], "--dense-steps 6, not 7"),
                              (["--data", "x.txt"], "--data python-docs, not x.txt")):
            with pytest.raises(ValueError, match=f"holds a run that was trained with {message}"):
                command(*flags, *argv)
        assert contents(tmp_path) == before
    command(*flags, "--slack", 0.5, "--gate-bias", 1, "--bound", "kl", "--eval-every", 1)


def test_the_control_of_a_run_from_scratch(tmp_path):
    """Made from scratch too, or from the run's own base, as a file or a folder: the same numbers."""
    flags = [*SMALL, "--steps", 4]
    command(*flags, *TINY, "--no-sparse", "--out", tmp_path / "c0")
    command(*flags, *TINY, "--control", tmp_path / "c0", "--out", tmp_path / "sparse")
    bases = str(tmp_path / "sparse" / "dense")
    for n, init in ((1, bases), (2, bases + "/last.pt")):
        command(*flags, "--init", init, "--lr", "2e-3", "--repeat", 0.5, "--no-sparse", "--out", tmp_path / f"c{n}")
    control = [results_of(tmp_path / f"c{n}") for n in range(3)]
    sparse = results_of(tmp_path / "sparse")
    assert sparse["ce_dense_control"] == control[0]["ce"] == control[1]["ce"] == control[2]["ce"]
    assert sparse["ce_dense"] == control[0]["ce_dense"] != control[0]["ce"]
    command(*flags, *TINY, "--control", tmp_path / "c1", "--out", tmp_path / "again")
    command(*flags, "--init", bases, "--lr", "2e-3", "--repeat", 0.5, "--gate-bias", -8, "--control", tmp_path / "c0",
            "--out", tmp_path / "from_base")
    for out in ("again", "from_base"):
        assert results_of(tmp_path / out)["ce_sparse"] == sparse["ce_sparse"]


def test_a_control_of_another_run_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setitem(tokens.TOKENIZERS, "other", type("Other", (tokens.Bytes,), {
        "name": "other", "encode": lambda self, text: 255 - tokens.Bytes().encode(text)}))
    (tmp_path / "b.txt").write_text("".join(f"{n} and {n} is {n + n}; " for n in range(1000)))
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--init", base, "--steps", 2]
    command(*flags, "--no-sparse", "--out", "control")
    other = str(tmp_path / "other.pt")
    Transformer(Config(n_layer=2, n_head=2, n_embd=32, vocab_size=257,
                       block_size=32)).save_checkpoint(other)
    for n, (argv, message) in enumerate((
            (["--steps", 3], "had --steps 2, not 3"), (["--dtype", "bfloat16"],
                                                       "had --dtype auto, not bfloat16"),
            (["--lr", 0.1], "had --lr 0.0001, not 0.1"), (["--batch-size", 2], "had --batch-size 4, not 2"),
            (["--data", "b.txt"], "other weights, text or tokenizer"), (["--init", other], "other weights, text"),
            (["--tokenizer", "other"], "other weights, text or tokenizer"))):
        with pytest.raises(ValueError, match=f"--control control .*{message}.*no control of"):
            command(*flags, *argv, "--control", "control", "--out", str(n))
    command(*flags, "--out", "sparse")
    with pytest.raises(ValueError, match="no results.json of a finished --no-sparse run"):
        command(*flags, "--control", "sparse", "--out", "x")


def test_the_benchmark_times_dense_and_sparse_steps(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(*SMALL, "--init", base, "--benchmark", 3)
    results = results_of(tmp_path / "out" / "dense-benchmark")
    rate = results["tokens_per_second"]
    assert results["sparse_over_dense"] == rate["sparse"] / rate["dense"] > 0
    assert re.search(r"tokens/s: dense [\d,]+, sparse [\d,]+, ratio \d+.\d\d",
                     capsys.readouterr().out)
    assert os.listdir(tmp_path / "out" / "dense-benchmark") == ["results.json"]
    command(*SMALL, "--init", base, "--benchmark", 1)  # and again
