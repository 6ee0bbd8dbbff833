"""Programs to diagnose: their exact gradients are found by brute force in ``problems``."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from helpers.problems import Problem, bit_values, one_hot_values
from pyro_gumbel.diagnostics import exact_gradient, gradient_draws


def like(values: Any, other: Tensor) -> Tensor:
    return torch.tensor(values, dtype=other.dtype)


def bit_model() -> None:
    """A bit, and a datum that it moves."""
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.4))


def bit_guide() -> None:
    """A guide of that bit."""
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))


def chain() -> Problem:
    """A global one-hot, a local one-hot given it in a scaled plate, a masked local bit."""
    mask = torch.tensor([True, False])

    def model() -> None:
        w = pyro.param("w")
        a = pyro.sample("a", dist.OneHotCategorical(like([0.1, 0.2, 0.7], w)))
        push = (a * like([0.4, -0.8, 0.1], w)).sum(-1)
        with pyro.plate("n", 2), poutine.scale(scale=1.7):
            prior = push.unsqueeze(-1) * like([1.0, -1.0, 0.5], w) + like([0.5, -0.5, -1.0], w)
            b = pyro.sample("b", dist.OneHotCategorical(logits=prior))
            f = (b * like([0.3, -1.0, 1.4], w)).sum(-1)
            with poutine.mask(mask=mask):
                c = pyro.sample("c", dist.Bernoulli(logits=0.5 * f - 1))
            pyro.sample("x", dist.Normal(w * f + c * push, 0.8), obs=like([1.1, -0.6], w))

    def guide() -> None:
        a = pyro.sample("a", dist.OneHotCategorical(logits=pyro.param("a_logits")))
        push = (a * like([0.5, -0.3, 0.2], a)).sum(-1)
        with pyro.plate("n", 2), poutine.scale(scale=1.7):
            logits = pyro.param("b_logits") + push.unsqueeze(-1) * like([1.0, 0.0, -1.0], a)
            b = pyro.sample("b", dist.OneHotCategorical(logits=logits))
            with poutine.mask(mask=mask):
                pyro.sample("c", dist.Bernoulli(logits=pyro.param("c_logit") + 0.7 * b[..., 0]))

    params = {
        "w": torch.tensor(0.9),
        "a_logits": torch.tensor([0.3, 0.1, -0.4]),
        "b_logits": torch.tensor([[0.2, 0.6, -0.1], [-0.4, 0.3, 0.8]]),
        "c_logit": torch.tensor(0.4),
    }
    supports = {"a": one_hot_values((), 3), "b": one_hot_values((2,), 3), "c": bit_values((2,))}
    return Problem(model, guide, params, supports)


def bits(size: int = 2) -> Problem:
    """Bits bundled by to_event in each of two data points, and a likelihood that joins them."""

    def model() -> None:
        scale = pyro.param("w")
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Bernoulli(like([0.3] * size, scale)).to_event(1))
            mean = scale * z.prod(-1) + z.sum(-1) ** 2
            pyro.sample("x", dist.Normal(mean, 1.3), obs=like([0.8, 3.0], scale))

    def guide() -> None:
        with pyro.plate("n", 2):
            logits = pyro.param("logits")
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    params = {"w": torch.tensor(0.7), "logits": torch.linspace(-0.6, 0.9, 2 * size).view(2, size)}
    return Problem(model, guide, params, {"z": bit_values((2, size))})


def summed_plate() -> Problem:
    """A likelihood outside the latents' plate, which cannot be summed element by element."""

    def model() -> None:
        w = pyro.param("w")
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(like([0.3, 0.5, 0.6], w)))
        pyro.sample("x", dist.Normal(w * z.sum(-1) ** 2, 1.0), obs=like(1.3, w))

    def guide() -> None:
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits")))

    params = {"w": torch.tensor(0.7), "logits": torch.tensor([0.1, -0.4, 0.9])}
    return Problem(model, guide, params, {"z": bit_values((3,))})


def nested_plates() -> Problem:
    """Latents in a plate that the likelihood joins, inside one that it does not."""

    def model() -> None:
        w = pyro.param("w")
        with pyro.plate("n", 2, dim=-1):
            with pyro.plate("k", 2, dim=-2):
                z = pyro.sample("z", dist.Bernoulli(like(0.4, w)))
            total = (z * like([[1.0], [2.0]], w)).sum(-2, keepdim=True)
            pyro.sample("x", dist.Normal(w * total**2, 1.0), obs=like([[1.3, 0.2]], w))

    def guide() -> None:
        with pyro.plate("n", 2, dim=-1), pyro.plate("k", 2, dim=-2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits")))

    params = {"w": torch.tensor(0.7), "logits": torch.tensor([[0.1, -0.4], [0.9, 0.3]])}
    return Problem(model, guide, params, {"z": bit_values((2, 2))})


def looped() -> Problem:
    """A model that reads its latent by Python: no two states fit into one run."""

    def model() -> None:
        w = pyro.param("w")
        z = pyro.sample("z", dist.Bernoulli(like([0.3, 0.6], w)).to_event(1))
        mean = w * 2.0 if z[0] > 0 else w - z[1]
        pyro.sample("x", dist.Normal(mean, 1.0), obs=like(1.3, w))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits")).to_event(1))

    params = {"w": torch.tensor(0.7), "logits": torch.tensor([0.1, -0.4])}
    return Problem(model, guide, params, {"z": bit_values((2,))})


PROBLEMS = {
    "chain": chain,
    "bits": bits,
    "summed_plate": summed_plate,
    "nested_plates": nested_plates,
    "looped": looped,
}


def drawn(**options: Any) -> tuple[dict[str, xr.Dataset], xr.Dataset]:
    """Labelled draws of two estimators, and the exact gradient."""
    problem = chain()
    problem.reset(torch.float32)
    named = {"dims": {"b_logits": ["row", "category"]}, "coords": {"category": ["x", "y", "z"]}}
    named |= {key: options.pop(key) for key in ("dims", "coords") if key in options}
    draws = gradient_draws(
        problem.model,
        problem.guide,
        estimators={"score": "score", "reinmax": "reinmax"},
        **({"num_draws": 20, "progress": False} | named | options),
    )
    return draws, exact_gradient(problem.model, problem.guide, **named)


def draw(problem: Problem, estimators: dict[str, Any], **options: Any) -> dict[str, xr.Dataset]:
    """Draw a few gradients."""
    options = {"num_draws": 5, "num_chains": 2, "progress": False, "site_draws": 0} | options
    return gradient_draws(problem.model, problem.guide, estimators=estimators, **options)
