"""
Sparse post-training of a language model: the fewest open attention edges at the dense loss.

    python train.py                              a small model from scratch, no download, minutes
    python train.py --init gpt2                  the main job: GPT-2 124M on web text
    python train.py --init FOLDER --data a.txt   local weights and text
    python train.py --init gpt2 --no-sparse      the dense control: same data and steps, no gates
    python train.py --resume out/gpt2            go on where a run was stopped
    torchrun --nproc-per-node 8 train.py --init meta-llama/Llama-3.2-1B --fsdp

What it does: measures the dense model's cross-entropy (CE) on held-out text and sets
tau = CE + slack; trains on with sampled gates, minimising the expected share of open edges E
subject to CE <= tau (geco.py). That CE is the held-out one: a batch's CE plus the gap between
the two, measured at every evaluation. Keeps as best.pt the sparsest state whose held-out CE,
with deterministic gates, is at most tau; reports that state and the last one on test text that
was used for nothing else.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace as changed

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from tqdm import tqdm

from geco import GECO
from model import Config, Transformer, read_config, read_model
from plumbing import fsdp, lora, plan, tokens
from plumbing.flags import Log, open_folder, pick_device, run, save_figure, write_results
from plumbing.hub import read_pickle, read_safetensors, write_pickle
from sparse import fold_in, peak_memory


@dataclass
class Flags:
    init: str = "scratch"  # hub name, Hugging Face folder, checkpoint, or scratch
    adapter: str | None = None  # adapter.safetensors of an earlier --lora run, on top of it
    data: str | None = None  # fineweb, python-docs, a prepared folder, or .txt files with commas
    tokenizer: str | None = None  # gpt2, bytes or a tokenizer.json; default: the model's own
    shards: int = 1  # fineweb files of 100M tokens each
    out: str | None = None  # folder for checkpoints, results.json, log.jsonl and figures
    resume: str | None = None  # the --out folder of a stopped run: go on with its flags
    # the model, from scratch only
    n_layer: int = 4  # layers
    n_head: int = 4  # heads a layer
    n_embd: int = 128  # width
    dense_steps: int = 2000  # steps of dense training before the sparse ones
    dense_lr: float = 2e-3  # its highest learning rate
    # what is trained
    lora: int = 0  # rank of adapters on the attention matrices, everything else frozen; 0: all of it
    lora_mlp: bool = False  # adapters on the MLP's matrices too
    # the objective
    sparse: bool = True  # gates and penalty; --no-sparse is the dense control
    gate_bias: float | None = None  # b: open with sigmoid(s + b); default 2, or the init's own
    slack: float = 0.02  # tau = the dense CE + slack, nats
    tau: float | None = None  # the bound itself, instead of --slack
    nu: float = 0.01  # GECO: step of log lambda
    kp: float = 1.0  # GECO: proportional term
    ema: float = 0.95  # GECO: averaging of the noisy CE
    width: float = 0.02  # GECO: log(CE / tau) that counts as a full violation
    lam_min: float = 1e-3  # GECO: lower bound of exp(h), lambda without the proportional term
    lam_max: float = 20.0  # GECO: upper bound of exp(h)
    distill: float = 0.0  # weight of KL(dense model, sparse model), which is added to CE
    control: str | None = None  # --out folder of the dense control, to report beside
    # the steps
    context: int | None = None  # tokens a sequence; default 1024 or what the model takes
    batch_size: int = 8  # sequences in memory at a time, over all ranks
    accumulate: int = 1  # gradient accumulation: batches a step
    steps: int = 3000  # optimiser steps
    lr: float | None = None  # highest learning rate; default 1e-3 from scratch, else 1e-4
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # of matrices
    clip: float = 1.0  # largest gradient norm
    overfit: bool = False  # train on one batch only, a check of the whole machine
    seed: int = 0  # of weights, data order and gates
    # running
    device: str = "auto"  # cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 autocast; auto: bfloat16 on CUDA
    fsdp: bool = False  # shard over the processes of torchrun
    recompute: bool = False  # activation checkpointing: less memory, a third more time
    dry_run: bool = False  # only print parameters and memory per rank
    compile: bool = False  # torch.compile, a slow start for faster steps
    threads: int = 2  # CPU threads
    eval_every: int = 200  # steps between evaluations, checkpoints and figures
    eval_sequences: int = 64  # held-out sequences of an evaluation
    log_every: int = 1  # steps between printed lines
    sitting: int | None = None  # stop after this many steps; --resume goes on
    benchmark: int = 0  # only time this many steps, dense and sparse in turn

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "dense_steps", "batch_size", "accumulate",
                     "steps", "threads", "eval_every", "eval_sequences", "log_every", "shards",
                     "context", "sitting"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        for name in ("slack", "distill", "weight_decay", "warmup", "benchmark"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        self.lr = self.lr or (1e-3 if self.init == "scratch" else 1e-4)
        for name in ("lr", "dense_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a positive number")
        if self.gate_bias is not None and not math.isfinite(self.gate_bias):
            raise ValueError("--gate-bias must be a finite number")
        if abs(self.seed) >= 2**62:
            raise ValueError("--seed must be below 2^62")
        if self.lora < 0 or (self.lora_mlp and not self.lora):
            raise ValueError("--lora must be a rank of at least 1, and --lora-mlp needs it")
        if self.lora and (self.adapter or self.init == "scratch"):
            raise ValueError("--lora needs a trained --init and no --adapter: a run that is to go on "
                             "is --resume")
        if self.fsdp and self.compile:
            raise ValueError("--compile and --fsdp do not work together here: give one of them")
        self.geco(self.tau if self.tau is not None else 1.0)  # its own checks, before any work
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {self.dtype!r}")
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            raise ValueError(f"--device must be auto, cpu, cuda or mps, got {self.device!r}")

    def geco(self, tau):
        return GECO(tau, nu=self.nu, kp=self.kp, ema=self.ema, width=self.width,
                    lam_min=self.lam_min, lam_max=self.lam_max)


# -----------------------------------------------------------------------------
# setting up


def precision(flags):
    """The device, whether to compute in bfloat16, and what to run the forward pass in for it."""
    device = pick_device(flags.device)
    half = flags.dtype == "bfloat16" or (flags.dtype == "auto" and device == "cuda")
    if half and not flags.fsdp:  # which casts by itself
        return device, half, lambda: torch.autocast(device, dtype=torch.bfloat16)
    return device, half, contextlib.nullcontext


def read_init(flags):
    """(Config, {name: tensor}) of the model to start from, on the CPU."""
    if flags.init != "scratch":
        return fsdp.first_on_each_machine(lambda: read_model(flags.init, flags.adapter))
    torch.manual_seed(flags.seed)
    vocabulary = tokens.tokenizer(flags.tokenizer or "bytes").vocab_size
    config = Config(block_size=flags.context or 128, vocab_size=vocabulary, n_layer=flags.n_layer,
                    n_head=flags.n_head, n_embd=flags.n_embd)
    return config, Transformer(config).state_dict()


def build(flags, config, weights, device, half):
    """The model on its device: the whole of it, or this rank's shards with --fsdp."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config)
    if flags.lora:
        weights = weights | lora.add(model, flags.lora, flags.lora_mlp, flags.seed)
    model.recompute = flags.recompute
    if flags.fsdp:
        return fsdp.shard(model, weights, device, half)
    return model.take(weights).to(device)


