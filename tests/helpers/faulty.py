"""Programs of one site, most of which do not fit together."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_gumbel.distributions import RelaxedOneHot
from pyro_gumbel.estimators import NeuralBaseline
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

P = torch.tensor([0.2, 0.3, 0.5])
LOGITS = P.log()
HALF = torch.tensor(0.5)


def site(fn, **infer):
    """A program of one site, made anew at each run."""

    def program(*args, **kwargs):
        return pyro.sample("z", fn(), infer=infer)

    return program


ONE_HOT = site(lambda: dist.OneHotCategorical(P))
BIT = site(lambda: dist.Bernoulli(0.3))
INDEX = site(lambda: dist.Categorical(P))
NORMAL = site(lambda: dist.Normal(0.0, 1.0))
RELAXED = site(lambda: RelaxedOneHot(HALF, probs=P))
PYRO_HARD = site(lambda: dist.RelaxedOneHotCategoricalStraightThrough(HALF, probs=P))
PYRO_HARD_BIT = site(lambda: dist.RelaxedBernoulliStraightThrough(HALF, probs=HALF))
PYRO_SOFT_BIT = site(lambda: dist.RelaxedBernoulli(HALF, probs=HALF))
PYRO_SOFT = site(lambda: dist.RelaxedOneHotCategorical(HALF, probs=P))


def step(model, guide, *args, elbo=None):
    """Take one step."""
    return lambda: (elbo or Estimator_ELBO()).loss_and_grads(model, guide, *args)


def with_gradient(program, estimator, **options):
    return step(program, config_gradient(program, estimator), elbo=Estimator_ELBO(**options))


def empty(*args):
    pass


def observed(*args):
    pyro.sample("z", dist.Bernoulli(0.3), obs=torch.tensor(1.0))


def misnamed(*args):
    pyro.sample("latent_z", dist.Bernoulli(0.3))


def plated(fn, size=2):
    def program(*args):
        with pyro.plate("rows", size):
            return pyro.sample("z", fn())

    return program


def enumerated_inside_observed_outside():
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3)))
    pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=HALF)


PLATED_ONE_HOT = plated(lambda: dist.OneHotCategorical(P.expand(2, 3)))
MISFIT = NeuralBaseline(nn.Linear(3, 7), lambda *args: P)
UNNAMED = NeuralBaseline(nn.Linear(3, 1), "pixels")


def named_arguments(images):
    ONE_HOT()
