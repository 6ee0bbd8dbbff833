"""Guides that run the model and choose a posterior at each site."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
)

from helpers.user_programs.autoguides import automatic, positive_and_real, wide
from helpers.user_programs.program import bit, copies, normal, program, table

automatic("auto_normal_messenger", wide(AutoNormalMessenger))
automatic("auto_hierarchical_messenger", wide(AutoHierarchicalNormalMessenger))
automatic("auto_regressive_messenger", wide(AutoRegressiveMessenger))


@program(reference="trace", jitter=0.2, copies=300)
def custom_messenger(n):
    """A messenger guide that overrides one posterior and reads a value upstream."""

    class Mine(AutoNormalMessenger):
        def get_posterior(self, name, prior):
            if name == "loc":
                weight = pyro.param("weight", torch.tensor(0.4))
                return dist.Normal(0.3 + weight * self.upstream_value("scale"), 0.5)
            return super().get_posterior(name, prior)

    model = positive_and_real(n)
    return model, Mine(model, init_scale=0.4)


@program(reference="trace", jitter=0.2, copies=300)
def messenger_with_a_bit(n):
    """A messenger guide whose override at a discrete site is a Bernoulli."""
    data = table(0.4, -0.9, 1.7).unsqueeze(-1)

    class Mine(AutoNormalMessenger):
        def get_posterior(self, name, prior):
            if name == "b":
                return dist.Bernoulli(logits=pyro.param("odds", torch.tensor(0.3)))
            return super().get_posterior(name, prior)

    def model():
        with copies(n):
            b = bit("b", -0.2)
            loc = normal("loc", b, 1.0)
            with pyro.plate("data", 3, dim=-2):
                normal("x", loc, 0.9, obs=data.expand(3, n))

    return model, Mine(model, init_scale=0.4)