def load_data(flags, config):
    """(context, tokenizer, training Blocks, {"val", "test"}: fixed (idx, targets)) for this model."""
    name = tokens.name_for(config.vocab_size, flags.tokenizer, flags.init)
    context = flags.context or min(1024, config.block_size)
    if not 1 <= context <= config.block_size:
        raise ValueError(f"--context {context}: the model takes 1 to {config.block_size} tokens")
    source = flags.data or ("fineweb" if name == "gpt2" else "python-docs")
    data = fsdp.first_on_each_machine(lambda: tokens.load_data(source, name, flags.shards))
    fixed = {split: tokens.fixed_blocks(data[split], context, flags.eval_sequences)
             for split in ("val", "test")}
    return context, name, tokens.Blocks(data["train"], context, flags.seed), fixed


def make_optimizer(model, flags):
    """AdamW; matrices decay, vectors do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.dim() > 1]}
    vectors = {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=flags.lr, betas=(0.9, 0.95),
                             weight_decay=flags.weight_decay)


def learning_rate(step, flags):
    """Linear warm-up, then a cosine to a tenth."""
    if step < flags.warmup:
        return flags.lr * (step + 1) / flags.warmup
    done = (step - flags.warmup) / max(1, flags.steps - flags.warmup)
    return flags.lr * (0.55 + 0.45 * math.cos(math.pi * done))


# -----------------------------------------------------------------------------
# measuring


@torch.no_grad()
def evaluate(model, blocks, flags, amp, device, sampled=False):
    """(CE in nats, share of open gates (n_layer, n_head) or None) over fixed (idx, targets).

    Deterministic gates; `sampled` ones have fixed seeds of their own. Each rank takes its part.
    """
    count, totals = len(blocks[0]), 0.0
    for n in range(0, count, flags.batch_size):
        rows = torch.arange(n + fsdp.rank(), min(n + flags.batch_size, count), fsdp.world())
        share = len(rows) / count
        rows = rows if len(rows) else torch.tensor([0])  # all ranks must run, to gather the weights
        idx, targets = (x[rows].to(device) for x in blocks)
        with amp():
            _, loss, edges = model(idx, targets, seed=fold_in(-1, rows) if sampled else None)
        opened = [] if edges is None else edges.open.flatten().tolist()
        totals = totals + share * torch.tensor([loss.item(), *opened], dtype=torch.float64)
    ce, *opened = fsdp.total(totals)
    config = model.config
    return ce, np.reshape(opened, (config.n_layer, config.n_head)) if config.sparse else None


def peak_memory_gib(device):
    """The most memory the run has held so far: of the GPU, or of the whole process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        return peak_memory() / 1024
    except OSError:  # only Linux says
        return None


