"""Schedules of temperatures during training."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_gumbel._validate import check_number, integer, is_number, without_dimensions
from pyro_gumbel.estimators._module import StatefulModule

__all__ = ["Exponential", "Linear", "Schedule"]


class Schedule(StatefulModule):
    """A hyper-parameter as a function of the number of optimisation steps.

    Each call of :class:`~pyro_gumbel.infer.Estimator_ELBO` that computes a gradient advances the
    schedules of its estimators by one step. Evaluating a loss does not advance them. The count is
    part of ``state_dict``. Arguments raise errors as those of an
    :class:`~pyro_gumbel.estimators.Estimator` do.

    Example:
        A custom schedule defines ``value`` as a function of ``step_count``.

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
        """The value to compute with: a number, or a tensor while a step is recorded.

        A number would be a constant of the recorded step; a tensor is an input.
        """
        return self.value if self.stand_in is None else self.stand_in

    def advance(self) -> None:
        """Count one optimisation step."""
        self.step_count += 1

    def get_extra_state(self) -> dict[str, int]:
        return {"step_count": self.step_count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step_count = int(state["step_count"])


Temperature = float | Tensor | Schedule


class Exponential(Schedule):
    r"""Exponential decay or growth towards a bound.

    .. math::
        \tau_t = \mathrm{start} \cdot e^{-\mathrm{rate} \cdot t},
        \text{ clipped at } \mathrm{end}

    Args:
        start: Value before the first step, positive.
        end: Bound, positive: the minimum if ``rate > 0``, the maximum if ``rate < 0``.
        rate: Decay per optimisation step, towards ``end``; with 0 the value stays at ``start``.

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
        self.start = _check_positive("Exponential", "start", start)
        self.end = _check_positive("Exponential", "end", end)
        self.rate = check_number("Exponential", "rate", rate, example=1e-4)
        if not math.isfinite(self.rate) or (self.end - self.start) * self.rate > 0:
            raise ValueError(
                f"Exponential: rate={rate!r} never leads from start={start!r} to end={end!r}; "
                "a positive rate decays, a negative one grows."
            )

    @property
    def value(self) -> float:
        exponent = min(max(-self.rate * self.step_count, -700.0), 700.0)  # to avoid overflow
        least, most = sorted((self.start, self.end))
        return min(max(self.start * math.exp(exponent), least), most)


class Linear(Schedule):
    r"""Linear change from one value to another, then constant.

    .. math:: \tau_t = \mathrm{start} + (\mathrm{end} - \mathrm{start}) \min(t / \mathrm{steps}, 1)

    Args:
        start: Value before the first step, positive.
        end: Value from step ``steps`` on, positive.
        steps: Number of optimisation steps between the two, at least 1.

    Example:
        >>> temperature = Linear(1.0, 0.5, 10)
        >>> temperature.advance()
        >>> temperature.value
        0.95
    """

    def __init__(self, start: float, end: float, steps: float) -> None:
        super().__init__()
        self.start = _check_positive("Linear", "start", start)
        self.end = _check_positive("Linear", "end", end)
        if isinstance(steps, float) and steps.is_integer():  # such as 1e4
            steps = int(steps)
        self.steps = integer("Linear: steps", steps, 1, ValueError)

    @property
    def value(self) -> float:
        if self.step_count >= self.steps:
            return self.end  # exact, without the rounding of the sum below
        return self.start + (self.end - self.start) * (self.step_count / self.steps)


def _check_positive(owner: str, name: str, value: float) -> float:
    number = check_number(owner, name, value, example=1.0)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{owner}: {name} must be positive and finite; got {value!r}.")
    return number


def check_temperature(
    owner: str, name: str, value: Any, *, kinds: Sequence[str] = ("number", "tensor", "schedule")
) -> Any:
    """Return a positive temperature of one of the ``kinds``, a number as a float."""
    if isinstance(value, Schedule) and "schedule" in kinds:
        return value
    if isinstance(value, Tensor) and "tensor" in kinds:
        is_positive = bool((value > 0).all())
    else:
        value = without_dimensions(value)
        if not is_number(value):
            expected = " or ".join(", ".join(f"a {kind}" for kind in kinds).rsplit(", ", 1))
            example = f"{name}=0.5"
            if "schedule" in kinds:
                example += f" or {name}=Exponential(1.0, 0.5, 1e-4)"
            raise TypeError(
                f"{owner}: {name} must be {expected}, such as {example}; got {value!r}."
            )
        value = float(value)
        is_positive = 0 < value < math.inf
    if not is_positive:
        raise ValueError(f"{owner}: {name} must be positive; got {value!r}.")
    return value
