"""How a gradient passes through a sample site: one class a choice."""

from pyro_gumbel.estimators.base import Call, Estimator, Site, SiteReader
from pyro_gumbel.estimators.baselines import Baseline, LeaveOneOut, MovingAverage, NeuralBaseline
from pyro_gumbel.estimators.pathwise import Pathwise
from pyro_gumbel.estimators.rao import GumbelRao, ReinMaxRao
from pyro_gumbel.estimators.schedules import Exponential, Linear, Schedule
from pyro_gumbel.estimators.score import Score
from pyro_gumbel.estimators.straight_through import (
    GappedStraightThrough,
    GumbelSoftmax,
    GumbelStraightThrough,
    ReinMax,
    StraightThrough,
)
from pyro_gumbel.estimators.sums import Enumerate

__all__ = [
    "Baseline",
    "Call",
    "Enumerate",
    "Estimator",
    "Exponential",
    "GappedStraightThrough",
    "GumbelRao",
    "GumbelSoftmax",
    "GumbelStraightThrough",
    "LeaveOneOut",
    "Linear",
    "MovingAverage",
    "NeuralBaseline",
    "Pathwise",
    "ReinMax",
    "ReinMaxRao",
    "Schedule",
    "Score",
    "Site",
    "SiteReader",
    "StraightThrough",
]