def edges_per_query(share, context):
    """Open edges of a query and head, which sees (context + 1) / 2 keys on average."""
    return share * (context + 1) / 2


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}  # bf16


def flops_per_token(model, context):
    """Forward and backward of the dense model: 6 a parameter, 12 C context a layer."""
    config = model.config
    n = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("wpe"))
    return 6 * n + 12 * config.n_layer * config.n_embd * context


# -----------------------------------------------------------------------------
# one run: dense (the base or the control) or sparse


def start(flags, saved=None):
    """Everything a run needs before its next step, as one dict.

    A new run measures the dense model's CE, on validation text for tau and on test text for the
    report. A resumed one takes model, optimiser, lambda and measurements from `saved`.
    """
    device, half, amp = precision(flags)
    config, weights = read_init(flags)
    config = gated_config(flags, config)
    context, tokenizer, blocks, fixed = load_data(flags, config)
    base = lora.fingerprint(weights) if flags.lora else None
    model = build(flags, config, weights, device, half)
    teacher = None
    if flags.distill:
        dense, weights = changed(flags, lora=0), read_init(flags)[1]
        teacher = build(dense, Config(**asdict(config) | {"sparse": False}), weights, device, half)
    marks = {"blocks": blocks.n_blocks} | {s: zlib.crc32(fixed[s][0].numpy()) for s in fixed}
    if saved:
        state = saved["state"]
        if state["data"] != marks:
            raise ValueError(f"--resume {flags.out}: the data has changed since, its number of blocks "
                             f"or the held-out ones: {state['data']} then, {marks} now")
    else:
        config.sparse = False  # the same weights before they get their gates
        ce = {split: evaluate(model, fixed[split], flags, amp, device)[0] for split in fixed}
        config.sparse = flags.sparse
        tau = ce["val"] + flags.slack if flags.tau is None else flags.tau
        state = {"step": 0, "seconds": 0.0, "data": marks, "ce_dense": ce, "tau": tau,
                 "gap": 0.0, "best": None, "trace": []}
    optimizer = make_optimizer(model, flags)
    geco = flags.geco(state["tau"] - state["gap"])
    if saved:
        fsdp.load(saved, model, optimizer, trained_only=flags.lora > 0)
        geco.load_state_dict(saved["geco"])
    return {"device": device, "amp": amp, "context": context, "blocks": blocks, "fixed": fixed, "tokenizer": tokenizer,
            "teacher": teacher, "base": base, "model": model, "state": state,
            "optimizer": optimizer, "geco": geco}


