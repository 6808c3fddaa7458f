"""
Copying: text in which there is something to copy, and how well a model does it.

A model that has seen AB and now sees A again should say B: induction, arXiv 2209.11895. It is the
one task that a small model learns from any text, if pieces of the text come again. Two heads do it: one
reads the token before, and the induction head looks for the token whose predecessor is like this one.
"""

import contextlib

import numpy as np
import torch

from plumbing import tasks

SHORTEST = 8  # tokens of a piece that comes again
PERIODS = (8, 12, 16, 20, 24, 32, 40, 48, 60)  # lengths of the pieces by which copying is measured


def repeat_pieces(row, alphabet, random, fill=False):
    """Put pieces that come again into a row of text (T,), in place; between them the text goes on.

    A piece has 8 to T / 2 tokens, as many from 8 to 16 as from 16 to 32; half of the pieces are text, half
    are different random ids. It comes twice or, if there is room, more often, one after the other; with
    `fill` to the end of the row: so copying begins sooner, but short pieces hardly count in the loss.
    Returns bool (T,): random ids that come for the first time, which no model can foresee.
    """
    T, unforeseen = len(row), np.zeros(len(row), bool)
    at = int(random.integers(SHORTEST))
    while at + 2 * SHORTEST <= T:
        length = log_uniform(random, SHORTEST, (T - at) // 2 + 1)
        if random.random() < 0.5:
            piece = row[at : at + length]
        else:
            piece = random.permutation(alphabet)[:length]
            unforeseen[at : at + len(piece)] = True
        end = T if fill else at + len(piece) * log_uniform(random, 2, (T - at) // len(piece) + 1)
        row[at:end] = np.resize(piece, end - at)
        at = end + int(random.integers(SHORTEST))
    return unforeseen


def log_uniform(random, low, high):
    """An integer from low to high - 1, small ones more often: log n is uniform."""
    return int(np.exp(random.uniform(np.log(low), np.log(high))))


# -----------------------------------------------------------------------------
# how well


@torch.no_grad()
def accuracy(model, tok, context, n=64, tap=None, amp=contextlib.nullcontext):
    """{period: share of tokens copied right} on random tokens that come twice, n prompts a period.

    The first token of the second time is not asked for: nothing says that it comes again. amp: makes the
    autocast in which a model with bfloat16 weights runs.
    """
    found = {}
    for period in PERIODS:
        if 2 * period + (tok.bos is not None) <= context:
            prompts = tasks.make("induction", tok, n, seed=period, length=period).clean
            with amp():
                logits = model(prompts.to(model.wte.weight.device), tap=tap)[0][:, -period:-1]
            found[period] = (logits.argmax(-1).cpu() == prompts[:, -period + 1:]).float().mean().item()
    return found


# -----------------------------------------------------------------------------
# by which heads: read from attention maps A a (N, L, H, T, T) of prompts that come twice, T = 2 period, or one
# more where a beginning-of-text id stands in front


def weight_by_role(maps):
    """{"previous token": (L, H), "induction": (L, H)}: each head's mean weight on the edges of that role."""
    period, front = divmod(maps.shape[-1], 2)
    return {"previous token": maps.diagonal(-1, -2, -1).mean((0, -1)),  # from i - 1 to i
            "induction": maps.diagonal(1 - period, -2, -1)[..., 1 + front:].mean((0, -1))}  # from i + 1 - period


def find_heads(maps):
    """{"previous token": (l, h), "induction": (l, h)}: the heads with most weight on those two edges."""
    return {role: divmod(int(w.argmax()), maps.shape[2]) for role, w in weight_by_role(maps).items()}


def find_teams(maps):
    """{role: [(l, h), ...]}: all heads with at least half the weight of the strongest."""
    return {role: list(map(tuple, (w >= w.max() / 2).nonzero().tolist())) for role, w in weight_by_role(maps).items()}


def kinds(T):
    """{kind of edge: bool (T, T)}, each pair of query i (row) and key j <= i in one of them."""
    i, j = torch.arange(T)[:, None], torch.arange(T)
    left, found = j <= i, {}
    for kind, pairs in {"the token before": i - j == 1, "what came next the last time": i - j == T // 2 - 1,
                        "the same token, the last time": i - j == T // 2, "itself": i == j,
                        "two to four before": (i - j >= 2) & (i - j <= 4), "the first token": j == 0,
                        "another": j <= i}.items():
        found[kind] = pairs & left & ~(kind.startswith("what") & (j < 1 + T % 2))  # no token comes before it
        left = left & ~found[kind]
    return found


def story(maps, heads):
    """What the open gates of a sparse model are, in numbers a prompt.

    table: of the induction head, pairs [[right and open, right and shut], [others open, others shut]];
    right: the key is the token after the last occurrence of the query's.
    """
    gates, of = (maps > 0).float().mean(0), kinds(maps.shape[-1])
    previous, induction = (gates[heads[role]] for role in ("previous token", "induction"))
    right = of["what came next the last time"]
    counts = {kind: {f"a{l}.h{h}": gates[l, h][pairs].sum().item() for l in range(gates.shape[0])
                     for h in range(gates.shape[1]) if gates[l, h][pairs].any()} for kind, pairs in of.items()}
    others = ~right & torch.ones_like(right).tril()
    return {"heads": {role: "a{}.h{}".format(*place) for role, place in heads.items()},
            "previous_token_open": previous.diagonal(-1).mean().item(),
            "induction_open": induction[right].mean().item(),
            "induction_right": (induction[right].sum() / induction.sum().clamp(min=1e-9)).item(),
            "table": [[induction[pairs].sum().item(), (1 - induction)[pairs].sum().item()]
                      for pairs in (right, others)],
            "open": counts}


def shut(heads):
    """A tap that shuts all gates of these heads (l, h): they write nothing."""
    def tap(name, z):
        here = [h for l, h in heads if name == f"h{l}.attn.z"]
        if here:
            z = z.clone()
            z[:, :, here] = 0
        return z

    return tap


@torch.no_grad()
def surgery(model, tok, teams, circuit, text):
    """{what is shut: {"copying": {period: share}, "ce_text": nats a token of text (idx, targets)}}.

    teams: of find_teams, because one induction head may stand in for another; circuit: the heads (l, h)
    that the circuit needs.
    """
    idx, targets = (x.to(model.wte.weight.device) for x in text)
    every = {(l, h) for l in range(model.config.n_layer) for h in range(model.config.n_head)}
    named = {role: f"the {role} head{'s' * (len(team) > 1)}, " + " ".join(f"a{l}.h{h}" for l, h in team)
             for role, team in teams.items()}
    cases = {"nothing": []} | {named[role]: team for role, team in teams.items()} | {
        f"all but the {len(circuit)} heads of the circuit": every - circuit,
        "all but the named heads": every - {place for team in teams.values() for place in team}}
    return {name: {"copying": accuracy(model, tok, idx.shape[1], n=32, tap=shut(case)),
                   "ce_text": torch.stack([model(i[None], t[None], tap=shut(case))[1] for i, t in zip(idx, targets)])
                   .mean().item()} for name, case in cases.items()}


def circuits(studies, maps, tok, text):
    """({"story", "surgery"}, heads): which heads copy, what their gates do, what is left without them.

    studies {model: circuit_report.Study}; maps {model: A a (N, L, H, T, T)} of prompts that come twice;
    text: (idx, targets), each (N, T).
    """
    heads, cut = {name: find_heads(m) for name, m in maps.items()}, {}
    for name, study in studies.items():
        nodes = [source for source, used in zip(study.graph.sources, study.by_effect.any(1)) if used]
        circuit = {tuple(map(int, node[1:].split(".h"))) for node in nodes if node[0] == "a"}
        cut[name] = surgery(study.model, tok, find_teams(maps[name]), circuit, text)
    results = {"story": story(maps["sparse"], heads["sparse"]), "surgery": cut}
    print_story(results)
    return results, heads


def print_story(results):
    """What `story` found of the sparse model, and `surgery` of each: {"story": ..., "surgery": {name: ...}}."""
    told = results["story"]
    print(f"""
What the gates of the sparse model say, a prompt:
{told["heads"]["previous token"]} reads the token before in {told["previous_token_open"]:.0%} of the positions
{told["heads"]["induction"]} reads what came next the last time in {told["induction_open"]:.0%} of the positions where \
there is something to copy; {told["induction_right"]:.0%} of its open gates are that one
                                              open      shut   (pairs of query and key, {told["heads"]["induction"]})
the key is the token after the last occurrence {told["table"][0][0]:5.1f} {told["table"][0][1]:9.1f}
it is not                                      {told["table"][1][0]:5.1f} {told["table"][1][1]:9.1f}
All open gates, by what they read:""")
    for kind, heads in told["open"].items():
        most = sorted(heads, key=heads.get, reverse=True)
        print(f"  {kind:30} {sum(heads.values()):6.1f}   " + ", ".join(f"{h} {heads[h]:.1f}" for h in most[:6]))
    for name, cases in results["surgery"].items():
        print(f"\n{name}: what is shut, and then copying in % by period; CE of text")
        for case, found in cases.items():
            print(f"  {case:42}", *(f"{100 * x:3.0f}" for x in found["copying"].values()), f"  {found['ce_text']:.3f}")
