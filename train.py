"""
Sparse post-training of a language model: the fewest open attention edges at the dense loss.

    python train.py                              a small model that learns to copy: dense, control, sparse; 14 minutes
    python train.py --init gpt2                  the main job: GPT-2 124M on web text
    python train.py --init FOLDER --data a.txt   local weights and text
    python train.py --init gpt2 --no-sparse      the dense control: same data and steps, no gates
    python train.py --resume out/gpt2            go on where a run was stopped
    torchrun --nproc-per-node 8 train.py --init meta-llama/Llama-3.2-1B --data a.txt --fsdp

It measures the dense model's cross-entropy (CE) on held-out text and sets tau = CE + slack; with a
dense control tau follows the CE that this had after as many steps. The slack is larger at first: edges
leave, then the model learns to do without them. Then it trains on, with sampled gates in the first half
of the steps and deterministic ones in the second: it minimises the expected share of open edges E
subject to CE <= tau. Training text moves the weights; held-out text, which is not learnt by heart, moves
the multiplier (geco.py). The sparsest state within tau is kept as best.pt and reported on test text.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from geco import GECO
from model import Config, Transformer
from plumbing import copying, figures, folders, fsdp, lora, plan, runs, tasks, tokens, weights
from plumbing.flags import check, open_folder, pick_device, run as run_script, write_results
from sparse import fold_in


@dataclass
class Flags:
    # what to read and to write
    init: str = "scratch"  # hub name, Hugging Face folder, checkpoint, or scratch
    adapter: str | None = None  # adapter.safetensors of a --lora run, added to --init; with --lora its training goes on
    data: str | None = None  # fineweb (GPT-2's default), python-docs (others'), a prepared folder, or .txt files with commas
    tokenizer: str | None = None  # gpt2, bytes or a tokenizer.json; default: the model's own
    out: str | None = None  # folder for checkpoints, results.json, log.jsonl and figures
    overwrite: bool = False  # write over the run that --out holds
    resume: str | None = None  # the --out folder of a stopped run: go on with its flags
    control: str | None = None  # --out folder of the dense control: tau follows its loss
    # the model, from scratch only
    n_layer: int = 4  # layers
    n_head: int = 8  # heads a layer
    n_embd: int = 128  # width
    position: str = "rope"  # rope or learned: how the model knows which token is where
    dense_steps: int = 4000  # steps of dense training before the sparse ones
    repeat: float | None = None  # share of sequences with pieces to copy; default .5 from scratch, else 0
    # the method
    sparse: bool = True  # gates and penalty; --no-sparse is the dense control
    gate_bias: float | None = None  # b: open with sigmoid(s + b); default -8 from scratch, else the init's own or 2
    bound: str = "ce"  # what is bounded: ce, or kl, the divergence KL(dense model, sparse model)
    slack: float = 0.025  # tau = CE of the control, else of the dense model, + slack; for kl slack; nats
    tau: float | None = None  # the bound itself, instead of --slack
    lam_max: float = 0.5  # the multiplier at the start, and its limit (geco.py); higher, if a bound stays out of reach
    noisy: float = 0.5  # share of the steps, at the beginning, with noise in the gates
    lora: int = 0  # rank of adapters on the blocks' matrices, all else frozen; 0: train everything
    # the steps
    steps: int = 3600  # optimiser steps
    lr: float | None = None  # highest learning rate; default 2e-3 from scratch, else 1e-4
    context: int | None = None  # tokens a sequence; default 1024 or what the model takes
    batch_size: int = 8  # sequences in memory at a time, over all ranks
    accumulate: int = 1  # gradient accumulation: batches a step
    seed: int = 0  # of weights, data order and gates
    # running
    device: str = "auto"  # cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 autocast; auto: bfloat16 on CUDA
    fsdp: bool = False  # shard over the processes of torchrun
    recompute: bool = False  # activation checkpointing: less memory, a third more time
    eval_every: int = 200  # steps between evaluations and checkpoints
    sitting: int | None = None  # stop after this many steps; --resume goes on
    dry_run: bool = False  # only print parameters and memory per rank
    benchmark: int = 0  # only time this many steps, dense and sparse in turn

    def __post_init__(self):
        check(self, {
            "n_layer n_head n_embd dense_steps steps context batch_size accumulate eval_every sitting": "at least 1",
            "slack lora benchmark": "not negative", "lr tau": "positive", "lam_max": "at least 0.01", "gate_bias": "finite",
            "seed": "below 2^62", "repeat noisy": "from 0 to 1", "bound": "ce | kl", "position": "rope | learned",
            "device": "auto | cpu | cuda | mps", "dtype": "auto | float32 | bfloat16",
        })
        self.lr = self.lr or (2e-3 if self.init == "scratch" else 1e-4)
        self.repeat = (0.5 if self.init == "scratch" else 0.0) if self.repeat is None else self.repeat
        for wrong, message in (
                (self.bound == "kl" and not self.slack, "--bound kl needs a --slack above 0"),
                (self.lora and self.init == "scratch", "--lora needs a trained --init"),
                (self.lora and self.adapter and not self.sparse, "--adapter with --lora trains gates on: leave --no-sparse out"),
                (self.adapter and self.init == "scratch", "--adapter needs the --init that it was trained on"),
                (self.dry_run and self.init == "scratch", "--dry-run needs an --init: a name, folder or file")):
            if wrong:
                raise ValueError(message)


DENSE_LR = 3e-3  # highest learning rate of the dense base from scratch
LOOK_EVERY = 4  # steps between held-out batches for the multiplier: a tenth of the time
LOOSE = 8  # times --slack is the slack at first; it falls between 10% and 70% of the steps
EVAL_SEQUENCES = 64  # held-out, and test, sequences of an evaluation

# -----------------------------------------------------------------------------
# the parts of a run


def starting_point(flags):
    """(Config, {name: tensor}) of the model to start from, with its gates if there are to be any."""
    if flags.init == "scratch":
        torch.manual_seed(flags.seed)
        vocabulary = tokens.tokenizer(flags.tokenizer or "bytes").vocab_size
        # GPT-2's init_std of 0.02 suits wider models; with it this one begins to copy much later
        config = Config(flags.context or 128, vocabulary, flags.n_layer, flags.n_head, n_embd=flags.n_embd,
                        position=flags.position, init_std=0.06)
        named = Transformer(config).state_dict()
    else:
        fields, named = fsdp.first_on_each_machine(lambda: weights.read_model(flags.init, flags.adapter, merge=not flags.lora))
        config = Config(**fields)
    if config.sparse and flags.sparse and (flags.tau is None or flags.bound == "kl") and not (flags.lora and flags.adapter):
        raise ValueError(f"{flags.adapter or flags.init} is sparse already, so it has no dense loss: give the bound itself, --tau, of --bound ce")
    own = config.gate_bias if config.sparse else 2.0  # most gates begin open, so the model is nearly as it was
    bias = (own if flags.gate_bias is None else flags.gate_bias) if flags.sparse else 0.0
    return replace(config, sparse=flags.sparse, gate_bias=bias), named


def build(flags, config, named, device, half):
    """The model on its device: the whole of it, or this rank's shards with --fsdp."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config)
    if flags.lora:
        named = lora.add(model, flags.lora, flags.seed, named) | named  # those of --adapter stay
    model.recompute = flags.recompute
    if flags.fsdp:
        return fsdp.shard(model, named, device, half)
    model = model.load_weights(named).to(device)
    return lora.halve(model) if flags.lora and half else model


