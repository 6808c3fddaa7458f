"""What the choices of train.py are worth: small models that copy, three seeds, one change at a time.

    python -m plumbing.ablations        two layers, width 64, context 64; half an hour on one CPU core

From one dense base and its control a seed, each variant is post-trained as train.py does it but for one
thing. A run goes on where it was stopped: what is finished in --out is not done again.
"""

import contextlib
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import sparse
import train
from plumbing import folders, runs
from plumbing.flags import check, open_folder, results_folder, run, write_results


@dataclass
class Flags:
    out: str = "out/ablations"  # folder for the runs and results.json
    seeds: int = 3  # 0, 1, ...
    steps: int = 600  # of the sparse model and of the control
    dense_steps: int = 3000  # of the dense base

    def __post_init__(self):
        check(self, {"seeds steps dense_steps": "at least 1"})


def softplus_form(q, k, v, bias, keys, causal):
    """naive, but E is the mean of softplus(s + b): its slope does not vanish where a gate is wide open."""
    y, _, opened = sparse.naive(q, k, v, bias, keys, causal)
    allowed = sparse.allowed_pairs(q.shape[2], causal, q.device)
    s = q @ k.mT / q.shape[-1] ** 0.5
    return y, (F.softplus(s + bias) * allowed).sum((-2, -1)) / allowed.sum(), opened


@contextlib.contextmanager
def only_q_and_k():
    """While it lasts, the rows of c_attn that make q and k are all of a sparse model that trains."""
    build, kept = train.build, []  # (parameter, rows of q and k, value at the start)

    def build_part(flags, config, *more):
        model = build(flags, config, *more)
        model.requires_grad_(not config.sparse)
        for block in model.h if config.sparse else ():
            for p in block.attn.c_attn.parameters():
                kept.append((p.requires_grad_(), sum(block.attn.sizes[:2]), p.detach().clone()))
        return model

    def put_back(*_):
        for p, rows, before in kept:
            p.data[rows:] = before[rows:]

    hook = register_optimizer_step_post_hook(put_back)
    with mock.patch.object(train, "build", build_part):
        yield
    hook.remove()


def softplus():
    return mock.patch.object(sparse, "choose", lambda impl, q: (softplus_form, torch.float32))


# name: flags that change, and what else changes while the run goes on
VARIANTS = {
    "as train.py does it": ({}, None),
    "b = 0": ({"gate_bias": 0.0}, None),
    "b = 4": ({"gate_bias": 4.0}, None),
    "slack 0": ({"slack": 0.0}, None),
    "slack 0.05": ({"slack": 0.05}, None),
    "bound on KL(dense, sparse), 0.1": ({"bound": "kl", "slack": 0.1, "control": None}, None),
    "objective: mean softplus(s + b)": ({}, softplus),
    "noise to the end": ({"noisy": 1.0}, None),
    "no noise in the last tenth": ({"noisy": 0.9}, None),
    "no noise at all": ({"noisy": 0.0}, None),
    "the slack not larger at first": ({}, lambda: mock.patch.object(train, "LOOSE", 1)),
    "q and k alone are trained": ({}, only_q_and_k),
}


def post_train(flags):
    """Results of the runs of train.py that `flags`, one to three of them, ask for."""
    for part, saved in folders.unfinished(flags):
        with runs.progress([(part, saved)]) as bar:
            train.train(part, saved, bar, more=True)
    with open(os.path.join(flags[-1].out, "results.json")) as f:
        return json.load(f)


def summary(results):
    """{name: its value on each seed} of what a variant's runs came to."""
    return {"open_frac": [r["open_frac"] for r in results],
            "ce_above_control": [r["ce_sparse"] - r["ce_dense_control"] for r in results],
            "copying_least": [min(r["copying_sparse"].values()) for r in results]}


def main(flags):
    started, found = time.time(), {name: [] for name in VARIANTS}
    results_folder(flags.out)
    for seed in range(flags.seeds):
        folder = open_folder(os.path.join(flags.out, f"seed{seed}"))
        small = train.Flags(n_layer=2, n_head=4, n_embd=64, context=64, batch_size=16, seed=seed, out=folder,
                            steps=flags.steps, dense_steps=flags.dense_steps, slack=0.03, gate_bias=2.0)
        base, control, as_it_is = train.phases(small)
        ce = post_train([base, control])["ce"]
        for name, (changes, patch) in VARIANTS.items():
            out = os.path.join(folder, "".join(c if c.isalnum() else "-" for c in name))
            with patch() if patch else contextlib.nullcontext():
                found[name].append(post_train([replace(as_it_is, out=out, **changes)]) | {"ce_dense_control": ce})
    variants = {name: summary(results) for name, results in found.items()}
    print(f"\n{'mean of the seeds (lowest to highest)':40}{'open %':>24}{'CE above control':>26}{'copying %':>22}")
    for name, values in variants.items():
        print(f"{name:40}" + "".join(f"{statistics.mean(x):{f}} ({min(x):{f}} to {max(x):{f}})".rjust(width)
              for f, width, x in zip((".2%", ".3f", ".0%"), (24, 26, 22), values.values())))
    print("wrote", write_results(flags.out, started, flags=asdict(flags), variants=variants))


if __name__ == "__main__":
    run(main, Flags, __doc__)