def gated_config(flags, config):
    """The Config of the model to train: gates or not, and b."""
    own = 2.0
    if config.sparse:
        print(f"note: {flags.init} is sparse; its dense CE is that of its weights without gates")
        own = config.gate_bias
    settings = asdict(config) | {"sparse": flags.sparse}
    if flags.sparse:
        settings["gate_bias"] = own if flags.gate_bias is None else flags.gate_bias
    return Config(**settings)


def step_once(job, flags, forward):
    """One optimiser step: the numbers of its line. A loss that is not finite: ValueError."""
    model, geco, step, device = job["model"], job["geco"], job["state"]["step"], job["device"]
    totals = {"ce": 0.0, "open": 0.0, "kl": 0.0}
    size = flags.batch_size // fsdp.world()  # sequences of this rank at a time, from `first` on
    first = fsdp.rank() * size
    job["optimizer"].zero_grad()
    for micro in range(flags.accumulate):
        batch = (0 if flags.overfit else step) * flags.accumulate + micro
        idx, targets = (x.to(device) for x in job["blocks"].batch(batch * flags.batch_size + first, size))
        rows = micro * flags.batch_size + first + torch.arange(size)  # their numbers in the step
        seeds = fold_in(fold_in(flags.seed, step), rows).to(device)
        with job["amp"]():
            logits, ce, edges = forward(idx, targets, seed=seeds)
        constrained, totals["ce"] = ce, totals["ce"] + ce.item() / flags.accumulate
        if flags.distill:
            with torch.no_grad(), job["amp"]():
                teacher = job["teacher"](idx)[0].float().log_softmax(-1).flatten(0, 1)
            student = logits.float().log_softmax(-1).flatten(0, 1)
            kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            constrained = ce + flags.distill * kl
            totals["kl"] += kl.item() / flags.accumulate
        loss = geco.loss(edges.prob.mean(), constrained) if flags.sparse else constrained
        if flags.sparse:
            totals["open"] += edges.open.mean().item() / flags.accumulate
        (loss / flags.accumulate).backward()
    totals = dict(zip(totals, fsdp.mean(totals.values())))  # the same lambda on every rank
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.clip)
    norm = (norm.full_tensor() if flags.fsdp else norm).item()
    if not (math.isfinite(totals["ce"]) and math.isfinite(norm)):
        raise ValueError(f"step {step + 1}: the loss is {totals['ce']}, its gradient {norm}; the "
                         f"last good checkpoint is in {flags.out}: try a lower --lr or --clip")
    lr = learning_rate(step, flags)
    for group in job["optimizer"].param_groups:
        group["lr"] = lr
    job["optimizer"].step()
    if flags.sparse:
        geco.update(totals["ce"])
    return totals | {"lr": lr, "norm": norm}


def checkpoint(job, flags, log):
    """Evaluate, keep the best state, write the checkpoint and refresh the figures."""
    model, state = job["model"], job["state"]
    model.eval()
    ce, share = evaluate(model, job["fixed"]["val"], flags, job["amp"], job["device"])
    if not math.isfinite(ce):
        raise ValueError(f"step {state['step']}: the held-out CE is {ce}; the last good checkpoint "
                         f"is in {flags.out}: try a lower --lr or --clip")
    point = {"step": state["step"], "val_ce": ce}
    if flags.sparse:
        sampled, _ = evaluate(model, job["fixed"]["val"], flags, job["amp"], job["device"], sampled=True)
        if job["geco"].c is not None:  # half of the news, for both are noisy
            state["gap"] += (ce - job["geco"].c - state["gap"]) / 2
            job["geco"].tau = state["tau"] - state["gap"]
        point |= {"val_ce_sampled": sampled, "open": share.mean().item(), "heads": share.tolist(),
                  "lambda": job["geco"].lam, "gap": state["gap"]}
        if ce <= state["tau"] and (not state["best"] or point["open"] < state["best"]["open"]):
            state["best"] = point
            export(job, flags, best_file(flags))
    state["trace"].append(point)
    log(**point)
    save(job, flags)
    if flags.sparse and fsdp.rank() == 0:
        draw(job, flags)
    model.train()
    return point


