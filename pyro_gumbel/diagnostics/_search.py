"""The search behind a recommendation: successive halving of candidates within a budget."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_gumbel.diagnostics._state import EvaluationCounter, Params, seeds
from pyro_gumbel.diagnostics.compare import compare_gradients
from pyro_gumbel.diagnostics.draws import gradient_draws
from pyro_gumbel.estimators import Call, Estimator, MovingAverage, Route
from pyro_gumbel.infer import Estimator_ELBO, GradientWarning

__all__ = ["Budget", "Search", "Trial"]

# Why an estimator cannot be run here; of other errors the user has to know at once.
_FAILURES = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)
_LOOKED = 3  # draws that show the cost of a draw: the median of three survives one pause
_WARMUP = 3  # draws until a moving baseline is near the cost
_FEWEST = 8  # draws that a comparison rests on
_BESIDE = 4  # runs that a call of gradient_draws costs beside draws and warm-up
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
    failure: str = ""  # the reason if it has not been drawn
    skipped: bool = False  # the budget was too short to try it
    warning: str = ""
    misses_cost: bool = False  # the warning: an estimator ignores a part of the cost

    @property
    def key(self) -> str:
        """Equal for candidates that do the same."""
        return f"{self.num_particles} {self.config!r}"

    @property
    def exact(self) -> bool:
        """Return whether every site is summed out."""
        return all(estimator.route is Route.ENUMERATE for estimator in self.config.values())

    @property
    def has_history(self) -> bool:
        """Return whether a baseline is an average over the steps before."""
        baselines = [getattr(estimator, "baseline", None) for estimator in self.config.values()]
        return any(isinstance(baseline, MovingAverage) for baseline in baselines)

    @property
    def num_draws(self) -> int:
        """The number of draws."""
        return 0 if self.draws is None else self.draws.sizes["chain"] * self.draws.sizes["draw"]

    def skip(self, reason: str) -> None:
        """Give up for want of budget."""
        self.failure, self.draws, self.skipped = reason, None, True


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
    noted: set[str] = field(default_factory=set)  # warnings of single trials

    def run(self, rivals: list[Trial]) -> Iterator[str]:
        """Search; yield the name of each part before it begins."""
        looked, screened, long, halved, last = seeds(self.seed + 1, 5)
        self.trials = {trial.key: trial for trial in rivals}
        yield f"{len(rivals)} candidates"
        self._look(looked)
        self._screen(screened)
        yield "reference"
        self._find_reference(long)
        yield "halving"
        pool = self.order()
        while len(pool) > _FINALISTS:
            pool = [trial for trial in self.order() if trial in pool][: math.ceil(len(pool) / 2)]
            rounds = math.ceil(math.log2(max(len(pool) / _FINALISTS, 1))) + 2
            self._measure(pool, self.budget.left() / rounds, halved)
        self._mix(rivals, halved)
        yield "finalists"
        self._compare(self.order()[:_FINALISTS], last)

    def _look(self, seed: int) -> None:
        """Measure the cost of a draw of each candidate. Note which candidates fail."""
        left, looked = self.budget.set_aside(0.5 * self.budget.left()), False
        for trial in self.trials.values():
            if looked and not left():
                trial.skip("not tried: the budget was too short")
            else:
                self._take([trial], _LOOKED, seed, num_warmup=0)
                looked = looked or trial.draws is not None

    def _screen(self, seed: int) -> None:
        """Measure each candidate a little; drop the most expensive until that can be paid for.

        Exact sums stay: nothing is better where they are affordable.
        """
        pool = [trial for trial in self.trials.values() if trial.draws is not None]
        pool.sort(key=lambda trial: (not trial.exact, trial.cost))
        while len(pool) > 1 and self._affordable(pool, self.budget.left()) < _FEWEST:
            slow = pool.pop()
            slow.skip(f"too slow for the budget: {slow.cost:.2g} {self.budget.unit} a gradient")
        self._measure(pool, 0.25 * self.budget.left(), seed, least=_FEWEST)

    def _find_reference(self, seed: int) -> None:
        """Run the most efficient unbiased candidate for long, where no exact gradient is known."""
        table = self.table()
        efficient = (table.variance * table.cost).sort_values(kind="stable").index
        unbiased = [
            k for k in efficient if all(e.unbiased for e in self.trials[k].config.values())
        ]
        if self.reference is not None or not unbiased:
            return
        best = self.trials[unbiased[0]]
        long = replace(best)
        if not best.exact:  # else all draws are alike
            self._measure([long], 0.4 * self.budget.left(), seed)
        self.reference = best.draws if long.draws is None else long.draws

    def _mix(self, rivals: list[Trial], seed: int) -> None:
        """Try the runners-up at single sites of the best candidate."""
        sites = list(rivals[0].config)
        for site in sites if len(sites) > 1 else []:
            best, *others = self.order()
            mixtures = []
            for other in [trial for trial in others if trial in rivals][:_FINALISTS]:
                estimator = other.config[site]
                mixture = Trial(
                    f"{best.label}, {site}: {other.label}",
                    {**best.config, site: estimator},
                    max(best.num_particles, estimator.min_particles),
                    cost=best.cost + other.cost,  # a guess
                )
                if mixture.key not in self.trials and self.budget.left():
                    mixtures.append(mixture)
            self._measure(mixtures, 0.3 * self.budget.left(), seed)
            self.trials |= {
                mixture.key: mixture
                for mixture in mixtures
                if mixture.num_draws or mixture.failure
            }

    def _affordable(self, trials: list[Trial], amount: float, num_chains: int = 1) -> int:
        """The number of draws of each, in every chain, that an amount pays for."""
        cost = max(sum(trial.cost for trial in trials), 1e-9)
        return min(int(amount / cost) - _BESIDE, _MOST) // num_chains - _WARMUP

    def _measure(self, trials: list[Trial], amount: float, seed: int, least: int = 0) -> None:
        """Share an amount; each gets its part of what those before it have left."""
        left = self.budget.set_aside(amount)
        for place, trial in enumerate(trials):
            number = max(self._affordable([trial], left() / (len(trials) - place)), least)
            if number >= max(_FEWEST, trial.num_draws + 1):
                self._take([trial], number, seed)

    def _compare(self, finalists: list[Trial], seed: int) -> None:
        """Spend what is left on draws in turns: what slows the machine slows all alike."""
        number = self._affordable(finalists, self.budget.left(), _CHAINS)
        fewer = [trial for trial in finalists if trial.num_draws < number * _CHAINS]
        if fewer and number * _CHAINS >= _FEWEST:
            self._take(fewer, number, seed, num_chains=_CHAINS)

    def _take(self, trials: list[Trial], number: int, seed: int, **options: Any) -> None:
        """Draw from all in turns; note what is warned of, and why it cannot be done."""
        options = {"num_chains": 1, "num_warmup": _WARMUP, "num_draws": number} | options
        elbo = {"vectorize_particles": self.vectorize_particles}
        choices = {t.key: (t.config, Estimator_ELBO(t.num_particles, **elbo)) for t in trials}
        options |= {"estimators": choices, "params": self.params, "seed": seed}
        options |= {"project": 1, "site_draws": 0, "progress": False, **self.call.kwargs}
        call, failure = self.call, ""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                draws = gradient_draws(call.model, call.guide, *call.args, **options)
            except _FAILURES as error:
                reason = next(iter(str(error).splitlines()), "")
                failure = f"cannot be run: {type(error).__name__}: {reason}"
        notes = {str(one.message): one for one in seen if issubclass(one.category, UserWarning)}
        if len(trials) > 1 and (failure or notes.keys() - self.noted):
            for trial in trials:  # which of them is it?
                self._take([trial], number, seed, **options)
            return
        self.noted |= notes.keys()
        if notes and len(trials) == 1:
            missed = [m for m, one in notes.items() if issubclass(one.category, GradientWarning)]
            trials[0].misses_cost |= bool(missed)
            trials[0].warning = (missed or list(notes))[0]
        for trial in trials:
            own = None if failure else draws[trial.key].assign_attrs(estimator=trial.label)
            finite = own is not None and bool(np.isfinite(own.coords["trace"]).all())
            trial.draws = own if finite else None
            trial.cost = trial.cost if own is None else float(own.attrs[self.budget.unit])
            trial.failure = "" if finite else failure or "some gradients are not finite"

    def table(self) -> pd.DataFrame:
        """Compare the trials with finite gradients, by key, best first.

        The error is that of draws averaged over the horizon; ``lower`` and ``upper`` are two
        standard errors away. Where errors are equal, what is exact by construction leads.
        """
        draws = {key: trial.draws for key, trial in self.trials.items() if trial.draws is not None}
        if not draws:
            reasons = "; ".join(f"{t.label}: {t.failure}" for t in self.trials.values())
            raise ValueError(f"recommend: no candidate can be measured here. {reasons}")
        table = compare_gradients(draws, self.reference)
        cost = table[self.budget.unit]
        averaged = cost / (self.horizon or _HORIZON * cost.min())
        noise, noise_mcse = table.variance * averaged, table.variance_mcse * averaged
        # What noise or rounding explains does not count as bias. A reference has none of its own.
        bias = (table.mse - table.variance).clip(lower=0).where(table.bias_z > 2, 0.0)
        bias_mcse = (table.mse_mcse**2 - table.variance_mcse**2).clip(lower=0).fillna(0.0) ** 0.5
        error, mcse = bias + noise, np.hypot(bias_mcse, noise_mcse)
        lower = (bias - 2 * bias_mcse).clip(lower=0) + (noise - 2 * noise_mcse).clip(lower=0)
        table = table.assign(error=error, error_mcse=mcse, lower=lower, upper=error + 2 * mcse)
        table["summed"] = [not self.trials[key].exact for key in table.index]
        table["cost"] = cost
        return table.sort_values(["error", "summed", "cost"], kind="stable")

    def order(self) -> list[Trial]:
        """The trials with finite gradients, best first."""
        return [self.trials[key] for key in self.table().index]
