"""Factors, deltas, structure that varies, random programs, other losses within."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

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
from pyro_gumbel.infer import Estimator_ELBO

# These live on the cost's gradient in the value.
GRADIENT_OF_THE_COST = ("Rebar*", "MuProp*", "DoubleControlVariate*", "Rodeo*")


@program(reference="enum")
def factors(n):
    """A factor in the model, and one in the guide that corrects a transformed value."""

    def model():
        with copies(n):
            b = bit("b", 0.2)
            s = pyro.sample("s", dist.LogNormal(0.3 * b, 0.8))
            pyro.factor("soft", -((s - b - 0.5) ** 2))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.3))
            u = normal("u", param("u", 0.2) + b, 0.7, infer={"is_auxiliary": True})
            pyro.sample("s", dist.Delta(u.exp(), log_density=-u))

    return model, guide


@program(reference="trace")
def factor_in_guide(n):
    """A density that the guide writes as a factor."""

    def model():
        with copies(n):
            b = bit("b", 0.2)
            z = normal("z", b, 1.0)
            normal("x", z, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            b = bit("b", param("b", -0.3))
            noise = torch.randn(b.shape)
            z = param("z", 0.4) + 0.6 * noise + 0.3 * b
            pyro.sample("z", dist.Delta(z))
            log_q = dist.Normal(param("z", 0.4) + 0.3 * b, 0.6).log_prob(z)
            pyro.factor("log_q", log_q, has_rsample=True)

    return model, guide


@program(
    reference="trace",
    vectorized=False,
    copies=1,
    draws=800,
    importance=False,
    refused=("captured*", "Enumerate*", "Rebar*"),
)
def varying_structure(n):
    """A second site that exists only if the first one is 1."""

    def model():
        b = bit("b", -0.2)
        loc = table(0.3)
        if b > 0:
            loc = loc + one_hot("z", table(0.2, -0.3, 0.4)) @ table(1.0, -0.5, 0.7)
        else:
            loc = loc + 0.3 * normal("y", 0.0, 1.0)
        normal("x", loc, 0.8, obs=table(1.2))

    def guide():
        if bit("b", param("b", 0.3)) > 0:
            one_hot("z", param("z", 0.3, 0.1, -0.2))
        else:
            normal("y", param("y", 0.4), 0.7)

    return model, guide


@program(reference="trace")
def dropout_and_noise(n):
    """A decoder in training mode, and noise that no site declares."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def model():
        pyro.module("net", net)
        with copies(n):
            z = one_hot("z", table(0.2, 0.1, -0.3))
            b = bit("b", 0.3)
            noise = 0.2 * torch.rand(b.shape)
            normal("x", net(z).squeeze(-1) + b + noise, 0.9, obs=torch.full((n,), 1.3))

    def guide():
        with copies(n):
            z = one_hot("z", param("z", 0.1, -0.4, 0.5))
            bit("b", param("b", 0.2) + (z * param("w", 0.3, 0.0, -0.5)).sum(-1))

    return model, guide


@program(reference="enum", refused=GRADIENT_OF_THE_COST)
def smooth_and_by_index(n):
    """A one-hot is used in a product and by its index."""

    def model():
        mean, extra = table(-1.0, 0.0, 2.0), table(1.5, -1.0, 0.3)
        with copies(n):
            z = pyro.sample("z", dist.OneHotCategorical(table(0.2, 0.3, 0.5)))
            normal("x", z @ mean + extra[z.argmax(-1)], 0.7, obs=torch.full((n,), 0.8))

    def guide():
        with copies(n):
            one_hot("z", param("z", 0.3, 0.0, -0.2))

    return model, guide


@program(reference="enum", refused=GRADIENT_OF_THE_COST)
def smooth_and_by_comparison(n):
    """A bit is used in a product and by a comparison, in the model and further down the guide."""

    def model():
        with copies(n):
            z = bit("z", -0.3)
            w = bit("w", 0.4 * z - 0.1)
            loc = z * 0.8 + torch.where(z > 0.5, 1.3, -0.4) + w
            normal("x", loc, 0.7, obs=torch.full((n,), 1.4))

    def guide():
        with copies(n):
            z = bit("z", param("z", 0.3))
            bit("w", torch.where(z > 0.5, param("hi", 0.5), param("lo", -0.6)) + 0.2 * z)

    return model, guide


