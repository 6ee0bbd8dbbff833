"""All runs of one step, read site by site: particles first, whether they were rows or runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_gumbel.estimators import Call, Estimator, Site
from pyro_gumbel.estimators.families import (
    is_bit,
    is_categorical,
    is_one_hot,
    one_hot_logits,
    unwrap,
)
from pyro_gumbel.infer.particles import Layout
from pyro_gumbel.infer.run import Run

__all__ = ["LoopPaths", "Paths", "RowPaths", "coupled_sites"]


def coupled_sites(estimators: dict[str, Estimator]) -> list[tuple[str, int]]:
    """List the sites that own branches, each with its number of branches."""
    return [
        (name, chosen.num_values - 1)
        for name, chosen in estimators.items()
        if chosen.num_values > 1
    ]


class Paths(ABC):
    """The paths of all repetitions.

    Attributes:
        estimators: The estimator of each latent site, in program order.
    """

    estimators: dict[str, Estimator]

    @abstractmethod
    def elbo(self) -> Tensor:
        """Average the ELBO over repetitions and over their paths that are draws of the guide."""

    @abstractmethod
    def gather(self, name: str, read: Callable[[Run], Tensor], event_dim: int = 0) -> Tensor:
        """Read a tensor of a site off its main path and its own branches: ``(K, R, ...)``."""

    def site(self, name: str, call: Call) -> Site:
        """Put together what the estimator of ``name`` sees."""
        run = self.any_run(name)
        fn = run.guide[name]["fn"]
        return Site(
            name=name,
            values=self.gather(name, lambda run: run.guide[name]["value"], fn.event_dim),
            cost=self.gather(name, lambda run: run.cost(name)),
            log_prob=self.gather(name, lambda run: run.log_prob[name])[0],
            logits=self._logits(name, fn.event_dim - unwrap(fn).event_dim, unwrap(fn)),
            call=call,
        )

    @abstractmethod
    def any_run(self, name: str) -> Run:
        """Return a run that has the site."""

    def _logits(self, name: str, events: int, fn: object) -> Tensor | None:
        if not (is_one_hot(fn) or is_bit(fn) or is_categorical(fn)):
            return None
        return self.gather(
            name, lambda run: one_hot_logits(unwrap(run.guide[name]["fn"])), events + 1
        )[0]


class RowPaths(Paths):
    """Paths that are rows of one run."""

    def __init__(self, run: Run, layout: Layout) -> None:
        self.run = run
        self.layout = layout
        self.estimators = run.estimators
        _check_static(run, layout)

    def elbo(self) -> Tensor:
        totals = self.run.costs.totals()
        owners = self.layout.owners
        draws = [owner is None or self.estimators[owner].branches_are_draws for owner in owners]
        if all(draws):
            return totals.mean()
        paths = totals.unflatten(0, (len(owners), self.layout.repetitions))
        return torch.stack([path for path, draw in zip(paths, draws, strict=True) if draw]).mean()

    def gather(self, name: str, read: Callable[[Run], Tensor], event_dim: int = 0) -> Tensor:
        split = self.layout.split(read(self.run), event_dim)
        rows = self.layout.paths_of(name)
        return split if len(rows) == split.shape[0] else split[rows]

    def any_run(self, name: str) -> Run:
        return self.run


class LoopPaths(Paths):
    """Paths that are runs: for each repetition the main path's, then the branches'.

    Structure may differ between repetitions: a site is gathered from those that have it.
    """

    def __init__(self, repetitions: list[list[Run]]) -> None:
        self.repetitions = repetitions
        self.estimators = {}
        for main, *_ in repetitions:
            self.estimators.update(main.estimators)

    def elbo(self) -> Tensor:
        means = []
        for main, *branches in self.repetitions:
            draws = [
                main,
                *(run for run in branches if self.estimators[str(run.owner)].branches_are_draws),
            ]
            means.append(torch.cat([run.costs.totals() for run in draws]).mean())
        return torch.stack(means).mean()

    def gather(self, name: str, read: Callable[[Run], Tensor], event_dim: int = 0) -> Tensor:
        repetitions = [
            torch.stack([read(main), *(read(run) for run in branches if run.owner == name)])
            for main, *branches in self.repetitions
            if name in main.estimators
        ]
        shapes = {tuple(block.shape) for block in repetitions}
        if len(shapes) > 1:
            raise ValueError(
                f"At site {name!r}, shapes differ between particles: {sorted(shapes)}. Draw the "
                "same shapes in every run, or use "
                "num_particles=1."
            )
        return torch.stack(repetitions, 1)

    def any_run(self, name: str) -> Run:
        return next(main for main, *_ in self.repetitions if name in main.estimators)


def _check_static(run: Run, layout: Layout) -> None:
    found = coupled_sites(run.estimators)
    if layout.branches and found != list(layout.branches):
        raise ValueError(
            f"The coupled sites of this run, {[name for name, _ in found]}, are not those that "
            "its rows were laid out for, "
            f"{[name for name, _ in layout.branches]}. Programs whose structure varies need "
            "vectorize_particles=False."
        )
