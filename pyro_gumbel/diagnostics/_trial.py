"""One candidate's trial: its draws, and how good they make it look."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

from pyro_gumbel.diagnostics._candidates import Candidate
from pyro_gumbel.diagnostics._drawing import (
    Drawer,
    Plan,
    Survey,
    price_of,
    survey,
    timed_step,
)
from pyro_gumbel.diagnostics._parameters import Params, check_complete
from pyro_gumbel.diagnostics._replicas import Replica
from pyro_gumbel.diagnostics._state import preserved
from pyro_gumbel.diagnostics.compare import compare_gradients
from pyro_gumbel.estimators import Call
from pyro_gumbel.infer import Estimator_ELBO, GradientWarning

__all__ = ["FAILURES", "Problem", "Trial", "table_of", "time_together"]

_FEWEST = 8
_WARMUP = 3  # until a moving baseline is near the cost
_MOST = 20_000
_ROUNDS = 3  # of timing in turns, at least
FAILURES = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class Problem:
    """What all trials of one search share.

    Attributes:
        call: The programs.
        params: What the caller asked to record.
        leaves: The parameters that this came to.
        vectorize_particles: Whether particles are rows of one run.
    """

    call: Call
    params: Params
    leaves: dict[str, Tensor]
    vectorize_particles: bool


class Trial:
    """Draws of one candidate.

    Attributes:
        problem: What it is tried on.
        candidate: The candidate.
        found: What its first gradient told, ``None`` before.
        draws: Its draws, ``None`` while there are none.
        failure: Why there are none, or no more.
        skipped: Whether it was for want of time.
        warning: What was warned of while it ran.
        blind: Whether that was a part of the cost that it cannot see.
        together: Price of a gradient, where timed in turns with others.
        spent: Seconds of drawing behind ``draws``.
        row: Its row of the comparison.
        bounds: Between which ``error`` lies, two standard errors either way.
        error: The mean squared error after averaging.
        error_mcse: Its standard error; candidates are ranked by the sum of the two.
    """

    def __init__(self, problem: Problem, candidate: Candidate) -> None:
        self.problem = problem
        self.candidate = candidate
        self.found: Survey | None = None
        self.draws: xr.Dataset | None = None
        self.failure = ""
        self.skipped = False
        self.warning = ""
        self.blind = False
        self.together: dict[str, float] = {}
        self.spent = 0.0
        self.row: dict[str, Any] = {}
        self.error = math.inf
        self.bounds = (0.0, math.inf)
        self.error_mcse = math.inf
        self._compared: tuple[Any, Any] = (None, None)

    @property
    def seconds(self) -> float:
        """The price of one draw."""
        if self.draws is not None:
            return float(self.draws.attrs["seconds"])
        assert self.found is not None
        return self.found.seconds

    @property
    def variance(self) -> float:
        """The variance of one draw."""
        return float(self.drawn().coords["trace"].sel(block="all"))

    def drawn(self) -> xr.Dataset:
        """Its draws, of which there are some."""
        assert self.draws is not None
        return self.draws

    def replica(self, call: Call) -> Replica:
        """Make what takes its gradients."""
        elbo = Estimator_ELBO(
            self.candidate.num_particles, vectorize_particles=self.problem.vectorize_particles
        )
        return Replica((self.candidate.config, elbo), call)

    def skip(self, reason: str) -> None:
        """Note that there was no time for it."""
        self.failure, self.skipped = reason, True

    def look(self, seed: int, patience: float = 0.0) -> None:
        """Learn the price of a gradient, from more than one while that is a matter of patience."""
        with self._attempt():
            self.found = survey(self.replica, self.problem.call, seed, patience)

    def measure(
        self, seconds: float, limit: float, seed: int, *, fewest: int = _FEWEST
    ) -> xr.Dataset | None:
        """Draw for so many seconds, or for ``limit`` where the fewest draws take longer."""
        end = time.perf_counter() + seconds
        if self.found is None:
            self.look(seed, limit / 10)
        if self.found is None:
            return None
        price = self.seconds
        if (fewest + _WARMUP) * price > limit:
            self.skip(f"too slow for the budget: {price:.2g} seconds a gradient")
            return self.draws
        # The clock decides how many they become; a gradient may turn out cheaper than the first.
        number = int(min(max(3 * seconds / max(price, 1e-9), fewest), _MOST))
        with self._attempt():
            draws = self._draw(number, fewest, end, seed)
            self.spent = draws.sizes["draw"] * price
            self.draws = draws if np.isfinite(draws.coords["trace"]).all() else None
            if self.draws is None:
                self.failure = "some gradients are not finite"
        return self.draws

    def _draw(self, number: int, fewest: int, end: float, seed: int) -> xr.Dataset:
        problem = self.problem
        assert self.found is not None
        plan = Plan(problem.call, problem.leaves, [seed], number, _WARMUP, None, 1, 0)
        drawer = Drawer(plan, self.replica, self.found, seed)
        drawn = 0
        for drawn in drawer.draw_chain(0):
            if drawn >= fewest and time.perf_counter() > end:
                break
        check_complete(problem.leaves, problem.params)
        draws = drawer.dataset(drawn)
        draws.attrs |= {"estimator": self.candidate.label, **self.together}
        return draws

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Leave no trace but draws; note what is warned of, and why it cannot be done."""
        with warnings.catch_warnings(record=True) as said, preserved():
            warnings.simplefilter("always")
            try:
                yield
            except FAILURES as error:
                reason = str(error).splitlines()[0]
                self.failure = f"cannot be run: {type(error).__name__}: {reason}"
        notes = [warning for warning in said if issubclass(warning.category, UserWarning)]
        unseen = [warning for warning in notes if issubclass(warning.category, GradientWarning)]
        if notes:
            self.warning = str((unseen or notes)[0].message)
        self.blind = self.blind or bool(unseen)

    def judge(self, reference: xr.Dataset | None, horizon: float) -> None:
        """Compute the error after ``horizon`` seconds of averaging."""
        row = self._row(reference)
        averaged = row["seconds"] / horizon
        squared = 0.0
        if reference is not None and row["bias_z"] > 2:
            # What noise explains is no bias; neither is a rounding error.
            squared = max(row["mse"] - row["variance"], 0.0)
        bias_mcse = math.sqrt(max(row["mse_mcse"] ** 2 - row["variance_mcse"] ** 2, 0.0))
        bias_mcse = 0.0 if math.isnan(bias_mcse) else bias_mcse
        noise = row["variance"] * averaged
        noise_mcse = row["variance_mcse"] * averaged
        self.error = squared + noise
        self.error_mcse = math.hypot(bias_mcse, noise_mcse)
        lower = max(squared - 2 * bias_mcse, 0.0) + max(noise - 2 * noise_mcse, 0.0)
        self.bounds = (lower, self.error + 2 * self.error_mcse)

    def _row(self, reference: xr.Dataset | None) -> dict[str, Any]:
        """Compare with the reference, unless that was done."""
        draws = self.drawn()
        if self._compared[0] is not draws or self._compared[1] is not reference:
            table = compare_gradients({"": draws}, reference)
            self.row = {str(name): value for name, value in table.iloc[0].items()}
            self._compared = (draws, reference)
        return self.row


