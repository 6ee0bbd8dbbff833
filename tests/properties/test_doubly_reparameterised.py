"""Doubly reparameterised gradients where scales, masks and subsampling weigh log q."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.reparameterised_programs import BESIDE, PROGRAMS
from helpers.weighed_programs import (
    CASES,
    X,
    by_formula,
    gradients,
    mean_gradients,
    paired_gap,
    programs,
    recorded_gradients,
)
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import Normal

from pyro_gumbel.estimators import Pathwise, Score
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def elbo(num_particles: int, *, doubly: bool, vectorize: bool) -> ImportanceWeighted_ELBO:
    return ImportanceWeighted_ELBO(
        num_particles,
        doubly_reparameterized=doubly,
        vectorize_particles=vectorize,
        max_plate_nesting=2,
    )


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "bits"])
def test_each_draw_follows_the_formula(name: str, vectorize: bool) -> None:
    case = CASES[name]
    loss = elbo(3, doubly=True, vectorize=vectorize)
    found, w, z = recorded_gradients(loss, {}, case, repeats=5)

    def weigh(log_w: Tensor, coefficient: Any) -> Tensor:
        share = log_w.softmax(0)
        return share - coefficient * (share - share**2)

    torch.testing.assert_close(found, by_formula(case, w, z, weigh), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_that_of_the_plain_gradient(name: str, vectorize: bool) -> None:
    case, repeats = CASES[name], 850
    model, guide = programs(case, repeats)
    configured = config_gradient(guide, {"d": Score()} if case.bits else {})
    (mean, error), (plain, plain_error) = (
        mean_gradients(elbo(3, doubly=doubly, vectorize=vectorize), model, configured, repeats)
        for doubly in (True, False)
    )
    error = (error**2 + plain_error**2).sqrt()
    assert error.max() < 0.03 * plain.norm()
    assert ((mean - plain).abs() < 5 * error + 1e-9).all()


def by_quadrature(scale: float, mask: bool) -> Tensor:
    """The gradient of two particles' bound in the mean and log scale of a normal guide."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(80)
    noise, masses = torch.as_tensor(nodes), torch.as_tensor(masses / masses.sum())
    a, log_t = (torch.tensor(value, requires_grad=True) for value in (-0.5, 0.1))
    z = a + log_t.exp() * noise
    ratio = Normal(0.0, 1.0).log_prob(z) - Normal(a, log_t.exp()).log_prob(z)
    log_w = scale * mask * ratio + Normal(z, 0.7).log_prob(torch.tensor(X))
    bounds = torch.logaddexp(log_w, log_w.unsqueeze(-1)) - math.log(2)
    return torch.stack(torch.autograd.grad(-(masses @ bounds @ masses), (a, log_t)))


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("scale", "mask"), [(1.0, True), (0.3, True), (2.0, True), (1.0, False)], ids=str
)
def test_the_mean_is_that_of_quadrature(
    scale: float, mask: bool, dtype: torch.dtype, vectorize: bool
) -> None:
    exact, n = by_quadrature(scale, mask), 3400
    torch.set_default_dtype(dtype)

    def model() -> None:
        with pyro.plate("n", n):
            with poutine.scale(scale=scale), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=torch.full((n,), X))

    def guide() -> None:
        a, log_t = pyro.param("a", torch.tensor(-0.5)), pyro.param("log_t", torch.tensor(0.1))
        with pyro.plate("n", n), poutine.scale(scale=scale), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(a, log_t.exp()))

    loss = elbo(2, doubly=True, vectorize=vectorize)
    mean, error = mean_gradients(loss, model, guide, n)
    assert error.max() < 0.01 * exact.norm()
    assert ((mean - exact) / error).abs().max() < 5


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_sites_of_every_kind_have_the_mean_of_the_plain_gradient(
    name: str, vectorize: bool
) -> None:
    model, guide = PROGRAMS[name]()
    configured = config_gradient(guide, {"b": BESIDE[name]} if name in BESIDE else {})
    losses = [elbo(3, doubly=doubly, vectorize=vectorize) for doubly in (False, True)]
    gap, error, plain = paired_gap(losses, model, [configured, configured])
    assert error.max() < 0.2 * plain.norm()
    assert (gap.abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize(
    "name", ["uniform", "straight_through_one_hot", "bit_downstream", "learnt_scale"]
)
def test_sites_that_cannot_have_it_keep_the_plain_gradient(name: str) -> None:
    model, guide = PROGRAMS[name]()
    configured = config_gradient(guide, {"b": BESIDE[name]} if name in BESIDE else {})
    losses = [elbo(3, doubly=doubly, vectorize=True) for doubly in (False, True)]
    gap, _, plain = paired_gap(losses, model, [configured, configured])
    assert plain.norm() > 0.01
    torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-9)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("name", ["read_detached", "read_by_index"])
