"""What straight-through estimators are exact for, and what averaging over noise buys."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from helpers.formulas import EXACT, jacobian_of_draw, softmax_jacobian

from pyro_gumbel.estimators import (
    GumbelRao,
    GumbelStraightThrough,
    ReinMax,
    ReinMaxRao,
    StraightThrough,
)

DOUBLE = torch.float64
CATEGORIES = 5


def one_hot(logits):
    return dist.OneHotCategorical(logits=logits)


def mean_gradient(estimator, logits, slope):
    """Average ``J(D) grad f(D)`` over all draws ``D`` with their exact probabilities."""
    values, jacobians = jacobian_of_draw(estimator, one_hot, logits.expand(500, CATEGORIES))
    total = torch.zeros_like(logits)
    for c, probability in enumerate(logits.softmax(-1)):
        rows = values.argmax(-1) == c
        assert rows.any()
        first = rows.nonzero()[0, 0]
        total += probability * jacobians[first].T @ slope(values[first])
    return total


def quadratic(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(CATEGORIES, CATEGORIES, dtype=DOUBLE, generator=generator)
    linear = torch.randn(CATEGORIES, dtype=DOUBLE, generator=generator)
    logits = 0.5 * torch.randn(CATEGORIES, dtype=DOUBLE, generator=generator)
    costs = matrix.diagonal() + linear  # f at the corners
    exact = softmax_jacobian(logits.softmax(-1)) @ costs
    return logits, lambda d: (matrix + matrix.T) @ d + linear, linear, exact


@pytest.mark.parametrize("seed", range(5))
def test_reinmax_is_exact_on_quadratics(seed):
    logits, slope, _, exact = quadratic(seed)
    torch.testing.assert_close(mean_gradient(ReinMax(), logits, slope), exact, **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_straight_through_is_exact_on_linear_costs(seed):
    logits, _, linear, _ = quadratic(seed)
    found = mean_gradient(StraightThrough(), logits, lambda d: linear)
    torch.testing.assert_close(found, softmax_jacobian(logits.softmax(-1)) @ linear, **EXACT)


@pytest.mark.parametrize("estimator", [StraightThrough(), ReinMax(1.3), ReinMax(0.7)], ids=repr)
def test_the_check_sees_who_is_not_exact_on_quadratics(estimator):
    logits, slope, _, exact = quadratic(0)
    found = mean_gradient(estimator, logits, slope)
    assert (found - exact).norm() > 0.01 * exact.norm()


def test_reinmax_is_exact_on_bits_whatever_the_cost():
    """A function of one bit has three values at most that matter: 0, 1 and the slope at each."""
    logits = torch.linspace(-3, 3, 7, dtype=DOUBLE)
    theta = logits.sigmoid()
    # f(b) = a b^2 + c b: f(1) - f(0) = a + c, slopes c at 0 and 2 a + c at 1.
    a, c = 1.7, -0.4
    total = torch.zeros(7, dtype=DOUBLE)
    drawn = logits.expand(2000, 7).clone().requires_grad_()
    bits = ReinMax().draw(dist.Bernoulli(logits=drawn))
    (grads,) = torch.autograd.grad(bits.sum(), drawn)
    for column in range(7):
        for bit, slope, weight in ((0.0, c, 1 - theta), (1.0, 2 * a + c, theta)):
            rows = bits[:, column] == bit
            total[column] += weight[column] * grads[rows, column][0] * slope
    torch.testing.assert_close(total, theta * (1 - theta) * (a + c), **EXACT)


def estimates(estimator, num_draws=40_000):
    """Gradient draws of a fixed quadratic cost, ``(draws, C)``."""
    logits = torch.tensor([1.0, 0.0, -0.5, 0.3], dtype=DOUBLE).expand(num_draws, 4).clone()
    logits.requires_grad_()
    matrix = torch.tensor(
        [
            [2.0, -1.0, 0.5, 0.0],
            [-1.0, 1.0, 0.3, 1.0],
            [0.5, 0.3, -2.0, 0.2],
            [0.0, 1.0, 0.2, 1.5],
        ],
        dtype=DOUBLE,
    )
    value = estimator.draw(one_hot(logits))
    cost = torch.einsum("ni,ij,nj->n", value, matrix, value)
    return torch.autograd.grad(cost.sum(), logits)[0]


def variance(draws):
    """The total variance and its standard error."""
    squares = ((draws - draws.mean(0)) ** 2).sum(-1)
    return squares.mean().item(), (squares.std() / len(squares) ** 0.5).item()


def mean_z(one, other):
    error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    return ((one.mean(0) - other.mean(0)) / error).abs().max().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("num_samples", [1, 10, 100])
def test_gumbel_rao_has_gumbel_straight_throughs_mean_and_less_variance(temperature, num_samples):
    """40,000 draws each: the means agree, the variance never grows, and falls from 10 on."""
    plain = estimates(GumbelStraightThrough(temperature))
    averaged = estimates(GumbelRao(temperature, num_samples=num_samples))
    assert mean_z(plain, averaged) < 5
    error = (plain.var(0) / len(plain)).sum().sqrt() / plain.mean(0).norm()
    assert error < 0.02
    (before, before_error), (after, after_error) = variance(plain), variance(averaged)
    drop_z = (before - after) / (before_error**2 + after_error**2) ** 0.5
    assert drop_z > -5
    assert drop_z > 5 or num_samples == 1


def test_the_check_sees_another_mean():
    """Another temperature is another mean: the comparison above can fail."""
    assert mean_z(estimates(GumbelStraightThrough(1.0)), estimates(GumbelRao(0.8))) > 5


def test_reinmax_rao_lowers_reinmaxs_variance():
    reinmax, averaged = estimates(ReinMax()), estimates(ReinMaxRao(1.0))
    (before, before_error), (after, after_error) = variance(reinmax), variance(averaged)
    assert (before - after) / (before_error**2 + after_error**2) ** 0.5 > 5


def test_reinmax_rao_halves_a_linear_costs_gradient_when_cold():
    """A tie with the draw is then the only way into the Jacobian, and half of all ties remain."""
    logits = torch.tensor([1.0, 0.0, -0.5], dtype=DOUBLE)
    _, jacobians = jacobian_of_draw(
        ReinMaxRao(0.01, num_samples=50), one_hot, logits.expand(40_000, 3)
    )
    exact = softmax_jacobian(logits.softmax(-1))
    shares = (jacobians * exact).sum((-1, -2)) / (exact**2).sum()
    error = shares.std().item() / len(shares) ** 0.5
    assert error < 0.01
    assert shares.mean().item() == pytest.approx(0.5, abs=5 * error)
