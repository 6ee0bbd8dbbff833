"""Latent sites of a model, and the families of their guides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_gumbel.distributions import OneHot
from pyro_gumbel.distributions._categorical import log_odds, log_probs, value_dtype
from pyro_gumbel.distributions._law import overridden
from pyro_gumbel.distributions.families import (
    expand,
    has_law_of,
    has_logits,
    is_bit,
    masks,
    support_values,
    unwrap,
)

__all__ = ["Latent", "observed_sites", "prototype", "read_latent"]

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
_INFINITE_LOGIT = 20.0  # replaces an infinite initial logit; e^-20 is 2e-9


@dataclass(frozen=True)
class Latent:
    """A latent site of the model, with its vectorised plates by dimension, ``{-1: "data"}``."""

    name: str
    head: Head
    plates: dict[int, str]  # the rightmost first
    sizes: dict[int, int]  # the full sizes of these plates
    batch: torch.Size  # of these plates, with ones at dimensions without a plate
    event_batch: torch.Size  # dimensions that to_event declared dependent
    start: Tensor  # initial unconstrained parameters, batch + event_batch + (head.size,)

    @property
    def event_dim(self) -> int:
        """Return the number of rightmost dimensions of the parameters within an element."""
        return len(self.event_batch) + 1

    def build(self, raw: Tensor) -> Any:
        """Return the guide's distribution from ``(...) + batch + event_batch + (size,)``."""
        fn = self.head.build(raw)
        return fn.to_event(len(self.event_batch)) if self.event_batch else fn

    def features(self, value: Tensor) -> Tensor:
        """Return a value as features ``(...) + batch + (n,)``."""
        numbers = self.head.features(value)
        return numbers.flatten(numbers.dim() - self.event_dim)


@torch.no_grad()
def prototype(
    model: Callable[..., Any],
    init_loc_fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Trace:
    """Run the model once, hidden from other handlers, with ``init_loc_fn``'s initial values."""

    def start(site: Any) -> Tensor:
        # Initialisation strategies may return values outside a discrete support.
        return site["fn"].sample() if site["fn"].support.is_discrete else init_loc_fn(site)

    with poutine.block(), InitMessenger(start):
        return poutine.trace(model).get_trace(*args, **kwargs)


def observed_sites(trace: Trace) -> list[str]:
    """List the observed sites and factors, without deterministic sites and subsamples."""
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not has_law_of(unwrap(site["fn"]), dist.Delta)
    ]


def read_latent(site: Any, init_scale: float | None) -> Latent:
    """Read a latent site of the prototype; raise ``ValueError`` if it cannot have a guide."""
    name, fn = site["name"], site["fn"]
    sequential = [frame.name for frame in site["cond_indep_stack"] if not frame.vectorized]
    if sequential:
        raise ValueError(
            f"Site {name!r} is in the sequential plate {sequential[0]!r}; automatic guides need "
            f"vectorised plates. Write `with pyro.plate({sequential[0]!r}, ...)` in place of the "
            "loop."
        )
    if site["mask"] is not None or masks(fn):
        raise ValueError(
            f"Site {name!r} is masked in the model. Without the same mask in the guide, the ELBO "
            "of masked elements is unbounded. Mask only observed sites, or write the guide by "
            "hand."
        )
    prior = unwrap(fn)
    frames = sorted(site["cond_indep_stack"], key=lambda frame: -frame.dim)
    plates = {frame.dim: frame.name for frame in frames}
    sizes = {frame.dim: frame.full_size or frame.size for frame in frames}
    nesting = -min(plates, default=0)
    num_event = fn.event_dim - len(prior.event_shape)
    batch = torch.Size((1,) * (nesting - len(fn.batch_shape)) + tuple(fn.batch_shape))
    event_batch = torch.Size(prior.batch_shape[len(prior.batch_shape) - num_event :])
    prior = expand(prior, batch + event_batch)
    value = site["value"].reshape(batch + event_batch + prior.event_shape)
    head = find_head(name, prior)
    start = head.start(prior, value, init_scale)
    return Latent(name, head, plates, sizes, batch, event_batch, start)


