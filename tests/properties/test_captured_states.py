"""Captured steps keep the state of modules, estimators and optimisers as eager ones do."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import Plain, X, make, observe, replayed, same, steps_of
from pyro import poutine
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import nn, optim

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    Relax,
    Score,
)
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient
from pyro_gumbel.infer.captured_svi import step_jointly

# Modes, handlers and other settings


class Dropping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.5))

    def model(self, x):
        observe(self.net(pyro.param("a", torch.ones(5)) * x), x + 1)

    def guide(self, x):
        pass


@pytest.mark.parametrize("wrap", [lambda f: f, config_gradient, poutine.block])
@pytest.mark.parametrize("part", [lambda vae: vae, lambda vae: vae.net[0]])
@replayed()
def test_modes_of_modules_behind_methods(wrap, part):
    vae = Dropping()
    guide = wrap(vae.guide, {}) if wrap is config_gradient else wrap(vae.guide)
    svi = make(CapturedSVI, vae.model, guide, pyro.optim.SGD({"lr": 0.0}))
    assert len({svi.step(X[0]) for _ in range(8)}) > 3
    part(vae).eval()
    assert len({svi.step(X[0]) for _ in range(8)}) == 1


NET = torch.nn.Dropout(0.5)


@replayed()
def test_modes_of_modules_in_scopes():
    def inner(x, net=NET):
        return net(x)

    def model(x):
        observe(inner(pyro.param("a", torch.ones(5)) * x) + 0 * NET(x), x + 1)

    svi = make(CapturedSVI, model, optim=pyro.optim.SGD({"lr": 0.0}))
    assert len({svi.step(X[0]) for _ in range(8)}) > 3
    NET.eval()
    found = {svi.step(X[0]) for _ in range(8)}
    NET.train()
    assert len(found) == 1


@pytest.mark.parametrize("as_argument", [False, True])
@replayed()
def test_modes_of_modules_in_plain_objects_and_arguments(as_argument):
    plain = Plain()
    given = [plain.net] if as_argument else []
    svi = make(CapturedSVI, plain.model, optim=pyro.optim.SGD({"lr": 0.0}))
    assert len({svi.step(X[0], *given) for _ in range(8)}) > 3
    plain.net.eval()
    assert len({svi.step(X[0], *given) for _ in range(8)}) == 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("shift", torch.tensor(0.0))


@pytest.mark.parametrize("assign", [False, True])
def test_another_tensor_in_a_buffers_place(assign):
    def scenario(svi_class):
        net = Net()

        def model():
            pyro.module("net", net)
            pyro.sample("x", dist.Normal(net.weight + net.shift, 1.0), obs=torch.tensor(3.0))

        svi = make(svi_class, model)
        losses = [svi.step() for _ in range(5)]
        if assign:
            net.load_state_dict({"shift": torch.tensor(2.0)}, strict=False, assign=True)
        else:
            net.shift = torch.tensor(2.0)
        return losses + [svi.step() for _ in range(5)]

    same(scenario)


# State of estimators


def bits(name, make_estimator=None):
    def model(x):
        z = pyro.sample(name, dist.Bernoulli(0.3))
        observe(z.unsqueeze(-1).expand(5), x)

    def guide(x):
        pyro.sample(name, dist.Bernoulli(logits=pyro.param(f"l{name}", torch.tensor(0.0))))

    return model, guide if make_estimator is None else config_gradient(guide, make_estimator)


def test_sites_of_others_beside_the_own():
    """One ELBO, and so one moving average, in two SVIs; loading turns the sites around."""

    def scenario(svi_class):
        elbo = Estimator_ELBO(max_plate_nesting=1)
        first = make(svi_class, *bits("z"), elbo=elbo)
        second = make(svi_class, *bits("y"), elbo=elbo)
        losses = [first.step(x) for x in X[:4]] + [second.step(X[4]), first.step(X[5])]
        losses += [second.step(X[6]), second.step(X[7])]
        state = copy.deepcopy(elbo.state_dict())
        average = state["moving_average"]
        turned = {k: average[k] for k in reversed(list(average))}
        for key, value in turned.items():
            if isinstance(value, dict):
                turned[key] = _turned(value)
        elbo.load_state_dict({**state, "moving_average": turned})
        return losses + [svi.step(x) for x in X[8:14] for svi in (first, second)]

    same(scenario)


def _turned(state):
    if not isinstance(state, dict):
        return state
    return {key: _turned(state[key]) for key in reversed(list(state))}


def test_baselines_that_are_emptied():
    def scenario(svi_class):
        estimator = Score(MovingAverage(0.8))
        svi = make(svi_class, *bits("z", estimator))
        fresh = copy.deepcopy(estimator.baseline.get_extra_state())
        losses = [svi.step(x) for x in X[:5]]
        estimator.baseline.set_extra_state(fresh)
        return losses + [svi.step(x) for x in X[5:10]]

    same(scenario)


def test_state_that_is_loaded_is_used():
    """A baseline put in from outside must not be passed over by the recording."""

    def scenario(svi_class):
        estimator = Score(MovingAverage(0.8))
        svi = make(svi_class, *bits("z", estimator))
        [svi.step(x) for x in X[:5]]
        state = {"sums": {"z": torch.tensor(50.0)}, "weights": {"z": torch.ones(())}}
        estimator.baseline.set_extra_state(state)
        svi.step(X[5])
        return estimator.baseline.get_extra_state()["sums"]["z"]

    assert same(scenario) > 30


def test_state_of_estimators_goes_on():
    def scenario(svi_class):
        estimator, schedule = Score(MovingAverage(0.8)), Exponential(1.0, 0.3, 0.02)
        first = make(svi_class, *bits("z", estimator))
        second = make(svi_class, *bits("y", GumbelStraightThrough(schedule)))
        [svi.step(x) for x in X[:12] for svi in (first, second)]
        assert schedule.stand_in is None
        return estimator.baseline.get_extra_state(), schedule.step_count

    assert same(scenario)[1] == 12


class Counting(MovingAverage):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, site):
        self.count += 1
        return super().forward(site)

    def get_extra_state(self):
        return {**super().get_extra_state(), "count": self.count}


def test_an_estimator_that_counts_in_its_state_is_refused():
    svi = make(CapturedSVI, *bits("z", Score(Counting())))
    svi.step(X[0])
    with pytest.raises(RuntimeError, match="keeps numbers in get_extra_state; keep tensors"):
        svi.step(X[0])


def test_schedules_that_are_replaced():
    def scenario(svi_class):
        estimator = GumbelStraightThrough(Exponential(1.0, 0.3, 0.05))
        svi = make(svi_class, *bits("z", estimator))
        losses = [svi.step(x) for x in X[:5]]
        estimator.temperature = Exponential(1.0, 0.2, 0.1)
        losses += [svi.step(x) for x in X[5:25]]
        return losses, estimator.temperature.step_count

    assert same(scenario)[1] == 20


def test_a_schedule_that_estimators_share_is_counted_once():
    def scenario(svi_class):
        schedule = Exponential(1.0, 0.3, 0.05)

        def model(x):
            z = [pyro.sample(name, dist.Bernoulli(0.3)) for name in "yz"]
            observe((z[0] + z[1]).unsqueeze(-1).expand(5), x)

        def guide(x):
            for name in "yz":
                logits = pyro.param(f"l{name}", torch.tensor(0.0))
                estimator = estimators[name]
                pyro.sample(name, dist.Bernoulli(logits=logits), infer={"gradient": estimator})

        estimators = {name: GumbelStraightThrough(schedule) for name in "yz"}
        svi = make(svi_class, model, guide)
        return [svi.step(x) for x in X[:10]], schedule.step_count

    assert same(scenario)[1] == 10


def test_parameters_of_estimators_are_not_missed():
    svi = make(CapturedSVI, *bits("z", Relax(nn.Linear(1, 1))))
    for x in X[:5]:
        svi.step(x)
    assert all(step.replays == 3 for step in steps_of(svi))


def test_another_number_of_an_estimator():
    def scenario(svi_class):
        estimator = GumbelStraightThrough(1.0)
        svi = make(svi_class, *bits("z", estimator))
        losses = [svi.step(x) for x in X[:5]]
        estimator.temperature = 0.3
        return losses + [svi.step(x) for x in X[5:15]]

    same(scenario)


class Interrupted(pyro.optim.PyroOptim):
    """Is interrupted when ``now`` is set."""

    now = False

    def __call__(self, *args, **kwargs):
        if self.now:
            self.now = False
            raise KeyboardInterrupt
        super().__call__(*args, **kwargs)


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_an_interrupted_optimiser_leaves_schedules_as_they_are_in_svi(step):
    def scenario(svi_class):
        temperature = Exponential(1.0, 0.3, 0.01)
        optim = Interrupted(torch.optim.Adam, {"lr": 0.01, "fused": True})
        svi = make(svi_class, *bits("z", GumbelStraightThrough(temperature)), optim)
        for number in range(8):
            optim.now = number == step
            try:
                svi.step(X[0])
            except KeyboardInterrupt:
                assert number == step
        return temperature.step_count

    same(scenario)


# Optimisers


OPTIMISERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "amsgrad": lambda: pyro.optim.Adam({"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "for each": lambda: pyro.optim.Adam({"lr": 0.05, "foreach": True}),
    "not for each": lambda: pyro.optim.Adam({"lr": 0.05, "foreach": False}),
    "fused": lambda: pyro.optim.Adam({"lr": 0.05, "fused": True}),
    "not fused": lambda: pyro.optim.AdamW({"lr": 0.05, "fused": False}),
    "rate as a tensor": lambda: pyro.optim.Adam({"lr": torch.tensor(0.05)}),
    "maximize": lambda: pyro.optim.AdamW({"lr": 0.05, "maximize": True}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "p1" else 0.01}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
    "clipped adam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}),
    "sgd": lambda: pyro.optim.SGD({"lr": 0.05}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adagrad": lambda: pyro.optim.Adagrad({"lr": 0.05, "lr_decay": 0.1}),
    "rmsprop": lambda: pyro.optim.RMSprop({"lr": 0.05, "momentum": 0.5, "centered": True}),
    "adadelta": lambda: pyro.optim.Adadelta({}),
    "adamax": lambda: pyro.optim.Adamax({}),
    "nadam": lambda: pyro.optim.NAdam({}),
    "radam": lambda: pyro.optim.RAdam({}),
    "rprop": lambda: pyro.optim.Rprop({}),
    "asgd": lambda: pyro.optim.ASGD({}),
    "scheduled": lambda: pyro.optim.ExponentialLR(
        {"optimizer": optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.8}
    ),
}


def train_by(make, step, dtype):
    """Take twelve steps of ``step(optimiser, parameters)``; one parameter comes later."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    shapes = [(3, 4), (), (5,), (2, 3)]
    for number, shape in enumerate(shapes):
        pyro.param(f"p{number}", torch.randn(shape, dtype=dtype))
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    parameters[3].data = parameters[3].data.t()  # neither contiguous nor fused
    optimiser = make()
    for number in range(12):
        for parameter in parameters[: 3 if number < 4 else 4]:
            gradient = torch.randn(parameter.shape, dtype=dtype)
            parameter.grad = gradient
            if number % 5 == 2 and parameter.dim() == 0:
                parameter.grad = None
        step(optimiser, parameters[: 3 if number < 4 else 4])
        if isinstance(optimiser, PyroLRScheduler) and number % 3 == 2:
            optimiser.step()
    values = [p.detach().clone() for p in parameters]
    return values, optimiser.get_state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_same_parameters_and_the_same_state(name, dtype):
    rtol = 1e-6 if dtype == torch.float32 else 1e-12
    expected = train_by(OPTIMISERS[name], lambda optimiser, ps: optimiser(ps), dtype)
    found = train_by(OPTIMISERS[name], step_jointly, dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def test_half_precision_is_rounded_alike():
    expected, found = (
        train_by(OPTIMISERS["adam"], step, torch.bfloat16)
        for step in (lambda optimiser, ps: optimiser(ps), step_jointly)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def counted(optimiser, parameters):
    """Count the operations of torch's optimisers in a step."""
    with torch.profiler.profile() as profiled:
        step_jointly(optimiser, parameters)
    return sum("Optimizer.step" in event.name for event in profiled.events())


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end:UserWarning")
@pytest.mark.parametrize(("name", "number"), [("adam", 1), ("by name", 2), ("not for each", 4)])
def test_parameters_of_the_same_options_are_stepped_at_once(name, number):
    pyro.clear_param_store()
    for place in range(4):
        pyro.param(f"p{place}", torch.ones(3)).grad = torch.ones(3)
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    optimiser = OPTIMISERS[name]()
    optimiser(parameters)
    assert counted(optimiser, parameters) == number


def test_hooks_of_an_optimiser_run():
    pyro.clear_param_store()
    pyro.param("p", torch.ones(3)).grad = torch.ones(3)
    (parameter,) = [p for _, p in pyro.get_param_store().named_parameters()]
    optimiser, seen = OPTIMISERS["adam"](), []
    optimiser([parameter])
    optimiser.optim_objs[parameter].register_step_post_hook(lambda *args: seen.append(args[0]))
    step_jointly(optimiser, [parameter])
    assert seen == [optimiser.optim_objs[parameter]]
