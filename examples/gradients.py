"""Parse estimators on a command line: NAME[@TEMPERATURE][:K], with K particles."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterable

from pyro_gumbel import estimators
from pyro_gumbel.estimators import Estimator, LeaveOneOut, MovingAverage, Pathwise, Score
from pyro_gumbel.infer import config_gradient

_CLASSES = {name.lower(): getattr(estimators, name) for name in estimators.__all__}
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
CHOICE = re.compile(rf"(?P<name>[a-z_]+)(@(?P<temperature>{NUMBER}))?(:(?P<particles>\d+))?")

FORM = "NAME[@T][:K]"
HELP = "estimator; at temperature T, with K particles"


def parse(
    text: str,
    num_particles: int = 1,
    temperature: float | None = None,
    *,
    reparameterized: bool = False,
) -> tuple[Estimator, int]:
    """Parse an estimator and its number of particles.

    This returns an object, not a name, so that a checkpoint can hold the estimator's state.

    Args:
        text: For example ``"score:4"`` or ``"reinmax@1.3"``.
        num_particles: Default for a ``text`` without ``:K``.
        temperature: Default for a ``text`` without ``@TEMPERATURE``. If it is None, the
            estimator's own default applies.
        reparameterized: Whether the site is reparameterised, which decides the meaning of
            ``"auto"``.

    Raises:
        ValueError: If the text has another form, the name is unknown, or an estimator without a
            temperature is given one.
    """
    match = CHOICE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"expected an estimator, got {text!r}; write NAME, NAME@TEMPERATURE or NAME:K"
        )
    name = match["name"]
    config_gradient(_no_guide, name)  # raises for unknown names, and lists the known ones
    num_particles = int(match["particles"] or num_particles)
    if num_particles < 1:
        raise ValueError(f"{text!r}: the number of particles must be at least 1")
    kind = _class(name)
    has_temperature = _has_temperature(kind)
    if match["temperature"] and not has_temperature:
        raise ValueError(f"{text!r}: {name} has no temperature; write {name!r}")
    if has_temperature and (match["temperature"] or temperature is not None):
        return kind(float(match["temperature"] or temperature)), num_particles
    if name == "auto" and reparameterized:
        return Pathwise(), num_particles
    if name in ("auto", "score"):
        return Score(LeaveOneOut() if num_particles > 1 else MovingAverage()), num_particles
    return kind(), num_particles


def takes_temperature(text: str) -> bool:
    """Return whether the estimator has a temperature that ``text`` does not set."""
    match = CHOICE.fullmatch(text)
    return not match["temperature"] and _has_temperature(_class(match["name"]))


def one(text: str) -> str:
    """Check an estimator; an argument type."""
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def several(text: str) -> list[str]:
    """Parse estimators separated by commas; an argument type."""
    names = [one(name) for name in text.split(",")]
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} lists an estimator twice")
    return names


def try_all(
    parser: argparse.ArgumentParser, names: Iterable[str], attempt: Callable[[str], object]
) -> None:
    """Attempt each estimator, so that one that cannot work fails before the first run."""
    try:
        for name in names:
            attempt(name)
    except ValueError as error:
        parser.error(str(error))


def _class(name: str) -> type[Estimator] | None:
    return _CLASSES.get(name.replace("_", ""))


def _has_temperature(kind: type[Estimator] | None) -> bool:
    return kind is not None and "temperature" in inspect.signature(kind).parameters


def _no_guide() -> None:
    pass
