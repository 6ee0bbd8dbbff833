"""SVI whose step is recorded once and replayed."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import MethodType
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import is_validation_enabled, zero_grads
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._captured_step import PLAIN, CapturedStep, Differs, Outcome, Surroundings
from pyro_gumbel.infer._operations import Undo
from pyro_gumbel.infer._recording import CudaGraph, NotRecordable, is_library, record, restorer
from pyro_gumbel.infer.elbo import ParticleELBO

__all__ = ["CapturedSVI"]

_MANY_KINDS = 32
_SETTLED = 50  # steps; recording that of an optimiser takes as long as some
_CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)
# ASGD is not among them: its multi-tensor form rounds to float32.
_NAMES = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
_FUSED = (torch.float32, torch.float64)  # others are rounded less often than step by step
_MULTI_TENSOR = [getattr(torch.optim, name) for name in _NAMES]


class CapturedSVI(SVI):
    r"""Pyro's ``SVI`` with a step that is recorded once, and then runs without Pyro.

    The first step with arguments of given shapes is eager. The second is recorded, which takes as
    long as ten steps. Later steps replay the operations, on a GPU as CUDA graphs. The optimiser is
    replayed, too, while its settings stay the same. Losses, gradients, draws and all states are
    those of ``SVI``.

    * **Inputs**, read anew at every step: tensors among the arguments; Pyro's parameters; the
      parameters and buffers of modules; schedules, baselines and other states of estimators.
    * **Frozen**: every other value that Python computes or reads while the step is recorded, such
      as a number in a global, a closure or a plain object, and the branches taken.
    * **Recorded anew** where they differ: shapes and other arguments than tensors; modes and plain
      attributes of modules and estimators; the loss's options; handlers around the step; autocast
      and validation.
    * **Refused** when recorded, with the line of the program: reading a tensor's value into
      Python, shapes that depend on values, draws from Python's, NumPy's or other generators, new
      tensors in place of buffers, sparse gradients.

    The first replay, and one of every ``check_every``, is compared with an eager step of the same
    random numbers. A difference raises an error that names the parameter, and that step changes
    nothing. If Pyro's validation is on, replays also compute the checks of distributions. If a
    check fails, or the loss is NaN, the step is repeated as an eager step.

    Args:
        model: The model.
        guide: The guide, :func:`~pyro_gumbel.infer.config_gradient` included.
        optim: A Pyro optimiser.
        loss: An ``Estimator_ELBO`` or ``ImportanceWeighted_ELBO``.
        compile: Also fuse operations by ``torch.compile``, which takes minutes and a C++ compiler.
        check_every: Number of replays from one comparison with an eager step to the next.

    Raises:
        TypeError: If ``loss`` is another ELBO, the optimiser needs a closure (``LBFGS``), or an
            argument of a step is neither a tensor nor hashable.
        ValueError: If ``check_every`` is below 1.
        RuntimeError: At a step that cannot be recorded, or differs from an eager one.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_gumbel.infer import Estimator_ELBO
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> pyro.clear_param_store()
        >>> svi = CapturedSVI(model, lambda x: None, pyro.optim.Adam({}), Estimator_ELBO())
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
        _check_optimizer(optim)
        super().__init__(model, guide, optim, loss=loss)
        self.elbo, self.compile, self.check_every = loss, compile, check_every
        self._steps: OrderedDict[Any, CapturedStep] = OrderedDict()
        self._zeros: dict[Tensor, Tensor | None] = {}  # left in ``.grad``

    def reset(self) -> None:
        """Forget all recordings. The next step of each kind is eager."""
        self._steps.clear()
        self._zeros.clear()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step and return the loss."""
        if not torch.is_grad_enabled():
            return super().step(*args, **kwargs)
        leaves, spec = list(args), None
        if kwargs or not all(isinstance(arg, Tensor) for arg in args):
            leaves, spec = pytree.tree_flatten((args, kwargs))  # as slow as some operations
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        call = Call(self.model, self.guide, args, kwargs)
        parts = [self.model, self.guide, self.optim, self.elbo, self.elbo.default]
        for handler in _PYRO_STACK:  # private in Pyro: if it moves, this import fails
            parts += [type(handler), *getattr(handler, "__dict__", {}).values()]
        key = (spec, *map(_leaf_key, leaves), *map(_identity, parts), *self._settings())
        step = self._find(key)
        if step is not None and step.recording is not None:
            try:
                return self._replay(step, call, tensors)
            except Differs:
                self.reset()
                raise
        if step is not None:
            with suppress(Differs):  # it uses other parameters than the first step
                return self._record(step, call, tensors)
        loss, step = self._eager_step(call)
        step.parts, step.updater = parts, Updater(step.leaves, self._zeros)
        self._steps[key] = step
        self._forget_oldest()
        return loss

    def _settings(self) -> list[Any]:
        options = [v for k, v in vars(self.elbo).items() if isinstance(v, PLAIN) and k[0] != "_"]
        validation = [is_validation_enabled(), dist.is_validation_enabled()]
        casts = (torch.is_autocast_enabled, torch.get_autocast_dtype)
        autocast = [get(kind) for get in casts for kind in ("cpu", "cuda")]
        return [*options, *validation, *autocast, torch.get_default_dtype()]

    def _find(self, key: Any) -> CapturedStep | None:
        try:
            step = self._steps.get(key)
        except TypeError as error:
            raise TypeError(
                f"CapturedSVI.step: every argument must be a tensor or hashable; {error}. Pass "
                "tensors, or use pyro.infer.SVI."
            ) from error
        if step is not None:
            self._steps.move_to_end(key)
            if not step.is_current():
                self._zeros.clear()  # the parameters may be other ones
                return None
        return step

    def _forget_oldest(self) -> None:
        if len(self._steps) > _MANY_KINDS:
            self._steps.popitem(last=False)
            warnings.warn(
                f"CapturedSVI: more than {_MANY_KINDS} kinds of arguments and handlers so far, "
                "each to be recorded; from now on the oldest are forgotten. Pass numbers that "
                "change as tensors, batches of one size, and make handlers around steps once.",
                stacklevel=3,
            )

    def _eager_step(self, call: Call) -> tuple[float, CapturedStep]:
        """Take the step that ``SVI`` takes, and record what it uses."""
        with Surroundings() as surroundings, poutine.trace(param_only=True) as traced:
            loss, surrogate, estimators = self.elbo.step(call)
        nodes = traced.trace.nodes
        params = {name: nodes[name]["value"].unconstrained() for name in traced.trace.param_nodes}
        if not params:
            raise ValueError(
                "CapturedSVI: neither model nor guide has a parameter; write pyro.param(...) or "
                "pyro.module(...)."
            )
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.elbo.retain_graph)
        unique = list(dict.fromkeys(params.values()))
        step_jointly(self.optim, unique)  # rounds as recorded steps do, in a resumed run
        zero_grads(unique)
        step = CapturedStep(self.elbo, params, surrogate, estimators, surroundings, self.compile)
        return loss.item(), step

    def _record(self, step: CapturedStep, call: Call, tensors: Sequence[Tensor]) -> float:
        try:
            outcome = step.record(call, tensors)
        except Differs:
            raise
        except Exception as error:
            with suppress(Differs):
                step.eager(call, tensors)  # raises an error of the user's, as SVI does
            raise _refusal(error) from error
        return self._finish(step, outcome, tensors)

    def _replay(self, step: CapturedStep, call: Call, tensors: Sequence[Tensor]) -> float:
        assert step.recording is not None
        step.replays += 1
        compares = step.replays % self.check_every == 1 % self.check_every
        expected = step.eager(call, tensors) if compares else None
        inputs = [*tensors, *step.states.inputs(step.device)]
        written = step.written(inputs)
        restore = restorer(written) if compares or step.recording.has_checks else lambda: None
        try:
            outcome, conditions = step.replay(inputs)
            if expected is not None and all(conditions):
                step.compare(outcome._replace(states=[*outcome.states, *written]), expected)
        except Exception as error:
            restore()
            if not isinstance(error, Differs):
                step.eager(call, tensors)  # torch's checks may name the cause
            raise
        if not all(conditions):
            restore()
            loss, _ = self._eager_step(call)
            step.forget_branches()  # no check has failed
            return loss
        return self._finish(step, outcome, tensors)

    def _finish(self, step: CapturedStep, outcome: Outcome, tensors: Sequence[Tensor]) -> float:
        """Change estimators and parameters as the outcome of a step demands."""
        step.states.finish(outcome.states)
        trained, gradients = len(step.leaves), outcome.gradients
        others = [*step.others, *(tensor for tensor in tensors if tensor.requires_grad)]
        for tensor, gradient in zip(others, gradients[trained:], strict=True):
            if gradient is not None:
                tensor.backward(gradient, retain_graph=True)
        step.updater(self.optim, gradients[:trained], step.graph)
        return outcome.loss.item()


class Updater:
    """Takes steps of a Pyro optimiser and leaves ``zeros`` in ``.grad``, as ``SVI`` does.

    Gradients take the place of zeros that nobody has written to. An optimiser whose settings stay
    the same is recorded.
    """

    def __init__(self, parameters: Sequence[Tensor], zeros: dict[Tensor, Tensor | None]) -> None:
        self._parameters, self._zeros = parameters, zeros
        self._settings: list[Any] | None = None
        self._steps, self._recorded = 0, cast(Any, None)  # with these settings

    def __call__(self, optim: PyroOptim, gradients: Sequence[Tensor | None], graph: Any) -> None:
        """Take a step; ``graph`` is a CUDA graph that computes gradients, always in one place."""
        trained = [p for p, g in zip(self._parameters, gradients, strict=True) if g is not None]
        given = [g for g in gradients if g is not None]
        update = partial(self._update, optim, trained)
        settings = self._find_settings(optim, [graph, *(g is None for g in gradients)])
        if settings is None or settings != self._settings:
            self._settings, self._steps, self._recorded = settings, 0, None
        self._steps += 1
        if settings is None or self._steps <= _SETTLED:
            update(*given)
            return
        if self._recorded is None:
            try:
                self._recorded = self._record(update, given, graph)
            except NotRecordable:  # it reads values, such as the number of steps
                self._recorded = lambda given: update(*given)
                for parameter in self._parameters:
                    parameter.grad = self._zeros.get(parameter)
        self._recorded(given)

    def _record(self, update: Callable[..., None], given: Sequence[Tensor], graph: Any) -> Any:
        with Undo():
            _, recording = record(update, given)
        if recording.has_checks:
            raise NotRecordable("the optimiser checks values")
        devices = {*recording.devices, *(tensor.device for tensor in recording.held)} - {None}
        if graph is None or len(devices) != 1:
            return recording
        graphed = CudaGraph(lambda _: recording(given), [], *devices)
        return lambda _: graphed([])

    def _update(self, optim: PyroOptim, trained: Sequence[Tensor], *gradients: Tensor) -> None:
        for parameter, gradient in zip(trained, gradients, strict=True):
            kept = None if self._has_zeros(parameter) else parameter.grad
            parameter.grad = gradient if kept is None else gradient + kept
        step_jointly(optim, self._parameters)
        zero_grads(self._parameters)
        self._zeros.update((parameter, parameter.grad) for parameter in self._parameters)

    def _has_zeros(self, parameter: Tensor) -> bool:
        grad = parameter.grad
        return grad is self._zeros.get(parameter) and (grad is None or grad._version == 0)

    def _find_settings(self, optim: PyroOptim, found: list[Any]) -> list[Any] | None:
        """List all that a step goes by, but for numbers in tensors; ``None`` if it may differ."""
        for parameter in self._parameters:
            options = _joint_options(optim, parameter)
            if options is None or not self._has_zeros(parameter):
                return None
            state = _optimizer(optim, parameter).state.get(parameter, {})
            found += [*options, optim.grad_clip[parameter], *state.values()]
        return [id(value) if isinstance(value, Tensor) else value for value in found]


def step_jointly(optim: PyroOptim, parameters: Sequence[Tensor]) -> None:
    """Call ``optim``, whose torch optimisers of one parameter each, if alike, step as one."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(_joint_options(optim, parameter), []).append(parameter)
    if None in groups:
        optim(groups.pop(None))
    for (kind, options), group in groups.items():
        joint = kind(group, lr=1.0)
        joint.param_groups[0].update(options)
        for parameter in group:
            state = _optimizer(optim, parameter).state
            if parameter in state:
                joint.state[parameter] = state[parameter]
            if optim.grad_clip[parameter] is not None:
                optim.grad_clip[parameter](parameter)
        joint.step()


