"""The loss of two programs that are modules, as a module with all that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyro_gumbel.estimators import Call

if TYPE_CHECKING:
    from pyro_gumbel.infer.particle_elbo import ParticleELBO

__all__ = ["LossModule"]


class LossModule(ELBOModule):
    """Holds the programs' parameters and the estimators'."""

    elbo: ParticleELBO

    def __init__(self, model: nn.Module, guide: nn.Module, elbo: ParticleELBO) -> None:
        super().__init__(model, guide, elbo)
        self.estimators = nn.ModuleList(elbo.known_estimators(guide))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        loss, estimators = self.elbo.differentiable(Call(self.model, self.guide, args, kwargs))
        held = set(self.estimators)
        self.estimators.extend(e for e in dict.fromkeys(estimators.values()) if e not in held)
        return loss
