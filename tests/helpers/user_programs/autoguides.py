"""Pyro's guides that write themselves, over positive, real and constrained sites."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import transforms as T
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)

from helpers.user_programs.program import bit, copies, normal, param, program, table


def positive_and_real(n):
    """A scale and a location for each replicate, three data each."""
    data = table(0.4, -0.9, 1.7).unsqueeze(-1)

    def model():
        with copies(n):
            scale = pyro.sample("scale", dist.LogNormal(-0.2, 0.5))
            loc = pyro.sample("loc", dist.Normal(0.3, 1.0))
            with pyro.plate("data", 3, dim=-2):
                normal("x", loc, 0.5 + scale, obs=data.expand(3, n))

    return model


def automatic(name, make, **options):
    """Register the guide of a class over the program above."""

    def programs(n):
        model = positive_and_real(n)
        return model, make(model)

    programs.__name__ = name
    program(**{"reference": "trace", "jitter": 0.2, "copies": 300, **options})(programs)


def wide(make):
    """Start from posteriors that are not narrow, whose scores have a large variance."""
    return lambda model: make(model, init_scale=0.4)


def _low_rank(model):
    return AutoLowRankMultivariateNormal(model, init_scale=0.4, rank=2)


def _inverse_autoregressive(model):
    return AutoIAFNormal(model, hidden_dim=[10])


def _coupling_flow(model):
    def flow(dim):
        return T.affine_coupling(dim, hidden_dims=[10])

    return AutoNormalizingFlow(model, flow)


def _planar_flow(model):
    """Without an inverse: the density of a value is that of a draw it remembers."""
    return AutoNormalizingFlow(model, T.planar)


def _gaussian(model):
    return AutoGaussian(model, backend="dense", init_scale=0.4)


def _structured(model):
    conditionals = {"scale": "normal", "loc": "mvn"}
    dependencies = {"loc": {"scale": "linear"}}
    return AutoStructured(model, conditionals=conditionals, dependencies=dependencies)


JOINT = {"copies": 4, "draws": 100}  # one distribution over all replicates
FLOW = {"copies": 2, "draws": 40, "jitter": 0.05}
automatic("auto_delta", AutoDelta)
automatic("auto_normal", wide(AutoNormal))
automatic("auto_diagonal_normal", wide(AutoDiagonalNormal))
automatic("auto_multivariate_normal", wide(AutoMultivariateNormal), **JOINT)
automatic("auto_low_rank", _low_rank, **JOINT)
automatic("auto_iaf", _inverse_autoregressive, **FLOW)
automatic("auto_laplace", AutoLaplaceApproximation)
# Doubly reparameterised gradients have tails that few draws do not show.
automatic("auto_gaussian", _gaussian, importance=False, **JOINT)
automatic("auto_coupling_flow", _coupling_flow, **FLOW)
automatic("auto_planar_flow", _planar_flow, refused=("StickingTheLanding*", "iw3_doubly*"), **FLOW)
automatic("auto_structured", _structured, **JOINT)


@program(
    reference="enum",
    jitter=0.2,
    copies=1,
    draws=200,
    only=("looped", "vectorized", "captured*", "Enumerate*", "iw*"),
)
def guide_list_with_a_function(n):
    def model():
        loc = normal("loc", 0.3, 1.0)
        z = bit("z", -0.4)
        with pyro.plate("data", 3):
            normal("x", loc + z, 0.9, obs=table(0.4, -0.9, 1.7))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["z"]), init_scale=0.4))
    guide.append(lambda: {"z": bit("z", param("z", 0.3))})
    return model, guide


@program(reference="trace", jitter=0.0, copies=60)
def easy_guide(n):
    model = positive_and_real(n)

    class Guide(EasyGuide):
        def guide(self):
            with self.plate("copies", n, dim=-1):
                pyro.sample("scale", dist.LogNormal(param("scale", -0.1), 0.4))
                self.map_estimate("loc")

    return model, Guide(model)


@program(reference="trace", jitter=0.2, copies=60)
def auto_normal_subsampled(n):
    data = table(0.4, -0.9, 1.7, 0.2, 1.1)

    def model():
        batch = pyro.plate("data", 5, subsample_size=2, dim=-1)
        with copies(n, dim=-2):
            loc = normal("loc", 0.3, 1.0)
            with batch as index:
                shift = normal("shift", loc, 0.8)
                normal("x", shift, 0.9, obs=data[index].expand(n, 2))

    return model, AutoNormal(model, init_scale=0.4)
