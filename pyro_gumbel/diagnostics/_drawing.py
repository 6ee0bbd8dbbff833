"""One estimator's part in a call of ``gradient_draws``."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from pyro_gumbel.diagnostics._evaluations import EvaluationCounter
from pyro_gumbel.diagnostics._parameters import read_gradients
from pyro_gumbel.diagnostics._recorder import AllDraws, Projections, Recorder
from pyro_gumbel.diagnostics._replicas import Replica
from pyro_gumbel.diagnostics._state import seed_everything
from pyro_gumbel.diagnostics.sites import site_effects
from pyro_gumbel.estimators import Call

__all__ = ["Drawer", "Plan"]

# What the draws that tell sites apart may add to the cost of the others.
_SITE_SHARE = 0.08


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


class Drawer:
    """Draws with one estimator, chain by chain.

    Args:
        plan: What is to be drawn.
        make: Makes an independent copy of the estimator.
        seed: Seed of what is done besides the chains.
    """

    def __init__(self, plan: Plan, make: Callable[[Call], Replica], seed: int) -> None:
        self.plan = plan
        self.make = make
        self.seed = seed
        seed_everything(seed)
        self.evaluations, self.sites = count_evaluations(make, plan.call)
        self.recorder = plan.recorder()
        shape = (len(plan.chain_seeds), plan.num_draws)
        self.losses, self.seconds = np.empty(shape), np.empty(shape)

    def draw_chain(self, chain: int, bar: Any) -> None:
        """Draw one chain, with a copy of the estimator of its own."""
        leaves = self.plan.leaves
        seed_everything(self.plan.chain_seeds[chain])
        replica = self.make(self.plan.call)
        for _ in range(self.plan.num_warmup):
            replica.step()
        read_gradients(leaves)  # what earlier steps left
        for draw in range(self.plan.num_draws):
            loss, self.seconds[chain, draw] = timed_step(replica, leaves)
            self.recorder.add(chain, draw, read_gradients(leaves))
            self.losses[chain, draw] = float(loss)
            bar.update()

    def dataset(self) -> xr.Dataset:
        """Put the draws, and what was noted beside them, together."""
        data, coords, attrs = self.recorder.variables()
        coords |= self._coordinates()
        number = self.plan.site_draws
        if number is None:
            number = round(_SITE_SHARE * self.losses.size / (len(self.sites) + 1))
        if number:
            replica = self.make(self.plan.call)
            coords |= site_effects(replica, self.plan.leaves, self.sites, number, self.seed)
        return xr.Dataset(data, coords, attrs | self._attributes())

    def _attributes(self) -> dict[str, Any]:
        first = next(iter(self.plan.leaves.values()))
        median = np.median(self.seconds)
        # The median's standard deviation, from the median absolute deviation of normal draws: the
        # machine's pauses count for nothing.
        deviation = 1.4826 * np.median(np.abs(self.seconds - median))
        return {
            "gradient_of": "loss (negative ELBO), by unconstrained parameters",
            "device": str(first.device),
            "dtype": str(first.dtype).removeprefix("torch."),
            "seconds": float(median),
            "seconds_mcse": float(1.2533 * deviation / np.sqrt(self.seconds.size)),
            "evaluations": self.evaluations,
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        }

    def _coordinates(self) -> dict[str, Any]:
        # Values have a dimension of their own: a coordinate that only some of the variables have
        # stands in the way of stacking them, which ArviZ does.
        values = {
            f"{name}.value": (
                [f"{name}.index"],
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
