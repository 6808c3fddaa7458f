"""Which folder a run may write to, how it goes on there, and what it may be compared with.

OUT holds last.pt (all that --resume needs; the folder last/ of a sharded run), best.pt or with --lora
adapter.safetensors (the sparsest state within the bound; without one there is no best.pt, and the adapter
is the last), results.json, log.jsonl and the figures. From scratch it holds the folders dense and control, too.
"""

import json
import os
import shutil
import zlib
from dataclasses import asdict

from plumbing import fsdp
from plumbing.flags import results_folder

# -----------------------------------------------------------------------------
# which folder


def default_out(flags):
    """out/NAME of the init, a checkpoint by its folder; the dense control beside it."""
    path = os.path.abspath(flags.init) if os.path.isfile(flags.init) else flags.init.rstrip("/")
    name = os.path.basename(os.path.dirname(path) if os.path.isfile(path) else path)
    kind = "-dry-run" * flags.dry_run + "-benchmark" * (flags.benchmark > 0) + "-control" * (not flags.sparse)
    return os.path.join("out", name + kind)


def newest(folder):
    """The checkpoint to go on from in an --out folder, or None."""
    return fsdp.newest(os.path.join(folder, "last"))


def check_folder(flags):
    """Nothing is lost: ValueError if the new run would write over what is read or was finished."""
    out = os.path.realpath(flags.out)
    for flag, path in (("init", flags.init), ("adapter", flags.adapter), ("control", flags.control)):
        if path and os.path.exists(path):
            folder = path if os.path.isdir(path) else os.path.dirname(os.path.realpath(path))
            if os.path.realpath(folder) == out:
                raise ValueError(f"--out {flags.out} is the folder that --{flag} reads: give another --out")
    if flags.overwrite:
        return
    started, finished = newest(flags.out), os.path.exists(os.path.join(flags.out, "results.json"))
    if started and not finished:
        raise ValueError(f"{flags.out} holds a run that is not finished: go on with --resume {flags.out}, "
                         "or give another --out, or --overwrite")
    if started or finished and not (flags.dry_run or flags.benchmark):
        raise ValueError(f"{flags.out} holds a finished run: give another --out, or --overwrite")
    if finished:  # these two may be done again, by the same command
        results_folder(flags.out)


def remove_old(folder):
    """What an earlier run left: none of its states may be taken for one of this run."""
    for name in ("results.json", "best.pt", "adapter.safetensors", "last.pt", "tokenizer.json"):
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    for name in ("last", "last.old", "last.new"):
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


# -----------------------------------------------------------------------------
# going on

FREE = {"out", "resume", "sitting", "overwrite", "control", "device", "fsdp", "recompute", "eval_every"}


def read_checkpoint(folder):
    """What the newest checkpoint of the run in the folder holds, or None."""
    path = newest(folder)
    saved = path and fsdp.read(path)
    if path and not (isinstance(saved, dict) and {"flags", "geco", "step", "reached"} <= saved.keys()):
        raise ValueError(f"{path} is no checkpoint of a training run")
    return saved


def resume(given):
    """(flags, contents of the checkpoint) of the run in the folder given.resume, with its own flags.

    Those in FREE may be given anew, because they do not change the training (eval_every: only which
    states can be kept). Others: ValueError.
    """
    folder, saved = given.resume, read_checkpoint(given.resume)
    if saved is None:
        raise ValueError(f"--resume {folder}: there is no last.pt in it to go on from")
    if saved["step"] >= saved["flags"].get("steps", 0) and os.path.exists(os.path.join(folder, "results.json")):
        raise ValueError(f"--resume {folder}: this run is finished; remove its results.json to report again")
    if saved["flags"].keys() != asdict(given).keys():
        raise ValueError(f"{newest(folder)} was written by another version of train.py")
    for name in given.given - FREE:
        if getattr(given, name) != saved["flags"][name]:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)}: the run in {folder} has "
                             f"{saved['flags'][name]}; a resumed run keeps the flags it was started with")
    free = {name: getattr(given, name) for name in given.given & FREE}
    free |= {"sitting": given.sitting, "fsdp": given.fsdp, "resume": folder, "out": folder}
    return type(given)(**saved["flags"] | free), saved


def unfinished(runs):
    """[(flags, checkpoint to go on from or None)] of those of `runs` that are not done, in order.

    ValueError if one was trained with other flags. With --overwrite none is done.
    """
    if runs[-1].overwrite and fsdp.rank() == 0:
        for flags in runs:
            remove_old(flags.out)
    fsdp.wait()
    todo = []
    for flags in runs:
        saved = read_checkpoint(flags.out)
        for name, value in asdict(flags).items() if saved else ():
            if name not in FREE and saved["flags"].get(name) != value:
                raise ValueError(f"{flags.out} holds a run that was trained with --{name.replace('_', '-')} "
                                 f"{saved['flags'].get(name)}, not {value}: give another --out, or --overwrite")
        if not saved and os.path.exists(os.path.join(flags.out, "results.json")):
            raise ValueError(f"{flags.out} holds results, and no checkpoint to go on from: give another --out, or "
                             "--overwrite")
        if not saved or saved["step"] < flags.steps or not os.path.exists(os.path.join(flags.out, "results.json")):
            todo.append((flags, saved))
    if todo:
        print("from scratch:", ", then ".join(f"{flags.steps} steps in {flags.out}" for flags, _ in todo)
              + "; the default flags take about 14 minutes on two CPU cores")
    return todo


def read_control(folder, flags, ce_dense):
    """results.json of the dense control: as much training, from the same model, on the same text.

    ce_dense: the model's CE on test text before training. It is the same number only if weights,
    tokenizer and test text are the same. Else: ValueError.
    """
    try:
        with open(os.path.join(folder, "results.json")) as f:
            control = json.load(f)
        if not {"flags", "ce_dense", "ce_val", "copying", "trace"} <= control.keys():
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"--control {folder}: no results.json of a finished --no-sparse run is in it") from None
    for name in ("steps", "batch_size", "accumulate", "context", "lr", "seed", "lora", "dtype", "repeat"):
        if control["flags"].get(name) != getattr(flags, name):
            raise ValueError(f"--control {folder} had --{name.replace('_', '-')} {control['flags'].get(name)}, not "
                             f"{getattr(flags, name)}: it is no control of this run")
    if abs(control["ce_dense"] - ce_dense) > 1e-3:
        raise ValueError(f"--control {folder} began at a test CE of {control['ce_dense']:.4f}, this run begins at "
                         f"{ce_dense:.4f}: other weights, text or tokenizer, so it is no control of it")
    return control


def fingerprint(blocks, fixed, saved):
    """[number of training blocks, a checksum of each held-out split]; ValueError if not as saved."""
    found = [blocks.n_blocks] + [zlib.crc32(fixed[split][0].numpy()) for split in fixed]
    if saved and saved["fingerprint"] != found:
        raise ValueError(f"--resume: the data has changed since, its number of blocks or the held-out "
                         f"ones: {saved['fingerprint']} then, {found} now")
    return found
