"""A run while it goes on: its steps, checkpoints, printed lines and report; what a step costs."""

import math
import os
import pathlib
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from plumbing import fsdp, lora
from plumbing.files import read_pickle, read_safetensors, write_pickle
from plumbing.flags import Log, pick_device, write_results
from plumbing.flags import replace as replace_file
from plumbing.folders import remove_old
from plumbing.tokens import TOKENIZERS


class Run:
    """The folder of a run that goes on: counts steps, prints and logs lines, writes checkpoints.

    On ranks other than 0 it writes nothing but its part of a sharded checkpoint.
    """

    def __init__(self, flags, device, context, saved=None, base=None, bar=None, more=False):
        self.flags, self.device, self.context, self.base, self.more = flags, device, context, base, more
        if saved and saved.get("base", base) != base:
            raise ValueError(f"--resume: {flags.init} has other weights than when the run began")
        self.bar = bar or progress([])
        self.first, self.last = saved["step"] if saved else 0, flags.steps
        self.seconds, self.rates = saved["seconds"] if saved else 0.0, []  # tokens/s of this sitting's steps
        self.log = lambda **_: None
        if fsdp.rank() == 0:
            self.log = Log(flags.out, asdict(flags), self.first if saved else None, device).write

    def begin(self, tokenizer):
        """Remove what an earlier run left; a tokenizer.json goes beside the checkpoints."""
        if fsdp.rank() == 0:
            path = os.path.join(tokenizer, "tokenizer.json") if os.path.isdir(tokenizer) else tokenizer
            content = None if tokenizer in TOKENIZERS else pathlib.Path(path).read_bytes()
            remove_old(self.flags.out)
            if content:
                replace_file(os.path.join(self.flags.out, "tokenizer.json"),
                             lambda temporary: pathlib.Path(temporary).write_bytes(content))

    def announce(self, model, ce_dense, tau):
        """What will happen. ce_dense: of held-out text, before training."""
        flags, vocabulary = self.flags, model.config.vocab_size
        print(f"{flags.init}: {size_of(model)} on {self.device}, {fsdp.world()} rank(s); {flags.steps} steps of "
              f"{flags.batch_size * flags.accumulate * self.context:,} tokens, context {self.context}\n"
              f"held-out CE at the start, dense: {ce_dense:.4f} nats; a model that knows nothing has "
              f"ln({vocabulary}) = {math.log(vocabulary):.4f}")
        if flags.dtype == "bfloat16" and self.device == "cpu" and not has_bfloat16():
            print("note: this CPU has no bfloat16 arithmetic, so that --dtype float32 is several times faster")
        if flags.sparse:
            print(f"tau = {tau:.4f} at the end: the fewest open edges at a held-out {flags.bound} of at most that")

    def steps(self):
        """The numbers of the steps to do: to the end of the run or the sitting, or until Ctrl-C.

        Ctrl-C lets the step finish, so that what is saved is a whole number of steps. At the end
        self.last is the number of steps done.
        """
        interrupts, before = [], signal.getsignal(signal.SIGINT)

        def on_interrupt(*_):
            interrupts.append(True)
            signal.signal(signal.SIGINT, before)  # a second Ctrl-C ends at once

        signal.signal(signal.SIGINT, on_interrupt)
        end = min(self.flags.steps, self.first + (self.flags.sitting or self.flags.steps))
        try:
            for step in range(self.first, end):
                yield step
                self.bar.update(SPARSE_STEP if self.flags.sparse else 1)
                self.last = step + 1
                if fsdp.mean([len(interrupts)])[0]:
                    break
        finally:
            signal.signal(signal.SIGINT, before)
        self.exit_code = 130 if interrupts else 0

    def require_finite(self, step, **numbers):
        """ValueError if training has gone wrong: nan and inf do not heal."""
        if not all(map(math.isfinite, numbers.values())):
            found = ", ".join(f"the {name.replace('_', ' ')} is {x}" for name, x in numbers.items())
            raise ValueError(f"step {step}: {found}; the last good checkpoint is in {self.flags.out}: "
                             "try a lower --lr")

    def line(self, step, began, model, **numbers):
        """Print and log what a step did: numbers by name; it began at time.time() == began."""
        seconds = time.time() - began
        self.seconds += seconds
        rate = self.flags.batch_size * self.flags.accumulate * self.context / seconds
        self.rates.append(rate)
        numbers |= {"mfu": mfu(model, self.context, rate, self.device)}
        self.log(step=step, **numbers, tokens_per_second=round(rate))
        formats = {"open": "{:.2%}", "lr": "{:.1e}", "mfu": "{:.1%}"}
        cells = [f"{name} {formats.get(name, '{:.4f}').format(x)}" for name, x in numbers.items() if x is not None]
        if step % 10 == 0 or step == self.flags.steps:
            tqdm.write(f"step {step:6} | " + " | ".join(cells) + f" | {rate:,.0f} tokens/s")

    def save(self, step, model, optimizer, geco, **plain):
        """All that --resume needs: last.pt, or the folder last with a file of each rank. With --lora the adapter, too."""
        if self.flags.lora and not plain["best"]:
            self.export("last", step, model)
        fsdp.save(os.path.join(self.flags.out, "last"), model, optimizer, self.flags.lora > 0, self.flags.fsdp,
                  config=asdict(model.config), flags=asdict(self.flags), geco=geco.state_dict(), step=step,
                  seconds=self.seconds, base=self.base, **plain)

    def export(self, name, step, model):
        """The model in one file NAME.pt that from_pretrained opens; with --lora the adapter."""
        weights = fsdp.whole_model(model, trained_only=self.flags.lora > 0)
        if fsdp.rank() == 0 and self.flags.lora:
            lora.save(self.adapter, weights, self.base, model.config)
        elif fsdp.rank() == 0:
            write_pickle(os.path.join(self.flags.out, f"{name}.pt"),
                         {"config": asdict(model.config), "model": weights, "step": step})

    def reload(self, model):
        """The adapter, or best.pt, back into the model."""
        fsdp.put(model, read_safetensors(self.adapter) if self.flags.lora
                 else read_pickle(os.path.join(self.flags.out, "best.pt"))["model"])

    def costs(self):
        """What the run was and what it took, for results.json."""
        tokens = self.flags.steps * self.flags.batch_size * self.flags.accumulate * self.context
        return {"flags": asdict(self.flags), "context_length": self.context, "tokens": tokens,
                "tokens_per_second": round(tokens / self.seconds),
                "median_tokens_per_second": round(statistics.median(self.rates or [tokens / self.seconds])),
                "training_seconds": round(self.seconds, 1), "peak_memory_gib": peak_memory(self.device)}

    def report(self, model, measure, copies, best, trace):
        """Losses and open edges on test text: of the last state, and of the best one, which it loads.

        measure(model, sampled=False): train.py's evaluate on the test blocks; copies(model): what
        copying.accuracy finds.
        """
        if self.flags.lora and not best:  # what is reported is what the file gives, in bfloat16
            fsdp.wait()  # for rank 0's file
            self.reload(model)
        elif self.flags.fsdp and not self.flags.lora:
            self.export("last", self.flags.steps, model)  # the final weights in one file
        last = measure(model)
        if not self.flags.sparse:
            return {"ce": last["ce"], "ce_val": trace[-1]["ce"], "copying": copies(model),
                    "trace": [[point["step"], point["ce"]] for point in trace]}
        if best:
            self.reload(model)
        else:
            print("no state met the bound: the last one is reported; more --steps or --slack may help")
        kept, sampled = measure(model), measure(model, sampled=True)
        per_query = kept["open"] * (self.context + 1) / 2  # a query sees (context + 1) / 2 keys on average
        print(f"open edges {kept['open']:.2%}, {per_query:.2f} a query and head at context {self.context}")
        return {"copying_sparse": copies(model), "ce_sparse": kept["ce"], "ce_sparse_sampled": sampled["ce"], "kl_sparse": kept.get("kl"),
                "open_frac": kept["open"], "open_edges_per_query": per_query, "heads": kept["heads"],
                "best_step": best and best["step"], "ce_last": last["ce"], "open_frac_last": last["open"]}

    @property
    def adapter(self):
        return os.path.join(self.flags.out, "adapter.safetensors")

    def leave(self, step):
        """The end of a sitting before the last step."""
        again = "the same command" + " without --overwrite" * self.flags.overwrite
        how = again if self.more else f"python train.py --resume {self.flags.out}"  # which knows of no run after it
        print(f"saved step {step} of {self.flags.steps}; go on with: {how}")
        sys.exit(self.exit_code)