def best_file(flags):
    return os.path.join(flags.out, "adapter.safetensors" if flags.lora else "best.pt")


def export(job, flags, path):
    """What was trained in one file: a checkpoint that from_pretrained opens, or the adapter."""
    model, weights = job["model"], fsdp.whole_model(job["model"], trained_only=flags.lora > 0)
    if fsdp.rank() == 0 and flags.lora:
        lora.save(path, weights, job["base"], model.config)
    elif fsdp.rank() == 0:
        write_pickle(path, {"config": asdict(model.config), "model": weights, "step": job["state"]["step"]})


def save(job, flags):
    """All that --resume needs: last.pt, or the folder last with a file of each rank."""
    path, trained_only = os.path.join(flags.out, "last"), flags.lora > 0
    fsdp.save(path, job["model"], job["optimizer"], trained_only, sharded=flags.fsdp,
              config=asdict(job["model"].config), flags=asdict(flags),
              geco=job["geco"].state_dict(), state=job["state"])


def train(flags):
    """A whole run, or the rest of a stopped one. Writes checkpoints, log, figures, results."""
    started, saved = time.time(), None
    if flags.resume:
        flags, saved = load_run(flags)
    torch.set_num_threads(flags.threads)
    open_folder(flags.out)
    old = [os.path.join(flags.out, "results.json"), best_file(flags)]
    if not saved and last_of(flags.out) and not os.path.exists(old[0]):
        raise ValueError(f"{flags.out} holds a run that is not finished: go on with --resume "
                         f"{flags.out}, or give another --out")
    job = start(flags, saved)
    for path in [] if saved or fsdp.rank() else filter(os.path.exists, old):
        os.remove(path)  # of a finished run in the same folder
    if fsdp.rank() == 0 and job["tokenizer"].endswith(".json") and not saved:
        shutil.copy(job["tokenizer"], flags.out)  # the checkpoints' own
    state, per_step = job["state"], flags.batch_size * flags.accumulate * job["context"]
    announce(flags, job, per_step)
    forward = torch.compile(job["model"]) if flags.compile else job["model"]
    log = lambda **record: None
    if fsdp.rank() == 0:
        log = Log(flags.out, asdict(flags), state["step"] if saved else None, job["device"]).write
    last = min(flags.steps, state["step"] + (flags.sitting or flags.steps))
    stop, before = [], signal.getsignal(signal.SIGINT)

    def on_interrupt(*_):  # let the step finish, so that what is saved is a whole number of steps
        stop.append(True)
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C ends at once

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        if not saved:
            checkpoint(job, flags, log)
        hide = True if fsdp.rank() else None  # None: where the output is no terminal
        with tqdm(initial=state["step"], total=flags.steps, disable=hide, mininterval=1) as bar:
            while state["step"] < last and not fsdp.mean([len(stop)])[0]:
                began = time.time()
                line = step_once(job, flags, forward)
                state["step"] += 1
                state["seconds"] += time.time() - began
                at_end = state["step"] == last
                if state["step"] % flags.log_every == 0 or at_end:
                    print_step(flags, job, line, per_step / (time.time() - began), log)
                if state["step"] % flags.eval_every == 0 or state["step"] == flags.steps:
                    checkpoint(job, flags, log)
                elif at_end:
                    save(job, flags)
                bar.update()
            if state["step"] < last:
                save(job, flags)
    finally:
        signal.signal(signal.SIGINT, before)
    if state["step"] < flags.steps:
        print(f"saved step {state['step']} of {flags.steps}; go on with: "
              f"python train.py --resume {flags.out}")
        sys.exit(130 if stop else 0)
    if flags.fsdp and not flags.lora:
        export(job, flags, os.path.join(flags.out, "last.pt"))  # the final weights in one file
    results = report(job, flags, per_step)
    if fsdp.rank() == 0:
        if flags.sparse:
            draw(job, flags)  # once more: a resumed run may have got a control
        path = write_results(flags.out, started, job["device"], **results)
        print("wrote", path, *(os.path.join(flags.out, f) for f in FIGURES if flags.sparse))


