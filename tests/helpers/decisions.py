"""Models, guides and arguments of which it is known what estimator suits them."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from helpers.toys import bits, chain
from pyro_gumbel.diagnostics import Recommendation, recommend


def small():
    """Few states, in a plate: all of them can be summed."""
    problem = chain()
    problem.reset(torch.float32)
    return problem.model, problem.guide, ()


def black_box():
    """A table of costs, read by an index: no gradient passes."""
    table = 2 * torch.randn(2**5, generator=torch.Generator().manual_seed(1))

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.full((5,), 0.4)).to_event(1))
        pyro.factor("f", table[(z.detach().long() * 2 ** torch.arange(5)).sum(-1)])

    def guide() -> None:
        logits = pyro.param("l", torch.tensor([0.3, -0.2, 0.5, 0.0, 0.1]))
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide, ()


def decoder():
    """Sixteen latents of eight categories for each of fifty images, through networks."""
    latents, categories, pixels = 16, 8, 64
    encoder = nn.Sequential(nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, latents * categories))
    network = nn.Sequential(nn.Linear(latents * categories, 64), nn.ReLU(), nn.Linear(64, pixels))
    x = (torch.rand(50, pixels) < torch.rand(pixels)).float()

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", network)
        with pyro.plate("n", len(x)):
            prior = dist.OneHotCategorical(logits=torch.zeros(latents, categories))
            z = pyro.sample("z", prior.to_event(1))
            pixel = dist.Bernoulli(logits=network(z.flatten(-2)))
            pyro.sample("x", pixel.to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("n", len(x)):
            logits = encoder(x).unflatten(-1, (latents, categories))
            pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))

    return model, guide, (x,)


def continuous():
    """Reparameterised latents."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z**2).sum(-1), 1.0), obs=torch.tensor(2.0))

    def guide() -> None:
        loc = pyro.param("m", torch.full((5,), 0.3))
        scale = pyro.param("s", torch.ones(5), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide, ()


def bits_program():
    problem = bits()
    problem.reset(torch.float32)
    return problem.model, problem.guide, ()


def quick(make=small, **options: Any) -> Recommendation:
    """Recommend within a small budget."""
    model, guide, args = make()
    return recommend(
        model, guide, *args, **({"budget_evaluations": 500, "progress": False} | options)
    )
