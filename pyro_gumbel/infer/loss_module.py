"""The loss of a model and a guide as a module that holds all trained parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyro_gumbel.estimators import Call, Estimator

if TYPE_CHECKING:
    from pyro_gumbel.infer.particle_elbo import ParticleELBO

__all__ = ["LossModule"]


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