def _joint_options(optim: PyroOptim, parameter: Tensor) -> Any:
    """Return an optimiser's class, and its options in a multi-tensor step that does the same."""
    if type(optim).__call__ not in _CALLS or parameter not in optim.optim_objs:
        return None
    optimizer = _optimizer(optim, parameter)
    options, kind = dict(optimizer.param_groups[0]), type(optimizer)
    del options["params"]
    foreach, fused = options.get("foreach", False), options.get("fused", False)
    is_stateless = kind is torch.optim.SGD and not options["momentum"]
    if (
        kind not in _MULTI_TENSOR
        or foreach is False
        or options.get("differentiable")
        or any(isinstance(value, (Tensor, list)) for value in options.values())
        or optimizer._optimizer_step_pre_hooks  # private: torch has no public list of hooks
        or optimizer._optimizer_step_post_hooks
        or not (is_stateless or parameter in optimizer.state)
    ):
        return None
    if foreach is None and not fused and parameter.is_cpu:  # on a GPU torch chooses foreach
        is_plain = parameter.is_contiguous() and parameter.dtype in _FUSED
        options["fused" if fused is None and is_plain else "foreach"] = True
    return kind, tuple(options.items())


def _optimizer(optim: PyroOptim, parameter: Tensor) -> Any:
    """Return torch's optimiser of a parameter, out of its learning rate scheduler."""
    found = optim.optim_objs[parameter]
    return getattr(found, "optimizer", found)


