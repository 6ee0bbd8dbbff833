"""Straight-through estimators: value and Jacobian as published, and exact cases."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from helpers.bit_costs import DRAWS, gradients
from helpers.formulas import (
    EXACT,
    gapped_jacobian,
    jacobian_of_draw,
    reinmax_jacobian,
    softmax_jacobian,
    softmax_of_jacobian,
    straight_through_jacobian,
)

from pyro_gumbel.estimators import (
    Exponential,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    LocalExpectation,
    ReinMax,
    StraightThrough,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DOUBLE = torch.float64
TINY_P = 2e-5


def one_hot(logits):
    return dist.OneHotCategorical(logits=logits)


# The Jacobian is a function of the logits and the draw. Estimators are made anew for each test.
DETERMINISTIC = {
    "straight_through": (StraightThrough, lambda phi, d: straight_through_jacobian(phi, d, 1.0)),
    "straight_through_1.3": (
        lambda: StraightThrough(1.3),
        lambda phi, d: straight_through_jacobian(phi, d, 1.3),
    ),
    "straight_through_tensor": (
        lambda: StraightThrough(torch.tensor(0.7, dtype=DOUBLE)),
        lambda phi, d: straight_through_jacobian(phi, d, 0.7),
    ),
    "straight_through_schedule": (
        lambda: StraightThrough(Exponential(0.8, 0.1, 1.0)),
        lambda phi, d: straight_through_jacobian(phi, d, 0.8),
    ),
    "reinmax": (ReinMax, lambda phi, d: reinmax_jacobian(phi, d, 1.0)),
    "reinmax_1.3": (lambda: ReinMax(1.3), lambda phi, d: reinmax_jacobian(phi, d, 1.3)),
    "gapped": (
        lambda: GappedStraightThrough(0.5),
        lambda phi, d: gapped_jacobian(phi, d, 0.5, 1.0),
    ),
    "gapped_0.2": (
        lambda: GappedStraightThrough(0.9, gap=0.2),
        lambda phi, d: gapped_jacobian(phi, d, 0.9, 0.2),
    ),
}
# Noise is left over when the draw is known.
SOFT = [
    (GumbelStraightThrough(0.7), 0.7),
    (GumbelStraightThrough(3.0, backward_temperature=0.4), 0.4),
    (GumbelRao(0.6, num_samples=1), 0.6),
]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_jacobian_given_the_draw(name):
    make, formula = DETERMINISTIC[name]
    logits = 2 * torch.randn(50, 5, dtype=DOUBLE)
    value, jacobian = jacobian_of_draw(make(), one_hot, logits)
    assert set(value.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(value.sum(-1), torch.ones(50, dtype=DOUBLE))
    torch.testing.assert_close(jacobian, formula(logits, value), **EXACT)


@pytest.mark.parametrize(
    ("estimator", "slope"),
    [
        (
            StraightThrough(0.7),
            lambda t, b: ((t[1] / 0.7).sigmoid() * (-t[1] / 0.7).sigmoid()) / 0.7,
        ),
        (
            ReinMax(),
            lambda t, b: 2 * (t[0] + b) / 2 * (1 - (t[0] + b) / 2) - t[0] * (1 - t[0]) / 2,
        ),
    ],
    ids=["straight_through", "reinmax"],
)
def test_bits_are_one_hots_of_two(estimator, slope):
    logits = torch.randn(40, dtype=DOUBLE, requires_grad=True)
    bits = estimator.draw(dist.Bernoulli(logits=logits))
    (grad,) = torch.autograd.grad(bits.sum(), logits)
    phi = logits.detach()
    torch.testing.assert_close(grad, slope((phi.sigmoid(), phi), bits.detach()), **EXACT)
    assert set(bits.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("estimator", "temperature"), SOFT, ids=lambda x: repr(x))
def test_gumbel_straight_through_keeps_noise_and_draw_together(estimator, temperature):
    """The Jacobian is that of a softmax whose largest entry is the draw, of logistic log-odds."""
    logits = torch.tensor([0.5, -1.0, 1.2, 0.0], dtype=DOUBLE)
    value, jacobian = jacobian_of_draw(estimator, one_hot, logits.expand(4000, 4))
    soft = softmax_of_jacobian(temperature * jacobian)
    # Where a coordinate all but vanishes the reconstruction has no digits left.
    clear = soft.min(-1).values > 1e-6
    assert clear.double().mean() > 0.5
    torch.testing.assert_close(
        temperature * jacobian[clear], softmax_jacobian(soft[clear]), rtol=1e-6, atol=1e-8
    )
    assert torch.equal(soft[clear].argmax(-1), value[clear].argmax(-1))
    odds = temperature * (jacobian[:, 0, 2] / jacobian[:, 1, 2]).log() - (logits[0] - logits[1])
    assert scipy.stats.kstest(odds.numpy(), scipy.stats.logistic.cdf).pvalue > TINY_P


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_gumbel_softmax_draws_the_concrete_law_and_its_own_jacobian(temperature):
    logits = torch.tensor([0.5, -1.0, 1.2], dtype=DOUBLE)
    value, jacobian = jacobian_of_draw(GumbelSoftmax(temperature), one_hot, logits.expand(4000, 3))
    torch.testing.assert_close(jacobian, softmax_jacobian(value) / temperature, **EXACT)
    odds = temperature * (value[:, 0].log() - value[:, 1].log()) - (logits[0] - logits[1])
    finite = odds.isfinite()
    assert finite.double().mean() > 0.99
    assert scipy.stats.kstest(odds[finite].numpy(), scipy.stats.logistic.cdf).pvalue > TINY_P


def test_a_batch_of_temperatures_is_read_row_by_row():
    logits = torch.randn(3, 4, dtype=DOUBLE)
    temperatures = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)
    value, jacobian = jacobian_of_draw(StraightThrough(temperatures), one_hot, logits)
    for row, temperature in enumerate(temperatures.tolist()):
        expected = straight_through_jacobian(logits[row], value[row], temperature)
        torch.testing.assert_close(jacobian[row], expected, **EXACT)


@pytest.mark.parametrize("vectorize", [False, True])
def test_temperatures_mean_the_same_looped_and_vectorised(vectorize):
    """With three particles and a plate of three, temperatures belong to the plate."""
    temperatures = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)
    weights = torch.randn(3, 4, dtype=DOUBLE)
    phi = torch.randn(3, 4, dtype=DOUBLE).requires_grad_()

    def model():
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3, 4, dtype=DOUBLE)))
            pyro.factor("f", (z * weights).sum(-1))

    def guide():
        with pyro.plate("n", 3):
            pyro.sample("z", dist.OneHotCategorical(logits=phi))

    elbo = Estimator_ELBO(num_particles=3, vectorize_particles=vectorize)
    elbo.loss_and_grads(model, config_gradient(guide, StraightThrough(temperatures)))
    # The cost is linear in z, the Jacobian the same at every draw.
    slope = weights - phi.detach().log_softmax(-1)
    jacobian = softmax_jacobian((phi.detach() / temperatures[:, None]).softmax(-1))
    expected = -torch.einsum("ncd,nd->nc", jacobian, slope) / temperatures[:, None]
    torch.testing.assert_close(phi.grad, expected, **EXACT)


# At the ELBO: -J (grad of log p(x|z) + log p(z) - log q(z), parameters of q held fixed).
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("vectorize", [False, True])
def test_elbo_gradient_given_the_draws(name, vectorize):
    make, formula = DETERMINISTIC[name]
    prior = torch.tensor([0.1, 0.2, 0.7], dtype=DOUBLE)
    weights = torch.randn(3, dtype=DOUBLE)
    data = torch.randn(2, dtype=DOUBLE)
    phi = torch.randn(2, 3, dtype=DOUBLE).requires_grad_()
    seen = []

    def log_likelihood(z):
        return -((data - (3 * (z * weights).sum(-1)).sin()) ** 2) / 2

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.OneHotCategorical(prior.expand(2, 3)))
            seen.append(z.detach())
            pyro.factor("x", log_likelihood(z))

    def guide():
        with pyro.plate("n", 2):
            pyro.sample("z", dist.OneHotCategorical(logits=phi))

    elbo = Estimator_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo.loss_and_grads(model, config_gradient(guide, make()))
    draws = seen[-1] if vectorize else torch.stack(seen)
    z = draws.clone().requires_grad_()
    logits = phi.detach()
    reward = log_likelihood(z) + (z * prior.log()).sum(-1) - (z * logits.log_softmax(-1)).sum(-1)
    (slope,) = torch.autograd.grad(reward.sum(), z)
    jacobian = formula(logits.expand(3, 2, 3), draws)
    expected = -torch.einsum("rncd,rnd->nc", jacobian, slope) / 3
    torch.testing.assert_close(phi.grad, expected, **EXACT)


@pytest.mark.parametrize("temperature", [0.4, 1.5])
def test_gumbel_softmax_differentiates_the_relaxed_objective(temperature):
    """Log q enters with its parameters' gradient, and the loss is that of the hard value."""
    prior = torch.tensor([0.1, 0.2, 0.7], dtype=DOUBLE)
    phi = torch.randn(3, dtype=DOUBLE).requires_grad_()
    seen = []

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(prior))
        seen.append(z.detach())
        pyro.factor("x", (3 * z[..., 0]).sin())

    def guide():
        pyro.sample("z", dist.OneHotCategorical(logits=phi))

    elbo = Estimator_ELBO(max_plate_nesting=0)
    loss = elbo.loss_and_grads(model, config_gradient(guide, GumbelSoftmax(temperature)))
    soft, hard = seen
    logits = phi.detach().requires_grad_()
    z = soft.clone().requires_grad_()
    log_q = logits.log_softmax(-1)
    relaxed = (3 * z[0]).sin() + (z * (prior.log() - log_q)).sum()
    slope, direct = torch.autograd.grad(relaxed, (z, logits))
    expected = -(softmax_jacobian(soft) @ slope / temperature + direct)
    torch.testing.assert_close(phi.grad, expected, **EXACT)
    assert set(hard.tolist()) == {0.0, 1.0}
    exact = -((3 * hard[0]).sin() + (hard * (prior.log() - log_q.detach())).sum())
    torch.testing.assert_close(loss, exact, **EXACT)


CATEGORIES = 5


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
    """Test a quadratic cost of a Bernoulli variable."""
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


@pytest.mark.parametrize(
    ("p", "slope", "stuck"), [(1.5, 0.1060, 0.475), (2.0, 0.1000, 0.450), (3.0, 0.0753, 0.401)]
)
def test_polynomial_programming(p, slope, stuck):
    """Test the exact gradient, the point where straight-through has none, and ReinMax there."""

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
