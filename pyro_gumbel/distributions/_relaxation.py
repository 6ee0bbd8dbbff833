"""The common part of Concrete distributions: a temperature, and optionally hard draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_gumbel._validate import is_number
from pyro_gumbel.distributions._base import broadcast_shapes, checkable, joint_shape
from pyro_gumbel.distributions._categorical import DiscreteDistribution
from pyro_gumbel.distributions._numerics import noise_dtype, straight_through, widen


class TemperedDistribution(DiscreteDistribution):
    """A distribution with a temperature, a number or a tensor that broadcasts to the batch."""

    has_rsample = True

    def _init_tempered(
        self, temperature: Any, probs: Any, logits: Any, validate_args: bool | None
    ) -> None:
        self._init_parameter(probs, logits, validate_args)
        self._temperature = resolve_temperature(
            temperature,
            self.batch_shape,
            event_dim=self._event_dims,
            validate=self._validate_args,
        )
        if isinstance(self._temperature, Tensor):
            self._batch_shape = broadcast_shapes(self.batch_shape, self._temperature.shape)

    @property
    def temperature(self) -> Tensor:
        """Temperature, a scalar or a tensor that broadcasts against ``batch_shape``."""
        if isinstance(self._temperature, Tensor):
            return self._temperature
        return self._given.new_full((), self._temperature, dtype=self.dtype)

    @property
    def _wide_temperature(self) -> float | Tensor:
        """The temperature in the precision of the computation."""
        # One tensor, so that a half-precision temperature accumulates its gradient in float32.
        given, dtype = self._temperature, noise_dtype(self.dtype)
        if not isinstance(given, Tensor) or given.dtype == dtype:
            return given
        return self._derive("temperature", lambda: widen(given).to(dtype))

    @property
    def _temperature_of_scores(self) -> float | Tensor:
        """The temperature, shaped to broadcast against scores of each category."""
        temperature = self._wide_temperature
        if isinstance(temperature, Tensor) and self._event_dims:
            return temperature.unsqueeze(-1)
        return temperature

    @property
    def _log_temperature(self) -> float | Tensor:
        temperature = self._wide_temperature
        return temperature.log() if isinstance(temperature, Tensor) else math.log(temperature)

    def __repr__(self) -> str:
        given, shape = self._temperature, tuple(self.param_shape)
        brief = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{given:g}"
        return f"{type(self).__name__}(temperature: {brief}, {self._name}: {shape})"

    @classmethod
    def infer_shapes(  # type: ignore[override]
        cls,
        temperature: Sequence[int] = (),
        probs: Sequence[int] | None = None,
        logits: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[torch.Size, torch.Size]:
        batch_shape, event_shape = super().infer_shapes(probs, logits)
        shape = torch.Size(temperature)
        aligned = align_temperature(shape, batch_shape, event_dim=cls._event_dims)
        return broadcast_shapes(batch_shape, aligned), event_shape


class Relaxation(TemperedDistribution):
    """A relaxed discrete distribution, whose draws are discrete if ``straight_through``."""

    def __init__(
        self,
        temperature: Any,
        probs: Any = None,
        logits: Any = None,
        *,
        straight_through: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.straight_through = straight_through
        self._init_tempered(temperature, probs, logits, validate_args)

    def _perturbed(self, sample_shape: Any) -> Tensor:
        """Draw scores plus noise, float32 or better."""
        raise NotImplementedError

    def _relax(self, perturbed: Tensor) -> Tensor:
        raise NotImplementedError

    def _harden(self, perturbed: Tensor) -> Tensor:
        raise NotImplementedError

    def _discrete(self, name: str) -> Tensor:
        """Return a statistic of the discrete distribution."""
        raise NotImplementedError

    def _hard_support(self, expand: bool) -> Tensor:
        raise NotImplementedError

    @property
    def has_enumerate_support(self) -> bool:
        """True if ``straight_through``."""
        return self.straight_through

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``sample_shape + batch_shape + event_shape`` without a gradient."""
        with torch.no_grad():
            perturbed = self._perturbed(sample_shape)
            return self._harden(perturbed) if self.straight_through else self._relax(perturbed)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values of the shape of ``sample``, differentiable in the parameters."""
        perturbed = self._perturbed(sample_shape)
        relaxed = self._relax(perturbed)
        if not self.straight_through:
            return relaxed
        return straight_through(self._harden(perturbed), relaxed)

    def rsample_pair(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draw a discrete value and its relaxation from the same noise.

        The discrete value is without a gradient, the relaxed one differentiable in the parameters.
        """
        perturbed = self._perturbed(sample_shape)
        return self._harden(perturbed), self._relax(perturbed)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all discrete values if ``straight_through``."""
        if not self.straight_through:
            raise NotImplementedError(
                f"{type(self).__name__} has a finite support only with straight_through=True."
            )
        return self._hard_support(expand)

    def _closed_form(self, name: str) -> Tensor:
        return self._discrete(name) if self.straight_through else super()._closed_form(name)


def resolve_temperature(
    temperature: Any, batch_shape: torch.Size, *, event_dim: int, validate: bool
) -> float | Tensor:
    """Check a temperature and reshape it so that it broadcasts against ``batch_shape``."""
    positive = True
    if isinstance(temperature, Tensor):
        if temperature.dim() > 0:
            align = align_temperature(temperature.shape, batch_shape, event_dim=event_dim)
            temperature = temperature.reshape(align)
        if validate and checkable(temperature):
            positive = bool((temperature > 0).all())
    elif is_number(temperature):
        temperature = float(temperature)
        positive = temperature > 0
    else:
        raise TypeError(
            f"temperature must be a positive number or tensor; got {temperature!r}. Write "
            "0.5 or torch.tensor(0.5)."
        )
    if not positive:
        raise ValueError(
            f"temperature must be positive; got {temperature!r}. Write 0.5, for example."
        )
    return temperature


def align_temperature(
    shape: torch.Size, batch_shape: torch.Size, *, event_dim: int = 1
) -> torch.Size:
    """Return the shape of a temperature without a trailing 1 for the categories, if it has one."""
    shape, batch_shape = torch.Size(shape), torch.Size(batch_shape)
    trailing = event_dim > 0 and len(shape) > 0 and shape[-1] == 1
    stripped = trailing and joint_shape(shape[:-1], batch_shape) is not None
    for_categories = trailing and len(shape) > len(batch_shape)  # its only possible meaning
    plain = not for_categories and joint_shape(shape, batch_shape) is not None
    if not (plain or stripped):
        raise ValueError(
            f"temperature of shape {tuple(shape)} does not broadcast against batch_shape "
            f"{tuple(batch_shape)}; give one temperature, or one per element of the batch, with "
            "or without a trailing 1."
        )
    if plain and stripped and shape.numel() > 1:
        raise ValueError(
            f"temperature of shape {tuple(shape)} is ambiguous with batch_shape "
            f"{tuple(batch_shape)}: its last 1 may be a batch dimension or the dimension of "
            "categories. Write temperature.unsqueeze(-1) for the first, or "
            "temperature.squeeze(-1) for the second."
        )
    return shape if plain else shape[:-1]