def learning_rate(step, flags):
    """Linear warm-up over a tenth of the steps, at most 100; then a cosine to a tenth."""
    warmup = min(100, max(1, flags.steps // 10))
    done = max(0.0, (step - warmup) / max(1, flags.steps - warmup))
    return flags.lr * min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * done))


def losses(model, teacher, idx, targets, seed=None):
    """CE, the loss that is bounded (CE again, or KL(teacher, model)), both nats a token, and the edges."""
    if teacher is None:
        _, ce, edges = model(idx, targets, seed=seed, logits=False)
        return ce, ce, edges
    with torch.no_grad():
        dense, *_ = teacher(idx)
    _, (ce, kl), edges = model(idx, targets, seed=seed, logits=False, dense=dense)
    return ce, kl, edges


@torch.no_grad()
def evaluate(model, blocks, batch_size, amp, teacher=None, sampled=False):
    """{ce, kl (with a teacher), open, heads (n_layer, n_head)}: means over blocks (idx, targets).

    Losses in nats a token; open: the share of open gates, deterministic ones or `sampled` with fixed
    seeds; heads: of each head. The ranks share the work.
    """
    count, counted, totals, device = len(blocks[0]), (blocks[1] != -1).sum(), 0.0, model.wte.weight.device
    for n in range(0, count, batch_size):
        rows = torch.arange(n + fsdp.rank(), min(n + batch_size, count), fsdp.world())
        share, part = len(rows) / count, (blocks[1][rows] != -1).sum() / counted  # of sequences, of targets
        rows = rows if len(rows) else torch.tensor([0])  # all ranks must run, to gather the weights
        idx, targets = (x[rows].to(device) for x in blocks)
        with amp():
            seeds = fold_in(-1, rows) if sampled else None
            ce, kl, edges = losses(model, teacher, idx, targets, seeds)
        found = [share * kl] + ([] if edges is None else (share * edges.open).flatten().tolist())
        totals = totals + torch.tensor([part * ce, *found], dtype=torch.float64)
    ce, kl, *heads = fsdp.total(totals)
    found = {"ce": ce} | ({"kl": kl} if teacher else {})
    if heads:
        found |= {"open": sum(heads) / len(heads),
                  "heads": torch.tensor(heads).view(-1, model.config.n_head).tolist()}
    return found


