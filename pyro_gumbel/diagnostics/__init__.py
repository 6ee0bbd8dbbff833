"""Bias, variance and cost of gradient estimators, on a model of your own.

:func:`gradient_draws` and :func:`exact_gradient` make the data, :func:`compare_gradients` the
table, :func:`recommend` the choice. :func:`to_arviz` puts the draws into ArviZ's container.
"""

from pyro_gumbel.diagnostics.arviz import to_arviz
from pyro_gumbel.diagnostics.check import UnbiasedCheck, check_unbiased, guide_khat
from pyro_gumbel.diagnostics.compare import compare_gradients
from pyro_gumbel.diagnostics.draws import gradient_draws
from pyro_gumbel.diagnostics.exact import exact_gradient
from pyro_gumbel.diagnostics.plots import plot_efficiency, plot_gradients, plot_training
from pyro_gumbel.diagnostics.recommend import Recommendation, recommend
from pyro_gumbel.diagnostics.training import train

__all__ = [
    "Recommendation",
    "UnbiasedCheck",
    "check_unbiased",
    "compare_gradients",
    "exact_gradient",
    "gradient_draws",
    "guide_khat",
    "plot_efficiency",
    "plot_gradients",
    "plot_training",
    "recommend",
    "to_arviz",
    "train",
]
