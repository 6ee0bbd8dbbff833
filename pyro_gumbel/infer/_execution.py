"""The plan of a step and its execution, which runs the programs on every path."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyro.poutine as poutine
import torch
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_gumbel.estimators import Branches, Call, Estimator
from pyro_gumbel.infer._dependence import Dependence, Mark, check_costs
from pyro_gumbel.infer._operations import Undo
from pyro_gumbel.infer._run import DeeperPlates, Run, collect, plate_nesting, run_programs
from pyro_gumbel.infer._sampling import (
    MAIN,
    Layout,
    Memory,
    NestingNeeded,
    Path,
    Sampler,
    SharedSubsample,
)
from pyro_gumbel.infer._site_view import Passes
from pyro_gumbel.infer._state import generator_states, preserved_rng, set_generator_states

__all__ = ["Execution", "Options", "Plan", "Plans", "preflight", "structure_of"]


@dataclass
class Plan:
    """The layout of the steps of two programs, found by their runs.

    Attributes:
        plate_nesting: The number of dimensions of the programs' plates, if known.
        has_run: Whether a pass has run to its end with this layout.
        branches: The branches that are rows of the main path's pass. They are those of the last
            run: a missing or superfluous branch costs an evaluation and leaves the result right.
        passes: The number of passes with a gradient so far.
        checked: The sites, and types of their estimators, whose costs have been checked.
        scoped: Whether values that share dimensions have been followed.
        next_check: The number of passes at which all costs are checked again.
        feeding: The sites whose value reaches a later site of the guide through a jump.
    """

    plate_nesting: int | None
    has_run: bool = False
    branches: tuple[Path, ...] = ()
    passes: int = 0
    checked: set[tuple[str, type[Estimator]]] = field(default_factory=set)
    scoped: bool = False
    next_check: float = float("inf")
    feeding: set[str] = field(default_factory=set)


class Plans:
    """The plans of a loss by programs, option and structure of the arguments.

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
        return Plans, ()  # a copy plans for its own programs


def _anchors(program: Callable[..., Any]) -> list[Any]:
    """Return the objects that live as long as the program: itself, or a method's object."""
    owner, function = getattr(program, "__self__", None), getattr(program, "__func__", None)
    return [program] if owner is None or function is None else [owner, function]


def _watch(anchor: Any, forget: Callable[[Any], None]) -> Any:
    try:
        return weakref.ref(anchor, forget)
    except TypeError:
        return anchor  # cannot be held weakly


def structure_of(call: Call) -> Hashable:
    """Return the types, flags and names of the arguments, without their numbers."""
    kinds = (
        value if value is None or isinstance(value, (bool, str)) else type(value)
        for value in (*call.args, *call.kwargs.values())
    )
    return len(call.args), *kinds, *call.kwargs


class Split(Protocol):
    """The protocol by which processes share a step."""

    def drawing(self, msg: Message) -> AbstractContextManager[Any]:
        """Return a context in which to draw the value of a site."""

    def share(self, passes: Passes) -> Passes:
        """Return this process's share of the passes of all."""


class Options(NamedTuple):
    """The options of a loss that its execution needs.

    Attributes:
        choose: Returns the estimator of a site.
        num_particles: The number of particles.
        vectorized: Whether particles are rows of a plate.
        max_plate_nesting: The given bound on the number of plates, if any.
        analytic_kl: Whether closed-form KL divergences replace sampled terms.
        full_scores: Whether ``log q`` keeps its whole gradient.
        checks_all: Whether the loss needs the dependence of the cost on every site.
        split: How processes share the step, if they do.
    """

    choose: Callable[[Message], Estimator]
    num_particles: int
    vectorized: bool
    max_plate_nesting: int | None
    analytic_kl: bool
    full_scores: bool
    checks_all: bool
    split: Split | None = None


