"""The shape of a guide's importance weights, where theory gives it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

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


def test_nothing_is_wrong_with_a_guide_that_is_the_posterior() -> None:
    assert guide_khat(*programs([1.0, 1.0, 1.0]), num_samples=50) == 0.0
    khats = guide_khat(*programs([1.0, 0.3, 1.0]), plate="n", num_samples=200)
    assert (khats.values == 0).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_is_no_tail(dtype: torch.dtype) -> None:
    """The posterior by its closed form: weights are equal but for the last digits."""
    x = torch.linspace(-3.0, 5.0, 200, dtype=dtype)

    def model() -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide() -> None:
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))

    assert guide_khat(model, guide, num_samples=100) == 0.0
    assert (guide_khat(model, guide, plate="n", num_samples=100) == 0).all()


def test_a_guide_that_draws_impossible_values_alone() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.where(z < 90.0, -math.inf, 0.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert guide_khat(model, guide, num_samples=50) == math.inf


def minibatches(size: int | None, scale: float = 1.0) -> tuple[Callable[[], None], ...]:
    """Sixty data points that are all alike; and the minibatches that were met."""
    seen: list[list[int]] = []

    @poutine.scale(scale=scale)
    def model() -> None:
        with pyro.plate("d", 60, subsample_size=size) as index:
            seen.append(index.tolist())
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(60)[index])

    @poutine.scale(scale=scale)
    def guide() -> None:
        with pyro.plate("d", 60, subsample_size=size):
            pyro.sample("z", dist.Normal(0.45, 0.65))

    return model, guide, seen


def test_a_minibatch_is_judged_as_the_whole_plate_is() -> None:
    model, guide, _ = minibatches(None)
    whole = guide_khat(model, guide, plate="d")
    model, guide, seen = minibatches(6)
    part = guide_khat(model, guide, plate="d")
    assert part.sizes == {"d": 6}
    error = (float(whole.var()) / 60 + float(part.var()) / 6) ** 0.5
    assert abs(float(whole.mean() - part.mean())) < 5 * error
    assert error < 0.1
    assert len(seen) >= 1000
    assert all(index == seen[0] for index in seen)


@pytest.mark.parametrize("plate", ["d", None])
@pytest.mark.parametrize("size", [6, None])
def test_scales_do_not_flatter(size: int | None, plate: str | None) -> None:
    """Weights are ratios of densities, whatever the loss is multiplied by."""
    plain, scaled = (
        guide_khat(*minibatches(size, scale)[:2], plate=plate, num_samples=100)
        for scale in (1.0, 1 / 60)
    )
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)


def test_a_latent_outside_a_subsampled_plate_is_warned_of() -> None:
    def model(size: int | None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("d", 8, subsample_size=size) as index:
            pyro.sample("x", dist.Normal(w, 1.0), obs=torch.ones(8)[index])

    def guide(size: int | None) -> None:
        pyro.sample("w", dist.Normal(0.9, 0.3))

    with pytest.warns(UserWarning, match="'w' is outside the plate 'd'.*2 of its 8 elements"):
        guide_khat(model, guide, 2, num_samples=50)
    assert guide_khat(model, guide, None, num_samples=50) < 0.7


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
