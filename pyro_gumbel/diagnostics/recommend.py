"""The estimators to use, measured on the problem at hand within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm

from pyro_gumbel._validate import check_programs, integer, positive
from pyro_gumbel.diagnostics._programs import NotListable, run
from pyro_gumbel.diagnostics._search import Budget, Search, Trial
from pyro_gumbel.diagnostics._state import (
    EvaluationCounter,
    Params,
    find_parameters,
    preserved,
    seed_everything,
    seeds,
)
from pyro_gumbel.diagnostics.exact import sum_states
from pyro_gumbel.distributions.families import unwrap
from pyro_gumbel.estimators import Call, Estimator, LeaveOneOut, MovingAverage, Pathwise, Score
from pyro_gumbel.estimators.registry import CLASSES
from pyro_gumbel.infer import Estimator_ELBO

__all__ = ["Recommendation", "recommend"]

_MORE_PARTICLES = {"leave_one_out_2": 2, "leave_one_out_4": 4}
_NAMED = 3  # of those within noise


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


def recommend(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    budget_seconds: float = 60.0,
    budget_evaluations: int | None = None,
    step_seconds: float | None = None,
    step_evaluations: float | None = None,
    candidates: Mapping[str, Estimator] | None = None,
    num_particles: int | None = None,
    vectorize_particles: bool = False,
    params: Params = None,
    max_states: int = 20_000,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Recommendation:
    r"""Measure the estimators that support a guide's sites, and recommend one for each.

    Candidates are ranked by the mean squared error of the gradient after ``step_seconds`` of
    averaging their draws (``error`` in the table),

    .. math:: \|\mathrm{bias}\|^2 + \mathrm{tr}\,\Sigma \cdot s / t

    where ``s`` is the seconds of one draw and ``t`` is ``step_seconds``. The standard error of
    this estimate (``error_mcse``) is added, so that a candidate with few draws does not lead by
    chance. Candidates that miss a part of the cost are ranked last. With ``budget_evaluations``
    the cost of a draw is counted in evaluations of the model. The answer then does not depend on
    the machine.

    Training averages noise over steps, but not bias. A longer ``step_seconds`` favours estimators
    without bias, and a shorter one favours those with little noise. The reference for the bias is
    the exact gradient if a quarter of the budget suffices to sum the states. Otherwise it is a
    long run of the most efficient unbiased candidate. A bias too small to detect counts as zero.

    First each candidate is used at all sites that it supports, with the defaults at the others.
    The better half is measured for longer, again and again, until few are left (successive
    halving). Then the runners-up are tried at single sites of the best candidate. If a moving
    average leads by no more than noise, the best candidate without one is recommended, because the
    costs that it averages change during training.

    Args:
        model: The model.
        guide: The guide, at the parameters for which to choose. The ranking changes during
            training.
        *args: Arguments of both.
        budget_seconds: Approximate time of the measurement. Draws that have begun are completed,
            and at least one candidate gets a few draws.
        budget_evaluations: Evaluations of the model instead of seconds.
        step_seconds: Time over which noise is averaged. The default is the time of a hundred draws
            of the cheapest candidate.
        step_evaluations: The same in evaluations, for ``budget_evaluations``.
        candidates: Estimators by label. The default is all estimators that need no network.
        num_particles: Particles of every candidate. By default each gets as many as it needs.
        vectorize_particles: Whether particles are evaluated in one run.
        params: Parameters whose gradient matters, as in :func:`gradient_draws`.
        max_states: The largest number of states for which the exact gradient is tried.
        seed: Seed of the measurement.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of both programs.

    Returns:
        The recommendation. Its message says if the ranking is within noise, and if the recommended
        estimators have a visible bias.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the guide has no latent site, no candidate runs and gives finite gradients,
            a budget is not positive, or a step is not in the budget's unit.

    Errors of the programs themselves are raised unchanged while their states are summed.

    Example:
        >>> from pyro_gumbel.infer import config_gradient
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> found = recommend(model, guide, budget_evaluations=1000, progress=False)
        >>> found.config
        {'z': Enumerate()}
        >>> loss = found.elbo().loss(model, config_gradient(guide, found.config))
    """
    check_programs(model, guide)
    unit, amount, horizon = _check_budget(
        budget_seconds, budget_evaluations, step_seconds, step_evaluations
    )
    if num_particles is not None:
        num_particles = integer("recommend: num_particles", num_particles, 1)
    max_states = integer("recommend: max_states", max_states, 1)
    counter = EvaluationCounter()
    budget = Budget(unit, amount, counter)
    call = counter.count(Call(model, guide, args, kwargs))
    with preserved() as keep:
        # Made once, so that every candidate is measured at the same parameters.
        seed_everything(seeds(seed, 1)[0])
        find_parameters(call, keep, params)
        names = None if isinstance(params, Mapping) else params  # values were set by now
        with torch.no_grad():
            sites = {name: unwrap(site["fn"]) for name, site in run(call).guide.items()}
        rivals = _candidates(sites, candidates, num_particles)
        exact = _exact(call, names, max_states, seed, budget)
        search = Search(call, names, vectorize_particles, budget, horizon, seed, exact)
        for name in (bar := tqdm(search.run(rivals), disable=not progress, unit="round")):
            bar.set_description(name)
    return _conclude(search)


def _check_budget(
    budget_seconds: Any, budget_evaluations: Any, step_seconds: Any, step_evaluations: Any
) -> tuple[str, float, float | None]:
    """The unit, the budget, and what noise is averaged over."""
    if budget_evaluations is None:
        unit, other, step, wrong = "seconds", "evaluations", step_seconds, step_evaluations
        amount = positive("recommend: budget_seconds", budget_seconds)
    else:
        unit, other, step, wrong = "evaluations", "seconds", step_evaluations, step_seconds
        amount = integer("recommend: budget_evaluations", budget_evaluations, 1)
    if wrong is not None:
        raise ValueError(
            f"recommend: step_{other} needs a budget in {other}; got a budget in {unit}. Write "
            f"step_{unit}=..., or budget_{other}=..."
        )
    return unit, amount, None if step is None else positive(f"recommend: step_{unit}", step)


def _candidates(sites: Mapping[str, Any], given: Any, num_particles: int | None) -> list[Trial]:
    """Make a candidate of each estimator, with defaults at sites that it does not support."""
    if not sites:
        raise ValueError("recommend: the guide has no latent site, so there is nothing to choose.")
    named = _known_estimators() if given is None else given
    if not isinstance(named, Mapping):
        raise TypeError(
            "recommend: candidates must be a dict of labels, such as candidates={'reinmax': "
            f"ReinMax()}}; got {named!r}."
        )
    defaults = {True: Pathwise(), False: Score(MovingAverage())}
    found: dict[str, Trial] = {}
    for label, estimator in named.items():
        if not isinstance(estimator, Estimator):
            raise TypeError(
                f"recommend: candidates[{label!r}] must be an estimator such as ReinMax(); got "
                f"{estimator!r}."
            )
        if not any(estimator.supports(fn) for fn in sites.values()):
            continue
        config = {
            name: estimator if estimator.supports(fn) else defaults[fn.has_rsample]
            for name, fn in sites.items()
        }
        needed = max(choice.min_particles for choice in config.values())
        if num_particles is None or num_particles >= needed:
            more = _MORE_PARTICLES.get(label, 1) if given is None else 1
            trial = Trial(label, config, num_particles or max(needed, more))
            found.setdefault(trial.key, trial)
    if not found:
        raise ValueError(f"recommend: no candidate of {list(named)} supports a site.")
    return list(found.values())


def _known_estimators() -> dict[str, Estimator]:
    return {
        **{name: kind() for name, kind in CLASSES.items()},
        "sticking_the_landing": Pathwise(sticking_the_landing=True),
        "moving_average": Score(MovingAverage()),
        "leave_one_out_2": Score(LeaveOneOut()),
        "leave_one_out_4": Score(LeaveOneOut()),
    }


def _exact(
    call: Call, params: Params, max_states: int, seed: int, budget: Budget
) -> xr.Dataset | None:
    """The exact gradient, unless it needs more than a quarter of the budget."""
    share, deadline = 0.25 * budget.left(), math.inf
    if budget.unit == "seconds":
        deadline = budget.now() + share
    else:
        max_states = min(max_states, int(share))
    try:
        return sum_states(call, params, max_states, seed, deadline=deadline)
    except NotListable:
        return None


def _conclude(search: Search) -> Recommendation:
    """Choose the best candidate, and describe how certain the choice is."""
    table, trials = search.table(), search.trials
    # An estimator that ignores a part of the cost may have a small error in the rest. Few draws
    # leave a large uncertainty, which counts as error.
    table["misses"] = [trials[key].misses_cost for key in table.index]
    table["most"] = table.error + table.error_mcse
    table = table.sort_values(["misses", "most"], kind="stable")

    def as_good(best: str) -> list[str]:
        """List those that may be as good, as far as noise shows."""
        near = (table.lower < table.upper[best]) & (table.misses <= table.misses[best])
        return list(table.index[near | (table.index == best)])

    # A moving average is at its best here, where parameters and so costs stay as they are.
    lasting = [key for key in as_good(table.index[0]) if not trials[key].has_history]
    best = lasting[0] if lasting else table.index[0]
    close = [trials[key].label for key in as_good(best) if key != best]
    failed = [key for key, trial in trials.items() if trial.draws is None]
    rows = {trials[key].label: _row(trials[key], table) for key in (best, *table.index, *failed)}
    shown = pd.DataFrame.from_dict(rows, orient="index").rename_axis("estimator")
    chosen, message = trials[best], _message(search, table, trials[best], close)
    return Recommendation(chosen.config, chosen.num_particles, shown, bool(close), message)


def _row(trial: Trial, table: pd.DataFrame) -> dict[str, Any]:
    """The row of a candidate; of one that failed it is empty but for the reason."""
    row = {"config": repr(trial.config), "particles": trial.num_particles}
    if trial.draws is None:
        return row | {"warning": trial.failure}
    own = {str(name): table[name][trial.key] for name in table.loc[:, :"warning"]}
    notes = [note for note in (own["warning"], trial.warning) if note]
    row |= {name: table[name][trial.key] for name in ("error", "error_mcse")}
    return {**row, "draws": trial.num_draws, **own, "warning": "; ".join(notes)}


def _message(search: Search, table: pd.DataFrame, best: Trial, close: list[str]) -> str:
    text = f"Recommended: {best.config!r} with num_particles={best.num_particles}."
    if search.reference is None:
        text += " No unbiased candidate was measured, so biases are unknown and count as none."
    elif search.reference.attrs["estimator"] == "exact":
        text += " Biases are against the exact gradient."
    else:
        text += f" Biases are against a long run of {search.reference.attrs['estimator']!r}."
    if (z := table.bias_z[best.key]) > 5:
        _, _, doubt = table.warning[best.key].partition("), or ")
        text += (
            f" Its bias is visible: {table.relative_bias[best.key]:.1%} of the gradient's norm "
            f"(z {z:.1f})" + (f", or its draws are {doubt}." if doubt else ".")
        )
    trials = search.trials.values()
    skipped = [trial for trial in trials if trial.draws is None and trial.skipped]
    if skipped:
        text += f" The budget was too short for {len(skipped)} of {len(trials)} candidates."
    if close:
        named = "; ".join(close[:_NAMED])  # labels of mixtures have commas of their own
        more = f" and {len(close) - _NAMED} more" if len(close) > _NAMED else ""
        text += f" Within noise: {named}{more} may be as good."
    return text
