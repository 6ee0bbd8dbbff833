"""Estimators averaged over conditional noise: formulas, means and variances."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from helpers.formulas import (
    EXACT,
    jacobian_of_draw,
    softmax_jacobian,
)

from pyro_gumbel.estimators import (
    GumbelRao,
    GumbelStraightThrough,
    ReinMax,
    ReinMaxRao,
    rao_blackwell,
)

DOUBLE = torch.float64
TINY_P = 2e-5


def one_hot(logits):
    return dist.OneHotCategorical(logits=logits)


@pytest.mark.parametrize("num_samples", [1, 3, 23])
def test_gumbel_rao_averages_jacobians_over_conditional_noise(monkeypatch, num_samples):
    given = torch.randn(num_samples, 20, 4, dtype=DOUBLE)
    _give_scores(monkeypatch, given)
    logits = torch.randn(20, 4, dtype=DOUBLE)
    _, jacobian = jacobian_of_draw(
        GumbelRao(0.6, num_samples=num_samples),
        one_hot,
        logits,
    )
    expected = softmax_jacobian((given / 0.6).softmax(-1)).mean(0) / 0.6
    torch.testing.assert_close(jacobian, expected, **EXACT)


def test_reinmax_rao_replaces_the_midpoint_jacobian(monkeypatch):
    given = torch.randn(7, 20, 4, dtype=DOUBLE)
    asked = _give_scores(monkeypatch, given)
    logits = torch.randn(20, 4, dtype=DOUBLE)
    value, jacobian = jacobian_of_draw(ReinMaxRao(0.6, num_samples=7), one_hot, logits)
    averaged = softmax_jacobian((given / 0.6).softmax(-1)).mean(0) / 0.6
    expected = 2 * averaged - softmax_jacobian(logits.softmax(-1)) / 2
    torch.testing.assert_close(jacobian, expected, **EXACT)
    # The noise is drawn around log pi_D.
    torch.testing.assert_close(asked[0].exp(), (logits.softmax(-1) + value) / 2, **EXACT)


def _give_scores(monkeypatch, given):
    """Replace the draws by given scores; return the list of the arguments."""
    asked, used = [], [0]

    def scores(log_probs, hard, sample_shape=()):
        asked.append(log_probs)
        start = used[0]
        used[0] += sample_shape[0]
        return given[start : used[0]]

    monkeypatch.setattr(rao_blackwell, "conditional_scores", scores)
    return asked


@pytest.mark.parametrize("chosen", [0, 2])
def test_conditional_scores_have_the_law_of_gumbels_given_their_argmax(chosen):
    """Compare with rejection sampling of perturbed logits with the right argmax."""
    probs = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
    hard = torch.eye(3, dtype=DOUBLE)[chosen]
    ours = rao_blackwell.conditional_scores(probs.log(), hard, (5000,))
    assert (ours.argmax(-1) == chosen).all()
    gumbels = -torch.empty(40_000, 3, dtype=DOUBLE).exponential_().log() + probs.log()
    kept = gumbels[gumbels.argmax(-1) == chosen]
    for c in range(3):
        assert scipy.stats.ks_2samp(ours[:, c].numpy(), kept[:, c].numpy()).pvalue > TINY_P
    gaps = [(scores[:, chosen] - scores[:, 1]).numpy() for scores in (ours, kept)]
    assert scipy.stats.ks_2samp(*gaps).pvalue > TINY_P


@pytest.mark.parametrize("estimator", [GumbelRao, ReinMaxRao])
def test_a_temperature_that_would_get_no_gradient_is_refused(estimator):
    with pytest.raises(ValueError, match=rf"{estimator.__name__}\(temperature.detach\(\)\), or"):
        estimator(torch.tensor(0.7, requires_grad=True))


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
    """With 40,000 draws the means agree. The variance is lower from 10 samples on."""
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
    """Estimators of different temperatures have different means."""
    assert mean_z(estimates(GumbelStraightThrough(1.0)), estimates(GumbelRao(0.8))) > 5


def test_reinmax_rao_lowers_reinmaxs_variance():
    reinmax, averaged = estimates(ReinMax()), estimates(ReinMaxRao(1.0))
    (before, before_error), (after, after_error) = variance(reinmax), variance(averaged)
    assert (before - after) / (before_error**2 + after_error**2) ** 0.5 > 5


def test_reinmax_rao_halves_a_linear_costs_gradient_when_cold():
    """Only ties with the draw then enter the Jacobian, and half of them remain."""
    logits = torch.tensor([1.0, 0.0, -0.5], dtype=DOUBLE)
    _, jacobians = jacobian_of_draw(
        ReinMaxRao(0.01, num_samples=50), one_hot, logits.expand(40_000, 3)
    )
    exact = softmax_jacobian(logits.softmax(-1))
    shares = (jacobians * exact).sum((-1, -2)) / (exact**2).sum()
    error = shares.std().item() / len(shares) ** 0.5
    assert error < 0.01
    assert shares.mean().item() == pytest.approx(0.5, abs=5 * error)
