"""
Circuits in numbers: how many heads or edges explain 0.9 of the effect; results, tables, edges.csv.

patching.py hands over its functions and its Graph; here they run over all prompts. Shapes: N
prompts, L layers, H heads, S sources, V destinations, E edges in the order of graph.edges.nonzero().
"""

import os

import numpy as np
import torch
from tqdm import tqdm

from plumbing import copying, figures, page, tokens
from plumbing.curves import (
    FRACTIONS, Curve, circuit, classes, cpr, cumulative, explained_effect, grid, holding, rank_correlation, trace)
from plumbing.flags import replace_text
from plumbing.rerun import STEPS, rerun_scores
from plumbing.tasks import CHARACTERS

BATCH_TOKENS = 1024  # in one forward pass
SMALL_GRAPH = 1000  # edges up to which each one's exact effect is measured, with SOME prompts
SOME = 8
RANKINGS = ("exact", "rerun", "eap-ig", "eap")  # ways to rank the edges of a circuit

# -----------------------------------------------------------------------------
# prompts and models


def beside(flags):
    """--dense and --control: as given, or what train.py has left in the folder --sparse."""
    dense, control = (os.path.join(flags.sparse, name) for name in ("dense", "control"))
    if not flags.dense and not os.path.isdir(dense):
        raise ValueError(f"{flags.sparse} holds no model that was trained from scratch: run `python train.py` "
                         "first, or give --dense and --sparse")
    return flags.dense or dense, flags.control or (control if os.path.isdir(control) else None)


def check_models(flags, configs):
    """ValueError unless these Configs are of dense models and of a gated one, all of one shape."""
    for name, config in configs.items():
        if config.sparse and name != "sparse":
            raise ValueError(f"--{name} {getattr(flags, name)} has gates: give the model before its "
                             "post-training, or its dense control")
    dense, sparse = configs["dense"], configs["sparse"]
    if not sparse.sparse:
        raise ValueError(f"--sparse {flags.sparse} has no gates: give a checkpoint of a sparse "
                         "run, or its --adapter")
    for name, config in configs.items():
        for field in ("vocab_size", "n_layer", "n_head", "n_kv_head"):
            if getattr(dense, field) != getattr(config, field):
                raise ValueError(f"--dense has {field} {getattr(dense, field)} and --{name} "
                                 f"{getattr(config, field)}: not of one family")
    if flags.task == "addition" and dense.vocab_size != len(CHARACTERS):
        raise ValueError("--task addition is for the models of addition_toy.py")


# -----------------------------------------------------------------------------
# one model on one task


