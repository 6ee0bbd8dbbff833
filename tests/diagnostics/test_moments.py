"""Moments of draws, and the test of a bias that rests on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_gumbel.diagnostics._moments import Block, Moments, blocks_of
from pyro_gumbel.diagnostics.compare import bias_of, two_sided_z


def correlated(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal draws of five coordinates of very different variance that share a factor."""
    scales = np.array([3.0, 1.0, 0.5, 0.1, 0.01])
    noise = rng.normal(size=(*shape, 5)) + 0.8 * rng.normal(size=(*shape, 1))
    return scales * noise


@pytest.mark.parametrize("law", ["normal", "discrete"])
def test_trace_of_the_squared_covariance(law: str) -> None:
    rng = np.random.default_rng(2)
    if law == "normal":
        draws = correlated((40_000,), rng)
        scales = np.array([3.0, 1.0, 0.5, 0.1, 0.01])
        covariance = np.outer(scales, scales) * (np.eye(5) + 0.64)
    else:
        probs = np.array([0.7, 0.2, 0.05, 0.04, 0.01])
        draws = np.eye(5)[rng.choice(5, size=40_000, p=probs)]
        covariance = np.diag(probs) - np.outer(probs, probs)
    estimates = []
    for part in np.split(draws, 50):
        moments = Moments([3, 2])
        for batch in np.array_split(part, 25):
            moments.update(torch.from_numpy(batch))
        trace, _, square_trace = moments.spreads().T
        estimates.append([*square_trace, *trace])
    exact = [
        np.trace(block @ block) for block in (covariance[:3, :3], covariance[3:, 3:], covariance)
    ]
    exact += [np.trace(block) for block in (covariance[:3, :3], covariance[3:, 3:], covariance)]
    estimates = np.array(estimates)
    z = (estimates.mean(0) - exact) / (estimates.std(0) / 50**0.5)
    assert np.abs(z).max() < 5  # 50 estimates of 800 draws each
    assert (estimates.std(0) / 50**0.5 < 0.05 * np.abs(exact)).all()


def test_equal_draws_have_variance_zero() -> None:
    moments = Moments([4])
    row = torch.tensor([[0.1, 1e8, -3e-7, 2.0]])
    for _ in range(3):
        moments.update(row.expand(7, 4))
    assert (moments.spreads() == 0).all()
    assert torch.equal(moments.mean, row[0].double())


def test_far_tails_of_the_bias_test() -> None:
    zero = np.zeros(1)
    exact = Block(zero, zero, zero, np.inf, 0.0, 0.0, 0.0)
    for distance in (0.05, 0.3, 3.0, 300.0):
        drawn = Block(zero + distance, zero + 1, zero, 100, 1.0, 0.0, 1.0)
        found = bias_of(drawn, exact, 0.0)
        assert two_sided_z([found.log_tail]) == pytest.approx(distance * 10, rel=1e-6)


def test_draws_that_carry_the_variance() -> None:
    rng = np.random.default_rng(0)
    few = np.zeros(300)
    few[[7, 50, 51, 222]] = 9.0
    laws = {100: rng.normal(size=300), 4: few, 300: np.arange(300) % 2, 0: np.full(300, 0.1)}
    for expected, values in laws.items():
        draws = xr.Dataset({"a": (("chain", "draw"), values.astype(float)[None])})
        assert blocks_of(draws)["all"].carriers == pytest.approx(expected, rel=0.2)
