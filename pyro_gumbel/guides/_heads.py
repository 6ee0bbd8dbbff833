"""From unconstrained numbers to a distribution that fits a latent site."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_gumbel.distributions import OneHot
from pyro_gumbel.distributions._law import overridden
from pyro_gumbel.distributions._numbers import log_odds, log_probs, value_dtype
from pyro_gumbel.distributions.families import has_law_of, has_logits, is_bit, support_values

__all__ = ["Head", "find_head"]

# Families whose posterior is sought in the family itself, with their free parameters. So is that
# of a descendant with a law of its own: its values are the same.
_PARAMETERS: dict[type, tuple[str, ...]] = {
    dist.Categorical: ("logits",),
    dist.Normal: ("loc", "scale"),
    dist.LogNormal: ("loc", "scale"),
    dist.Beta: ("concentration1", "concentration0"),
    dist.Dirichlet: ("concentration",),
    dist.Gamma: ("concentration", "rate"),
    dist.Poisson: ("rate",),
    dist.Geometric: ("logits",),
    dist.NegativeBinomial: ("total_count", "logits"),
}
_INFINITE_LOGIT = 20.0  # what a logit of infinity starts from: e^-20 is 2e-9


class Head(ABC):
    """The family of a site's guide, as a map from unconstrained numbers.

    Attributes:
        size: How many unconstrained numbers a distribution takes.
        num_features: How many numbers another head reads of a value.
    """

    size: int
    num_features: int

    @abstractmethod
    def build(self, raw: Tensor) -> Any:
        """Make a distribution of batch shape ``raw.shape[:-1]`` from ``(..., size)`` numbers."""

    @abstractmethod
    def start(self, prior: Any, value: Tensor, shrink: float | None) -> Tensor:
        """Find numbers to start from, ``prior.batch_shape + (size,)``.

        They give the prior; but where ``shrink`` is given and the family has a location, that is
        put at ``value``, with ``shrink`` times the prior's scale.
        """

    @abstractmethod
    def features(self, value: Tensor) -> Tensor:
        """Turn a value into numbers ``batch_shape + (num_features,)`` for another head to read."""


class FamilyHead(Head):
    """A guide of the prior's own family, its parameters mapped by ``biject_to``.

    Args:
        family: Class of the distribution.
        parameters: Names of its free parameters.
        prior: A distribution with these parameters, for their sizes.
        **fixed: What else the family is given.
    """

    def __init__(
        self, family: type, parameters: tuple[str, ...], prior: Any, **fixed: Any
    ) -> None:
        self.family = family
        self.parameters = parameters
        self.fixed = fixed
        self.event_shape = prior.event_shape
        supports = [family.arg_constraints[name] for name in parameters]  # type: ignore[attr-defined]
        self.vectors = [constraint.event_dim == 1 for constraint in supports]
        self.transforms = [biject_to(constraint) for constraint in supports]
        categorical = family is dist.Categorical
        self.num_categories = len(support_values(prior)) if categorical else 0
        self.num_features = self.num_categories or prior.event_shape.numel()
        self.sizes = [self.num_features if vector else 1 for vector in self.vectors]
        self.size = sum(self.sizes)

    def build(self, raw: Tensor) -> Any:
        parts = raw.split(self.sizes, -1)
        values = {
            name: transform(part if vector else part.squeeze(-1))
            for name, part, vector, transform in zip(
                self.parameters, parts, self.vectors, self.transforms, strict=True
            )
        }
        return self.family(**values, **self.fixed)

    def start(self, prior: Any, value: Tensor, shrink: float | None) -> Tensor:
        natural = {name: _number(prior, name) for name in self.parameters}
        if shrink is not None and self.parameters == ("loc", "scale"):
            natural["loc"] = biject_to(self.family.support).inv(value)  # type: ignore[attr-defined]
            natural["scale"] = natural["scale"] * shrink
        parts = []
        for (name, number), vector, transform in zip(
            natural.items(), self.vectors, self.transforms, strict=True
        ):
            part = transform.inv(number)
            if name == "logits":
                part = part.nan_to_num(posinf=_INFINITE_LOGIT, neginf=-_INFINITE_LOGIT)
            parts.append(part if vector else part.unsqueeze(-1))
        return torch.cat(parts, -1)

    def features(self, value: Tensor) -> Tensor:
        if self.num_categories:
            index = torch.nn.functional.one_hot(value.long(), self.num_categories)
            return index.to(torch.get_default_dtype())
        return value if self.event_shape else value.unsqueeze(-1)


class TransportHead(Head):
    """A diagonal normal distribution, moved onto a continuous support by ``biject_to``."""

    def __init__(self, transform: Transform, event_shape: torch.Size) -> None:
        self.transform = transform
        self.event_shape = event_shape
        self.num_features = event_shape.numel()
        self.shape = torch.Size(transform.inverse_shape(event_shape))
        self.size = 2 * self.shape.numel()

    def build(self, raw: Tensor) -> Any:
        loc, log_scale = (part.reshape(raw.shape[:-1] + self.shape) for part in raw.chunk(2, -1))
        normal = dist.Normal(loc, log_scale.exp()).to_event(len(self.shape))
        return dist.TransformedDistribution(normal, [self.transform])

    def start(self, prior: Any, value: Tensor, shrink: float | None) -> Tensor:
        loc = self.transform.inv(value)
        loc = loc.reshape(*prior.batch_shape, -1)
        return torch.cat([loc, torch.full_like(loc, math.log(shrink or 1.0))], -1)

    def features(self, value: Tensor) -> Tensor:
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return value.reshape(*batch, -1)


def find_head(name: str, prior: Any) -> Head:
    """Find the head of site ``name``, whose distribution is ``prior`` without ``to_event``.

    Raises:
        ValueError: If there is none.
    """
    support = prior.support
    if support is constraints.one_hot:
        return FamilyHead(OneHot, ("logits",), prior)
    if support is constraints.boolean:
        return FamilyHead(dist.Bernoulli, ("logits",), prior)
    if _has_values_of(prior, dist.Binomial):
        count = _one_number(name, prior, "total_count")
        return FamilyHead(dist.Binomial, ("logits",), prior, total_count=count)
    for family, parameters in _PARAMETERS.items():
        if _has_values_of(prior, family):
            return FamilyHead(family, parameters, prior)
    if has_law_of(prior, dist.Delta):
        raise ValueError(
            f"Site {name!r} is a Delta, which has one value and needs no guide: write "
            f"pyro.deterministic({name!r}, value) in the model."
        )
    try:
        support = _uniform_support(name, prior.support)
        return TransportHead(biject_to(support), prior.event_shape)
    except NotImplementedError:
        raise ValueError(
            f"Site {name!r} is a {type(prior).__name__}, for whose support, {prior.support}, "
            "there is no head. Served are one-hot, Bernoulli, Categorical, Binomial, "
            "NegativeBinomial, Poisson, Geometric and every continuous distribution that "
            f"biject_to serves. Rewrite the site as one of these, or {_by_hand(name)}"
        ) from None


def _has_values_of(prior: Any, family: type) -> bool:
    return isinstance(prior, family) and "support" not in overridden(prior)


def _number(prior: Any, name: str) -> Tensor:
    """Read a parameter of a prior; the logits of finitely many values, off its own masses."""
    if name != "logits" or not prior.has_enumerate_support or isinstance(prior, dist.Binomial):
        return getattr(prior, name)
    if is_bit(prior):
        return log_odds(prior).to(value_dtype(prior))
    if has_logits(prior):
        return log_probs(prior).to(value_dtype(prior))
    masses = prior.log_prob(support_values(prior)).movedim(0, -1)
    return masses[..., 1] - masses[..., 0] if prior.support is constraints.boolean else masses


def _by_hand(name: str) -> str:
    return (
        "guide it by hand: AutoGuideList(model), with "
        f"poutine.block(model, hide=[{name!r}]) for this guide and a function of yours for the "
        "site."
    )


def _one_number(name: str, prior: Any, argument: str) -> float:
    """Read an argument that is the same for each element: batches differ in size."""
    numbers = getattr(prior, argument)
    first = numbers.flatten()[0]
    if (numbers != first).any():
        raise ValueError(
            f"Site {name!r} is a {type(prior).__name__} whose {argument} differs between "
            f"elements, so that one head cannot serve them all: {_by_hand(name)}"
        )
    return first.item()


def _uniform_support(name: str, support: Constraint) -> Constraint:
    """Make each bound that is a tensor of equal numbers one number: batches differ in size."""
    if isinstance(support, constraints.independent):
        base = _uniform_support(name, support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    bounds = {
        key: bound
        for key, bound in vars(support).items()
        if key in ("lower_bound", "upper_bound") and isinstance(bound, Tensor)
    }
    if not bounds or support.is_discrete:
        return support
    for bound in bounds.values():
        if (bound != bound.flatten()[0]).any():
            raise ValueError(
                f"Site {name!r} has another support for each element, {support}, so that one head "
                "cannot serve them all. Sample it on a fixed support, such as Uniform(0, 1), and "
                "scale it in the model."
            )
    return type(support)(**{**vars(support), **{k: v.flatten()[0] for k, v in bounds.items()}})
