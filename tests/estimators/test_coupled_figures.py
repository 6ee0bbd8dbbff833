"""Published and closed-form figures of the coupled estimators that take a second to reproduce.

The longer ones are printed beside the published by ``tests/benchmarks/published_figures.py``.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DoubleControlVariate,
    LeaveOneOut,
    LocalExpectation,
    ReinMax,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DRAWS = 100_000
DOUBLE = torch.float64


def gradients(cost, logits, estimator, num_particles=1, event=False):
    """Gradients of ``E[cost(b)]``, one for each element of a plate; prior and guide cancel."""
    phi = logits.clone().requires_grad_()

    def law(phi):
        fn = dist.Bernoulli(logits=phi)
        return fn.to_event(1) if event else fn

    def model():
        with pyro.plate("copies", len(phi)):
            pyro.factor("cost", cost(pyro.sample("z", law(phi.detach()))))

    def guide():
        with pyro.plate("copies", len(phi)):
            pyro.sample("z", law(phi))

    elbo = Estimator_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    elbo.loss_and_grads(model, config_gradient(guide, estimator))
    return -phi.grad


def check_variance(draws, mean, variance):
    """Squared deviations from the known mean, by z-score; 100,000 draws."""
    assert abs(draws.mean() - mean) < 5 * draws.std() / len(draws) ** 0.5 + 1e-15
    squares = (draws - mean) ** 2
    error = squares.std() / len(draws) ** 0.5
    assert abs(squares.mean() - variance) < 5 * error + 1e-9 * variance + 1e-20
    assert error <= 0.02 * variance + 1e-20


@pytest.mark.parametrize(
    ("t", "theta"),
    [(0.45, 0.1), (0.45, 0.5), (0.49, 0.25), (0.49, 0.5), (0.499, 0.1), (0.49, 0.8)],
)
def test_squared_error_of_a_bit(t, theta):
    """Variances of leave-one-out and DisARM in closed form; none is left at one half."""
    a, spread = 1 - 2 * t, theta * (1 - theta)
    rarer, s = min(theta, 1 - theta), 2 * theta * (1 - theta)
    logits = torch.full((DRAWS,), theta, dtype=DOUBLE).logit()
    pair = a**2 * rarer * (1 - rarer) ** 2 / 2 - (a * spread) ** 2
    for estimator, particles, variance in [
        (Score(LeaveOneOut()), 2, a**2 * s * (1 - s) / 4),
        (DisARM(), 1, pair),
        (ARMS(2), 1, pair),
    ]:
        draws = gradients(lambda b: (b - t) ** 2, logits, estimator, particles)
        check_variance(draws, a * spread, variance)


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.8])
def test_double_control_variate_leaves_nothing_of_a_linear_cost(theta):
    estimator = DoubleControlVariate(2, learn=False)
    with torch.no_grad():
        estimator.alpha.fill_(-1.0)
    logits = torch.full((1000,), theta, dtype=DOUBLE).logit()
    draws = gradients(lambda b: 0.2 + 0.7 * b, logits, estimator)
    exact = torch.full_like(draws, 0.7 * theta * (1 - theta))
    torch.testing.assert_close(draws, exact, rtol=1e-12, atol=1e-12)


def test_two_hundred_bits_at_the_start():
    """Per-coordinate variances at one half, t = .499: 1.250e-9 and 1.244e-9.

    A gradient is a sum over 200 bits; 4,000 draws of 200 coordinates each.
    """
    logits = torch.zeros(4_000, 200, dtype=DOUBLE)
    for estimator, particles, known in [
        (Score(LeaveOneOut()), 2, 1.250e-9),
        (DoubleControlVariate(2), 1, 1.250e-9),
        (DisARM(), 1, 1.244e-9),
    ]:
        draws = gradients(
            lambda b: ((b - 0.499) ** 2).mean(-1), logits, estimator, particles, event=True
        )
        squares = ((draws - draws.mean(0)) ** 2).mean(1)
        error = squares.std() / len(squares) ** 0.5
        assert abs(squares.mean() - known) < 5 * error
        assert error < 0.05 * known


@pytest.mark.parametrize(
    ("p", "slope", "stuck"), [(1.5, 0.1060, 0.475), (2.0, 0.1000, 0.450), (3.0, 0.0753, 0.401)]
)
def test_polynomial_programming(p, slope, stuck):
    """The exact slope; where straight-through stands still; and that ReinMax does not there."""

    def cost(b):
        return (b - 0.45).abs() ** p

    logits = torch.full((DRAWS,), stuck, dtype=DOUBLE).logit()
    exact = gradients(cost, logits[:1], LocalExpectation()).item() / (stuck * (1 - stuck))
    assert exact == pytest.approx(slope, abs=1e-4)
    still = gradients(cost, logits, StraightThrough())
    # The place is given to three digits.
    curvature = p * (0.55 ** (p - 1) + 0.45 ** (p - 1)) * stuck * (1 - stuck)
    error = still.std() / DRAWS**0.5
    assert still.mean().abs() < 5 * error + 5e-4 * curvature
    moving = gradients(cost, logits, ReinMax())
    assert moving.mean() > 10 * moving.std() / DRAWS**0.5
