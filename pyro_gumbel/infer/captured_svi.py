"""SVI whose step is recorded once and replayed."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from pyro_gumbel.infer._captured_state import PLAIN, Surroundings, step_jointly
from pyro_gumbel.infer._captured_step import CapturedStep, Differs, Outcome
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


class CapturedSVI(SVI):
    r"""Pyro's ``SVI`` with a step that runs without Pyro, once it is recorded.

    The first step with arguments of given shapes is an eager one, the second is recorded, which
    takes as long as about ten. From then on the recorded operations run alone, forward, backward
    and the optimiser's, on a GPU as CUDA graphs. Losses, gradients, random numbers and the
    optimiser's state are those of ``SVI``.

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
    nothing. Where Pyro's validation is on, replays compute the checks of distributions, too. If
    one fails, or the loss is NaN, the step is taken eagerly from the same random numbers, and ends
    in the error or warning that ``SVI`` gives.

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
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> pyro.clear_param_store()
        >>> optim = pyro.optim.Adam({"lr": 0.05})
        >>> svi = CapturedSVI(model, lambda x: None, optim, Estimator_ELBO())
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
        self._zeros: dict[Tensor, Tensor | None] = {}  # left in ``.grad``
        self._warned = False

    def reset(self) -> None:
        """Forget every recording; the next step of each kind is an eager one."""
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
            with suppress(Differs):  # it meets other parameters than the first step did
                return self._record(step, call, tensors)
        loss, step = self._eager_step(call)
        step.parts = parts
        self._steps[key] = step
        self._forget_oldest()
        return loss

    def _settings(self) -> list[Any]:
        options = [v for k, v in vars(self.elbo).items() if isinstance(v, PLAIN) and k[0] != "_"]
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
        self._zeros.clear()  # the parameters may be other ones
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
        with Surroundings() as surroundings, poutine.trace(param_only=True) as traced:
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
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.elbo.retain_graph)
        unique = list(dict.fromkeys(params.values()))
        step_jointly(self.optim, unique)  # rounds as recorded steps do, in a resumed run
        zero_grads(unique)
        parts = estimators.values(), surroundings, self._zeros
        return loss.item(), CapturedStep(self.elbo, params, surrogate, *parts, self.compile)

    def _record(self, step: CapturedStep, call: Call, tensors: Sequence[Tensor]) -> float:
        try:
            outcome = step.record(call, tensors)
        except Differs:
            raise
        except Exception as error:
            with suppress(Differs):
                step.eager(call, tensors)  # raises an error of the user's, as SVI does
            raise _refusal(error) from error
        self._finish(step, outcome, tensors)
        return outcome.loss.item()

    def _replay(self, step: CapturedStep, call: Call, tensors: Sequence[Tensor]) -> float:
        assert step.recording is not None
        step.replays += 1
        compares = step.replays % self.check_every == 1 % self.check_every
        expected = step.eager(call, tensors) if compares else None
        inputs = [*tensors, *step.states.inputs(step.device)]
        written = step.written(inputs)
        restore = _restorer(written) if compares or step.recording.has_checks else lambda: None
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
        self._finish(step, outcome, tensors)
        return outcome.loss.item()

    def _finish(self, step: CapturedStep, outcome: Outcome, tensors: Sequence[Tensor]) -> None:
        """Change estimators and parameters as the outcome of a step demands."""
        step.states.put(outcome.states)
        step.states.advance()
        number, gradients = len(step.leaves), outcome.gradients
        others = [*step.others, *(tensor for tensor in tensors if tensor.requires_grad)]
        for tensor, gradient in zip(others, gradients[number:], strict=True):
            if gradient is not None:
                tensor.backward(gradient, retain_graph=True)
        step.updater(self.optim, gradients[:number], step.graph)


def _identity(part: Any) -> Any:
    """Numbers, such as a scale, and methods by value, for they are made anew; all else by id."""
    return part if isinstance(part, (*PLAIN, MethodType)) else id(part)


def _restorer(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that restores tensors and torch's generators."""
    generators = torch_generators()
    values = [tensor.clone() for tensor in tensors]

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


def _leaf_key(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    strides = leaf.stride() if leaf.layout == torch.strided else None
    return leaf.shape, leaf.layout, strides, leaf.dtype, leaf.device, leaf.requires_grad
