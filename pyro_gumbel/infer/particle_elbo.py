"""What every objective over particles has in common: its interface to Pyro and its runs."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from pyro.util import warn_if_nan
from torch import Tensor, nn

from pyro_gumbel._integers import is_integer
from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.estimators.registry import CLASSES, Choice, DefaultEstimators, check_choice
from pyro_gumbel.infer._cost_checks import ReachedTerm, check_costs
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._options import check_options
from pyro_gumbel.infer._rng import preserved_rng, set_torch_generators, torch_generators
from pyro_gumbel.infer.checks import misfits_named
from pyro_gumbel.infer.costs import site_frames
from pyro_gumbel.infer.finish import advance_schedules, finish_step
from pyro_gumbel.infer.loss_module import LossModule
from pyro_gumbel.infer.particles import (
    MAIN,
    DrawMessenger,
    Layout,
    Path,
    PlateNestingNeeded,
    SharedSubsample,
)
from pyro_gumbel.infer.paths import Paths
from pyro_gumbel.infer.run import Run, run_programs
from pyro_gumbel.infer.site_checks import Doubt, SiteChecks, same_programs

__all__ = ["ParticleELBO"]

_MANY_PLATES = 20  # more than any program nests: the trial run puts enumerated values left of them


class ParticleELBO(ELBO):
    """A bound estimated on particles: a subclass says its value and how to differentiate it.

    Args:
        num_particles: Number of particles.
        default: Estimator, or name of one, for sites that have none.
        vectorize_particles: Evaluate particles as rows of a plate, else one after the other.
        max_plate_nesting: Bound on the number of nested plates; found by a trial run if not given.
        **kwargs: As for Pyro's ``ELBO``.

    Raises:
        TypeError: If ``default`` is no estimator, or there is no such argument.
        ValueError: If ``num_particles`` is below 1 or ``default`` names no estimator.
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
        self._checked: tuple[Call, set[tuple[str, type[Estimator]]]] | None = None
        self._structure: tuple[Call, Layout] | None = None
        self._site_checks = SiteChecks()

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
            ValueError: If the state names an estimator that there is not.
        """
        self._auto.load_state_dict(state)

    @torch.no_grad()
    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Estimate the negative bound; no estimator's state changes."""
        call = Call(model, guide, args, kwargs)
        loss = -self._value(self._run(call, SharedSubsample(), evaluate=True))
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
            training: Whether to move schedules and baselines.
            finish: Ends a training step. A module holds the estimators' parameters itself, so that
                they need not be shown in the parameter store.
        """
        loss, surrogate, estimators = self._step(call, training=training, finish=finish)
        return loss + (surrogate - surrogate.detach()), estimators

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Estimate the negative bound and add the estimate of its gradient to ``.grad``.

        Returns:
            The loss, a detached scalar left on its device.
        """
        loss, surrogate, _ = self._step(Call(model, guide, args, kwargs))
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        return loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} runs programs by itself; call loss or loss_and_grads."
        )

    @abstractmethod
    def _value(self, paths: Paths) -> Tensor:
        """Estimate the bound from exact draws."""

    @abstractmethod
    def _estimate(self, paths: Paths, call: Call) -> tuple[Tensor, Tensor]:
        """Estimate the bound, and give a surrogate with the gradient's estimate."""

    @torch.no_grad()
    def find_estimators(self, call: Call) -> dict[str, Estimator]:
        """Find each site's estimator by a run whose draws are taken back."""
        with preserved_rng():
            return self._run(call, SharedSubsample(), evaluate=True).estimators

    def _step(
        self,
        call: Call,
        *,
        training: bool = True,
        finish: Callable[[dict[str, Estimator]], None] = finish_step,
    ) -> tuple[Tensor, Tensor, dict[str, Estimator]]:
        """Do as :meth:`estimate_step`, and finish an optimisation step in training."""
        if torch.is_grad_enabled():
            loss, surrogate, estimators = self.estimate_step(call, training=training)
            if training:
                finish(estimators)
        else:  # there is nothing to differentiate
            paths = self._run(call, SharedSubsample(), evaluate=True)
            loss = surrogate = -self._value(paths)
            estimators = paths.estimators
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        return loss, surrogate, estimators

    def estimate_step(
        self, call: Call, *, training: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, Estimator]]:
        """Return the detached loss, the surrogate loss and each site's estimator.

        Baselines move on in training; to count the step is left to :func:`finish_step`.
        """
        subsample = SharedSubsample()
        paths = self._run(call, subsample, evaluate=False)
        paths.training = training
        if is_validation_enabled():
            self._check_costs(paths, call, subsample)
        value, surrogate = self._estimate(paths, call)
        if any(estimator.relaxed for estimator in paths.estimators.values()):
            with torch.no_grad():
                value = self._value(self._run(call, subsample, evaluate=True))
        return -value.detach(), -surrogate, paths.estimators

    def _check_costs(self, paths: Paths, call: Call, subsample: SharedSubsample) -> None:
        """Check once for each site of two programs that its cost is as its estimator needs it.

        Programs that read numbers into Python are checked in every step: other data may lead them
        elsewhere.
        """
        if self._checked is None or not same_programs(self._checked[0], call):
            self._checked = (Call(call.model, call.guide), set())
        choices = {
            (name, type(estimator))
            for name, estimator in paths.estimators.items()
            if estimator.needs_linked_value or estimator.moves_plates
        }
        if choices <= self._checked[1]:
            return
        layout = Layout(plate_nesting=paths.groups[0][0].layout.plate_nesting)
        draw = DrawMessenger(layout, self.num_particles, self._auto, self.default, evaluate=True)
        with preserved_rng(), poutine.block(), Dependence() as dependence, _Followed(dependence):
            run = run_programs(
                call, draw, subsample, SiteChecks(), analytic_kl=False, full_scores=True
            )
            terms = [
                ReachedTerm(term.site, dependence.marks(term.value), term.frames)
                for term in run.costs.terms
            ]
        frames = {name: site_frames(site) for name, site in run.guide.items()}
        check_costs(run.estimators, frames, terms)
        if not dependence.reads_values:
            self._checked[1].update(choices)

    def _run(self, call: Call, subsample: SharedSubsample, *, evaluate: bool) -> Paths:
        """Run the programs on every path of every particle; lightly checked where that will do."""
        if not self._site_checks.allow_light_run(call):
            with self._site_checks.full_run(call):
                return self._run_paths(call, subsample, evaluate=evaluate)
        generators, indices = torch_generators(), subsample.known()
        try:
            with self._site_checks.light_run():
                paths = self._run_paths(call, subsample, evaluate=evaluate)
            if not paths.is_nan():
                return paths
        except (Doubt, ValueError, RuntimeError, IndexError):
            pass  # torch may have more to say about the cause
        self._site_checks.doubt(call)
        set_torch_generators(generators)
        subsample.forget(keep=indices)
        return self._run(call, subsample, evaluate=evaluate)

    def _run_paths(self, call: Call, subsample: SharedSubsample, *, evaluate: bool) -> Paths:
        if self.vectorize_particles:
            layout = self.find_structure(call)
            if evaluate:
                layout = dataclasses.replace(layout, paths=(MAIN,))
            return Paths([self._run_group(call, layout, subsample, evaluate=evaluate)])
        layout = Layout(plate_nesting=self._known_nesting(call))
        if layout.plate_nesting is not None:
            return self._run_loop(call, layout, subsample, evaluate=evaluate)
        state = pyro.util.get_rng_state()
        try:
            return self._run_loop(call, layout, subsample, evaluate=evaluate)
        except PlateNestingNeeded:
            pyro.util.set_rng_state(state)
            subsample.forget()  # as if the run that was broken off had not been
            layout = Layout(plate_nesting=self.find_structure(call).plate_nesting)
            return self._run_loop(call, layout, subsample, evaluate=evaluate)

    def _run_loop(
        self, call: Call, layout: Layout, subsample: SharedSubsample, *, evaluate: bool
    ) -> Paths:
        return Paths(
            [
                self._run_group(call, layout, subsample, evaluate=evaluate)
                for _ in range(self.num_particles)
            ]
        )

    def _run_group(
        self, call: Call, layout: Layout, subsample: SharedSubsample, *, evaluate: bool
    ) -> list[Run]:
        """Run the pass with the main path, then the branches that did not fit into it."""
        memory: dict[str, list[Tensor]] = {}
        noise: dict[str, Tensor] = {}

        def run(paths: tuple[Path, ...]) -> Run:
            here = dataclasses.replace(layout, paths=paths)
            draw = DrawMessenger(
                here, self.num_particles, self._auto, self.default, evaluate, memory, noise
            )
            return run_programs(
                call,
                draw,
                subsample,
                self._site_checks,
                analytic_kl=self.analytic_kl,
                full_scores=self.full_scores,
            )

        runs = [run(layout.paths)]
        if evaluate:
            return runs
        _check_paths(runs[0])
        for name, size in coupled_sites(runs[0]):
            estimator = runs[0].estimators[name]
            paths = [Path(name, value) for value in range(1, size)]
            paths = [path for path in paths if path not in layout.paths]
            chunk = estimator.chunk_size or len(paths) or 1
            chunk = chunk if layout.vectorized else 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and estimator.branches_have_graph):
                for start in range(0, len(paths), chunk):
                    runs.append(run(tuple(paths[start : start + chunk])))
        return runs

    def _known_nesting(self, call: Call) -> int | None:
        if self.max_plate_nesting != float("inf"):
            return int(self.max_plate_nesting)
        if self._structure is not None and same_programs(self._structure[0], call):
            return self._structure[1].plate_nesting
        return None

    def find_structure(self, call: Call) -> Layout:
        """Find the number of plates and the coupled sites by a run whose draws are taken back."""
        if self._structure is not None and same_programs(self._structure[0], call):
            return self._structure[1]
        many = Layout(plate_nesting=_MANY_PLATES)
        draw = DrawMessenger(many, self.num_particles, self._auto, self.default, evaluate=True)
        with preserved_rng(), poutine.block():
            with draw:
                guide_trace = poutine.trace(call.guide).get_trace(*call.args, **call.kwargs)
            traced_model = poutine.trace(poutine.replay(call.model, trace=guide_trace))
            with misfits_named(traced_model, guide_trace, _MANY_PLATES):
                model_trace = traced_model.get_trace(*call.args, **call.kwargs)
        nesting = self.max_plate_nesting
        if nesting == float("inf"):
            nesting = max(_plate_nesting(guide_trace), _plate_nesting(model_trace))
        branches = [
            Path(name, value)
            for name, size in coupled_sites(draw)
            if _belongs_to_main_pass(name, draw)
            for value in range(1, size)
        ]
        repetitions = self.num_particles if self.vectorize_particles else 1
        paths = (MAIN, *branches) if self.vectorize_particles else (MAIN,)
        layout = Layout(paths, repetitions, int(nesting), self.vectorize_particles)
        self._structure = (Call(call.model, call.guide), layout)  # no hold on a minibatch
        return layout


