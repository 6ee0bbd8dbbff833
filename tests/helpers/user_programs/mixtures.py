"""Mixtures: in the guide, marginal in the model, by assignments."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from helpers.user_programs.program import (
    bit,
    category,
    copies,
    normal,
    one_hot,
    param,
    program,
    table,
)


@program(reference="trace")
def mixture_same_family_in_guide(n):
    """Its draws are not reparameterised."""

    def model():
        with copies(n):
            b = bit("b", 0.2)
            z = normal("z", b - 0.5, 1.0)
            normal("x", z, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.3))
            loc = param("loc", -0.6, 0.9) + 0.3 * b.unsqueeze(-1)
            parts = dist.Normal(loc, table(0.6, 0.8))
            weights = dist.Categorical(logits=param("w", 0.3, -0.2) * torch.ones_like(loc))
            pyro.sample("z", dist.MixtureSameFamily(weights, parts))

    return model, guide


@program(reference="enum", refused=("Rebar*",))
def masked_mixture_in_guide(n):
    def model():
        with copies(n):
            b = bit("b", 0.2)
            z = normal("z", b - 0.5, 1.0)
            normal("x", z, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.3))
            low = dist.Normal(param("low", -0.6), 0.6).expand(b.shape)
            high = dist.Normal(param("high", 0.9), 0.8).expand(b.shape)
            pyro.sample("z", dist.MaskedMixture(b.bool(), low, high))

    return model, guide


@program(reference="trace")
def diagonal_mixture_in_guide(n):
    """Pyro's reparameterised mixture of normals, with derivatives of its own.

    Its derivatives in the weights are no gradients of expectations (of the first two values'
    product, say), so the weights are fixed.
    """

    def model():
        with copies(n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            normal("x", z.prod(-1), 0.8, obs=torch.full((n,), 0.9))

    def guide():
        locs = pyro.param("locs", table([-0.6, 0.3], [0.9, 0.5]))
        scales = pyro.param("scales", torch.full((2, 2), 0.7), constraint=constraints.positive)
        with copies(n):
            pyro.sample("z", dist.MixtureOfDiagNormals(locs, scales, table(0.3, -0.2)))

    return model, guide


@program(reference="enum")
def gaussian_mixture(n):
    """Weights, locations and assignments; data in a plate inside the replicates."""
    data = table(-1.2, -0.7, 1.5, 1.9)

    def model():
        with copies(n, dim=-2):
            w = pyro.sample("w", dist.Dirichlet(table(1.0, 1.0)))
            locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.5).to_event(1))
            with pyro.plate("data", 4, dim=-1):
                z = pyro.sample("z", dist.OneHotCategorical(w))
                normal("x", (z * locs).sum(-1), 0.6, obs=data.expand(n, 4))

    def guide():
        with copies(n, dim=-2):
            pyro.sample("w", dist.Dirichlet(param("w", 0.6, 0.9).exp()))
            locs = dist.Normal(param("locs", -0.8, 1.3), param("scales", 0.3, 0.4).exp() / 4)
            locs = pyro.sample("locs", locs.to_event(1))
            with pyro.plate("data", 4, dim=-1):
                score = param("gain", 1.0) * locs * data.unsqueeze(-1)
                one_hot("z", score + param("z", 0.2, -0.1))

    return model, guide


@program(reference="enum")
def marginal_mixture_observed(n):
    """The model's likelihood is a mixture whose component is summed out by its family."""

    def model():
        with copies(n):
            z = category("z", table(0.2, 0.0, -0.3))
            logits = table([0.5, 0.0], [0.0, 0.5], [-1.0, 1.0])[z]
            parts = dist.Normal(table(-0.5, 1.2).expand(logits.shape), table(0.6, 0.8))
            d = dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)
            pyro.sample("x", d, obs=torch.full((n,), 0.8))

    def guide():
        with copies(n):
            category("z", param("z", 0.1, -0.2, 0.4))

    return model, guide
