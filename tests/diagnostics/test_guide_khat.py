"""The shape of a guide's importance weights, where theory gives it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gumbel.diagnostics import guide_khat
from pyro_gumbel.estimators import GumbelSoftmax
from pyro_gumbel.infer import config_gradient

SIZE = 3


def programs(scales: list[float]) -> tuple[Callable[[], None], Callable[[], None]]:
    """A standard normal posterior in each of three data points, and guides of other widths."""

    def model() -> None:
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        with pyro.plate("n", SIZE):
            pyro.sample("z", dist.Normal(0.0, torch.tensor(scales)))

    return model, guide


def test_known_shapes() -> None:
    # The weights of a normal of variance s^2 < 1 against a standard one have the shape 1 - s^2.
    variances = np.array([0.1, 0.6, 4.0])
    khats = guide_khat(*programs(list(variances**0.5)), plate="n", num_samples=3000)
    assert khats.dims == ("n",)
    assert abs(float(khats[0]) - 0.9) < 0.35
    assert abs(float(khats[1]) - 0.4) < 0.35
    assert float(khats[2]) < 0.1  # bounded weights
    assert guide_khat(*programs(list(variances**0.5)), num_samples=1000) > 0.5


def test_guide_that_is_the_posterior() -> None:
    assert math.isnan(guide_khat(*programs([1.0, 1.0, 1.0]), num_samples=50))


def test_discrete_guide_is_drawn_hard() -> None:
    seen = []

    def model() -> None:
        seen.append(pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5]))))

    def guide() -> None:
        pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("l", torch.zeros(3))))

    configured = config_gradient(guide, GumbelSoftmax(0.5))
    guide_khat(model, configured, num_samples=50)
    assert all(set(z.tolist()) == {0.0, 1.0} for z in seen)


def test_same_seed_same_value() -> None:
    values = [guide_khat(*programs([0.5, 0.7, 0.9]), num_samples=60, seed=s) for s in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_samples": 10}, "num_samples must be an integer of at least 25; got 10"),
        ({"plate": "data", "num_samples": 30}, r"no plate is called 'data'; there are \['n'\]"),
    ],
)
def test_errors(options, match) -> None:
    with pytest.raises(ValueError, match=match):
        guide_khat(*programs([1.0, 1.0, 0.5]), **options)


def test_a_latent_that_is_missing_from_the_guide_is_told() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(0.4))

    with pytest.raises(ValueError, match="latent site 'w' is missing from the guide"):
        guide_khat(model, guide)