# -----------------------------------------------------------------------------
# one run: the dense base, the control, or the sparse model


def train(flags, saved=None, bar=None, more=False):
    """A run to its end, or the rest of one that `saved` holds: fills flags.out, returns the results.

    bar: of several runs; more: others come after this one.
    """
    started = time.time() - (saved["seconds"] if saved else 0.0)  # the steps of earlier sittings count
    device = pick_device(flags.device)
    open_folder(flags.out)
    half = flags.dtype == "bfloat16" or (flags.dtype == "auto" and device == "cuda")
    amp = partial(torch.autocast, device, dtype=torch.bfloat16, enabled=half)

    # data: training text, with copies if --repeat says so; held-out text; test text, for the report alone
    config, named = starting_point(flags)  # named: {name: tensor}
    context = flags.context or min(1024, config.block_size)
    tokenizer = tokens.name_for(config.vocab_size, flags.tokenizer, flags.init)
    per_step = flags.batch_size * flags.accumulate * context
    data = fsdp.first_on_each_machine(lambda: tokens.load_data(flags.data, tokenizer, flags.steps * per_step))
    order = fold_in(flags.seed, flags.init == "scratch").item()  # the base does not begin with the same
    tok = tokens.tokenizer(tokenizer)
    alphabet = tasks.usable(tok) if flags.repeat else ()
    blocks = tokens.Blocks(data["train"], context, order, flags.repeat, alphabet, fill=flags.init == "scratch")
    fixed = {split: tokens.Blocks(data[split], context).evenly(EVAL_SEQUENCES) for split in ("val", "test")}
    fingerprint = folders.fingerprint(blocks, fixed, saved)

    # model, and beside it the dense one: to bound the divergence, or to measure it where --adapter has changed the weights
    model, dense_model = build(flags, config, named, device, half), None
    if flags.sparse and (flags.bound == "kl" or (flags.lora and flags.adapter)):
        apart = {name: t.clone() for name, t in named.items() if "lora" not in name}  # training changes `named`
        dense_model = build(replace(flags, lora=0), replace(config, sparse=False), apart, device, half)
    teacher = dense_model if flags.bound == "kl" else None
    measure = partial(evaluate, batch_size=flags.batch_size, amp=amp)
    copies = partial(copying.accuracy, tok=tok, context=context if flags.repeat else 0, amp=amp)
    right = partial(tasks.accuracies, asked=tasks.asked(tok), amp=amp)  # on tasks of text, along the way
    if saved:
        dense, best, trace, reached = (saved[name] for name in ("dense", "best", "trace", "reached"))
    else:
        model.config.sparse, before = False, dense_model or model  # the weights that the gates are put on, or the base
        dense = {split: measure(before, fixed[split])["ce"] for split in fixed}
        dense |= {"copying": copies(before), "accuracy": right(before)}
        model.config.sparse = flags.sparse
        best, trace = None, [{"step": 0} | measure(model, fixed["val"], teacher=dense_model) | {"accuracy": right(model)}]
    control = folders.read_control(flags.control, flags, dense["test"]) if flags.control else None
    if not saved:  # [step, nats]: what the control had reached by then, else what this model has
        reached = [[0, 0.0]] if teacher else control["trace"] if control else [[0, dense["val"]]]
    # loose at first, so that edges leave; then the sparse model learns to do without them
    slack = lambda step: flags.slack * LOOSE ** min(1, max(0, (0.7 - step / flags.steps) / 0.6))
    tau = lambda step: flags.tau or slack(step) + float(np.interp(step, *zip(*reached)))

    # optimiser and multiplier, which looks at one step in LOOK_EVERY and so moves further at a time
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and (p.dim() > 1) == decays],
               "weight_decay": 0.1 * decays} for decays in (True, False)]  # matrices decay, vectors do not
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999 if flags.lora else 0.95), fused=True)  # adapters: small batches
    geco = GECO(tau(0), nu=0.01 * LOOK_EVERY, ema=0.95**LOOK_EVERY, lam=flags.lam_max, lam_max=flags.lam_max)
    if saved:
        fsdp.load(saved, model, optimizer, trained_only=flags.lora > 0)
        geco.load_state_dict(saved["geco"])

    # the folder, and what will happen there
    run = runs.Run(flags, device, context, saved, lora.fingerprint(named) if flags.lora else None, bar, more)
    save = partial(run.save, model=model, optimizer=optimizer, geco=geco, dense=dense, reached=reached,
                   fingerprint=fingerprint)
    if not saved:
        run.begin(tokenizer)
        save(0, best=best, trace=trace)
    run.announce(model, dense["val"], tau(flags.steps))
    size = flags.batch_size // fsdp.world()  # sequences of this rank at a time

    for step in run.steps():
        began, ce_mean, open_mean = time.time(), 0.0, 0.0
        geco.tau = tau(step)
        optimizer.zero_grad()
        for part in range(flags.accumulate):
            # a batch of training text, and a seed of gate noise a sequence; late gates have none
            first = (step * flags.accumulate + part) * flags.batch_size + fsdp.rank() * size
            idx, targets = (x.to(device) for x in blocks.batch(first, size))
            seeds = fold_in(flags.seed, torch.arange(first, first + size)).to(device)
            seeds = seeds if step < flags.steps * flags.noisy else None

            # minimise the expected share of open edges, subject to a bound on the loss
            with amp():
                ce, constraint, edges = losses(model, teacher, idx, targets, seeds)
            loss = geco.loss(edges.prob.mean(), constraint) if flags.sparse else ce
            (loss / flags.accumulate).backward()
            ce_mean += ce.item() / flags.accumulate
            open_mean += edges.open.mean().item() / flags.accumulate if flags.sparse else 1.0

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = (norm.full_tensor() if flags.fsdp else norm).item()
        ce_mean, open_mean = fsdp.mean([ce_mean, open_mean])
        run.require_finite(step + 1, loss=ce_mean, gradient=norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, flags)
        optimizer.step()

        # the multiplier: does the bound hold on text that the weights are not trained on?
        if flags.sparse and step % LOOK_EVERY == 0:
            first = step // LOOK_EVERY * flags.batch_size + fsdp.rank() * size
            rows = torch.arange(first, first + size) % len(fixed["val"][0])  # those that tau is from, in turn
            idx, targets = (x[rows].to(device) for x in fixed["val"])
            with torch.no_grad(), amp():
                _, constraint, _ = losses(model, teacher, idx, targets)  # deterministic gates, as they will be used
            constraint = fsdp.mean([constraint])[0]  # so that lambda is the same on every rank
            run.require_finite(step + 1, held_out_loss=constraint)
            geco.update(constraint)
        run.line(step + 1, began, model, ce=ce_mean, norm=norm, lr=learning_rate(step, flags),
                 **({"held_out": geco.c, "lambda": geco.lam, "open": open_mean} if flags.sparse else {}))

        # every so often: evaluate, keep the sparsest state within the bound, save
        if (step + 1) % flags.eval_every == 0 or step + 1 == flags.steps:
            point = {"step": step + 1} | measure(model, fixed["val"], teacher=dense_model) | {"accuracy": right(model)}
            run.require_finite(step + 1, held_out_loss=point["ce"])
            if flags.sparse:
                point |= {"lambda": geco.lam, "ce_sampled": measure(model, fixed["val"], sampled=True)["ce"]}
                if point[flags.bound] <= tau(flags.steps) and (best is None or point["open"] < best["open"]):
                    best = point
                    run.export("best", step + 1, model)
            trace.append(point)
            run.log(**{f"val_{name}": value for name, value in point.items()} | {"step": step + 1})
            save(step + 1, best=best, trace=trace)

    if run.last < flags.steps:  # the end of a sitting, or Ctrl-C
        save(run.last, best=best, trace=trace)
    if flags.sparse and fsdp.rank() == 0:
        figures.draw_training(flags.out, trace, best, flags.bound, tau(flags.steps), dense["val"], control, context)
    if run.last < flags.steps:
        run.leave(run.last)
    results = run.costs() | {"tau": tau(flags.steps), "ce_dense": dense["test"], "copying_dense": dense["copying"],
                             "accuracy_dense": dense.get("accuracy"),  # checkpoints of older versions have none
                             "accuracy": [[point["step"], point.get("accuracy")] for point in trace]}
    results |= {"ce_dense_control": control["ce"], "copying_dense_control": control["copying"]} if control else {}
    results |= run.report(model, partial(measure, blocks=fixed["test"], teacher=dense_model), copies, best, trace)
    runs.print_results(results)
    if fsdp.rank() == 0:
        print("wrote", write_results(flags.out, started, device, **results))
    return results


