"""Medians and quantiles of automatic guides."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from helpers.guide_programs import WEIGHTS, X
from torch import Tensor

from pyro_gumbel.guides import AutoAmortized


def test_median_and_quantiles_of_a_beta() -> None:
    """Which keeps its parameters in a distribution of another family."""

    def model(x: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(share))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = AutoAmortized(model, lambda x: x, gradient="score")
    x = torch.randn(5, 2)
    guide(x)
    assert 0 < guide.median(x)["share"] < 1
    low, high = guide.quantiles([0.1, 0.9], x)["share"]
    assert 0 < low < high < 1


def test_median_and_quantiles() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
            pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("n", dist.LogNormal(1.0, 2.0))
            pyro.sample("u", dist.Uniform(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = AutoAmortized(model, lambda x: torch.zeros(len(x), 1))
    state = torch.get_rng_state()
    median = guide.median(X)
    assert torch.equal(median["z"], torch.tensor([0.0, 1.0, 0.0]).expand(5, 3))
    assert torch.equal(median["b"], torch.zeros(5))
    assert torch.equal(median["k"], torch.ones(5, dtype=torch.long))
    torch.testing.assert_close(median["n"], torch.full((5,), 1.0).exp())
    assert median["u"].shape == (5, 2)
    quantiles = guide.quantiles([0.25, 0.5, 0.75], X)
    assert set(quantiles) == {"rate", "b", "k", "n", "u"}
    torch.testing.assert_close(quantiles["n"][1], median["n"])
    normal = torch.distributions.Normal(1.0, 2.0)
    torch.testing.assert_close(
        quantiles["n"][:, 0], normal.icdf(torch.tensor([0.25, 0.5, 0.75])).exp()
    )
    assert quantiles["b"][:, 0].tolist() == [0.0, 0.0, 1.0]
    assert quantiles["k"][:, 0].tolist() == [1, 1, 2]
    assert quantiles["u"].shape == (3, 5, 2)
    torch.testing.assert_close(quantiles["u"][1], median["u"])
    assert (quantiles["rate"].diff() > 0).all()
    assert torch.get_rng_state().shape == state.shape
