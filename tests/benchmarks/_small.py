"""Time small programs, which only Python's overhead slows, and plates of growing size."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _timing import Step, ratios, side_by_side
from _vaes import under_validation
from pyro.infer import SVI

from pyro_gumbel.estimators import ReinMax
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient

_numbers = itertools.count()  # for unique names in Pyro's parameter store


def bernoulli_step(svi_class: Any, data: torch.Tensor, *, validate: bool, **options: Any) -> Step:
    """Make a step with a Bernoulli site per datum, by the score function."""
    name = f"logits{next(_numbers)}"

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, device=x.device)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        logits = pyro.param(name, lambda: torch.zeros(len(x), device=x.device))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    elbo = Estimator_ELBO(max_plate_nesting=1)
    svi = svi_class(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo, **options)
    return under_validation(lambda: svi.step(data), validate)


def small_program(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    data = torch.randn(10, device=device)
    builds = {
        "SVI": lambda: bernoulli_step(SVI, data, validate=False),
        "SVI, checks": lambda: bernoulli_step(SVI, data, validate=True),
        "captured": lambda: bernoulli_step(CapturedSVI, data, validate=False),
        "captured, checks": lambda: bernoulli_step(CapturedSVI, data, validate=True),
    }
    rows = [("captured", "SVI", 0.3), ("captured, checks", "SVI, checks", 0.3)]
    if args.compile:
        name = "captured, compiled"
        builds[name] = lambda: bernoulli_step(CapturedSVI, data, validate=False, compile=True)
        rows.append((name, "SVI", 0.3))
    rounds = 2 if args.smoke else args.rounds
    rebuilds = 1 if args.smoke or args.compile else 3
    return ratios(
        side_by_side(builds, rounds=rounds, inner=20, rebuilds=rebuilds, device=device), rows
    )


def plate_step(size: int, device: torch.device) -> Step:
    """Make a step with a one-hot site for each element of a plate."""
    name = f"plate{next(_numbers)}"
    data = torch.randn(size, device=device)

    def model() -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(10, device=device)))
            mean = z @ torch.arange(10.0, device=device)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=data)

    def guide() -> None:
        logits = pyro.param(name, lambda: torch.zeros(size, 10, device=device))
        with pyro.plate("data", size):
            pyro.sample("z", dist.OneHotCategorical(logits=logits))

    elbo = Estimator_ELBO(max_plate_nesting=1)
    svi = SVI(model, config_gradient(guide, ReinMax()), pyro.optim.Adam({"lr": 0.01}), elbo)
    return svi.step


def sites_in_a_plate(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Compare seconds per element of plates of several sizes; they should not increase."""
    builds = {str(size): (lambda size=size: plate_step(size, device)) for size in (10, 100, 1000)}
    rounds = 2 if args.smoke else args.rounds
    seconds = side_by_side(builds, rounds=rounds, inner=5, rebuilds=1, device=device)
    each = {size: [second / int(size) for second in taken] for size, taken in seconds.items()}
    return ratios(each, [("100", "10", 1.3), ("1000", "10", 1.3)])
