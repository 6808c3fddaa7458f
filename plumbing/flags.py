"""Command lines from dataclasses, one-line errors, and the result files every script writes."""

import argparse
import ctypes
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import types
import typing

import torch

# -----------------------------------------------------------------------------
# flags: a field of the dataclass is a flag, the comment behind it is its help


class Parser(argparse.ArgumentParser):
    def error(self, message):
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown flag {unknown[1]}" + (f", did you mean {close[0]}?" if close else "")
        raise ValueError(f"{message} (--help lists the flags)")


def parse(flags, argv=None, doc=None):
    """An instance of the dataclass `flags` from the command line: --lr 1, --lr=1, --no-compile.

    A flag of type `int | None` (or float, str) is None until given; a field of type tuple holds the words
    that are no flags. The names of those that were given are the result's attribute `given`, because a
    value may be given that is the default. Bad input: ValueError.
    """
    parser = Parser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = dict(re.findall(r"^    (\w+) *:[^#\n]*#+ *(.*)$", inspect.getsource(flags), re.M))
    kinds = typing.get_type_hints(flags)
    for field in dataclasses.fields(flags):
        kind, name = kinds[field.name], "--" + field.name.replace("_", "-")
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is tuple:
            parser.add_argument(field.name, nargs="*", metavar="NAME", help=helps.get(field.name, ""))
            continue
        note = f"{helps.get(field.name, '')} [{field.default}]".replace("%", "%%")
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if kind is not bool:
            how["metavar"] = kind.__name__.upper()
        parser.add_argument(name, help=note, **how)
    given = vars(parser.parse_args(argv))
    result = flags(**given)
    result.given = set(given)
    return result


def check(flags, rules):
    """ValueError in one line unless the flags are as the table says: {"names": what they must be}.

    A rule is "at least 1", "at least 0.01", "not negative", "positive", "finite", "from 0 to 1",
    "below 2^62", or "a | b | c". A flag that is None was not given.
    """
    holds = {"at least 1": lambda x: x >= 1, "at least 0.01": lambda x: 0.01 <= x < math.inf,
             "not negative": lambda x: 0 <= x < math.inf, "positive": lambda x: 0 < x < math.inf,
             "finite": math.isfinite, "from 0 to 1": lambda x: 0 <= x <= 1, "below 2^62": lambda x: abs(x) < 2**62}
    for names, rule in rules.items():
        for name in names.split():
            value, choices = getattr(flags, name), rule.split(" | ")
            if value is not None and not (holds[rule](value) if rule in holds else value in choices):
                rule = rule if rule in holds else f"one of {', '.join(choices)}"
                raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value!r}")


def pick_device(device):
    """cpu, cuda or mps as they stand; auto is the fastest there is. None of it here: ValueError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, here in has.items() if here)
    if not has.get(device):
        raise ValueError(f"--device {device}: this machine has none that torch can use; "
                         "--device cpu works everywhere")
    return device


def run(main, flags, doc=None):
    """main(flags from the command line); what the user can mend ends in one line and exit code 2."""
    commit()  # of the code as it is now, not when the results are written
    keep_memory()
    try:
        main(parse(flags, doc=doc))
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":  # of torchrun: rank 0 mostly says the same, and
            time.sleep(3)  # then this rank is ended before it does
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print("error: out of memory: try a smaller batch or a shorter context", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def keep_memory():
    """Let glibc keep what is freed: it returns large tensors to the system, which clears every page that
    it hands out again, a tenth to a third of a training step on a CPU. Elsewhere nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        mallopt(-2, 2**26)  # M_TOP_PAD: it grows by 64 MiB at least


def in_processes(function, tasks):
    """Yields function(task) of each task, in order, from as many processes as there are cores."""
    if len(tasks) == 1:
        yield function(tasks[0])
        return
    pool = torch.multiprocessing.get_context("spawn").Pool(
        min(len(tasks), os.cpu_count(), 8), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with pool:  # Ctrl-C is left to this process, which ends the others
        yield from pool.imap(function, tasks)


# -----------------------------------------------------------------------------
# result files: whole or not at all


def replace(path, write):
    """write(temporary path), then rename: a reader, or a crash, never meets half a file."""
    temporary = f"{path}.tmp{platform.node()}{os.getpid()}"  # on a shared disk, too
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def replace_text(path, text):
    """The whole text in the file, or the file as it was."""
    replace(path, lambda temporary: pathlib.Path(temporary).write_text(text))


def save_figure(figure, path):
    """A matplotlib Figure as a PNG, the whole of it or the one that was there."""
    replace(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def open_folder(path):
    """Make the output folder and prove that it can be written, before any work is done."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe{os.getpid()}")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as error:
        raise ValueError(f"can not write to the output folder {path!r}: {error.strerror}") from None
    return path


def results_folder(path):
    """open_folder, unless it holds the results of another command: ValueError, because they would be lost."""
    try:
        with open(os.path.join(path, "results.json")) as f:
            theirs = json.load(f)["command"]
    except (OSError, ValueError, TypeError, KeyError):
        theirs = None  # there are none
    if theirs not in (None, command()):
        raise ValueError(f"{path} holds the results of `{theirs}`: give another --out")
    return open_folder(path)


@functools.cache
def commit():
    """The commit of this code, with "+ changes" if files differ from it; None outside of git."""
    git = ["git", "-C", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True).stdout
    except OSError:  # no git on this machine
        return None
    return (head.strip() + (" + changes" if dirty else "")) or None


DOWNLOADS = {}  # {owner/name: the commit that the hub served}, of what this process has read


def command():
    """The command line of this process, as it is typed."""
    folder, script = os.path.split(sys.argv[0])
    program = ["-m", f"plumbing.{script[:-3]}"] if folder.endswith("plumbing") else [script]
    return shlex.join(["python", *program, *sys.argv[1:]])


def header(device="cpu"):
    """What a number needs to be believed: command, commit, versions, device."""
    names = {"cuda": torch.cuda.get_device_name} if device == "cuda" else {}
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {
        "command": command(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": names[device]() if device in names else cpu if device == "cpu" else device,
        "downloads": dict(DOWNLOADS),
    }


def write_results(folder, started, device="cpu", **results):
    """results.json: the header, the seconds since time.time() == started, and the results."""
    content = header(device) | {"seconds": round(time.time() - started, 1)} | results
    path = os.path.join(folder, "results.json")
    replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


class Log:
    """log.jsonl: a header line, then one line a record, each flushed as it comes.

    append_after: go on with the file of a stopped run, without its records of later steps.
    """

    def __init__(self, folder, config, append_after=None, device="cpu"):
        path, kept = os.path.join(folder, "log.jsonl"), []
        if append_after is not None and os.path.exists(path):
            kept = earlier_lines(path, append_after)
            replace_text(path, "".join(kept))
        self.file = open(path, "a" if kept else "w")
        if not kept:
            self.write(**header(device), config=config)

    def write(self, **record):
        print(json.dumps(record), file=self.file, flush=True)


def earlier_lines(path, step):
    """The lines of a log up to that step; a line that was cut off, and what follows, is dropped."""
    kept = []
    with open(path) as f:
        for line in f:
            try:
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line)
            except ValueError:
                break
    return kept
