"""Read the probabilities of discrete distributions from the parameters that the user gave.

Torch stores the given one of ``probs`` and ``logits`` and computes the other when it is needed. It
clamps computed logits, which makes zero probabilities positive and small ones too large. If
validation is on, torch computes both, and after ``expand`` it does not record which was given.
All results are float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions.utils import logits_to_probs, probs_to_logits
from torch.nn.functional import logsigmoid

from pyro_gumbel.distributions._base import may_branch
from pyro_gumbel.distributions._categorical import CategoricalDistribution
from pyro_gumbel.distributions._noise import noise_dtype
from pyro_gumbel.distributions._parameters import exact_log, exact_logit
from pyro_gumbel.distributions._softmax import log_softmax
from pyro_gumbel.distributions._widen import widen
from pyro_gumbel.distributions.relaxed_bernoulli import RelaxedBernoulli

__all__ = ["bit_log_masses", "bit_probs", "log_odds", "log_probs", "value_dtype", "weights"]


def value_dtype(fn: Any) -> torch.dtype:
    """Return the dtype of the parameters, which one-hot and Bernoulli values share."""
    own = getattr(fn, "dtype", None)
    return fn._param.dtype if own is None else own


def log_probs(fn: Any) -> Tensor:
    """Return normalised log-probabilities of a one-hot or categorical, ``batch_shape + (C,)``.

    They are exactly ``-inf`` at zero probabilities.
    """
    if isinstance(fn, CategoricalDistribution):
        return fn._parameters.log_probs.expand(fn.batch_shape + fn.event_shape)
    return _read(getattr(fn, "_categorical", fn), _log, _normalise, is_binary=False)


def log_odds(fn: Any) -> Tensor:
    """Return log-odds of the value 1 of a Bernoulli, ``batch_shape``; infinite if certain."""
    if isinstance(fn, RelaxedBernoulli):
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
    if not isinstance(fn, RelaxedBernoulli):
        return _read(fn, Tensor.double, lambda odds: odds.double().sigmoid(), is_binary=True)
    return log_odds(fn).double().sigmoid()


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
    if probs is None or probs.numel() == 0:
        return from_logits(logits)
    # Either the logits were given, or the probabilities, and expand copied both.
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
    """Return whether torch computed the logits from probabilities that it clamped.

    In this case the extreme logit is that of torch's bound instead of that of the extreme
    probability. Without probabilities beyond the bound both parameters are equally accurate.
    """
    eps = torch.finfo(probs.dtype).eps
    low, high = math.log(eps), -math.log(eps)  # torch clamps to [eps, 1 - eps], or only below
    clamped = (probs.amin() < 0.999 * eps) & (logits.amin() > low - 5e-4)
    if not is_binary:
        return clamped
    return clamped | ((probs.amax() > 1 - eps) & (logits.amax() < high + 1e-2))
