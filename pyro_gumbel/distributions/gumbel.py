"""The Gumbel distribution, also truncated at an upper bound, with accurate tails."""

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
from pyro_gumbel.distributions._constraints import less_than_eq
from pyro_gumbel.distributions._numerics import gumbel_noise, log_exponential_noise, noise_dtype

__all__ = ["Gumbel", "TruncatedGumbel"]

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


class TruncatedGumbel(Gumbel):
    r"""A Gumbel conditioned on being at most ``upper``.

    .. math::
        X = \mu - \beta \log(e^{-b} + E), \qquad
        p(x) = \tfrac1\beta e^{-z - e^{-z} + e^{-b}}, \qquad
        F(x) = e^{e^{-b} - e^{-z}}

    with :math:`z = (x - \mu)/\beta`, :math:`b = (u - \mu)/\beta` and :math:`E \sim
    \mathrm{Exp}(1)`, by the memorylessness of the exponential distribution. In the Gumbel-max
    trick it is the distribution of all Gumbels but the largest, conditional on the largest.

    Shapes: ``batch_shape`` is the broadcast shape of the parameters, ``event_shape`` is ().
    ``mean`` and ``entropy`` need the exponential integral; the variance has no closed form.

    Args:
        loc: Location of the Gumbel before truncation, a number or a tensor.
        upper: Upper bound above ``-inf``; ``inf`` means no truncation.
        scale: Scale, positive, a number or a tensor.
        validate_args: Whether to check arguments, with the errors of :class:`Gumbel`.

    References:
        A* Sampling (Maddison, Tarlow, Minka, 2014), https://arxiv.org/abs/1411.0030

    Example:
        >>> d = TruncatedGumbel(0.0, upper=-1.0)
        >>> bool((d.sample((1000,)) <= -1.0).all()), d.icdf(torch.tensor(1.0))
        (True, tensor(-1.))
    """

    arg_constraints = {
        "loc": constraints.real,
        "upper": constraints.real,
        "scale": constraints.positive,
    }

    _upper: Tensor

    def __init__(
        self, loc: Any, upper: Any, scale: Any = 1.0, *, validate_args: bool | None = None
    ) -> None:
        self._init_parameters(validate_args, loc=loc, upper=upper, scale=scale)
        if self._validate_args and checkable(self._upper):
            above = self._upper > -torch.inf  # false for NaN too
            check_values("upper", self._upper, above, "be a number above -inf")

    @property
    def upper(self) -> Tensor:
        """Upper bound, broadcast to ``batch_shape``."""
        return self._upper.expand(self.batch_shape)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Numbers up to and including ``upper``."""
        return less_than_eq(self._upper)

    def _bound(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``-b`` (``-inf`` if unbounded), a finite bound, and a mask of unbounded ones."""
        loc, scale = self._wide()
        unbounded = self._upper == torch.inf
        upper = torch.where(unbounded, loc, self._upper.to(loc.dtype))
        return ((loc - upper) / scale).masked_fill(unbounded, -torch.inf), upper, unbounded

    def _from_log_exponential(self, log_e: Tensor) -> Tensor:
        """Map the logarithm of an Exp(1) variable to the truncated variable."""
        loc, scale = self._wide()
        minus_b, upper, unbounded = self._bound()
        # Two forms of the formula, each without cancellation on one side of the mode.
        low = minus_b >= 0
        excess = torch.where(low, log_e - minus_b, 0.0)
        below = upper - scale * torch.logaddexp(excess, torch.zeros_like(excess))
        above = loc - scale * torch.logaddexp(torch.where(low, 0.0, minus_b), log_e)
        above = torch.where(unbounded, above, torch.minimum(above, upper))
        return torch.where(low, below, above)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``sample_shape + batch_shape``, differentiable in the parameters."""
        shape = self._extended_shape(sample_shape)
        noise = log_exponential_noise(shape, noise_dtype(self.dtype), self._loc.device)
        return self._from_log_exponential(noise).to(self.dtype)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile of a probability in [0, 1]; ``upper`` at 1."""
        return self._score(self._from_log_exponential(self._log_exponential(value)), value)

    def _to_exponential(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``z`` and ``exp(-z) - exp(-b)``, which is Exp(1) for a sample."""
        loc, scale = self._wide()
        value = value.to(torch.promote_types(loc.dtype, value.dtype))
        z = (value - loc) / scale
        minus_b, upper, _ = self._bound()
        low = minus_b >= 0
        gap = torch.where(low, (upper - value) / scale, 0.0)
        # The bound on exp avoids 0 * inf; beyond it all mass is at upper.
        below = minus_b.clamp(0.0, 80.0).exp() * gap.expm1()
        above = torch.where(low, 0.0, -z).exp() - torch.where(low, 0.0, minus_b).exp()
        return z, torch.where(low, below, above)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density; ``-inf`` above ``upper``."""
        if self._validate_args:
            self._validate_sample(value)
        _, scale = self._wide()
        z, exponential = self._to_exponential(value)
        result = -z - exponential - scale.log()
        return self._score(result.masked_fill(value > self._upper, -torch.inf), value)

    def cdf(self, value: Tensor) -> Tensor:
        """Return the cumulative distribution function; 1 from ``upper`` on."""
        beyond = value >= self._upper
        _, exponential = self._to_exponential(value)
        result = (-exponential.masked_fill(beyond, 0.0).clamp(max=1e6)).exp()
        return self._score(result, value)

    def _mean_log(self) -> Tensor:
        """Return the mean of ``-z``, ``log a + exp(a) E1(a)`` at ``a = exp(-b)``, in float64."""
        minus_b, _, _ = self._bound()
        return _log_plus_scaled_exp1(minus_b.double())

    @property
    def mean(self) -> Tensor:
        """``loc - scale (log a + exp(a) E1(a))`` with ``a = exp(-b)``."""
        loc, scale = self._wide()
        return self._statistic(loc - scale * self._mean_log())

    @property
    def mode(self) -> Tensor:
        """The smaller of ``loc`` and ``upper``."""
        return torch.minimum(self._loc, self._upper).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        return self._closed_form("variance")

    @property
    def stddev(self) -> Tensor:
        return self._closed_form("stddev")

    def entropy(self) -> Tensor:
        """Return ``log scale + 1 - log a - exp(a) E1(a)`` with ``a = exp(-b)``, in nats."""
        _, scale = self._wide()
        result = scale.log() + 1 - self._mean_log()
        return self._statistic(result)


def _log_plus_scaled_exp1(log_a: Tensor) -> Tensor:
    r"""Return :math:`\log a + e^a E_1(a)` for any ``log_a``; it is -gamma at -inf."""
    small = log_a <= 0
    # Power series of E1, with log a separate, since (1 - e^a) log a vanishes with a.
    a = torch.where(small, log_a, 0.0).exp()
    series, term = torch.zeros_like(a), torch.ones_like(a)
    for k in range(1, 22):
        term = term * (-a / k)
        series = series - term / k
    finite = torch.where(small, log_a, 0.0).clamp(min=-700.0)
    near = -a.expm1() * finite + a.exp() * (series - EULER_GAMMA)
    # Continued fraction of e^a E1(a), from the inside out.
    a = torch.where(small, 0.0, log_a).clamp(max=700.0).exp()
    tail = torch.zeros_like(a)
    for k in range(80, 0, -1):
        tail = k * k / (a + (2 * k + 1) - tail)
    far = torch.where(small, 0.0, log_a) + 1 / (a + 1 - tail)
    return torch.where(small, near, far)


def _brief(tensor: Tensor) -> str:
    return f"{tensor.item():g}" if tensor.numel() == 1 and checkable(tensor) else str(tensor.shape)
