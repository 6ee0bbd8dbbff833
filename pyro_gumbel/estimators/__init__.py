"""Gradient estimators of sample sites, with their baselines and schedules."""

from pyro_gumbel.estimators.antithetic import ARMS, DisARM, DisARMTree
from pyro_gumbel.estimators.base import Branches, Call, Estimator, Route, Site
from pyro_gumbel.estimators.baselines import Baseline, LeaveOneOut, MovingAverage, NeuralBaseline
from pyro_gumbel.estimators.control_variates import DoubleControlVariate, MuProp, Rodeo
from pyro_gumbel.estimators.enumeration import Enumerate, LocalExpectation
from pyro_gumbel.estimators.pathwise import Pathwise
from pyro_gumbel.estimators.rao_blackwell import GumbelRao, ReinMaxRao
from pyro_gumbel.estimators.rebar import Rebar, Relax
from pyro_gumbel.estimators.schedules import Exponential, Linear, Schedule
from pyro_gumbel.estimators.score import Score
from pyro_gumbel.estimators.straight_through import (
    GappedStraightThrough,
    GumbelSoftmax,
    GumbelStraightThrough,
    ReinMax,
    StraightThrough,
)
from pyro_gumbel.estimators.without_replacement import SumAndSample, UnorderedSet

__all__ = [
    "ARMS",
    "Baseline",
    "Branches",
    "Call",
    "DisARM",
    "DisARMTree",
    "DoubleControlVariate",
    "Enumerate",
    "Estimator",
    "Exponential",
    "GappedStraightThrough",
    "GumbelRao",
    "GumbelSoftmax",
    "GumbelStraightThrough",
    "LeaveOneOut",
    "Linear",
    "LocalExpectation",
    "MovingAverage",
    "MuProp",
    "NeuralBaseline",
    "Pathwise",
    "Rebar",
    "ReinMax",
    "ReinMaxRao",
    "Relax",
    "Rodeo",
    "Route",
    "Schedule",
    "Score",
    "Site",
    "StraightThrough",
    "SumAndSample",
    "UnorderedSet",
]
