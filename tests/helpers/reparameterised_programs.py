"""Guides with reparameterised sites of many kinds, each with a model that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro import poutine
from torch import Tensor

from pyro_gumbel.distributions import RelaxedOneHot
from pyro_gumbel.estimators import ReinMax, Score

__all__ = ["BESIDE", "PROGRAMS"]

Programs = tuple[Callable[[], None], Callable[[], None]]
PROGRAMS: dict[str, Callable[[], Programs]] = {}
BESIDE = {"bit_upstream": Score(), "bit_downstream": Score(), "straight_through_bit": ReinMax()}
"""Estimators of a discrete site ``b``."""


def program(make: Callable[[], Programs]) -> Callable[[], Programs]:
    PROGRAMS[make.__name__] = make
    return make


def param(name: str, value: Any) -> Tensor:
    return pyro.param(name, torch.tensor(value))


def observe(mean: Tensor) -> None:
    pyro.sample("x", dist.Normal(mean, 0.7), obs=torch.tensor(1.1))


def single(prior: Any, posterior: Callable[[], Any], read: Callable[[Tensor], Tensor]) -> Programs:
    """One latent site."""

    def model() -> None:
        observe(read(pyro.sample("z", prior)))

    def guide() -> None:
        pyro.sample("z", posterior())

    return model, guide


@program
def gamma() -> Programs:
    def posterior() -> Any:
        return dist.Gamma(param("a", 0.6).exp(), param("b", 0.2).exp())

    return single(dist.Gamma(2.0, 1.0), posterior, lambda z: z)


@program
def dirichlet() -> Programs:
    prior, weights = dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([-1.0, 0.0, 2.0])
    return single(
        prior, lambda: dist.Dirichlet(param("a", [0.6, 0.2, 0.1]).exp()), lambda z: z @ weights
    )


@program
def relaxed_one_hot() -> Programs:
    """Both programs have densities of relaxed vectors."""
    prior = RelaxedOneHot(0.7, probs=torch.tensor([0.2, 0.3, 0.5]))
    weights = torch.tensor([-1.0, 0.0, 2.0])
    return single(
        prior,
        lambda: RelaxedOneHot(0.6, logits=param("a", [0.6, 0.2, 0.1])),
        lambda z: z @ weights,
    )


@program
def straight_through_one_hot() -> Programs:
    """A distribution with rsample and a mass, not a density."""
    prior, weights = dist.OneHotCategorical(torch.tensor([0.2, 0.8])), torch.tensor([-1.0, 1.0])

    def posterior() -> Any:
        return RelaxedOneHot(0.6, logits=param("a", [0.6, 0.2]), straight_through=True)

    return single(prior, posterior, lambda z: z @ weights)


@program
def multivariate_normal() -> Programs:
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def posterior() -> Any:
        lower = torch.stack(
            [torch.stack([param("t", 0.4).exp(), torch.zeros(())]), param("r", [0.4, 0.9])]
        )
        return dist.MultivariateNormal(param("a", [0.6, 0.1]), scale_tril=lower)

    return single(prior, posterior, lambda z: z.sum(-1))


@program
def uniform() -> Programs:
    """The score of learnt bounds has another mean than zero."""

    def posterior() -> Any:
        width = param("a", 0.3).exp()
        return dist.Uniform(-width, width)

    return single(dist.Uniform(-5.0, 5.0), posterior, lambda z: z)


@program
def transformed_uniform() -> Programs:
    def posterior() -> Any:
        affine = T.AffineTransform(param("a", 0.3), param("b", 0.1).exp())
        return dist.TransformedDistribution(dist.Uniform(torch.zeros(()), 1.0), [affine])

    return single(dist.Uniform(-5.0, 5.0), posterior, lambda z: z)


@program
def chain() -> Programs:
    """The first site's value is a parameter of the second's distribution."""

    def model() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        observe(u * pyro.sample("v", dist.Normal(u, 1.0)))

    def guide() -> None:
        u = pyro.sample("u", dist.Normal(param("a", 0.6), 0.8))
        pyro.sample("v", dist.Normal(param("b", 0.5) * u, param("c", -0.3).exp()))

    return model, guide


@program
def auxiliary() -> Programs:
    def model() -> None:
        observe(pyro.sample("v", dist.Normal(0.0, 1.0)))

    def guide() -> None:
        q_u = dist.Normal(param("a", 0.6), param("b", -1.0).exp())
        u = pyro.sample("u", q_u, infer={"is_auxiliary": True})
        pyro.sample("v", dist.Normal(u, 0.7))

    return model, guide


@program
def transformed_by_delta() -> Programs:
    """As autoguides write a value of constrained support."""

    def model() -> None:
        observe(pyro.sample("v", dist.LogNormal(0.0, 1.0)))

    def guide() -> None:
        q_u = dist.Normal(param("a", 0.6), param("b", -0.5).exp())
        u = pyro.sample("u", q_u, infer={"is_auxiliary": True})
        pyro.sample("v", dist.Delta(u.exp(), log_density=-u))

    return model, guide


@program
def copied_by_delta() -> Programs:
    """As autoguides write a value of real support."""

    def model() -> None:
        observe(pyro.sample("v", dist.Normal(0.0, 1.0)))

    def guide() -> None:
        q_u = dist.Normal(param("a", 0.6), param("b", -0.5).exp())
        u = pyro.sample("u", q_u, infer={"is_auxiliary": True})
        pyro.sample("v", dist.Delta(u))

    return model, guide


@program
def point_estimate() -> Programs:
    """As AutoDelta, beside a site with a distribution."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        observe(pyro.sample("u", dist.Normal(v, 1.0)))

    def guide() -> None:
        pyro.sample("v", dist.Delta(param("a", 0.6)))
        pyro.sample("u", dist.Normal(param("b", 0.1), param("c", -0.5).exp()))

    return model, guide


