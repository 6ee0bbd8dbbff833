"""Draws of gradients: the numbers are those of ``loss_and_grads``, labelled, repeatable."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.toys import bits, chain, draw
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam

from pyro_gumbel.diagnostics import (
    compare_gradients,
    exact_gradient,
    gradient_draws,
    guide_khat,
    train,
)
from pyro_gumbel.diagnostics._state import seeds
from pyro_gumbel.estimators import ReinMax, Score, StraightThrough
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


@pytest.mark.parametrize(
    ("choice", "evaluations"),
    [
        ("reinmax", 1),
        ("gumbel_softmax", 2),  # hard draws for the loss
        ("enumerate", 3 * 3 * 2),
        (Estimator_ELBO(3), 3),
        (Estimator_ELBO(3, vectorize_particles=True), 3),
        ({"c": "disarm"}, 2),
        ((StraightThrough(), Estimator_ELBO(2)), 2),
    ],
)
def test_evaluations(choice: Any, evaluations: int) -> None:
    problem = chain()
    problem.reset(torch.float32)
    assert draw(problem, {"e": choice})["e"].attrs["evaluations"] == evaluations


def test_evaluations_of_a_module() -> None:
    problem = bits()

    class Model(PyroModule):
        def forward(self) -> None:
            problem.model()

    problem.reset(torch.float32)
    model = Model()
    drawn = gradient_draws(
        model, problem.guide, estimators={"e": Estimator_ELBO(4)}, num_draws=2, progress=False
    )
    assert drawn["e"].attrs["evaluations"] == 4
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_evaluations_of_a_guide_that_runs_the_model() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    guide = AutoNormalMessenger(model)
    estimators = {"ours": Estimator_ELBO(3), "Pyro's": Trace_ELBO(2)}
    drawn = gradient_draws(model, guide, estimators=estimators, num_draws=3, progress=False)
    assert drawn["ours"].attrs["evaluations"] == 3
    assert drawn["Pyro's"].attrs["evaluations"] == 2


def test_losses_that_are_pairs() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))

    estimators = {"rws": ReweightedWakeSleep(num_particles=2)}
    drawn = gradient_draws(model, guide, estimators=estimators, num_draws=3, progress=False)
    assert np.isfinite(drawn["rws"].coords["loss"]).all()
    optim = pyro.optim.SGD({"lr": 0.1})
    history = train(model, guide, estimators=estimators, optim=optim, num_steps=2, progress=False)
    assert np.isfinite(history.elbo).all()


def test_elbos_of_pyro() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))

    plain = gradient_draws(
        model, guide, estimators={"pyro": Trace_ELBO(2)}, num_draws=3, progress=False
    )["pyro"]
    exact = gradient_draws(
        model,
        config_enumerate(guide),
        estimators={"pyro": TraceEnum_ELBO(max_plate_nesting=0)},
        num_draws=3,
        progress=False,
    )["pyro"]
    assert plain.attrs["num_particles"] == 2
    np.testing.assert_allclose(exact["l"], float(exact_gradient(model, guide)["l"]), rtol=1e-5)


def test_params_restrict_and_override() -> None:
    problem = chain()
    problem.reset(torch.float32)
    everything = draw(problem, {"r": "reinmax"})["r"]
    some = draw(problem, {"r": "reinmax"}, params=["*_logits", "w"])["r"]
    assert set(some) == {"a_logits", "b_logits", "w"}
    np.testing.assert_array_equal(some["b_logits"], everything["b_logits"])
    moved = draw(problem, {"r": "reinmax"}, params={"w": torch.tensor(-2.0)})["r"]
    assert set(moved) == set(problem.params)
    assert moved.coords["w.value"].values.tolist() == [-2.0]
    pyro.get_param_store()["w"] = torch.tensor(-2.0)
    again = draw(problem, {"r": "reinmax"})["r"]
    np.testing.assert_array_equal(moved["w"], again["w"])


class Guide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](1, 2)
        self.scale = PyroParam(torch.tensor(1.5), dist.constraints.positive)

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            logits = self.scale * self.linear(x[:, None])
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def module_model(x: torch.Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) ** 2, 1.0), obs=x)


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local"])
def test_pyro_modules(local: bool) -> None:
    x = torch.tensor([0.3, -1.2, 0.8])
    settings = (
        pyro.settings.context(module_local_params=True) if local else contextlib.nullcontext()
    )
    with settings:
        guide = Guide()
        before = {name: value.clone() for name, value in guide.state_dict().items()}
        drawn = gradient_draws(
            module_model,
            guide,
            x,
            estimators={"e": Estimator_ELBO(20, vectorize_particles=True)},
            num_draws=150,
            progress=False,
        )["e"]
        exact = exact_gradient(module_model, guide, x)
        moved = exact_gradient(module_model, guide, x, params={"scale": torch.tensor(1.5)})
        assert set(drawn) == set(exact) == {"linear.weight", "linear.bias", "scale"}
        for name in drawn:
            error = drawn[name].std(("chain", "draw")) / np.sqrt(600) + 1e-6
            z = abs(drawn[name].mean(("chain", "draw")) - exact[name]) / error
            assert float(z.max()) < 5
            np.testing.assert_allclose(moved[name], exact[name], rtol=1e-5)
        assert all(torch.equal(guide.state_dict()[name], before[name]) for name in before)
        assert all(leaf.grad is None for leaf in guide.parameters())
    assert len(pyro.get_param_store()) == 0


def test_progress_bar_can_be_silent(capsys: pytest.CaptureFixture) -> None:
    problem = bits()
    problem.reset(torch.float32)
    draw(problem, {"r": "reinmax"})
    silent = capsys.readouterr()
    assert silent.err == silent.out == ""
    draw(problem, {"r": "reinmax"}, progress=True)
    assert "10/10" in capsys.readouterr().err


def late_guide() -> None:
    z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(-3.0))))
    if z > 0:
        pyro.sample("y", dist.Normal(pyro.param("late", torch.tensor(0.0)), 1.0))


def late_model() -> None:
    if pyro.sample("z", dist.Bernoulli(0.5)) > 0:
        pyro.sample("y", dist.Normal(0.0, 1.0))


def test_parameter_that_is_met_late() -> None:
    options = {"estimators": {"s": "score"}, "num_draws": 50, "progress": False}
    with pytest.raises(ValueError, match=r"'late' was met in some runs only.*\['l', 'late'\]"):
        gradient_draws(late_model, late_guide, **options)
    pyro.param("l", torch.tensor(-3.0))
    pyro.param("late", torch.tensor(0.0))
    drawn = gradient_draws(late_model, late_guide, params=["l", "late"], **options)["s"]
    assert float(abs(drawn["late"]).max()) > 0


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
    ({"seed": 0.5}, TypeError, "seed must be an integer"),
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
