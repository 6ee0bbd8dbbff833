"""Candidates for the sites of a guide: which estimators, and how good their draws show them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xarray as xr

from pyro_gumbel.diagnostics.compare import compare_gradients
from pyro_gumbel.estimators import Estimator, LeaveOneOut, MovingAverage, Pathwise, Score
from pyro_gumbel.estimators.registry import CLASSES

__all__ = ["Trial", "candidates_for"]


@dataclass(eq=False)
class Trial:
    """An estimator for each site, and what was found out about them.

    Attributes:
        label: Its name.
        config: The estimator of each site.
        num_particles: The particles that they need.
        cost: Cost of a draw, in the budget's unit.
        overhead: Cost of a call of ``gradient_draws`` beside its draws.
        draws: Its draws, ``None`` while there are none.
        failure: Why there are none.
        skipped: Whether that was for want of budget.
        warning: What was warned of while it ran.
        misses_cost: Whether the warning was that an estimator misses a part of the cost.
        row: Its row of the comparison.
        error: The mean squared error after averaging.
        error_mcse: Its standard error; candidates are ranked by the sum of the two.
        bounds: Between which ``error`` lies, two standard errors either way.
    """

    label: str
    config: dict[str, Estimator]
    num_particles: int
    cost: float = math.nan
    overhead: float = 0.0
    draws: xr.Dataset | None = None
    failure: str = ""
    skipped: bool = False
    warning: str = ""
    misses_cost: bool = False
    row: dict[str, Any] = field(default_factory=dict)
    error: float = math.inf
    error_mcse: float = math.inf
    bounds: tuple[float, float] = (0.0, math.inf)
    _judged: tuple[Any, Any] = (None, None)

    @property
    def key(self) -> str:
        """Equal for candidates that do the same."""
        return f"{self.num_particles} {self.config!r}"

    @property
    def exact(self) -> bool:
        """Whether every site is summed out."""
        return all(estimator.enumerates for estimator in self.config.values())

    @property
    def unbiased(self) -> bool:
        """Whether every estimator claims to be."""
        return all(estimator.unbiased for estimator in self.config.values())

    @property
    def has_history(self) -> bool:
        """Whether a baseline is an average over the steps before."""
        baselines = [getattr(estimator, "baseline", None) for estimator in self.config.values()]
        return any(isinstance(baseline, MovingAverage) for baseline in baselines)

    def affordable(self, budget: float) -> int:
        """The number of draws that a budget pays for."""
        return int(max(budget - self.overhead, 0.0) / max(self.cost, 1e-9))

    def skip(self, reason: str) -> None:
        """Note that the budget did not suffice."""
        self.failure, self.skipped = reason, True

    def swap(self, site: str, other: Trial) -> Trial:
        """Take the estimator of one site from another candidate; the cost is a guess."""
        estimator = other.config[site]
        return Trial(
            f"{self.label}, {site}: {other.label}",
            {**self.config, site: estimator},
            max(self.num_particles, estimator.min_particles),
            cost=self.cost + other.cost,
            overhead=self.overhead + other.overhead,
        )

    def retime(self, attributes: dict[str, float]) -> None:
        """Replace the cost in seconds."""
        assert self.draws is not None
        self.draws = self.draws.assign_attrs(attributes)
        self.cost = attributes["seconds"]

    def judge(self, reference: xr.Dataset | None, unit: str, horizon: float) -> None:
        """Compute the error of draws averaged over a horizon, in the budget's unit."""
        if self._judged[0] is not self.draws or self._judged[1] is not reference:
            table = compare_gradients({self.label: self.draws}, reference)
            self.row = {str(name): value for name, value in table.iloc[0].items()}
            self._judged = (self.draws, reference)
        row = self.row
        squared, bias_mcse = 0.0, 0.0
        if reference is not None:
            bias_mcse = math.sqrt(max(row["mse_mcse"] ** 2 - row["variance_mcse"] ** 2, 0.0))
            if row["bias_z"] > 2:  # what noise or rounding explains does not count as bias
                squared = max(row["mse"] - row["variance"], 0.0)
        averaged = row[unit] / horizon
        noise, noise_mcse = row["variance"] * averaged, row["variance_mcse"] * averaged
        self.error, self.error_mcse = squared + noise, math.hypot(bias_mcse, noise_mcse)
        lower = max(squared - 2 * bias_mcse, 0.0) + max(noise - 2 * noise_mcse, 0.0)
        self.bounds = (lower, self.error + 2 * self.error_mcse)


def candidates_for(
    sites: Mapping[str, Any], estimators: Mapping[str, Any] | None, num_particles: int | None
) -> list[Trial]:
    """Make a candidate of each estimator: it serves the sites that it can, a default the others.

    Raises:
        TypeError: If ``estimators`` is not a dict of estimators.
        ValueError: If none of them can serve any site.
    """
    named = _known_estimators() if estimators is None else _check(estimators)
    found: dict[str, Trial] = {}
    for label, (estimator, particles) in named.items():
        if not any(estimator.supports(fn) for fn in sites.values()):
            continue
        config = {
            name: estimator if estimator.supports(fn) else _default(fn)
            for name, fn in sites.items()
        }
        needed = max(choice.min_particles for choice in config.values())
        if num_particles is None or num_particles >= needed:
            trial = Trial(label, config, num_particles or max(particles, needed))
            found.setdefault(trial.key, trial)
    if not found:
        raise ValueError(f"recommend: no candidate of {list(named)} can serve a site.")
    return list(found.values())


def _known_estimators() -> dict[str, tuple[Estimator, int]]:
    named: dict[str, tuple[Estimator, int]] = {name: (kind(), 1) for name, kind in CLASSES.items()}
    named["sticking_the_landing"] = (Pathwise(sticking_the_landing=True), 1)
    named["moving_average"] = (Score(MovingAverage()), 1)
    named["leave_one_out_2"] = (Score(LeaveOneOut()), 2)
    named["leave_one_out_4"] = (Score(LeaveOneOut()), 4)
    return named


def _check(estimators: Any) -> dict[str, tuple[Estimator, int]]:
    if not isinstance(estimators, Mapping):
        raise TypeError(
            "recommend: candidates must be a dict of labels, such as candidates={'reinmax': "
            f"ReinMax()}}; got {estimators!r}."
        )
    for label, estimator in estimators.items():
        if not isinstance(estimator, Estimator):
            raise TypeError(
                f"recommend: candidates[{label!r}] must be an estimator such as ReinMax(); got "
                f"{estimator!r}."
            )
    return {label: (own, own.min_particles) for label, own in estimators.items()}


def _default(fn: Any) -> Estimator:
    return Pathwise() if fn.has_rsample else Score(MovingAverage())
