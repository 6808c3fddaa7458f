"""Each variant changes the one thing that its name says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sparse
import train
from plumbing import ablations
from plumbing.flags import parse


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a tiny sparse run from a dense checkpoint."""
    folder = tmp_path_factory.mktemp("ablations")
    flags = parse(train.Flags, f"--n-layer 2 --n-head 2 --n-embd 16 --context 32 --steps 3 --dense-steps 2 "
                               f"--out {folder} --no-sparse".split())
    train.train(train.phases(flags)[0])
    return parse(train.Flags, f"--init {folder}/dense/last.pt --repeat 0.5 --steps 4 --lr 1e-2 --context 32".split())


def moved(flags, out):
    """{name: what training changed} of a run."""
    flags.out = str(out)
    train.train(flags)
    before, after = (torch.load(path, weights_only=True)["model"] for path in (flags.init, out / "last.pt"))
    return {name: after[name] - before[name] for name in before}


def test_q_and_k_alone(base, tmp_path):
    with ablations.only_q_and_k():
        change = moved(base, tmp_path)
    for name, difference in change.items():
        if "c_attn" in name:
            assert difference[:32].any() and not difference[32:].any()
        else:
            assert not difference.any(), name


def test_nothing_of_a_variant_stays_behind(base, tmp_path):
    build, choose = train.build, sparse.choose
    for _, patch in ablations.VARIANTS.values():
        if patch:
            with patch():
                pass
    assert (build, choose) == (train.build, sparse.choose) and train.LOOSE == 8
    assert moved(base, tmp_path)["wte.weight"].any()


def test_softplus_is_the_mean_over_allowed_pairs():
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).unbind()
    with ablations.softplus():
        y, E, opened = sparse.gated_attention(q, k, v, 0.7)
    s = q @ k.mT / 2
    want = torch.stack([F.softplus(s[0, h, i, j] + 0.7) for h in range(2) for i in range(5) for j in range(i + 1)])
    assert E.mean().item() == pytest.approx(want.mean().item(), rel=1e-5)
    torch.testing.assert_close(y, sparse.gated_attention(q, k, v, 0.7, impl="naive")[0], atol=1e-5, rtol=1e-5)


def test_a_variant_that_was_stopped_goes_on_by_the_same_command(base, tmp_path, capsys):
    """train.py --resume would finish it without what the variant changes."""
    with pytest.raises(SystemExit):
        ablations.post_train([replace(base, out=str(tmp_path), sitting=2)])
    assert "go on with: the same command\n" in capsys.readouterr().out


def test_results_of_other_flags_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('{"command": "python -m plumbing.ablations --seeds 5"}')
    with pytest.raises(ValueError, match="holds the results of .*--seeds 5"):
        ablations.main(ablations.Flags(out=str(tmp_path)))


@pytest.mark.parametrize("share, noisy", [(0.0, 0), (0.5, 2), (0.9, 4), (1.0, 4)])
def test_noise_until_a_share_of_the_steps(base, tmp_path, monkeypatch, share, noisy):
    seeds, forward = [], train.Transformer.forward
    monkeypatch.setattr(train.Transformer, "forward", lambda model, *args, seed=None, **more: (
        seeds.append(seed is not None and torch.is_grad_enabled()), forward(model, *args, seed=seed, **more))[1])
    train.train(replace(base, out=str(tmp_path), noisy=share))
    assert sum(seeds) == noisy
