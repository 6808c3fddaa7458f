"""
GECO: minimise an objective under a constraint, with one multiplier that steers itself.

    minimise E(theta)   subject to   CE(theta) <= tau

The Lagrangian E + lambda (CE - tau) has a weight lambda > 0 that nobody knows beforehand. GECO
raises it while the constraint is violated and lowers it while there is room. One training step:

    loss = (E + lambda CE) / (1 + lambda)          a weighted mean: the gradient stays bounded  (1)
    C    <- ema C + (1 - ema) CE                   a batch's CE is noisy                        (2)
    e    =  clip(log(C / tau) / width, -1, 1)      > 0 if violated, <= 1 however far off        (3)
    h    <- clip(h + nu e, log lambda_min, log lambda_max)         the integral of e            (4)
    lambda = exp(h + kp e)                         kp damps the swings that the delay causes    (5)

The clips are what keeps it sane: a constraint that can not be met takes h to its bound and no
further (lambda to lambda_max e^kp), and from there it comes back at once. The step size in h is nu and nothing else; an
Adam step would have the size of its learning rate however small the violation.
Sources: GECO, arXiv 1810.00597, algorithm 1 (here with log(C / tau) for its C - tau, and the
proportional term of PID control); SPARTAN, arXiv 2411.06890, for sparse attention.

    python geco.py          solves a problem with a known answer and draws how lambda got there
"""

import math
import os
import time
from dataclasses import dataclass

import torch


class GECO:
    """The multiplier of one constraint CE <= tau; equations 1-5. State: two floats.

    tau > 0 in CE's units (nats); width: log(C / tau) at which e reaches 1; nu: step of log lambda
    at e = 1; kp: proportional term; ema in [0, 1); lam: exp(h) at the start, moved within
    lam_min and lam_max, its bounds. Bad values: ValueError.
    """

    def __init__(self, tau, nu=0.01, kp=0.5, ema=0.95, width=1.0, lam=1.0, lam_min=0.01,
                 lam_max=100.0):
        for name, value in dict(tau=tau, nu=nu, width=width, lam_min=lam_min).items():
            if not (0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not (0 <= ema < 1 and 0 <= kp < 20 and lam_min <= lam_max < math.inf and lam > 0):
            raise ValueError("need 0 <= ema < 1, 0 <= kp < 20, lam > 0 and lam_min <= lam_max, got "
                             f"ema {ema}, kp {kp}, lam {lam}, {lam_min} to {lam_max}")
        self.tau, self.nu, self.kp, self.ema, self.width = tau, nu, kp, ema, width
        self.bounds = math.log(lam_min), math.log(lam_max)
        self.h = math.log(min(max(lam, lam_min), lam_max))
        self.c = None  # before the first CE

    @property
    def error(self):
        """e of equation 3; 0 before the first update."""
        if self.c is None:
            return 0.0
        return max(-1.0, min(1.0, math.log(max(self.c, 1e-30) / self.tau) / self.width))

    @property
    def lam(self):
        return math.exp(self.h + self.kp * self.error)

    def loss(self, objective, ce):
        """What to minimise in this step: scalars (tensors or floats), equation 1."""
        lam = self.lam
        return (objective + lam * ce) / (1 + lam)

    def update(self, ce):
        """Once a step, after loss: ce is this step's CE (a float), averaged over all ranks."""
        ce = float(ce)
        if not math.isfinite(ce):
            raise ValueError(f"the constrained loss is {ce}: lambda was not updated")
        self.c = ce if self.c is None else self.ema * self.c + (1 - self.ema) * ce
        low, high = self.bounds
        self.h = max(low, min(high, self.h + self.nu * self.error))

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
    tau: float = 4.0  # squared radius of the disc, at most 25

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.tau < 25:
            raise ValueError("need --steps of at least 1 and --tau between 0 and 25")


def main(flags):
    from plumbing.flags import open_folder, write_results

    started = time.time()
    open_folder(flags.out)
    torch.manual_seed(0)
    print("minimise x^2 + y^2 subject to (x - 3)^2 + (y - 4)^2 <= tau, seen through noise")
    center, radius = torch.tensor([3.0, 4.0]), math.sqrt(flags.tau)
    point = torch.tensor([0.0, 6.0], requires_grad=True)
    optimizer = torch.optim.SGD([point], lr=0.02)
    geco = GECO(flags.tau)
    trace = []
    for _ in range(flags.steps):
        objective, constraint = point.square().sum(), (point - center).square().sum()
        trace.append((objective.item(), constraint.item(), geco.lam))
        optimizer.zero_grad()
        geco.loss(objective, constraint).backward()
        optimizer.step()
        # log-normal noise of mean 1
        geco.update(constraint.item() * math.exp(0.2 * torch.randn(()).item() - 0.02))
    # the nearest point lies on the line to the centre: E = (5 - r)^2, lambda = (5 - r) / r
    expected = {"objective": (5 - radius) ** 2, "constraint": flags.tau,
                "lambda": (5 - radius) / radius}
    tail = torch.tensor(trace[-max(1, flags.steps // 10):]).mean(0).tolist()
    measured = dict(zip(expected, tail))
    for name in expected:
        print(f"  {name:10} expected {expected[name]:7.4f}   measured {measured[name]:7.4f}"
              "   (mean of the last tenth of the steps)")
    draw(trace, expected, os.path.join(flags.out, "geco.png"))
    print("wrote", write_results(flags.out, started, expected=expected, measured=measured),
          "and", os.path.join(flags.out, "geco.png"))


def draw(trace, expected, path):
    from matplotlib.figure import Figure

    from plumbing.flags import save_figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    colors = ["tab:blue", "tab:orange", "tab:purple"]
    axes = figure.subplots(1, 3)
    for axis, name, values, color in zip(axes, expected, zip(*trace), colors):
        axis.plot(values, color=color)
        label = f"$\\tau$ = {expected[name]:g}" if name == "constraint" else "exact answer"
        axis.axhline(expected[name], color="black", linestyle="--", linewidth=1, label=label)
        axis.set(xlabel="step", title={"lambda": "multiplier $\\lambda$"}.get(name, name))
        axis.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    from plumbing import flags

    flags.run(main, Flags, __doc__)
