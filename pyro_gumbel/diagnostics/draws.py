"""Draws of the gradient at fixed parameters: what a comparison of estimators rests on."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gumbel.diagnostics._evaluations import EvaluationCounter
from pyro_gumbel.diagnostics._parameters import (
    Params,
    check_complete,
    find_parameters,
    read_gradients,
)
from pyro_gumbel.diagnostics._recorder import RESERVED, AllDraws, Projections, Recorder
from pyro_gumbel.diagnostics._replicas import Replica, split_choice
from pyro_gumbel.diagnostics._state import preserved, seed_everything, seeds
from pyro_gumbel.diagnostics.sites import site_effects
from pyro_gumbel.estimators import Call, Estimator

__all__ = ["gradient_draws"]

# What the draws that tell sites apart may add to the cost of the others.
_SITE_SHARE = 0.08


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
            many as add 8 % to the cost.
        coords: Coordinates of named dimensions.
        dims: For each parameter the names of its dimensions; else ``<name>_dim_0``, ...
        seed: Seed of everything; on a CPU the same seed gives the same draws bit for bit.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of model and guide.

    Returns:
        A Dataset for each label with one variable a parameter, of dims ``chain, draw`` and the
        parameter's own (with ``project`` instead ``direction``). Coordinates hold each draw's
        ``loss`` and ``grad_norm``, and the parameter's unconstrained value, flattened,
        ``<name>.value``; attributes the label, configuration, particles, seed, device, ``seconds``
        a draw (the median) and ``evaluations`` of the model a draw.

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
    call = Call(model, guide, args, kwargs)
    _check_estimators(estimators)
    for name, value, least in (
        ("num_draws", num_draws, 1),
        ("num_chains", num_chains, 1),
        ("num_warmup", num_warmup, 0),
        ("project", project, 1),
        ("site_draws", site_draws, 0),
    ):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
    first, *chain_seeds = seeds(seed, num_chains + 1)
    with (
        preserved() as keep,
        tqdm(
            total=len(estimators) * num_chains * num_draws, disable=not progress, unit="draw"
        ) as bar,
    ):
        seed_everything(first)
        leaves = find_parameters(call, keep, params)
        _check_names(leaves)
        session = _Session(call, leaves, chain_seeds, num_draws, num_warmup, bar)
        session.dims, session.project, session.site_draws = dims, project, site_draws
        datasets = {}
        for label, choice in estimators.items():
            bar.set_description(label)
            make = _maker(choice, call, num_particles, vectorize_particles)
            try:
                dataset = session.draw(make, first)
            except Exception as error:
                error.add_note(f"This was met with estimators[{label!r}].")
                raise
            check_complete(leaves, params)
            dataset.attrs |= {
                "estimator": label,
                "config": repr(choice),
                "num_particles": _particles(choice, num_particles),
                "seed": int(seed),
            }
            datasets[label] = dataset.assign_coords(dict(coords or {}))
    return datasets


@dataclass
class _Session:
    """What all estimators of one call share."""

    call: Call
    leaves: dict[str, Tensor]
    chain_seeds: list[int]
    num_draws: int
    num_warmup: int
    bar: Any
    dims: dict[str, list[str]] | None = None
    project: int | None = None
    site_draws: int | None = None

    def draw(self, make: Callable[[Call], Replica], seed: int) -> xr.Dataset:
        """Draw with one estimator."""
        seed_everything(seed)
        evaluations, sites = count_evaluations(make, self.call)
        recorder = self._recorder()
        shape = (len(self.chain_seeds), self.num_draws)
        losses, seconds = np.empty(shape), np.empty(shape)
        for chain, chain_seed in enumerate(self.chain_seeds):
            seed_everything(chain_seed)
            replica = make(self.call)
            for _ in range(self.num_warmup):
                replica.step()
            read_gradients(self.leaves)  # what earlier steps left
            for draw in range(self.num_draws):
                loss, seconds[chain, draw] = timed_step(replica, self.leaves)
                recorder.add(chain, draw, read_gradients(self.leaves))
                losses[chain, draw] = float(loss)
                self.bar.update()
        data, coords, attrs = recorder.variables()
        coords |= self._fixed(losses)
        number = self.site_draws
        if number is None:
            number = round(_SITE_SHARE * losses.size / (len(sites) + 1))
        if number:
            coords |= site_effects(make(self.call), self.leaves, sites, number, seed)
        device = next(iter(self.leaves.values())).device
        attrs |= {
            "gradient_of": "loss (negative ELBO), by unconstrained parameters",
            "device": str(device),
            "dtype": str(next(iter(self.leaves.values())).dtype).removeprefix("torch."),
            "seconds": float(np.median(seconds)),
            # 1.2533 = sqrt(pi / 2), the median's loss of efficiency against the mean's
            "seconds_mcse": float(1.2533 * seconds.std() / np.sqrt(seconds.size)),
            "evaluations": evaluations,
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        }
        return xr.Dataset(data, coords, attrs)

    def _recorder(self) -> Recorder:
        arguments = (self.leaves, len(self.chain_seeds), self.num_draws, self.dims)
        if self.project is None:
            return AllDraws(*arguments)
        return Projections(*arguments, directions=self.project)

    def _fixed(self, losses: np.ndarray) -> dict[str, Any]:
        # Of a dimension of their own: a coordinate that only some of the variables have stands in
        # the way of stacking them, which ArviZ does.
        values = {
            f"{name}.value": (
                [f"{name}.index"],
                leaf.detach().double().flatten().cpu().clone().numpy(),
            )
            for name, leaf in self.leaves.items()
        }
        return {
            "chain": np.arange(losses.shape[0]),
            "draw": np.arange(losses.shape[1]),
            "loss": (["chain", "draw"], losses),
            **values,
        }


def timed_step(replica: Replica, leaves: dict[str, Tensor]) -> tuple[Any, float]:
    """Take one gradient; return the loss and the seconds that it took."""
    cuda = next(iter(leaves.values())).is_cuda
    start = time.perf_counter()
    loss = replica.step()
    if cuda:
        torch.cuda.synchronize()
    return loss, time.perf_counter() - start


def count_evaluations(make: Callable[[Call], Replica], call: Call) -> tuple[int, list[str]]:
    """Count the model evaluations of one gradient, and list the sites that it met."""
    counter = EvaluationCounter()
    with counter.watch(call.model) as model:
        replica = make(Call(model, call.guide, call.args, call.kwargs))
        replica.step()  # may need a trial run to find the programs' structure
        counter.total = 0
        replica.step()
    return counter.total, list(replica.sites)


def _maker(
    choice: Any, call: Call, num_particles: int, vectorize_particles: bool
) -> Callable[[Call], Replica]:
    def make(call: Call) -> Replica:
        return Replica(
            choice, call, num_particles=num_particles, vectorize_particles=vectorize_particles
        )

    make(call)  # a wrong configuration shows before the first run
    return make


def _particles(choice: Any, num_particles: int) -> int:
    elbo = split_choice(choice)[1]
    return num_particles if elbo is None else int(elbo.num_particles)


def _check_estimators(estimators: Any) -> None:
    if isinstance(estimators, (Estimator, str)) or not isinstance(estimators, Mapping):
        raise TypeError(
            "estimators must be a dict of labels, such as estimators={'reinmax': ReinMax()}; got "
            f"{estimators!r}."
        )
    if not estimators:
        raise ValueError("estimators is empty; write estimators={'reinmax': ReinMax()}.")


def _check_names(leaves: dict[str, Tensor]) -> None:
    taken = sorted(set(leaves) & RESERVED)
    if taken:
        raise ValueError(
            f"Parameter {taken[0]!r} has the name of a dimension or a statistic of the draws; "
            f"rename it, or leave it out by params=[...]. Reserved are {sorted(RESERVED)}."
        )
