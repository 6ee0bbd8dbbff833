"""One estimator's part in a call of ``gradient_draws``."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from pyro_gumbel.diagnostics._evaluations import EvaluationCounter
from pyro_gumbel.diagnostics._parameters import read_gradients
from pyro_gumbel.diagnostics._recorder import AllDraws, Projections, Recorder, free_name
from pyro_gumbel.diagnostics._replicas import Replica
from pyro_gumbel.diagnostics._state import seed_everything
from pyro_gumbel.diagnostics.sites import site_effects
from pyro_gumbel.estimators import Call

__all__ = ["Drawer", "Plan", "Survey", "price_of", "survey", "timed_step"]

# What the draws that tell sites apart may add to the cost of the others.
_SITE_SHARE = 0.05
_SURVEYED = 5  # gradients, where they are cheap


@dataclass(frozen=True)
class Plan:
    """What all estimators of one call share."""

    call: Call
    leaves: dict[str, Tensor]
    chain_seeds: list[int]
    num_draws: int
    num_warmup: int
    dims: dict[str, list[str]] | None
    project: int | None
    site_draws: int | None

    def recorder(self) -> Recorder:
        """Make what keeps the draws of one estimator."""
        arguments = (self.leaves, len(self.chain_seeds), self.num_draws, self.dims)
        if self.project is None:
            return AllDraws(*arguments)
        return Projections(*arguments, directions=self.project)


@dataclass(frozen=True)
class Survey:
    """What first gradients tell of an estimator: its evaluations of the model, sites, price."""

    evaluations: int
    sites: list[str]
    seconds: float


def survey(
    make: Callable[[Call], Replica], call: Call, seed: int, patience: float = 0.0
) -> Survey:
    """Take two gradients; the second is looked at, for the first may need trial runs.

    A few more are timed where that takes about ``patience`` seconds at most, and the fastest tells
    the price: a single one may have met a pause of the machine.
    """
    seed_everything(seed)
    counter = EvaluationCounter()
    with counter.watch(call.model) as model:
        replica = make(Call(model, call.guide, call.args, call.kwargs))
        replica.step()
        counter.total = 0
        seconds = [timed_step(replica)[1]]
        evaluations = counter.total
        while len(seconds) < _SURVEYED and sum(seconds) < patience:
            seconds.append(timed_step(replica)[1])
    return Survey(evaluations, list(replica.sites), min(seconds))


class Drawer:
    """Draws with one estimator, chain by chain.

    Args:
        plan: What is to be drawn.
        make: Makes an independent copy of the estimator.
        found: What a survey found.
        seed: Seed of what is done besides the chains.
    """

    def __init__(
        self, plan: Plan, make: Callable[[Call], Replica], found: Survey, seed: int
    ) -> None:
        self.plan = plan
        self.make = make
        self.found = found
        self.seed = seed
        self.recorder = plan.recorder()
        shape = (len(plan.chain_seeds), plan.num_draws)
        self.losses, self.seconds = np.zeros(shape), np.zeros(shape)

    def draw_chain(self, chain: int) -> Iterator[int]:
        """Draw one chain, with a copy of the estimator of its own; yield the draws so far."""
        leaves = self.plan.leaves
        seed_everything(self.plan.chain_seeds[chain])
        replica = self.make(self.plan.call)
        for _ in range(self.plan.num_warmup):
            replica.step()
        read_gradients(leaves)  # what earlier steps left
        for draw in range(self.plan.num_draws):
            loss, self.seconds[chain, draw] = timed_step(replica)
            self.recorder.add(chain, draw, read_gradients(leaves))
            self.losses[chain, draw] = float(loss)
            yield draw + 1

    def dataset(self, num_draws: int | None = None) -> xr.Dataset:
        """Put the draws, and what was noted beside them, together.

        Args:
            num_draws: The draws of a single chain that was left early.
        """
        data, coords, attrs = self.recorder.variables()
        coords |= self._coordinates()
        number = self.plan.site_draws
        if number is None:
            number = round(_SITE_SHARE * self.losses.size / (len(self.found.sites) + 1))
        if number:
            replica = self.make(self.plan.call)
            coords |= site_effects(replica, self.plan.leaves, self.found.sites, number, self.seed)
        attrs |= self._attributes(self.seconds[:, :num_draws])
        return xr.Dataset(data, coords, attrs).isel(draw=slice(num_draws))

    def _attributes(self, seconds: np.ndarray) -> dict[str, Any]:
        first = next(iter(self.plan.leaves.values()))
        coarsest = max(
            (leaf.dtype for leaf in self.plan.leaves.values()),
            key=lambda dtype: torch.finfo(dtype).eps,
        )
        return {
            "gradient_of": "loss (negative ELBO), by unconstrained parameters",
            "device": str(first.device),
            "dtype": str(coarsest).removeprefix("torch."),  # what gradients are good to
            **price_of(seconds),
            "evaluations": self.found.evaluations,
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        }

    def _coordinates(self) -> dict[str, Any]:
        # Values have a dimension of their own: a coordinate that only some of the variables have
        # stands in the way of stacking them, which ArviZ does.
        values = {
            free_name(f"{name}.value", self.plan.leaves): (
                [free_name(f"{name}.index", self.plan.leaves)],
                leaf.detach().double().flatten().cpu().clone().numpy(),
            )
            for name, leaf in self.plan.leaves.items()
        }
        return {
            "chain": np.arange(self.losses.shape[0]),
            "draw": np.arange(self.losses.shape[1]),
            "loss": (["chain", "draw"], self.losses),
            "seconds": (["chain", "draw"], self.seconds),
            **values,
        }


def timed_step(replica: Replica) -> tuple[Any, float]:
    """Take one gradient; return the loss and the seconds that it took."""
    start = time.perf_counter()
    loss = replica.step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return loss, time.perf_counter() - start


def price_of(seconds: np.ndarray) -> dict[str, float]:
    """Sum up the seconds of gradients: the median and its standard error."""
    median = np.median(seconds)
    # The median's standard deviation, from the median absolute deviation of normal draws: the
    # machine's pauses count for nothing.
    deviation = 1.4826 * np.median(np.abs(seconds - median))
    error = 1.2533 * deviation / np.sqrt(seconds.size)
    return {"seconds": float(median), "seconds_mcse": float(error)}