def last_of(folder):
    """The checkpoint to go on from in an --out folder, or None."""
    return fsdp.newest(os.path.join(folder, "last"))


def load_run(given):
    """(flags, contents of last.pt) of a stopped run. Other flags than the run's own: ValueError."""
    path = last_of(given.resume)
    if path is None:
        raise ValueError(f"--resume {given.resume}: there is no last.pt in it to go on from")
    saved = fsdp.read(path)
    if not isinstance(saved, dict) or not {"flags", "geco", "state"} <= saved.keys():
        raise ValueError(f"{path} is no checkpoint of a training run")
    free = ("out", "device", "threads", "log_every", "compile", "control", "fsdp",
            "recompute")  # at most rounding
    default, flags = asdict(Flags(init=given.init)), saved["flags"]
    if flags.keys() != default.keys():
        raise ValueError(f"{path} was written by another version of train.py")
    flags |= {"resume": given.resume, "sitting": given.sitting, "fsdp": given.fsdp}
    for name, value in asdict(given).items():
        if value not in (default[name], flags[name]) and name not in free:
            raise ValueError(f"--{name.replace('_', '-')} {value}: the run in {given.resume} has "
                             f"{flags[name]}; resume goes on with the flags it was started with")
        if value != default[name]:
            flags[name] = value
    return Flags(**flags | {"out": given.resume}), saved


def announce(flags, job, per_step):
    """What will happen and the numbers to expect."""
    config, state = job["model"].config, job["state"]
    n = sum(p.numel() for p in job["model"].parameters())
    trained = sum(p.numel() for p in job["model"].parameters() if p.requires_grad)
    print(f"{flags.init}: {n / 1e6:.1f}M parameters"
          + (f", {trained / 1e6:.2f}M of them in adapters and trained" if flags.lora else "")
          + f", {config.n_layer} layers x {config.n_head} heads, on {job['device']}"
          + (f", {fsdp.world()} ranks" if flags.fsdp else "")
          + f"; {flags.steps} steps of {per_step:,} tokens, context {job['context']}")
    fresh = f", ln({config.vocab_size}) = {math.log(config.vocab_size):.4f} expected"
    print(f"held-out CE at the start, dense: {state['ce_dense']['val']:.4f} nats"
          + (fresh if flags.init == "scratch" else ""))
    if flags.sparse:
        print(f"tau = {state['tau']:.4f}: the fewest open edges at a CE of at most that")


def print_step(flags, job, line, rate, log):
    """The line of a step, on screen and in log.jsonl; rate in tokens/s."""
    geco, state = job["geco"], job["state"]
    name = torch.cuda.get_device_name() if job["device"] == "cuda" else ""
    peak = next((flops * fsdp.world() for key, flops in PEAKS.items() if key in name), None)
    mfu = rate * flops_per_token(job["model"], job["context"]) / peak if peak else None
    record = {"step": state["step"], **line, "tokens_per_second": round(rate), "mfu": mfu}
    text = f"step {state['step']:6} | CE {line['ce']:.4f}"
    if flags.sparse:
        record |= {"ce_ema": geco.c, "bound": geco.tau, "lambda": geco.lam}
        text += f" ema {geco.c:.4f} bound {geco.tau:.4f} | lambda {geco.lam:8.4f}"
        text += f" | open {line['open']:7.2%}"
    text += f" | lr {line['lr']:.1e} | norm {line['norm']:5.2f} | {rate:,.0f} tok/s"
    tqdm.write(text + (f" | MFU {mfu:.1%}" if mfu else ""))
    log(**record)


