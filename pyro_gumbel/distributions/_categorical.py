"""Base class of one-hot distributions, and the parameters of discrete distributions.

Torch stores the given one of ``probs`` and ``logits`` and computes the other when it is needed. It
clamps computed logits, which makes zero probabilities positive and small ones too large. The
functions here read the parameter that the user gave, in float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions.utils import logits_to_probs, probs_to_logits
from torch.nn.functional import logsigmoid

from pyro_gumbel.distributions._base import (
    BaseDistribution,
    as_floating,
    check_values,
    checkable,
    may_branch,
    plain_eager,
)
from pyro_gumbel.distributions._numerics import (
    exact_log,
    exact_logit,
    log_softmax,
    noise_dtype,
    perturb,
    widen,
)


def sole_parameter(probs: Any, logits: Any) -> tuple[str, Any]:
    """Return name and value of the given parameter. Raise ``ValueError`` unless it is one."""
    if (probs is None) == (logits is None):
        given = "neither" if probs is None else "both"
        raise ValueError(
            f"Exactly one of probs and logits must be given; got {given}. Write probs=... or "
            "logits=... ."
        )
    return ("probs", probs) if logits is None else ("logits", logits)


class DiscreteDistribution(BaseDistribution):
    """A distribution given by ``probs`` or ``logits``, which are read in float32 or better."""

    _event_dims = 0  # of the parameter

    def _init_parameter(self, probs: Any, logits: Any, validate_args: bool | None) -> None:
        self._name, given = sole_parameter(probs, logits)
        self._given = as_floating(given)
        shape = self._given.shape
        if self._event_dims and (not shape or shape[-1] == 0):
            raise ValueError(
                f"{self._name} must have a last dimension of categories; got shape "
                f"{tuple(shape)}. Write torch.zeros(num_categories), for example."
            )
        batch_dims = len(shape) - self._event_dims
        self._init_shapes(shape[:batch_dims], shape[batch_dims:], validate_args)
        if self._validate_args and checkable(self._given):
            self._check_parameter(self._given.detach())

    def _check_parameter(self, given: Tensor) -> None:
        """Raise ``ValueError`` if the values do not define a distribution."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self._given.dtype

    @property
    def param_shape(self) -> torch.Size:
        """Shape of ``probs`` and of ``logits``."""
        return self.batch_shape + self.event_shape

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name}: {tuple(self.param_shape)})"

    @classmethod
    def infer_shapes(
        cls, probs: Sequence[int] | None = None, logits: Sequence[int] | None = None
    ) -> tuple[torch.Size, torch.Size]:
        shape = torch.Size(sole_parameter(probs, logits)[1])
        batch_dims = len(shape) - cls._event_dims
        return shape[:batch_dims], shape[batch_dims:]


class CategoricalDistribution(DiscreteDistribution):
    """A distribution over vectors of ``C`` categories, given by ``probs`` or ``logits``."""

    _event_dims = 1

    def _check_parameter(self, given: Tensor) -> None:
        if self._name == "logits":
            top = given.amax(-1)  # not finite with NaN, +inf or a row of -inf
            expected = "be numbers below +inf, not all -inf in a row"
            check_values("logits", given, torch.isfinite(top), expected)
        else:
            total = given.to(noise_dtype(self.dtype)).sum(-1)
            valid = (given.amin(-1) >= 0) & (total > 0) & torch.isfinite(total)
            expected = "be non-negative and finite, with a positive sum in every row"
            check_values("probs", given, valid, expected)

    @property
    def _scores(self) -> Tensor:
        """Log-probabilities up to a constant in each row, with a maximum near zero."""
        return self._derive("scores", self._compute_scores)

    def _compute_scores(self) -> Tensor:
        given = widen(self._given)
        if self._name == "probs":
            return exact_log(given)
        # Softmax and gradient do not depend on the offset, but rounding errors do.
        return given - given.detach().amax(-1, keepdim=True)

    @property
    def _log_probs(self) -> Tensor:
        """Normalised log-probabilities; exactly ``-inf`` at zero probabilities."""
        return self._derive("log_probs", lambda: log_softmax(self._scores))

    @property
    def probs(self) -> Tensor:
        """Normalised probabilities, ``batch_shape + (C,)``."""
        return self._broadcast(self._log_probs.exp())

    @property
    def logits(self) -> Tensor:
        """Normalised log-probabilities, ``batch_shape + (C,)``."""
        return self._broadcast(self._log_probs)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).expand(self.param_shape)

    def _perturbed(self, sample_shape: Any) -> Tensor:
        """Draw logits plus Gumbel noise, float32 or better; their argmax is an exact draw."""
        return perturb(self._scores, self._extended_shape(sample_shape))