def _loss_of_read_into_python(z_, b_):
    q, prior = z_.log_softmax(-1), table(0.3, -0.2, 0.1).log_softmax(-1)
    bits = table(0.0, 1.0)
    log_q = q.unsqueeze(-1) + dist.Bernoulli(logits=b_.unsqueeze(-1)).log_prob(bits)
    log_b = dist.Bernoulli(logits=table(0.2, -0.6, 0.9).unsqueeze(-1)).log_prob(bits)
    loc = table(-1.0, 0.4, 1.5).unsqueeze(-1) + bits
    log_p = prior.unsqueeze(-1) + log_b + dist.Normal(loc, 0.8).log_prob(table(0.9))
    return (log_q.exp() * (log_q - log_p)).sum()


@program(
    reference=_loss_of_read_into_python,
    vectorized=False,
    copies=1,
    draws=800,
    importance=False,
    refused=(*GRADIENT_OF_THE_COST, "captured*", "Enumerate*"),
)
def read_into_python(n):
    def model():
        z = category("z", table(0.3, -0.2, 0.1))
        b = bit("b", [0.2, -0.6, 0.9][int(z)])
        normal("x", [-1.0, 0.4, 1.5][z.item()] + b, 0.8, obs=table(0.9))

    def guide():
        z = category("z", param("z", 0.2, -0.4, 0.5))
        bit("b", param("b", 0.1, 0.4, -0.5)[int(z)])

    return model, guide


@program(
    reference="enum",
    importance=False,
    only=("looped", "vectorized", "default_score", "Enumerate", "ReinMax", "Score"),
)
def loss_within_a_guide(n):
    """A guide that reads a bound of its own, of other programs, by the same class of loss."""
    inner = Estimator_ELBO(2)

    def inner_model():
        normal("u", 0.0, 1.0)

    def inner_guide():
        normal("u", 0.3, 0.8)

    def model():
        with copies(n):
            z = bit("z", 0.2)
            normal("x", 2 * z, 0.9, obs=torch.full((n,), 1.1))

    def guide():
        with poutine.block():
            bound = inner.loss(inner_model, inner_guide)
        with copies(n):
            bit("z", param("z", -0.8) + 0.1 * bound)

    return model, guide


@program(reference="enum")
def delta_guide(n):
    """A point estimate beside a bit; a deterministic site in the model."""

    def model():
        w = normal("w", 0.0, 1.0)
        pyro.deterministic("twice", 2 * w)
        with copies(n):
            z = bit("z", 0.2)
            normal("x", w * (2 * z - 1), 1.0, obs=torch.full((n,), 0.8))

    def guide():
        pyro.sample("w", dist.Delta(param("w", 0.7)))
        with copies(n):
            bit("z", param("z", 0.3))

    return model, guide


@program(reference="trace", refused=("Enumerate*",))  # a vector of bits is one variable
def layers_of_bits(n):
    """A sigmoid belief network: vectors of bits as one event."""
    data = table(1.0, 0.0, 1.0)
    up, down = table([0.5, -0.8], [1.0, 0.3]), table([0.7, -1.0, 0.4], [0.2, 0.9, -0.6])

    def bits(name, logits):
        return pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1))

    def model():
        w = param("scale", 1.0)
        with copies(n):
            h = bits("h", table(0.2, -0.4))
            z = bits("z", h @ up)
            d = dist.Bernoulli(logits=w * (z @ down)).to_event(1)
            pyro.sample("x", d, obs=data.expand(n, 3))

    def guide():
        with copies(n):
            h = bits("h", param("h", 0.1, 0.3))
            bits("z", param("z", 0.4, -0.2) + h @ up.T)

    return model, guide


@program(reference="enum", refused=("Rebar*",))
def stops_by_masks(n):
    """Attend, infer, repeat: each step is there if the one before was."""

    def model():
        with copies(n):
            present, total = torch.ones(n), torch.zeros(n)
            for t in range(3):
                d = dist.Bernoulli(0.6 * present)
                present = pyro.sample(f"present_{t}", d.mask(present.bool()))
                d = dist.Normal(torch.zeros(n), 1.0)
                what = pyro.sample(f"what_{t}", d.mask(present.bool()))
                total = total + present * (1 + 0.3 * what)
            normal("x", total, 0.7, obs=torch.full((n,), 2.1))

    def guide():
        with copies(n):
            present = torch.ones(n)
            for t in range(3):
                d = dist.Bernoulli(param(f"present_{t}", 0.2).sigmoid() * present)
                present = pyro.sample(f"present_{t}", d.mask(present.bool()))
                loc = param(f"what_{t}", 0.3)
                d = dist.Normal(loc.expand(n), 0.8)
                pyro.sample(f"what_{t}", d.mask(present.bool()))

    return model, guide