class Execution:
    """Runs two programs on every path of every particle, with one minibatch for all."""

    def __init__(self, call: Call, plan: Plan, options: Options) -> None:
        self.call = call
        self.plan = plan
        self.options = options
        self._subsample = SharedSubsample()

    def run(self, *, exact: bool = False) -> Passes:
        """Run the passes of a step.

        Args:
            exact: Draw neither coupled nor relaxed values, for a loss without a gradient.

        Raises:
            ValueError: If the programs nest more plates than ``max_plate_nesting``.
        """
        groups = 1 if self.options.vectorized else self.options.num_particles
        while True:
            layout = self._layout(exact)
            attempt = nullcontext() if self.plan.has_run else _attempt()
            try:
                with attempt:
                    passes = Passes([self._run_group(layout, exact) for _ in range(groups)])
                self.plan.has_run = True
                return self.options.split.share(passes) if self.options.split else passes
            except NestingNeeded:
                self.find_layout()
            except DeeperPlates as deeper:
                self._deepen(deeper)

    def find_layout(self) -> None:
        """Find the number of plates if it is unknown, and the branches, by a preflight."""
        nesting, layout = self.plan.plate_nesting, Layout()
        if nesting is not None:  # a program may rely on the particle plate
            layout = Layout(nesting, (MAIN,), self.options.num_particles, True)
        try:
            run, found = preflight(self.call, self.options.choose, layout)
        except DeeperPlates as deeper:
            self._deepen(deeper)
            return
        self.plan.plate_nesting = found if nesting is None else nesting
        self.plan.branches = _main_branches(run)

    def _deepen(self, deeper: DeeperPlates) -> None:
        given = self.options.max_plate_nesting
        if given is not None:
            raise ValueError(
                f"max_plate_nesting is {given}, and the programs' plates take {deeper.nesting} "
                "dimensions or more. Raise it, or omit it."
            ) from deeper
        self.plan.plate_nesting = deeper.nesting

    def _layout(self, exact: bool) -> Layout:
        if not self.options.vectorized:
            return Layout(self.plan.plate_nesting)
        paths = (MAIN,) if exact else (MAIN, *self.plan.branches)
        return Layout(self.plan.plate_nesting, paths, self.options.num_particles, True)

    def _run_group(self, layout: Layout, exact: bool) -> list[Run]:
        """Run the pass with the main path, then the branches that did not fit into it."""
        memory, options = Memory(), self.options
        first = self.plan.passes == 0 and not exact

        def run(paths: tuple[Path, ...], dependence: Dependence | None = None) -> Run:
            here = Layout(layout.plate_nesting, paths, layout.repetitions, layout.vectorized)
            sampler = Sampler(
                here,
                options.choose,
                memory,
                exact=exact,
                dependence=dependence,
                verify=first,
                drawing=options.split.drawing if options.split else nullcontext,
            )
            with dependence or nullcontext():
                traces = run_programs(self.call, sampler, self._subsample)
                run = collect(
                    *traces,
                    sampler,
                    analytic_kl=options.analytic_kl,
                    full_scores=options.full_scores,
                )
                if dependence:
                    run.score_guide()
            return run

        if exact:
            main = run(layout.paths)
            if main.recycles and not self.plan.scoped:
                with torch.inference_mode(False):
                    self._follow(main)  # collecting followed terms checks the scope of values
                self.plan.scoped = True
            return [main]
        dependence = Dependence(restore=False) if first and torch.is_grad_enabled() else None
        main = run(layout.paths, dependence)
        self.plan.scoped |= dependence is not None
        if torch.is_grad_enabled():
            self._check_costs(main, dependence)
        if options.vectorized:
            self.plan.branches = _main_branches(main)
        return [main, *self._run_branches(main, run)]

    def _run_branches(self, main: Run, run: Callable[[tuple[Path, ...]], Run]) -> list[Run]:
        runs: list[Run] = []
        # The last site first: a branch that draws from a flow anew makes it forget the main path's
        # draw, which the branches of later sites score.
        for name, size in reversed(main.sizes.items()):
            estimator = main.estimators[name]
            paths = [Path(name, value) for value in range(1, size)]
            paths = [path for path in paths if path not in main.layout.paths]
            chunk = (estimator.chunk_size or len(paths) or 1) if self.options.vectorized else 1
            starts = range(0, len(paths), chunk)
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and estimator.differentiates_branches
            ):
                runs = [run(tuple(paths[at : at + chunk])) for at in starts] + runs
        return runs

    def _check_costs(self, main: Run, dependence: Dependence | None) -> None:
        """Check once for each site and estimator that the cost is as the estimator needs it.

        The first pass is followed for it. Programs that read numbers into Python are checked again
        after 2, 4, 8, ... passes, since other numbers may change their control flow.
        """
        plan = self.plan
        plan.passes += 1
        sites = {
            (name, type(estimator))
            for name, estimator in main.estimators.items()
            if self.options.checks_all
            or estimator.needs_smooth_cost
            or estimator.branches is Branches.COUNTERFACTUAL
        }
        if sites <= plan.checked and plan.passes < plan.next_check:
            return
        run = main
        if dependence is None or not main.shows_lost_gradients():
            run, dependence = self._follow(main)
        check_costs(run.estimators, run.frames(), run.reached_terms(dependence))
        plan.feeding |= _feeding_through_jumps(run, dependence)
        plan.checked |= sites
        plan.next_check = 2 * plan.passes if dependence.reads_values else float("inf")

    def _follow(self, main: Run) -> tuple[Run, Dependence]:
        """Follow the values of a pass through a separate run, which leaves nothing behind.

        The pass itself shows a lost gradient only for values with a gradient. Others cannot get
        one there, since programs may keep tensors that are computed from them.
        """
        values = {name: main.value(name) for name in main.estimators}
        # Those with a gradient are drawn anew, so that they depend on earlier ones.
        values = {name: x.clone() for name, x in values.items() if not x.requires_grad}
        dependence = Dependence()
        run, _ = preflight(
            self.call, self.options.choose, main.layout, values=values, dependence=dependence
        )
        return run, dependence


