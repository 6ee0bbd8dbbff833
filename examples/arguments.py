"""Command-line arguments: types of numbers, help with defaults, and the output folder."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option but switches."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def new_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the first line as its description and defaults in its help."""
    first = description.partition("\n")[0]
    return argparse.ArgumentParser(description=first, formatter_class=_Help)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument type for whole numbers of at least ``least``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return number


count = at_least(1)


def natural(text: str) -> int:
    """Parse a whole number that is a valid seed for every random number generator."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^32, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """Parse a number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def make_folder(parser: argparse.ArgumentParser, path: Path, option: str = "--out") -> None:
    """Create the output folder, and fail before a long run if it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        parser.error(f"{option}: cannot write to the folder {path} ({error})")
