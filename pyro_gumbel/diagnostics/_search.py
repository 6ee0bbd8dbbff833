"""The search behind a recommendation: successive halving of candidates within a budget."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from pyro_gumbel.diagnostics._state import EvaluationCounter, Params, seeds
from pyro_gumbel.diagnostics.compare import compare_gradients
from pyro_gumbel.diagnostics.draws import gradient_draws
from pyro_gumbel.estimators import Call, Estimator, MovingAverage, Route
from pyro_gumbel.infer import Estimator_ELBO, GradientWarning

__all__ = ["FAILURES", "Budget", "Search", "Trial"]

FAILURES = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)

_LOOKED = 3  # draws that show the cost of a draw: the median of three survives one pause
_WARMUP = 3  # draws until a moving baseline is near the cost
_FEWEST = 8  # draws that a comparison rests on
_DESPERATE = 4  # draws, where the budget is far too small
_MOST = 20_000
_FINALISTS = 3
_CHAINS = 4  # turns of the finalists
_HORIZON = 100  # draws of the cheapest candidate that noise is averaged over, by default


class Budget:
    """A budget, in seconds or in evaluations of the model.

    Attributes:
        unit: ``"seconds"`` or ``"evaluations"``: also the attribute of draws with their cost.
    """

    def __init__(self, unit: str, amount: float, counter: EvaluationCounter) -> None:
        self.unit = unit
        self._counter = counter
        self._end = self.now() + amount

    def now(self) -> float:
        """Return the amount spent, counted from some start."""
        return time.perf_counter() if self.unit == "seconds" else self._counter.total

    def left(self) -> float:
        """Return the amount left."""
        return max(self._end - self.now(), 0.0)

    def share(self, part: float) -> Callable[[], float]:
        """Set a part of what is left aside; return a function that says what is left of it."""
        end = self.now() + part * self.left()
        return lambda: max(end - self.now(), 0.0)


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
        """Return whether every site is summed out."""
        return all(estimator.route is Route.ENUMERATE for estimator in self.config.values())

    @property
    def unbiased(self) -> bool:
        """Return whether every estimator claims to be unbiased."""
        return all(estimator.unbiased for estimator in self.config.values())

    @property
    def has_history(self) -> bool:
        """Return whether a baseline is an average over the steps before."""
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


class Search:
    """Trials of candidates, the reference for their biases, and the budget.

    Args:
        call: The programs.
        params: Names of the parameters to record.
        vectorize_particles: Whether particles are evaluated in one run.
        budget: What may be spent.
        horizon: What noise is averaged over, in the budget's unit; ``None`` for the default.
        seed: Seed of all draws.
    """

    def __init__(
        self,
        call: Call,
        params: Params,
        vectorize_particles: bool,
        budget: Budget,
        horizon: float | None,
        seed: int,
    ) -> None:
        self.call, self.params, self.vectorize_particles = call, params, vectorize_particles
        self.budget, self.horizon = budget, horizon
        self.seeds = seeds(seed + 1, 5)
        self.reference: xr.Dataset | None = None
        self.trials: dict[str, Trial] = {}

    def run(self, rivals: list[Trial]) -> Iterator[str]:
        """Search; yield the name of each part before it begins."""
        self.trials = {trial.key: trial for trial in rivals}
        yield f"{len(rivals)} candidates"
        self._look()
        self._screen()
        yield "reference"
        self._find_reference()
        yield "halving"
        self._halve()
        self._mix(rivals)
        yield "finalists"
        self._compare_finalists()

    def _look(self) -> None:
        """Find the cost of a draw of each candidate, and what cannot be run."""
        left, looked = self.budget.share(0.5), False
        for trial in self.trials.values():
            if looked and not left():
                trial.skip("not tried: the budget was too short")
                continue
            before = self.budget.now()
            draws = self._draw(trial, _LOOKED, self.seeds[0], num_warmup=0)
            if draws is not None:
                looked = True
                trial.cost = float(draws.attrs[self.budget.unit])
                spent = self.budget.now() - before
                trial.overhead = max(spent + (_WARMUP - _LOOKED) * trial.cost, 0.0)

    def _screen(self) -> None:
        """Measure each candidate a little, the cheapest first.

        Expensive ones may find the budget spent, for each is given what the fewest draws cost.
        Exact sums come before the others: nothing can be better where it is affordable.
        """
        looked = [trial for trial in self.trials.values() if not math.isnan(trial.cost)]
        looked.sort(key=lambda trial: (not trial.exact, trial.cost))
        left = self.budget.share(0.5)
        for number, trial in enumerate(looked):
            self._measure(trial, left() / (len(looked) - number), self.seeds[1], limit=left())
        if all(trial.draws is None for trial in looked):
            for trial in looked[:_FINALISTS]:
                self._take(trial, _DESPERATE, self.seeds[1])

    def _find_reference(self) -> None:
        """Run the most efficient unbiased candidate for long, where no exact gradient is known."""
        candidates = [trial for trial in self.running() if trial.unbiased]
        if self.reference is not None or not candidates:
            return
        best = min(candidates, key=lambda trial: trial.row["variance"] * trial.cost)
        number, draws = best.affordable(0.4 * self.budget.left()), None
        if not best.exact and number >= _FEWEST:  # all draws of the exact one are alike
            draws = self._draw(best, min(number, _MOST), self.seeds[4])
        self.reference = best.draws if draws is None else draws

    def _halve(self) -> None:
        """Give the better half of the candidates more draws, over and over, until few are left."""
        pool = self.order()
        while len(pool) > _FINALISTS:
            pool = [trial for trial in self.order() if trial in pool][: math.ceil(len(pool) / 2)]
            rounds = math.ceil(math.log2(max(len(pool) / _FINALISTS, 1))) + 2
            left = self.budget.share(1 / rounds)
            for number, trial in enumerate(pool):
                self._measure(trial, left() / (len(pool) - number), self.seeds[2])

    def _mix(self, rivals: list[Trial]) -> None:
        """Give single sites of the best candidate to the estimators that came next."""
        sites = list(rivals[0].config)
        for site in sites if len(sites) > 1 else []:
            best, *others = self.order()
            for other in [trial for trial in others if trial in rivals][:_FINALISTS]:
                mixture = best.swap(site, other)
                if mixture.key not in self.trials and self.budget.left():
                    self.trials[mixture.key] = mixture
                    share = 0.1 * self.budget.left()
                    self._measure(mixture, share, self.seeds[2], limit=3 * share)

    def _compare_finalists(self) -> None:
        """Spend what is left on the best few.

        A part of it goes to draws in turns: what else the machine does slows all of them alike.
        """
        finalists = self.order()[:_FINALISTS]
        share = 0.2 * self.budget.left() - sum(trial.overhead for trial in finalists)
        number = int(share / (_CHAINS * sum(trial.cost for trial in finalists)))
        if self.budget.unit == "seconds" and number > 1:
            choices = {str(place): self._choice(trial) for place, trial in enumerate(finalists)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # they were noted before
                timed = self._gradients(choices, number, self.seeds[0], num_chains=_CHAINS)
            for trial, draws in zip(finalists, timed.values(), strict=True):
                trial.retime({name: draws.attrs[name] for name in ("seconds", "seconds_mcse")})
        for place, trial in enumerate(finalists):
            self._measure(trial, self.budget.left() / (len(finalists) - place), self.seeds[3])

    def _measure(
        self, trial: Trial, budget: float, seed: int, *, limit: float | None = None
    ) -> None:
        """Draw as often as a budget allows, or the fewest times where only ``limit`` does."""
        number = min(trial.affordable(budget), _MOST)
        if number < _FEWEST <= trial.affordable(budget if limit is None else limit):
            number = _FEWEST
        known = 0 if trial.draws is None else trial.draws.sizes["draw"]
        if number >= _FEWEST and number > known:
            self._take(trial, number, seed)
        elif number < _FEWEST and not known and not trial.failure:
            unit = self.budget.unit
            trial.skip(f"too slow for the budget: {trial.cost:.2g} {unit} a gradient")

    def _take(self, trial: Trial, number: int, seed: int) -> None:
        trial.draws = self._draw(trial, number, seed)
        if trial.draws is not None:
            trial.failure, trial.skipped = "", False
            trial.cost = float(trial.draws.attrs[self.budget.unit])
            if not np.isfinite(trial.draws.coords["trace"]).all():
                trial.draws, trial.failure = None, "some gradients are not finite"

    def _draw(self, trial: Trial, number: int, seed: int, **options: Any) -> xr.Dataset | None:
        """Draw; note what is warned of, and why it cannot be done."""
        choices = {trial.label: self._choice(trial)}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                draws = self._gradients(choices, number, seed, **options)
            except FAILURES as error:
                reason = str(error).splitlines()[0]
                trial.failure = f"cannot be run: {type(error).__name__}: {reason}"
                return None
        notes = [one for one in said if issubclass(one.category, UserWarning)]
        missed = [one for one in notes if issubclass(one.category, GradientWarning)]
        trial.misses_cost = trial.misses_cost or bool(missed)
        if notes:
            trial.warning = str((missed or notes)[0].message)
        return draws[trial.label]

    def _choice(self, trial: Trial) -> tuple[dict[str, Estimator], Estimator_ELBO]:
        elbo = Estimator_ELBO(trial.num_particles, vectorize_particles=self.vectorize_particles)
        return trial.config, elbo

    def _gradients(
        self, choices: dict[str, Any], number: int, seed: int, **options: Any
    ) -> dict[str, xr.Dataset]:
        defaults = {"num_chains": 1, "num_warmup": _WARMUP, "project": 1, "site_draws": 0}
        return gradient_draws(
            self.call.model,
            self.call.guide,
            *self.call.args,
            estimators=choices,
            num_draws=number,
            params=self.params,
            seed=seed,
            progress=False,
            **(defaults | options),
            **self.call.kwargs,
        )

    def running(self) -> list[Trial]:
        """The trials with finite gradients, judged.

        Raises:
            ValueError: If there is none.
        """
        found = [trial for trial in self.trials.values() if trial.draws is not None]
        if not found:
            reasons = "; ".join(f"{t.label}: {t.failure}" for t in self.trials.values())
            raise ValueError(f"recommend: no candidate can be measured here. {reasons}")
        horizon = self.horizon
        if horizon is None:
            horizon = _HORIZON * min(trial.cost for trial in found)
        for trial in found:
            trial.judge(self.reference, self.budget.unit, horizon)
        return found

    def order(self) -> list[Trial]:
        """The trials, best first; where errors are equal, what is exact by construction leads."""
        return sorted(self.running(), key=lambda t: (t.error, not t.exact, t.cost))
