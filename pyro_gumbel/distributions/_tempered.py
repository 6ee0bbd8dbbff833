"""Base classes of relaxations, with a temperature for each element of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gumbel.distributions._base import BaseDistribution, broadcast_shapes, may_cache
from pyro_gumbel.distributions._categorical import CategoricalDistribution, infer_one_hot_shapes
from pyro_gumbel.distributions._parameters import (
    align_temperature,
    resolve_temperature,
)
from pyro_gumbel.distributions._widen import widen


class TemperedDistribution(BaseDistribution):
    """A distribution with a temperature, a number or a tensor that broadcasts to the batch."""

    _temperature: float | Tensor
    _wide_temperature: float | Tensor | None = None
    has_rsample = True

    def _init_temperature(self, temperature: Any, device: torch.device) -> None:
        """Check the temperature and broadcast the batch shape with it."""
        self._temperature = resolve_temperature(
            temperature,
            self.batch_shape,
            event_dim=len(self.event_shape),
            validate=self._validate_args,
        )
        self._device = device
        if isinstance(self._temperature, Tensor):
            self._batch_shape = broadcast_shapes(self.batch_shape, self._temperature.shape)

    @property
    def temperature(self) -> Tensor:
        """Temperature, a scalar or a tensor that broadcasts against ``batch_shape``."""
        if isinstance(self._temperature, Tensor):
            return self._temperature
        return torch.tensor(self._temperature, dtype=self.dtype, device=self._device)

    def __getstate__(self) -> dict[str, Any]:
        """Omit the derived tensor from pickles and deep copies."""
        return {**self.__dict__, "_wide_temperature": None}

    def _working_temperature(self, dtype: torch.dtype) -> float | Tensor:
        """Return the temperature in the precision of the computation.

        All calls share one tensor, so that a half-precision temperature accumulates its gradient
        in float32.
        """
        if self._wide_temperature is not None:
            return self._wide_temperature
        wide = self._temperature
        if isinstance(wide, Tensor) and wide.dtype != dtype:
            with torch.enable_grad():
                wide = widen(wide).to(dtype)
        if may_cache():
            self._wide_temperature = wide
        return wide

    def _temper(self, perturbed: Tensor) -> Tensor:
        """Divide by the temperature."""
        temperature = self._working_temperature(perturbed.dtype)
        if isinstance(temperature, Tensor) and self.event_shape:
            temperature = temperature.unsqueeze(-1)
        return perturbed / temperature

    def _log_temperature(self, dtype: torch.dtype) -> float | Tensor:
        temperature = self._working_temperature(dtype)
        return temperature.log() if isinstance(temperature, Tensor) else math.log(temperature)

    def _brief_temperature(self) -> str:
        given = self._temperature
        return f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{given:g}"


class TemperedCategorical(CategoricalDistribution, TemperedDistribution):
    """A categorical distribution with a temperature, as for the Gumbel-softmax."""

    arg_constraints = {
        "temperature": constraints.positive,
        "probs": constraints.simplex,
        "logits": constraints.real_vector,
    }

    def _init_tempered(
        self, temperature: Any, probs: Any, logits: Any, validate_args: bool | None
    ) -> None:
        self._init_categorical(probs, logits, validate_args)
        self._init_temperature(temperature, self._parameters.given.device)

    def __repr__(self) -> str:
        temperature, name = self._brief_temperature(), self._parameters.name
        return (
            f"{type(self).__name__}(temperature: {temperature}, {name}: {tuple(self.param_shape)})"
        )

    @staticmethod
    def infer_shapes(
        temperature: Sequence[int] = (),
        probs: Sequence[int] | None = None,
        logits: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[torch.Size, torch.Size]:
        """Infer ``batch_shape`` and ``event_shape`` from the shapes of the arguments."""
        batch_shape, event_shape = infer_one_hot_shapes(probs, logits)
        if len(temperature) > 0:
            aligned = align_temperature(torch.Size(temperature), batch_shape)
            batch_shape = broadcast_shapes(batch_shape, aligned)
        return batch_shape, event_shape