# -----------------------------------------------------------------------------
# the command


def phases(flags):
    """The runs that a model from scratch takes: dense base, dense control, and what was asked for."""
    dense = replace(flags, sparse=False, gate_bias=None, bound="ce", slack=Flags.slack, tau=None, control=None)
    base = replace(dense, steps=flags.dense_steps, lr=DENSE_LR, out=f"{flags.out}/dense")
    bias = -8.0 if flags.gate_bias is None else flags.gate_bias  # few gates begin open; the high lr opens what it needs
    last = replace(flags, init=f"{base.out}/last.pt", gate_bias=bias)
    if not flags.sparse or flags.control:
        return [base, last]
    control = replace(dense, init=last.init, out=f"{flags.out}/control")
    return [base, control, replace(last, control=control.out)]


def main(flags):
    flags, saved = folders.resume(flags) if flags.resume else (flags, None)
    flags.out = flags.out or folders.default_out(flags)
    if not saved:
        folders.check_folder(flags)
    if flags.dry_run:
        return plan.show(flags, Transformer, Config(**weights.read_fields(flags.init) | {"sparse": flags.sparse}))
    with fsdp.process_group(flags.fsdp, pick_device(flags.device), flags.out, flags.batch_size):
        if flags.benchmark:
            return runs.benchmark(flags, train)
        from_scratch = flags.init == "scratch" and not saved
        todo = folders.unfinished(phases(flags)) if from_scratch else [(flags, saved)]
        with runs.progress(todo) as bar:
            for part, saved in todo:
                train(part, saved, bar, more=part is not todo[-1][0])
                fsdp.wait()  # for rank 0's files


if __name__ == "__main__":
    run_script(main, Flags, __doc__)
