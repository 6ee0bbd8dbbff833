"""State that outlives a step: generators, schedules, and the modules that programs hold."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_gumbel.distributions import _constraints
from pyro_gumbel.distributions._base import tensor_of
from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.estimators._module import STORE_PREFIX, is_newer, note_own, note_stored

if TYPE_CHECKING:
    from pyro_gumbel.infer.elbo import ParticleELBO

__all__ = [
    "LossModule",
    "adopt_stored",
    "advance_schedules",
    "constraint_data",
    "constraint_of",
    "finish_step",
    "generator_states",
    "held_objects",
    "meet_site",
    "preserved_rng",
    "set_generator_states",
    "set_torch_generators",
    "show_parameters",
    "sole_step",
    "torch_generators",
]

# The modules whose classes a file may name.
_CONSTRAINTS = {
    module.__name__: module
    for module in (torch.distributions.constraints, pyro.distributions.constraints, _constraints)
}
_HOLDERS = (nn.Module, Mapping, list, tuple, partial, types.FunctionType, types.MethodType)

_step = threading.RLock()


@contextmanager
def sole_step() -> Iterator[None]:
    """Run a step, alone in the process; a step within a step of the same thread is fine.

    Raises:
        RuntimeError: If another thread is running one.
    """
    if not _step.acquire(blocking=False):
        raise RuntimeError(
            "Another thread is running a step. Pyro's stack of handlers belongs to the whole "
            "process, so two steps at once would mix their sites. Run them one after the other "
            "(hold a lock around svi.step) or in separate processes."
        )
    try:
        yield
    finally:
        _step.release()


def torch_generators() -> list[Tensor]:
    """Return the states of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_torch_generators(states: Sequence[Tensor]) -> None:
    """Restore what :func:`torch_generators` returned."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def generator_states() -> tuple[dict, list[torch.Tensor]]:
    """Return the states of Python's, NumPy's and torch's generators, those of CUDA included."""
    return pyro.util.get_rng_state(), torch_generators()[1:]


