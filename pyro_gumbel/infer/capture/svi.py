"""SVI whose step is recorded once and replayed."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import is_validation_enabled
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.infer._state import finish_step, generator_states, set_generator_states
from pyro_gumbel.infer.capture.comparison import difference_told
from pyro_gumbel.infer.capture.gradients import RestingGradients
from pyro_gumbel.infer.capture.modules import modules_of
from pyro_gumbel.infer.capture.reads import users_line
from pyro_gumbel.infer.capture.step import CapturedStep, OtherParameters, RecordingFailed
from pyro_gumbel.infer.not_recordable import NotRecordable
from pyro_gumbel.infer.particle_elbo import ParticleELBO

__all__ = ["CapturedSVI"]

_MANY_KINDS = 32
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class CapturedSVI(SVI):
    r"""Pyro's ``SVI`` with a step that runs without Pyro, once it is recorded.

    The first step with arguments of given shapes runs as usual, with every check; the second is
    recorded; from the third on the recorded operations (forward and backward) and the optimiser
    run alone, on a GPU as one CUDA graph. The random number stream is that of eager steps; where
    the very numbers are to be, too, give the optimiser ``"fused": False`` (or ``True``) in both.

    Tensors among the arguments, parameters, schedules of estimators, baselines and learnable
    estimators are read anew at every step. Other arguments, the handlers around the step and the
    mode (``train`` or ``eval``) of the modules that the programs use are part of what is recorded:
    another value is another recording. What else Python computes is frozen as it was:

    * a program that turns a tensor into a number, selects by a mask, draws from Python's or
      NumPy's generator, puts another tensor in a buffer's place, or gives a gradient to what is no
      parameter of Pyro's is refused when it is recorded;
    * a number in an attribute, a global or a closure that a program changes itself, by counting
      its runs, is refused likewise if the step depends on it. An iterator that it
      moves on by ``next`` is not seen: give what comes next as an argument;
    * such a number that you change (an annealing factor, say), and structure that depends on one,
      is noticed when the recorded step is held against an eager one of the same random numbers:
      at the first replay, and every ``check_every`` steps. Pass it as an argument, as a tensor:
      ``svi.step(x, torch.tensor(beta))``.

    Data and parameters are validated in the first step of each kind, and wherever a loss is NaN,
    before the step is applied.

    To record takes as long as 5 to 90 eager steps, the more the smaller the operations are. On one
    core of a CPU: 0.08 s for an auto-encoder, 0.4 s for a chain of twelve sites, 6 s for one of
    six under ``Rebar``, which has 16 000 operations.

    Optimisers that have a fused form use it on a CPU, unless ``fused`` or ``foreach`` was set; on
    a GPU those that can be captured become part of the graph, which is captured again when a
    learning rate changes.

    Args:
        model: The model.
        guide: The guide, :func:`~pyro_gumbel.infer.config_gradient` included.
        optim: A Pyro optimiser.
        loss: :class:`~pyro_gumbel.infer.Estimator_ELBO` or
            :class:`~pyro_gumbel.infer.ImportanceWeighted_ELBO`.
        compile: Also have ``torch.compile`` fuse the recorded operations: minutes once, less time
            a step. Needs a C++ compiler.
        check_every: Number of replays from one comparison with an eager step to the next.

    Raises:
        TypeError: If ``loss`` is another ELBO, or an argument of a step can be neither a tensor
            nor part of a key.
        ValueError: If ``check_every`` is below 1.
        RuntimeError: At a step, if it cannot be recorded, or the recorded step differs from an
            eager one.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_gumbel.infer import Estimator_ELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        >>> pyro.clear_param_store()
        >>> svi = CapturedSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Estimator_ELBO())
        >>> losses = [svi.step(torch.tensor(1.0)) for _ in range(10)]
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: ParticleELBO,
        *,
        compile: bool = False,
        check_every: int = 100,
    ) -> None:
        if not isinstance(loss, ParticleELBO):
            raise TypeError(
                "CapturedSVI: loss must be an Estimator_ELBO or ImportanceWeighted_ELBO; got "
                f"{type(loss).__name__}. For another loss write pyro.infer.SVI(...)."
            )
        if check_every < 1:
            raise ValueError(f"CapturedSVI: check_every must be at least 1; got {check_every!r}.")
        super().__init__(model, guide, optim, loss=loss)
        self.elbo = loss
        self.compile = compile
        self.check_every = check_every
        self._steps: dict[Any, CapturedStep] = {}
        self._resting = RestingGradients()
        self._modules: tuple[Any, list[nn.Module]] = (None, [])
        self._last_surroundings: tuple[_Same, ...] = ()
        self._told_of_many = False

    def reset(self) -> None:
        """Forget every recording; the next step of each kind runs as usual."""
        self._steps.clear()
        self._resting.clear()
        self._modules = (None, [])
        self._last_surroundings = ()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step and return the loss."""
        leaves, spec = _flatten(args, kwargs)
        key = self._key(leaves, spec)
        call = Call(self.model, self.guide, args, kwargs)
        step = self._steps.get(key)
        if step is not None and not step.is_current():
            self.reset()  # the parameter store was cleared or loaded, or an estimator changed
            key, step = self._key(leaves, spec), None
        if step is None:
            return self._first_step(key, call)
        if step.recording is None:
            return self._record(key, step, call)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return self._replay(step, call, tensors)

    def _first_step(self, key: Any, call: Call) -> float:
        if len(self._steps) == _MANY_KINDS:
            if not self._told_of_many:
                warnings.warn(
                    f"CapturedSVI: {_MANY_KINDS} kinds of arguments and handlers so far, each "
                    "with steps of its own to record; from now on the oldest are forgotten. Pass "
                    "numbers that change from step to step as tensors, and batches of one size, "
                    "and make handlers around steps once.",
                    stacklevel=3,
                )
            self._told_of_many = True
            # Rather one that came once than one that is replayed.
            once = (key for key, step in self._steps.items() if step.recording is None)
            del self._steps[next(once, next(iter(self._steps)))]
        loss, params, estimators = self._eager_step(call)
        _prefer_fused(self.optim)
        self._steps[key] = CapturedStep(
            self.elbo,
            self.optim,
            params,
            estimators,
            self._find_modules(),
            self._resting,
            compile=self.compile,
        )
        return loss.item()

    def _eager_step(self, call: Call) -> tuple[Tensor, dict[str, Tensor], dict[str, Estimator]]:
        with poutine.trace(param_only=True) as traced:
            loss, surrogate, estimators = self.elbo.estimate(call)
            finish_step(estimators)
        params = {
            name: site["value"].unconstrained()
            for name, site in traced.trace.nodes.items()
            if site["type"] == "param"
        }
        if not params:
            raise ValueError(
                "CapturedSVI: neither model nor guide has a parameter; write pyro.param(...) or "
                "pyro.module(...)."
            )
        if surrogate.requires_grad:
            surrogate.backward()
        unique = list({id(param): param for param in params.values()}.values())
        self.optim(unique)
        self._resting.lay_down(unique)
        return loss, params, estimators

    def _record(self, key: Any, step: CapturedStep, call: Call) -> float:
        try:
            return step.record(call, self._look(step, call)).item()
        except OtherParameters:
            return self._first_step(key, call)
        except NotRecordable as error:
            raise _refusal(error) from error
        except RecordingFailed as failed:
            cause = cast(Exception, failed.__cause__)
        step.eager(call)  # an error of the user's comes up here, as it does in SVI
        raise _refusal(cause) from cause

    def _replay(self, step: CapturedStep, call: Call, tensors: list[Tensor]) -> float:
        step.replays += 1  # first, for a comparison that fails would be made for ever
        if step.replays % self.check_every == 1 % self.check_every:
            self._compare(step, call, tensors)
        return step.replay(tensors, self._look(step, call)).item()

    def _look(self, step: CapturedStep, call: Call) -> Callable[[Tensor], None]:
        """What is done with a loss before its step is applied."""
        if not is_validation_enabled():
            return lambda loss: None
        before = generator_states()

        def look(loss: Tensor) -> None:
            if loss.isnan():
                after = generator_states()
                set_generator_states(before)
                try:
                    step.eager(call)  # with its checks, which name what became NaN
                finally:
                    set_generator_states(after)
                warnings.warn("Encountered NaN: loss", stacklevel=5)

        return look

    def _compare(self, step: CapturedStep, call: Call, tensors: list[Tensor]) -> None:
        """Hold what a replay gives against the eager step of the same random numbers."""
        loss, gradients = step.recorded(tensors)
        try:
            should, slopes = step.eager(call)
        except OtherParameters as error:
            self.reset()
            raise RuntimeError(
                f"CapturedSVI: {error}. Call svi.reset() when parameters come or go; it is done "
                "for this time."
            ) from error
        difference = difference_told(loss, gradients, should, slopes, self.compile)
        if difference is not None:
            self.reset()
            raise RuntimeError(
                f"CapturedSVI: {difference} Something that the program reads has changed since it "
                "was recorded, or it draws from a generator of its own. Pass what changes as an "
                "argument, as a tensor: svi.step(x, torch.tensor(beta)); or call svi.reset() when "
                "you change it; or use pyro.infer.SVI."
            )

    def _key(self, leaves: list[Any], spec: Any) -> Any:
        """What a recording is good for: shapes, other arguments, modes, handlers."""
        elbo = self.elbo
        key = (
            spec,
            tuple(_leaf_key(leaf) for leaf in leaves),
            tuple(module.training for module in self._find_modules()),
            self._surroundings(),
            (elbo.num_particles, elbo.vectorize_particles, elbo.analytic_kl, elbo.default),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            _autocast(),
        )
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(
                f"CapturedSVI.step: every argument must be a tensor or hashable; {error}. Pass "
                "tensors, or use pyro.infer.SVI."
            ) from error
        return key

    def _surroundings(self) -> tuple[_Same, ...]:
        """The parts of this object and the handlers around the step, by identity."""
        now = (self.model, self.guide, self.optim, self.elbo, *_PYRO_STACK)
        last = self._last_surroundings
        if len(now) != len(last) or any(
            of is not same.of for of, same in zip(now, last, strict=True)
        ):
            self._last_surroundings = tuple(_Same(of) for of in now)
        return self._last_surroundings

    def _find_modules(self) -> list[nn.Module]:
        """The modules that the programs use: looked for once for two programs."""
        programs = (self.model, self.guide)
        if self._modules[0] != programs:
            self._modules = (programs, modules_of(*programs))
        return self._modules[1]


class _Same:
    """Something by its identity, and held, so that no other gets the identity.

    A bound method is made anew whenever it is read, and a scale often around each step.
    """

    def __init__(self, of: Any) -> None:
        self.of = of
        self.identity: Any = id(of)
        if inspect.ismethod(of):
            self.identity = id(of.__self__), id(of.__func__)
        elif type(of) is ScaleMessenger and isinstance(of.scale, (int, float)):
            self.identity = of.scale

    def __eq__(self, other: object) -> bool:
        same_type = isinstance(other, _Same) and type(self.of) is type(other.of)
        return same_type and self.identity == cast(_Same, other).identity

    def __hash__(self) -> int:
        return hash(self.identity)


def _refusal(error: Exception) -> RuntimeError:
    """Say why a step cannot be recorded, and where in the user's program."""
    told = re.split(r"\s+Trace Shapes:", str(error))[0]  # Pyro adds them to any error
    if not isinstance(error, NotRecordable):
        told = f"{type(error).__name__}: {told.partition(chr(10))[0].rstrip('.')}."
    line = users_line(error)
    return RuntimeError(
        f"CapturedSVI cannot record this step: {told} Use pyro.infer.SVI instead."
        + (f" ({line})" if line else "")
    )


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Flatten arguments; tensors alone at once, for pytree takes as long as some operations."""
    if not kwargs and all(isinstance(arg, Tensor) for arg in args):
        return list(args), len(args)
    return pytree.tree_flatten((args, kwargs))


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    modes = [m.training for m in leaf.modules()] if isinstance(leaf, nn.Module) else []
    return type(leaf), leaf, *modes


def _autocast() -> tuple[torch.dtype | None, ...]:
    return tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in ("cpu", "cuda")
    )


def _prefer_fused(optim: PyroOptim) -> None:
    """Let torch's optimisers on a CPU take their fused form, unless the user chose one."""
    for optimizer in optim.optim_objs.values():
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if type(optimizer) not in _FUSED:
            continue
        for group in optimizer.param_groups:
            chosen = any(group.get(name) for name in ("foreach", "differentiable", "capturable"))
            on_cpu = all(p.is_cpu and p.is_floating_point() for p in group["params"])
            if group["fused"] is None and group.get("foreach") is None and on_cpu and not chosen:
                group["fused"] = True
