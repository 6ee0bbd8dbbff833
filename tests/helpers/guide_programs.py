"""Programs of the tests of automatic guides."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

WEIGHTS = torch.tensor([0.2, 0.5, 0.3])
LOCS = torch.tensor([-2.0, 0.3, 1.5])
X = torch.tensor([-1.7, -0.2, 0.4, 2.5, 0.9])


def mixture(x: Tensor, size: int | None = None) -> None:
    """One latent one-hot per datum, in minibatches of ``size``."""
    with pyro.plate("data", len(x), subsample_size=size):
        batch = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS.to(x)))
        pyro.sample("x", dist.Normal(z @ LOCS.to(x), 1.0), obs=batch)


def log_joint(x: Tensor) -> Tensor:
    return WEIGHTS.to(x).log() + dist.Normal(LOCS.to(x), 1.0).log_prob(x[:, None])


def column(x: Tensor) -> Tensor:
    return x[:, None]


def mixed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z @ LOCS + b, 1.0), obs=x)