SPARSE_STEP = 1.5  # how many dense steps take as long as a sparse one, about


def progress(todo):
    """One bar for several runs, (flags, checkpoint) each, with the time left for all of them."""
    weights = [SPARSE_STEP if flags.sparse else 1 for flags, _ in todo]
    total, done = (sum(weight * steps for weight, steps in zip(weights, counts)) for counts in (
        [flags.steps for flags, _ in todo], [saved["step"] if saved else 0 for _, saved in todo]))
    hide = True if fsdp.rank() or not todo else None  # None: where the output is no terminal
    return tqdm(total=total, initial=done, disable=hide, mininterval=1, smoothing=0.05,
                bar_format="{percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left")


def print_results(results):
    """Loss on test text and accuracy of copying by period, of each model that the run compared."""
    for name, ce in results.items():
        if name in ("ce", "ce_dense", "ce_dense_control", "ce_sparse"):
            copied = results["copying" + name.removeprefix("ce")]
            print(f"{name:16} {ce:.4f} nats a token on test text" + "; copying, % by period:" * bool(copied),
                  *(f"{period} {100 * share:.0f}" for period, share in copied.items()))


def has_bfloat16():
    """Does this CPU multiply bfloat16 by itself? Where it does not say, yes."""
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or found["avx512_bf16"] or found["amx_bf16"]


