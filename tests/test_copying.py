"""Copying: what the training text repeats, how copying is measured, and what the gates' story counts."""

import numpy as np
import pytest
import torch

from model import Config, Transformer
from plumbing import copying, tasks, tokens

BYTES = tokens.Bytes()
ALPHABET = tasks.usable(BYTES)


def repeated(row):
    """[(start, period, end)] of the stretches in which every token is the one `period` before it."""
    found, at = [], 0
    while at + 2 * copying.SHORTEST <= len(row):
        for period in range(copying.SHORTEST, (len(row) - at) // 2 + 1):
            end = at + period + int(np.cumprod(row[at + period:] == row[at:len(row) - period]).sum())
            if end >= at + 2 * period:
                found.append((at, period, end))
                at = end - 1
                break
        at += 1
    return found


def test_pieces_come_again_inside_of_text():
    """Text and alphabet of so many numbers that nothing comes twice by chance."""
    text, alphabet = np.arange(129), np.arange(1000, 100_000)
    lengths, copies, shares = [], [], []
    for seed in range(400):
        row = text.copy()
        unforeseen = copying.repeat_pieces(row, alphabet, np.random.default_rng(seed))
        stretches = repeated(row)
        first = [set(range(start, start + period)) for start, period, _ in stretches if row[start] >= 1000]
        assert set(unforeseen.nonzero()[0]) == set().union(*first)
        assert stretches, "at least one piece comes again"
        kept = np.ones(len(row), bool)
        for start, period, end in stretches:
            kept[start:end] = False
            lengths.append(period)
            copies.append((end - start) / period)
            piece = row[start:start + period]
            shares.append(bool((piece < 1000).all()))
            assert len(set(piece)) == period and (shares[-1] or (piece >= 1000).all())
        assert (row == text)[kept].all(), "between them the text is as it was"
    assert min(lengths) == 8 and max(lengths) >= 55 and 0.3 < np.mean(np.array(lengths) < 16) < 0.7
    assert min(copies) == 2 and max(copies) > 8 and 0.4 < np.mean(shares) < 0.6


def test_pieces_that_fill_the_row_go_on_to_its_end():
    for seed in range(50):
        row = np.arange(129)
        unforeseen = copying.repeat_pieces(row, np.arange(1000, 9000), np.random.default_rng(seed), fill=True)
        (start, period, end), = repeated(row)
        assert start < 8 and end == 129 and unforeseen.sum() in (0, period)


def test_a_piece_of_random_ids_has_no_more_than_there_are():
    """Of twelve ids: what is longer is cut, and its second copy can be foreseen."""
    cut = 0
    for seed in range(50):
        row = np.arange(129)
        unforeseen = copying.repeat_pieces(row, np.arange(1000, 1012), np.random.default_rng(seed), fill=True)
        (start, period, _), = repeated(row)
        cut += row[start] >= 1000 and period == 12
        assert unforeseen.sum() in (0, period) and not unforeseen[start + period:].any()
    assert cut > 5


def test_a_share_of_the_blocks_has_them_whatever_the_batch():
    data = (np.arange(40_000) * 7919 % 9973 % 251).astype(np.uint16)
    plain, some = tokens.Blocks(data, 128, 3), tokens.Blocks(data, 128, 3, 0.25, ALPHABET)
    idx, targets = some.batch(0, 200)
    shown = targets[:, :-1] >= 0
    assert torch.equal(idx[:, 1:][shown], targets[:, :-1][shown])
    changed = (idx != plain.batch(0, 200)[0]).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(3, 200, 4)), "each batch has its share"
    assert shown[~changed].all() and 0.6 < shown[changed].float().mean() < 0.95
    for start, n in ((0, 7), (7, 100), (150, 50)):
        assert torch.equal(some.batch(start, n)[0], idx[start:start + n])
    assert torch.equal(some.evenly(50)[0], some.evenly(50)[0])
    assert (data == (np.arange(40_000) * 7919 % 9973 % 251)).all(), "the data is not written to"


def test_a_context_too_short_for_two_pieces_is_refused():
    with pytest.raises(ValueError, match="a piece of 8 tokens does not come twice in a context of 15: give "
                                         "--context 16 or more, or --repeat 0"):
        tokens.Blocks(np.zeros(999, np.uint8), 15, repeat=0.5, alphabet=ALPHABET)
    tokens.Blocks(np.zeros(999, np.uint8), 15)


class Copier(torch.nn.Module):
    """Says what came `wrong` places behind the token after the last occurrence."""

    def __init__(self, wrong=0):
        super().__init__()
        self.wte, self.wrong = torch.nn.Embedding(257, 1), wrong

    def forward(self, idx, tap=None):
        period = idx.shape[1] // 2
        return torch.nn.functional.one_hot(idx.roll(period - 1 - self.wrong, 1), 257).float(), None, None


