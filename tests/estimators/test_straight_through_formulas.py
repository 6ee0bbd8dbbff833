"""Straight-through estimators, draw by draw: value and Jacobian as published."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
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
    ReinMax,
    ReinMaxRao,
    StraightThrough,
    rao_blackwell,
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
    """Hand out the given scores instead of drawing; return what they were asked for."""
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
    """Against rejection: perturb, and keep what has the right argmax."""
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


def test_a_batch_of_temperatures_is_read_row_by_row():
    logits = torch.randn(3, 4, dtype=DOUBLE)
    temperatures = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)
    value, jacobian = jacobian_of_draw(StraightThrough(temperatures), one_hot, logits)
    for row, temperature in enumerate(temperatures.tolist()):
        expected = straight_through_jacobian(logits[row], value[row], temperature)
        torch.testing.assert_close(jacobian[row], expected, **EXACT)


@pytest.mark.parametrize("vectorize", [False, True])
def test_temperatures_mean_the_same_looped_and_vectorised(vectorize):
    """Three particles on a plate of three: a temperature may not slip to the particles."""
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
    """Log q enters with its parameters' gradient, and the value reported is the hard one."""
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


@pytest.mark.parametrize("estimator", [GumbelRao, ReinMaxRao])
def test_a_temperature_that_would_get_no_gradient_is_refused(estimator):
    with pytest.raises(ValueError, match=rf"{estimator.__name__}\(temperature.detach\(\)\), or"):
        estimator(torch.tensor(0.7, requires_grad=True))
