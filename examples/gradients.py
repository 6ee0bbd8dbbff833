"""Estimators on a command line: NAME, NAME@TEMPERATURE, NAME:K for K particles, or all three."""

from __future__ import annotations

import argparse
import inspect
import re

from pyro_gumbel import estimators
from pyro_gumbel.estimators import Estimator, LeaveOneOut, MovingAverage, Pathwise, Score
from pyro_gumbel.infer import config_gradient

_CLASSES = {name.lower(): getattr(estimators, name) for name in estimators.__all__}
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
CHOICE = re.compile(rf"(?P<name>[a-z_]+)(@(?P<temperature>{NUMBER}))?(:(?P<particles>\d+))?")


def parse(
    text: str,
    num_particles: int = 1,
    temperature: float | None = None,
    *,
    reparameterized: bool = False,
) -> tuple[Estimator, int]:
    """Read an estimator and its number of particles.

    The estimator is an object even where a name would do, so that a checkpoint can hold its state.

    Args:
        text: For example ``"score:4"`` or ``"reinmax@1.3"``.
        num_particles: What holds where ``text`` has no ``:K``.
        temperature: What holds where ``text`` has no ``@TEMPERATURE`` and the estimator has a
            temperature; without either it has its own default.
        reparameterized: Whether the site is, which decides what ``"auto"`` stands for.

    Raises:
        ValueError: The text has another form, or names no estimator, or gives a temperature to one
            that has none.
    """
    match = CHOICE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no estimator: write NAME, NAME@TEMPERATURE or NAME:K")
    name = match["name"]
    config_gradient(_no_guide, name)  # refuses unknown names, and lists the known ones
    num_particles = int(match["particles"] or num_particles)
    if num_particles < 1:
        raise ValueError(f"{text!r}: the number of particles is at least 1; got {num_particles}")
    kind = _CLASSES.get(name.replace("_", ""))
    has_temperature = kind is not None and "temperature" in inspect.signature(kind).parameters
    if match["temperature"] and not has_temperature:
        raise ValueError(f"{text!r}: {name} has no temperature; write {name!r}")
    if has_temperature and (match["temperature"] or temperature is not None):
        return kind(float(match["temperature"] or temperature)), num_particles
    if name == "auto" and reparameterized:
        return Pathwise(), num_particles
    if name in ("auto", "score"):
        return Score(LeaveOneOut() if num_particles > 1 else MovingAverage()), num_particles
    return kind(), num_particles


def several(text: str) -> list[str]:
    """Read estimators that are separated by commas, as the type of a command line's argument."""
    names = text.split(",")
    try:
        for name in names:
            parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an estimator twice")
    return names


def _no_guide() -> None:
    pass
