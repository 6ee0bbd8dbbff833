"""The evidence lower bound with a gradient estimator for each site."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import Message
from pyro.util import warn_if_nan
from torch import Tensor, nn

from pyro_gumbel._validate import integer
from pyro_gumbel.estimators import Call, Estimator, Route
from pyro_gumbel.estimators.registry import (
    CLASSES,
    Choice,
    DefaultEstimators,
    check_choice,
    did_you_mean,
)
from pyro_gumbel.infer._execution import (
    Execution,
    Options,
    Plan,
    Plans,
    Split,
    preflight,
    structure_of,
)
from pyro_gumbel.infer._site_view import Passes
from pyro_gumbel.infer._state import LossModule, advance_schedules, finish_step, sole_step
from pyro_gumbel.infer.config import resolve

__all__ = ["Estimate", "Estimator_ELBO", "ParticleELBO"]

_WITHOUT_EFFECT = {
    "jit_options": "to record a step, write CapturedSVI(model, guide, optim, loss)",
    "max_iarange_nesting": "write max_plate_nesting",
    "tail_adaptive_beta": "it belongs to Pyro's TraceTailAdaptive_ELBO",
}


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
    """A bound estimated on particles. A subclass defines its value and its surrogate.

    A step is a straight line: plan, run the programs on every path, estimate the loss and a
    surrogate for its gradient, advance the estimators' schedules.

    Args:
        num_particles: Number of particles.
        default: Estimator, or name of one, for sites that have none.
        vectorize_particles: Evaluate particles as rows of a plate, else one after the other.
        max_plate_nesting: Bound on the number of nested plates, by default found by a run.
        **kwargs: As for Pyro's ``ELBO``.
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
        name = type(self).__name__
        num_particles = integer(f"{name}: num_particles", num_particles, 1)
        if max_plate_nesting != float("inf"):
            integer(f"{name}: max_plate_nesting", max_plate_nesting, 0)
        _check_options(type(self), kwargs)
        check_choice(default, f"{name}: default is")
        super().__init__(
            num_particles=num_particles, vectorize_particles=vectorize_particles, **kwargs
        )
        self.max_plate_nesting = max_plate_nesting
        self.default: Choice = default
        self.analytic_kl = False
        self.full_scores = False
        self._auto = DefaultEstimators()
        self._plans = Plans()

    def __call__(self, model: nn.Module, guide: nn.Module) -> ELBOModule:
        """Return a module that calls :meth:`differentiable_loss` and holds the estimators.

        Its first call finds those in ``infer`` or from a callable: call it before you make an
        optimiser.
        """
        return LossModule(model, guide, self)

    def known_estimators(self, guide: Any) -> list[Estimator]:
        """List the estimators that are known before any program has run."""
        messenger = getattr(guide, "gradient_messenger", None)
        estimators = messenger.estimators() if messenger is not None else []
        default = self.default
        if isinstance(default, str) and default in CLASSES:
            default = self._auto[default]
        estimators.append(
            default if isinstance(default, Estimator) else self._auto["moving_average"]
        )
        return estimators

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the estimators that names and ``"auto"`` stand for."""
        return self._auto.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; raise ``ValueError`` for an unknown name."""
        self._auto.load_state_dict(state)

    @torch.no_grad()
    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Estimate the negative bound; no estimator's state changes."""
        loss = self.exact_loss(Call(model, guide, args, kwargs))
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
            training: Whether to move schedules and baselines, if gradients are on.
            finish: Ends a training step. A module holds the estimators' parameters itself.
        """
        estimate = self.step(call, training=training, finish=finish)
        surrogate, value = estimate.surrogate, estimate.surrogate.detach()
        value = value.masked_fill(value.isinf(), 0.0)  # inf - inf would be nan
        return estimate.loss + (surrogate - value), estimate.estimators

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Estimate the negative bound and add the estimate of its gradient to ``.grad``.

        Returns:
            The loss, a detached scalar left on its device.
        """
        estimate = self.step(Call(model, guide, args, kwargs))
        if estimate.surrogate.requires_grad:
            estimate.surrogate.backward(retain_graph=self.retain_graph)
        return estimate.loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} runs programs by itself; call loss or loss_and_grads."
        )

    def find_estimators(self, call: Call) -> dict[str, Estimator]:
        """Return each site's estimator, found by a preflight."""
        with sole_step():
            return preflight(call, self._choose)[0].estimators

    def step(
        self,
        call: Call,
        *,
        training: bool = True,
        finish: Callable[[dict[str, Estimator]], None] = finish_step,
    ) -> Estimate:
        """Estimate the loss and its gradient, and end a training step."""
        if torch.is_grad_enabled():
            estimate = self.estimate(call, training=training)
            if training:
                finish(estimate.estimators)
        else:  # there is nothing to differentiate
            loss = self.exact_loss(call)
            estimate = Estimate(loss, loss, {})
        if is_validation_enabled():
            warn_if_nan(estimate.loss, "loss")
        return estimate

    def estimate(self, call: Call, training: bool = True, split: Split | None = None) -> Estimate:
        """Estimate the loss and its gradient; only baselines move on, if ``training``."""
        with sole_step():
            execution = Execution(call, self.plan(call), self._options(split))
            passes = execution.run()
            passes.training = training
            value, surrogate = self._estimate(passes, execution)
            if any(estimator.relaxed for estimator in passes.estimators.values()):
                with torch.no_grad():
                    value = self._value(execution.run(exact=True))
        return Estimate(-value.detach(), -surrogate, passes.estimators)

    def exact_loss(self, call: Call, split: Split | None = None) -> Tensor:
        """Estimate the loss alone."""
        with sole_step(), torch.no_grad():
            execution = Execution(call, self.plan(call), self._options(split))
            return -self._value(execution.run(exact=True))

    def plan(self, call: Call) -> Plan:
        """Return the plan of a step.

        New programs run once for it, if values get dimensions left of the plates, whose number is
        not given, or if vectorised sites draw several values.
        """
        options = self._options()
        plans = self._plans.of(call)
        key = options.max_plate_nesting, structure_of(call)
        new = key not in plans
        plan = plans.setdefault(key, Plan(options.max_plate_nesting))
        known = self.known_estimators(call.guide)
        if plan.plate_nesting is None:
            enumerates = any(estimator.route is Route.ENUMERATE for estimator in known)
            needed = self.vectorize_particles or enumerates
        else:
            # The first step then has its branches where later ones do, and sums in their order.
            needed = new and self.vectorize_particles and any(map(_couples, known))
        if needed:
            Execution(call, plan, options).find_layout()
        return plan

    def _options(self, split: Split | None = None) -> Options:
        given = self.max_plate_nesting != float("inf")
        return Options(
            choose=self._choose,
            num_particles=self.num_particles,
            vectorized=self.vectorize_particles,
            max_plate_nesting=int(self.max_plate_nesting) if given else None,
            analytic_kl=self.analytic_kl,
            full_scores=self.full_scores,
            checks_all=self._needs_all_dependence(),
            split=split,
        )

    def _needs_all_dependence(self) -> bool:
        """Return whether the estimate needs the cost's dependence on every site."""
        return False

    def _choose(self, msg: Message) -> Estimator:
        return resolve(msg, self._auto, self.default, self.num_particles)

    @abstractmethod
    def _value(self, passes: Passes) -> Tensor:
        """Estimate the bound from exact draws."""

    @abstractmethod
    def _estimate(self, passes: Passes, execution: Execution) -> tuple[Tensor, Tensor]:
        """Estimate the bound, and return it with a surrogate for its gradient."""


