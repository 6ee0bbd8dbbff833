"""Estimators by name: one class for each name, and one object for each name in use."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from pyro_gumbel import estimators
from pyro_gumbel.estimators.base import Estimator
from pyro_gumbel.estimators.baselines import LeaveOneOut, MovingAverage
from pyro_gumbel.estimators.pathwise import Pathwise
from pyro_gumbel.estimators.score import Score

__all__ = [
    "CLASSES",
    "Choice",
    "DefaultEstimators",
    "NamedEstimators",
    "check_choice",
    "did_you_mean",
    "estimator_names",
]

Choice = Estimator | str | None

_ONE_WORD = ("DisARM", "MuProp", "ReinMax")  # acronyms that capitals do not split


def snake_case(name: str) -> str:
    """Write the name of a class in lower case, with ``_`` between its words."""
    for word in _ONE_WORD:
        name = name.replace(word, word.capitalize())
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _is_complete(kind: Any) -> bool:
    """Return whether a class makes an estimator without any argument."""
    if not (isinstance(kind, type) and issubclass(kind, Estimator) and kind is not Estimator):
        return False
    parameters = inspect.signature(kind).parameters.values()
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return all(one.default is not one.empty for one in named)


# ``Score`` has a name too, but which baseline it stands for depends on the number of particles.
CLASSES: dict[str, type[Estimator]] = {
    snake_case(name): getattr(estimators, name)
    for name in sorted(estimators.__all__, key=snake_case)
    if name != "Score" and _is_complete(getattr(estimators, name))
}


class NamedEstimators:
    """One estimator for each name, made when the name is first used.

    A name always stands for its class with default hyper-parameters. What it learns belongs to
    whoever holds this object: a name in a config to the configured guide, a name in
    ``infer={"gradient": ...}`` or ``default=`` to the ELBO. The attributes are the estimators made
    so far, by name.
    """

    def named(self, name: str) -> Estimator:
        """Return the estimator that a name stands for here.

        Raises:
            ValueError: If there is no such name.
        """
        if name not in vars(self):
            if name not in CLASSES:
                raise ValueError(f"No estimator is named {name!r}; names are {estimator_names()}.")
            setattr(self, name, CLASSES[name]())
        return cast(Estimator, getattr(self, name))

    def made(self) -> dict[str, Estimator]:
        """Return the estimators made so far, by name."""
        return dict(vars(self))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each estimator made so far, by name."""
        return {name: estimator.state_dict() for name, estimator in self.made().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state names an estimator that does not exist.
        """
        for name, part in state.items():
            self.named(name).load_state_dict(part)


class DefaultEstimators(NamedEstimators):
    """The estimators of an ELBO: those of names, and those of ``"auto"`` and ``"score"``.

    ``"auto"`` is :class:`~pyro_gumbel.estimators.Pathwise` where a site is reparameterised, else
    the score function. Its baseline is :class:`~pyro_gumbel.estimators.LeaveOneOut` with two
    particles or more, else :class:`~pyro_gumbel.estimators.MovingAverage`.
    """

    def __init__(self) -> None:
        self.pathwise = Pathwise()
        self.leave_one_out = Score(LeaveOneOut())
        self.moving_average = Score(MovingAverage())

    def score(self, num_particles: int) -> Estimator:
        """Choose the score function's baseline."""
        return self.leave_one_out if num_particles > 1 else self.moving_average

    def __call__(self, fn: Any, num_particles: int) -> Estimator:
        """Choose for distribution ``fn``."""
        return self.pathwise if fn.has_rsample else self.score(num_particles)

    def resolve(self, choice: Choice, fn: Any, num_particles: int) -> Estimator:
        """Return the estimator that a choice stands for at a site with distribution ``fn``."""
        if choice is None or choice == "auto":
            return self(fn, num_particles)
        if choice == "score":
            return self.score(num_particles)
        return self.named(choice) if isinstance(choice, str) else choice


def estimator_names() -> list[str]:
    """Return every name that stands for an estimator.

    Example:
        >>> "reinmax" in estimator_names()
        True
    """
    return sorted([*CLASSES, "auto", "score"])


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """Suggest the name that is closest in all but case, or return nothing if none is close."""
    folded = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""


def check_choice(choice: Any, prefix: str) -> None:
    """Raise ``TypeError`` or ``ValueError``, begun by ``prefix``, unless it is a choice."""
    if choice is None or isinstance(choice, Estimator):
        return
    if isinstance(choice, str):
        _check_name(choice, prefix)
        return
    if isinstance(choice, type) and issubclass(choice, Estimator):
        raise TypeError(
            f"{prefix} the class {choice.__name__}; give an object: {choice.__name__}()."
        )
    raise TypeError(
        f"{prefix} {choice!r}; give an estimator such as ReinMax(), or a name such as 'reinmax'."
    )


def _check_name(name: str, prefix: str) -> None:
    if name in estimator_names():
        return
    hint = did_you_mean(name, estimator_names())
    if name == "relax":
        hint = " Relax needs a network: write Relax(critic)."
    raise ValueError(
        f"{prefix} {name!r}, which names no estimator; names are {estimator_names()}.{hint}"
    )
