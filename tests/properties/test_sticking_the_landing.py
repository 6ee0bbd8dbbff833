"""Sticking the landing where scales, masks and subsampling weigh log q."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers.reparameterised_programs import BESIDE, PROGRAMS
from helpers.weighed_programs import (
    CASES,
    by_formula,
    mean_gradients,
    paired_gap,
    programs,
    recorded_gradients,
)
from pyro import poutine
from torch import Tensor

from pyro_gumbel.estimators import Pathwise, Score
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

STICKING = Pathwise(sticking_the_landing=True)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def elbo(num_particles: int, *, vectorize: bool) -> Estimator_ELBO:
    return Estimator_ELBO(num_particles, vectorize_particles=vectorize, max_plate_nesting=2)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "bits"])
def test_each_draw_follows_the_formula(name: str, vectorize: bool) -> None:
    case = CASES[name]
    found, w, z = recorded_gradients(elbo(3, vectorize=vectorize), STICKING, case, repeats=5)

    def weigh(log_w: Tensor, coefficient: Any) -> Tensor:
        return torch.full_like(log_w, 1 / 3)

    torch.testing.assert_close(found, by_formula(case, w, z, weigh), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_that_of_the_plain_gradient(name: str, vectorize: bool) -> None:
    case, repeats = CASES[name], 850
    model, guide = programs(case, repeats)
    beside = {"d": Score()} if case.bits else {}
    (mean, error), (plain, plain_error) = (
        mean_gradients(
            elbo(1, vectorize=vectorize),
            model,
            config_gradient(guide, {"w": choice, "z": choice, **beside}),
            repeats,
        )
        for choice in (STICKING, Pathwise())
    )
    error = (error**2 + plain_error**2).sqrt()
    assert error.max() < 0.03 * plain.norm()
    assert ((mean - plain).abs() < 5 * error + 1e-9).all()


CONTINUOUS = [name for name in PROGRAMS if name not in BESIDE and "straight" not in name]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_sites_of_every_kind_have_the_mean_of_the_plain_gradient(name: str) -> None:
    model, guide = PROGRAMS[name]()
    losses = [elbo(2, vectorize=True)] * 2
    gap, error, plain = paired_gap(losses, model, [guide, config_gradient(guide, STICKING)])
    assert error.max() < 0.2 * plain.norm()
    assert (gap.abs() < 5 * error + 1e-9).all()


def posterior(kind: str, loc: Tensor, scale: Tensor) -> Any:
    """The same normal distribution, written in several ways."""
    if kind == "normal":
        return dist.Normal(loc, scale)
    cache_size = 1 if "cached" in kind else 0
    affine = T.AffineTransform(loc, scale, cache_size=cache_size)
    return dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0), [affine])


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["normal", "transformed", "cached_transformed"])
def test_no_noise_at_the_posterior(
    kind: str, scale: float, size: int | None, vectorize: bool
) -> None:
    """Every draw has the same ELBO there, and the path follows it."""
    x = torch.linspace(-1.0, 2.0, 4)

    def model() -> None:
        full = 4 if size is None else 12
        with pyro.plate("data", full, subsample_size=size), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        loc = pyro.param("loc", x / 2)
        spread = pyro.param("spread", torch.full((4,), 0.5).sqrt())
        full = 4 if size is None else 12
        with pyro.plate("data", full, subsample_size=size), poutine.scale(scale=scale):
            pyro.sample("z", posterior(kind, loc, spread))

    elbo(2, vectorize=vectorize).loss_and_grads(model, config_gradient(guide, STICKING))
    grads = [param.grad for param in pyro.get_param_store()._params.values()]
    assert len(grads) == 2
    for grad in grads:
        torch.testing.assert_close(grad, torch.zeros(4), rtol=0, atol=1e-12)


def test_a_jacobian_of_an_earlier_value_is_not_a_score() -> None:
    """A Delta has the density of a value drawn upstream, and its gradient is of the path."""
    seen = []

    def model() -> None:
        pyro.sample("y", dist.LogNormal(0.3, 1.2))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(-0.5))
        u = pyro.sample("u", dist.Normal(loc, 1.0), infer={"is_auxiliary": True})
        seen.append(u.item())
        pyro.sample("y", dist.Delta(u.exp(), log_density=-u))

    elbo(1, vectorize=False).loss_and_grads(model, config_gradient(guide, STICKING))
    grad = pyro.get_param_store()._params["loc"].grad
    # In u the ELBO is the ratio of two normal densities: the Jacobians cancel.
    u = seen[-1]
    torch.testing.assert_close(grad, torch.tensor((u - 0.3) / 1.2**2 - (u + 0.5)))


def test_it_is_refused_under_importance_weights() -> None:
    model, guide = PROGRAMS["gamma"]()
    with pytest.raises(ValueError, match="'z'.*sticking the landing.*doubly_reparameterized=True"):
        ImportanceWeighted_ELBO(2).loss_and_grads(model, config_gradient(guide, STICKING))
