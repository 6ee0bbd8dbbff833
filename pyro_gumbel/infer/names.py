"""Estimators by name, and the default."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, cast

from pyro_gumbel import estimators
from pyro_gumbel.estimators import Estimator, LeaveOneOut, MovingAverage, Pathwise, Score

__all__ = [
    "CLASSES",
    "Auto",
    "Choice",
    "check_choice",
    "check_options",
    "did_you_mean",
    "estimator_names",
]

Choice = Estimator | str | None

CLASSES: dict[str, type[Estimator]] = {
    "arms": estimators.ARMS,
    "disarm": estimators.DisARM,
    "disarm_tree": estimators.DisARMTree,
    "double_control_variate": estimators.DoubleControlVariate,
    "enumerate": estimators.Enumerate,
    "gapped_straight_through": estimators.GappedStraightThrough,
    "gumbel_rao": estimators.GumbelRao,
    "gumbel_softmax": estimators.GumbelSoftmax,
    "gumbel_straight_through": estimators.GumbelStraightThrough,
    "local_expectation": estimators.LocalExpectation,
    "muprop": estimators.MuProp,
    "pathwise": estimators.Pathwise,
    "rebar": estimators.Rebar,
    "reinmax": estimators.ReinMax,
    "reinmax_rao": estimators.ReinMaxRao,
    "rodeo": estimators.Rodeo,
    "straight_through": estimators.StraightThrough,
    "sum_and_sample": estimators.SumAndSample,
    "unordered_set": estimators.UnorderedSet,
}


class Auto:
    """The default: pathwise where a site can, else the score function with a baseline.

    That is :class:`~pyro_gumbel.estimators.LeaveOneOut` where there are two particles or more,
    else :class:`~pyro_gumbel.estimators.MovingAverage`.
    """

    def __init__(self) -> None:
        self.pathwise = Pathwise()
        self.leave_one_out = Score(LeaveOneOut())
        self.moving_average = Score(MovingAverage())

    def score(self, num_particles: int) -> Estimator:
        """Choose the score function's baseline."""
        return self.leave_one_out if num_particles > 1 else self.moving_average

    def named(self, name: str) -> Estimator:
        """Return the one estimator that a name stands for here."""
        if name not in vars(self):
            if name not in CLASSES:
                raise ValueError(f"No estimator is named {name!r}; names are {estimator_names()}.")
            setattr(self, name, CLASSES[name]())
        return cast(Estimator, getattr(self, name))

    def __call__(self, fn: Any, num_particles: int) -> Estimator:
        """Choose for distribution ``fn``."""
        return self.pathwise if fn.has_rsample else self.score(num_particles)


def estimator_names() -> list[str]:
    """Return every name that stands for an estimator.

    Example:
        >>> "reinmax" in estimator_names()
        True
    """
    return sorted([*CLASSES, "auto", "score"])


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """Ask for the one of ``names`` that is closest in all but case; say nothing if none is."""
    folded = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""


def check_options(owner: type, options: Iterable[str]) -> None:
    """Raise ``TypeError`` unless a constructor of a class, or of one it is made of, knows each."""
    parameters = {
        name: parameter.kind
        for part in owner.__mro__
        for name, parameter in inspect.signature(part.__init__).parameters.items()  # type: ignore[misc]
    }
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = [name for name, kind in parameters.items() if name != "self" and kind not in loose]
    for name in options:
        if name not in known:
            raise TypeError(
                f"{owner.__name__} has no argument {name!r}; its arguments are {known}."
                f"{did_you_mean(name, known)}"
            )


def check_choice(choice: Any, prefix: str) -> None:
    """Raise ``TypeError`` or ``ValueError``, begun by ``prefix``, unless it is a choice."""
    if choice is None or isinstance(choice, Estimator):
        return
    if isinstance(choice, str):
        if choice not in estimator_names():
            hint = did_you_mean(choice, estimator_names())
            if choice == "relax":
                hint = " Relax needs a network: write Relax(critic)."
            raise ValueError(
                f"{prefix} {choice!r}, which names no estimator; names are "
                f"{estimator_names()}.{hint}"
            )
        return
    if isinstance(choice, type) and issubclass(choice, Estimator):
        raise TypeError(
            f"{prefix} the class {choice.__name__}; give an object: {choice.__name__}()."
        )
    raise TypeError(
        f"{prefix} {choice!r}; give an estimator such as ReinMax(), or a name such as 'reinmax'."
    )
