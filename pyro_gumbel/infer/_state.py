"""State that outlives a step: generators, schedules and parameters of estimators."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyro_gumbel.distributions._base import tensor_of
from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.estimators._module import STORE_PREFIX, is_newer, note_own, note_stored

if TYPE_CHECKING:
    from pyro_gumbel.infer.elbo import ParticleELBO

__all__ = [
    "LossModule",
    "adopt_stored",
    "advance_schedules",
    "finish_step",
    "generator_states",
    "meet_site",
    "preserved_rng",
    "set_generator_states",
    "show_parameters",
    "sole_step",
]

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


def generator_states() -> tuple[dict, list[torch.Tensor]]:
    """Return the states of Python's, NumPy's and torch's generators, those of CUDA included."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return pyro.util.get_rng_state(), cuda


def set_generator_states(states: tuple[dict, list[torch.Tensor]]) -> None:
    """Restore what :func:`generator_states` returned."""
    own, cuda = states
    pyro.util.set_rng_state(own)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


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
