"""Command lines: kinds of numbers, help that tells defaults, a folder to write to."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tell the default of each option that has one; a switch is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def new_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser that is described by the first line, and whose help tells defaults."""
    first = description.partition("\n")[0]
    return argparse.ArgumentParser(description=first, formatter_class=_Help)


def at_least(least: int) -> Callable[[str], int]:
    """Make the type of whole numbers from ``least`` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return number


count = at_least(1)


def natural(text: str) -> int:
    """A whole number that every generator takes as a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^32, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def make_folder(parser: argparse.ArgumentParser, path: Path, option: str = "--out") -> None:
    """Make the folder to write to: if it cannot be used, a long run should not find that out."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        parser.error(f"{option}: nothing can be written to the folder {path} ({error})")
