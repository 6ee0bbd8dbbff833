"""A loss as a module: its state, its copies, and estimators that only a run finds."""

from __future__ import annotations

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    NeuralBaseline,
    Rebar,
    Score,
)
from pyro_gumbel.guides import AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, config_gradient

X = torch.tensor([[1.0, 0.2], [-0.3, 0.8], [0.5, -1.0]])
FOR_BITS = ("arms", "disarm", "rodeo")
NAMES = (*FOR_BITS, "double_control_variate", "muprop", "rebar", "reinmax", "score")


class Model(PyroModule):
    def forward(self, x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
            b = pyro.sample("b", dist.Bernoulli(0.3))
            mean = z @ torch.tensor([0.0, 1.0, -2.0]) + b
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(2, 3)
        self.scale = PyroParam(torch.tensor(1.5), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.encode(x) * self.scale))
            pyro.sample("b", dist.Bernoulli(logits=self.encode(x)[:, 0]))


class GuideWithOptions(Guide):
    """Chooses in place, by a handler around its sites."""

    def __init__(self, estimators):
        super().__init__()
        self.choices = estimators

    def forward(self, x):
        with poutine.infer_config(config_fn=self.options):
            super().forward(x)

    def options(self, site):
        name = site["name"]
        return {"gradient": self.choices[name]} if name in self.choices else {}


def stateful():
    """One estimator with a schedule, one with a moving average and learnable parts."""
    torch.manual_seed(3)
    return {
        "z": GumbelStraightThrough(Exponential(1.0, 0.1, 0.1)),
        "b": Score(MovingAverage(0.5)),
    }


def learnable():
    torch.manual_seed(3)
    return {"z": Rebar(), "b": Score(NeuralBaseline(nn.Linear(2, 1), "x"))}


PLACES = {
    "dict": lambda choices: config_gradient(Guide(), choices),
    "callable": lambda choices: config_gradient(Guide(), lambda msg: choices[msg["name"]]),
    "site": GuideWithOptions,
    "nested": lambda choices: config_gradient(config_gradient(Guide(), choices), {}),
}


