"""Every picture of the project, one section a script."""

import os

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from plumbing.flags import save_figure
from plumbing.tasks import Digits


class PlainLog(LogFormatter):
    """Labels of a logarithmic axis as 0.6, not 6e-01; matplotlib chooses which."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


COLORS = {"dense": "#0072B2", "control": "#009E73", "sparse": "#D55E00"}  # told apart by colour-blind readers too

# -----------------------------------------------------------------------------
# patching.py: studies {"dense", "control", "sparse": circuit_report.Study}, results as in results.json


def draw_studies(folder, studies, results, maps, strength, labels):
    """All figures of patching.py; returns their paths.

    Of one sentence with the tokens labels: maps {"dense", ...: A a (n_layer, n_head, T, T)} and
    strength (n_layer, T, T) of the sparse model's token edges, see draw_tokens.
    """
    paths = {name: os.path.join(folder, f"{name}.png") for name in (
        "heads", "edges", "circuits", "attention", "circuit_heads", "tokens")}
    draw_heads(studies, results, paths["heads"])
    draw_edges(studies, results, paths["edges"])
    draw_circuits(studies, paths["circuits"])
    is_head = [source[0] == "a" for source in studies["sparse"].graph.sources]
    names = [source for source in studies["sparse"].graph.sources if source[0] == "a"]

    def row(name, heads):
        return [(f"{name} {names[h]}", maps[name].flatten(0, 1)[h]) for h in heads.tolist()]

    rows = []
    for name, study in studies.items():
        effect = (study.patched.mean(0) - study.empty.mean()).abs().flatten()
        rows.append(row(name, effect.argsort(descending=True)[:6]))
    draw_maps(rows, labels, paths["attention"])
    weight = (study.mean.abs() * study.by_effect).sum(1)[is_head]  # of the sparse model, the last
    heads = weight.argsort(descending=True)[:max(1, int((weight > 0).sum()))]
    title = f"{len(heads[:48])} of the {len(heads)} heads of the circuit that explains 0.9 of the effect"
    draw_maps([row("sparse", h) for h in heads[:48].split(8)], labels, paths["circuit_heads"], title)
    draw_tokens(strength, results["token_graph"], labels, paths["tokens"])
    return list(paths.values())


def draw_heads(studies, results, path):
    """Figure 3 of the paper: explained effect over the number of heads kept, with quartiles."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    titles = {"per_sentence": "ranked for each sentence", "global": "ranked once"}
    for axis, (rank, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for name, study in studies.items():
            curve = study.heads[rank]
            color, (low, high) = COLORS[name], curve.quartiles()[0]
            axis.plot(curve.sizes, curve.effect(), "o-", markersize=3, color=color, label=name)
            axis.fill_between(curve.sizes, low, high, color=color, alpha=0.2, lw=0, label="quartiles of sentences")
        axis.set(title=f"{title}: dense needs {results['ratio'][f'heads_for_0.9_{rank}']:.1f}x",
                 xlabel="attention heads kept", xlim=(-0.2, 1.2 * curve.sizes[-1]))
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
    effect_axis(figure.axes[0], [study.heads[rank] for study in studies.values() for rank in titles])
    figure.axes[1].axhline(0.9, color="black", linewidth=0.8, linestyle=":")
    save_figure(figure, path)


def effect_axis(axis, curves):
    """Label and limits of the explained effect, with a line at 0.9."""
    axis.axhline(0.9, color="black", linewidth=0.8, linestyle=":")
    top = max(max(curve.effect()) for curve in curves)
    axis.set(ylabel="explained effect", ylim=(-0.25, max(1.4, 1.1 * top)))
    axis.legend(fontsize=8, loc="upper left")


def draw_edges(studies, results, path):
    """Figures 4a and 5: explained effect of circuits, and cumulative |score|, over edges kept."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, study in studies.items():
        left.plot(study.edges.sizes, study.edges.effect(), "o-", markersize=3, color=COLORS[name],
                  label=f"{name}, of {len(study.graph):,}")
        for shares, line, label in zip(study.shares, (":", "-"), (None, name)):
            right.plot(range(1, len(shares) + 1), shares.numpy(), line, color=COLORS[name], label=label)
    ratio, (low, high) = results["ratio"], results["interval"]["edges_for_0.9"]
    left.set(title=f"for 0.9 dense needs {ratio['edges_for_0.9']:.1f}x edges\n({low:.2g} to {high:.2g})",
             xlabel="edges in the circuit, before pruning", xscale="log")
    right.set(title=f"dense needs {ratio['edges_for_0.9_cumulative_mean_of_curves']:.1f}x of each sentence (solid),\n"
                    f"{ratio['edges_for_0.9_cumulative']:.1f}x averaged first (dotted), for 0.9",
              xlabel="edges", ylabel="share of the sum of |scores|", ylim=(0, 1.05), xscale="log")
    effect_axis(left, [study.edges for study in studies.values()])
    right.axhline(0.9, color="black", linewidth=0.8, linestyle=":")
    right.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def draw_circuits(studies, path):
    """As Figure 4b, but by effect: heads and MLPs of the edges that explain 0.9 of it, as a grid."""
    figure = Figure(figsize=(5 * len(studies), 5), layout="constrained")
    for axis, (name, study) in zip(figure.subplots(1, len(studies)), studies.items()):
        draw_circuit(axis, name, study)
    save_figure(figure, path)


def draw_circuit(axis, name, study):
    """The head graph of one model: who writes to whom, layers upward; grey: in no such edge."""
    graph, edges, size = study.graph, study.by_effect, study.graph.group
    L, H = graph.config.n_layer, graph.config.n_head
    place = {"input": ((H - 1) / 2, -1), "logits": ((H - 1) / 2, L)}  # x, y
    place |= {f"m{l}": (H, l + 0.35) for l in range(L)}
    place |= {f"a{l}.h{h}": (h, l) for l in range(L) for h in range(H)}
    groups = {f"a{l}.g{g}": ((g + 0.5) * size - 0.5, l) for l in range(L) for g in range(H // size)}
    links = {}  # (place, place): sum of |scores| by --ranking
    for u, v in edges.nonzero().tolist():
        reader = graph.destinations[v].split("<")[0]
        link = place[graph.sources[u]], (place | groups)[reader]  # a group: its heads' middle
        links[link] = links.get(link, 0) + study.mean[u, v].abs().item()
    strength = np.array(list(links.values())) / max(links.values(), default=1)
    axis.add_collection(LineCollection(list(links), colors=COLORS[name], capstyle="round",
                                       linewidths=0.3 + 2 * strength, alpha=0.05 + 0.85 * strength**0.5))
    kept = [source for source, used in zip(graph.sources, edges.any(1)) if used]
    for node, (x, y) in place.items():
        used = node in kept or node == "logits"
        axis.plot(x, y, "s" if node[0] == "m" else "o", color="black" if used else "0.85",
                  markersize=min(12, max(2, 60 / max(L, H))) * (1 if used else 0.5), zorder=3)
    kinds = [node[0] for node in kept]
    axis.set(title=f"{name}: 0.9 of the effect in\n{int(edges.sum()):,} edges, "
                   f"{kinds.count('a')} heads, {kinds.count('m')} MLPs", xlim=(-0.7, H + 0.5),
             ylim=(-1.6, L + 0.6), xlabel="head (right: MLP)",
             ylabel="layer (bottom: embedding, top: logits)",
             xticks=range(0, H, max(1, H // 8)), yticks=range(0, L, max(1, L // 8)))


def draw_maps(rows, labels, path, title=None):
    """Figure 2b: rows of (name, A a (T, T)) of one sentence; shut gates are white."""
    figure = Figure(figsize=(1 + 2.1 * len(rows[0]), 0.4 + 2.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    ticks, labels = range(len(labels)), [literal(label) for label in labels]
    for axis in axes.flat[sum(map(len, rows)):]:
        axis.axis("off")
    for axis, (name, weights) in zip(axes.flat, sum(rows, [])):
        image = draw_map(axis, weights)
        axis.set_title(f"{name}\n{int((weights > 0).sum())} open", fontsize=9)
        axis.set(xticks=[], yticks=[])
        if len(labels) <= 24 and axis in axes[:, 0]:
            axis.set_yticks(ticks, labels, fontsize=6)
        if len(labels) <= 24 and axis in axes[-1]:
            axis.set_xticks(ticks, labels, fontsize=6, rotation=90)
    figure.colorbar(image, ax=axes, label="attention weight after the gate", shrink=0.7)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("from token", fontsize=10)
    figure.supylabel("to token", fontsize=10)
    save_figure(figure, path)


def draw_map(axis, weights):
    """A a (T, T) of one head, logarithmic; shut gates are white."""
    shades = weights.clamp(min=1e-3).where(weights > 0, torch.nan)
    return axis.imshow(shades.numpy(), cmap="viridis", norm=LogNorm(1e-3, 1))


def draw_copying(studies, maps, heads, labels, path):
    """The two heads that copy, dense above and sparse below, and the head graph beside them.

    maps {model: A a (n_layer, n_head, T, T)} of one prompt; heads {model: {role: (layer, head)}}.
    """
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    axes, labels = figure.subplots(2, 3), [literal(label) for label in labels]
    for row, name in zip(axes, ("dense", "sparse")):
        for axis, (role, (l, h)) in zip(row, heads[name].items()):
            image = draw_map(axis, maps[name][l, h])
            axis.set_title(f"{name}: the {role} head, a{l}.h{h}", fontsize=11)
            axis.set_xticks(range(len(labels)), labels, fontsize=7)
            axis.set_yticks(range(len(labels)), labels, fontsize=7)
            axis.set(xlabel="reads from this token", ylabel="this token")
        draw_circuit(row[2], name, studies[name])
    figure.colorbar(image, ax=axes[:, :2], label="attention weight after the gate; white: 0", shrink=0.5,
                    location="left")
    save_figure(figure, path)


def draw_tokens(strength, counts, labels, path):
    """The token graph of one sentence: gates, open in one of the runs, from (token, layer) to the next.

    strength (n_layer, T, T): |score| of a token edge, summed over heads; nan where no gate is open.
    """
    L, T = strength.shape[:2]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axis = figure.subplots()
    strength = strength / strength.nan_to_num().max().clamp(min=1e-12)
    for l, i, j in (~strength.isnan()).nonzero().tolist():
        share = strength[l, i, j].item()
        axis.plot([j, i], [l, l + 1], color=COLORS["sparse"] if share > 0.02 else "0.6",
                  linewidth=0.4 + 3 * share, alpha=0.25 + 0.75 * share**0.5)
    x, y = np.meshgrid(range(T), range(L + 1))
    axis.plot(x.ravel(), y.ravel(), "o", color="black", markersize=2)
    axis.set_xticks(range(T), [*map(literal, labels)], rotation=60, ha="right", fontsize=8)
    axis.set(ylabel="layer", yticks=range(0, L + 1, max(1, L // 8)),
             xlabel="token (orange: |score| above 2% of the largest; width: |score|)",
             title=f"{counts['open in both']:,} gates open in both runs, {counts['closes']:,} close, "
                   f"{counts['opens']:,} open, {counts['shut in both']:,} shut in both: exactly 0")
    save_figure(figure, path)


def literal(label):
    """A token as a label: $ would begin a formula."""
    return label.replace("$", r"\$")


# -----------------------------------------------------------------------------
# geco.py


def draw_geco(trace, expected, path):
    """The disc problem: objective, constraint and lambda over the steps, beside the known answers."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    colors = ["tab:blue", "tab:orange", "tab:purple"]
    for axis, name, values, color in zip(figure.subplots(1, 3), expected, zip(*trace), colors):
        axis.plot(values, color=color)
        label = f"$\\tau$ = {expected[name]:g}" if name == "constraint" else "exact answer"
        axis.axhline(expected[name], color="black", linestyle="--", linewidth=1, label=label)
        axis.set(xlabel="step", title={"lambda": "multiplier $\\lambda$"}.get(name, name))
        axis.legend()
    save_figure(figure, path)


# -----------------------------------------------------------------------------
# train.py


LOSSES = {"ce": "CE", "kl": "KL(dense, sparse)"}


def draw_training(folder, trace, best, bounded, tau, ce_dense, control, context):
    """ce_open.png, heads.png and lambda.png in the run's folder, from the evaluations so far.

    trace, best: dicts of train.py's evaluations; bounded: ce or kl; ce_dense, tau in nats; control: its results or None.
    """
    opened, steps = [100 * p["open"] for p in trace], [p["step"] for p in trace]
    losses = [name for name in LOSSES if name in trace[0]]
    sampled = [p for p in trace if "ce_sampled" in p]
    figure = Figure(figsize=(7 + 4 * (len(losses) - 1), 4.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses):
        axis.plot(opened, [p[name] for p in trace], "o-", markersize=3, label="deterministic gates")
        if name == "ce":
            axis.plot([100 * p["open"] for p in sampled], [p["ce_sampled"] for p in sampled], ".", color="0.6",
                      label="sampled gates")
            axis.axhline(ce_dense, color="black", linewidth=1, label="dense model")
            if control:
                axis.axhline(control["ce_val"], color="black", linestyle=":", label="dense control")
        if name == bounded:
            axis.axhline(tau, color="black", linestyle="--", linewidth=1, label="$\\tau$")
        if best:
            axis.plot(100 * best["open"], best[name], "*", markersize=14, color="tab:orange", label="best state")
        axis.set(xscale="log", xlabel=f"open attention edges (%), context {context}",
                 ylabel=f"held-out {LOSSES[name]} (nats a token)")
        axis.xaxis.set(major_formatter=PlainLog(), minor_formatter=PlainLog())
        axis.invert_xaxis()
        axis.legend(fontsize=9)
    save_figure(figure, f"{folder}/ce_open.png")

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    shares = np.array((best or trace[-1])["heads"]) * 100
    image = axis.imshow(shares.clip(0.01), cmap="viridis", norm=LogNorm(0.01, 100), origin="lower",
                        aspect="auto")
    n_layer, n_head = shares.shape
    axis.set(xlabel="head", ylabel="layer", xticks=range(n_head), yticks=range(n_layer))
    figure.colorbar(image, label="open edges (%), 0.01 or less at the bottom", format="{x:g}")
    save_figure(figure, f"{folder}/heads.png")

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    loss, edges, multiplier = figure.subplots(1, 3)
    loss.plot(steps, [p[bounded] for p in trace])
    loss.axhline(tau, color="black", linestyle="--", linewidth=1, label="$\\tau$")
    if bounded == "ce":
        loss.axhline(ce_dense, color="black", linewidth=1, label="dense model")
    if control:
        loss.plot(*zip(*control["trace"]), ":", color="black", label="dense control")
    loss.legend(fontsize=9)
    loss.set(xlabel="step", ylabel=f"held-out {LOSSES[bounded]} (nats a token)")
    edges.plot(steps, opened)
    edges.set(xlabel="step", ylabel="open attention edges (%)", yscale="log")
    multiplier.plot(steps[1:], [p["lambda"] for p in trace[1:]])
    multiplier.set(xlabel="step", ylabel="multiplier $\\lambda$", yscale="log")
    for axis in (edges, multiplier):
        axis.yaxis.set(major_formatter=PlainLog(), minor_formatter=PlainLog())
    save_figure(figure, f"{folder}/lambda.png")


# -----------------------------------------------------------------------------
# the addition toy

EXAMPLES = {(53, 21): "no carry", (36, 28): "one carry", (43, 59): "two carries"}


def draw_additions(evaluations, path):
    """Figure 1 of the paper: models, {name: Evaluation of all 10,000 problems}, by three problems."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots(len(evaluations), len(EXAMPLES), squeeze=False)
    for row, (name, e) in zip(axes, evaluations.items()):
        for axis, ((x, y), carries) in zip(row, EXAMPLES.items()):
            weights = e.weights[100 * x + y].amax(1)  # (n_layer, 11, 11), the largest of the heads
            draw_addition(axis, weights, f"{x}+{y}=?????", Digits().decode(e.answers[100 * x + y]),
                          faintest=0.01 if e.gates.all() else 0.3)
            if row is axes[0]:
                axis.set_title(f"{x} + {y}: {carries}", fontsize=15)
            axis.set_xlabel(f"{int((weights > 0).sum())} attention edges", fontsize=12)
        row[0].set_ylabel(name, fontsize=17)
    save_figure(figure, path)


def draw_addition(axis, weights, problem, answer, faintest):
    """One problem: characters at the bottom, layers upward, edge j -> i in blue by its weight."""
    n_layer = len(weights)
    for i in range(11):
        axis.plot([i, i], [0, n_layer], color="0.8", linewidth=2, zorder=1)  # residual stream
    for l, i, j in weights.nonzero().tolist():
        strength = faintest + (1 - faintest) * min(1.0, weights[l, i, j].item())
        axis.plot([j, i], [l, l + 1], color="tab:blue", linewidth=2.2, alpha=strength, zorder=2)
    for level in range(n_layer + 1):
        symbols = {0: problem, n_layer: answer.rjust(11)}.get(level, " " * 11)
        for i, symbol in enumerate(symbols):
            axis.plot(i, level, "o", markersize=17, color="white", markeredgecolor="0.35", zorder=3)
            axis.text(i, level, symbol, ha="center", va="center", fontsize=12, zorder=4)
    axis.set(xlim=(-0.6, 10.6), ylim=(-0.3, n_layer + 0.3), xticks=[])
    axis.set_yticks([l + 0.5 for l in range(n_layer)], [f"layer {l}" for l in range(n_layer)],
                    rotation=90, va="center", fontsize=11)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def draw_addition_training(traces, per_seed, path):
    """CE, exact match, open edges and lambda over the steps of sparse post-training, every seed."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    (ce, exact), (edges, lam) = figure.subplots(2, 2, sharex=True)
    for n, (trace, results) in enumerate(zip(traces, per_seed)):
        column = {key: [point[key] for point in trace] for key in trace[0]}
        step, thin = column["step"], {"color": f"C{n}", "linewidth": 1}
        ce.plot(step, column["ce_sampled"], **thin, label=f"seed {results['seed']}")
        ce.plot(step, column["bound"], **thin, linestyle="--", label=None if n else "the bound")
        exact.plot(step, [100 * share for share in column["exact"]], **thin)
        edges.plot(step, column["edges"], **thin, alpha=0.4)
        edges.plot(step, column["kept"], color=f"C{n}", linewidth=2.5,
                   label=None if n else "the best state so far, which is kept")
        lam.plot(step, column["lam"], **thin)
    ce.axhline(per_seed[0]["tau"], color="black", linewidth=1.5, label="$\\tau$")
    ce.axhline(per_seed[0]["dense_ce"], color="black", linestyle=":", label="dense model's CE")
    ce.set(yscale="log", ylabel="CE, sampled gates (nats a digit)")
    exact.set(ylabel="exact match, training problems (%)", ylim=(45, 102))
    edges.set(yscale="log", ylabel=f"open edges a problem (of {per_seed[0]['allowed_edges']})",
              xlabel="step")
    edges.set_yticks([5, 6, 8, 10, 20, 50, 100, 200], [5, 6, 8, 10, 20, 50, 100, 200])
    lam.set(yscale="log", ylabel="multiplier $\\lambda$", xlabel="step")
    for axis in (ce, exact, edges, lam):
        axis.grid(alpha=0.3)
    figure.legend(*ce.get_legend_handles_labels(), fontsize=9, ncols=7, loc="outside lower center")
    edges.legend(fontsize=9)
    save_figure(figure, path)


# -----------------------------------------------------------------------------
# plumbing/attention_cost.py


def draw_cost(table, impls, path):
    """Time and memory against T, one sequence of 12 heads, both axes logarithmic."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, key, label in zip(figure.subplots(1, 2), ("ms", "mib"), (
            "forward + backward (ms)", "memory beyond the inputs (MiB)")):
        for impl in impls:
            rows = [row for row in table if (row["B"], row["H"]) == (1, 12) and row.get(f"{key}_{impl}")]
            axis.plot([row["T"] for row in rows], [row[f"{key}_{impl}"] for row in rows], "o-", label=impl)
        axis.set(xscale="log", yscale="log", xlabel="tokens T, 1 sequence of 12 heads x 64", ylabel=label)
        axis.set_xticks(sorted({row["T"] for row in table}))
        axis.xaxis.set(major_formatter="{x:g}", minor_formatter="")
        axis.yaxis.set(major_formatter=PlainLog(), minor_formatter=PlainLog())
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    save_figure(figure, path)