def size_of(model):
    """How large the model is, in words."""
    n, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (1, 0))
    return f"{n / 1e6:.1f}M parameters" + (f", {trained / 1e6:.2f}M of them trained" if trained < n else "")


def benchmark(flags, train):
    """Median tokens/s of dense and of sparse steps, by short runs of `train` in turn, and their ratio."""
    started, rates, out = time.time(), {"dense": [], "sparse": []}, os.path.join(flags.out, "steps")
    for kind in ("dense", "sparse") * 3:
        short = replace(flags, sparse=kind == "sparse", steps=flags.benchmark, out=out)
        rates[kind].append(train(short)["median_tokens_per_second"])
    median = {kind: statistics.median(rate) for kind, rate in rates.items()}
    ratio = median["sparse"] / median["dense"]
    print(f"tokens/s: dense {median['dense']:,.0f}, sparse {median['sparse']:,.0f}, ratio {ratio:.2f}")
    fsdp.wait()
    if fsdp.rank() == 0:
        shutil.rmtree(out)
        print("wrote", write_results(flags.out, started, pick_device(flags.device),
                                     flags=asdict(flags), tokens_per_second=median, sparse_over_dense=ratio))


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12}  # bfloat16 FLOPS


def mfu(model, context, tokens_per_second, device):
    """Share of the GPUs' peak that the dense model's arithmetic takes; None where it is not known.

    Forward and backward: 6 FLOPs a parameter and token, and 12 C context a layer.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((flops for key, flops in PEAKS.items() if key in name), None)
    if peak is None:
        return None
    n = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("wpe"))
    flops = 6 * n + 12 * model.config.n_layer * model.config.n_embd * context
    return tokens_per_second * flops / (peak * fsdp.world())


def peak_memory(device="cpu"):
    """The most GiB held so far: of the GPU, or of this process on a CPU; None where nobody says."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 2**20 for line in status if line.startswith("VmHWM"))
    except OSError:  # only Linux says
        return None