def test_a_site_that_is_read_without_a_gradient_keeps_the_plain_one(
    name: str, vectorize: bool
) -> None:
    model, guide = PROGRAMS[name]()
    steps = []
    for doubly in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        loss = elbo(3, doubly=doubly, vectorize=vectorize)
        gradients(loss, model, guide)
        found = gradients(loss, model, guide).tolist()
        steps.append(dict(zip(pyro.get_param_store()._params, found, strict=True)))
    plain, doubled = steps
    assert doubled["a"] == pytest.approx(plain["a"], rel=1e-9)
    assert doubled["c"] == pytest.approx(plain["c"], rel=1e-9)
    assert doubled["b"] != pytest.approx(plain["b"], rel=1e-3)


@pytest.mark.parametrize(
    "kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoDelta]
)
def test_autoguides_have_the_mean_of_the_plain_gradient(kind: type) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Normal(z, 1 + scale), obs=torch.tensor(1.1))

    options, num_draws = ({}, 5) if kind is AutoDelta else ({"init_scale": 0.6}, 150)
    guide = kind(model, **options)
    guide()
    draws = []
    for doubly in (False, True):
        loss, found = elbo(3, doubly=doubly, vectorize=True), []
        for seed in range(num_draws):
            pyro.set_rng_seed(seed)
            loss.loss_and_grads(model, guide)
            grads = [param.grad for param in guide.parameters() if param.grad is not None]
            found.append(torch.cat([grad.flatten() for grad in grads]))
            guide.zero_grad()
        draws.append(torch.stack(found))
    gap = draws[1] - draws[0]
    error = gap.std(0) / math.sqrt(len(gap))
    plain = draws[0].mean(0).norm()
    assert plain > 0.1
    assert error.max() < 0.25 * plain
    assert (gap.mean(0).abs() < 5 * error + 1e-9).all()


def test_one_particle_sticks_the_landing() -> None:
    model, guide = programs(CASES["different_scales"], 5)
    results = []
    for loss, choice in (
        (elbo(1, doubly=True, vectorize=False), {}),
        (Estimator_ELBO(max_plate_nesting=2), Pathwise(sticking_the_landing=True)),
    ):
        pyro.set_rng_seed(3)
        results.append(gradients(loss, model, config_gradient(guide, choice)))
    assert results[0].norm() > 0.1
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_no_noise_at_the_posterior(scale: float, vectorize: bool) -> None:
    """Every weight is the same there, and the path follows it."""
    x = torch.tensor(0.8)

    def model() -> None:
        with poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        q_z = dist.Normal(pyro.param("loc", x / 2), pyro.param("s", torch.tensor(0.5).sqrt()))
        with poutine.scale(scale=scale):
            pyro.sample("z", q_z)

    found = gradients(elbo(4, doubly=True, vectorize=vectorize), model, guide)
    torch.testing.assert_close(found, torch.zeros(2), rtol=0, atol=1e-12)