@program(reference="enum", importance=False)
def point_by_its_score(n):
    """A point estimate whose guide asks for the score function, which it has not."""

    def model():
        w = normal("w", 0.0, 1.0)
        with copies(n):
            z = bit("z", 0.2)
            normal("x", w * (2 * z - 1), 1.0, obs=torch.full((n,), 0.8))

    def guide():
        pyro.sample("w", dist.Delta(param("w", 0.7)), infer={"gradient": "score"})
        with copies(n):
            bit("z", param("z", 0.3))

    return model, guide


@program(reference="trace", importance=False)
def normal_by_its_score(n):
    """A reparameterised site whose guide asks for the score function."""

    def model():
        with copies(n):
            z = normal("z", 0.2, 1.0)
            normal("x", z, 1.2, obs=torch.full((n,), 0.7))

    def guide():
        with copies(n):
            q = dist.Normal(param("z", -0.3), param("s", -0.2).exp())
            pyro.sample("z", q, infer={"gradient": "score"})

    return model, guide


@program(reference="enum")
def auxiliary_site_of_the_guide(n):
    """A guide with a site that the model lacks; its score is part of the cost."""

    def model():
        with copies(n):
            z = bit("z", 0.3)
            normal("x", 2 * z - 1, 1.0, obs=torch.full((n,), 1.3))

    def guide():
        with copies(n):
            z = bit("z", param("z", 0.3))
            bit("u", 1.5 * z - 2.0, infer={"is_auxiliary": True})

    return model, guide


@program(reference="trace", importance=False)
def prior_as_guide(n):
    """One function is model and guide; data come by ``condition``."""

    def joint():
        with copies(n):
            z = one_hot("z", param("z", 0.3, -0.2, 0.4))
            b = bit("b", (z * param("b", 0.5, -0.5, 0.1)).sum(-1))
            normal("x", (z * table(-1.0, 0.4, 1.5)).sum(-1) + b, 0.8)

    model = poutine.condition(joint, data={"x": torch.full((n,), 0.9)})
    return model, poutine.block(joint, hide=["x"])


OF_LABEL = table(-0.5, 0.0, 0.5)


def _loss_of_observed_in_the_guide(w_, y_, z_):
    label, bits = table(0.2, 0.1, -0.4).log_softmax(-1), table(0.0, 1.0)
    log_q = dist.Bernoulli(logits=z_.unsqueeze(-1)).log_prob(bits)
    log_z = dist.Bernoulli(logits=w_.unsqueeze(-1)).log_prob(bits)
    log_x = dist.Normal(bits + OF_LABEL.unsqueeze(-1), 0.8).log_prob(table(0.9))
    divergence = (log_q.exp() * (log_q - log_z - log_x)).sum(-1)
    return (y_.log_softmax(-1) - label + divergence).mean()


@program(reference=_loss_of_observed_in_the_guide, copies=999)
def observed_in_the_guide(n):
    """A label that is known in the guide, too; its density there is part of the loss.

    Pyro's losses take the known label for a draw.
    """
    label = torch.eye(3)[torch.arange(n) % 3]

    def model():
        with copies(n):
            y = one_hot("y", table(0.2, 0.1, -0.4), obs=label)
            z = bit("z", (y * param("w", 0.5, -0.3, 0.2)).sum(-1))
            normal("x", z + (y * OF_LABEL).sum(-1), 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n):
            y = one_hot("y", param("y", 0.3, 0.1, -0.2), obs=label)
            bit("z", (y * param("z", 0.4, -0.2, 0.6)).sum(-1))

    return model, guide


@program(reference="enum")
def annealed_divergence(n):
    """Latents scaled in model and guide, data not."""

    def model():
        with copies(n):
            with poutine.scale(scale=0.3):
                z = one_hot("z", table(0.3, -0.2, 0.1))
                m = normal("m", 0.0, 1.0)
            normal("x", (z * table(-1.0, 0.4, 1.5)).sum(-1) + m, 0.8, obs=torch.full((n,), 0.9))

    def guide():
        with copies(n), poutine.scale(scale=0.3):
            z = one_hot("z", param("z", 0.2, -0.4, 0.5))
            normal("m", param("m", 0.3) + (z * param("w", 0.2, -0.2, 0.1)).sum(-1), 0.6)

    return model, guide
