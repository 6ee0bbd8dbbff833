"""The common part of every objective over particles: its interface to Pyro and its step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import Message
from pyro.util import warn_if_nan
from torch import Tensor, nn

from pyro_gumbel._validate import is_integer
from pyro_gumbel.estimators import Branches, Call, Estimator, Route
from pyro_gumbel.estimators.registry import CLASSES, Choice, DefaultEstimators, check_choice
from pyro_gumbel.infer._cost_checks import check_costs
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._layout import MAIN, Layout, Path
from pyro_gumbel.infer._options import check_options
from pyro_gumbel.infer._preflight import (
    Plan,
    Plans,
    main_branches,
    preflight,
    structure_of,
)
from pyro_gumbel.infer._run import DeeperPlates, Run, collect, run_programs
from pyro_gumbel.infer._sampling import Memory, NestingNeeded, Sampler, SharedSubsample
from pyro_gumbel.infer._site_view import Passes
from pyro_gumbel.infer._state import advance_schedules, finish_step, sole_step
from pyro_gumbel.infer.config import resolve
from pyro_gumbel.infer.loss_module import LossModule

__all__ = ["Estimate", "ParticleELBO"]


class Estimate(NamedTuple):
    """The estimates of one step.

    Attributes:
        loss: The negative bound, a detached scalar.
        surrogate: A scalar whose gradient is the estimate of the loss's.
        estimators: The estimator of each site.
    """

    loss: Tensor
    surrogate: Tensor
    estimators: dict[str, Estimator]


class ParticleELBO(ELBO):
    """A bound estimated on particles: a subclass says its value and how to differentiate it.

    A step is a straight line: plan (by a preflight run, once for two programs and the structure
    of their arguments), run the programs on every path, estimate the loss and a surrogate for its
    gradient, advance the estimators' schedules.

    Args:
        num_particles: Number of particles.
        default: Estimator, or name of one, for sites that have none.
        vectorize_particles: Evaluate particles as rows of a plate, else one after the other.
        max_plate_nesting: Bound on the number of nested plates; found by the preflight if not
            given.
        **kwargs: As for Pyro's ``ELBO``.

    Raises:
        TypeError: If ``default`` is not an estimator, or an argument is unknown.
        ValueError: If ``num_particles`` is below 1 or ``default`` is not the name of an estimator.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        default: Estimator | str = "auto",
        vectorize_particles: bool = False,
        max_plate_nesting: float = float("inf"),
        **kwargs: Any,
    ) -> None:
        if not is_integer(num_particles) or num_particles < 1:
            raise ValueError(
                f"{type(self).__name__}: num_particles must be an integer of at least 1; got "
                f"{num_particles!r}."
            )
        check_options(type(self), kwargs)
        check_choice(default, f"{type(self).__name__}: default is")
        super().__init__(
            num_particles=int(num_particles), vectorize_particles=vectorize_particles, **kwargs
        )
        self.max_plate_nesting = max_plate_nesting
        self.default: Choice = default
        self.analytic_kl = False
        self.full_scores = False
        self._auto = DefaultEstimators()
        self._plans = Plans()

    def __call__(self, model: nn.Module, guide: nn.Module) -> ELBOModule:
        """Return a module that calls :meth:`differentiable_loss` and holds estimators.

        Those that stand in ``infer`` or come from a callable are found by its first call, like
        parameters that a program makes as it runs: call it once before an optimiser is made.
        """
        return LossModule(model, guide, self)

    def known_estimators(self, guide: Any) -> list[Estimator]:
        """List the estimators that are known before any program has run."""
        messenger = getattr(guide, "gradient_messenger", None)
        estimators = messenger.estimators() if messenger is not None else []
        default = self.default
        if isinstance(default, str) and default in CLASSES:
            default = self._auto.named(default)
        estimators.append(default if isinstance(default, Estimator) else self._auto.moving_average)
        return estimators

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the estimators that names and ``"auto"`` stand for."""
        return self._auto.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state names an estimator that does not exist.
        """
        self._auto.load_state_dict(state)

    @torch.no_grad()
    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Estimate the negative bound; no estimator's state changes."""
        loss = self._exact_loss(Call(model, guide, args, kwargs))
        warn_if_nan(loss, "loss")
        return loss.item()

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Estimate the negative bound by a scalar whose gradient is the estimators'."""
        return self.differentiable(Call(model, guide, args, kwargs), finish=finish_step)[0]

    def differentiable(
        self,
        call: Call,
        *,
        training: bool = True,
        finish: Callable[[dict[str, Estimator]], None] = advance_schedules,
    ) -> tuple[Tensor, dict[str, Estimator]]:
        """Return what :meth:`differentiable_loss` does, and each site's estimator.

        Args:
            call: The programs and their arguments.
            training: Whether to move schedules and baselines. They stay where gradients are off.
            finish: Ends a training step. A module holds the estimators' parameters itself, so that
                they need not be shown in the parameter store.
        """
        estimate = self._step(call, training=training, finish=finish)
        surrogate = estimate.surrogate
        return estimate.loss + (surrogate - surrogate.detach()), estimate.estimators

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Estimate the negative bound and add the estimate of its gradient to ``.grad``.

        Returns:
            The loss, a detached scalar left on its device.
        """
        estimate = self._step(Call(model, guide, args, kwargs))
        if estimate.surrogate.requires_grad:
            estimate.surrogate.backward(retain_graph=self.retain_graph)
        return estimate.loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} runs programs by itself; call loss or loss_and_grads."
        )

    @abstractmethod
    def _value(self, passes: Passes) -> Tensor:
        """Estimate the bound from exact draws."""

    @abstractmethod
    def _estimate(self, passes: Passes, call: Call) -> tuple[Tensor, Tensor]:
        """Estimate the bound, and give a surrogate with the gradient's estimate."""

    def find_estimators(self, call: Call) -> dict[str, Estimator]:
        """Find each site's estimator by a preflight."""
        with sole_step():
            return preflight(call, self._choose, Layout())[0].estimators

    def _step(
        self,
        call: Call,
        *,
        training: bool = True,
        finish: Callable[[dict[str, Estimator]], None] = finish_step,
    ) -> Estimate:
        if torch.is_grad_enabled():
            estimate = self.estimate(call, training=training)
            if training:
                finish(estimate.estimators)
        else:  # there is nothing to differentiate
            loss = self._exact_loss(call)
            estimate = Estimate(loss, loss, {})
        if is_validation_enabled():
            warn_if_nan(estimate.loss, "loss")
        return estimate

    def estimate(self, call: Call, *, training: bool = True) -> Estimate:
        """Estimate the loss and its gradient.

        Baselines move on if ``training``; schedules are advanced by :func:`finish_step`.
        """
        with sole_step():
            plan = self.plan(call)
            subsample = SharedSubsample()
            passes = self._execute(call, plan, subsample)
            passes.training = training
            value, surrogate = self._estimate(passes, call)
            if any(estimator.relaxed for estimator in passes.estimators.values()):
                with torch.no_grad():
                    value = self._value(self._execute(call, plan, subsample, exact=True))
        return Estimate(-value.detach(), -surrogate, passes.estimators)

    def _exact_loss(self, call: Call) -> Tensor:
        with sole_step(), torch.no_grad():
            plan = self.plan(call)
            return -self._value(self._execute(call, plan, SharedSubsample(), exact=True))

    def plan(self, call: Call) -> Plan:
        """Return the plan of a step.

        Programs that were not met before run once for it where values get dimensions left of
        the programs' own plates, whose number is not given.
        """
        plans = self._plans.of(call)
        key = (self.max_plate_nesting, structure_of(call))
        if key not in plans:
            given = self.max_plate_nesting != float("inf")
            plans[key] = Plan(int(self.max_plate_nesting) if given else None)
            if given and self.vectorize_particles and self._couples(call.guide):
                self._preflight(
                    call,
                    plans[key],
                    Layout(plans[key].plate_nesting, (MAIN,), self.num_particles, True),
                )
        if plans[key].plate_nesting is None and self._adds_dimensions(call.guide):
            self._find_nesting(call, plans[key])
        return plans[key]

    def _adds_dimensions(self, guide: Any) -> bool:
        """Return whether values are known to get dimensions left of the plates."""
        routes = [estimator.route for estimator in self.known_estimators(guide)]
        return self.vectorize_particles or Route.ENUMERATE in routes

    def _couples(self, guide: Any) -> bool:
        """Return whether a site is known to draw several values."""
        return any(
            estimator.num_values > 1 or type(estimator).block_size is not Estimator.block_size
            for estimator in self.known_estimators(guide)
        )

    def _find_nesting(self, call: Call, plan: Plan) -> None:
        plan.plate_nesting = self._preflight(call, plan, Layout())

    def _preflight(self, call: Call, plan: Plan, layout: Layout) -> int:
        try:
            run, nesting = preflight(call, self._choose, layout)
        except DeeperPlates as deeper:
            self._allow_nesting(deeper)
            raise
        plan.branches = main_branches(run)
        return nesting

    def _allow_nesting(self, deeper: DeeperPlates) -> None:
        if self.max_plate_nesting != float("inf"):
            raise ValueError(
                f"{type(self).__name__}: max_plate_nesting is {self.max_plate_nesting}, and the "
                f"programs' plates take {deeper.nesting} dimensions or more. Raise it, or leave "
                "it out."
            ) from deeper

    def _choose(self, msg: Message) -> Estimator:
        return resolve(msg, self._auto, self.default, self.num_particles)

    def _execute(
        self, call: Call, plan: Plan, subsample: SharedSubsample, *, exact: bool = False
    ) -> Passes:
        """Run the programs on every path of every particle."""
        groups = 1 if self.vectorize_particles else self.num_particles
        while True:
            layout = plan.layout(
                repetitions=self.num_particles, vectorized=self.vectorize_particles, exact=exact
            )
            try:
                return Passes(
                    [
                        self._run_group(call, plan, layout, subsample, exact=exact)
                        for _ in range(groups)
                    ]
                )
            except NestingNeeded:
                self._find_nesting(call, plan)
            except DeeperPlates as deeper:
                self._allow_nesting(deeper)
                plan.plate_nesting = deeper.nesting

    def _run_group(
        self, call: Call, plan: Plan, layout: Layout, subsample: SharedSubsample, *, exact: bool
    ) -> list[Run]:
        """Run the pass with the main path, then the branches that did not fit into it."""
        memory = Memory()
        verify = plan.passes == 0 and not exact

        def run(paths: tuple[Path, ...], dependence: Dependence | None = None) -> Run:
            here = Layout(layout.plate_nesting, paths, layout.repetitions, layout.vectorized)
            sampler = Sampler(
                here, self._choose, memory, exact=exact, dependence=dependence, verify=verify
            )
            with dependence or nullcontext():
                traces = run_programs(call, sampler, subsample)
                run = collect(
                    *traces, sampler, analytic_kl=self.analytic_kl, full_scores=self.full_scores
                )
                if dependence:
                    run.score_guide()
            return run

        if exact:
            return [run(layout.paths)]
        follow = plan.passes == 0 and torch.is_grad_enabled()
        dependence = Dependence(restore=False) if follow else None
        main = run(layout.paths, dependence)
        if torch.is_grad_enabled():
            self._check_costs(call, plan, main, dependence)
        if self.vectorize_particles:
            plan.branches = main_branches(main)
        return [main, *self._run_branches(main, run)]

    def _check_costs(
        self, call: Call, plan: Plan, main: Run, dependence: Dependence | None
    ) -> None:
        """Check once for each site and estimator that the cost is as the estimator needs it.

        The first pass of two programs is followed for it. Programs that read numbers into Python
        are checked again after 2, 4, 8, ... passes, since other values may lead them elsewhere.
        """
        plan.passes += 1
        sites = {
            (name, type(estimator))
            for name, estimator in main.estimators.items()
            if self._restricts_cost(estimator)
        }
        if not sites <= plan.checked or plan.passes >= plan.next_check:
            run = main
            if dependence is None or not main.shows_lost_gradients():
                run, dependence = self._follow(call, main)
            self._examine(plan, run, dependence)
            plan.checked.update(sites)
            plan.next_check = 2 * plan.passes if dependence.reads_values else float("inf")

    def _restricts_cost(self, estimator: Estimator) -> bool:
        """Return whether the gradient at a site depends on how its value reaches the cost."""
        counterfactual = estimator.branches is Branches.COUNTERFACTUAL
        return estimator.needs_smooth_cost or counterfactual

    def _examine(self, plan: Plan, run: Run, dependence: Dependence) -> None:
        """Check the costs of a run whose values were followed."""
        check_costs(run.estimators, run.frames(), run.reached_terms(dependence))

    def _follow(self, call: Call, main: Run) -> tuple[Run, Dependence]:
        """Follow the values of a pass through a run of its own, which leaves nothing behind.

        A pass that counts shows a lost gradient only at values that have one. To give others a
        gradient there would leave it in whatever the programs keep of them.
        """
        values = {name: main.value(name) for name in main.estimators}
        # Those with a gradient are drawn anew, so that they depend on earlier ones.
        values = {name: x.clone() for name, x in values.items() if not x.requires_grad}
        dependence = Dependence()
        run, _ = preflight(call, self._choose, main.layout, values=values, dependence=dependence)
        return run, dependence

    def _run_branches(self, main: Run, run: Callable[[tuple[Path, ...]], Run]) -> list[Run]:
        runs: list[Run] = []
        # The last site first: a branch that draws from a flow anew makes it forget the main path's
        # draw, which the branches of later sites score.
        for name, size in reversed(main.sizes.items()):
            estimator = main.estimators[name]
            paths = [Path(name, value) for value in range(1, size)]
            paths = [path for path in paths if path not in main.layout.paths]
            chunk = (estimator.chunk_size or len(paths) or 1) if self.vectorize_particles else 1
            starts = range(0, len(paths), chunk)
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and estimator.differentiates_branches
            ):
                runs = [run(tuple(paths[at : at + chunk])) for at in starts] + runs
        return runs
