"""Histories of training by several estimators from the same start."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import PyroOptim
from tqdm.auto import tqdm

from pyro_gumbel._validate import check_estimators, check_programs, integer, is_integer
from pyro_gumbel.diagnostics._state import Replica, find_parameters, preserved, seed_everything
from pyro_gumbel.estimators import Call

__all__ = ["train"]

_RECORDED = ("elbo", "grad_norm", "seconds")


def train(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    estimators: Mapping[str, Any],
    optim: PyroOptim | Callable[[], PyroOptim],
    num_steps: int,
    seeds: int | Sequence[int] = 1,
    num_particles: int = 1,
    vectorize_particles: bool = False,
    batches: Callable[[int], tuple[Any, ...]] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> xr.Dataset:
    """Train by several estimators and keep the histories.

    Every run starts from the parameters as they are; parameters that the programs have not made
    yet are made anew under the run's seed, the same for all estimators. Afterwards parameters,
    estimators and generators are as they were, and ``optim`` was not used: each run has a fresh
    one with its settings.

    Args:
        model: The model.
        guide: The guide.
        *args: Arguments of both, at each step.
        estimators: As in :func:`gradient_draws`.
        optim: A Pyro optimiser, whose settings are taken, or a callable that makes one.
        num_steps: Steps of each run.
        seeds: Seeds, or their number.
        num_particles: Particles of each step, where the estimator is not an ``ELBO``.
        vectorize_particles: Whether these are evaluated in one run, likewise.
        batches: A callable from the step's number to the arguments, in place of ``args``.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of both programs.

    Returns:
        A Dataset of dims ``chain`` (a seed each), ``draw`` (a step each) and ``estimator``:
        ``elbo`` (the negative of the loss that the step reported, from hard draws for
        ``Estimator_ELBO``), ``grad_norm`` and ``seconds`` of the step.

    Raises:
        TypeError: If ``optim`` is not an optimiser, ``batches`` does not return a tuple, or an
            argument is of another kind.
        ValueError: If estimators, steps or seeds are missing.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> options = {"optim": pyro.optim.Adam({"lr": 0.1}), "num_steps": 100}
        >>> history = train(model, guide, estimators={"exact": "enumerate"}, **options)
        >>> float(history.elbo[0, -1, 0]) > float(history.elbo[0, 0, 0])
        True
    """
    check_programs(model, guide)
    check_estimators(estimators)
    numbers = _seeds(seeds)
    num_steps = integer("num_steps", num_steps, 1)
    num_particles = integer("num_particles", num_particles, 1)
    shape = (len(numbers), num_steps, len(estimators))
    records = np.empty((*shape, len(_RECORDED)))

    def call(step: int) -> Call:
        return Call(model, guide, args if batches is None else _batch(batches, step), kwargs)

    with tqdm(total=math.prod(shape), disable=not progress, unit="step") as bar:
        for column, (label, choice) in enumerate(estimators.items()):
            bar.set_description(label)
            for chain, seed in enumerate(numbers):
                with preserved() as keep, torch.enable_grad():
                    seed_everything(seed)
                    first = call(0)
                    find_parameters(first, keep)
                    seed_everything(seed)
                    replica = Replica(choice, first, num_particles, vectorize_particles)
                    steps = _steps(replica, _fresh(optim), map(call, range(num_steps)))
                    for step, record in enumerate(steps):
                        records[chain, step, column] = record
                        bar.update()
    dims = ("chain", "draw", "estimator")
    coords = {
        "chain": np.arange(len(numbers)),
        "seed": ("chain", np.array(numbers)),
        "draw": np.arange(1, num_steps + 1),
        "estimator": list(estimators),
    }
    return xr.Dataset(
        {name: (dims, records[..., place]) for place, name in enumerate(_RECORDED)},
        coords,
        {"inference_library": "pyro", "inference_library_version": pyro.__version__},
    )


def _steps(
    replica: Replica, optim: PyroOptim, calls: Iterable[Call]
) -> Iterator[tuple[float, float, float]]:
    """Take steps of ``SVI``; yield what ``_RECORDED`` names of each."""
    norm = 0.0

    def loss_and_grads(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal norm
        with poutine.trace(param_only=True) as capture:
            loss = replica.elbo.loss_and_grads(model, guide, *args, **kwargs)
        # The optimiser moves parameters of estimators, too; the gradient omits them.
        sites = capture.trace.nodes.items()
        leaves = (s["value"].unconstrained() for n, s in sites if not n.startswith("gradient$"))
        norms = [leaf.grad.norm().double().cpu() for leaf in leaves if leaf.grad is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        return loss

    svi = SVI(replica.call.model, replica.guide, optim, replica.elbo.loss, loss_and_grads)
    for call in calls:
        start = time.perf_counter()
        loss = svi.step(*call.args, **call.kwargs)
        seconds = time.perf_counter() - start
        yield -(loss[0] if isinstance(loss, tuple) else loss), norm, seconds


def _fresh(optim: Any) -> PyroOptim:
    """An optimiser with the same settings and no past."""
    if isinstance(optim, PyroOptim):
        own = copy.copy(optim)
        # The last is private: if it moves, a loaded state reaches the copy.
        own.optim_objs, own.grad_clip, own._state_waiting_to_be_consumed = {}, {}, {}
        return own
    wrong = TypeError(
        "optim must be a Pyro optimiser, such as pyro.optim.Adam({'lr': 1e-3}), or a callable "
        f"that makes one; got {optim!r}."
    )
    try:
        made = optim() if callable(optim) else None
    except TypeError as error:  # an optimiser without its settings, such as pyro.optim.Adam
        raise wrong from error
    if not isinstance(made, PyroOptim):
        raise wrong
    return made


def _batch(batches: Any, step: int) -> tuple[Any, ...]:
    found = batches(step) if callable(batches) else batches
    if not callable(batches) or not isinstance(found, (tuple, list)):
        raise TypeError(
            "batches must be a callable from the step's number to a tuple of arguments, such as "
            f"batches=lambda step: (x[step],); got {found!r}."
        )
    return tuple(found)


def _seeds(seeds: Any) -> list[int]:
    given = range(int(seeds)) if is_integer(seeds) else seeds
    if not isinstance(given, Iterable) or not all(map(is_integer, given := list(given))):
        raise TypeError(
            "seeds must be integers, such as seeds=[0, 1, 2], or their number, seeds=3; got "
            f"{seeds!r}."
        )
    if not given:
        raise ValueError("seeds is empty; give seeds=3, or seeds=[0, 1, 2].")
    return [int(seed) for seed in given]