def _identity(part: Any) -> Any:
    """Numbers, such as a scale, and methods by value, for they are made anew; all else by id."""
    return part if isinstance(part, (*PLAIN, MethodType)) else id(part)


def _check_optimizer(optim: PyroOptim) -> None:
    constructor: Any = getattr(optim, "pt_optim_constructor", None)
    step = getattr(constructor, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step is not None else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"CapturedSVI: {constructor.__name__} evaluates the loss by a closure, which Pyro's "
            "SVI does not give; use an optimiser such as pyro.optim.Adam."
        )


def _refusal(error: Exception) -> RuntimeError:
    """Explain why a step cannot be recorded, and where in the user's program."""
    reason = str(error).partition("Trace Shapes:")[0].rstrip()  # Pyro adds them to any error
    if not isinstance(error, NotRecordable):
        reason = f"{type(error).__name__}: {reason.partition(chr(10))[0].rstrip('.')}."
    line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if not is_library(frame):
            (place,) = traceback.StackSummary.extract([(frame, number)])
            line = f" (Line {number} of {place.filename}: {place.line})"
    return RuntimeError(
        f"CapturedSVI cannot record this step: {reason} Use pyro.infer.SVI instead.{line}"
    )


def _leaf_key(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    strides = leaf.stride() if leaf.layout == torch.strided else None
    return leaf.shape, leaf.layout, strides, leaf.dtype, leaf.device, leaf.requires_grad
