"""Edge scores that see gates open and close: each edge's destination runs again.

EAP (patching.py) is linear in the destination, too: the gradient that it takes back through a head's
softmax holds the gates. Here the destination v runs again with what source u writes corrupt,

    s(u -> v) = sum of (f_v(x_v + a_u^corrupt - a_u^clean) - f_v(x_v)) dM/df_v,

so that a gate which opens or closes counts, and only what comes after v is linear. The gradient is a
mean over embeddings between corrupt and clean, as in EAP-IG. AtP* (arXiv 2403.00745) does so for q and k.
"""

import torch

STEPS = 5  # embeddings between corrupt and clean


def rerun_scores(do, model, graph, clean, corrupt, metric):
    """As patching.edge_scores, (N, n_sources, n_destinations) float32; do: the functions of patching.py.

    It takes as long as 3 n_sources forward passes.
    """
    config, layers = model.config, range(len(model.h))
    sizes = [config.n_head, config.n_kv_head, config.n_kv_head]
    change = do.contributions(model, corrupt).sub_(do.contributions(model, clean))  # (N, S, T, C)
    names, grads = [f"h{l}.{x}" for l in layers for x in ("attn.z", "mlp.out")], {}
    for k in range(STEPS):
        found, _ = do.gradients(model, clean, metric, names, (1 - (k + 0.5) / STEPS) * change[:, 0])
        grads = {name: grads.get(name, 0) + found[name] / STEPS for name in names}
    scores = change.new_zeros(len(clean), *graph.edges.shape)
    with torch.no_grad():
        seen, whole = do.record(model, clean), metric(model(clean)[0])
        for u in range(len(graph.sources)):
            for l, block in enumerate(model.h):
                if graph.edges[u, graph.columns(l)[0]]:
                    moved = block.attn.c_attn(block.ln_1(seen[f"h{l}.attn.in"] + change[:, u]))
                    moved = moved.unflatten(-1, (-1, config.head_size)).split(sizes, dim=2)
                    columns = torch.tensor(graph.columns(l), device=scores.device).split(sizes)
                    for n in range(3):  # q, k or v alone is of the corrupt source
                        qkv = [moved[n] if x == "qkv"[n] else seen[f"h{l}.attn.{x}"] for x in "qkv"]
                        z = do.attend(model, *qkv)[0] - seen[f"h{l}.attn.z"]  # (N, T, H, D)
                        score = (z * grads[f"h{l}.attn.z"]).sum((1, 3)).unflatten(1, (sizes[n], -1)).sum(2)
                        scores[:, u].index_add_(1, columns[n], score)  # merged: the sum, as in edge_scores
                if graph.edges[u, graph.column[f"m{l}"]]:
                    out = block.mlp(block.ln_2(seen[f"h{l}.mlp.in"] + change[:, u])) - seen[f"h{l}.mlp.out"]
                    scores[:, u, graph.column[f"m{l}"]] = (out * grads[f"h{l}.mlp.out"]).sum((1, 2))
            logits = model.lm_head(model.ln_f(seen["final"] + change[:, u]))
            scores[:, u, graph.column["logits"]] = metric(logits) - whole
    return scores.float()
