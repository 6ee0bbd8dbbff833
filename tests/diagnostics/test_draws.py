"""Draws of gradients: the numbers are those of ``loss_and_grads``, labelled, repeatable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.toys import bit_guide, bit_model, bits, chain, draw
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyro_gumbel.diagnostics import (
    compare_gradients,
    exact_gradient,
    gradient_draws,
    guide_khat,
    train,
)
from pyro_gumbel.diagnostics._state import seeds
from pyro_gumbel.estimators import MovingAverage, Pathwise, ReinMax, Score
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_are_those_of_loss_and_grads(dtype: torch.dtype) -> None:
    problem = chain()
    problem.reset(dtype)
    drawn = draw(problem, {"reinmax": ReinMax()}, seed=3)["reinmax"]
    elbo, guide = Estimator_ELBO(), config_gradient(problem.guide, ReinMax())
    elbo.loss_and_grads(problem.model, guide)
    problem.gradients()
    for chain_number, seed in enumerate(seeds(3, 3)[1:]):
        pyro.set_rng_seed(seed)
        for number in range(5):
            loss = elbo.loss_and_grads(problem.model, guide)
            row = drawn.isel(chain=chain_number, draw=number)
            mine = np.concatenate([row[name].values.ravel() for name in problem.params])
            gradient = problem.gradients().numpy()
            np.testing.assert_array_equal(mine, gradient)
            assert float(row.coords["loss"]) == float(loss)
            assert float(row.coords["grad_norm"]) == pytest.approx(np.linalg.norm(gradient))


def untimed(dataset: xr.Dataset) -> xr.Dataset:
    """Leave out what the clock decides."""
    return dataset.drop_vars("seconds")


def test_same_seed_same_draws() -> None:
    problem = chain()
    problem.reset(torch.float32)
    estimators = {"score": "score", "pair": ({"b": ReinMax()}, Estimator_ELBO(2))}
    first = draw(problem, estimators, seed=5, site_draws=4)
    torch.rand(7)  # the global generator plays no part
    second = draw(problem, estimators, seed=5, site_draws=4)
    other = draw(problem, estimators, seed=6, site_draws=4)
    for label in estimators:
        xr.testing.assert_equal(untimed(first[label]), untimed(second[label]))
        assert not untimed(first[label]).equals(untimed(other[label]))
    assert not np.array_equal(first["score"]["w"][0], first["score"]["w"][1])  # chains differ


def test_parameters_not_made_yet_are_made_under_the_seed() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", lambda: torch.randn(()))))

    options = {"estimators": {"e": "enumerate"}, "num_draws": 2, "progress": False}
    one = gradient_draws(model, guide, **options)["e"]
    two = gradient_draws(model, guide, **options)["e"]
    xr.testing.assert_equal(untimed(one), untimed(two))
    np.testing.assert_allclose(one["l"], float(exact_gradient(model, guide)["l"]), rtol=1e-5)
    assert len(pyro.get_param_store()) == 0


def test_warmup_settles_a_baseline() -> None:
    problem = bits()
    problem.reset(torch.float32)
    first = draw(problem, {"s": "score"}, num_draws=6)["s"]
    later = draw(problem, {"s": "score"}, num_draws=4, num_warmup=2)["s"]
    np.testing.assert_array_equal(first["w"][:, 2:], later["w"])


def test_losses_that_are_pairs() -> None:
    estimators = {"rws": ReweightedWakeSleep(num_particles=2)}
    drawn = gradient_draws(
        bit_model, bit_guide, estimators=estimators, num_draws=3, progress=False
    )
    assert np.isfinite(drawn["rws"].coords["loss"]).all()
    optim = pyro.optim.SGD({"lr": 0.1})
    history = train(
        bit_model, bit_guide, estimators=estimators, optim=optim, num_steps=2, progress=False
    )
    assert np.isfinite(history.elbo).all()


def test_elbos_of_pyro() -> None:
    plain = gradient_draws(
        bit_model, bit_guide, estimators={"pyro": Trace_ELBO(2)}, num_draws=3, progress=False
    )["pyro"]
    exact = gradient_draws(
        bit_model,
        config_enumerate(bit_guide),
        estimators={"pyro": TraceEnum_ELBO(max_plate_nesting=0)},
        num_draws=3,
        progress=False,
    )["pyro"]
    assert plain.attrs["num_particles"] == 2
    np.testing.assert_allclose(
        exact["l"], float(exact_gradient(bit_model, bit_guide)["l"]), rtol=1e-5
    )


def test_progress_bar_can_be_silent(capsys: pytest.CaptureFixture) -> None:
    problem = bits()
    problem.reset(torch.float32)
    draw(problem, {"r": "reinmax"})
    silent = capsys.readouterr()
    assert silent.err == silent.out == ""
    draw(problem, {"r": "reinmax"}, progress=True)
    assert "10/10" in capsys.readouterr().err


ERRORS = [
    ({"estimators": {}}, ValueError, "estimators is empty"),
    ({"estimators": ReinMax()}, TypeError, "estimators must be a dict of labels"),
    ({"estimators": {"r": (ReinMax(), 4)}}, TypeError, r"must be \(config, ELBO\)"),
    ({"estimators": {"r": "reinmx"}}, ValueError, "Did you mean 'reinmax'"),
    ({"estimators": {"r": {"q": "score"}}}, ValueError, "has no latent site 'q'"),
    ({"num_draws": 0}, ValueError, "num_draws must be an integer of at least 1; got 0"),
    ({"num_chains": 0}, ValueError, "num_chains must be an integer of at least 1; got 0"),
    ({"project": 0}, ValueError, "project must be an integer of at least 1; got 0"),
    ({"num_warmup": -1}, ValueError, "num_warmup must be an integer of at least 0; got -1"),
    ({"site_draws": -1}, ValueError, "site_draws must be an integer of at least 0; got -1"),
    ({"seed": -1}, ValueError, "seed must not be negative"),
    ({"params": ["nothing"]}, ValueError, "no parameter is called 'nothing'"),
]


@pytest.mark.parametrize(("options", "error", "match"), ERRORS)
def test_errors(options: dict[str, Any], error: type[Exception], match: str) -> None:
    problem = bits()
    problem.reset(torch.float32)
    with pytest.raises(error, match=match):
        draw(problem, **({"estimators": {"s": Score()}} | options))


def test_error_names_the_estimator() -> None:
    problem = bits()
    problem.reset(torch.float32)
    with pytest.raises(ValueError, match="Enumerate") as caught:
        draw(problem, {"mine": "enumerate"})
    assert any("estimators['mine']" in note for note in caught.value.__notes__)


# The variance that each site answers for

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


@pytest.mark.cuda
@pytest.mark.parametrize("project", [None, 2])
def test_on_a_gpu(project: int | None) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6]).to(x)).to_event(1))
            pyro.sample("x", dist.Normal(z.prod(-1) + z.sum(-1), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        logits = pyro.param("l", torch.tensor([0.2, -0.5]).to(x))
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits).expand([len(x), 2]).to_event(1))

    x = torch.tensor([0.3, 1.2, -0.4], device="cuda")
    state = torch.cuda.get_rng_state_all()
    drawn = gradient_draws(
        model, guide, x, estimators={"s": "score", "r": "rebar"}, num_draws=200, project=project,
        site_draws=5, progress=False,
    )  # fmt: skip
    exact = exact_gradient(model, guide, x)
    table = compare_gradients(drawn, exact)
    assert table.bias_z.max() < 5
    assert drawn["s"].attrs["device"] == "cuda:0"
    assert guide_khat(model, guide, x, plate="n", num_samples=30).shape == (3,)
    assert all(map(torch.equal, state, torch.cuda.get_rng_state_all()))
