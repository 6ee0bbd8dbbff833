"""Names of estimators, and the objects that they stand for."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pyro_gumbel import estimators
from pyro_gumbel.estimators.base import Estimator
from pyro_gumbel.estimators.baselines import LeaveOneOut, MovingAverage
from pyro_gumbel.estimators.pathwise import Pathwise
from pyro_gumbel.estimators.score import Score

Choice = Estimator | str | None

_ONE_WORD = ("DisARM", "MuProp", "ReinMax")  # names that stay one word in snake case


def snake_case(name: str) -> str:
    """Convert the name of a class to snake case."""
    for word in _ONE_WORD:
        name = name.replace(word, word.capitalize())
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _is_complete(kind: Any) -> bool:
    """Return whether a class is an estimator without required arguments."""
    if not (isinstance(kind, type) and issubclass(kind, Estimator) and kind is not Estimator):
        return False
    parameters = inspect.signature(kind).parameters.values()
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return all(one.default is not one.empty for one in named)


# ``"score"`` is a name as well, whose baseline depends on the number of particles.
CLASSES: dict[str, type[Estimator]] = {
    snake_case(name): getattr(estimators, name)
    for name in sorted(estimators.__all__, key=snake_case)
    if name != "Score" and _is_complete(getattr(estimators, name))
}


class NamedEstimators(dict[str, Estimator]):
    """One estimator per name, its class with default arguments, made at the first use of the name.

    The state belongs to the owner of this object: for a name in a config this is the configured
    guide, for a name in ``infer={"gradient": ...}`` or ``default=`` it is the ELBO.
    """

    def __missing__(self, name: str) -> Estimator:
        if name not in CLASSES:
            raise ValueError(
                f"Unknown estimator name {name!r}; the names are {estimator_names()}."
            )
        self[name] = CLASSES[name]()
        return self[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each estimator made so far, by name."""
        return {name: estimator.state_dict() for name, estimator in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; raise ``ValueError`` for an unknown name."""
        for name, part in state.items():
            self[name].load_state_dict(part)


class DefaultEstimators(NamedEstimators):
    """The estimators of an ELBO by name, including ``"auto"`` and ``"score"``."""

    def __init__(self) -> None:
        super().__init__(
            pathwise=Pathwise(),
            leave_one_out=Score(LeaveOneOut()),
            moving_average=Score(MovingAverage()),
        )

    def resolve(self, choice: Choice, fn: Any, num_particles: int) -> Estimator:
        """Return the estimator of a choice at a site with distribution ``fn``.

        ``"auto"`` is :class:`~pyro_gumbel.estimators.Pathwise` at reparameterised sites, else
        ``"score"``. The baseline of ``"score"`` depends on the number of particles.
        """
        if choice is None or choice == "auto":
            choice = "pathwise" if fn.has_rsample else "score"
        if choice == "score":
            choice = "leave_one_out" if num_particles > 1 else "moving_average"
        return self[choice] if isinstance(choice, str) else choice


def estimator_names() -> list[str]:
    """Return all names of estimators.

    Example:
        >>> "reinmax" in estimator_names()
        True
    """
    return sorted([*CLASSES, "auto", "score"])


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """Return a hint with the closest name, ignoring case, or an empty string."""
    folded = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""


def check_choice(choice: Any, prefix: str) -> None:
    """Raise an error that starts with ``prefix``, unless ``choice`` is an estimator or a name."""
    if choice is None or isinstance(choice, Estimator):
        return
    if isinstance(choice, str):
        if choice in estimator_names():
            return
        hint = did_you_mean(choice, estimator_names())
        if choice == "relax":
            hint = " Relax needs a network: write Relax(critic)."
        raise ValueError(
            f"{prefix} {choice!r}, an unknown estimator name; the names are {estimator_names()}."
            f"{hint}"
        )
    if isinstance(choice, type) and issubclass(choice, Estimator):
        raise TypeError(
            f"{prefix} the class {choice.__name__}; give an object: {choice.__name__}()."
        )
    raise TypeError(
        f"{prefix} {choice!r}; give an estimator such as ReinMax(), or a name such as 'reinmax'."
    )
