"""Command lines and result files."""

import importlib
import json
import math
import os
import platform
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

from plumbing import flags

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class Example:
    lr: float = 1e-3  # learning rate, 100% of it
    steps: int = 10  # how many
    compile: bool = False  # slower start
    tau: float | None = None  # a bound
    data_dir: str = "data"  # where

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("--steps must be at least 1")


def test_every_way_of_writing_a_flag():
    assert flags.parse(Example, []) == Example()
    assert flags.parse(Example, ["--lr", "1"]).lr == flags.parse(Example, ["--lr=1"]).lr == 1.0
    assert flags.parse(Example, ["--compile"]).compile is True
    assert flags.parse(Example, ["--compile", "--no-compile"]).compile is False
    assert flags.parse(Example, ["--tau", "2e-3"]).tau == 0.002
    assert flags.parse(Example, ["--data-dir", "x"]).data_dir == "x"


def test_words_that_are_no_flags():
    @dataclass
    class Words:
        what: tuple = ()  # which
        out: str = "out"  # where

    assert flags.parse(Words, []) == Words() and flags.parse(Words, []).given == set()
    for argv in (["a", "b", "--out", "x"], ["--out=x", "a", "b"]):
        assert list(flags.parse(Words, argv).what) == ["a", "b"] and flags.parse(Words, argv).out == "x"


def test_help_shows_every_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse(Example, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for text in ("learning rate, 100% of it", "[0.001]", "--no-compile", "--data-dir", "how many"):
        assert text in shown


@pytest.mark.parametrize(
    "argv, message",
    [(["--lr", "abc"], "--lr: invalid float value: 'abc'"),
     (["--stepz", "3"], "did you mean --steps"),
     (["--lr"], "expected one argument"), (["--steps", "0"], "must be at least 1"),
     (["--st", "3"], "unknown flag --st"), (["stray"], "stray"), (["--compile=1"], "--compile")]
)
def test_bad_flags_are_value_errors(argv, message):
    with pytest.raises(ValueError, match=message):
        flags.parse(Example, argv)


@pytest.mark.parametrize(
    "command, message",
    [("geco --tau 0", "--tau"), ("geco --steps 0", "--steps"), ("sparse --bias x", "--bias"),
     ("plumbing.attention_cost --rounds 0", "--rounds must be at least 1"),
     ("addition_toy --tries 0", "--tries"), ("addition_toy --triez 5", "did you mean --tries"),
     ("addition_toy --slack 0", "--slack"), ("addition_toy --n-head 3", "n_head 3"),
     ("addition_toy --out /proc/nowhere", "output folder"), ("model --tokens 0", "--tokens must be at least 1"),
     ("plumbing.assets --out x", "no asset is named"),
     ("plumbing.assets news newz", "no asset 'newz': give some of smollm2, news"),
     ("model --init nowhere", "no file or folder here"), ("geco --out /proc/nowhere", "output folder")]
)
def test_scripts_end_bad_input_with_one_line_and_code_2(command, message, monkeypatch, capsys):
    name, *argv = command.split()
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        flags.run(script.main, script.Flags, script.__doc__)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_out_of_memory_on_a_cpu_is_one_line_and_other_errors_are_not(monkeypatch, capsys):
    @dataclass
    class Empty:
        pass

    def fails(flags):
        raise RuntimeError(message)

    monkeypatch.setattr(sys, "argv", ["x.py"])
    message = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes."
    with pytest.raises(SystemExit) as stop:
        flags.run(fails, Empty, "")
    assert stop.value.code == 2 and capsys.readouterr().err == (
        "error: out of memory: try a smaller batch or a shorter context\n")
    message = "a bug"
    with pytest.raises(RuntimeError, match="a bug"):
        flags.run(fails, Empty, "")


def test_as_a_command_of_its_own():
    run = subprocess.run([sys.executable, "geco.py", "--tau", "0"], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "rule, good, bad",
    [("at least 1", [1, 7, None], [0, -1, 0.5]), ("not negative", [0, 0.0, 3, None], [-1e-9, math.inf, math.nan]),
     ("positive", [1e-9, 5, None], [0, 0.0, -1, math.inf, math.nan]), ("finite", [-3.0, 0], [math.inf, math.nan]),
     ("ce | kl", ["ce", "kl", None], ["c", "", "ce | kl"])]
)
def test_the_table_of_rules(rule, good, bad):
    """A value within the rule passes, as does a flag that was not given; another is named in the error."""
    for value in good:
        flags.check(types.SimpleNamespace(a=1, data_dir=value), {"data_dir": rule})
    for value in bad:
        with pytest.raises(ValueError, match="--data-dir must be .*got") as error:
            flags.check(types.SimpleNamespace(a=1, data_dir=value),
                        {"a": "at least 1", "data_dir": rule})
        assert repr(value) in str(error.value)


def test_a_flag_that_was_given_is_known_even_if_it_is_the_default():
    assert flags.parse(Example, ["--steps", "10", "--no-compile"]).given == {"steps", "compile"}
    assert flags.parse(Example, []).given == set()


def test_an_output_folder_that_is_a_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(ValueError, match="output folder"):
        flags.open_folder(str(path))
    assert path.read_text() == "mine"


def test_results_of_another_command_are_not_written_over(tmp_path, monkeypatch):
    path = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["/x/geco.py", "--steps", "5"])
    flags.write_results(flags.results_folder(path), 0.0, number=1)
    assert flags.results_folder(path) == path  # the same command gives the same results
    monkeypatch.setattr(sys, "argv", ["/x/geco.py", "--steps", "6"])
    with pytest.raises(ValueError, match="holds the results of `python geco.py --steps 5`: give another --out"):
        flags.results_folder(path)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["number"] == 1
    (tmp_path / "out" / "results.json").write_text("[")
    assert flags.results_folder(path) == path


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "results.json")
    flags.replace(path, lambda p: open(p, "w").write("old"))

    def half(p):
        open(p, "w").write("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        flags.replace(path, half)
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_results_and_log_carry_a_header(tmp_path):
    path = flags.write_results(str(tmp_path), 0.0, exact=1.0)
    log = flags.Log(str(tmp_path), {"lr": 0.1})
    log.write(step=1, ce=0.5)
    results = json.load(open(path))
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    for header in (results, lines[0]):
        assert {"command", "commit", "torch", "device"} <= header.keys()
    assert results["exact"] == 1.0 and "seconds" in results
    assert lines[0]["config"] == {"lr": 0.1} and lines[1] == {"step": 1, "ce": 0.5}


FAULTS = """
import resource, sys, torch
from plumbing.flags import keep_memory
if sys.argv[1:]:
    keep_memory()
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**22) for _ in range(5)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_was_freed_is_used_again():
    """Without fetching its pages from the system anew, 20,480 of 4 KiB here. The first rounds may still cut the heap up."""
    run = subprocess.run([sys.executable, "-c", FAULTS, "keep"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1000
