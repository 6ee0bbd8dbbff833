"""One candidate's trial: its draws, and how good they make it look."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_gumbel.diagnostics._candidates import Candidate
from pyro_gumbel.diagnostics._replicas import Replica
from pyro_gumbel.diagnostics._state import seed_everything
from pyro_gumbel.diagnostics.compare import compare_gradients
from pyro_gumbel.diagnostics.draws import gradient_draws
from pyro_gumbel.estimators import Call
from pyro_gumbel.infer import Estimator_ELBO

__all__ = ["FAILURES", "Trial", "table_of", "time_together"]

_FEWEST = 16
_WARMUP = 5  # until a moving baseline is near the cost
_MOST = 20_000
_PATIENCE = 3.0  # how many times its share of the budget a candidate may take
FAILURES = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)


class Trial:
    """Draws of one candidate.

    Attributes:
        candidate: The candidate.
        draws: Its draws, ``None`` while there are none.
        failure: Why it could not be run.
        warning: What the package warned of while it ran.
        together: Seconds a gradient, where timed in turns with others.
        spent: Seconds of drawing behind ``draws``.
        row: Its row of the comparison.
        bounds: Between which ``error`` lies, two standard errors either way.
        error: The mean squared error after averaging, by which candidates are ranked.
        error_mcse: Its standard error.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.draws: xr.Dataset | None = None
        self.failure = ""
        self.warning = ""
        self.together: float | None = None
        self.spent = 0.0
        self.row: dict[str, Any] = {}
        self.error = math.inf
        self.bounds = (0.0, math.inf)
        self.error_mcse = math.inf

    @property
    def seconds(self) -> float:
        """The price of one draw."""
        return self.together or float(self._drawn().attrs["seconds"])

    @property
    def variance(self) -> float:
        """The variance of one draw."""
        return float(compare_gradients({"": self._drawn()}).variance.iloc[0])

    def _drawn(self) -> xr.Dataset:
        assert self.draws is not None
        return self.draws

    def measure(
        self,
        call: Call,
        seconds: float,
        seed: int,
        options: dict[str, Any],
        most: int = _MOST,
    ) -> xr.Dataset | None:
        """Draw for about as many seconds; a candidate that cannot be run says why."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self._measure(call, seconds, seed, options, most)
        mine = [warning for warning in said if issubclass(warning.category, UserWarning)]
        if mine:
            self.warning = str(mine[0].message)
        return self.draws

    def _measure(
        self, call: Call, seconds: float, seed: int, options: dict[str, Any], most: int
    ) -> None:
        try:
            price = self.seconds if self.draws is not None else self._price(call, seed, options)
            if _FEWEST * price > _PATIENCE * seconds:
                self.failure = f"too slow for the budget: {price:.2g} seconds a gradient"
                return
            number = int(min(max(seconds / max(price, 1e-9), _FEWEST), most))
            self.draws = self._draw(call, number, seed, options)
            self.spent = number * price
        except FAILURES as error:
            self.failure = f"cannot be run: {type(error).__name__}: {str(error).splitlines()[0]}"

    def replica(self, call: Call, options: dict[str, Any]) -> Replica:
        """Make what takes its gradients."""
        return Replica((self.candidate.config, self._elbo(options)), call)

    def _price(self, call: Call, seed: int, options: dict[str, Any]) -> float:
        """Take two gradients, and return the seconds of the second: the first sets up."""
        seed_everything(seed)
        replica = self.replica(call, options)
        replica.step()
        start = time.perf_counter()
        replica.step()
        return time.perf_counter() - start

    def _elbo(self, options: dict[str, Any]) -> Estimator_ELBO:
        return Estimator_ELBO(
            self.candidate.num_particles, vectorize_particles=options["vectorize_particles"]
        )

    def _draw(self, call: Call, number: int, seed: int, options: dict[str, Any]) -> xr.Dataset:
        label = self.candidate.label
        return gradient_draws(
            call.model,
            call.guide,
            *call.args,
            estimators={label: (self.candidate.config, self._elbo(options))},
            num_draws=number,
            num_chains=1,
            num_warmup=_WARMUP,
            params=options["params"],
            project=1,
            site_draws=0,
            seed=seed,
            progress=False,
            **call.kwargs,
        )[label]

    def judge(self, reference: xr.Dataset | None, horizon: float) -> None:
        """Compute the error after ``horizon`` seconds of averaging."""
        table = compare_gradients({"": self._drawn()}, reference)
        row = {str(name): value for name, value in table.iloc[0].items()}
        row["seconds"] = self.seconds
        averaged = row["seconds"] / horizon
        squared = 0.0
        if reference is not None and row["bias_z"] > 2:
            # What noise explains is no bias; neither is a rounding error.
            squared = max(row["mse"] - row["variance"], 0.0)
        bias_mcse = math.sqrt(max(row["mse_mcse"] ** 2 - row["variance_mcse"] ** 2, 0.0))
        bias_mcse = 0.0 if math.isnan(bias_mcse) else bias_mcse
        self.row = row
        noise = row["variance"] * averaged
        noise_mcse = row["variance_mcse"] * averaged
        self.error = squared + noise
        self.error_mcse = math.hypot(bias_mcse, noise_mcse)
        lower = max(squared - 2 * bias_mcse, 0.0) + max(noise - 2 * noise_mcse, 0.0)
        self.bounds = (lower, self.error + 2 * self.error_mcse)


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


def time_together(
    trials: list[Trial], call: Call, options: dict[str, Any], seconds: float
) -> None:
    """Time gradients in turns, so that what else the machine does slows all of them alike."""
    replicas = [trial.replica(call, options) for trial in trials]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they were noted before
        for replica in replicas:
            replica.step()
    end = time.perf_counter() + seconds
    taken: list[list[float]] = [[] for _ in trials]
    while len(taken[0]) < 3 or (time.perf_counter() < end and len(taken[0]) < _MOST):
        for times, replica in zip(taken, replicas, strict=True):
            start = time.perf_counter()
            loss = replica.step()
            float(loss)  # waits for the device
            times.append(time.perf_counter() - start)
    for trial, times in zip(trials, taken, strict=True):
        trial.together = float(np.median(times))