class _Followed(Messenger):
    """Has the values of latent sites followed."""

    def __init__(self, dependence: Dependence) -> None:
        super().__init__()
        self._dependence = dependence

    def _pyro_post_sample(self, msg: Message) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)):
            value = cast(Tensor, msg["value"])
            msg["value"] = self._dependence.follow(str(msg["name"]), value)


def coupled_sites(run: Run | DrawMessenger) -> list[tuple[str, int]]:
    """List the sites that own branches, each with its number of coupled values."""
    return [(name, size) for name, size in run.sizes.items() if size > 1]


def _belongs_to_main_pass(name: str, draw: DrawMessenger) -> bool:
    """Tell whether a site's branches are rows of the main path's pass, or have one of their own.

    Values that are no draws enter no average: apart, the last backward pass need not go through
    them. But sites drawn later can share noise with the main path only within its pass.
    """
    estimator, last = draw.estimators[name], next(reversed(draw.estimators)) == name
    return estimator.branches_have_graph and (estimator.branches_are_draws or not last)


def _check_paths(run: Run) -> None:
    owners = {path.owner for path in run.layout.paths if path.owner is not None}
    sizes = dict(coupled_sites(run))
    laid = {owner: 1 + sum(path.owner == owner for path in run.layout.paths) for owner in owners}
    for owner, size in laid.items():
        if sizes.get(owner) != size:
            raise ValueError(
                f"Site {owner!r} draws {sizes.get(owner, 0)} coupled values in this run, and rows "
                f"were laid out for {size}. Programs whose structure varies need "
                "vectorize_particles=False."
            )


def _plate_nesting(trace: poutine.Trace) -> int:
    dims = [
        frame.dim
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)