def value_dtype(fn: Any) -> torch.dtype:
    """Return the dtype of the parameters, which one-hot and Bernoulli values share."""
    own = getattr(fn, "dtype", None)
    # Private in torch, as are _categorical and _is_view below: without them, reading the
    # parameters of torch's distributions fails.
    return fn._param.dtype if own is None else own


def log_probs(fn: Any) -> Tensor:
    """Return log-probabilities ``batch_shape + (C,)``; exactly ``-inf`` at zero probabilities."""
    if isinstance(fn, CategoricalDistribution):
        return fn._log_probs.expand(fn.param_shape)
    return _read(getattr(fn, "_categorical", fn), _log, _normalise, is_binary=False)


def log_odds(fn: Any) -> Tensor:
    """Return log-odds of the value 1 of a Bernoulli, ``batch_shape``; infinite if certain."""
    if isinstance(fn, BaseDistribution):
        return fn._log_odds().expand(fn.batch_shape)
    return _read(fn, lambda probs: exact_logit(widen(probs)), widen, is_binary=True)


def bit_log_masses(fn: Any) -> Tensor:
    """Return log-probabilities of 0 and 1 of a Bernoulli, ``batch_shape + (2,)``."""
    odds = log_odds(fn)
    return torch.stack([logsigmoid(-odds), logsigmoid(odds)], -1)


@torch.no_grad()
def weights(fn: Any) -> Tensor:
    """Return unnormalised probabilities of a one-hot or categorical, without gradient."""
    if not isinstance(fn, CategoricalDistribution):
        probs = vars(getattr(fn, "_categorical", fn)).get("probs")
        if probs is not None and probs.dtype == noise_dtype(probs.dtype):
            return probs.detach()  # given or computed, since torch does not clamp a softmax
    scores = log_probs(fn)
    return (scores - scores.amax(-1, keepdim=True)).exp_()


@torch.no_grad()
def bit_probs(fn: Any) -> Tensor:
    """Return the probability of the value 1 of a Bernoulli, in float64, without gradient."""
    if isinstance(fn, BaseDistribution):
        return log_odds(fn).double().sigmoid()
    return _read(fn, Tensor.double, lambda odds: odds.double().sigmoid(), is_binary=True)


def _log(probs: Tensor) -> Tensor:
    # Torch has normalised the probabilities, in their dtype.
    return log_softmax(exact_log(widen(probs)))


def _normalise(logits: Tensor) -> Tensor:
    wide = widen(logits)
    return wide if wide.dtype == logits.dtype else log_softmax(wide)


def _read(
    fn: Any,
    from_probs: Callable[[Tensor], Tensor],
    from_logits: Callable[[Tensor], Tensor],
    *,
    is_binary: bool,
) -> Tensor:
    """Compute a result from the parameter that the user gave to torch's distribution."""
    own = vars(fn)
    probs, logits = own.get("probs"), own.get("logits")
    if logits is None or own.get("_param") is probs:
        return from_probs(own["probs"])
    # After expand torch does not record which parameter was given if it had both. They are then
    # views. Logits that a constructor normalised are not.
    normalised = plain_eager() and not (logits._is_view() or logits.is_inference())
    if probs is None or probs.numel() == 0 or normalised:
        return from_logits(logits)
    half = probs.dtype != noise_dtype(probs.dtype)
    derived = (_are_derived if half else _are_clamped)(logits, probs, is_binary)
    if may_branch(derived):
        return from_probs(probs) if derived else from_logits(logits)
    return torch.where(derived, from_probs(probs), from_logits(logits))


@torch.no_grad()
def _are_derived(logits: Tensor, probs: Tensor, is_binary: bool) -> Tensor:
    """Return whether the logits were computed, by the rounding of both in half precision."""
    forth = logits == probs_to_logits(probs, is_binary)
    back = probs == logits_to_probs(logits, is_binary)
    return forth.sum() > back.sum()


@torch.no_grad()
def _are_clamped(logits: Tensor, probs: Tensor, is_binary: bool) -> Tensor:
    """Return whether torch computed the logits from probabilities that it clamped."""
    # Then the extreme logit is that of torch's bound. Without probabilities beyond the bound both
    # parameters are equally accurate.
    eps = torch.finfo(probs.dtype).eps
    low, high = math.log(eps), -math.log(eps)  # torch clamps to [eps, 1 - eps], or only below
    clamped = (probs.amin() < 0.999 * eps) & (logits.amin() > low - 5e-4)
    if not is_binary:
        return clamped
    return clamped | ((probs.amax() > 1 - eps) & (logits.amax() < high + 1e-2))
