"""State that is saved, steps that leave nothing behind, runs that take nothing."""

from __future__ import annotations

import copy
import gc
import io

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_gumbel.estimators import (
    Exponential,
    GumbelSoftmax,
    Linear,
    MovingAverage,
    NeuralBaseline,
    Rodeo,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

X = torch.tensor([0.3, -1.0, 2.0])


def model(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        b = pyro.sample("b", dist.Bernoulli(0.3))
        means = (z * torch.tensor([0.0, 1.0, -2.0])).sum(-1)
        pyro.sample("x", dist.Normal(means + b, 1.0), obs=x)


def guide(x):
    logits = pyro.param("logits", torch.zeros(3, 3))
    odds = pyro.param("odds", torch.zeros(3))
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.OneHotCategorical(logits=logits[: len(x)]))
        pyro.sample("b", dist.Bernoulli(logits=odds[: len(x)]))


def stateful():
    torch.manual_seed(7)
    return {
        "z": StraightThrough(Exponential(1.0, 0.2, 0.05)),
        "b": Score(NeuralBaseline(nn.Linear(3, 3), "x")),
    }


def averaged():
    return {"z": GumbelSoftmax(Linear(1.0, 0.4, 20)), "b": Score(MovingAverage(0.8))}


@pytest.mark.parametrize("make", [stateful, averaged])
def test_training_resumes_bit_for_bit(make):
    """Parameters, optimiser, estimators and generators from a file: the same losses follow."""

    def start():
        pyro.clear_param_store()
        estimators = make()
        optimiser = pyro.optim.Adam({"lr": 0.05})
        configured = config_gradient(guide, estimators)
        svi = SVI(model, configured, optimiser, Estimator_ELBO(2, vectorize_particles=True))
        return svi, optimiser, nn.ModuleDict(estimators)

    svi, optimiser, estimators = start()
    pyro.set_rng_seed(11)
    for _ in range(7):
        svi.step(X)
    file = io.BytesIO()
    state = {
        "optimiser": optimiser.get_state(),
        "estimators": estimators.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, file)
    store_state = copy.deepcopy(pyro.get_param_store().get_state())
    straight = [svi.step(X) for _ in range(7)]
    ends = {name: value.clone() for name, value in pyro.get_param_store().items()}

    svi, optimiser, estimators = start()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    pyro.get_param_store().set_state(store_state)
    estimators.load_state_dict(state["estimators"])
    optimiser.set_state(state["optimiser"])
    torch.set_rng_state(state["rng"])
    assert [svi.step(X) for _ in range(7)] == straight
    for name, value in ends.items():
        assert torch.equal(pyro.param(name), value)


def test_a_schedule_advances_once_a_gradient():
    """Shared by two sites it still counts one; a loss does not count."""
    temperature = Linear(1.0, 0.5, 10)
    configured = config_gradient(guide, StraightThrough(temperature))
    elbo = Estimator_ELBO(3)
    elbo.loss(model, configured, X)
    assert temperature.step_count == 0
    elbo.loss_and_grads(model, configured, X)
    assert (temperature.step_count, temperature.value) == (1, 0.95)
    elbo.differentiable_loss(model, configured, X)
    assert (temperature.step_count, temperature.value) == (2, 0.9)
    assert temperature.state_dict()["_extra_state"] == {"step_count": 2}


def test_schedules_values():
    down, up, line = Exponential(1.0, 0.5, 0.1), Exponential(0.5, 2.0, -0.1), Linear(0.5, 2.0, 4)
    found = []
    for _ in range(30):
        found.append((down.value, up.value, line.value))
        for schedule in (down, up, line):
            schedule.advance()
    steps = np.arange(30)
    expected = np.stack(
        [
            np.maximum(np.exp(-0.1 * steps), 0.5),
            np.minimum(0.5 * np.exp(0.1 * steps), 2.0),
            np.minimum(0.5 + 1.5 * steps / 4, 2.0),
        ],
        1,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_loss_changes_no_estimators_state():
    baseline = MovingAverage()
    configured = config_gradient(guide, {"z": Score(baseline)})
    elbo = Estimator_ELBO()
    elbo.loss_and_grads(model, configured, X)
    before = baseline.get_extra_state()
    for _ in range(3):
        elbo.loss(model, configured, X)
    assert baseline.get_extra_state() == before


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def run_and_count(num_steps, checkpoints):
    """Take steps under stateful estimators; count what is alive on the way."""
    estimators = {"z": Score(MovingAverage()), "b": stateful()["b"]}
    optimiser = pyro.optim.Adam({"lr": 0.001})
    svi = SVI(model, config_gradient(guide, estimators), optimiser, Estimator_ELBO())
    counts = []
    for step in range(1, num_steps + 1):
        svi.step(X)
        if step in checkpoints:
            store = pyro.get_param_store()
            counts.append(
                (live_tensors(), len(optimiser.optim_objs), len(store), len(store._param_to_name))
            )
    return counts


def assert_no_growth(early, late):
    """Tensors may become fewer: what other tests left is freed in its own time."""
    assert late[0] <= early[0]
    assert late[1:] == early[1:]


def test_500_steps_leave_nothing_behind():
    counts = run_and_count(500, {50, 500})
    assert_no_growth(*counts)
    assert counts[0][1:] == (4, 4, 4)


@pytest.mark.slow
def test_10000_steps_leave_nothing_behind():
    counts = run_and_count(10_000, {1000, 10_000})
    assert_no_growth(*counts)


def by_name(estimators):
    return lambda site: estimators.get(site["name"])


@pytest.mark.parametrize(
    "configure",
    [
        lambda: config_gradient(guide, {"b": "rodeo"}),
        lambda: config_gradient(guide, {"b": Rodeo(2)}),
        lambda: config_gradient(guide, by_name({"b": Rodeo(2)})),
    ],
    ids=["name", "object", "callable"],
)
def test_a_loaded_store_brings_the_estimators_parameters_back(configure, tmp_path):
    def start():
        pyro.clear_param_store()
        optimiser = pyro.optim.Adam({"lr": 0.05})
        elbo = Estimator_ELBO(2, vectorize_particles=True)
        return SVI(model, configure(), optimiser, elbo), optimiser

    svi, optimiser = start()
    for _ in range(5):
        svi.step(X)
    pyro.get_param_store().save(tmp_path / "store")
    state, generators = copy.deepcopy(optimiser.get_state()), torch.get_rng_state()
    straight = [svi.step(X) for _ in range(5)]
    ends = {name: value.clone() for name, value in pyro.get_param_store().items()}
    assert any(name.startswith("gradient$b$$$network") for name in ends)

    svi, optimiser = start()
    pyro.get_param_store().load(tmp_path / "store")
    optimiser.set_state(state)
    torch.set_rng_state(generators)
    assert [svi.step(X) for _ in range(5)] == straight
    for name, value in ends.items():
        assert torch.equal(pyro.param(name), value)


def test_two_estimators_of_one_site_have_separate_parameters():
    """Taking turns, each goes on with parameters of its own."""
    first, second = Rodeo(2), Rodeo(2)
    svis = [
        SVI(model, config_gradient(guide, {"b": estimator}), pyro.optim.Adam({}), Estimator_ELBO())
        for estimator in (first, second)
    ]
    second.scales.data.fill_(3.0)
    for _ in range(3):
        for svi in svis:
            svi.step(X)
    assert (first.scales < 1).all()
    assert (second.scales > 2).all()


def test_a_new_estimator_is_trained_where_the_store_knows_another():
    """Of the same site and shape, from an earlier run: it must not stand in the way."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = nn.Linear(3, 3)
        before = network.weight.detach().clone()
        configured = config_gradient(guide, {"b": Score(NeuralBaseline(network, "x"))})
        svi = SVI(model, configured, pyro.optim.Adam({"lr": 0.05}), Estimator_ELBO())
        for _ in range(3):
            svi.step(X)
        assert not torch.equal(network.weight, before)


def test_the_default_s_state_can_be_saved_and_put_back():
    """Under plain SVI the moving average of "auto" lives in the loss object."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.tensor(0.2))))

    one, other = Estimator_ELBO(), Estimator_ELBO()
    for _ in range(5):
        one.loss_and_grads(model, guide)
    other.load_state_dict(one.state_dict())
    grads = []
    for elbo in (one, other):
        pyro.set_rng_seed(5)
        param = pyro.get_param_store()._params["logits"]
        param.grad = None
        elbo.loss_and_grads(model, guide)
        grads.append(param.grad.item())
    assert grads[0] == grads[1]
    fresh = Estimator_ELBO()
    pyro.set_rng_seed(5)
    param.grad = None
    fresh.loss_and_grads(model, guide)
    assert param.grad.item() != grads[0]
    with pytest.raises(ValueError, match="Unknown estimator name 'nonsense'"):
        fresh.load_state_dict({"nonsense": {}})


def test_an_infinite_cost_leaves_the_moving_average_usable():
    baseline = MovingAverage()
    costs = iter([torch.tensor([[1.0]]), torch.tensor([[float("inf")]]), torch.tensor([[1.0]])])

    class FakeSite:
        name = "z"
        training = True

    values = []
    for cost in costs:
        site = FakeSite()
        site.cost = cost
        values.append(baseline(site)[0])
    assert float(values[2]) == pytest.approx(1.0)
