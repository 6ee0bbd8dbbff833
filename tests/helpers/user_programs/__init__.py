"""Programs that people write, one family a file."""

from helpers.user_programs import (
    autoguides,
    families,
    handlers,
    messengers,
    mixtures,
    modules,
    plates,
    structure,
    subclasses,
)
from helpers.user_programs.program import PROGRAMS, Program, Setup

__all__ = [
    "PROGRAMS",
    "Program",
    "Setup",
    "autoguides",
    "families",
    "handlers",
    "messengers",
    "mixtures",
    "modules",
    "plates",
    "structure",
    "subclasses",
]