class Head:
    """A map from unconstrained numbers to the distribution of a site's guide.

    The distribution is of the prior's family; ``fixed`` are arguments that are not learnt.
    """

    num_categories = 0  # the number of values if they are indices

    def __init__(self, family: Any, parameters: tuple[str, ...], prior: Any, **fixed: Any) -> None:
        self.make: Callable[..., Any] = functools.partial(family, **fixed)
        self.support = family.support
        self.constraints = {name: family.arg_constraints[name] for name in parameters}
        self.event_shape = prior.event_shape
        if family is dist.Categorical:
            self.num_categories = len(support_values(prior))
        is_vector = any(limit.event_dim for limit in self.constraints.values())
        self.shape = torch.Size([self.num_features] if is_vector else [])  # of each parameter

    @property
    def size(self) -> int:
        """Return the number of unconstrained parameters of an element."""
        return len(self.constraints) * self.shape.numel()

    @property
    def num_features(self) -> int:
        """Return the number of features of a value, which other heads may read."""
        return self.num_categories or self.event_shape.numel()

    def build(self, raw: Tensor) -> Any:
        """Return a distribution of batch shape ``raw.shape[:-1]`` from ``(..., size)``."""
        parts = raw.reshape(*raw.shape[:-1], len(self.constraints), *self.shape)
        named = zip(self.constraints.items(), parts.unbind(raw.dim() - 1), strict=True)
        return self.make(**{name: biject_to(limit)(part) for (name, limit), part in named})

    def start(self, prior: Any, value: Tensor, init_scale: float | None) -> Tensor:
        """Return initial unconstrained parameters, ``prior.batch_shape + (size,)``.

        The distribution starts at the prior. If ``init_scale`` is given and the family has a
        location, it starts at ``value`` with ``init_scale`` times the prior's scale.
        """
        parts = []
        for name, number in self.initial(prior, value, init_scale).items():
            part = biject_to(self.constraints[name]).inv(number)
            if name == "logits":
                part = part.nan_to_num(posinf=_INFINITE_LOGIT, neginf=-_INFINITE_LOGIT)
            parts.append(part.reshape(*prior.batch_shape, -1))
        return torch.cat(parts, -1)

    def initial(self, prior: Any, value: Tensor, init_scale: float | None) -> dict[str, Tensor]:
        """Return the parameters in their constrained space, as :meth:`start` does."""
        numbers = {name: _number(prior, name) for name in self.constraints}
        if init_scale is not None and "loc" in numbers:
            numbers["loc"] = biject_to(self.support).inv(value)
            numbers["scale"] = numbers["scale"] * init_scale
        return numbers

    def features(self, value: Tensor) -> Tensor:
        """Return a value as features ``batch_shape + (num_features,)`` for other heads."""
        if self.num_categories:
            index = torch.nn.functional.one_hot(value.long(), self.num_categories)
            return index.to(torch.get_default_dtype())
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return value.reshape(*batch, self.num_features)


class TransportHead(Head):
    """A diagonal normal distribution that ``biject_to`` transforms to a continuous support."""

    def __init__(self, transform: Transform, prior: Any) -> None:
        self.transform = transform
        self.make = self._transport
        self.constraints = {"loc": constraints.real, "scale": constraints.positive}
        self.event_shape = prior.event_shape
        self.shape = torch.Size(transform.inverse_shape(prior.event_shape))

    def _transport(self, loc: Tensor, scale: Tensor) -> Any:
        normal = dist.Normal(loc, scale).to_event(len(self.shape))
        return dist.TransformedDistribution(normal, [self.transform])

    def initial(self, prior: Any, value: Tensor, init_scale: float | None) -> dict[str, Tensor]:
        loc = self.transform.inv(value)
        return {"loc": loc, "scale": torch.full_like(loc, init_scale or 1.0)}


def find_head(name: str, prior: Any) -> Head:
    """Return the head of site ``name``, whose distribution without ``to_event`` is ``prior``."""
    support = prior.support
    if support is constraints.one_hot:
        return Head(OneHot, ("logits",), prior)
    if support is constraints.boolean:
        return Head(dist.Bernoulli, ("logits",), prior)
    if _has_values_of(prior, dist.Binomial):
        count = _total_count(name, prior)
        return Head(dist.Binomial, ("logits",), prior, total_count=count)
    for family, parameters in _PARAMETERS.items():
        if _has_values_of(prior, family):
            return Head(family, parameters, prior)
    if has_law_of(prior, dist.Delta):
        raise ValueError(
            f"Site {name!r} is a Delta, which has one value and needs no guide. Write "
            f"pyro.deterministic({name!r}, value) in the model."
        )
    try:
        return TransportHead(biject_to(_uniform_support(name, support)), prior)
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
    """Return a parameter of a prior. For one of finitely many values, logits are log-masses."""
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


def _total_count(name: str, prior: Any) -> float:
    """Return the total count that all elements share, since batches differ in size."""
    first = prior.total_count.flatten()[0]
    if (prior.total_count != first).any():
        raise ValueError(
            f"Site {name!r} is a {type(prior).__name__} whose total_count differs between "
            "elements, and a head needs one value for all. Make it equal for all elements, or "
            f"{_by_hand(name)}"
        )
    return first.item()


def _uniform_support(name: str, support: Constraint) -> Constraint:
    """Replace bounds that are tensors of equal numbers by one number, since batches vary."""
    if isinstance(support, constraints.independent):
        base = _uniform_support(name, support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    named = {key: vars(support).get(key) for key in ("lower_bound", "upper_bound")}
    bounds = {key: bound.flatten() for key, bound in named.items() if isinstance(bound, Tensor)}
    if not bounds or support.is_discrete:
        return support
    if any((bound != bound[0]).any() for bound in bounds.values()):
        raise ValueError(
            f"Site {name!r} has a support that differs between elements, {support}, and a head "
            "needs one support for all. Sample it on a fixed support, such as Uniform(0, 1), and "
            "scale it in the model."
        )
    return type(support)(**vars(support) | {key: bound[0] for key, bound in bounds.items()})
