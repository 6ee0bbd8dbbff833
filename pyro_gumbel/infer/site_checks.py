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
from pyro_gumbel.distributions.families import is_bit, is_one_hot, unwrap
from pyro_gumbel.estimators import Call

__all__ = ["Doubt", "SiteChecks", "same_programs"]

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
_TORCH: Any = Distribution  # its switch is one of three here: True, False, LIGHT
_MOST = 99  # light runs in a row


class Doubt(Exception):
    """Something at a site is not as light checks want it; torch has to decide."""


class SiteChecks(Messenger):
    """The checks of distributions in the runs of one ELBO, where Pyro's validation is on.

    Torch checks arguments where a distribution is made and values where they are scored, and does
    more than it needs to: a one-hot distribution checks its logits three times, by a softmax too.
    A *light* run leaves that out, and each site's arguments and value are held against the same
    constraints once. It is allowed to two programs whose last full run had known families alone.
    A light run in doubt is to be run anew in full, from the same random numbers, so that light
    checks never refuse what torch would take; the programs stay with torch's checks from then on.

    What is at no site (a distribution that a program scores by itself, or hides by
    ``poutine.block``) has torch's checks in the full runs only: the first, each hundredth, and one
    where the bound is NaN.

    As a messenger this goes inside all handlers that draw.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trusted: Call | None = None
        self._doubted: Call | None = None
        self._plain = True
        self._light_runs = 0

    def allow_light_run(self, call: Call) -> bool:
        """Tell whether the next run of the programs may be a light one."""
        wanted = _TORCH._validate_args is not False
        return wanted and self._light_runs < _MOST and same_programs(self._trusted, call)

    @contextmanager
    def light_run(self) -> Iterator[None]:
        """Let sites be checked here instead of by torch.

        Raises:
            Doubt: By a site within, if torch has to decide.
        """
        self._light_runs += 1
        before = _TORCH._validate_args
        _TORCH._validate_args = LIGHT
        try:
            yield
        finally:
            if _TORCH._validate_args is LIGHT:  # the program may have set another
                _TORCH._validate_args = before

    @contextmanager
    def full_run(self, call: Call) -> Iterator[None]:
        """Leave the checks to torch, if any are wanted, and learn what families there are."""
        before = _TORCH._validate_args
        if before is LIGHT:  # of a run that this one is part of
            _TORCH._validate_args = True
        self._plain = True
        self._light_runs = 0
        try:
            yield
        finally:
            if before is LIGHT:
                _TORCH._validate_args = before
        if before is not False:
            trust = self._plain and not same_programs(self._doubted, call)
            self._trusted = Call(call.model, call.guide) if trust else None

    def doubt(self, call: Call) -> None:
        """Leave the programs to torch from now on."""
        self._trusted, self._doubted = None, Call(call.model, call.guide)

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        fn = unwrap(cast(Any, msg["fn"]))
        known = type(fn) in _PLAIN or isinstance(fn, BaseDistribution)
        self._plain = self._plain and known
        if _TORCH._validate_args is LIGHT and not (known and _arguments_hold(fn)):
            raise Doubt

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) or _TORCH._validate_args is not LIGHT:
            return
        fn = unwrap(cast(Any, msg["fn"]))
        # Latent bits and one-hots are scored by formulas that take relaxed values, too.
        scored = msg["is_observed"] or not (is_bit(fn) or is_one_hot(fn))
        if scored and _is_light(fn) and not _value_holds(fn, msg["value"]):
            raise Doubt
        if vars(fn).get("_validate_args") is LIGHT:
            del fn._validate_args  # expand() left it there; the program may keep the distribution


def same_programs(one: Call | None, other: Call) -> bool:
    """Tell whether two calls are of the same programs, whatever the arguments."""
    return one is not None and one.model == other.model and one.guide == other.guide


def _is_light(fn: Any) -> bool:
    """Tell whether torch would have checked it; who wrote ``validate_args=False`` meant that."""
    return getattr(fn, "_validate_args", None) is LIGHT


def _arguments_hold(fn: Any) -> bool:
    parts = (fn, *(vars(fn)[key] for key in _PARTS if key in vars(fn)))
    return all(
        _holds(constraint, vars(part)[argument])
        for part in parts
        if _is_light(part)
        for argument, constraint in part.arg_constraints.items()
        if _was_given(part, argument) and not constraints.is_dependent(constraint)
    )


def _was_given(fn: Any, argument: str) -> bool:
    """Tell an argument from what torch derived from it, the other of ``probs`` and ``logits``."""
    own = vars(fn)
    derived = argument in ("probs", "logits") and own.get("_param") is not own.get(argument)
    return argument in own and not derived


def _value_holds(fn: Any, value: Any) -> bool:
    if isinstance(fn, _UNSCORED):
        return True
    fits = isinstance(value, Tensor) and _broadcasts(value.shape, fn.shape(), fn.event_dim)
    return fits and _holds(fn.support, value)


def _broadcasts(shape: torch.Size, to: torch.Size, event_dim: int) -> bool:
    """Tell whether a value's shape goes with a distribution's; that of an event has to agree."""
    if len(shape) < event_dim or shape[len(shape) - event_dim :] != to[len(to) - event_dim :]:
        return False
    aligned = zip(reversed(shape), reversed(to), strict=False)
    return shape == to or all(one == other or 1 in (one, other) for one, other in aligned)


def _holds(constraint: Any, value: Tensor) -> bool:
    """Tell whether all of a tensor meets a constraint, in fewer passes where there is a way."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    value = value.detach()
    if constraint is constraints.real:
        # NaN if any number is; infinities of both signs are looked at below.
        total = value.sum().item()
        if total == total:
            return True
    if constraint is constraints.boolean and value.is_floating_point():
        # x - x * x is 0 for 0 and 1 alone, and no number for infinities.
        return bool(torch.addcmul(value, value, value, value=-1).abs_().sum() == 0)
    return bool(constraint.check(value).all())
