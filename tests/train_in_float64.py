"""train.py in double precision, a program for test_fsdp.py: what each rank did, in --out.

AdamW divides the rounding noise of gradients that are truly zero by itself, so that runs can only
be compared to 1e-9 in float64.
"""

import json
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train
from plumbing import fsdp
from plumbing.flags import run

torch.set_default_dtype(torch.float64)
step_once = train.step_once


def and_tell(job, flags, forward):
    line = step_once(job, flags, forward)
    with open(os.path.join(flags.out, f"rank{fsdp.rank()}.jsonl"), "a") as f:
        geco = job["geco"]
        print(json.dumps([job["state"]["step"], geco.lam, geco.tau, line["open"]]), file=f)
    return line


train.step_once = and_tell
run(train.main, train.Flags)