@program
def factors() -> Programs:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -param("c", 0.1) * z**2)
        observe(z)

    def guide() -> None:
        z = pyro.sample("z", dist.Normal(param("a", 0.6), param("b", -0.5).exp()))
        pyro.factor("jacobian", param("d", 0.3) * z.sin(), has_rsample=True)

    return model, guide


@program
def bit_upstream() -> Programs:
    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(0.3))
        observe(pyro.sample("z", dist.Normal(b, 1.0)))

    def guide() -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=param("l", 0.1)))
        pyro.sample("z", dist.Normal(param("a", 0.6) * b, param("c", -0.5).exp()))

    return model, guide


PROGRAMS["straight_through_bit"] = bit_upstream


@program
def bit_downstream() -> Programs:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z + pyro.sample("b", dist.Bernoulli(0.3)))

    def guide() -> None:
        z = pyro.sample("z", dist.Normal(param("a", 0.6), param("c", -0.5).exp()))
        pyro.sample("b", dist.Bernoulli(logits=param("l", 0.1) + z))

    return model, guide


@program
def learnt_scale() -> Programs:
    def model() -> None:
        with poutine.scale(scale=param("s", 0.2).exp()):
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)))

    def guide() -> None:
        q_z = dist.Normal(param("a", 0.6), param("c", -0.5).exp())
        with poutine.scale(scale=param("s", 0.2).exp()):
            pyro.sample("z", q_z)

    return model, guide


def downstream_of(read: Callable[[Tensor], Tensor]) -> Programs:
    """A second site whose distribution depends on the first's value without a gradient."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z + pyro.sample("y", dist.Normal(0.0, 1.0)))

    def guide() -> None:
        z = pyro.sample("z", dist.Normal(param("a", 0.6), param("c", -0.5).exp()))
        pyro.sample("y", dist.Normal(param("b", 0.4) + read(z), 0.8))

    return model, guide


@program
def read_detached() -> Programs:
    return downstream_of(lambda z: z.detach())


@program
def read_by_index() -> Programs:
    table = torch.tensor([-0.5, 0.5])
    return downstream_of(lambda z: table[(z > 0).long()])
