"""
Two-digit addition, from nothing to a circuit that can be read: Figure 1 of arXiv 2512.05865.

    read    3 6 + 2 8 = ? ? ? ? ?       11 characters, all positions see all others
    answer              0 0 0 6 4       five digits at the placeholders, in parallel

A small transformer learns it with ordinary dense attention. Then the same weights are trained on
with a gate on every attention edge: fewest open edges, at the loss of the dense model plus a
slack. What is left is the algorithm: units and tens read the two digits they add, layer 1 reads the carries.

    python addition_toy.py          one seed and the figures; --seeds 10: seeds 0 to 9
"""

import copy
import math
import time
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm

from geco import GECO
from model import Config, Transformer
from plumbing import figures
from plumbing.addition import carry_table, describe
from plumbing.flags import Log, check, in_processes, results_folder, run, write_results
from plumbing.tasks import ANSWER, CHARACTERS, problems
from sparse import fold_in, gate_map


@dataclass
class Flags:
    out: str = "out/addition"  # folder for results.json, log.jsonl, models and figures
    seed: int = 0  # of the weights, the batches and the gates
    seeds: int = 1  # how many runs: seed, seed + 1, ...
    tries: int = 6  # at most so many dense models are trained and post-trained; the sparsest is kept
    enough: float = 6.0  # with so few open edges a problem neither a wave nor a try follows
    n_layer: int = 2  # layers
    n_head: int = 1  # attention heads a layer
    n_embd: int = 32  # width
    dense_steps: int = 1800  # steps of dense training
    waves: int = 5  # at most so many times the bound of a try is loosened, then tightened
    steps: int = 1000  # steps of sparse post-training, a wave
    gate_bias: float = 2.0  # b: open probability sigmoid(s + b)
    slack: float = 4e-3  # tau = the dense model's CE + slack, nats a digit
    loose: float = 0.3  # the bound on CE at the start, nats a digit; a third of it once a state qualifies

    def __post_init__(self):
        check(self, {"seeds tries waves n_layer n_head n_embd dense_steps steps": "at least 1",
                     "slack loose enough": "positive", "gate_bias": "finite", "seed": "below 2^62"})
        self.config()  # it has checks of its own

    def config(self):
        return Config(block_size=11, vocab_size=len(CHARACTERS), n_layer=self.n_layer, n_head=self.n_head,
                      n_embd=self.n_embd, causal=False, tied_head=False, gate_bias=self.gate_bias, init_std=0.17)


# -----------------------------------------------------------------------------
# the problems; plumbing/tasks.py has them, because patching.py asks them too

# 1,000 of the problems, always the same, are kept from training and from the choice of a state
HELD_OUT = torch.randperm(10000, generator=torch.Generator().manual_seed(2025)).argsort() < 1000
BATCH = 128  # problems a step of training


@dataclass
class Evaluation:
    exact: float  # share of the N problems whose whole answer is right
    ce: float  # nats a digit
    open_edges: float  # open gates a problem, over all layers, heads and positions
    answers: torch.Tensor  # (N, 5) int64, the digits
    gates: torch.Tensor  # (N, n_layer, n_head, 11, 11) bool, [to, from]; all open in a dense model
    weights: torch.Tensor  # of the same shape: a of sparse.py where the gate is open, else 0


@torch.no_grad()
def evaluate(model, idx, targets):
    """The Evaluation of a model on N problems, with deterministic gates."""
    tensors, gates, weights = {}, [], []

    def tap(name, t):
        if name.endswith(("attn.q", "attn.k")):
            tensors[name] = t
        return t

    logits, loss, _ = model(idx, targets, tap=tap)
    bias = model.config.gate_bias if model.config.sparse else 1e9
    for l in range(model.config.n_layer):
        q, k = (tensors[f"h{l}.attn.{x}"].transpose(1, 2) for x in "qk")  # (N, n_head, 11, D)
        gates.append(gate_map(q, k, bias, causal=False))
        weights.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) * gates[-1])
    gates, weights = torch.stack(gates, dim=1), torch.stack(weights, dim=1)
    answers = logits[:, ANSWER].argmax(-1)
    exact = (answers == targets[:, ANSWER]).all(-1).double().mean().item()
    return Evaluation(exact, loss.item(), gates.sum().item() / len(idx), answers, gates, weights)


# -----------------------------------------------------------------------------
# dense training


