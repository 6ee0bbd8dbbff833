"""Which estimator to use: measured on the problem at hand, within a time that is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import xarray as xr
from tqdm.auto import tqdm

from pyro_gumbel.diagnostics._arguments import check_programs, integer, positive
from pyro_gumbel.diagnostics._candidates import candidates_for, latent_distributions
from pyro_gumbel.diagnostics._parameters import Params, find_parameters
from pyro_gumbel.diagnostics._search import Recommendation, Search
from pyro_gumbel.diagnostics._state import preserved, seed_everything, seeds
from pyro_gumbel.diagnostics._trial import FAILURES, Problem
from pyro_gumbel.diagnostics.exact import sum_states
from pyro_gumbel.estimators import Call, Estimator

__all__ = ["Recommendation", "recommend"]


def recommend(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    budget_seconds: float = 60.0,
    step_seconds: float | None = None,
    candidates: Mapping[str, Estimator] | None = None,
    num_particles: int | None = None,
    vectorize_particles: bool = False,
    params: Params = None,
    max_states: int = 20_000,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Recommendation:
    r"""Measure the estimators that can serve a guide's sites, and recommend one for each.

    Candidates are ranked by the mean squared error of the gradient after ``step_seconds`` of
    averaging their draws (``error`` in the table),

    .. math:: \|\mathrm{bias}\|^2 + \mathrm{tr}\,\Sigma \cdot s / t

    with ``s`` the seconds that one draw takes and ``t`` those of ``step_seconds``, plus its
    own standard error (``error_mcse``), so that none leads that was measured little and was lucky;
    those that cannot see a part of the cost come after the others.

    Training averages noise over steps, but not bias: a longer ``step_seconds`` favours estimators
    without bias, a shorter one those with little noise.
    The reference for the bias is the exact gradient, where the states are few enough to be summed
    in a quarter of the budget, else a long run of the unbiased candidate that is most efficient;
    a bias below what the budget can show counts as none.

    First every candidate serves all sites that it can (at the others stand the defaults), then
    single sites of the best are given to the estimators that came next. Where a moving average is
    ahead by no more than noise, the next without one is recommended: in training the costs that it
    averages move.

    Args:
        model: The model.
        guide: The guide, at parameters where the choice is to hold: the ranking changes as
            training goes on.
        *args: Arguments of both.
        budget_seconds: Time that the measurement may take, about. What has begun is brought to its
            end, and for an answer at least one candidate has to be looked at and drawn from a few
            times: where a gradient takes a good part of the budget, it takes longer.
        step_seconds: Time over which noise is averaged; by default that of a hundred draws of the
            cheapest candidate.
        candidates: Estimators by label; by default every one of the package that needs no network.
        num_particles: The particles of all candidates; by default as many as each needs.
        vectorize_particles: Whether they are rows of one run.
        params: Parameters whose gradient matters, as in :func:`gradient_draws`.
        max_states: States up to which the exact gradient is tried.
        seed: Seed of the measurement.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of both programs.

    Returns:
        The recommendation. Its message says where the answer is within noise, and where the bias
        of what is recommended is visible.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the guide has no latent site, no candidate runs and gives finite gradients,
            or a time is not positive.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> found = recommend(model, guide, budget_seconds=4.0, progress=False)
        >>> found.config
        {'z': Enumerate()}
    """
    check_programs(model, guide)
    budget_seconds = positive("recommend: budget_seconds", budget_seconds)
    if step_seconds is not None:
        step_seconds = positive("recommend: step_seconds", step_seconds)
    if num_particles is not None:
        num_particles = integer("recommend: num_particles", num_particles, 1)
    max_states = integer("recommend: max_states", max_states, 1)
    start = time.perf_counter()
    call = Call(model, guide, args, kwargs)
    with preserved() as keep:
        # Made once, so that every candidate is measured at the same parameters.
        seed_everything(seeds(seed, 1)[0])
        leaves = find_parameters(call, keep, params)
        sites = latent_distributions(call)
        problem = Problem(call, _names(params), leaves, vectorize_particles)
        search = Search(problem, seed, start + budget_seconds, step_seconds)
        search.reference = _exact(call, problem.params, max_states, seed, search.moment(0.25))
        rivals = candidates_for(sites, candidates, num_particles)
        with tqdm(total=4, disable=not progress, unit="round") as bar:
            for name, work in search.rounds(rivals, list(sites)):
                bar.set_description(name)
                work()
                bar.update()
        return search.conclude()


def _names(params: Params) -> Params:
    """Values were set by now."""
    return None if isinstance(params, Mapping) else params


def _exact(
    call: Call, params: Any, max_states: int, seed: int, deadline: float
) -> xr.Dataset | None:
    try:
        gradients, attrs = sum_states(call, params, max_states, seed, deadline)
    except (*FAILURES, TimeoutError):
        return None
    names = {
        name: [f"{name}_dim_{axis}" for axis in range(g.ndim)] for name, g in gradients.items()
    }
    return xr.Dataset({name: (names[name], g) for name, g in gradients.items()}, attrs=attrs)
