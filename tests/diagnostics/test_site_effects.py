"""The variance that each site answers for: against what enumeration of its noise gives."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gumbel.diagnostics import compare_gradients, gradient_draws
from pyro_gumbel.estimators import MovingAverage, Pathwise, Score

P = 0.4  # of the bit that the guide draws


def quiet_model() -> None:
    pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(0.0, 1.0))


def additive_model() -> None:
    z = pyro.sample("z", dist.Bernoulli(0.5))
    y = pyro.sample("y", dist.Normal(0.0, 1.0))
    pyro.factor("f", 3.0 * z + 0.5 * y**2)


def additive_guide() -> None:
    # Pathwise at y: the gradient by "m" has the noise of y alone, that by "l" of both.
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(P).logit())))
    pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.7)), 1.0))


def exact_effects() -> dict[str, float]:
    """By enumeration of z and Gauss-Hermite quadrature of y, of the score's gradient at z."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    probs = np.array([1 - P, P])
    z = np.array([0.0, 1.0])[:, None]
    noise = nodes[None, :]
    y = 0.7 + noise
    # The cost of each value, and the score of z; y's own terms are log p - log q there.
    cost = np.log(0.5 / probs)[:, None] + 3.0 * z + 0.5 * y**2 - 0.5 * y**2 + 0.5 * noise**2
    g_l = cost * (z - P)
    joint = probs[:, None] * weights[None, :]
    mean_over_z = (probs[:, None] * g_l).sum(0, keepdims=True)
    mean_over_y = (g_l * weights).sum(1, keepdims=True)
    return {
        "z": float((joint * (g_l - mean_over_z) ** 2).sum()),
        # By "m": d/dm of log p(y) - log q(y) + y^2 / 2 along y = m + noise has no noise.
        "y": float((joint * (g_l - mean_over_y) ** 2).sum()),
    }


def test_effects_are_exact_on_average() -> None:
    draws = gradient_draws(
        additive_model,
        additive_guide,
        estimators={"e": {"z": Score(), "y": "pathwise"}},
        num_draws=50,
        site_draws=300,
        progress=False,
    )
    table = compare_gradients(draws, by="site")
    for site, exact in exact_effects().items():
        row = table.loc[("e", site)]
        assert abs(row.variance - exact) < 5 * row.variance_mcse + 1e-5
        assert row.variance_mcse < 0.25 * exact
    shares = table.share
    total = compare_gradients(draws).loc["e", "variance"]
    np.testing.assert_allclose(shares, table.variance / total)


def test_site_without_noise_has_share_zero() -> None:
    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))
        pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    draws = gradient_draws(
        quiet_model,
        guide,
        estimators={"e": {"z": "enumerate", "y": Pathwise(sticking_the_landing=True)}},
        num_draws=20,
        site_draws=10,
        progress=False,
    )
    table = compare_gradients(draws, by="site")
    assert table.loc[("e", "z"), "variance"] == 0
    assert table.loc[("e", "y"), "variance"] == 0  # guide and model are equal there


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("estimator", ["disarm", pytest.param("rebar", marks=pytest.mark.slow)])
def test_all_noise_is_some_sites(estimator: str, vectorize: bool) -> None:
    """Renewing each of two independent sites in turn: effects add up to the variance."""

    def model() -> None:
        with pyro.plate("n", 3):
            for name in ("u", "v"):
                z = pyro.sample(name, dist.Bernoulli(0.3))
                pyro.factor(f"f_{name}", z * torch.tensor([1.0, -2.0, 0.5]))

    def guide() -> None:
        with pyro.plate("n", 3):
            for name in ("u", "v"):
                logits = pyro.param(name + "_l", torch.tensor([-0.5, 0.3, 1.0]))
                pyro.sample(name, dist.Bernoulli(logits=logits))

    draws = gradient_draws(
        model,
        guide,
        estimators={"e": estimator},
        num_draws=60,
        vectorize_particles=vectorize,
        site_draws=80,
        progress=False,
    )
    effects = draws["e"].coords["site_effect"]
    # The noise of u reaches v's gradient through the cost, so effects are at least the whole.
    total = compare_gradients(draws).loc["e"]
    both = effects.sum("parameter").mean("repeat")
    error = effects.sum("parameter").std("repeat").max() / 80**0.5
    assert float(both.sum()) > total.variance - 5 * (2 * error + total.variance_mcse)
    assert (both > 0).all()


def test_estimators_start_each_repetition_alike() -> None:
    """With a moving average that went on moving, even unchanged noise would give a distance."""

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))
        pyro.sample("idle", dist.Bernoulli(0.5), infer={"gradient": "enumerate"})

    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("idle", dist.Bernoulli(0.5))

    draws = gradient_draws(
        model,
        guide,
        estimators={"e": {"z": Score(MovingAverage())}},
        num_draws=20,
        site_draws=20,
        progress=False,
    )
    table = compare_gradients(draws, by="site")
    assert table.loc[("e", "idle"), "variance"] == 0
    assert table.loc[("e", "z"), "variance"] > 0


def test_number_of_repetitions() -> None:
    options = {"estimators": {"e": "score"}, "num_draws": 100, "num_chains": 2, "progress": False}
    default = gradient_draws(additive_model, additive_guide, **options)["e"]
    assert default.sizes["repeat"] == round(0.05 * 200 / 3)
    none = gradient_draws(additive_model, additive_guide, site_draws=0, **options)["e"]
    assert "site_effect" not in none.coords
    some = gradient_draws(additive_model, additive_guide, site_draws=7, **options)["e"]
    assert some.coords["site_effect"].shape == (2, 7, 2)
    np.testing.assert_array_equal(none["l"], some["l"])
