"""The search behind a recommendation: trials of candidates within a time that is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import xarray as xr

from pyro_gumbel.diagnostics._candidates import Candidate, swap
from pyro_gumbel.diagnostics._rare import doubt_in
from pyro_gumbel.diagnostics._state import seeds
from pyro_gumbel.diagnostics._trial import Problem, Trial, table_of, time_together
from pyro_gumbel.estimators import Estimator
from pyro_gumbel.infer import Estimator_ELBO

__all__ = ["Recommendation", "Search"]

_FINALISTS = 3
_TIMED = 6
_SCREENING = 0.5  # of the time
_LOOKING = 0.2  # of the time, at most, for prices that are sure
_PATIENCE = 3.0  # how many times its share of the time a mixture may take
_DESPERATE = 4  # draws, where there is no time for more
_NAMED = 3  # of those within noise
_HORIZON = 100  # draws of the cheapest candidate that noise is averaged over, by default


@dataclass(frozen=True)
class Recommendation:
    """A choice of estimators, and what it rests on.

    Attributes:
        config: The estimator of each site, for :func:`~pyro_gumbel.infer.config_gradient`.
        num_particles: The particles that it needs, for ``Estimator_ELBO``.
        table: One row a candidate, best first; those that could not be measured come last, their
            reason in ``warning``.
        within_noise: Whether another candidate could as well be the best.
        message: All that in words.

    Example:
        >>> from pyro_gumbel.diagnostics import recommend
        >>> from pyro_gumbel.infer import config_gradient
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> found = recommend(model, guide, budget_seconds=4.0, progress=False)
        >>> loss = found.elbo().loss(model, config_gradient(guide, found.config))
        >>> config, table = found
        >>> print(found.message)
        Recommended: {'z': Enumerate()} with num_particles=1. ...
    """

    config: dict[str, Estimator]
    num_particles: int
    table: pd.DataFrame
    within_noise: bool
    message: str

    def __iter__(self) -> Iterator[Any]:
        """Unpack into ``config, table``."""
        return iter((self.config, self.table))

    def elbo(self, **kwargs: Any) -> Estimator_ELBO:
        """Make an ELBO with the particles that the configuration needs."""
        return Estimator_ELBO(self.num_particles, **kwargs)

    def __str__(self) -> str:
        columns = ["error", "error_mcse", "relative_bias", "bias_z", "variance", "seconds"]
        failed = self.table[self.table.error.isna()].warning
        reasons = [f"{label}: {reason}" for label, reason in failed.items()]
        return "\n".join([self.message, self.table[columns].to_string(), *reasons])


class Search:
    """The trials so far, the reference, and the time that is left."""

    def __init__(
        self, problem: Problem, seed: int, end: float, step_seconds: float | None
    ) -> None:
        self.problem = problem
        self.seeds = seeds(seed + 1, 4)
        self.end = end
        self.step_seconds = step_seconds
        self.reference: xr.Dataset | None = None
        self.trials: dict[str, Trial] = {}

    def rounds(
        self, rivals: list[Candidate], sites: list[str]
    ) -> list[tuple[str, Callable[[], None]]]:
        """What there is to do, with a name for each part."""
        return [
            (f"{len(rivals)} candidates", lambda: self.screen(rivals)),
            ("reference", self.find_reference),
            ("finalists", lambda: self.mix(sites)),
            ("finalists", self.measure_finalists),
        ]

    def left(self) -> float:
        """The seconds that are left."""
        return max(self.end - time.perf_counter(), 0.0)

    def moment(self, share: float) -> float:
        """The time at which that share of what is left will be over."""
        return time.perf_counter() + share * self.left()

    def enter(self, candidate: Candidate) -> Trial:
        """Take up a candidate."""
        return self.trials.setdefault(candidate.key, Trial(self.problem, candidate))

    def screen(self, rivals: list[Candidate]) -> None:
        """Look at every candidate's price, then measure each a little, the cheapest first.

        Time may run out on the dear ones, for each is given what the fewest draws take. What sums
        all states comes before the others, for nothing can be better where it is affordable.
        """
        patience = _LOOKING * self.left() / len(rivals)
        end = self.moment(_SCREENING)
        for trial in map(self.enter, rivals):
            nothing = all(other.found is None for other in self.trials.values())
            if nothing or time.perf_counter() < end:
                trial.look(self.seeds[0], patience)
            else:
                trial.skip("not tried: the budget was too short")
        priced = sorted(
            (trial for trial in self.trials.values() if trial.found is not None),
            key=lambda trial: (not trial.candidate.exact, trial.seconds),
        )
        end = self.moment(_SCREENING)
        for number, trial in enumerate(priced):
            time_left = max(end - time.perf_counter(), 0.0)
            trial.measure(time_left / (len(priced) - number), time_left, self.seeds[0])
        if all(trial.draws is None for trial in priced):
            for trial in priced[:_FINALISTS]:
                share = self.left() / _FINALISTS
                trial.measure(share, math.inf, self.seeds[0], fewest=_DESPERATE)

    def find_reference(self) -> None:
        """Run the most efficient unbiased candidate for long, where no exact gradient is known."""
        if self.reference is not None:
            return
        honest = [trial for trial in self.running() if trial.candidate.unbiased]
        if honest:
            best = min(honest, key=lambda trial: trial.variance * trial.seconds)
            run = Trial(self.problem, best.candidate)
            run.found = best.found
            if not best.candidate.exact:  # of that all draws are alike
                run.measure(0.4 * self.left(), self.left(), self.seeds[3])
            self.reference = best.draws if run.draws is None else run.draws

    def mix(self, sites: list[str]) -> None:
        """Give single sites of the best candidate to the estimators that came next."""
        if len(sites) < 2:
            return
        for site in sites:
            order = self.order()
            best = order[0].candidate
            others = [trial.candidate for trial in order[1:] if "," not in trial.candidate.label]
            for other in others[:_FINALISTS]:
                mixed = swap(best, site, other)
                if mixed.key not in self.trials and self.left() > 0:
                    share = 0.1 * self.left()
                    self.enter(mixed).measure(share, _PATIENCE * share, self.seeds[1])

    def measure_finalists(self) -> None:
        """Spend what time is left on the best few, and time them side by side."""
        time_together(self.order()[:_TIMED], 0.15 * self.left())
        for number in (2 * _FINALISTS, _FINALISTS):
            finalists = self.order()[:number]
            end = self.moment(0.5 if number > _FINALISTS else 1.0)
            for rank, trial in enumerate(finalists):
                seconds = max(end - time.perf_counter(), 0.0) / (len(finalists) - rank)
                if seconds > 1.5 * trial.spent:
                    trial.measure(seconds, seconds, self.seeds[2])

    def running(self) -> list[Trial]:
        """The trials of candidates that can do it, with finite gradients.

        Raises:
            ValueError: If there is none.
        """
        found = [trial for trial in self.trials.values() if trial.draws is not None]
        if not found:
            reasons = "; ".join(f"{t.candidate.label}: {t.failure}" for t in self.trials.values())
            raise ValueError(f"recommend: no candidate can be measured here. {reasons}")
        return found

    def horizon(self) -> float:
        """The seconds that noise is averaged over."""
        cheapest = min(trial.seconds for trial in self.running())
        return _HORIZON * cheapest if self.step_seconds is None else self.step_seconds

    def order(self) -> list[Trial]:
        """The trials, best first; where errors are equal, what is exact by construction leads."""
        horizon = self.horizon()
        for trial in self.running():
            trial.judge(self.reference, horizon)
        return sorted(
            self.running(),
            key=lambda trial: (trial.error, not trial.candidate.exact, trial.seconds),
        )

    def conclude(self) -> Recommendation:
        """Choose, and say how sure that is."""
        order = self.order()
        # An estimator that cannot see part of the cost may have little error in what it sees.
        # Of the others, one that was measured little has to do with the error that it may have.
        order.sort(key=lambda trial: (trial.blind, trial.error + trial.error_mcse))
        # A moving average is at its best here, where parameters and so costs stay as they are.
        lasting = [trial for trial in order if not trial.candidate.has_history]
        best = next((trial for trial in lasting if _as_good(trial, order[0])), order[0])
        order.sort(key=lambda trial: trial is not best)
        close = [trial.candidate.label for trial in order[1:] if _as_good(trial, best)]
        failed = [trial for trial in self.trials.values() if trial.draws is None]
        config = best.candidate.config
        return Recommendation(
            config,
            best.candidate.num_particles,
            table_of([*order, *failed]),
            bool(close),
            self._message(best, close),
        )

    def _message(self, best: Trial, close: list[str]) -> str:
        candidate = best.candidate
        text = f"Recommended: {candidate.config!r} with num_particles={candidate.num_particles}."
        if self.reference is None:
            text += " No unbiased candidate was measured, so biases are unknown and count as none."
        elif self.reference.attrs.get("estimator") == "exact":
            text += " Biases are against the exact gradient."
        else:
            text += f" Biases are against a long run of {self.reference.attrs['estimator']!r}."
        if best.row.get("bias_z", 0.0) > 5:
            text += (
                f" Its bias is visible: {best.row['relative_bias']:.1%} of the gradient's norm "
                f"(z {best.row['bias_z']:.1f})"
            )
            doubt = doubt_in(best.row["warning"])
            text += f", or its draws are {doubt}." if doubt else "."
        trials = self.trials.values()
        skipped = [trial for trial in trials if trial.draws is None and trial.skipped]
        if skipped:
            text += f" The budget was too short for {len(skipped)} of {len(trials)} candidates."
        if close:
            named = "; ".join(close[:_NAMED])  # labels of mixtures have commas of their own
            more = f" and {len(close) - _NAMED} more" if len(close) > _NAMED else ""
            text += f" Within noise: {named}{more} may be as good."
        return text


def _as_good(trial: Trial, best: Trial) -> bool:
    """Tell whether one may be as good as the best, as far as noise lets one see."""
    return trial is best or (trial.bounds[0] < best.bounds[1] and trial.blind <= best.blind)
