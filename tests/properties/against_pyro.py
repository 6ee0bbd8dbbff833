"""Hold this package's losses and gradients against Pyro's, on programs that people write.

    python tests/properties/against_pyro.py                        everything; an hour
    python tests/properties/against_pyro.py plate_in_plate "auto*" some programs
    python tests/properties/against_pyro.py --objective "DisARM*" --draws 4

Each row gives the worst error of a loss or gradient in standard errors, and the smallest relative
error of a parameter's gradient that would have been seen.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pyro
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs as a script

from helpers.differences.draws import SIGHT, Difference, Draws, Step, difference
from helpers.differences.objectives import Objective, wanted
from helpers.differences.references import Quantity, reference_step
from helpers.user_programs import PROGRAMS, Program, Setup

TARGET = 0.1  # the relative error that is to be seen
_FEW = 5  # draws that show series with the same random numbers to be equal
_ENOUGH = 20  # draws that a standard error is trusted from
_DOUBT, _CERTAIN = 4.0, 20.0  # standard errors between which more draws decide


@dataclass
class Row:
    """The result of one objective on one program."""

    program: str
    objective: str
    verdict: str  # agrees, DIFFERS, unresolved, refuses, raises, no reference
    seconds: float
    difference: Difference | None = None
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict in ("DIFFERS", "raises")

    def __str__(self) -> str:
        text = f"{self.program:28} {self.objective:28} {self.verdict:12} {self.seconds:6.1f} s"
        if self.difference is None:
            return f"{text}  {self.message}"
        d = self.difference
        return (
            f"{text} {d.draws:5d} draws  sees {100 * d.resolution:5.1f} %  z {d.z:6.1f} at "
            f"{d.worst}: {d.got:.5g} for {d.expected:.5g}"
        )


class NoReference(Exception):
    """Pyro does not run the programs."""


class Comparison:
    """One program; references are drawn once."""

    def __init__(self, program: Program, draws: float = 1.0, target: float = TARGET) -> None:
        self.program = program
        self.most = max(_FEW, int(program.draws * draws))
        self.target = target
        self.setup = program.start()
        self._references: dict[Quantity, Draws] = {}

    def objectives(self) -> list[Objective]:
        return wanted(self.program, self.setup)

    def run(self, objective: Objective) -> Row:
        """Compare one objective."""
        start = time.perf_counter()
        row = Row(self.program.name, objective.name, "raises", 0.0)
        try:
            row.difference = self._difference(objective)
            row.verdict = "agrees" if row.difference.z < SIGHT else "DIFFERS"
            if row.verdict == "agrees" and row.difference.resolution > 4 * self.target:
                row.verdict = "unresolved"
        except NoReference as error:
            row.verdict, row.message = "no reference", str(error).splitlines()[0][:200]
        except Exception as error:  # one program that fails must not end the table
            text = str(error).splitlines() or [""]
            row.message = f"{type(error).__name__}: {text[0][:200]}"
            if self.program.refuses(objective.name):
                row.verdict = "refuses"
        row.seconds = time.perf_counter() - start
        return row

    def _difference(self, objective: Objective) -> Difference:
        """Draw until an error of the target would be seen, and more if there may be one."""
        reference = self._reference(objective.quantity, 1)
        draws = Draws(objective.make, self.program.start(), reference.parameters)
        found = self._look(draws, _FEW, objective)
        if found.resolution < 1e-3:
            return found
        count = _ENOUGH
        while True:
            found = self._look(draws, count, objective)
            doubtful = _DOUBT < found.z < _CERTAIN
            sharp = found.resolution < self.target or found.z > _CERTAIN
            if (sharp and not doubtful) or count >= self.most * (4 if doubtful else 1):
                return found
            count *= 2

    def _look(self, draws: Draws, count: int, objective: Objective) -> Difference:
        draws.upto(count)
        reference = self._reference(objective.quantity, count)
        return difference(draws, reference, gradient=objective.gradient)

    def _reference(self, quantity: Quantity, count: int) -> Draws:
        if quantity not in self._references:

            def make(setup: Setup) -> Step:
                return reference_step(self.program, setup, quantity)

            self._references[quantity] = Draws(make, self.program.start())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pyro's losses may warn
                return self._references[quantity].upto(count)
        except Exception as error:
            raise NoReference(f"Pyro: {type(error).__name__}: {error}") from error


def compare(
    programs: list[str], objectives: list[str], draws: float, target: float
) -> Iterator[Row]:
    """Compare the objectives of the programs whose names match."""
    matching = [name for pattern in programs for name in PROGRAMS if fnmatch(name, pattern)]
    for name in dict.fromkeys(matching):
        comparison = Comparison(PROGRAMS[name], draws, target)
        for objective in comparison.objectives():
            if any(fnmatch(objective.name, pattern) for pattern in objectives):
                yield comparison.run(objective)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", default=["*"], help="names or patterns")
    parser.add_argument("--objective", nargs="*", default=["*"], help="names or patterns")
    parser.add_argument("--draws", type=float, default=1.0, help="multiple of a program's own")
    parser.add_argument("--sees", type=float, default=TARGET, help="relative error to be seen")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(True)
    verdicts: Counter[str] = Counter()
    for row in compare(arguments.programs, arguments.objective, arguments.draws, arguments.sees):
        verdicts[row.verdict] += 1
        print(row, flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return int(verdicts["DIFFERS"] + verdicts["raises"] > 0)


if __name__ == "__main__":
    sys.exit(main())