def set_generator_states(states: tuple[dict, list[torch.Tensor]]) -> None:
    """Restore what :func:`generator_states` returned."""
    own, cuda = states
    pyro.util.set_rng_state(own)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def held_objects(programs: Mapping[str, Any], kinds: tuple[type, ...]) -> dict[str, Any]:
    """Return the objects of some kinds that programs hold, by the path to each.

    A function holds its closure, its defaults and the globals that it names; a method holds its
    object, too. The parts of modules are left to the modules.
    """
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    waiting = list(programs.items())
    for path, value in waiting:  # grows while it is walked
        if id(value) not in seen:
            seen[id(value)] = value  # which keeps the id
            if isinstance(value, kinds):
                found[path] = value
            waiting += [(f"{path}.{name}", part) for name, part in _parts(value)]
    return found


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """List what an object holds, by name."""
    if isinstance(value, nn.Module):
        return [("gradient", getattr(value, "gradient_messenger", None))]
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("method", value.__func__)]
    if isinstance(value, types.FunctionType):
        return _variables(value)
    if isinstance(value, partial):
        return [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    if isinstance(value, (type, types.ModuleType)):
        return []
    owned = enumerate(value) if isinstance(value, (list, tuple)) else _entries(value).items()
    return [(name, part) for name, part in owned if _leads_on(part)]


def _entries(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else getattr(value, "__dict__", {})


def _leads_on(part: Any) -> bool:
    """Return whether a part of an object may hold a module; others' objects end the search."""
    return isinstance(part, _HOLDERS) or type(part).__module__.startswith("pyro_gumbel.")


def _variables(function: types.FunctionType) -> list[tuple[str, Any]]:
    """List the variables of a function that come from outside of it."""
    names: dict[str, None] = {}
    codes = [function.__code__]
    for code in codes:  # grows while it is walked
        names.update(dict.fromkeys(code.co_names))
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    space = function.__globals__
    parts = [(name, space[name]) for name in names if name in space]
    # Functions of other modules, such as torch's, lead everywhere.
    parts = [(n, v) for n, v in parts if getattr(v, "__globals__", space) is space]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            parts.append((name, cell.cell_contents))
    wrapped = vars(function).get("__wrapped__")
    return [*parts, ("defaults", function.__defaults__), ("wrapped", wrapped)]


def constraint_data(constraint: Any) -> Any:
    """Describe a constraint by the name of its class and its attributes, without code.

    Raises:
        ValueError: If its class is not one of torch, Pyro or this package.
    """
    if isinstance(constraint, (list, tuple)):
        return [constraint_data(part) for part in constraint]
    if not isinstance(constraint, Constraint):
        return constraint
    kind = type(constraint)
    if getattr(_CONSTRAINTS.get(kind.__module__), kind.__qualname__, None) is not kind:
        raise ValueError(
            f"The class {kind.__module__}.{kind.__qualname__} of the constraint {constraint!r} is "
            "code, which a checkpoint cannot hold. Use a constraint of torch or Pyro, or "
            "transform a real parameter in the program."
        )
    attributes = {name: constraint_data(part) for name, part in vars(constraint).items()}
    return {"module": kind.__module__, "class": kind.__qualname__, "attributes": attributes}


def constraint_of(data: Any) -> Any:
    """Return the constraint that :func:`constraint_data` described.

    Raises:
        ValueError: If the class is unknown.
    """
    if isinstance(data, list):
        return [constraint_of(part) for part in data]
    if not isinstance(data, dict):
        return data
    kind = getattr(_CONSTRAINTS.get(data["module"]), data["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, Constraint)):
        raise ValueError(
            f"The constraint {data['module']}.{data['class']} of a checkpoint is unknown to the "
            "installed versions of torch and Pyro."
        )
    constraint: Any = object.__new__(kind)
    vars(constraint).update({n: constraint_of(part) for n, part in data["attributes"].items()})
    return constraint


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the generators at exit."""
    states = generator_states()
    try:
        yield
    finally:
        set_generator_states(states)


def finish_step(estimators: dict[str, Estimator]) -> None:
    """Advance each schedule once, and show learnable parameters to whoever collects parameters."""
    advance_schedules(estimators)
    seen: set[int] = set()
    for name, estimator in estimators.items():
        if id(estimator) not in seen and next(estimator.parameters(), None) is not None:
            show_parameters(name, estimator)
        seen.add(id(estimator))


def advance_schedules(estimators: dict[str, Estimator]) -> None:
    """Advance each schedule once."""
    schedules = {
        id(schedule): schedule
        for estimator in estimators.values()
        for schedule in estimator.schedules()
    }
    for schedule in schedules.values():
        schedule.advance()


def meet_site(site: str, estimator: Estimator, fn: Any) -> None:
    """Prepare an estimator's parameters for a draw at a site with distribution ``fn``.

    At the first draw the parameters move to the distribution's device, and those of the default
    dtype to the distribution's dtype if it is wider. Values that were loaded into the parameter
    store replace the estimator's.
    """
    if next(estimator.parameters(), None) is None:
        return
    if not estimator.has_met_site:
        like = tensor_of(fn)
        if like is not None:
            move_like(estimator, like)
        estimator.has_met_site = True
    adopt_stored(site, estimator)


def move_like(estimator: Estimator, like: Tensor) -> None:
    """Move parameters and buffers to a tensor's device, and to its dtype if it is wider."""
    usual = torch.get_default_dtype()
    wide = torch.promote_types(usual, like.dtype)
    # Private: Module.to cannot choose by dtype. If it moves, the first step raises AttributeError.
    estimator._apply(
        lambda tensor: tensor.to(like.device, wide if tensor.dtype == usual else tensor.dtype)
    )


@torch.no_grad()
def adopt_stored(site: str, estimator: Estimator) -> None:
    """Copy values from the parameter store that were loaded after the estimator's own.

    The store keeps them until ``show_parameters`` replaces them by the estimator's parameters.
    Frozen parameters keep their values.
    """
    adopted = False
    for key, parameter in _parameters(site, estimator):
        stored = dict(pyro.get_param_store().named_parameters()).get(key)
        if stored is None or stored is parameter or not parameter.requires_grad:
            continue
        if stored.shape == parameter.shape and is_newer(stored, estimator):
            parameter.copy_(stored)
            adopted = True
    if adopted:
        estimator.loaded_at = note_stored()


def show_parameters(site: str, estimator: Estimator) -> None:
    """Register the estimator's parameters in the store, replacing another estimator's."""
    store = pyro.get_param_store()
    for key, parameter in _parameters(site, estimator):
        # Otherwise the optimiser would step an unused tensor. (The store copies parameters that
        # are not contiguous, so it never holds those themselves.)
        foreign = key in store and store[key].unconstrained() is not parameter
        if foreign and parameter.is_contiguous():
            del store[key]
        note_own(parameter)
    with warnings.catch_warnings():
        # learn=False or the user freezes parameters on purpose.
        warnings.filterwarnings("ignore", ".* was not registered in the param store")
        pyro.module(f"{STORE_PREFIX}{site}", estimator)


def _parameters(site: str, estimator: Estimator) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in estimator.named_parameters():
        yield f"{STORE_PREFIX}{site}$$${name}", parameter


class LossModule(ELBOModule):
    """A loss with the parameters of model, guide and estimators, outside the parameter store.

    Estimators that only a run can find are registered at the first call. A state that was loaded
    before is then applied to them. Loading a state without an estimator leaves it unchanged.
    """

    elbo: ParticleELBO

    def __init__(self, model: nn.Module, guide: nn.Module, elbo: ParticleELBO) -> None:
        super().__init__(model, guide, elbo)
        self.estimators = nn.ModuleList(elbo.known_estimators(guide))
        self._waiting: dict[str, dict[str, Any]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = Call(self.model, self.guide, args, kwargs)
        if self._waiting:
            self._hold(self.elbo.find_estimators(call))
        training = self.training and torch.is_grad_enabled()
        loss, estimators = self.elbo.differentiable(call, training=training)
        self._hold(estimators)
        return loss

    def _hold(self, estimators: dict[str, Estimator]) -> None:
        held = set(self.modules())
        for estimator in dict.fromkeys(estimators.values()):
            if estimator not in held:
                state = self._waiting.pop(f"{len(self.estimators)}", None)
                if state is not None:
                    estimator.load_state_dict(state)
                self.estimators.append(estimator)

    def _save_to_state_dict(self, destination: Any, prefix: str, *rest: Any) -> None:
        super()._save_to_state_dict(destination, prefix, *rest)
        for number, state in self._waiting.items():
            for name, value in state.items():
                destination[f"{prefix}estimators.{number}.{name}"] = value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        start = f"{prefix}estimators."
        for key in [key for key in state_dict if key.startswith(start)]:
            number, _, name = key.removeprefix(start).partition(".")
            if int(number) >= len(self.estimators):
                self._waiting.setdefault(number, {})[name] = state_dict.pop(key)
        for key, value in self.estimators.state_dict(prefix=start).items():
            state_dict.setdefault(key, value)
        super()._load_from_state_dict(state_dict, prefix, *rest)