def make(place, choices, *, call=True):
    """A module after its first call, which finds all estimators, and an optimiser."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    guide = PLACES[place](choices())
    loss = Estimator_ELBO(2)(Model(), guide)
    if call:
        with torch.no_grad():
            loss(X)
    return loss, torch.optim.Adam(loss.parameters(), lr=0.1)


def run(loss, optimiser, seeds):
    losses = []
    for seed in seeds:
        pyro.set_rng_seed(seed)
        optimiser.zero_grad()
        value = loss(X)
        value.backward()
        losses.append(value.item())
        optimiser.step()
    return losses


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# An optimiser made before the first call lacks parameters of estimators that only a run finds.
RESUMED = [
    pytest.param(place, choices, called, id=f"{place}-{choices.__name__}-{called}")
    for place in PLACES
    for choices in (stateful, learnable)
    for called in (True, False)
    if called or choices is stateful or place == "dict"
]


@pytest.mark.parametrize(("place", "choices", "called"), RESUMED)
def test_training_resumes_bit_for_bit(place, choices, called):
    """Before the first call of the new module as well as after it."""
    loss, optimiser = make(place, choices)
    run(loss, optimiser, range(5))
    state = through_a_file({"loss": loss.state_dict(), "optimiser": optimiser.state_dict()})
    straight = run(loss, optimiser, range(5, 9))
    loss, optimiser = make(place, choices, call=called)
    loss.load_state_dict(state["loss"])
    optimiser.load_state_dict(state["optimiser"])
    assert run(loss, optimiser, range(5, 9)) == straight


@pytest.mark.parametrize("place", PLACES)
def test_a_state_that_waits_for_its_estimators_is_saved_again(place):
    loss, optimiser = make(place, stateful)
    run(loss, optimiser, range(3))
    state = loss.state_dict()
    again, _ = make(place, stateful, call=False)
    again.load_state_dict(copy.deepcopy(state))
    assert flat(again.state_dict()) == flat(state)
    again(X)
    assert again.state_dict().keys() == state.keys()


def flat(state):
    return {name: str(value) for name, value in state.items()}


@pytest.mark.parametrize("place", PLACES)
def test_a_state_of_before_the_first_call_lacks_nothing(place):
    """What it does not have of the estimators stays."""
    early, _ = make(place, stateful, call=False)
    state = copy.deepcopy(early.state_dict())
    loss, optimiser = make(place, stateful)
    run(loss, optimiser, range(3))
    before = flat(loss.estimators[-1].state_dict())
    loss.load_state_dict(state)
    assert torch.equal(loss.guide.encode.weight, early.guide.encode.weight)
    assert place == "dict" or flat(loss.estimators[-1].state_dict()) == before


def test_a_state_of_other_estimators_is_refused():
    loss, _ = make("dict", stateful)
    other, _ = make("dict", learnable)
    with pytest.raises(RuntimeError, match="estimators.0"):
        other.load_state_dict(loss.state_dict())


def test_a_nested_loss_module_is_saved_with_its_parent():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss, _ = make("callable", stateful, call=False)

    parent = Parent()
    for _ in range(3):
        parent.loss(X).backward()
    again = Parent()
    again.load_state_dict(parent.state_dict())
    again.loss(X)
    counts = [one.loss.estimators[-2].temperature.step_count for one in (parent, again)]
    assert counts == [3, 4]


# Copies


def unpickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": unpickled, "torch.save": saved}
MODULES = {
    **{name: lambda name=name: by_name(name) for name in NAMES},
    "default": lambda: Estimator_ELBO(default="rebar")(OneHotModel(), OneHotGuide()),
    "schedule": lambda: Estimator_ELBO()(Model(), config_gradient(Guide(), stateful())),
    "baseline": lambda: Estimator_ELBO()(Model(), config_gradient(Guide(), learnable())),
    "importance weighted": lambda: ImportanceWeighted_ELBO(2)(Model(), Guide()),
    "AutoDiscrete": lambda: with_autoguide(Model()),
}
WITHOUT_ITS_MODEL = {("AutoDiscrete", "pickle"), ("AutoDiscrete", "torch.save")}


def with_autoguide(model):
    return Estimator_ELBO()(model, AutoDiscrete(model, gradient={"z": "rebar"}))


class OneHotModel(PyroModule):
    def forward(self, x):
        pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))


class OneHotGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, 0.1]))

    def forward(self, x):
        pyro.sample("z", dist.OneHotCategorical(logits=self.logits))


def by_name(name):
    site = "b" if name in FOR_BITS else "z"
    options = {"num_particles": 2, "vectorize_particles": True}
    return Estimator_ELBO(**options)(Model(), config_gradient(Guide(), {site: name}))


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("copying", COPIES)
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_trains_by_itself(name, copying, local):
    """After a step, which leaves marks on modules and in the parameter store."""
    with pyro.settings.context(module_local_params=local):
        loss = MODULES[name]()
        loss(X).backward()
        pyro.clear_param_store()  # where both modules would have the same names
        twin = COPIES[copying](loss)
        if (name, copying) in WITHOUT_ITS_MODEL:
            twin.guide.model = twin.model
        assert flat(twin.state_dict()) == flat(loss.state_dict())
        own = {id(parameter) for parameter in loss.parameters()}
        assert not any(id(parameter) in own for parameter in twin.parameters())
        loss.zero_grad()
        pyro.set_rng_seed(2)
        expected = loss(X)
        expected.backward()
        grads = [parameter.grad for parameter in loss.parameters()]
        pyro.clear_param_store()
        twin.zero_grad()
        pyro.set_rng_seed(2)
        found = twin(X)
        found.backward()
        assert torch.equal(found, expected)
        for parameter, grad in zip(twin.parameters(), grads, strict=True):
            assert (parameter.grad is None) == (grad is None)
            assert grad is None or torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_counts_its_own_steps(make_copy):
    loss, optimiser = make("dict", stateful)
    run(loss, optimiser, range(2))
    twin = make_copy(loss)
    twin(X)
    assert loss.estimators[0].temperature.step_count == 2
    assert twin.estimators[0].temperature.step_count == 3
    assert loss.estimators[1].baseline._weights["b"] < twin.estimators[1].baseline._weights["b"]
