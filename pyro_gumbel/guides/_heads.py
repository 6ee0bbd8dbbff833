"""Heads: maps from unconstrained numbers to the distribution of a latent site's guide."""

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

# Families whose guide has the family of the prior, and their free parameters. Subclasses with
# another distribution have the same values, so their guide has the parent's family.
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
_INFINITE_LOGIT = 20.0  # replaces an infinite logit at the start: e^-20 is 2e-9


class Head(ABC):
    """A map from unconstrained numbers to the distribution of a site's guide.

    Attributes:
        size: Number of unconstrained parameters of a distribution.
        num_features: Number of features of a value, which other heads may read.
    """

    size: int
    num_features: int

    @abstractmethod
    def build(self, raw: Tensor) -> Any:
        """Return a distribution of batch shape ``raw.shape[:-1]`` from ``(..., size)``."""

    @abstractmethod
    def start(self, prior: Any, value: Tensor, shrink: float | None) -> Tensor:
        """Return initial parameters, ``prior.batch_shape + (size,)``.

        The distribution starts at the prior. If ``shrink`` is given and the family has a location,
        it starts at ``value`` with ``shrink`` times the prior's scale.
        """

    @abstractmethod
    def features(self, value: Tensor) -> Tensor:
        """Return a value as features ``batch_shape + (num_features,)`` for other heads."""


class FamilyHead(Head):
    """A guide of the prior's family, whose parameters ``biject_to`` constrains.

    Args:
        family: Class of the distribution.
        parameters: Names of its free parameters.
        prior: A distribution with these parameters, for their sizes.
        **fixed: Other arguments of the family.
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
    """A diagonal normal distribution that ``biject_to`` transforms to a continuous support."""

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
    """Return the head of site ``name``, whose distribution without ``to_event`` is ``prior``.

    Raises:
        ValueError: If there is no head for the distribution.
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
            f"Site {name!r} is a Delta, which has one value and needs no guide. Write "
            f"pyro.deterministic({name!r}, value) in the model."
        )
    try:
        support = _uniform_support(name, prior.support)
        return TransportHead(biject_to(support), prior.event_shape)
    except NotImplementedError:
        raise ValueError(
            f"Site {name!r} is a {type(prior).__name__} with support {prior.support}, which has "
            "no head. Supported are one-hot, Bernoulli, Categorical, Binomial, NegativeBinomial, "
            "Poisson, Geometric and all continuous distributions that biject_to supports. "
            f"Rewrite the site as one of these, or {_by_hand(name)}"
        ) from None


def _has_values_of(prior: Any, family: type) -> bool:
    return isinstance(prior, family) and "support" not in overridden(prior)


def _number(prior: Any, name: str) -> Tensor:
    """Return a parameter of a prior; logits of finitely many values are its log-masses."""
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
        "write its guide by hand: use AutoGuideList(model) with this guide of "
        f"poutine.block(model, hide=[{name!r}]) and a function for the site."
    )


def _one_number(name: str, prior: Any, argument: str) -> float:
    """Return an argument that all elements share, since batches differ in size."""
    numbers = getattr(prior, argument)
    first = numbers.flatten()[0]
    if (numbers != first).any():
        raise ValueError(
            f"Site {name!r} is a {type(prior).__name__} whose {argument} differs between "
            "elements, and a head needs one value for all. Make it equal for all elements, or "
            f"{_by_hand(name)}"
        )
    return first.item()


def _uniform_support(name: str, support: Constraint) -> Constraint:
    """Replace bounds that are tensors of equal numbers by one number, as batches vary."""
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
                f"Site {name!r} has a support that differs between elements, {support}, and a "
                "head needs one support for all. Sample it on a fixed support, such as "
                "Uniform(0, 1), and scale it in the model."
            )
    return type(support)(**{**vars(support), **{k: v.flatten()[0] for k, v in bounds.items()}})
