"""Validation that is paid for once: torch's own checks first, then what they come to at sites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_gumbel.distributions._base import LIGHT, BaseDistribution
from pyro_gumbel.estimators import Call
from pyro_gumbel.estimators.families import has_logits, unwrap

__all__ = ["SiteChecks", "SiteError", "scoring_error"]

# Families whose constructors check the constraints of their arguments and nothing else.
_PLAIN = (
    dist.Bernoulli,
    dist.Beta,
    dist.Binomial,
    dist.Categorical,
    dist.Delta,
    dist.Dirichlet,
    dist.Exponential,
    dist.Gamma,
    dist.Laplace,
    dist.Normal,
    dist.OneHotCategorical,
    dist.Poisson,
    dist.Unit,
)
_UNSCORED = (dist.Delta, dist.Unit)  # torch does not look at their values
_PARTS = ("_categorical", "_dirichlet")  # where a one-hot and a Beta keep their arguments


class SiteError(ValueError):
    """A site's argument or value is not what its family takes."""


class SiteChecks:
    """The checks of distributions in the runs of one ELBO, where Pyro's validation is on.

    Torch checks arguments where a distribution is made and values where they are scored. It does
    more than it needs to: a one-hot distribution checks its logits three times, by a softmax too.
    So the first run of two programs has torch's checks. Where all of its sites are of families
    that these checks are known of, later runs hold each site's arguments and value against the
    same constraints once.

    Distributions that are no site's are checked in the first run alone, and again once a bound is
    NaN.

    Attributes:
        light: Whether the last run was one of the later ones.
    """

    def __init__(self) -> None:
        self.light = False
        self._programs: Call | None = None

    @contextmanager
    def watch(self, call: Call) -> Iterator[Messenger]:
        """Check a run of the programs; what this gives goes inside all handlers that draw."""
        sites = _Sites()
        self.light = bool(Distribution._validate_args) and self._knows(call)
        if not self.light:
            yield sites
        else:
            Distribution._validate_args = cast(bool, LIGHT)
            try:
                yield sites
            finally:
                Distribution._validate_args = True
        self._programs = Call(call.model, call.guide) if sites.plain else None

    def _knows(self, call: Call) -> bool:
        known = self._programs
        return known is not None and known.model == call.model and known.guide == call.guide

    def forget(self) -> None:
        """Let torch check the next run."""
        self._programs = None


class _Sites(Messenger):
    """Looks at the distribution and the value of each site."""

    plain = True

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        fn = unwrap(cast(Any, msg["fn"]))
        self.plain = self.plain and (type(fn) in _PLAIN or isinstance(fn, BaseDistribution))
        if _is_light(fn):
            _check_arguments(str(msg["name"]), fn)

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        fn = unwrap(cast(Any, msg["fn"]))
        if not _is_light(fn) or isinstance(fn, _UNSCORED):
            return
        # Latent bits and categories are draws of ours, relaxed ones too.
        if msg["is_observed"] or not has_logits(fn):
            _check_value(msg, fn)


def _is_light(fn: Any) -> bool:
    """Tell whether torch would have checked it; who wrote ``validate_args=False`` meant that."""
    return getattr(fn, "_validate_args", None) is LIGHT


def _check_arguments(name: str, fn: Any) -> None:
    for part in (fn, *(vars(fn)[key] for key in _PARTS if key in vars(fn))):
        for argument, constraint in part.arg_constraints.items():
            value = vars(part).get(argument)
            if value is None or constraints.is_dependent(constraint):
                continue
            if not _holds(constraint, value):
                came = f"argument {argument}, of shape {tuple(value.shape)}"
                raise SiteError(f"Site {name!r}: {came}, must satisfy {constraint!r}; got {value}")


def _check_value(site: Message, fn: Any) -> None:
    value = site["value"]
    usual = type(fn) in _PLAIN and isinstance(value, Tensor) and value.shape == fn.shape()
    if usual and _holds(fn.support, value):
        return
    try:
        fn._validate_sample(value)  # torch says what is wrong, or lets it broadcast
    except ValueError as error:
        raise SiteError(str(scoring_error(site, error))) from error


def _holds(constraint: Any, value: Tensor) -> bool:
    """Tell whether all of a tensor meets a constraint, in fewer passes where there is a way."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    value = value.detach()
    if constraint is constraints.real:
        total = value.sum()  # NaN if any number is
        if total == total:
            return True
    # Of the numbers up to one, zero and one alone are their own squares.
    bits = constraint is constraints.boolean and value.numel() > 0 and bool(value.amax() <= 1)
    if bits and torch.equal(value, value * value):
        return True
    return bool(constraint.check(value).all())


def scoring_error(site: Any, error: ValueError) -> ValueError:
    """Name the site, its distribution and the shapes, where a value cannot be scored."""
    fn = site["fn"]
    value, batch, event = (
        tuple(shape) for shape in (site["value"].shape, fn.batch_shape, fn.event_shape)
    )
    shapes = f"value {value}, batch {batch}, event {event}"
    return ValueError(f"Scoring site {site['name']!r} ({type(fn).__name__}; {shapes}): {error}")
