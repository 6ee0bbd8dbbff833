"""Parameters that are found, chosen and set; evaluations that are counted."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.toys import bits, chain, draw
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam

from pyro_gumbel.diagnostics import exact_gradient, gradient_draws
from pyro_gumbel.estimators import StraightThrough
from pyro_gumbel.infer import Estimator_ELBO


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
