"""The Gumbel distribution, with accurate tails."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_gumbel.distributions._base import (
    BaseDistribution,
    as_floating,
    broadcast_shapes,
    check_values,
    checkable,
)
from pyro_gumbel.distributions._numerics import gumbel_noise, noise_dtype

__all__ = ["Gumbel"]

EULER_GAMMA = 0.57721566490153286060651209008240243


class Gumbel(BaseDistribution):
    r"""The Gumbel distribution of maxima, the negative logarithm of an exponential variable.

    .. math::
        X = \mu + \beta G, \qquad
        p(x) = \tfrac1\beta e^{-z - e^{-z}}, \qquad
        F(x) = e^{-e^{-z}}, \qquad z = (x - \mu)/\beta

    Noise and densities are computed in float32 or better and cast to the dtype of the parameters.
    ``cdf`` and ``log_prob`` are defined on all of R.

    Shapes: ``batch_shape`` is the broadcast shape of ``loc`` and ``scale``, ``event_shape`` is ().

    Args:
        loc: Location (the mode), a number or a tensor.
        scale: Scale, positive, a number or a tensor.
        validate_args: Whether to check arguments; by default Pyro's setting.

    Raises:
        TypeError: If ``loc`` or ``scale`` is neither a number nor a tensor.
        ValueError: If ``loc`` is NaN or ``scale`` is not positive.

    References:
        Statistics of Extremes (Gumbel, 1958)

    Example:
        >>> Gumbel(0.0, 1.0).icdf(torch.tensor(1e-8))
        tensor(-2.9135)
        >>> Gumbel(torch.zeros(3), 2.0).sample((5,)).shape
        torch.Size([5, 3])
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    _loc: Tensor
    _scale: Tensor

    def __init__(self, loc: Any, scale: Any = 1.0, *, validate_args: bool | None = None) -> None:
        self._init_parameters(validate_args, loc=loc, scale=scale)

    def _init_parameters(self, validate_args: bool | None, **given: Any) -> None:
        """Store floating-point tensors of one dtype; numbers get the dtype of the tensors."""
        tensors = [as_floating(value) for value in given.values() if isinstance(value, Tensor)]
        dtypes = [tensor.dtype for tensor in tensors] or [torch.get_default_dtype()]
        dtype = functools.reduce(torch.promote_types, dtypes)
        device = tensors[0].device if tensors else None
        shapes = []
        for name, value in given.items():
            try:
                if isinstance(value, (int, float)):  # filled there: a GPU would wait for a copy
                    parameter = torch.full((), value, dtype=dtype, device=device)
                else:
                    parameter = torch.as_tensor(value, dtype=dtype, device=device)
            except TypeError:
                raise TypeError(
                    f"{name} must be a number or a tensor; got {value!r}. Write 1.0 or "
                    "torch.tensor(1.0)."
                ) from None
            setattr(self, f"_{name}", parameter)
            shapes.append(parameter.shape)
        self._init_shapes(broadcast_shapes(*shapes), (), validate_args)
        if self._validate_args and checkable(self._loc, self._scale):
            check_values("loc", self._loc, ~self._loc.isnan(), "be a number")
            check_values("scale", self._scale, self._scale > 0, "be positive")

    def __repr__(self) -> str:
        parameters = (
            f"{name}: {_brief(getattr(self, f'_{name}'))}" for name in self.arg_constraints
        )
        return f"{type(self).__name__}({', '.join(parameters)})"

    @property
    def loc(self) -> Tensor:
        """Location, broadcast to ``batch_shape``."""
        return self._loc.expand(self.batch_shape)

    @property
    def scale(self) -> Tensor:
        """Scale, broadcast to ``batch_shape``."""
        return self._scale.expand(self.batch_shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._loc.dtype

    def _wide(self) -> tuple[Tensor, Tensor]:
        dtype = noise_dtype(self.dtype)
        return self._loc.to(dtype), self._scale.to(dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``sample_shape + batch_shape``, differentiable in the parameters."""
        loc, scale = self._wide()
        noise = gumbel_noise(self._extended_shape(sample_shape), loc.dtype, loc.device)
        return (loc + scale * noise).to(self.dtype)

    def _standardise(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._validate_args:
            self._validate_sample(value)
        loc, scale = self._wide()
        return (value.to(torch.promote_types(loc.dtype, value.dtype)) - loc) / scale, scale

    def log_prob(self, value: Tensor) -> Tensor:
        z, scale = self._standardise(value)
        minus_z = (-z).clamp(max=torch.finfo(z.dtype).max)  # avoid inf - inf at -inf
        return self._score(minus_z - minus_z.exp() - scale.log(), value)

    def cdf(self, value: Tensor) -> Tensor:
        z, _ = self._standardise(value)
        # Below -80 the result is zero in every dtype; the bound keeps the gradient finite.
        return self._score((-(-z.clamp(min=-80.0)).exp()).exp(), value)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile of a probability in [0, 1]; infinite at 0 and 1."""
        loc, scale = self._wide()
        return self._score(loc - scale * self._log_exponential(value), value)

    def _log_exponential(self, probability: Tensor) -> Tensor:
        """Return the logarithm of the Exp(1) variable with this probability of a larger one."""
        if self._validate_args and checkable(probability):
            valid = (probability >= 0) & (probability <= 1)
            check_values("value of icdf", probability, valid, "be a probability in [0, 1]")
        dtype = torch.promote_types(noise_dtype(self.dtype), probability.dtype)
        return (-probability.to(dtype).log()).log()

    @property
    def mean(self) -> Tensor:
        """``loc + gamma scale``."""
        loc, scale = self._wide()
        return self._statistic(loc + EULER_GAMMA * scale)

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        """``pi scale / sqrt(6)``."""
        return self.scale * (math.pi / math.sqrt(6))

    @property
    def variance(self) -> Tensor:
        """``pi^2 scale^2 / 6``."""
        _, scale = self._wide()
        return self._statistic(scale.square() * (math.pi**2 / 6))

    def entropy(self) -> Tensor:
        """Return ``log scale + 1 + gamma``, in nats."""
        _, scale = self._wide()
        return self._statistic(scale.log() + (1 + EULER_GAMMA))


def _brief(tensor: Tensor) -> str:
    return f"{tensor.item():g}" if tensor.numel() == 1 and checkable(tensor) else str(tensor.shape)
