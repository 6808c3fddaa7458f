"""Our edge attribution beside TransformerLens 4.3's, on a random GPT-2: every edge, time and memory.

    pip install transformer_lens==4.3.0
    python tests/peer_transformer_lens.py --prompts 16 --out results/eap

Run by hand; no test of the suite. TransformerLens scores one prompt at a time, by position, at what
it calls the corrupt run: clean and corrupt are swapped, and its positions are added up.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

from model import Config, Transformer
from patching import edge_attribution
from plumbing.flags import open_folder, run, write_results
from plumbing.runs import peak_memory

LETTER = {"q_input": "<q>", "k_input": "<k>", "v_input": "<v>"}


@dataclass
class Flags:
    n_layer: int = 12  # layers
    n_head: int = 12  # heads a layer
    n_embd: int = 768  # width
    prompts: int = 16  # prompt pairs
    tokens: int = 15  # tokens of each
    threads: int = 2  # CPU threads
    out: str = "out/eap"  # folder for results.json


def name(node):
    """TransformerLens's node by our name."""
    if node.kind in ("embed", "logits"):
        return {"embed": "input", "logits": "logits"}[node.kind]
    if node.kind in ("mlp_out", "mlp_in"):
        return f"m{node.layer}"
    return f"a{node.layer}.h{node.head}" + LETTER.get(node.kind, "")


def theirs(folder, clean, corrupt, right, wrong):
    """({(source, destination): score}, seconds) by TransformerLens."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.attribution_patching import (EdgeAttributionConfig,
                                                                      attribution_patch)
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model = TransformerBridge.boot_transformers(folder, hf_model=hf, device="cpu").eval()
    scores, began = {}, time.time()
    for n in range(len(clean)):
        found = attribution_patch(model, corrupt[n:n + 1], clean[n:n + 1],
                                  lambda logits: logits[0, -1, right[n]] - logits[0, -1, wrong[n]],
                                  EdgeAttributionConfig("edge"))
        for (u, v), score in found.edge_scores.items():
            scores[name(u), name(v)] = scores.get((name(u), name(v)), 0.0) + score / len(clean)
    return scores, time.time() - began


def main(flags):
    started = time.time()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    open_folder(flags.out)
    model = Transformer(Config(n_layer=flags.n_layer, n_head=flags.n_head, n_embd=flags.n_embd,
                               vocab_size=50257)).eval().requires_grad_(False)
    clean, corrupt = torch.randint(50257, (2, flags.prompts, flags.tokens))
    right, wrong = torch.randint(50257, (2, flags.prompts))
    rows = torch.arange(flags.prompts)
    metric = lambda logits: logits[rows, -1, right] - logits[rows, -1, wrong]
    edge_attribution(model, clean[:, :2], corrupt[:, :2], metric)  # warm-up
    before, began = peak_memory(), time.time()
    scores, graph = edge_attribution(model, clean, corrupt, metric)
    seconds, memory = time.time() - began, peak_memory() - before
    print(f"{len(graph):,} edges, {flags.prompts} prompts of {flags.tokens} tokens: {seconds:.2f} s, "
          f"{memory:.0f} MiB beyond the weights")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        peer, peer_seconds = theirs(folder, clean, corrupt, right, wrong)
    ours = {(graph.sources[u], graph.destinations[v]): scores[u, v].item()
            for u, v in graph.edges.nonzero().tolist()}
    if peer.keys() != ours.keys():
        raise ValueError(f"{len(peer.keys() ^ ours.keys())} edges are only in one of the two graphs")
    largest = max(map(abs, ours.values()))
    difference = max(abs(ours[edge] - peer[edge]) for edge in ours)
    print(f"TransformerLens: {peer_seconds:.1f} s, {peer_seconds / seconds:.1f} times ours; largest "
          f"difference of an edge {difference:.1e}, largest score {largest:.2f}")
    print("wrote", write_results(flags.out, started, edges=len(graph), seconds_ours=seconds,
                                 mib_ours=memory, seconds_transformer_lens=peer_seconds,
                                 ratio=peer_seconds / seconds, largest_difference=difference,
                                 largest_score=largest, n=flags.prompts, tokens=flags.tokens))


if __name__ == "__main__":
    run(main, Flags, __doc__)