def report(job, flags, per_step):
    """The numbers on test text: dense, best and last state, and the control if there is one."""
    state, test, context = job["state"], job["fixed"]["test"], job["context"]
    measure = lambda model, **how: evaluate(model.eval(), test, flags, job["amp"], job["device"], **how)
    results = {"flags": asdict(flags), "ce_dense": state["ce_dense"]["test"],
               "context_length": context, "training_seconds": round(state["seconds"], 1),
               "tokens": flags.steps * per_step,
               "tokens_per_second": round(flags.steps * per_step / state["seconds"]),
               "peak_memory_gib": peak_memory_gib(job["device"])}
    ce, share = measure(job["model"])
    if not flags.sparse:
        print(f"test CE: {results['ce_dense']:.4f} at the start, {ce:.4f} now")
        return results | {"ce": ce, "ce_val": state["trace"][-1]["val_ce"]}
    results |= {"tau": state["tau"], "ce_last": ce, "open_frac_last": share.mean().item()}
    best = state["best"]
    if best:
        path = best_file(flags)
        fsdp.put(job["model"], read_safetensors(path) if flags.lora else read_pickle(path)["model"])
    else:
        print("no state met the bound: the last one is reported; more --steps or --slack may help")
    ce, share = measure(job["model"])
    opened = share.mean().item()
    results |= {"ce_sparse": ce, "ce_sparse_sampled": measure(job["model"], sampled=True)[0],
                "open_frac": opened, "open_edges_per_query": edges_per_query(opened, context),
                "best_step": best and best["step"], "heads": share.tolist()}
    print(f"test CE: dense {results['ce_dense']:.4f}, sparse {ce:.4f}; open edges {opened:.2%}, "
          f"{results['open_edges_per_query']:.2f} a query and head at context {context}")
    if flags.control:
        results["ce_dense_control"] = read_control(flags)["ce"]
        print(f"dense control, as much training without gates: {results['ce_dense_control']:.4f}")
    return results


def read_control(flags):
    """results.json of the --no-sparse run in flags.control; it must be the same training."""
    try:
        with open(os.path.join(flags.control, "results.json")) as f:
            control = json.load(f)
        theirs, _ = control["flags"], control["ce_val"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"--control {flags.control}: no results.json of a finished --no-sparse "
                         "run is in it") from None
    theirs = asdict(Flags()) | theirs  # runs from before a flag was there have its default
    for name in ("init", "adapter", "data", "lora", "lora_mlp", "steps", "batch_size", "accumulate",
                 "context", "lr", "warmup", "weight_decay", "clip", "seed"):
        if theirs[name] != getattr(flags, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--control {flags.control} had {flag} {theirs[name]}, not "
                             f"{getattr(flags, name)}: it is no control of this run")
    return control


# -----------------------------------------------------------------------------
# figures, made again at every evaluation

FIGURES = ("ce_open.png", "heads.png", "lambda.png")


def draw(job, flags):
    """CE against open edges (Figure 2a of the paper), open edges of each head, and lambda."""
    state, trace = job["state"], job["state"]["trace"]
    opened = [100 * p["open"] for p in trace]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(opened, [p["val_ce"] for p in trace], "o-", markersize=3, label="deterministic gates")
    axis.plot(opened, [p["val_ce_sampled"] for p in trace], ".", color="0.6", label="sampled gates")
    axis.axhline(state["ce_dense"]["val"], color="black", linewidth=1, label="dense model")
    axis.axhline(state["tau"], color="black", linestyle="--", linewidth=1, label="$\\tau$")
    if flags.control:
        axis.axhline(read_control(flags)["ce_val"], color="black", linestyle=":", label="dense control")
    if state["best"]:
        axis.plot(100 * state["best"]["open"], state["best"]["val_ce"], "*", markersize=14,
                  color="tab:orange", label="best state")
    axis.set(xscale="log", xlabel=f"open attention edges (%), context {job['context']}",
             ylabel="held-out CE (nats a token)")
    axis.xaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
    axis.invert_xaxis()
    axis.legend(fontsize=9)
    save_figure(figure, os.path.join(flags.out, FIGURES[0]))

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    shares = np.array((state["best"] or trace[-1])["heads"]) * 100
    image = axis.imshow(shares.clip(0.01), cmap="viridis", norm=LogNorm(0.01, 100), origin="lower",
                        aspect="auto")
    n_layer, n_head = shares.shape
    axis.set(xlabel="head", ylabel="layer", xticks=range(n_head), yticks=range(n_layer))
    figure.colorbar(image, label="open edges (%), 0.01 or less at the bottom", format="{x:g}")
    save_figure(figure, os.path.join(flags.out, FIGURES[1]))

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    steps = [p["step"] for p in trace]
    axes[0].plot(steps, [p["val_ce"] for p in trace])
    axes[0].axhline(state["tau"], color="black", linestyle="--", linewidth=1, label="$\\tau$")
    axes[0].axhline(state["ce_dense"]["val"], color="black", linewidth=1, label="dense model")
    axes[0].legend(fontsize=9)
    axes[0].set(xlabel="step", ylabel="held-out CE (nats a token)")
    axes[1].plot(steps, opened)
    axes[1].set(xlabel="step", ylabel="open attention edges (%)", yscale="log")
    axes[1].yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
    axes[2].plot(steps, [p["lambda"] for p in trace])
    axes[2].set(xlabel="step", ylabel="multiplier $\\lambda$", yscale="log")
    axes[2].yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
    save_figure(figure, os.path.join(flags.out, FIGURES[2]))