class Estimator_ELBO(ParticleELBO):  # noqa: N801
    r"""The ELBO of a model and a guide with a gradient estimator for each latent site.

    .. math:: \mathcal L = E_{q_\phi(z)}[\log p_\theta(x, z) - \log q_\phi(z)]

    The value is an unbiased estimate of the bound of the discrete model, from exact draws and
    probability masses. Estimators only change the gradient. Attach them by
    :func:`~pyro_gumbel.infer.config_gradient`, or by ``infer={"gradient": ...}`` at the site.

    Training changes the state of estimators, evaluation does not. Each call that makes a gradient
    advances every schedule and every moving average by one step:

    ================================================== ===============
    call                                               advances
    ================================================== ===============
    ``SVI.step``, ``loss_and_grads``                   yes
    ``differentiable_loss``                            yes
    ``elbo(model, guide)`` as a module, in train mode  yes
    the same after ``.eval()``                         no
    any of these under ``no_grad``, ``inference_mode`` no
    ``SVI.evaluate_loss``, ``loss``                    no
    ================================================== ===============

    As in Pyro, a site in a plate may only influence its own element of the plate. If a later site
    of the guide, outside the plate, combines the elements, and sites of the plate depend on that
    site, write ``.to_event(1)`` instead of the plate.

    A discrete site of the model that the guide lacks is summed out exactly if it is marked
    ``infer={"enumerate": "parallel"}``, in plates and along ``pyro.markov`` chains, by Pyro's
    variable elimination. The sum is a term of the bound, in the plates that it leaves. Hide these
    sites from Pyro's automatic guides: ``AutoNormal(poutine.block(model, hide=["z"]))``.
    :func:`~pyro_gumbel.infer.recover` draws them. In a guide the mark stands for ``Enumerate()``.

    A new pair of programs may run once more, for a *preflight*. It counts plates, finds the
    dependence of each term on each site, or checks that chains use values within reach. It leaves
    random number generators and buffers of modules unchanged.

    Args:
        num_particles: Number of independent samples to average over.
        default: Estimator, or its name, for sites without one. ``"auto"`` is pathwise at
            reparameterised sites. At other sites it is the score function, with leave-one-out (two
            particles or more) or a moving average.
        vectorize_particles: Evaluate all particles at once, in a plate left of the programs' own.
            Otherwise particles run in a loop, for programs that do not broadcast or whose
            structure varies. The estimator is the same, except for the weights in the loss of
            branches of several coupled sites.
        max_plate_nesting: Bound on the number of nested plates. By default the preflight finds it.
        analytic_kl: Replace a site's sampled ``log p - log q`` by the closed-form KL divergence,
            if it is known and the order of sites allows it.
        **kwargs: As for Pyro's ``ELBO``.

    Raises:
        TypeError: If a number is not an integer, ``default`` is not an estimator or a name, or an
            argument is unknown.
        ValueError: If a number is too small or ``default`` is an unknown name; when run, with the
            site's name, if an estimator does not support its site or model and guide do not match.

    References:
        Gradient Estimation Using Stochastic Computation Graphs (Schulman et al., 2015),
        https://arxiv.org/abs/1506.05254; Tensor Variable Elimination for Plated Factor Graphs
        (Obermeyer et al., 2019), https://arxiv.org/abs/1902.03210

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_gumbel.estimators import ReinMax
        >>> def model():
        ...     pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
        >>> def guide():
        ...     logits = pyro.param("logits", torch.tensor([0.2, 0.8]).log())
        ...     q = dist.OneHotCategorical(logits=logits)
        ...     pyro.sample("z", q, infer={"gradient": ReinMax()})
        >>> abs(Estimator_ELBO().loss(model, guide)) < 1e-6
        True
    """

    def __init__(
        self, num_particles: int = 1, *, analytic_kl: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_particles, **kwargs)
        self.analytic_kl = analytic_kl

    def _value(self, passes: Passes) -> Tensor:
        return passes.elbo()

    def _estimate(self, passes: Passes, execution: Execution) -> tuple[Tensor, Tensor]:
        elbo = surrogate = passes.elbo()
        for name, estimator in passes.estimators.items():
            if estimator.route is Route.ENUMERATE:
                continue
            term = estimator.surrogate(passes.site(name, execution.call))
            if term is not None:
                surrogate = surrogate + passes.weigh(name, term.sum()) / self.num_particles
        return elbo, surrogate


def _couples(estimator: Estimator) -> bool:
    """Return whether an estimator may draw several values."""
    return estimator.num_values > 1 or type(estimator).block_size is not Estimator.block_size


def _check_options(owner: type, options: Iterable[str]) -> None:
    """Check keyword arguments that a class passes to its parent.

    Raises:
        TypeError: If an option has no effect or is unknown.
    """
    known = _parameters(owner)
    for name in options:
        if name in _WITHOUT_EFFECT:
            raise TypeError(f"{owner.__name__}: {name} has no effect; {_WITHOUT_EFFECT[name]}.")
        if name not in known:
            raise TypeError(
                f"{owner.__name__} has no argument {name!r}; its arguments are {known}."
                f"{did_you_mean(name, known)}"
            )


def _parameters(owner: type) -> list[str]:
    """List the effective constructor parameters of a class and its parents."""
    kinds = {
        name: parameter.kind
        for part in owner.__mro__
        for name, parameter in inspect.signature(part.__init__).parameters.items()  # type: ignore[misc]
    }
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    without = ("self", *_WITHOUT_EFFECT)
    return [name for name, kind in kinds.items() if name not in without and kind not in loose]
