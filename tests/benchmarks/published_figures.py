"""Compare our estimators with published figures and closed forms on four toy problems.

    python tests/benchmarks/published_figures.py [--smoke]

The problems are a squared error of one Bernoulli variable; three Bernoulli variables as one site
of eight categories; two hundred Bernoulli variables, at the start and while a control variate is
trained; and 128 Bernoulli variables trained to a known optimum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _report import Report, make_parser
from pyro.infer import SVI
from torch import Tensor

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DoubleControlVariate,
    Estimator,
    LeaveOneOut,
    ReinMax,
    Score,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DOUBLE = torch.float64


class Expectation:
    """``E_q[f(z)]`` as programs: prior and guide cancel, and a factor is the cost.

    Args:
        family: Makes the distribution from logits.
        cost: The function, of values that ``family`` draws.
        logits: The guide's logits; a plate covers all dimensions but the event's.
    """

    def __init__(
        self, family: Callable[[Tensor], Any], cost: Callable[[Tensor], Tensor], logits: Tensor
    ) -> None:
        self.family, self.cost, self.logits = family, cost, logits

    def _parameter(self) -> Tensor:
        return pyro.param("logits", lambda: self.logits.clone())

    def model(self) -> None:
        with pyro.plate("copies", len(self.logits)):
            z = pyro.sample("z", self.family(self._parameter().detach()))
            pyro.factor("cost", self.cost(z))

    def guide(self) -> None:
        with pyro.plate("copies", len(self.logits)):
            pyro.sample("z", self.family(self._parameter()))

    def draws(self, estimator: Estimator, num_particles: int = 1) -> Tensor:
        """Draw one gradient for each copy."""
        pyro.clear_param_store()
        elbo = Estimator_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
        elbo.loss_and_grads(self.model, config_gradient(self.guide, estimator))
        grad = pyro.get_param_store()._params["logits"].grad
        assert grad is not None
        return -grad


def bernoulli(logits: Tensor) -> Any:
    return dist.Bernoulli(logits=logits)


def squared_error_variances(t: float, theta: float) -> dict[str, float]:
    """Return gradient and variances of ``E[(b - t)^2]`` in closed form, by the logit."""
    a, spread = 1 - 2 * t, theta * (1 - theta)
    rarer = min(theta, 1 - theta)
    exact = a * spread
    arm = 2 * a**2 * (1 / 8 - (0.5 - rarer) ** 3) / 3 - exact**2
    pair = a**2 * rarer * (1 - rarer) ** 2 / 2 - exact**2
    s = 2 * spread
    return {
        "gradient": exact,
        "leave-one-out": a**2 * s * (1 - s) / 4,
        "arm": arm,
        "disarm": pair,
    }


def one_variable(report: Report, copies: int) -> None:
    """Compare variances for the squared error of one variable, with two evaluations."""
    rows = []
    for t, theta in [(0.45, 0.1), (0.45, 0.5), (0.49, 0.25), (0.49, 0.5), (0.499, 0.1)]:
        logits = torch.full((copies,), theta, dtype=DOUBLE).logit()
        toy = Expectation(bernoulli, lambda b, t=t: (b - t) ** 2, logits)
        known = squared_error_variances(t, theta)
        # The same cost without the square: linear, so that the control variate is exact.
        linear = Expectation(bernoulli, lambda b, t=t: t**2 + (1 - 2 * t) * b, logits)
        variate = DoubleControlVariate(2, learn=False)
        with torch.no_grad():
            variate.alpha.fill_(-1.0)
        rows.append(
            {
                "t": t,
                "theta": theta,
                "gradient": known["gradient"],
                "ours": toy.draws(DisARM()).mean().item(),
                "RLOO closed": known["leave-one-out"],
                "RLOO ours": toy.draws(Score(LeaveOneOut()), 2).var().item(),
                "ARM closed": known["arm"],
                "DisARM closed": known["disarm"],
                "DisARM ours": toy.draws(DisARM()).var().item(),
                "ARMS(4) ours": toy.draws(ARMS(4)).var().item(),
                "Double CV": linear.draws(variate).var().item(),
            }
        )
    report.table(
        f"E[(b - t)^2]: variances, {copies} draws; Double CV with alpha = -1, closed form 0", rows
    )


PUBLISHED_TOP_K = {
    0.0: [0.01275, 0.00756, 0.00633, 0.00525, 0.00363, 0.00161, 0.00118, 0.00100, 0.00099],
    -4.0: [7.70e-4, 3.28e-5, 2.10e-5, 4.82e-6, 2.69e-6, 2.49e-6, None, None, None],
}


def three_variables(report: Report, copies: int) -> None:
    """Compare variances for three variables with one logit, as one site of eight outcomes.

    The published figures are of a sum over the ``k`` likeliest outcomes and a two-sample estimate
    of the rest, where each outcome has its own baseline draw. The column ``exact`` computes them.
    Our estimators draw outcomes without replacement and use ``k + 1`` evaluations, not
    ``2 k + 2``. Compare at equal evaluations, not at equal ``k``.
    """
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=DOUBLE)
    f = ((states - torch.tensor([0.6, 0.51, 0.48], dtype=DOUBLE)) ** 2).sum(-1)
    for phi, published in PUBLISHED_TOP_K.items():
        logits = torch.full((copies, 1), phi, dtype=DOUBLE)

        def outcomes(logits: Tensor) -> Any:
            # An outcome's log-mass is its number of ones times the logit, up to a constant.
            return dist.Categorical(logits=states.sum(-1) * logits)

        toy = Expectation(outcomes, lambda z: f[z], logits)
        theta = torch.tensor(phi, dtype=DOUBLE).sigmoid()
        probs = theta ** states.sum(-1) * (1 - theta) ** (3 - states.sum(-1))
        score = states.sum(-1) - 3 * theta
        gradient = (probs * f * score).sum().item()
        rows = []
        for k in range(9):
            one, two = min(k, 7), min(max(k + 1, 2), 8)
            rows.append(
                {
                    "k": k,
                    "published": published[k],
                    "exact": top_k_variance(probs, f, score, k),
                    "SumAndSample(k)": None
                    if k in (0, 8)
                    else toy.draws(SumAndSample(one)).var().item(),
                    "UnorderedSet(k+1)": None
                    if k in (0, 8)
                    else toy.draws(UnorderedSet(two)).var().item(),
                }
            )
        ours = toy.draws(UnorderedSet(3))
        report.table(
            f"d = 3, logit {phi}: variances, {copies} draws; gradient {gradient:.6f}, "
            f"ours {ours.mean().item():.6f}",
            rows,
        )


def top_k_variance(probs: Tensor, f: Tensor, score: Tensor, k: int) -> float:
    """Return the variance of the published estimator of :func:`three_variables`."""
    order = probs.argsort(descending=True, stable=True)
    top, rest = order[:k], order[k:]
    var_f = (probs * f**2).sum() - (probs * f).sum() ** 2
    total = (probs[top] ** 2 * score[top] ** 2).sum() * var_f
    if len(rest):
        mass = probs[rest].sum()
        q = probs[rest] / mass
        gap = f[rest][:, None] - f
        sample = gap * score[rest][:, None]
        weight = q[:, None] * probs
        mean = (weight * sample).sum()
        total = total + mass**2 * ((weight * sample**2).sum() - mean**2)
    return total.item()


def two_hundred_variables(report: Report, steps: int, repeats: int) -> None:
    """Compare per-coordinate variances while maximising a mean squared error to .499."""
    size, t = 200, 0.499

    def variables(logits: Tensor) -> Any:
        return dist.Bernoulli(logits=logits).to_event(1)

    def cost(z: Tensor) -> Tensor:
        return ((z - t) ** 2).mean(-1)

    variate = DoubleControlVariate(2)
    methods: dict[str, tuple[Estimator, int]] = {
        "RLOO": (Score(LeaveOneOut()), 2),
        "DisARM": (DisARM(), 1),
        "Double CV": (variate, 1),
    }
    start = {"RLOO": 1.250e-9, "DisARM": 1.244e-9, "Double CV": 1.3e-9}
    end = {"RLOO": 6e-10, "DisARM": 6e-10, "Double CV": 0.0}
    rows = []
    for name, (estimator, particles) in methods.items():
        training = Expectation(variables, cost, torch.zeros(1, size, dtype=DOUBLE))

        def variance(
            logits: Tensor, estimator: Estimator = estimator, r: int = particles
        ) -> float:
            wide = Expectation(variables, cost, logits.detach().expand(repeats, -1).clone())
            return wide.draws(estimator, r).var(0).mean().item()

        row: dict[str, Any] = {"method": name, "start": variance(training.logits)}
        row["published start"] = start[name]
        pyro.clear_param_store()
        optim = pyro.optim.RMSprop(
            lambda param: {"lr": 5e-4 if param.startswith("gradient$") else 1e-2}
        )
        elbo = Estimator_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(training.model, config_gradient(training.guide, estimator), optim, loss=elbo)
        for step in range(1, steps + 1):
            svi.step()
            if step in (steps * 9 // 20, steps):
                saved = pyro.get_param_store().get_state()
                row[f"step {step}"] = variance(pyro.param("logits"))
                pyro.get_param_store().set_state(saved)
        row["published end"] = end[name]
        row["alpha"] = variate.alpha.item() if estimator is variate else None
        rows.append(row)
    report.table(f"200 variables, t = .499: per-coordinate variance over {repeats} draws", rows)


def polynomial(report: Report, steps: int) -> None:
    """Train 128 Bernoulli variables on ``|b - .45|^p``; report the loss of the last 200 steps."""
    known = {
        1.5: (0.3019, {"straight-through": 0.3522, "ReinMax": 0.3054, "RLOO": 0.3026}),
        2.0: (0.2025, {"straight-through": 0.2475, "ReinMax": 0.2038, "RLOO": 0.2032}),
        3.0: (0.0911, {"straight-through": 0.1213, "ReinMax": 0.0916, "RLOO": 0.0916}),
    }
    methods = {
        "straight-through": StraightThrough,
        "ReinMax": ReinMax,
        "RLOO": lambda: Score(LeaveOneOut()),
        "DisARM": DisARM,
    }
    rows = []
    for p, (optimum, published) in known.items():
        for name, make in methods.items():
            loss, theta = train_polynomial(p, make(), steps)
            rows.append(
                {
                    "p": p,
                    "method": name,
                    "loss": loss,
                    "reported": published.get(name),
                    "optimum": optimum,
                    "mean theta": theta,
                }
            )
    report.table(f"|b - .45|^p, 128 variables, batch 64, {steps} steps of Adam", rows)


def train_polynomial(p: float, estimator: Estimator, steps: int) -> tuple[float, float]:
    """Return the mean of the last 200 training losses and of the probabilities."""
    size = 128
    logits = torch.empty(1, size).uniform_(-0.01, 0.01)

    def variables(logits: Tensor) -> Any:
        return dist.Bernoulli(logits=logits).to_event(1)

    toy = Expectation(variables, lambda z: -((z - 0.45).abs() ** p).mean(-1), logits)
    pyro.clear_param_store()
    elbo = Estimator_ELBO(64, vectorize_particles=True, max_plate_nesting=1)
    # Twice the published 1e-3, whose two-category sites have two logits instead of one.
    optim = pyro.optim.Adam({"lr": 2e-3})
    svi = SVI(toy.model, config_gradient(toy.guide, estimator), optim, loss=elbo)
    losses = [svi.step() for _ in range(steps)]
    tail = losses[-200:]
    return float(sum(tail) / len(tail)), pyro.param("logits").sigmoid().mean().item()


def main() -> None:
    """Run all four problems."""
    args = make_parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    report = Report("published_figures", args.out)
    one_variable(report, 2_000 if args.smoke else 400_000)
    three_variables(report, 2_000 if args.smoke else 400_000)
    two_hundred_variables(report, 40 if args.smoke else 2_000, 100 if args.smoke else 2_000)
    polynomial(report, 20 if args.smoke else 8_000)
    report.finish()


if __name__ == "__main__":
    main()