# -----------------------------------------------------------------------------
# the command


def benchmark(flags):
    """Median tokens/s of dense and of sparse steps, taken in turn, and their ratio."""
    started = time.time()
    torch.set_num_threads(flags.threads)
    open_folder(flags.out)
    both = {kind: changed(flags, sparse=kind == "sparse") for kind in ("dense", "sparse")}
    runs = {kind: start(f) for kind, f in both.items()}
    per_step = flags.batch_size * flags.accumulate * runs["dense"]["context"]
    rates = {kind: [] for kind in runs}
    for n in range(flags.benchmark + 1):
        for kind, job in runs.items():
            began = time.time()
            step_once(job, both[kind], job["model"])
            job["state"]["step"] += 1
            if n > 0:  # the first is warm-up
                rates[kind].append(per_step / (time.time() - began))
    median = {kind: statistics.median(rate) for kind, rate in rates.items()}
    ratio = median["sparse"] / median["dense"]
    print(f"tokens/s: dense {median['dense']:,.0f}, sparse {median['sparse']:,.0f}, "
          f"ratio {ratio:.2f}")
    job = runs["sparse"]
    if fsdp.rank() == 0:
        print("wrote", write_results(flags.out, started, job["device"], tokens_per_second=median,
                                     sparse_over_dense=ratio, context_length=job["context"],
                                     config=asdict(job["model"].config)))


def main(flags):
    flags.out = flags.out or flags.resume or default_out(flags)
    if flags.dry_run:
        if flags.init == "scratch":
            raise ValueError("--dry-run needs an --init: a hub name, a folder or a checkpoint")
        return plan.show(flags, Transformer, changed(read_config(flags.init), sparse=flags.sparse))
    if not flags.fsdp:
        return work(flags)
    failed = (f"this rank ends because another one has failed; the last checkpoint is in {flags.out}: "
              f"go on with torchrun ... train.py --fsdp --resume {flags.out}")
    with fsdp.process_group(pick_device(flags.device), failed):
        if flags.batch_size % fsdp.world():
            raise ValueError(f"--batch-size {flags.batch_size} is over all ranks and must be a multiple "
                             f"of their number, {fsdp.world()}")
        work(flags)


def work(flags):
    if flags.benchmark:
        return benchmark(flags)
    if flags.control and flags.sparse and not flags.resume:
        read_control(flags)  # it must be there and fit before the long run, not after
    if flags.init == "scratch" and flags.sparse and not flags.resume:
        print("from scratch: first a dense base, then its sparse post-training; "
              "as it comes, about 5 minutes on 2 cores")
        base = os.path.join(flags.out, "dense")
        train(changed(flags, sparse=False, steps=flags.dense_steps, lr=flags.dense_lr, out=base,
                      resume=base if last_of(base) else None, distill=0.0, overfit=False, control=None))
        fsdp.wait()  # for rank 0's file
        flags = changed(flags, init=os.path.join(base, "last.pt"))
    train(flags)


def default_out(flags):
    """out/NAME of the init, a checkpoint by its folder; the dense control beside it."""
    path = os.path.abspath(flags.init) if os.path.isfile(flags.init) else flags.init.rstrip("/")
    name = os.path.basename(os.path.dirname(path) if os.path.isfile(path) else path)
    return os.path.join("out", name + "-dry-run" * flags.dry_run + "-control" * (not flags.sparse))


if __name__ == "__main__":
    run(main, Flags, __doc__)
