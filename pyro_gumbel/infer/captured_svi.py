"""SVI whose step is recorded once and replayed."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import MethodType
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import is_validation_enabled, zero_grads
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from pyro.util import warn_if_nan
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._captured_state import ModulesAtWork, Updater
from pyro_gumbel.infer._captured_step import (
    CapturedStep,
    GraphedFunction,
    OtherParameters,
    Outcome,
    leaves_of,
)
from pyro_gumbel.infer._recording import (
    NotRecordable,
    is_library,
    set_torch_generators,
    torch_generators,
)
from pyro_gumbel.infer._state import finish_step
from pyro_gumbel.infer.elbo import ParticleELBO

__all__ = ["CapturedSVI"]

_MANY_KINDS = 32
_PLAIN = (bool, int, float, str, type(None))
_ADVICE = (
    "Something that the program reads has changed since it was recorded. Pass what changes as an "
    "argument, as a tensor: svi.step(x, torch.tensor(beta)); or call svi.reset() when you change "
    "it; or use pyro.infer.SVI."
)


class CapturedSVI(SVI):
    r"""Pyro's ``SVI`` with a step that runs without Pyro, once it is recorded.

    The first step with arguments of given shapes is an eager one, the second is recorded; from the
    third on the recorded operations (forward and backward) and the optimiser run alone, on a GPU
    as one CUDA graph. Losses, gradients and random numbers are those of eager steps.

    * **Inputs**, read anew at every step: tensors among the arguments; parameters; parameters and
      buffers of modules; schedules, baselines and other states of estimators.
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
    nothing.

    Where Pyro's validation is on, every replay computes the checks of all distributions, too. If
    one fails, or the loss is NaN, the step is taken eagerly from the same random numbers, so that
    it ends in the error or warning that ``SVI`` gives.

    To record takes as long as about ten eager steps. The optimiser has the state that it has in
    ``SVI``, and steps all parameters at once where torch can; on a GPU it is a graph of its own if
    it was made with ``capturable=True``.

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
        TypeError: If ``loss`` is another ELBO, the optimiser needs a closure (``LBFGS``), or an
            argument of a step can be neither a tensor nor part of a key.
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
        _check_optimizer(optim)
        super().__init__(model, guide, optim, loss=loss)
        self.elbo = loss
        self.compile = compile
        self.check_every = check_every
        self._steps: OrderedDict[Any, CapturedStep] = OrderedDict()
        self._updater = Updater()
        self._warned = False

    def reset(self) -> None:
        """Forget every recording; the next step of each kind is an eager one."""
        self._steps.clear()
        self._updater.clear()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step and return the loss."""
        if not torch.is_grad_enabled():
            return super().step(*args, **kwargs)
        leaves, spec = _flatten(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        call = Call(self.model, self.guide, args, kwargs)
        parts = [self.model, self.guide, self.optim, self.elbo, self.elbo.default]
        for handler in _PYRO_STACK:  # private in Pyro: if it moves, this import fails
            parts += [type(handler), *getattr(handler, "__dict__", {}).values()]
        key = (spec, *map(_leaf_key, leaves), *map(_identity, parts), *self._settings())
        step = self._find(key)
        if step is not None and step.recording is not None:
            return self._replay(step, call, tensors)
        if step is not None:
            with suppress(OtherParameters):  # than in the first step
                return self._record(step, call, tensors)
        loss, step = self._eager_step(call)
        step.parts = parts
        self._steps[key] = step
        self._forget_oldest()
        return loss

    def _settings(self) -> list[Any]:
        options = [v for k, v in vars(self.elbo).items() if isinstance(v, _PLAIN) and k[0] != "_"]
        validation = [is_validation_enabled(), dist.is_validation_enabled()]
        autocast = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
        dtypes = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")]
        return [*options, *validation, *autocast, *dtypes, torch.get_default_dtype()]

    def _find(self, key: Any) -> CapturedStep | None:
        try:
            step = self._steps.get(key)
        except TypeError as error:
            raise TypeError(
                f"CapturedSVI.step: every argument must be a tensor or hashable; {error}. Pass "
                "tensors, or use pyro.infer.SVI."
            ) from error
        if step is None:
            return None
        self._steps.move_to_end(key)
        if step.is_current():
            return step
        self._updater.clear()  # the parameters may be other ones
        return None

    def _forget_oldest(self) -> None:
        if len(self._steps) <= _MANY_KINDS:
            return
        self._steps.popitem(last=False)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"CapturedSVI: more than {_MANY_KINDS} kinds of arguments and handlers so far, "
                "each to be recorded; from now on the oldest are forgotten. Pass numbers that "
                "change as tensors, batches of one size, and make handlers around steps once.",
                stacklevel=3,
            )

    def _eager_step(self, call: Call) -> tuple[float, CapturedStep]:
        """Take the step that ``SVI`` takes, and note what it meets."""
        with ModulesAtWork() as at_work, poutine.trace(param_only=True) as traced:
            loss, surrogate, estimators = self.elbo.estimate(call)
            finish_step(estimators)
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        nodes = traced.trace.nodes
        params = {name: nodes[name]["value"].unconstrained() for name in traced.trace.param_nodes}
        if not params:
            raise ValueError(
                "CapturedSVI: neither model nor guide has a parameter; write pyro.param(...) or "
                "pyro.module(...)."
            )
        leaves = leaves_of(surrogate)
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.elbo.retain_graph)
        unique = list(dict.fromkeys(params.values()))
        self.optim(unique)
        zero_grads(unique)
        step = CapturedStep(
            self.elbo, params, estimators.values(), leaves, at_work.modules(), self.compile
        )
        return loss.item(), step

    def _record(self, step: CapturedStep, call: Call, tensors: Sequence[Tensor]) -> float:
        try:
            outcome = step.record(call, tensors)
        except OtherParameters:
            raise
        except Exception as error:
            with suppress(OtherParameters):
                step.eager(call, tensors)  # raises an error of the user's, as SVI does
            raise _refusal(error) from error
        self._finish(step, outcome, tensors)
        return outcome.loss.item()

    def _replay(self, step: CapturedStep, call: Call, tensors: Sequence[Tensor]) -> float:
        assert step.recording is not None
        step.replays += 1
        compares = step.replays % self.check_every == 1 % self.check_every
        expected = self._expected(step, call, tensors) if compares else None
        inputs = [*tensors, *step.states.inputs()]
        may_fail = compares or step.recording.has_checks
        restore = _restorer(step.written(inputs)) if may_fail else lambda: None
        try:
            outcome, broken = step.replay(inputs)
        except Exception:
            restore()
            step.eager(call, tensors)  # torch's checks may name the cause
            raise
        if broken is not None and broken.item():
            restore()
            loss, _ = self._eager_step(call)
            step.forget_branches()  # no check has failed
            return loss
        if expected is not None:
            left = [tensor.detach() for tensor in step.written(inputs)]
            found = outcome._replace(states=[*outcome.states, *left])
            difference = step.explain_difference(found, expected)
            if difference is not None:
                restore()
                self.reset()
                raise RuntimeError(f"CapturedSVI: {difference}. {_ADVICE}")
        self._finish(step, outcome, tensors)
        return outcome.loss.item()

    def _expected(self, step: CapturedStep, call: Call, tensors: Sequence[Tensor]) -> Outcome:
        try:
            return step.eager(call, tensors)
        except OtherParameters as error:
            self.reset()
            raise RuntimeError(
                f"CapturedSVI: {error}. Call svi.reset() when parameters come or go; it is done "
                "for this time."
            ) from error

    def _finish(self, step: CapturedStep, outcome: Outcome, tensors: Sequence[Tensor]) -> None:
        """Change estimators and parameters as the outcome of a step demands."""
        step.states.put(outcome.states)
        step.states.advance()
        gradients = outcome.gradients
        others = [*step.others, *(tensor for tensor in tensors if tensor.requires_grad)]
        for tensor, gradient in zip(others, gradients[len(step.leaves) :], strict=True):
            if gradient is not None:
                tensor.backward(gradient, retain_graph=True)
        update = partial(self._updater, self.optim, step.leaves, gradients)
        settings = None
        if step.graph is not None:
            settings = self._updater.graph_settings(self.optim, step.leaves)
        if settings is None:
            update()
            return
        if step.update is None or step.update[0] != settings:
            step.update = (settings, GraphedFunction(lambda _: update(), [], step.device))
        step.update[1]([])


def _identity(part: Any) -> Any:
    """Numbers, such as a scale, and methods by value, for they are made anew; all else by id."""
    return part if isinstance(part, (*_PLAIN, MethodType)) else id(part)


def _restorer(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that restores tensors and torch's generators."""
    generators = torch_generators()
    values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        set_torch_generators(generators)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    return restore


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
    reason = re.split(r"\s+Trace Shapes:", str(error))[0]  # Pyro adds them to any error
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


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Flatten arguments; tensors alone at once, for pytree takes as long as some operations."""
    if not kwargs and all(isinstance(arg, Tensor) for arg in args):
        return list(args), len(args)
    return pytree.tree_flatten((args, kwargs))


def _leaf_key(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    strides = leaf.stride() if leaf.layout == torch.strided else None
    return leaf.shape, leaf.layout, strides, leaf.dtype, leaf.device, leaf.requires_grad
