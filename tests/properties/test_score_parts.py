"""Score terms of reparameterised distributions with their own ``score_parts``."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import RejectionGamma
from pyro.infer import Trace_ELBO
from torch.nn.functional import logsigmoid

from pyro_gumbel.estimators import DisARM, Enumerate, LocalExpectation, Pathwise, Rebar, Score
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

COPIES = 40_000
SLOPE = -0.6
GRID = torch.linspace(-9.0, 9.0, 20_001, dtype=torch.float64)


def skewed(slope, shape, loc=0.0):
    """A normal proposal at ``loc``, accepted by a sigmoid of its distance."""
    slope = torch.as_tensor(slope).expand(shape)
    loc = torch.as_tensor(loc, dtype=slope.dtype).expand(shape)

    def propose(sample_shape=()):
        return loc + torch.randn((*sample_shape, *shape), dtype=slope.dtype)

    propose.log_prob = lambda x: dist.Normal(loc, 1.0).log_prob(x)
    return dist.Rejector(
        propose,
        lambda x: logsigmoid(slope * (x - loc)),
        torch.tensor(0.5, dtype=slope.dtype).log(),
        batch_shape=torch.Size(shape),
        event_shape=torch.Size(),
    )


def exact(cost, slope=SLOPE):
    """Integrate ``q (log q + cost)`` and differentiate it in the slope."""
    slope = torch.tensor(slope, dtype=torch.float64, requires_grad=True)
    log_q = dist.Normal(0.0, 1.0).log_prob(GRID) + logsigmoid(slope * GRID) + math.log(2)
    loss = (log_q.exp() * (log_q + cost(GRID))).sum() * (GRID[1] - GRID[0])
    return loss.item(), torch.autograd.grad(loss, slope)[0].item()


def prior_cost(z):
    return -dist.Normal(0.4, 1.0).log_prob(z) - 0.3 * z**2


def gradient(model, guide, elbo):
    """The loss and the gradient in the slope, of one copy on average."""
    pyro.clear_param_store()
    loss = elbo.loss_and_grads(model, guide)
    return float(loss) / COPIES, pyro.get_param_store()._params["slope"].grad.item() / COPIES


def check(found, expected, *, spread=2.0):
    """No estimate here has a standard deviation of more than ``spread``."""
    for mean, value in zip(found, expected, strict=True):
        assert abs(mean - value) < 5 * spread / math.sqrt(COPIES)


def slope_param():
    return pyro.param("slope", torch.tensor(SLOPE, dtype=torch.float64))


def plain_programs(wrap=lambda fn: fn, shape=(COPIES,)):
    def model():
        with pyro.plate("n", COPIES):
            z = pyro.sample("z", wrap(dist.Normal(torch.full(shape, 0.4).double(), 1.0)))
            pyro.factor("x", 0.3 * (z**2 if len(shape) == 1 else (z**2).sum(-1)))

    def guide():
        with pyro.plate("n", COPIES):
            pyro.sample("z", wrap(skewed(slope_param(), shape)))

    return model, guide


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
def test_gradient_by_quadrature(vectorize, particles):
    elbo = Estimator_ELBO(particles, vectorize_particles=vectorize)
    check(gradient(*plain_programs(), elbo), exact(prior_cost))


def test_gradient_is_that_of_pyro():
    check(gradient(*plain_programs(), Trace_ELBO()), exact(prior_cost))


@pytest.mark.parametrize("sticking", [False, True])
def test_by_name(sticking):
    model, guide = plain_programs()
    guide = config_gradient(guide, Pathwise(sticking_the_landing=sticking))
    check(gradient(model, guide, Estimator_ELBO()), exact(prior_cost))


def test_joined_variables():
    """Pyro's own losses forget the score function here."""
    model, guide = plain_programs(lambda fn: fn.to_event(1), (COPIES, 2))
    loss, slope = exact(prior_cost)
    check(gradient(model, guide, Estimator_ELBO(2)), (2 * loss, 2 * slope), spread=6.0)


def test_masked_and_scaled():
    mask = torch.arange(COPIES) % 2 == 0

    def masked(fn):
        return fn.mask(mask)

    model, guide = plain_programs(masked)
    model, guide = (poutine.scale(program, 3.0) for program in (model, guide))
    masked_cost = exact(lambda z: -dist.Normal(0.4, 1.0).log_prob(z))
    factor = exact(lambda z: -0.3 * z**2)
    entropy = exact(lambda z: 0.0 * z)
    expected = [3 * (m / 2 + f - e) for m, f, e in zip(masked_cost, factor, entropy, strict=True)]
    check(gradient(model, guide, Estimator_ELBO()), expected, spread=6.0)


def test_transformed():
    """An affine image of the rejection sampler: the density moves, the noise stays."""

    def model():
        with pyro.plate("n", COPIES):
            y = pyro.sample("y", dist.Normal(torch.tensor(1.8).double(), 2.0))
            pyro.factor("x", 0.3 * ((y - 1) / 2) ** 2)

    def guide():
        base = skewed(slope_param(), (COPIES,))
        with pyro.plate("n", COPIES):
            affine = transforms.AffineTransform(1.0, 2.0)
            pyro.sample("y", dist.TransformedDistribution(base, [affine]))

    check(gradient(model, guide, Estimator_ELBO()), exact(prior_cost))


