"""The search behind a recommendation: successive halving of candidates within a budget."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from pyro_gumbel.diagnostics._state import EvaluationCounter, Params, seeds
from pyro_gumbel.diagnostics.compare import compare_gradients
from pyro_gumbel.diagnostics.draws import gradient_draws
from pyro_gumbel.estimators import Call, Estimator, Route
from pyro_gumbel.infer import Estimator_ELBO, GradientWarning

__all__ = ["FAILURES", "Budget", "Search", "Trial"]

FAILURES = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)

_LOOKED = 3  # draws that show the cost of a draw: the median of three survives one pause
_WARMUP = 3  # draws until a moving baseline is near the cost
_FEWEST = 8  # draws that a comparison rests on
_BESIDE = _WARMUP + 4  # draws that a call of gradient_draws costs beside its own
_MOST = 20_000
_FINALISTS = 3
_CHAINS = 4  # turns of the finalists
_HORIZON = 100  # draws of the cheapest candidate that noise is averaged over, by default


class Budget:
    """A budget, in seconds or in evaluations of the model."""

    def __init__(self, unit: str, amount: float, counter: EvaluationCounter) -> None:
        self.unit = unit  # also the attribute of draws with their cost
        self._counter = counter
        self.left = self.set_aside(amount)

    def now(self) -> float:
        """Return the amount spent, counted from some start."""
        return time.perf_counter() if self.unit == "seconds" else self._counter.total

    def set_aside(self, amount: float) -> Callable[[], float]:
        """Return a function that returns what is left of an amount from now on."""
        end = self.now() + amount
        return lambda: max(end - self.now(), 0.0)


@dataclass(eq=False)
class Trial:
    """A candidate (an estimator for each site) and its measurements."""

    label: str
    config: dict[str, Estimator]
    num_particles: int
    cost: float = math.nan  # of a draw, in the budget's unit
    draws: xr.Dataset | None = None
    row: dict[str, Any] = field(default_factory=dict)  # of the comparison, empty until judged
    failure: str = ""  # the reason if it has not been drawn
    skipped: bool = False  # the budget was too short to try it
    warning: str = ""
    misses_cost: bool = False  # the warning: an estimator ignores a part of the cost
    error: float = math.inf  # mean squared error after averaging
    error_mcse: float = math.inf
    bounds: tuple[float, float] = (0.0, math.inf)  # the error, minus and plus two standard errors

    @property
    def key(self) -> str:
        """Equal for candidates that do the same."""
        return f"{self.num_particles} {self.config!r}"

    @property
    def exact(self) -> bool:
        """Return whether every site is summed out."""
        return all(estimator.route is Route.ENUMERATE for estimator in self.config.values())

    @property
    def num_draws(self) -> int:
        """The number of draws."""
        return 0 if self.draws is None else self.draws.sizes["draw"]

    def drop(self, unit: str) -> None:
        """Give up for want of budget."""
        self.failure = f"too slow for the budget: {self.cost:.2g} {unit} a gradient"
        self.draws, self.skipped = None, True

    def affordable(self, budget: float) -> int:
        """The number of draws that a budget pays for."""
        return min(int(budget / max(self.cost, 1e-9)) - _BESIDE, _MOST)

    def judge(self, reference: xr.Dataset | None, unit: str, horizon: float) -> None:
        """Compute the error of draws averaged over a horizon, in the budget's unit."""
        if not self.row:
            table = compare_gradients({self.label: self.draws}, reference)
            self.row = {str(name): value for name, value in table.iloc[0].items()}
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


