"""Continuous sites beside discrete ones, and varying structure, against exact gradients."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.problems import (
    Problem,
    draw_gradients,
    relative_error,
    worst_z,
)
from helpers.programs import check, check_loss, constant, copies, copy_gradients

from pyro_gumbel.estimators import (
    Enumerate,
    LeaveOneOut,
    Pathwise,
    ReinMax,
    Score,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

DOUBLE = torch.float64


POINTS = torch.tensor([0.3, -1.0, 2.0, 0.8, -0.4], dtype=DOUBLE)


# Mixed continuous and discrete sites, by quadrature.


def quadrature_elbo(loc, log_scale, base, slope, weight):
    """Of the program below: Gauss-Hermite nodes over the noise, sums over the bits."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes = torch.tensor(nodes)
    weights = torch.tensor(weights / math.sqrt(2 * math.pi))
    scale = log_scale.exp()
    y = loc + scale * nodes
    total = dist.Normal(0.5, 2.0).log_prob(y) - dist.Normal(loc, scale).log_prob(y)
    odds = base + slope * y
    for z in (0.0, 1.0):
        value = torch.tensor(z, dtype=DOUBLE)
        log_q = dist.Bernoulli(logits=odds).log_prob(value)
        log_p = dist.Bernoulli(logits=0.4 * y - 1).log_prob(value)
        log_x = dist.Normal(weight * y.sin() + 2 * z, 0.7).log_prob(torch.tensor(1.5))
        total = total + log_q.exp() * (log_p + log_x - log_q)
    return (weights * total).sum()


@pytest.mark.parametrize(
    "estimator",
    [
        "auto",
        {"y": Pathwise(sticking_the_landing=True), "z": Enumerate()},
        {"y": Score(LeaveOneOut()), "z": Score(LeaveOneOut())},
    ],
    ids=["auto", "landing_and_enumerate", "score"],
)
def test_mixed_sites(estimator):
    """A Normal site, and a bit given it. 100 steps of 2,000 particles."""

    def model():
        w = pyro.param("weight")
        y = pyro.sample("y", dist.Normal(constant(0.5, w), 2.0))
        z = pyro.sample("z", dist.Bernoulli(logits=0.4 * y - 1))
        pyro.sample("x", dist.Normal(w * y.sin() + 2 * z, 0.7), obs=constant(1.5, w))

    def guide():
        y = pyro.sample("y", dist.Normal(pyro.param("loc"), pyro.param("log_scale").exp()))
        odds = pyro.param("base") + pyro.param("slope") * y
        pyro.sample("z", dist.Bernoulli(logits=odds))

    params = {
        "loc": torch.tensor(0.3),
        "log_scale": torch.tensor(-0.2),
        "base": torch.tensor(0.4),
        "slope": torch.tensor(-0.7),
        "weight": torch.tensor(1.2),
    }
    problem = Problem(model, guide, params, {})
    leaves = [value.double().requires_grad_() for value in params.values()]
    elbo = quadrature_elbo(*leaves)
    gradient = -torch.stack(torch.autograd.grad(elbo, leaves))
    draws, losses = draw_gradients(problem, estimator, 100, num_particles=2000)
    check(draws, gradient)
    check_loss(losses, elbo.item())


# Structure that varies.


