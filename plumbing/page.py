"""
A page to read a circuit in: circuit.html, one file that any browser opens, without a network.

page.html is how it looks, here is what it shows, as JSON: the tokens of one sentence; by which
destinations each head or MLP reads; and of each model
    says   the most likely token at each place
    gates  how many gates are open: in a dense model all of them
    edges  [layer, head, to, from, weight A a, score of token_edges]: all open gates of a sparse
           model; of a dense one, where nothing is ever shut, those whose weight is at least FAINT
    graph  [source, destination, score], the strongest first: of the edges that explain 0.9 of
           the effect at most MOST; circuit is how many they are
"""

import json
import os

import torch

from plumbing import figures
from plumbing.flags import replace_text

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
FAINT = 0.01  # of a dense model: weaker edges are left out of the file
SHOWN = 0.1  # where the slider starts: with all 28,350 lines of SmolLM2-135M and 14 tokens nothing could be read
MOST = 1000  # edges of the head graph of one model; a large model's circuit may have 10,000


def write(path, studies, task, tok, maps, scores):
    """Write the page of the first prompt to path, and return path.

    maps, scores: {model: (n_layer, n_head, T, T)}, A a and token_edges of that prompt.
    """
    config, graph = studies["sparse"].model.config, studies["sparse"].graph
    data = {"task": task.name, "about": task.about,
            "tokens": labels(tok, task.clean[0]), "corrupt": labels(tok, task.corrupt[0]),
            "n_layer": config.n_layer, "n_head": config.n_head, "reads": graph.reads,
            "faint": FAINT, "shown": SHOWN,
            "models": {name: describe(study, task, tok, maps[name].cpu(), scores[name].cpu())
                       for name, study in studies.items()}}
    with open(TEMPLATE, encoding="utf-8") as f:
        replace_text(path, f.read().replace("{{data}}", embed(data)))
    return path


@torch.no_grad()
def describe(study, task, tok, maps, scores):
    """What the page shows of one model."""
    logits = study.model(task.clean[:1].to(study.flags.device))[0][0, :, :tok.vocab_size]
    config, (T, T) = study.model.config, maps.shape[2:]
    kept = maps > 0 if config.sparse else maps >= FAINT
    pairs = T * (T + 1) // 2 if config.causal else T * T
    edges = [[*place, short(weight), short(score)] for place, weight, score in zip(
        kept.nonzero().tolist(), maps[kept].tolist(), scores[kept].tolist())]
    circuit = zip(study.by_effect.nonzero().tolist(), study.mean[study.by_effect].tolist())
    circuit = sorted(circuit, key=lambda link: -abs(link[1]))
    return {"color": figures.COLORS[study.name], "sparse": config.sparse,
            "gates": len(edges) if config.sparse else maps[..., 0, 0].numel() * pairs,
            "says": labels(tok, logits.argmax(-1)), "edges": edges,
            "circuit": len(circuit),
            "graph": [[study.graph.sources[u], study.graph.destinations[v], short(score)]
                      for (u, v), score in circuit[:MOST]]}


def labels(tok, ids):
    return [tok.decode([i]) for i in ids.tolist()]


def short(x):
    """Three digits of a number."""
    return float(f"{x:.3g}")


def embed(data):
    """JSON for a <script>, in ASCII: without < no token can end the element, or begin a comment."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
