"""The preflight: one run of two programs that finds how their steps are laid out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_gumbel.estimators import Branches, Call, Estimator
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._layout import MAIN, Layout, Path
from pyro_gumbel.infer._run import Run, collect, plate_nesting, run_programs
from pyro_gumbel.infer._sampling import Memory, Sampler, SharedSubsample
from pyro_gumbel.infer._state import preserved_rng
from pyro_gumbel.infer._undo import Undo

__all__ = ["Plan", "Plans", "main_branches", "preflight"]


@dataclass
class Plan:
    """How the steps of two programs are laid out.

    Attributes:
        plate_nesting: Number of dimensions that the programs' plates take, where it is known.
        branches: The branches that are rows of the main path's pass. They are those of the last
            run: a branch that a run turns out to lack or to need costs an evaluation, not the
            answer.
        passes: Number of passes so far that made a gradient.
        checked: The sites whose costs have been found to be as their estimators need them.
        next_check: The number of passes at which all costs are checked again.
        feeding: The sites whose value reaches a later site of the guide through a jump.
    """

    plate_nesting: int | None
    branches: tuple[Path, ...] = ()
    passes: int = 0
    checked: set[tuple[str, type[Estimator]]] = field(default_factory=set)
    next_check: float = float("inf")
    feeding: set[str] = field(default_factory=set)

    def layout(self, *, repetitions: int, vectorized: bool, exact: bool) -> Layout:
        """Lay out the first pass of a step."""
        paths = (MAIN, *self.branches) if vectorized and not exact else (MAIN,)
        return Layout(self.plate_nesting, paths, repetitions if vectorized else 1, vectorized)


class Plans:
    """Plans by what they were made from: programs, options and structure of the arguments.

    Programs are held weakly. A method belongs to its object.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], dict[Hashable, Plan]] = {}
        self._alive: dict[tuple[int, ...], list[Any]] = {}

    def of(self, call: Call) -> dict[Hashable, Plan]:
        """Return the plans of two programs, by options and structure of the arguments."""
        anchors = [*_anchors(call.model), *_anchors(call.guide)]
        key = tuple(id(anchor) for anchor in anchors)
        if key not in self._plans:
            self._plans[key] = {}
            self._alive[key] = [_watch(anchor, lambda _: self._forget(key)) for anchor in anchors]
        return self._plans[key]

    def _forget(self, key: tuple[int, ...]) -> None:
        self._plans.pop(key, None)
        self._alive.pop(key, None)

    def __reduce__(self) -> Any:
        return Plans, ()  # a copy meets programs of its own


def _anchors(program: Callable[..., Any]) -> list[Any]:
    """The objects that a program lives as long as."""
    owner, function = getattr(program, "__self__", None), getattr(program, "__func__", None)
    return [program] if owner is None or function is None else [owner, function]


def _watch(anchor: Any, forget: Callable[[Any], None]) -> Any:
    try:
        return weakref.ref(anchor, forget)
    except TypeError:
        return anchor  # cannot be held weakly


def structure_of(call: Call) -> Hashable:
    """Describe the arguments without their numbers: their types, flags and names."""
    kinds = (
        value if value is None or isinstance(value, (bool, str)) else type(value)
        for value in (*call.args, *call.kwargs.values())
    )
    return len(call.args), *kinds, *call.kwargs


def preflight(
    call: Call,
    choose: Callable[[Message], Estimator],
    layout: Layout,
    *,
    values: dict[str, Tensor] | None = None,
    dependence: Dependence | None = None,
) -> tuple[Run, int]:
    """Run the programs once by exact draws, and leave nothing behind.

    Random number generators, and tensors that the programs write to, are put back.

    Args:
        call: The programs and their arguments.
        choose: Finds the estimator of a site.
        layout: The paths of the run.
        values: Values to give to sites; those that are summed have all of theirs.
        dependence: Follows the values, if given.

    Returns:
        The run, and the number of dimensions that its plates take.
    """
    sampler = Sampler(
        layout,
        choose,
        Memory(),
        exact=True,
        enumerate=values is not None,
        values=values,
        dependence=dependence,
    )
    followed = dependence or nullcontext()
    with preserved_rng(), poutine.block(), torch.enable_grad(), Undo(), followed:
        traces = run_programs(call, sampler, SharedSubsample())
        run = collect(*traces, sampler, analytic_kl=False, full_scores=False)
        run.score_guide()
    return run, max(plate_nesting(trace) for trace in traces)


def main_branches(run: Run) -> tuple[Path, ...]:
    """The branches that are evaluated beside the main path, as rows of its pass.

    Values that are not draws of the guide enter no average: in a pass of their own, the last
    backward pass need not go through them. But sites drawn later can share noise with the main
    path only within its pass.
    """
    last = next(reversed(run.estimators), None)
    return tuple(
        Path(name, value)
        for name, estimator in run.estimators.items()
        if estimator.differentiates_branches
        and (estimator.branches is Branches.SAMPLES or name != last)
        for value in range(1, run.sizes[name])
    )