@pytest.mark.parametrize(
    ("estimators", "num_particles", "steps"),
    [
        (lambda name: "auto", 4, 550),
        (lambda name: "disarm", 1, 750),
        ({"z0": "arms", "z1": "double_control_variate", "z2": "disarm"}.get, 2, 320),
    ],
    ids=["auto", "one coupled pair a site", "coupled in several ways"],
)
def test_dynamic_structure(estimators, num_particles, steps):
    """Bits in a chain, each there where the one before was 1; a model's parameter, too.

    Looped steps are expensive, so the standard error is only below 5 % of the gradient.
    """
    depth = 3

    def model(step=0):
        z = pyro.sample(f"z{step}", dist.Bernoulli(constant(0.6, POINTS)))
        if step + 1 < depth and z > 0:
            model(step + 1)
        else:
            mean = constant(float(step), POINTS) + pyro.param("slope") * z
            pyro.sample("x", dist.Normal(mean, 1.0), obs=constant(2.0, POINTS))

    def chain(step=0):
        z = pyro.sample(f"z{step}", dist.Bernoulli(logits=pyro.param("logits")[step]))
        if step + 1 < depth and z > 0:
            chain(step + 1)

    logits = torch.tensor([0.3, -0.4, 0.6], dtype=DOUBLE)
    pyro.param("logits", logits)
    pyro.param("slope", torch.tensor(2.0, dtype=DOUBLE))
    leaf = logits.clone().requires_grad_()
    slope = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    elbo = torch.zeros((), dtype=DOUBLE)
    log_q, log_p = torch.zeros((), dtype=DOUBLE), 0.0
    for step in range(depth):
        for z in (0.0, 1.0):
            bit = torch.tensor(z, dtype=DOUBLE)
            here_q = log_q + dist.Bernoulli(logits=leaf[step]).log_prob(bit)
            here_p = log_p + dist.Bernoulli(constant(0.6, leaf)).log_prob(bit)
            if z > 0 and step + 1 < depth:
                next_q, next_p = here_q, here_p
                continue
            likelihood = dist.Normal(step + slope * bit, 1.0).log_prob(constant(2.0, leaf))
            elbo = elbo + here_q.exp() * (here_p + likelihood - here_q)
        log_q, log_p = next_q, next_p
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(-elbo, [leaf, slope])])

    loss = Estimator_ELBO(num_particles=num_particles)
    guide = config_gradient(chain, lambda site: estimators(site["name"]))
    draws, losses = [], []
    parameters = [pyro.get_param_store()._params[name] for name in ("logits", "slope")]
    for _ in range(steps):
        losses.append(float(loss.loss_and_grads(model, guide)))
        draws.append(torch.cat([p.grad.reshape(-1) for p in parameters]))
        for parameter in parameters:
            parameter.grad = None
    draws = torch.stack(draws)
    assert draws.isfinite().all()
    assert relative_error(draws, gradient) < 0.05
    assert worst_z(draws, gradient) < 5
    check_loss(torch.tensor(losses, dtype=DOUBLE), elbo.item())


def test_a_site_that_one_particle_alone_has():
    """Leave-one-out has no other cost to lean on there; the gradient stays a number."""

    def model():
        a = pyro.sample("a", dist.Bernoulli(0.5))
        if a > 0:
            pyro.sample("b", dist.Bernoulli(0.3))

    def guide():
        a = pyro.sample("a", dist.Bernoulli(0.5))
        seen.append(a.item())
        if a > 0:
            pyro.sample("b", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))

    alone = 0
    for _ in range(20):
        seen = []
        pyro.clear_param_store()
        Estimator_ELBO(2).loss_and_grads(model, guide)
        if sum(seen) == 1:
            alone += 1
            assert pyro.get_param_store()._params["l"].grad.isfinite()  # noqa: PT018
    assert alone > 3


def test_shapes_that_differ_between_particles_are_named():
    def model():
        size = 1 if len(sizes) % 2 else 2
        with pyro.plate("n", size):
            pyro.sample("z", dist.Bernoulli(torch.full((size,), 0.5)))

    def guide():
        sizes.append(1)
        model()

    sizes = []
    with pytest.raises(ValueError, match=r"At site 'z', shapes differ between particles"):
        Estimator_ELBO(2, default=Score()).loss_and_grads(model, guide)


# The same draws give the same gradient, looped or vectorised.


@pytest.mark.parametrize("estimator", [ReinMax(), Score(LeaveOneOut())], ids=repr)
def test_looped_is_vectorised(estimator):
    """20,000 copies of 3 particles agree in mean and variance."""

    def model():
        z = pyro.sample("z", dist.OneHotCategorical(constant([0.1, 0.2, 0.7], POINTS)))
        mean = (z * constant([0.4, -1.0, 2.0], POINTS)).sum(-1)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=constant(0.5, POINTS))

    def guide():
        pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("logits")))

    params = {"logits": torch.tensor([0.2, -0.3, 0.4])}
    problem = copies(Problem(model, guide, params, {}), {"logits": 1}, 20_000, nesting=0)
    found = []
    for vectorize in (False, True):
        elbo = Estimator_ELBO(3, vectorize_particles=vectorize, max_plate_nesting=1)
        found.append(
            copy_gradients(problem, config_gradient(problem.guide, estimator), elbo, DOUBLE)
        )
    for moment in (1, 2):
        one, other = (draws**moment for draws in found)
        error = ((one.var(0) + other.var(0)) / len(one)).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() / error).max() < 5
