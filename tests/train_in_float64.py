"""train.py in double precision, a program for test_fsdp.py: what each rank did, in --out.

AdamW divides the rounding noise of gradients that are truly zero by itself, so that runs can only
be compared to 1e-9 in float64.
"""

import functools
import json
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import model
import sparse
import train
from plumbing import figures, flags, fsdp, runs


def prepare(replace=setattr, dtype=torch.float64, impl="auto"):
    """Short evaluations without pictures; replace: setattr, or monkeypatch's; impl: the form of attention."""
    real = runs.Run.line

    def line(run, step, began, net, **numbers):
        real(run, step, began, net, **numbers)
        with open(os.path.join(run.flags.out, f"rank{fsdp.rank()}.jsonl"), "a") as f:
            print(json.dumps([step, *(numbers[x] for x in numbers if x not in ("mfu", "lr"))]), file=f)

    torch.set_default_dtype(dtype)
    replace(model, "gated_attention", functools.partial(sparse.gated_attention, impl=impl))
    replace(runs.Run, "line", line)
    replace(train, "EVAL_SEQUENCES", 7)
    replace(figures, "draw_training", lambda *_: None)


if __name__ == "__main__":
    prepare()
    flags.run(train.main, train.Flags)
