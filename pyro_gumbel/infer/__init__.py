"""Losses with a gradient estimator for each site, and loops that train by them."""

from pyro_gumbel.estimators.registry import estimator_names
from pyro_gumbel.infer._dependence import GradientWarning
from pyro_gumbel.infer._recover import recover
from pyro_gumbel.infer.captured_svi import CapturedSVI
from pyro_gumbel.infer.checkpoint import load_checkpoint, save_checkpoint
from pyro_gumbel.infer.config import config_gradient
from pyro_gumbel.infer.distributed import DistributedSVI
from pyro_gumbel.infer.elbo import Estimator_ELBO
from pyro_gumbel.infer.importance import ImportanceWeighted_ELBO
from pyro_gumbel.infer.relax import RelaxReparam

__all__ = [
    "CapturedSVI",
    "DistributedSVI",
    "Estimator_ELBO",
    "GradientWarning",
    "ImportanceWeighted_ELBO",
    "RelaxReparam",
    "config_gradient",
    "estimator_names",
    "load_checkpoint",
    "recover",
    "save_checkpoint",
]