class Study:
    """A model's answers to all prompts of a task, and what they come to.

    functions: patching.py, or a namespace of its functions.
    `check` leaves full and empty, the metric of clean and of corrupt prompts (N,), and accuracy.
    `analyse` leaves numbers, for results.json; patched (N, L, H); heads {rank: Curve}; scores (N, E) by
    EAP, the paper's, and shares, cumulative ones (E,) averaged in two ways; mean (S, V), the scores by
    which --ranking ranks edges; edges, the Curve of their circuits, and by_effect, bool (S, V), the one of 0.9.
    """

    def __init__(self, name, model, graph, flags, functions):
        self.name, self.model, self.graph = name, model, graph
        self.flags, self.do = flags, functions

    def over_prompts(self, task, function, progress=None, dim=0):
        """function(rows, clean, corrupt, metric) of some prompts at a time, joined on the CPU."""
        def part(rows):
            clean, corrupt = (idx[rows].to(self.flags.device) for idx in (task.clean, task.corrupt))
            return function(rows, clean, corrupt, lambda logits: task.metric(logits, rows)).cpu()

        parts = torch.arange(len(task.clean)).split(max(1, BATCH_TOKENS // task.clean.shape[1]))
        return torch.cat([part(rows) for rows in self.bar(parts, progress)], dim)

    def bar(self, items, progress):
        off = None if progress else True  # None: on a terminal alone
        return tqdm(items, desc=f"{self.name}: {progress}", disable=off, leave=False)

    @torch.no_grad()
    def behaviour(self, task):
        """The metric of clean and of corrupt prompts, each (N,), and the share of right answers."""
        def run(rows, clean, corrupt, metric):
            logits = self.model(clean)[0]
            full, empty = metric(logits), metric(self.model(corrupt)[0])
            return torch.stack([full, empty, task.correct(logits, rows).to(full)])

        full, empty, right = self.over_prompts(task, run, dim=1)
        return full, empty, right.mean().item()

    def check(self, task):
        """Print the behaviour; ValueError if the model fails the task or there is no effect."""
        self.full, self.empty, self.accuracy = self.behaviour(task)
        full, empty, force = self.full.mean(), self.empty.mean(), self.flags.force
        print(f"{self.name}: accuracy {self.accuracy:.1%}, {task.units} {full:.3f} on clean "
              f"prompts, {empty:.3f} on corrupt ones", flush=True)
        if self.accuracy < task.floor and not force:
            raise ValueError(
                f"{self.name}: right on {self.accuracy:.0%} of the {task.name} prompts, below "
                f"{task.floor:.0%}: its circuit would say little; --force goes on")
        if not abs(full - empty) >= 1e-3 or (full < empty and not force):  # nan, too
            raise ValueError(
                f"{self.name}: the {task.units} is not higher on clean prompts than on corrupt ones, "
                f"{full:.4f} and {empty:.4f}: there is no effect to explain")
        if len(self.graph) * len(self.full) > 2**28:
            raise ValueError(f"--n {len(self.full)} prompts times {len(self.graph):,} edges are "
                             "too many: lower --n")

    def best_heads(self, task, place, sizes):
        """(len(sizes), N): the metric when the heads of the first n places (N, L, H) are kept."""
        def run(rows, clean, corrupt, metric):
            runs = [self.do.record(self.model, idx) for idx in (clean, corrupt)]
            here = place[rows].to(clean.device)
            return torch.stack([metric(self.do.keep_heads(self.model, clean, *runs, here < n))
                                for n in self.bar(sizes, "heads kept")])

        return self.over_prompts(task, run, dim=1)

    def score_edges(self, task, how="eap", progress=None):
        """(N, E), by one of RANKINGS; exact: of the first prompts, in each row."""
        if how == "exact":
            def first(idx):
                return idx[:SOME].to(self.flags.device)

            effects = self.do.exact_edges(self.model, self.graph, first(task.clean), first(task.corrupt),
                                          lambda logits: task.metric(logits, slice(0, SOME)))
            return effects[self.graph.edges].expand(len(task.clean), -1)

        def score(rows, clean, corrupt, metric):
            if how == "rerun":
                found = rerun_scores(self.do, self.model, self.graph, clean, corrupt, metric)
            else:
                steps = STEPS if how == "eap-ig" else 0
                found = self.do.edge_scores(self.model, self.graph, clean, corrupt, metric, steps)
            return found[:, self.graph.edges]

        return self.over_prompts(task, score, progress)

    def square(self, scores):
        """Scores (E,) as (S, V)."""
        return torch.zeros(self.graph.edges.shape).masked_scatter(self.graph.edges, scores)

    @torch.no_grad()
    def run_circuits(self, task, value, sizes, progress=None):
        """(len(sizes), N): the metric under the circuits of the n edges of largest value (S, V)."""
        circuits, mean = [circuit(self.graph, value, n) for n in sizes], None
        new = [i == 0 or not torch.equal(circuits[i - 1], circuits[i]) for i in range(len(sizes))]

        def ablated(corrupt):
            return self.do.ablated(self.model, corrupt, self.flags.ablation)

        def run(rows, clean, corrupt, metric):
            instead = ablated(corrupt) if mean is None else mean
            return torch.stack([
                metric(self.do.patch_edges(self.model, self.graph, clean, instead, edges))
                for edges in self.bar([c for c, n in zip(circuits, new) if n], progress)])

        if self.flags.ablation == "mean":  # over all prompts, whatever the batches
            means = self.over_prompts(task, lambda rows, _, corrupt, __: len(rows) * ablated(corrupt))
            mean = means.sum(0, keepdim=True).to(self.flags.device) / len(task.clean)
        return self.over_prompts(task, run, dim=1)[torch.tensor(new).cumsum(0) - 1]

    def analyse(self, task, second):
        """Heads, edges, and how far the circuit carries: second is another draw of the prompts."""
        self.patched = self.over_prompts(
            task, lambda rows, *batch: self.do.head_patching(self.model, *batch), "heads")
        once = self.patched.mean(0).expand_as(self.patched)
        self.heads, sizes = {}, [0, *grid(once[0].numel(), self.flags.per_decade)]
        for rank, value in (("per_sentence", self.patched), ("global", once)):
            order = value.flatten(1).argsort(1, descending=True)
            place = order.argsort(1).view_as(value)  # of each head in the order, 0 for the best
            self.heads[rank] = trace(sizes, lambda n: self.best_heads(task, place, n),
                                     self.full, self.empty)

        graph, how = self.graph, self.flags.ranking
        self.scores = self.score_edges(task, progress="edges")
        ranked = self.scores if how == "eap" else self.score_edges(task, how, "edges again")
        self.mean = self.square(ranked.mean(0))
        if not self.mean.any():
            raise ValueError(
                f"every edge of the {self.name} model has the score 0: only gates that open or close "
                "between the prompts carry the effect, and gradients do not see those")
        size = self.mean.abs()
        none = self.run_circuits(task, size, [0])[0]
        self.edges = trace(grid(len(graph), self.flags.per_decade),
                           lambda n: self.run_circuits(task, size, n, "circuits"), self.full, none)
        self.shares = cumulative(self.scores.mean(0)), cumulative(self.scores).mean(0)
        self.by_effect = circuit(graph, size, self.edges.needed())
        self.numbers = self.count() | self.carried_over(second)
        if not self.flags.fast and len(graph) >= 1 / min(FRACTIONS):
            sizes = [round(fraction * len(graph)) for fraction in FRACTIONS]
            signed, unsigned = (Curve(sizes, self.run_circuits(task, value, sizes, "CPR"), self.full, none)
                                for value in (-self.mean, size))
            self.numbers |= {"cpr": cpr(signed.effect())[0], "cmd": cpr(unsigned.effect())[1]}
        if not self.flags.fast and len(graph) <= SMALL_GRAPH:
            self.numbers["rankings"] = self.rankings(task, none)

    def rankings(self, task, none):
        """{how edges are ranked: edges_for_0.9, spearman: rank correlation of |score| with |exact effect|}."""
        scores, found = {how: self.score_edges(task, how) for how in RANKINGS}, {}
        some = {how: score[:SOME].mean(0).abs() for how, score in scores.items()}  # the exact ones are of these prompts
        for how, score in scores.items():
            size = score.mean(0).abs()
            curve = trace(grid(len(self.graph), self.flags.per_decade),
                          lambda n: self.run_circuits(task, self.square(size), n), self.full, none)
            found[how] = {"edges_for_0.9": curve.needed(), "spearman": rank_correlation(some["exact"], some[how])}
        return found

    def count(self):
        """The numbers of these prompts."""
        writers = [name[0] for name, kept in zip(self.graph.sources, self.by_effect.any(1)) if kept]
        heads, mlps = writers.count("a"), writers.count("m")
        curves = {f"heads_{rank}": {"kept": curve.sizes, "explained_effect": curve.effect()}
                  for rank, curve in self.heads.items()}
        curves["edges"] = {"requested": self.edges.sizes, "explained_effect": self.edges.effect()}
        strength = self.square(self.scores.mean(0)).abs()
        by_score = self.graph.edges & (strength >= strength.flatten().topk(holding(self.shares[0])).values[-1])
        return {
            "n": len(self.full), "accuracy": self.accuracy, "metric_clean": self.full.mean().item(),
            "metric_corrupt": self.empty.mean().item(), "edges": len(self.graph),
            "nodes": len(self.graph.sources) - 1, "curves": curves,
            **{f"heads_for_0.9_{rank}": curve.needed() for rank, curve in self.heads.items()},
            "sentences_left_out_of_quartiles": self.heads["global"].quartiles()[1],
            "edges_for_0.9": self.edges.needed(),
            "edges_for_0.9_after_pruning": int(self.by_effect.sum()),
            "heads_in_circuit": heads, "mlps_in_circuit": mlps, "nodes_for_0.9": heads + mlps,
            "edges_for_0.9_cumulative": holding(self.shares[0]),
            "edges_for_0.9_cumulative_mean_of_curves": holding(self.shares[1]),
            "classes": {way: classes(self.graph, edges) for way, edges in (
                ("all", self.graph.edges), ("score", by_score), ("effect", self.by_effect))}}

    def carried_over(self, second):
        """The numbers of other prompts: does the circuit still explain, are the same edges largest?"""
        full, _, accuracy = self.behaviour(second)
        none, kept = self.run_circuits(second, self.mean.abs(), [0, self.edges.needed()])
        n, both = holding(self.shares[0]), (self.scores.mean(0), self.score_edges(second).mean(0))
        here, there = ({*scores.abs().topk(n).indices.tolist()} for scores in both)
        return {"accuracy_on_other_prompts": accuracy,
                "explained_effect_on_other_prompts": explained_effect(kept, full, none),
                "jaccard_of_two_draws": len(here & there) / len(here | there)}

    def bootstrap(self, seed, draws=200):
        """{key: values over draws of N prompts with replacement}; the ranking of the edges stays."""
        N, of_each = len(self.scores), cumulative(self.scores)
        rows = torch.randint(N, (draws, N), generator=torch.Generator().manual_seed(seed % 2**63))
        return {"edges_for_0.9": [self.edges.needed(r) for r in rows],
                "edges_for_0.9_cumulative_mean_of_curves": [
                    holding(of_each[r].mean(0)) for r in rows]}


# -----------------------------------------------------------------------------
# dense beside sparse


def compare(studies, seed):
    """The numbers of all; ratio: dense / sparse, ratio_control; interval: of the ratio, 90% (bootstrap)."""
    found = {name: dict(study.numbers) for name, study in studies.items()}
    draws = {name: study.bootstrap(seed) for name, study in studies.items()}
    for name in found:
        found[name] |= {key + "_interval": interval(values) for key, values in draws[name].items()}
    results, sparse = dict(found), found["sparse"]
    for name, key in (("dense", "ratio"), ("control", "ratio_control")):
        if name in found:
            results[key] = {k: found[name][k] / sparse[k] for k in sparse
                            if "_for_0.9" in k and "interval" not in k and sparse[k]}
    results["interval"] = {key: interval(np.divide(draws["dense"][key], draws["sparse"][key]))
                           for key in draws["sparse"]}
    return results


def interval(values):
    """The middle 90% of bootstrap values: [low, high]."""
    return [float(x) for x in np.quantile(np.asarray(values, dtype=float), (0.05, 0.95))]


def print_table(results):
    names = [name for name in ("dense", "control", "sparse") if name in results]
    print(f"\n{'':42}" + "".join(f"{name:>10}" for name in names) + f"{'ratio':>8}  90% interval")
    for key in [key for key, value in results["dense"].items() if isinstance(value, int | float)]:
        cells = [f"{v:.3f}" if isinstance(v, float) else f"{v:,}" for v in (results[name][key] for name in names)]
        ratio, limits = results["ratio"].get(key), results["interval"].get(key)
        print(f"{key:42}" + "".join(f"{cell:>10}" for cell in cells) + f"{f'{ratio:.1f}' if ratio else '':>8}"
              + (f"  {limits[0]:.2g} to {limits[1]:.2g}" if limits else ""))
    for way in ("score", "effect"):
        found = [results[name]["classes"] for name in names]
        for kind in found[0]["all"]:
            print(f"{f'0.9 by {way}, {kind}':42}" + "".join(f"{c[way].get(kind, 0):>10,}" for c in found))
    for way in results["dense"].get("rankings", ()):
        cells = (results[name]["rankings"][way] for name in names)
        print(f"{f'edges_for_0.9 by {way} (rank correlation)':42}"
              + "".join(f"{c['edges_for_0.9']} ({c['spearman']:.2f})".rjust(10) for c in cells))


def write_edges(studies, path):
    """edges.csv: every edge by name, with its mean score in both models. Returns the path."""
    graph, lines = studies["dense"].graph, [",".join(["source", "destination", *studies])]
    for u, v in graph.edges.nonzero().tolist():
        scores = [f"{study.mean[u, v]:.4g}" for study in studies.values()]
        lines.append(",".join([graph.sources[u], graph.destinations[v], *scores]))
    replace_text(path, "\n".join(lines) + "\n")
    return path


def count_gates(before, after, causal):
    """How many gates are open in both runs, close, open, or are shut, by A a (L, H, T, T) of each."""
    before, after, T = before > 0, after > 0, before.shape[-1]
    counts = {"open in both": before & after, "closes": before & ~after, "opens": ~before & after}
    counts = {name: int(pairs.sum()) for name, pairs in counts.items()}
    allowed = before[..., 0, 0].numel() * (T * (T + 1) // 2 if causal else T * T)
    return counts | {"shut in both": allowed - sum(counts.values())}


def draw(studies, task, tok, results):
    """All pictures, those of tokens of the first prompt; returns their paths.

    Adds to the results the gates of that prompt, and of the task induction which heads copy.
    """
    flags, sparse = studies["sparse"].flags, studies["sparse"]
    clean, corrupt = (idx.to(flags.device) for idx in (task.clean, task.corrupt))
    maps = {name: study.do.attention_maps(study.model, clean) for name, study in studies.items()}
    before, after = maps["sparse"][0], sparse.do.attention_maps(sparse.model, corrupt[:1])[0]
    results["token_graph"] = count_gates(before, after, sparse.model.config.causal)
    scores = {name: study.do.token_edges(study.model, clean[:1], corrupt[:1],
                                         lambda logits: task.metric(logits, slice(0, 1)))[0].cpu()
              for name, study in studies.items()}
    strength = scores["sparse"].abs().sum(1).where((before + after).sum(1) > 0, torch.nan)
    labels, first = [tok.decode([i]) for i in clean[0].tolist()], {name: m[0] for name, m in maps.items()}
    pictures = figures.draw_studies(flags.out, studies, results, first, strength, labels)
    pictures.append(page.write(os.path.join(flags.out, "circuit.html"), studies, task, tok, first, scores))
    if task.name == "induction":
        context = min(128, sparse.model.config.block_size)
        text = tokens.Blocks(tokens.python_docs(tok)["test"], context).evenly(64)
        results["copying"], heads = copying.circuits(studies, maps, tok, text)
        pictures.append(os.path.join(flags.out, "copying.png"))
        figures.draw_copying(studies, first, heads, labels, pictures[-1])
    return pictures
