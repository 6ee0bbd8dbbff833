"""Draws of the gradient at fixed parameters: what a comparison of estimators rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gumbel.diagnostics._arguments import (
    check_coords,
    check_estimators,
    check_programs,
    integer,
)
from pyro_gumbel.diagnostics._drawing import Drawer, Plan, survey
from pyro_gumbel.diagnostics._parameters import Params, check_complete, find_parameters
from pyro_gumbel.diagnostics._recorder import RESERVED, check_dims
from pyro_gumbel.diagnostics._replicas import Replica, split_choice
from pyro_gumbel.diagnostics._state import preserved, seed_everything, seeds
from pyro_gumbel.estimators import Call

__all__ = ["gradient_draws"]


def gradient_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    estimators: Mapping[str, Any],
    num_draws: int = 1000,
    num_chains: int = 4,
    num_warmup: int = 0,
    num_particles: int = 1,
    vectorize_particles: bool = False,
    params: Params = None,
    project: int | None = None,
    site_draws: int | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> dict[str, xr.Dataset]:
    r"""Draw the gradient of the loss many times at the same parameters, by several estimators.

    A draw is what one call of ``loss_and_grads`` leaves in ``.grad``: an estimate of the gradient
    of the loss, the negative ELBO, with respect to a parameter's *unconstrained* value, which is
    what an optimiser steps. Chains are independent: each has a seed and a copy of the estimator's
    state (of a moving average, say) of its own. All estimators are given the same seeds, so that
    differences between them are less noisy than each of them.

    Nothing is left behind: parameters and their gradients, the estimators' and the baselines'
    state, the parameter store and all random number generators are as they were. Parameters that
    the programs have not made yet are made under ``seed``, and removed.

    Args:
        model: The model.
        guide: The guide.
        *args: Arguments of both.
        estimators: For each label an estimator: what
            :func:`~pyro_gumbel.infer.config_gradient` takes, an ``ELBO`` (with the guide as it
            is), or a pair of the two.
        num_draws: Draws a chain.
        num_chains: Independent chains.
        num_warmup: Draws that each chain leaves out at its start, for a baseline to settle.
        num_particles: Particles of each draw, where the estimator is no ``ELBO``.
        vectorize_particles: Whether these are rows of one run, likewise.
        params: Names of the parameters to record (shell patterns such as ``"encoder*"`` too), or a
            dict of values at which to take the gradient; the dict leaves out what is to stay as it
            is, and all parameters are recorded.
        project: For networks: keep each draw's inner products with this many fixed random
            directions, its norm and its cosine with the mean, and the mean and variance of every
            coordinate, instead of the draws themselves. The memory needed for the coordinates then
            does not grow with the number of draws.
        site_draws: Number of draws that are repeated with the noise of one site renewed, for
            ``compare_gradients(by="site")``; each takes one more gradient a site. By default as
            many as add 5 % to the cost.
        coords: Coordinates of named dimensions.
        dims: For each parameter the names of its dimensions; else ``<name>_dim_0``, ...
        seed: Seed of everything; on a CPU the same seed gives the same draws bit for bit (in
            other ``seconds``).
        progress: Show a progress bar.
        **kwargs: Keyword arguments of model and guide.

    Returns:
        A Dataset for each label with one variable a parameter, of dims ``chain, draw`` and the
        parameter's own (with ``project`` instead ``direction``). Coordinates hold each draw's
        ``loss``, ``grad_norm`` and ``seconds``, and the parameter's unconstrained value,
        flattened, ``<name>.value``; attributes the label, configuration, particles, seed, device,
        the median of ``seconds`` and the ``evaluations`` of the model a draw.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If there is no estimator, no draw, no parameter, or the draws would take more
            than 4 GiB.

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.9))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))
        >>> draws = gradient_draws(
        ...     model, guide, estimators={"reinmax": "reinmax"}, num_draws=50, progress=False
        ... )
        >>> draws["reinmax"]["l"].dims
        ('chain', 'draw')
    """
    check_programs(model, guide)
    check_estimators(estimators)
    check_coords(coords)
    call = Call(model, guide, args, kwargs)
    num_draws = integer("num_draws", num_draws, 1)
    num_chains = integer("num_chains", num_chains, 1)
    num_warmup = integer("num_warmup", num_warmup, 0)
    num_particles = integer("num_particles", num_particles, 1)
    project = None if project is None else integer("project", project, 1)
    site_draws = None if site_draws is None else integer("site_draws", site_draws, 0)
    first, *chain_seeds = seeds(seed, num_chains + 1)
    total = len(estimators) * num_chains * num_draws
    with preserved() as keep, tqdm(total=total, disable=not progress, unit="draw") as bar:
        seed_everything(first)
        leaves = find_parameters(call, keep, params)
        _check_names(leaves)
        check_dims(dims, leaves)
        plan = Plan(call, leaves, chain_seeds, num_draws, num_warmup, dims, project, site_draws)
        makers = {
            label: _maker(choice, num_particles, vectorize_particles)
            for label, choice in estimators.items()
        }
        drawers = {}
        for label, make in makers.items():
            with _named(label):
                drawers[label] = Drawer(plan, make, survey(make, call, first), first)
        for chain in range(num_chains):  # in turns: what slows the machine slows all alike
            for label, drawer in drawers.items():
                bar.set_description(label)
                with _named(label):
                    for _ in drawer.draw_chain(chain):
                        bar.update()
                    check_complete(leaves, params)
        datasets = {}
        for label, drawer in drawers.items():
            with _named(label):
                datasets[label] = drawer.dataset().assign_coords(dict(coords or {}))
            datasets[label].attrs |= {
                "estimator": label,
                "config": repr(estimators[label]),
                "num_particles": _particles(estimators[label], num_particles),
                "seed": int(seed),
            }
    return datasets


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Say which estimator an error was met with."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This was met with estimators[{label!r}].")
        raise


def _maker(
    choice: Any, num_particles: int, vectorize_particles: bool
) -> Callable[[Call], Replica]:
    def make(call: Call) -> Replica:
        return Replica(
            choice, call, num_particles=num_particles, vectorize_particles=vectorize_particles
        )

    return make


def _particles(choice: Any, num_particles: int) -> int:
    elbo = split_choice(choice)[1]
    return num_particles if elbo is None else int(elbo.num_particles)


def _check_names(leaves: dict[str, Tensor]) -> None:
    taken = sorted(set(leaves) & RESERVED)
    if taken:
        raise ValueError(
            f"Parameter {taken[0]!r} has the name of a dimension or a statistic of the draws; "
            f"rename it, or leave it out by params=[...]. Reserved are {sorted(RESERVED)}."
        )
