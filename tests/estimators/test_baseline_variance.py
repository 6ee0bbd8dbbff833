"""What leave-one-out buys: variances against their exact values, by enumeration."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gumbel.estimators import LeaveOneOut, MovingAverage, Score
from pyro_gumbel.infer import Estimator_ELBO

DOUBLE = torch.float64
COPIES = 100_000
ODDS = [0.3, -1.5]  # near probability 1/2, where leave-one-out is at its best, and far from it


def log_joint_minus_log_q(bit, odds):
    z = torch.tensor(bit, dtype=DOUBLE)
    log_q = dist.Bernoulli(logits=torch.tensor(odds, dtype=DOUBLE)).log_prob(z)
    log_x = dist.Normal(2 * z - 1, 1.0).log_prob(torch.tensor(1.3, dtype=DOUBLE))
    return (math.log(0.5) + log_x - log_q).item()


def exact_variances(num_particles, odds):
    """Of the plain and the leave-one-out estimate, over the number of ones among the draws."""
    theta = 1 / (1 + math.exp(-odds))
    cost, score = [log_joint_minus_log_q(bit, odds) for bit in (0.0, 1.0)], [-theta, 1 - theta]
    moments = {"plain": [0.0, 0.0], "leave_one_out": [0.0, 0.0]}
    for ones in range(num_particles + 1):
        weight = math.comb(num_particles, ones) * theta**ones
        weight *= (1 - theta) ** (num_particles - ones)
        counts = [num_particles - ones, ones]
        mean = sum(n * f for n, f in zip(counts, cost, strict=True)) / num_particles
        found = {
            "plain": sum(n * f * s for n, f, s in zip(counts, cost, score, strict=True))
            / num_particles,
            "leave_one_out": sum(
                n * (f - mean) * s for n, f, s in zip(counts, cost, score, strict=True)
            )
            / (num_particles - 1),
        }
        for name, value in found.items():
            moments[name][0] += weight * value
            moments[name][1] += weight * value**2
    return {name: second - first**2 for name, (first, second) in moments.items()}


def closed_forms(num_particles, odds):
    """The same, as the docstring of ``LeaveOneOut`` states them."""
    theta = 1 / (1 + math.exp(-odds))
    at_zero, at_one = (log_joint_minus_log_q(bit, odds) for bit in (0.0, 1.0))
    v = theta * (1 - theta)
    centred = (1 - 2 * theta) ** 2 + 2 * v / (num_particles - 1)
    return {
        "plain": v / num_particles * (theta * at_zero + (1 - theta) * at_one) ** 2,
        "leave_one_out": v / num_particles * centred * (at_one - at_zero) ** 2,
    }


def gradients(estimator, num_particles, odds=ODDS[0]):
    """Independent estimates, one a copy."""
    odds = torch.full((COPIES,), odds, dtype=DOUBLE, requires_grad=True)

    def model():
        with pyro.plate("copies", COPIES):
            z = pyro.sample("z", dist.Bernoulli(torch.full((COPIES,), 0.5, dtype=DOUBLE)))
            pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=torch.tensor(1.3, dtype=DOUBLE))

    def guide():
        with pyro.plate("copies", COPIES):
            pyro.sample("z", dist.Bernoulli(logits=odds))

    elbo = Estimator_ELBO(num_particles, vectorize_particles=True, default=estimator)
    elbo.loss_and_grads(model, guide)
    return odds.grad


def variance_z(draws, exact):
    squares = (draws - draws.mean()) ** 2
    return ((squares.mean() - exact) / (squares.std() / len(squares) ** 0.5)).abs().item()


@pytest.mark.parametrize("odds", [*ODDS, 0.0])
@pytest.mark.parametrize("num_particles", [2, 4, 16, 128])
def test_variances_of_a_bit_are_those_of_the_closed_forms(num_particles, odds):
    expected = pytest.approx(closed_forms(num_particles, odds), rel=1e-6)
    assert exact_variances(num_particles, odds) == expected


@pytest.mark.parametrize(
    ("odds", "num_particles", "ratio"),
    [(ODDS[0], 4, 5.9992), (ODDS[0], 16, 20.282), (ODDS[1], 4, 0.058569), (ODDS[1], 32, 0.071304)],
)
def test_leave_one_out_against_no_baseline(odds, num_particles, ratio):
    """100,000 estimates each: both variances are the exact ones, and so is their ratio."""
    exact = exact_variances(num_particles, odds)
    plain = gradients(Score(), num_particles, odds)
    centred = gradients(Score(LeaveOneOut()), num_particles, odds)
    assert variance_z(plain, exact["plain"]) < 5
    assert variance_z(centred, exact["leave_one_out"]) < 5
    assert exact["plain"] / exact["leave_one_out"] == pytest.approx(ratio, rel=1e-3)
    assert (plain.var() / centred.var()).item() == pytest.approx(ratio, rel=0.05)


def test_a_moving_average_lowers_the_variance_of_one_particle():
    """From the second step on; the first has no past."""
    estimator = Score(MovingAverage(0.9))
    first, second = gradients(estimator, 1), gradients(estimator, 1)
    plain = gradients(Score(), 1)
    assert first.var() == pytest.approx(plain.var().item(), rel=0.05)
    assert second.var() < 0.5 * plain.var()