@dataclass
class Search:
    """Trials of candidates, the reference for their biases, and the budget."""

    call: Call
    params: Params
    vectorize_particles: bool
    budget: Budget
    horizon: float | None  # that noise is averaged over, in the budget's unit
    seed: int
    reference: xr.Dataset | None  # the exact gradient, where it is known
    trials: dict[str, Trial] = field(default_factory=dict)

    def run(self, rivals: list[Trial]) -> Iterator[str]:
        """Search; yield the name of each part before it begins."""
        self.seeds = seeds(self.seed + 1, 5)
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
        """Measure the cost of a draw of each candidate. Note which candidates fail."""
        left, looked = self.budget.set_aside(0.5 * self.budget.left()), False
        for trial in self.trials.values():
            if looked and not left():
                trial.failure, trial.skipped = "not tried: the budget was too short", True
            else:
                self._take(trial, _LOOKED, self.seeds[0], num_warmup=0)
                looked = looked or trial.draws is not None

    def _screen(self) -> None:
        """Measure each candidate a little, the cheapest first; drop those that cost too much.

        The fewest draws may cost more than a candidate's share, so that expensive ones find the
        budget spent. Exact sums come first: nothing is better where they are affordable.
        """
        looked = [trial for trial in self.trials.values() if trial.draws is not None]
        looked.sort(key=lambda trial: (not trial.exact, trial.cost))
        self._share(looked, 0.5 * self.budget.left(), self.seeds[1], stretch=True)
        measured = [trial for trial in looked if trial.num_draws >= _FEWEST]
        for trial in looked:
            if trial not in (measured or looked[:_FINALISTS]):
                trial.drop(self.budget.unit)

    def _find_reference(self) -> None:
        """Run the most efficient unbiased candidate for long, where no exact gradient is known."""
        candidates = [
            trial
            for trial in self.running()
            if all(estimator.unbiased for estimator in trial.config.values())
        ]
        if self.reference is not None or not candidates:
            return
        best = min(candidates, key=lambda trial: trial.row["variance"] * trial.cost)
        number, long = best.affordable(0.4 * self.budget.left()), replace(best)
        if not best.exact and number >= _FEWEST:  # else all draws are alike
            self._take(long, number, self.seeds[4])
        self.reference = best.draws if long.draws is None else long.draws
        for trial in self.trials.values():
            trial.row = {}

    def _halve(self) -> None:
        """Give the better half of the candidates more draws, over and over, until few are left."""
        pool = self.order()
        while len(pool) > _FINALISTS:
            pool = [trial for trial in self.order() if trial in pool][: math.ceil(len(pool) / 2)]
            rounds = math.ceil(math.log2(max(len(pool) / _FINALISTS, 1))) + 2
            self._share(pool, self.budget.left() / rounds, self.seeds[2])

    def _mix(self, rivals: list[Trial]) -> None:
        """Give single sites of the best candidate to the estimators that came next."""
        sites = list(rivals[0].config)
        for site in sites if len(sites) > 1 else []:
            best, *others = self.order()
            for other in [trial for trial in others if trial in rivals][:_FINALISTS]:
                estimator = other.config[site]
                mixture = Trial(
                    f"{best.label}, {site}: {other.label}",
                    {**best.config, site: estimator},
                    max(best.num_particles, estimator.min_particles),
                    cost=best.cost + other.cost,  # a guess
                )
                if mixture.key not in self.trials and self.budget.left():
                    self.trials[mixture.key] = mixture
                    share = 0.1 * self.budget.left()
                    self._measure(mixture, share, self.seeds[2], limit=3 * share)
                    if not (mixture.num_draws or mixture.failure):
                        mixture.drop(self.budget.unit)

    def _compare_finalists(self) -> None:
        """Spend what is left on the best few.

        A part of a budget in seconds pays for draws in turns, so that other work of the machine
        slows all of them alike.
        """
        finalists = self.order()[:_FINALISTS]
        affordable = 0.2 * self.budget.left() / sum(trial.cost for trial in finalists)
        number = int(affordable - _BESIDE) // _CHAINS
        if self.budget.unit == "seconds" and number > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # they were noted before
                timed = self._gradients(finalists, number, self.seeds[0], num_chains=_CHAINS)
            for trial, draws in zip(finalists, timed, strict=True):
                seconds = {name: draws.attrs[name] for name in ("seconds", "seconds_mcse")}
                assert trial.draws is not None
                trial.draws, trial.row = trial.draws.assign_attrs(seconds), {}
                trial.cost = seconds["seconds"]
        self._share(finalists, self.budget.left(), self.seeds[3])

    def _share(
        self, trials: list[Trial], amount: float, seed: int, *, stretch: bool = False
    ) -> None:
        """Share an amount among trials; each gets its part of what those before it have left.

        With ``stretch`` the fewest draws may take all that is left.
        """
        left = self.budget.set_aside(amount)
        for number, trial in enumerate(trials):
            part = left() / (len(trials) - number)
            self._measure(trial, part, seed, limit=left() if stretch else part)

    def _measure(self, trial: Trial, budget: float, seed: int, limit: float) -> None:
        """Draw as often as a budget allows, or the fewest times where only ``limit`` does."""
        number = trial.affordable(budget)
        if number < _FEWEST <= trial.affordable(limit):
            number = _FEWEST
        if number >= _FEWEST and number > trial.num_draws:
            self._take(trial, number, seed)

    def _take(self, trial: Trial, number: int, seed: int, **options: Any) -> None:
        """Draw; note what is warned of, and why it cannot be done."""
        trial.draws, trial.row = None, {}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                (draws,) = self._gradients([trial], number, seed, **options)
            except FAILURES as error:
                reason = next(iter(str(error).splitlines()), "")
                trial.failure = f"cannot be run: {type(error).__name__}: {reason}"
                return
        notes = [one for one in seen if issubclass(one.category, UserWarning)]
        missed = [one for one in notes if issubclass(one.category, GradientWarning)]
        trial.misses_cost = trial.misses_cost or bool(missed)
        if notes:
            trial.warning = str((missed or notes)[0].message)
        trial.cost = float(draws.attrs[self.budget.unit])
        if np.isfinite(draws.coords["trace"]).all():
            trial.draws = draws
        else:
            trial.failure = "some gradients are not finite"

    def _gradients(
        self, trials: list[Trial], number: int, seed: int, **options: Any
    ) -> list[xr.Dataset]:
        vectorize = {"vectorize_particles": self.vectorize_particles}
        choices = {
            str(place): (trial.config, Estimator_ELBO(trial.num_particles, **vectorize))
            for place, trial in enumerate(trials)
        }
        defaults = {"num_chains": 1, "num_warmup": _WARMUP, "project": 1, "site_draws": 0}
        draws = gradient_draws(
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
        labelled = zip(trials, draws.values(), strict=True)
        return [dataset.assign_attrs(estimator=trial.label) for trial, dataset in labelled]

    def running(self) -> list[Trial]:
        """The trials with finite gradients, judged."""
        found = [trial for trial in self.trials.values() if trial.draws is not None]
        if not found:
            reasons = "; ".join(f"{t.label}: {t.failure}" for t in self.trials.values())
            raise ValueError(f"recommend: no candidate can be measured here. {reasons}")
        horizon = self.horizon or _HORIZON * min(trial.cost for trial in found)
        for trial in found:
            trial.judge(self.reference, self.budget.unit, horizon)
        return found

    def order(self) -> list[Trial]:
        """The trials, best first; where errors are equal, what is exact by construction leads."""
        return sorted(self.running(), key=lambda t: (t.error, not t.exact, t.cost))
