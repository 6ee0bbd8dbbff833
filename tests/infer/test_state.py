"""State of estimators and losses: saved, loaded, in the parameter store, by device and dtype."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import nn

from pyro_gumbel.distributions import OneHot
from pyro_gumbel.estimators import (
    DoubleControlVariate,
    Exponential,
    GumbelSoftmax,
    Linear,
    MovingAverage,
    NeuralBaseline,
    Rebar,
    Relax,
    Rodeo,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient
from pyro_gumbel.infer._state import meet_site

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


POINTS = torch.tensor([[1.0, 0.2], [-0.3, 0.8]])

# Written by version 0.1 after three steps, as tensors of the parameter store.
STORED = {
    "gradient$r$$$log_temperature": -0.46617400646209717,
    "gradient$r$$$scale": 1.0489413738250732,
    "gradient$d$$$scales": [-0.2634764015674591, -0.24829530715942383],
    "gradient$d$$$network.0.weight": [
        [0.05446130409836769, 0.26227205991744995],
        [-0.7410238981246948, -0.36146464943885803],
    ],
    "gradient$d$$$network.0.bias": [-0.35984137654304504, 0.3380712568759918],
    "gradient$d$$$network.2.weight": [
        [-0.00011750683188438416, 0.7200475335121155],
        [0.09316733479499817, 0.33822691440582275],
    ],
    "gradient$d$$$network.2.bias": [-0.2136969119310379, 0.01257120817899704],
    "gradient$c$$$alpha": -0.28782373666763306,
    "gradient$n_$$$baseline.module.weight": [[-0.9255274534225464, -0.7606229782104492]],
    "gradient$n_$$$baseline.module.bias": [-0.5824377536773682],
}
# By version 0.1, too: what ``Estimator_ELBO(default="rebar").state_dict()`` returned.
ELBO_STATE = {
    "pathwise": {},
    "leave_one_out": {},
    "moving_average": {
        "baseline._extra_state": {
            "sums": {"d": torch.tensor(-0.33)},
            "weights": {"d": torch.tensor(0.19)},
        }
    },
    "rebar": {"log_temperature": torch.tensor(-0.88), "scale": torch.tensor(0.87)},
}


def linear_model(x):
    with pyro.plate("n", len(x)):
        r = pyro.sample("r", dist.OneHotCategorical(x.new_tensor([0.2, 0.8])))
        bits = [pyro.sample(name, dist.Bernoulli(x.new_tensor(0.3))) for name in ("d", "c", "n_")]
        pyro.sample("x", dist.Normal(r[..., 1] + sum(bits), 1.0), obs=x[:, 0])


def linear_guide(x):
    with pyro.plate("n", len(x)):
        logits = pyro.param("q_r", x.new_zeros(2))
        pyro.sample("r", dist.OneHotCategorical(logits=logits))
        for name in ("d", "c", "n_"):
            pyro.sample(name, dist.Bernoulli(logits=pyro.param(f"q_{name}", x.new_zeros(()))))


def estimators():
    torch.manual_seed(0)
    return {
        "r": Rebar(),
        "d": Rodeo(2, hidden=2),
        "c": DoubleControlVariate(2),
        "n_": Score(NeuralBaseline(nn.Linear(2, 1), "x")),
    }


def start(chosen, svi_class=SVI):
    pyro.set_rng_seed(0)
    elbo = Estimator_ELBO(2, vectorize_particles=True)
    return svi_class(
        linear_model, config_gradient(linear_guide, chosen), pyro.optim.Adam({"lr": 0.1}), elbo
    )


def values(chosen):
    return {
        f"gradient${site}$$${name}": parameter.detach().clone()
        for site, estimator in chosen.items()
        for name, parameter in estimator.named_parameters()
    }


def stored():
    store = pyro.get_param_store()
    found = {name: value.detach().clone() for name, value in store.items()}
    return {name: value for name, value in found.items() if name.startswith("gradient$")}


def load_store(numbers, path):
    """Load a file that another process has saved."""
    state = {
        "params": {
            name: torch.tensor(value, requires_grad=True) for name, value in numbers.items()
        },
        "constraints": dict.fromkeys(numbers, dist.constraints.real),
    }
    torch.save(state, path)
    pyro.get_param_store().load(path)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.as_tensor(value), rtol=0, atol=0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


# Checkpoints


def test_names_in_the_store_are_those_of_version_0_1():
    start(estimators()).step(POINTS)
    assert stored().keys() == STORED.keys()


@pytest.mark.parametrize("how", ["loss_and_grads", "differentiable_loss", "module"])
def test_a_store_of_version_0_1_is_taken_over(how, path):
    load_store(STORED, path)
    chosen = estimators()
    elbo, configured = Estimator_ELBO(2), config_gradient(linear_guide, chosen)
    calls = {
        "loss_and_grads": lambda: elbo.loss_and_grads(linear_model, configured, POINTS),
        "differentiable_loss": lambda: elbo.differentiable_loss(linear_model, configured, POINTS),
        "module": lambda: elbo(linear_model, configured)(POINTS),
    }
    calls[how]()
    assert_equal(values(chosen), STORED)
    # It is taken over once: training goes on from there.
    for estimator in chosen.values():
        for parameter in estimator.parameters():
            parameter.data.add_(1.0)
    calls[how]()
    assert_equal(values(chosen), {name: torch.tensor(v) + 1.0 for name, v in STORED.items()})


def test_a_state_of_version_0_1_of_an_elbo_is_loaded():
    elbo = Estimator_ELBO(default="rebar")
    elbo.load_state_dict(ELBO_STATE)
    state = elbo.state_dict()
    assert {name: dict(part) for name, part in state.items()} == ELBO_STATE


@pytest.mark.parametrize("svi_class", [SVI, CapturedSVI])
def test_a_loaded_store_goes_on_as_it_was_saved(svi_class, path):
    svi = start(estimators(), svi_class)
    for _ in range(3):
        svi.step(POINTS)
    pyro.get_param_store().save(path)
    expected = stored()
    pyro.clear_param_store()
    pyro.get_param_store().load(path)
    chosen = estimators()
    Estimator_ELBO(2).differentiable_loss(
        linear_model, config_gradient(linear_guide, chosen), POINTS
    )
    assert_equal(values(chosen), expected)


# The store against the estimator


def fill(estimator, value):
    for parameter in estimator.parameters():
        parameter.data.fill_(value)
    return estimator


def first_value(estimator, site="r"):
    """The first parameter after a pass that uses the estimator, which trains nothing."""
    configured = config_gradient(linear_guide, {site: estimator})
    Estimator_ELBO(2).differentiable_loss(linear_model, configured, POINTS)
    return next(estimator.parameters()).flatten()[0].item()


ONES = {name: torch.ones_like(torch.tensor(value)).tolist() for name, value in STORED.items()}
MAKE = {
    "Rebar": lambda: ("r", Rebar()),
    "NeuralBaseline": lambda: ("n_", Score(NeuralBaseline(nn.Linear(2, 1), "x"))),
}


@pytest.mark.parametrize("kind", MAKE)
def test_a_new_estimator_takes_over_a_loaded_store(kind, path):
    load_store(ONES, path)
    site, estimator = MAKE[kind]()
    assert first_value(estimator, site) == 1.0


@pytest.mark.parametrize("through", ["estimator", "parent", "baseline", "loss module"])
@pytest.mark.parametrize("kind", MAKE)
def test_a_state_loaded_later_replaces_the_store(kind, through, path):
    load_store(ONES, path)
    site, estimator = MAKE[kind]()
    state = copy.deepcopy(fill(MAKE[kind]()[1], 2.0).state_dict())
    parts = {
        "estimator": estimator,
        "parent": nn.ModuleList([estimator]),
        "baseline": getattr(estimator, "baseline", estimator),
        "loss module": Estimator_ELBO()(
            linear_model, config_gradient(linear_guide, {site: estimator})
        ),
    }
    part = parts[through]
    part.load_state_dict(rename(part, state))
    assert first_value(estimator, site) == 2.0
    # A copy has the same history.
    assert first_value(copy.deepcopy(estimator), site) == 2.0


def rename(part, state):
    """The state of a module of which the estimator is a part, or that is a part of it."""
    own = part.state_dict()
    last = {key.rpartition(".")[2]: value for key, value in state.items()}
    return {name: last.get(name.rpartition(".")[2], value) for name, value in own.items()}


@pytest.mark.parametrize("kind", MAKE)
def test_a_store_loaded_later_replaces_the_state(kind, path):
    site, estimator = MAKE[kind]()
    estimator.load_state_dict(fill(MAKE[kind]()[1], 2.0).state_dict())
    load_store(ONES, path)
    assert first_value(estimator, site) == 1.0
    # As after a step back to the best parameters so far.
    fill(estimator, 3.0)
    assert first_value(estimator, site) == 3.0
    load_store(ONES, path)
    assert first_value(estimator, site) == 1.0


def test_a_state_loaded_into_one_estimator_leaves_others_to_the_store(path):
    load_store(ONES, path)
    first, second = Rebar(), Score(NeuralBaseline(nn.Linear(2, 1), "x"))
    first.load_state_dict(fill(Rebar(), 2.0).state_dict())
    assert first_value(first, "r") == 2.0
    assert first_value(second, "n_") == 1.0


def test_a_copy_takes_over_what_the_original_would(path):
    """Diagnostics draw from copies; what they take over is there for the original, too."""
    load_store(ONES, path)
    original = Rebar()
    state = copy.deepcopy(pyro.get_param_store().get_state())
    assert first_value(copy.deepcopy(original)) == 1.0
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    assert first_value(original) == 1.0


# Files


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("site", ["r", "d", "c", "n_"])
def test_a_trained_estimator_is_pickled(site, how):
    chosen = estimators()
    svi = start(chosen)
    svi.step(POINTS)
    estimator = chosen[site]
    file = io.BytesIO()
    {"pickle": pickle.dump, "torch.save": torch.save}[how](estimator, file)
    file.seek(0)
    again = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert_equal(values({site: again}), values({site: estimator}))
    svi.step(POINTS)


def test_a_trained_configured_guide_is_pickled():
    configured = config_gradient(linear_guide, estimators())
    SVI(linear_model, configured, pyro.optim.Adam({}), Estimator_ELBO(2)).step(POINTS)
    again = pickle.loads(pickle.dumps(configured))
    found = again.gradient_messenger.config
    assert_equal(values(found), values(configured.gradient_messenger.config))


# Devices and dtypes


@pytest.mark.parametrize("svi_class", [SVI, CapturedSVI])
def test_parameters_become_those_of_float64_sites(svi_class):
    chosen = estimators()
    chosen["r"] = Relax(nn.Linear(2, 1))
    before = [parameter for estimator in chosen.values() for parameter in estimator.parameters()]
    svi = start(chosen, svi_class)
    losses = [svi.step(POINTS.double()) for _ in range(4)]
    after = [parameter for estimator in chosen.values() for parameter in estimator.parameters()]
    # An optimiser made before still has them.
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert {parameter.dtype for parameter in after} == {torch.float64}
    assert {value.dtype for value in stored().values()} == {torch.float64}
    assert torch.tensor(losses).isfinite().all()


def test_a_baseline_of_a_float64_site_reads_float32_arguments():
    class Program(PyroModule):
        def forward(self, x):
            with pyro.plate("n", len(x)):
                pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))

    baseline = NeuralBaseline(nn.Linear(2, 1), "x")
    configured = config_gradient(Program(), {"b": Score(baseline)})
    Estimator_ELBO().loss_and_grads(Program(), configured, POINTS)
    assert baseline.module.weight.grad.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_never_lowered(dtype):
    estimator = Rodeo(2, hidden=2)
    meet_site("d", estimator, dist.Bernoulli(logits=torch.zeros(3, dtype=dtype)))
    assert {parameter.dtype for parameter in estimator.parameters()} == {torch.float32}


def test_a_dtype_that_the_user_chose_stays():
    critic = nn.Linear(2, 1).bfloat16()
    meet_site("r", Relax(critic), dist.OneHotCategorical(logits=torch.zeros(2).double()))
    assert critic.weight.dtype == torch.bfloat16


SITES = {
    "Bernoulli": lambda like: dist.Bernoulli(logits=like),
    "OneHotCategorical": lambda like: dist.OneHotCategorical(logits=like),
    "Categorical": lambda like: dist.Categorical(logits=like),
    "OneHot": lambda like: OneHot(logits=like),
    "Poisson": lambda like: dist.Poisson(like.exp(), validate_args=False),
    "Beta": lambda like: dist.Beta(like.exp(), like.exp(), validate_args=False),
    "transformed": lambda like: dist.LogNormal(like, like.exp(), validate_args=False),
}


@pytest.mark.parametrize("family", SITES)
def test_parameters_move_to_the_device_of_the_first_site(family):
    """The meta device stands for any other one."""
    estimator = Score(NeuralBaseline(nn.Linear(2, 1), "x"))
    with torch.device("meta"):
        like = torch.zeros(2, dtype=torch.float64)
    meet_site("z", estimator, make_quietly(SITES[family], like))
    found = next(estimator.parameters())
    assert (found.device.type, found.dtype) == ("meta", torch.float64)
    # At the first site only.
    meet_site("z", estimator, SITES[family](torch.zeros(2)))
    assert next(estimator.parameters()).device.type == "meta"


def make_quietly(make, like):
    """Validation would read numbers, of which there are none."""
    with pyro.validation_enabled(False):
        return make(like)


def test_a_copy_moves_to_a_site_of_its_own():
    estimator = Rodeo(2, hidden=2)
    meet_site("d", estimator, dist.Bernoulli(logits=torch.zeros(3)))
    again = pickle.loads(pickle.dumps(estimator))
    meet_site("d", again, dist.Bernoulli(logits=torch.zeros(3).double()))
    assert (estimator.scales.dtype, again.scales.dtype) == (torch.float32, torch.float64)


@pytest.mark.cuda
def test_parameters_move_to_the_gpu():
    chosen = estimators()
    svi = start(chosen)
    for _ in range(3):
        svi.step(POINTS.cuda())
    assert {value.device.type for value in stored().values()} == {"cuda"}


def test_frozen_parameters_move_too():
    estimator = Rebar(learn=False)
    meet_site("z", estimator, dist.OneHotCategorical(logits=torch.zeros(2).double()))
    assert estimator.scale.dtype == torch.float64
