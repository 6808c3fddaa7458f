"""
GECO: minimise an objective under a constraint, with one multiplier that steers itself.

    minimise E(theta)   subject to   C(theta) <= tau             here C is the cross-entropy, in nats

The Lagrangian E + lambda (C - tau) has a weight lambda > 0 that nobody knows beforehand. GECO raises
it while the constraint is violated and lowers it while there is room. One training step:

    loss = (E + lambda C) / (1 + lambda)           a weighted mean: the gradient stays bounded  (4)
    c    <- ema c + (1 - ema) C                    the C of one batch is noisy
    e    =  clip((c - tau) / width, -1, 1)         > 0 if violated, <= 1 however far off
    h    <- clip(h + nu e, log lam_min, log lam_max)               the integral of e
    lambda = exp(h + kp e)                         kp damps the swings that the delay causes    (5)

The clips keep it sane: a constraint that can not be met takes h to its bound and no further, and from
there it comes back at once. Adam is no good here, because its step is as large for a small violation.
Sources: GECO, arXiv 1810.00597, algorithm 1 (here with a clip, and the proportional term of PID
control); SPARTAN, arXiv 2411.06890, for sparse attention.

    python geco.py          solves a problem with a known answer and draws how lambda got there
"""

import math
import time
from dataclasses import dataclass

import torch

from plumbing.figures import draw_geco
from plumbing.flags import results_folder, run, write_results


class GECO:
    """The multiplier of one constraint C <= tau; equations 4 and 5. Its state is two floats, h and c.

    tau, width: in C's units. ema in [0, 1). lam: exp(h) at the start. Bad values: ValueError.
    The defaults suit language models, where 0.06 nats are a violation that matters. nu: exp(h) changes
    by a factor of e in 100 updates at most. ema: averages over 20 updates, which is less. kp: a full
    violation counts for a factor of e at once. lam_min, lam_max bound exp(h); lambda goes a factor of
    exp(kp) beyond. So while a bound is out of reach, the penalty keeps 40% of the loss, and lambda is
    soon back. The price: with exp(h) at lam_max only kp e pushes, and a bound that needs more is missed.
    """

    def __init__(self, tau, nu=0.01, kp=1.0, ema=0.95, width=0.06, lam=0.5, lam_min=0.01, lam_max=0.5):
        for name, value in dict(tau=tau, nu=nu, width=width, lam=lam, lam_min=lam_min).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not (0 <= ema < 1 and 0 <= kp < 20 and lam_min <= lam_max < math.inf):
            raise ValueError("need 0 <= ema < 1, 0 <= kp < 20 and lam_min <= lam_max < inf, got "
                             f"{ema}, {kp}, {lam_min} and {lam_max}")
        self.tau, self.nu, self.kp, self.ema, self.width = tau, nu, kp, ema, width
        self.log_min, self.log_max = math.log(lam_min), math.log(lam_max)
        self.h = min(max(math.log(lam), self.log_min), self.log_max)
        self.c = None  # before the first update

    @property
    def error(self):
        """e; 0 before the first update."""
        return 0.0 if self.c is None else max(-1.0, min(1.0, (self.c - self.tau) / self.width))

    @property
    def lam(self):
        return math.exp(self.h + self.kp * self.error)

    def loss(self, objective, constraint):
        """What to minimise in this step: E and C are scalars, tensors or floats. Equation 4."""
        lam = self.lam
        return (objective + lam * constraint) / (1 + lam)

    def update(self, constraint):
        """A new measurement of C, a float, averaged over all ranks, moves c and h. Equation 5."""
        C = float(constraint)
        if not math.isfinite(C):
            raise ValueError(f"the constrained loss is {C}: lambda was not updated")
        self.c = C if self.c is None else self.ema * self.c + (1 - self.ema) * C
        self.h = min(max(self.h + self.nu * self.error, self.log_min), self.log_max)

    def state_dict(self):
        return {"h": self.h, "c": self.c}

    def load_state_dict(self, state):
        self.h, self.c = state["h"], state["c"]


# -----------------------------------------------------------------------------
# run as a script: the point of a disc that is nearest to the origin


@dataclass
class Flags:
    out: str = "out/geco"  # folder for results.json and geco.png
    steps: int = 2000  # gradient steps
    tau: float = 4.0  # squared radius of the disc, below 25

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.tau < 25:
            raise ValueError("need --steps of at least 1 and --tau between 0 and 25")


def main(flags):
    started, picture = time.time(), f"{results_folder(flags.out)}/geco.png"
    torch.manual_seed(0)
    print("minimise x^2 + y^2 subject to (x - 3)^2 + (y - 4)^2 <= tau, seen through noise")
    center, radius = torch.tensor([3.0, 4.0]), math.sqrt(flags.tau)
    point, trace = torch.tensor([0.0, 6.0], requires_grad=True), []
    optimizer = torch.optim.SGD([point], lr=0.02)
    geco = GECO(flags.tau, width=flags.tau, lam_min=0.01, lam_max=20.0)  # the disc is not in nats
    for _ in range(flags.steps):
        objective, constraint = point.square().sum(), (point - center).square().sum()
        trace.append((objective.item(), constraint.item(), geco.lam))
        optimizer.zero_grad()
        geco.loss(objective, constraint).backward()
        optimizer.step()
        noise = math.exp(0.2 * torch.randn(()).item() - 0.02)  # log-normal, of mean 1
        geco.update(constraint.item() * noise)
    # the nearest point lies on the line to the centre: E = (5 - r)^2, lambda = (5 - r) / r
    expected = {"objective": (5 - radius) ** 2, "constraint": flags.tau, "lambda": 5 / radius - 1}
    measured = dict(zip(expected, torch.tensor(trace[-max(1, flags.steps // 10):]).mean(0).tolist()))
    for name in expected:
        print(f"  {name:10} expected {expected[name]:7.4f}   measured {measured[name]:7.4f}, late mean")
    draw_geco(trace, expected, picture)
    print("wrote", write_results(flags.out, started, expected=expected, measured=measured), picture)


if __name__ == "__main__":
    run(main, Flags, __doc__)