def branching(estimator):
    def model():
        with pyro.plate("n", COPIES):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3).double()))
            z = pyro.sample("z", dist.Normal(torch.tensor(0.4).double(), 1.0))
            pyro.factor("x", 0.3 * z**2 * b)

    def guide():
        with pyro.plate("n", COPIES):
            b = pyro.sample(
                "b", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2).double()))
            )
            pyro.sample("z", skewed(slope_param(), b.shape, b - b.detach()))

    return model, config_gradient(guide, {"b": estimator})


@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
@pytest.mark.parametrize("estimator", [DisARM(), LocalExpectation(), Score()], ids=repr)
def test_after_a_coupled_site(estimator, vectorize):
    prob = torch.tensor(0.2, dtype=torch.float64).sigmoid()
    kl = dist.Bernoulli(prob), dist.Bernoulli(torch.tensor(0.3).double())
    loss, slope = exact(lambda z: -dist.Normal(0.4, 1.0).log_prob(z) - 0.3 * prob * z**2)
    loss += torch.distributions.kl_divergence(*kl).item()
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    check(gradient(*branching(estimator), elbo), (loss, slope))


def test_families_of_pyro_built_on_it():
    """A Gamma by rejection, against the closed form of its divergence and its moments."""
    target = dist.Gamma(torch.tensor(2.0).double(), torch.tensor(1.5).double())

    def model():
        with pyro.plate("n", COPIES):
            z = pyro.sample("z", target)
            pyro.factor("x", -0.2 * z**2)

    def guide():
        shape = pyro.param("slope", torch.tensor(1.01).double())
        with pyro.plate("n", COPIES):
            pyro.sample("z", RejectionGamma(shape.expand(COPIES), torch.ones(COPIES).double()))

    shape = torch.tensor(1.01, dtype=torch.float64, requires_grad=True)
    q = dist.Gamma(shape, torch.ones((), dtype=torch.float64))
    loss = torch.distributions.kl_divergence(q, target) + 0.2 * shape * (shape + 1)
    expected = loss.item(), torch.autograd.grad(loss, shape)[0].item()
    for analytic_kl in (False, True):
        check(
            gradient(model, guide, Estimator_ELBO(analytic_kl=analytic_kl)), expected, spread=3.5
        )


def exact_bound(particles):
    """Integrate the bound of one or two particles, and differentiate it in the slope."""
    grid = GRID[::20]
    slope = torch.tensor(SLOPE, dtype=torch.float64, requires_grad=True)
    log_q = dist.Normal(0.0, 1.0).log_prob(grid) + logsigmoid(slope * grid) + math.log(2)
    mass = log_q.exp() * (grid[1] - grid[0])
    log_w = -prior_cost(grid) - log_q
    if particles == 1:
        loss = -(mass @ log_w)
    else:
        loss = -(mass @ (torch.logaddexp(log_w, log_w[:, None]) - math.log(2)) @ mass)
    return loss.item(), torch.autograd.grad(loss, slope)[0].item()


@pytest.mark.parametrize("doubly", [False, True], ids=["plain", "doubly"])
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
def test_importance_weighted_bound(vectorize, particles, doubly):
    elbo = ImportanceWeighted_ELBO(
        particles, doubly_reparameterized=doubly, vectorize_particles=vectorize
    )
    check(gradient(*plain_programs(), elbo), exact_bound(particles))


def test_relaxed_site_upstream():
    """The distribution of the rejection sampler depends on the relaxed bit."""

    def model():
        with pyro.plate("n", COPIES):
            pyro.sample("b", dist.Bernoulli(torch.tensor(0.3).double()))
            z = pyro.sample("z", dist.Normal(torch.tensor(0.4).double(), 1.0))
            pyro.factor("x", 3 * z)

    def guide():
        logit = pyro.param("slope", torch.tensor(0.2).double())
        with pyro.plate("n", COPIES):
            b = pyro.sample("b", dist.Bernoulli(logits=logit))
            pyro.sample("z", skewed(6 * b - 3, b.shape))

    def cost(z):
        return -dist.Normal(0.4, 1.0).log_prob(z) - 3 * z

    logit = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    q, p = dist.Bernoulli(logits=logit), dist.Bernoulli(torch.tensor(0.3).double())
    zero, one = exact(cost, -3.0)[0], exact(cost, 3.0)[0]
    loss = torch.distributions.kl_divergence(q, p) + zero + q.probs * (one - zero)
    expected = loss.item(), torch.autograd.grad(loss, logit)[0].item()
    elbo = Estimator_ELBO(vectorize_particles=True, max_plate_nesting=1)
    found = gradient(model, config_gradient(guide, {"b": Rebar()}), elbo)
    check(found, expected, spread=4.0)


def test_beside_an_enumerated_site():
    model, guide = branching(Enumerate())
    prob = torch.tensor(0.2, dtype=torch.float64).sigmoid()
    kl = dist.Bernoulli(prob), dist.Bernoulli(torch.tensor(0.3).double())
    loss, slope = exact(lambda z: -dist.Normal(0.4, 1.0).log_prob(z) - 0.3 * prob * z**2)
    loss += torch.distributions.kl_divergence(*kl).item()
    check(gradient(model, guide, Estimator_ELBO(max_plate_nesting=1)), (loss, slope))