def test_accuracy_is_one_for_what_copies_and_zero_for_what_is_off_by_one():
    found = copying.accuracy(Copier(), BYTES, 128)
    assert list(found) == [8, 12, 16, 20, 24, 32, 40, 48, 60] and set(found.values()) == {1.0}
    assert set(copying.accuracy(Copier(1), BYTES, 128).values()) == {0.0}
    assert list(copying.accuracy(Copier(), BYTES, 47)) == [8, 12, 16, 20]
    assert copying.accuracy(Copier(), BYTES, 0) == {}


def maps_of_a_story(T=8, n=3):
    """Layer 0, head 1 reads the token before, but not from query 3; layer 1, head 0 reads what came next."""
    maps = torch.zeros(n, 2, 2, T, T)
    for i in range(1, T):
        maps[:, 0, 1, i, i - 1] = i != 3
    for i in range(T // 2, T):
        maps[:, 1, 0, i, i - T // 2 + 1] = 0.9
    maps[:, 1, 0, 2, 2] = maps[:, 1, 1, 5, 1] = 0.1
    return maps


def test_the_story_counts_the_gates():
    maps = maps_of_a_story()
    heads = copying.find_heads(maps)
    assert heads == {"previous token": (0, 1), "induction": (1, 0)}
    told = copying.story(maps, heads)
    assert told["heads"] == {"previous token": "a0.h1", "induction": "a1.h0"}
    assert told["previous_token_open"] == pytest.approx(6 / 7)
    assert told["induction_open"] == 1 and told["induction_right"] == pytest.approx(4 / 5)
    assert told["table"] == [[4, 0], [1, 31]]  # 36 pairs, 4 of them right
    assert told["open"] == {
        "the token before": {"a0.h1": 6}, "what came next the last time": {"a1.h0": 4},
        "the same token, the last time": {"a1.h1": 1}, "itself": {"a1.h0": 1},
        "two to four before": {}, "the first token": {}, "another": {}}


def test_a_team_is_every_head_with_half_of_the_strongest_s_weight():
    maps = maps_of_a_story()
    maps[:, 1, 1] = maps[:, 1, 0] * 0.6
    maps[:, 0, 0] = maps[:, 0, 1] * 0.4
    assert copying.find_teams(maps) == {"previous token": [(0, 1)], "induction": [(1, 0), (1, 1)]}


def test_every_pair_is_of_one_kind():
    of = copying.kinds(12)
    assert torch.equal(sum(pairs.int() for pairs in of.values()), torch.ones(12, 12).tril().int())
    assert of["what came next the last time"].nonzero().tolist() == [[i, i - 5] for i in range(6, 12)]


def test_a_beginning_of_text_id_moves_every_token_by_one(monkeypatch):
    """T = 13: token 0 stands in front, 1 to 6 come again as 7 to 12."""
    edges = [[i, i - 5] for i in range(7, 13)]
    assert copying.kinds(13)["what came next the last time"].nonzero().tolist() == edges
    maps = torch.zeros(1, 1, 1, 13, 13)
    maps[..., *torch.tensor(edges).T] = 1.0
    assert copying.weight_by_role(maps)["induction"].item() == 1
    monkeypatch.setattr(BYTES, "bos", 256)
    assert list(copying.accuracy(Copier(), BYTES, 48)) == [8, 12, 16, 20]  # 24 and 24 and one do not fit


def test_a_head_that_is_shut_writes_nothing():
    torch.manual_seed(0)
    model = Transformer(Config(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16, init_std=0.3,
                               position="rope", sparse=True, gate_bias=2.0)).requires_grad_(False)
    idx = torch.randint(257, (2, 16))
    found, whole = model(idx, tap=copying.shut([(0, 1), (1, 0)]))[0], model(idx)[0]
    model.h[0].attn.c_proj.weight[:, 8:] = 0  # the columns that read head 1
    model.h[1].attn.c_proj.weight[:, :8] = 0
    assert torch.allclose(found, model(idx)[0], atol=1e-6) and not torch.allclose(found, whole, atol=1e-3)


def test_surgery_shuts_what_it_says():
    torch.manual_seed(0)
    model = Transformer(Config(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=16, init_std=0.3))
    teams = {"previous token": [(0, 1)], "induction": [(1, 0), (1, 1)]}
    text = idx, targets = tokens.Blocks(tokens.load_data("python-docs", "bytes")["test"], 32).evenly(64)
    cut = copying.surgery(model, BYTES, teams, {(0, 1), (1, 0)}, text)
    assert list(cut) == ["nothing", "the previous token head, a0.h1", "the induction heads, a1.h0 a1.h1",
                         "all but the 2 heads of the circuit", "all but the named heads"]
    assert cut["nothing"]["copying"] == copying.accuracy(model, BYTES, 32, n=32)
    for name, left_out in (("nothing", []), ("the induction heads, a1.h0 a1.h1", [(1, 0), (1, 1)]),
                           ("all but the 2 heads of the circuit", [(0, 0), (1, 1)]),
                           ("all but the named heads", [(0, 0)])):
        with torch.no_grad():
            ce = model(idx, targets, tap=copying.shut(left_out))[1]
        assert cut[name]["ce_text"] == pytest.approx(ce.item(), rel=1e-4)
    assert len({case["ce_text"] for case in cut.values()}) == 5
