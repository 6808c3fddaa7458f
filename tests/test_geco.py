"""The multiplier: it finds a known answer, keeps its bounds, comes back, and resumes."""

import math

import pytest
import torch

from geco import GECO


def solve(geco, start, steps=3000, state_at=None):
    """Minimise x^2 + y^2 subject to (x - 3)^2 + (y - 4)^2 <= tau by gradient descent."""
    point, center = torch.tensor(start, requires_grad=True), torch.tensor([3.0, 4.0])
    optimizer, trace = torch.optim.SGD([point], lr=0.02), []
    for step in range(steps):
        if step == state_at:  # a restart: only the two floats survive
            fresh = GECO(geco.tau, width=geco.width)
            fresh.load_state_dict(geco.state_dict())
            geco = fresh
        constraint = (point - center).square().sum()
        optimizer.zero_grad()
        geco.loss(point.square().sum(), constraint).backward()
        optimizer.step()
        geco.update(constraint.item())
        trace.append((point.tolist(), geco.lam))
    return trace


@pytest.mark.parametrize("start", [[0.0, 0.0], [3.0, 4.0], [10.0, -2.0]])  # outside and inside
@pytest.mark.parametrize("lam", [0.02, 50.0])
def test_converges_from_both_sides(start, lam):
    """The disc of radius 2 around (3, 4): nearest point (1.8, 2.4), lambda = 3 / 2."""
    point, found = solve(GECO(tau=4.0, width=4.0, lam=lam, lam_max=100.0), start)[-1]
    assert abs(point[0] - 1.8) < 1e-3 and abs(point[1] - 2.4) < 1e-3 and abs(found - 1.5) < 1e-3


def test_loss_is_the_normalised_lagrangian():
    geco = GECO(tau=2.0, lam=3.0, lam_max=20.0)
    E, ce = torch.tensor(0.5, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    loss = geco.loss(E, ce)
    assert loss.item() == (0.5 + 3 * 4.0) / 4
    dE, dce = torch.autograd.grad(loss, (E, ce))
    assert dE.item() == 0.25 and dce.item() == 0.75


def test_unreachable_tau_goes_to_the_bound_and_comes_back():
    """A thousand steps of violation must not cost a thousand steps of recovery."""
    geco = GECO(tau=1.0, nu=0.01, kp=0.5, ema=0.9, lam_max=100.0)
    for _ in range(5000):
        geco.update(50.0)
    assert math.isclose(geco.lam, 100 * math.exp(0.5))
    for _ in range(150):
        geco.update(0.5)
    assert geco.lam < 50
    for _ in range(5000):
        geco.update(1e-9)
    assert geco.lam > 0 and math.isclose(geco.lam, 0.01 * math.exp(-0.5))


def test_a_start_outside_the_bounds_is_moved_inside():
    assert GECO(tau=1, lam=1e9, lam_max=5.0).lam == pytest.approx(5.0)
    assert GECO(tau=1, lam_min=2.0, lam_max=5.0).lam == pytest.approx(2.0)


def test_lambda_rises_exactly_when_the_constraint_is_violated():
    for ce, sign in ((3.0, 1), (1.0, -1), (2.0, 0)):
        geco = GECO(tau=2.0, kp=0.0, lam_max=20.0)
        before = geco.lam
        geco.update(ce)
        assert (geco.lam > before) - (geco.lam < before) == sign


def test_update_follows_the_equations():
    """C, e, h and lambda by hand for three steps."""
    geco = GECO(tau=2.0, nu=0.1, kp=0.3, ema=0.5, width=0.5, lam=1.0, lam_max=20.0)
    c, h = None, 0.0
    for ce in (2.2, 1.9, 100.0):
        geco.update(ce)
        c = ce if c is None else 0.5 * c + 0.5 * ce
        e = max(-1, min(1, (c - 2) / 0.5))
        h = h + 0.1 * e
        assert math.isclose(geco.lam, math.exp(h + 0.3 * e), rel_tol=1e-12)


def test_resumes_bit_for_bit():
    whole = solve(GECO(tau=4.0, width=4.0), [0.0, 0.0], steps=200)
    assert solve(GECO(tau=4.0, width=4.0), [0.0, 0.0], steps=200, state_at=77) == whole


@pytest.mark.parametrize(
    "bad", [dict(tau=0), dict(tau=-1.0), dict(tau=math.nan), dict(tau=1, nu=0), dict(tau=1, ema=1),
            dict(tau=1, kp=-1), dict(tau=1, kp=1000), dict(tau=1, lam_max=1e-4), dict(tau=1, lam=0), dict(tau=1, width=0), dict(tau=1, lam_min=0)]
)
def test_bad_settings_are_one_clear_line(bad):
    with pytest.raises(ValueError) as error:
        GECO(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ce", [math.nan, math.inf])
def test_a_broken_loss_does_not_touch_the_state(ce):
    geco = GECO(tau=1.0)
    geco.update(1.5)
    before = geco.state_dict()
    with pytest.raises(ValueError, match="not updated"):
        geco.update(ce)
    assert geco.state_dict() == before