@contextmanager
def _attempt() -> Iterator[None]:
    """Restore generators and tensors if a pass ends because its layout was wrong."""
    states = generator_states()
    with Undo() as undo:
        try:
            yield
        except (NestingNeeded, DeeperPlates):
            set_generator_states(states)
            raise
        except Exception:
            undo.keep()
            raise
        undo.keep()


def preflight(
    call: Call,
    choose: Callable[[Message], Estimator],
    layout: Layout | None = None,
    *,
    values: dict[str, Tensor] | None = None,
    dependence: Dependence | None = None,
) -> tuple[Run, int]:
    """Run the programs once by exact draws, and leave nothing behind.

    Random number generators, and tensors that the programs write to, are restored.

    Args:
        call: The programs and their arguments.
        choose: Returns the estimator of a site.
        layout: The paths of the run, by default one without dimensions of ours.
        values: Values of sites, if some are given; enumerated sites then have all their values.
        dependence: Follows the values, if given.

    Returns:
        The run, and the number of dimensions of its plates.
    """
    sampler = Sampler(
        layout or Layout(),
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


def _feeding_through_jumps(run: Run, dependence: Dependence) -> set[str]:
    """Return the sites that a later site of the guide reads without a gradient, as by an index."""
    return {
        name
        for later in run.estimators
        if not run.is_computed(later)
        for name, mark in dependence.marks(run.log_prob(later)).items()
        if name != later and mark is Mark.JUMP
    }


def _main_branches(run: Run) -> tuple[Path, ...]:
    """Return the branches that are evaluated beside the main path, as rows of its pass.

    Branches that are not draws of the guide enter no average. In a pass of their own they need no
    backward pass, but later sites can share noise with the main path only within its pass.
    """
    last = next(reversed(run.estimators), None)
    return tuple(
        Path(name, value)
        for name, estimator in run.estimators.items()
        if estimator.differentiates_branches
        and (estimator.branches is Branches.SAMPLES or name != last)
        for value in range(1, run.sizes[name])
    )