def table_of(trials: list[Trial]) -> pd.DataFrame:
    """One row a candidate, in the order given; those that failed are empty but for the reason."""
    rows = {}
    for trial in trials:
        start = {
            "config": repr(trial.candidate.config),
            "particles": trial.candidate.num_particles,
        }
        if trial.draws is None:
            rows[trial.candidate.label] = start | {"warning": trial.failure}
            continue
        start |= {"error": trial.error, "error_mcse": trial.error_mcse}
        start |= {"draws": trial.draws.sizes["chain"] * trial.draws.sizes["draw"]}
        said = "; ".join(note for note in (trial.row["warning"], trial.warning) if note)
        rows[trial.candidate.label] = start | trial.row | {"warning": said}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "estimator"
    return table


def time_together(trials: list[Trial], seconds: float) -> None:
    """Time gradients in turns, so that what else the machine does slows all of them alike.

    Prices stay as they are if there is no time for it.
    """
    if (1 + _ROUNDS) * sum(trial.seconds for trial in trials) > seconds:
        return
    end = time.perf_counter() + seconds
    taken: list[list[float]] = [[] for _ in trials]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they were noted before
        replicas = [trial.replica(trial.problem.call) for trial in trials]
        for replica in replicas:
            replica.step()
        while len(taken[0]) < _ROUNDS or (time.perf_counter() < end and len(taken[0]) < _MOST):
            for times, replica in zip(taken, replicas, strict=True):
                times.append(timed_step(replica)[1])
    for trial, times in zip(trials, taken, strict=True):
        trial.together = price_of(np.array(times))
        trial.draws = trial.drawn().assign_attrs(trial.together)