def batch(step, seed, idx):
    """The numbers of this step's problems, of idx (N, 11): int64 (BATCH,), a function of (seed, step).

    Problems whose tens add up to nine come five times as often: only there a carry goes through two
    digits. They are a tenth, and training forgets what a mean over problems hardly sees.
    """
    generator = torch.Generator().manual_seed(fold_in(seed, step).item())
    chances = 1.0 + 4.0 * (idx[:, 0] + idx[:, 3] == 9)  # a digit's token is the digit
    return torch.multinomial(chances, BATCH, replacement=True, generator=generator)


def make_optimizer(model):
    """AdamW; matrices decay, vectors and embeddings do not."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        (decay if p.dim() > 1 and name[:3] not in ("wte", "wpe") else rest).append(p)
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def descend(optimizer, loss, step, steps, lr):
    """One step down the gradient. The rate warms up, stays at lr, then falls to 2% of it."""
    warm, falling = min(1, (step + 1) / 50), max(0, 2 * step / steps - 1)
    for group in optimizer.param_groups:
        group["lr"] = lr * warm * (0.51 + 0.49 * math.cos(math.pi * falling))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def layer_0_alone(name, t):
    """A tap: the attention of the layers above layer 0 writes nothing."""
    return torch.zeros_like(t) if name.endswith("attn.out") and name != "h0.attn.out" else t


def train_dense(flags, seed, idx, targets):
    """A dense model that adds; ordinary cross-entropy.

    In the first three tenths of the steps there is attention in layer 0 alone, so an answer place must
    read its digits itself. Else sums grow at other places, and to fetch them takes more edges.
    """
    torch.manual_seed(seed)
    model = Transformer(flags.config())
    optimizer = make_optimizer(model)
    for step in range(flags.dense_steps):
        rows = batch(step, seed, idx)
        _, ce, _ = model(idx[rows], targets[rows], tap=layer_0_alone if step < 0.3 * flags.dense_steps else None)
        descend(optimizer, ce, step, flags.dense_steps, lr=3e-3)
    return model


# -----------------------------------------------------------------------------
# sparse training: the same weights, with gates, under the constraint


def train_sparse(flags, seed, dense, tau, idx, targets):
    """The dense model's weights, trained on for the fewest open edges at CE <= tau.

    A shut edge gets next to no gradient, so a circuit that works but has a spare part stays as it is.
    The bound is therefore loose at first: edges leave, some of them needed. As it tightens, the cheapest
    way to add is found again. That is a wave. More follow until `enough`: from the sparsest state that
    qualifies, a third as loose; until there is one, anew from the dense model. Every 100 steps a state
    qualifies if with deterministic gates CE <= tau and 99.95% of the training problems are right. Returns
    the sparsest that does, its edges and all measurements; if none does, the last model and inf.
    """
    best, fewest, trace = None, math.inf, []
    for wave in range(flags.waves):
        model = Transformer(replace(dense.config, sparse=True))
        model.load_state_dict((best or dense).state_dict())
        optimizer = make_optimizer(model)
        geco = GECO(tau, kp=2, lam=1.0, lam_min=0.1, lam_max=30)  # kp 0.5 is too slow for the falling bound (LOG.md)
        loose = max(tau, flags.loose / 3 if best else flags.loose)
        for step in range(flags.steps):
            tight = min(1, max(0, (step / flags.steps - 0.1) / 0.6))  # from 0 to 1 between 10% and 70%
            # width is the bound too, because that falls by up to 75 times: e = c / bound - 1
            geco.tau = geco.width = loose ** (1 - tight) * tau**tight
            done = wave * flags.steps + step
            rows = batch(flags.dense_steps + done, seed, idx)
            gate_seeds = fold_in(fold_in(seed, done), torch.arange(BATCH))
            _, ce, edges = model(idx[rows], targets[rows], seed=gate_seeds)
            descend(optimizer, geco.loss(edges.prob.mean(), ce), step, flags.steps, lr=1.5e-3)
            geco.update(ce.item())
            if (step + 1) % 100 == 0 or step + 1 == flags.steps:
                now = evaluate(model, idx, targets)
                if now.ce <= tau and now.exact >= 0.9995 and now.open_edges < fewest:
                    best, fewest = copy.deepcopy(model), now.open_edges
                trace.append({"step": done + 1, "bound": geco.tau, "ce_sampled": geco.c, "ce": now.ce, "lam": geco.lam,
                              "exact": now.exact, "edges": now.open_edges, "kept": fewest if best else None})
        if fewest <= flags.enough:
            break
    return best or model, fewest, trace


# -----------------------------------------------------------------------------
# the whole run


def one_try(task):
    """(flags, seed, number) -> (fewest open edges, tau, trace, {"dense", "sparse": model}).

    A try is a new dense model, because dense training settles which positions add. Tries go on until
    one has `enough`, on training problems: which try is kept does not depend on the held-out ones.
    """
    flags, seed, number = task
    torch.set_num_threads(1)  # tensors this small are slower on more; the tries share the cores
    idx, targets = (t[~HELD_OUT] for t in problems())
    seed = fold_in(seed, number).item()  # the whole try is a function of it
    dense = train_dense(flags, seed, idx, targets)
    tau = evaluate(dense, idx, targets).ce + flags.slack
    sparse, edges, trace = train_sparse(flags, seed, dense, tau, idx, targets)
    return edges, tau, trace, {"dense": dense, "sparse": sparse}


def run_tries(flags, seed, log, bar):
    """The tries of a seed, side by side, one a core, until one of them has few enough open edges."""
    tries, tasks = [], [(flags, seed, number) for number in range(flags.tries)]
    for number, found in enumerate(in_processes(one_try, tasks)):
        tries.append(found)
        bar.update()
        for point in found[2]:
            log.write(seed=seed, number=number, **point)
        if found[0] <= flags.enough:
            break
    bar.update(flags.tries - len(tries))
    return tries


def results_of(seed, tries, tau, models):
    """({name: Evaluation}, results) of a seed's sparsest try, its tau and models, on all problems."""
    idx, targets = problems()
    evaluations = {name: evaluate(model, idx, targets) for name, model in models.items()}
    dense, sparse = evaluations.values()
    return evaluations, {
        "seed": seed, "exact": sparse.exact, "mean_open_edges": sparse.open_edges, "ce": sparse.ce,
        "exact_heldout": evaluate(models["sparse"], idx[HELD_OUT], targets[HELD_OUT]).exact,
        "dense_exact": dense.exact, "dense_ce": dense.ce, "tau": tau,
        "tries": [edges if edges < math.inf else None for edges, *_ in tries],
        "allowed_edges": sparse.gates[0].numel(), "circuit": describe(sparse.gates),
        "carry_table": carry_table(sparse.gates)}


