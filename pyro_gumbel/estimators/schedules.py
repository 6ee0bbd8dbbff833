"""Temperatures that change as training goes."""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor, nn

from pyro_gumbel.estimators._repr import rebuilding_repr

__all__ = ["Exponential", "Linear", "Schedule"]


class Schedule(nn.Module):
    """A hyper-parameter as a function of the number of optimisation steps taken.

    :class:`~pyro_gumbel.infer.Estimator_ELBO` advances every schedule of the estimators it used by
    one, once for each call that computes a gradient; evaluating a loss does not advance it. The
    count is part of ``state_dict``.

    Example:
        One of your own has a ``value`` that depends on ``step_count``.

        >>> class InverseRoot(Schedule):
        ...     def __init__(self, start):
        ...         super().__init__()
        ...         self.start = start
        ...     @property
        ...     def value(self):
        ...         return self.start / (1 + self.step_count) ** 0.5
        >>> temperature = InverseRoot(1.0)
        >>> for _ in range(3):
        ...     temperature.advance()
        >>> temperature, temperature.value
        (InverseRoot(1.0), 0.5)
    """

    def __init__(self) -> None:
        super().__init__()
        self.step_count = 0
        self.stand_in: Tensor | None = None

    @property
    @abstractmethod
    def value(self) -> float:
        """The current value."""

    @property
    def current(self) -> float | Tensor:
        """What an estimator computes with: :attr:`value`, as a tensor while a step is recorded.

        A recorded step would go on with a number for ever; a tensor it is given anew.
        """
        return self.value if self.stand_in is None else self.stand_in

    def advance(self) -> None:
        """Count one optimisation step."""
        self.step_count += 1

    def get_extra_state(self) -> dict[str, int]:
        return {"step_count": self.step_count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step_count = int(state["step_count"])

    __repr__ = rebuilding_repr


class Exponential(Schedule):
    r"""Decay (or growth) by a constant rate towards a bound.

    .. math::
        \tau_t = \mathrm{start} \cdot e^{-\mathrm{rate} \cdot t}, \text{ never past } \mathrm{end}

    Args:
        start: Value before the first step, positive.
        end: Bound, positive: the floor where ``rate > 0``, the ceiling where ``rate < 0``.
        rate: Decay per optimisation step.

    Raises:
        ValueError: If ``start`` or ``end`` is not positive, or ``rate`` leads away from ``end``.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017),
        https://arxiv.org/abs/1611.01144

    Example:
        >>> temperature = Exponential(1.0, 0.5, 0.1)
        >>> temperature.advance()
        >>> round(temperature.value, 4)
        0.9048
    """

    def __init__(self, start: float, end: float, rate: float) -> None:
        super().__init__()
        _check_positive(type(self).__name__, start=start, end=end)
        if not math.isfinite(rate) or (end - start) * rate > 0:
            raise ValueError(
                f"Exponential: rate={rate!r} never leads from start={start!r} to end={end!r}; "
                "a positive rate decays, a negative one grows."
            )
        self.start, self.end, self.rate = float(start), float(end), float(rate)

    @property
    def value(self) -> float:
        exponent = min(max(-self.rate * self.step_count, -700.0), 700.0)
        bound = max if self.rate > 0 else min
        return bound(self.start * math.exp(exponent), self.end)


class Linear(Schedule):
    r"""Move from one value to another in equal steps, then stay.

    .. math:: \tau_t = \mathrm{start} + (\mathrm{end} - \mathrm{start}) \min(t / \mathrm{steps}, 1)

    Args:
        start: Value before the first step, positive.
        end: Value from step ``steps`` on, positive.
        steps: Number of optimisation steps between the two, at least 1.

    Raises:
        ValueError: If ``start`` or ``end`` is not positive, or ``steps`` is below 1.

    Example:
        >>> temperature = Linear(1.0, 0.5, 10)
        >>> temperature.advance()
        >>> temperature.value
        0.95
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        super().__init__()
        _check_positive(type(self).__name__, start=start, end=end)
        if steps < 1:
            raise ValueError(f"Linear: steps must be at least 1; got {steps!r}.")
        self.start, self.end, self.steps = float(start), float(end), int(steps)

    @property
    def value(self) -> float:
        return self.start + (self.end - self.start) * min(self.step_count / self.steps, 1.0)


def _check_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{owner}: {name} must be positive and finite; got {value!r}.")


def check_temperature(owner: str, name: str, value: float | Tensor | Schedule) -> None:
    """Refuse a temperature that is no positive number, tensor of positive numbers or schedule.

    Raises:
        TypeError: If it is none of the three.
        ValueError: If it is not positive.
    """
    if isinstance(value, Schedule):
        return
    if isinstance(value, Tensor):
        positive = bool((value > 0).all())
    elif isinstance(value, (int, float)):
        positive = math.isfinite(value) and value > 0
    else:
        raise TypeError(
            f"{owner}: {name} must be a number, a tensor or a schedule such as Exponential(1.0, "
            "0.5, 1e-4); "
            f"got {value!r}."
        )
    if not positive:
        raise ValueError(f"{owner}: {name} must be positive; got {value!r}.")
