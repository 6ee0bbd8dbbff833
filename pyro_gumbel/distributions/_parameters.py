"""Parameters of categorical distributions and their temperatures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_gumbel._validate import is_number
from pyro_gumbel.distributions._base import as_floating, broadcast_shapes, checkable, may_cache
from pyro_gumbel.distributions._noise import noise_dtype
from pyro_gumbel.distributions._softmax import log_softmax
from pyro_gumbel.distributions._widen import widen


class CategoricalParameters:
    """Probabilities or logits as given, and what is derived from them, each computed once.

    The derived tensors keep the shape of the parameter (no batch expansion) and are float32 or
    better, so that half-precision parameters define the same law as their float32 copies.
    """

    def __init__(self, probs: Any, logits: Any) -> None:
        """Keep the one that is given; raise ``ValueError`` unless exactly one is."""
        check_one_given(probs, logits)
        self.name = "probs" if logits is None else "logits"
        self.given = as_floating(probs if logits is None else logits)
        if self.given.dim() == 0 or self.given.shape[-1] == 0:
            raise ValueError(
                f"{self.name} must have a last dimension of categories, but its shape is "
                f"{tuple(self.given.shape)}; write torch.zeros(num_categories), for example."
            )
        self.dtype = self.given.dtype
        self._scores: Tensor | None = None
        self._log_probs: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave derived tensors out of pickles and deep copies."""
        return {**self.__dict__, "_scores": None, "_log_probs": None}

    @property
    def scores(self) -> Tensor:
        """Log-probabilities up to a constant per row, with a maximum near zero."""
        if self._scores is not None:
            return self._scores
        with torch.enable_grad():  # the first call may be a sample() without gradient
            given = widen(self.given)
            if self.name == "logits":
                # The softmax ignores the offset and so does its gradient; rounding does not.
                scores = given - given.detach().amax(-1, keepdim=True)
            else:
                scores = exact_log(given)
        if may_cache():
            self._scores = scores
        return scores

    @property
    def log_probs(self) -> Tensor:
        """Normalised log-probabilities; exactly ``-inf`` where the probability is zero."""
        if self._log_probs is not None:
            return self._log_probs
        with torch.enable_grad():
            log_probs = log_softmax(self.scores)
        if may_cache():
            self._log_probs = log_probs
        return log_probs

    def check(self) -> None:
        """Raise ``ValueError`` if the values define no distribution."""
        given = self.given.detach()
        if not checkable(given):
            return
        if self.name == "logits":
            top = given.amax(-1)  # NaN, +inf or a row of -inf all show here
            if not torch.isfinite(top).all():
                raise ValueError(
                    f"logits must be numbers below +inf, not all -inf in a row; {_culprit(given)}."
                )
            return
        total = given.to(noise_dtype(self.dtype)).sum(-1)
        if not ((given.amin(-1) >= 0) & (total > 0) & torch.isfinite(total)).all():
            raise ValueError(
                "probs must be non-negative and finite, with a positive sum in every row; "
                f"{_culprit(given)}."
            )


def check_one_given(probs: Any, logits: Any) -> None:
    """Raise ``ValueError`` unless exactly one of the two is given."""
    if (probs is None) == (logits is None):
        given = "neither" if probs is None else "both"
        raise ValueError(
            f"Exactly one of probs and logits must be given; got {given}. Write probs=... or "
            "logits=... ."
        )


def exact_log(probs: Tensor) -> Tensor:
    """Logarithm that is exactly ``-inf`` at zero and sends no gradient there."""
    # Below the smallest normal number the slope would overflow.
    log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    return log_probs.masked_fill(probs == 0, -math.inf)


def exact_logit(probs: Tensor) -> Tensor:
    """Log-odds that are exactly infinite at 0 and 1 and send no gradient there."""
    info = torch.finfo(probs.dtype)
    log_odds = probs.clamp(info.tiny, 1 - info.eps / 2).logit()
    return log_odds.masked_fill(probs == 0, -math.inf).masked_fill(probs == 1, math.inf)


def resolve_temperature(
    temperature: Any, batch_shape: torch.Size, *, event_dim: int, validate: bool
) -> float | Tensor:
    """Check a temperature and bring it to a shape that broadcasts against ``batch_shape``.

    A trailing 1 that stands where the categories are is dropped.
    """
    if isinstance(temperature, Tensor):
        if temperature.dim() > 0:
            align = align_temperature(temperature.shape, batch_shape, event_dim=event_dim)
            temperature = temperature.reshape(align)
        if validate and checkable(temperature):
            _check_positive(bool((temperature > 0).all()), temperature)
        return temperature
    if not is_number(temperature):
        raise TypeError(
            f"temperature must be a positive number or tensor; got {temperature!r}. Write "
            "0.5 or torch.tensor(0.5)."
        )
    _check_positive(temperature > 0, temperature)
    return float(temperature)


def align_temperature(
    shape: torch.Size, batch_shape: torch.Size, *, event_dim: int = 1
) -> torch.Size:
    """Find the batch dimensions that a temperature of ``shape`` means.

    Returns:
        ``shape`` itself, or ``shape`` without the trailing 1 that stands for the categories.

    Raises:
        ValueError: If the shape fits neither way, or both ways with different meanings.
    """
    shape, batch_shape = torch.Size(shape), torch.Size(batch_shape)
    trailing = event_dim > 0 and len(shape) > 0 and shape[-1] == 1
    stripped = _broadcast(shape[:-1], batch_shape) if trailing else None
    for_categories = trailing and len(shape) > len(batch_shape)  # there is no other use for it
    plain = None if for_categories else _broadcast(shape, batch_shape)
    if plain is None and stripped is None:
        raise ValueError(
            f"temperature of shape {tuple(shape)} does not broadcast against batch_shape "
            f"{tuple(batch_shape)}; give one temperature, or one a row: shape "
            f"{tuple(batch_shape)}, with or without a trailing 1."
        )
    if plain is not None and stripped is not None and shape.numel() > 1:
        raise ValueError(
            f"temperature of shape {tuple(shape)} is ambiguous with batch_shape "
            f"{tuple(batch_shape)}: its last 1 may stand for a batch dimension or for the "
            f"categories; write temperature.unsqueeze(-1) for the first, temperature.squeeze(-1) "
            "for the second."
        )
    return shape if plain is not None else shape[:-1]


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size | None:
    try:
        return broadcast_shapes(a, b)
    except RuntimeError:
        return None


def _check_positive(positive: bool, temperature: Any) -> None:
    if not positive:
        raise ValueError(
            f"temperature must be positive; got {temperature!r}. Write 0.5, for example."
        )


def _culprit(given: Tensor) -> str:
    if given.isnan().any():
        return f"found NaN in a tensor of shape {tuple(given.shape)}"
    low, high = given.min().item(), given.max().item()
    return f"got values from {low:g} to {high:g} in a tensor of shape {tuple(given.shape)}"