def main(flags):
    started, per_seed, traces = time.time(), [], []
    log = Log(results_folder(flags.out), asdict(flags))
    print(f"at most {flags.tries} tries a seed, 1 to 4 minutes on 2 cores; expect 99.9% exact with about 6 open edges")
    with tqdm(total=flags.seeds * flags.tries, desc="tries", smoothing=0) as bar:
        for seed in range(flags.seed, flags.seed + flags.seeds):
            tries = run_tries(flags, seed, log, bar)
            edges, tau, trace, models = min(tries, key=lambda t: t[0])
            evaluations, results = results_of(seed, tries, tau, models)
            per_seed.append(results)
            traces.append(trace)
            bar.write(f"seed {seed}: exact {results['exact']:.2%}, held out {results['exact_heldout']:.2%}, "
                      f"dense {results['dense_exact']:.2%}; {results['mean_open_edges']:.2f} of "
                      f"{results['allowed_edges']} edges open a problem, after {len(tries)} tries")
            if edges == math.inf:
                bar.write(f"seed {seed}: no state qualified, this is the last one; more --tries may help")
            if seed == flags.seed:
                for name, model in models.items():
                    model.save_checkpoint(f"{flags.out}/{name}.pt")
                figures.draw_additions(evaluations, f"{flags.out}/circuits.png")
            figures.draw_addition_training(traces, per_seed, f"{flags.out}/training.png")
            worst = {key: (max if "edges" in key else min)(r[key] for r in per_seed) for key in
                     ("exact", "exact_heldout", "dense_exact", "mean_open_edges", "allowed_edges")}
            path = write_results(flags.out, started, summary="the worst of the seeds", **worst, per_seed=per_seed)
    print("\n  ".join([f"the circuit of seed {flags.seed}", *per_seed[0]["circuit"]]))
    for edge, cases in per_seed[0]["carry_table"].items():
        yes, no = (f"{c['reads']} of {sum(c.values())}" for c in cases.values())
        print(f"  layer 1 or above: {edge} in {yes} problems with a carry, in {no} without")
    print("wrote", path, "and the figures beside it")


if __name__ == "__main__":
    run(main, Flags, __doc__)
