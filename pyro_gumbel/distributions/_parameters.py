"""Parameters and temperatures of categorical distributions."""

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
    """Probabilities or logits as given, and derived tensors, which are computed once.

    Derived tensors have the shape of the parameter (without batch expansion) and are float32 or
    better. Half-precision parameters therefore define the same distribution as their float32
    copies.
    """

    def __init__(self, probs: Any, logits: Any) -> None:
        """Store the given parameter; raise ``ValueError`` unless exactly one is given."""
        check_one_given(probs, logits)
        self.name = "probs" if logits is None else "logits"
        self.given = as_floating(probs if logits is None else logits)
        if self.given.dim() == 0 or self.given.shape[-1] == 0:
            raise ValueError(
                f"{self.name} must have a last dimension of categories; got shape "
                f"{tuple(self.given.shape)}. Write torch.zeros(num_categories), for example."
            )
        self.dtype = self.given.dtype
        self._scores: Tensor | None = None
        self._log_probs: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Omit derived tensors from pickles and deep copies."""
        return {**self.__dict__, "_scores": None, "_log_probs": None}

    @property
    def scores(self) -> Tensor:
        """Log-probabilities up to a constant in each row, with a maximum near zero."""
        if self._scores is not None:
            return self._scores
        with torch.enable_grad():  # the first call may be a sample() without gradient
            given = widen(self.given)
            if self.name == "logits":
                # Softmax and gradient do not depend on the offset, but rounding errors do.
                scores = given - given.detach().amax(-1, keepdim=True)
            else:
                scores = exact_log(given)
        if may_cache():
            self._scores = scores
        return scores

    @property
    def log_probs(self) -> Tensor:
        """Normalised log-probabilities; exactly ``-inf`` at zero probabilities."""
        if self._log_probs is not None:
            return self._log_probs
        with torch.enable_grad():
            log_probs = log_softmax(self.scores)
        if may_cache():
            self._log_probs = log_probs
        return log_probs

    def check(self) -> None:
        """Raise ``ValueError`` if the values do not define a distribution."""
        given = self.given.detach()
        if not checkable(given):
            return
        if self.name == "logits":
            top = given.amax(-1)  # not finite with NaN, +inf or a row of -inf
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
    """Return the logarithm, exactly ``-inf`` with zero gradient at zero."""
    # Below the smallest normal number the gradient would overflow.
    log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    return log_probs.masked_fill(probs == 0, -math.inf)


def exact_logit(probs: Tensor) -> Tensor:
    """Return the log-odds, exactly infinite with zero gradient at 0 and 1."""
    info = torch.finfo(probs.dtype)
    log_odds = probs.clamp(info.tiny, 1 - info.eps / 2).logit()
    return log_odds.masked_fill(probs == 0, -math.inf).masked_fill(probs == 1, math.inf)


def resolve_temperature(
    temperature: Any, batch_shape: torch.Size, *, event_dim: int, validate: bool
) -> float | Tensor:
    """Check a temperature and reshape it so that it broadcasts against ``batch_shape``.

    A trailing 1 at the dimension of categories is removed.
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
    """Return the batch dimensions of a temperature of ``shape``.

    Returns:
        ``shape`` itself, or ``shape`` without a trailing 1 for the categories.

    Raises:
        ValueError: If the shape does not broadcast, or is ambiguous.
    """
    shape, batch_shape = torch.Size(shape), torch.Size(batch_shape)
    trailing = event_dim > 0 and len(shape) > 0 and shape[-1] == 1
    stripped = _broadcast(shape[:-1], batch_shape) if trailing else None
    for_categories = trailing and len(shape) > len(batch_shape)  # its only possible meaning
    plain = None if for_categories else _broadcast(shape, batch_shape)
    if plain is None and stripped is None:
        raise ValueError(
            f"temperature of shape {tuple(shape)} does not broadcast against batch_shape "
            f"{tuple(batch_shape)}; give one temperature, or one per element of the batch, with "
            "or without a trailing 1."
        )
    if plain is not None and stripped is not None and shape.numel() > 1:
        raise ValueError(
            f"temperature of shape {tuple(shape)} is ambiguous with batch_shape "
            f"{tuple(batch_shape)}: its last 1 may be a batch dimension or the dimension of "
            "categories. Write temperature.unsqueeze(-1) for the first, or "
            "temperature.squeeze(-1) for the second."
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
