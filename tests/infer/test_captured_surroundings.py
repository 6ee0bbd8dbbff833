"""Modes of modules, handlers around steps, and states of estimators."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import Plain, X, make, observe, replayed, same, steps_of
from pyro import poutine

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    ReinMax,
    Score,
)
from pyro_gumbel.guides import AutoDiscrete
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient

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


def test_handlers_of_their_own():
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.full((5,), 0.5)), x)

        svi = make(svi_class, model, optim=pyro.optim.SGD({"lr": 0.0}))
        losses = []
        for scale in (0.1, 0.2, 0.3, 0.4):
            with poutine.scale(scale=scale):
                losses += [svi.step(X[0]) for _ in range(4)]
        return losses

    assert len(set(same(scenario))) == 4


def test_handlers_and_methods_made_at_each_step():
    plain = Plain()
    svi = make(CapturedSVI, plain.model)
    for x in X[:40]:
        svi.model = plain.model
        with poutine.scale(scale=0.5):
            svi.step(x)
    (step,) = steps_of(svi)
    assert step.replays == 38


def test_recordings_that_are_never_used_again_are_forgotten():
    svi = make(CapturedSVI, Plain().model)

    def scaled_steps():
        for number in range(100):
            svi.step(X[0])
            with poutine.scale(scale=1.5 + number):
                svi.step(X[0])

    with pytest.warns(UserWarning, match="handlers so far.*make handlers around steps once"):
        scaled_steps()
    assert len(steps_of(svi)) <= 32
    assert max(step.replays for step in steps_of(svi)) == 98  # what comes again is kept


def test_parts_that_are_replaced():
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)), x)

        def other(x):
            observe(2 * pyro.param("a", torch.zeros(5)) + 1, x)

        svi = make(svi_class, model)
        losses = [svi.step(x) for x in X[:5]]
        svi.optim = pyro.optim.SGD({"lr": 0.0})
        losses += [svi.step(x) for x in X[:5]]
        svi.model = other
        return losses + [svi.step(x) for x in X[:5]]

    same(scenario)


def test_autocast_is_part_of_what_is_recorded():
    def scenario(svi_class):
        net = torch.nn.Linear(5, 5)

        def model(x):
            pyro.module("net", net)
            observe(net(x).float(), x)

        svi = make(svi_class, model)
        losses = []
        for low in (False, True, False):
            for x in X[:4]:
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    losses.append(svi.step(x))
        return losses

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


def test_schedules_that_are_replaced():
    def scenario(svi_class):
        estimator = GumbelStraightThrough(Exponential(1.0, 0.3, 0.05))
        svi = make(svi_class, *bits("z", estimator))
        losses = [svi.step(x) for x in X[:5]]
        estimator.temperature = Exponential(1.0, 0.2, 0.1)
        losses += [svi.step(x) for x in X[5:25]]
        return losses, estimator.temperature.step_count

    assert same(scenario)[1] == 20


def test_two_programs_whose_structure_is_found_by_trials():
    def scenario(svi_class):
        elbo = Estimator_ELBO(2, vectorize_particles=True)

        def programs(name):
            def model(x):
                with pyro.plate("data", 5):
                    z = pyro.sample(name, dist.Bernoulli(0.3))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

            def guide(x):
                logits = pyro.param(f"l{name}", torch.zeros(5))
                with pyro.plate("data", 5):
                    pyro.sample(name, dist.Bernoulli(logits=logits))

            return model, config_gradient(guide, ReinMax())

        both = [make(svi_class, *programs(name), elbo=elbo) for name in "zy"]
        return [svi.step(x) for x in X[:8] for svi in both]

    same(scenario)


def test_guides_that_read_the_plates_of_the_model():
    def scenario(svi_class):
        def model(x):
            group = pyro.sample("group", dist.OneHotCategorical(torch.tensor([0.3, 0.7])))
            with pyro.plate("data", 5):
                z = pyro.sample("z", dist.Bernoulli(0.4))
                pyro.sample("x", dist.Normal(z + group[..., 0], 1.0), obs=x)

        guide = AutoDiscrete(model, gradient=ReinMax())
        svi = make(svi_class, model, guide)
        return [svi.step(x) for x in X[:8]]

    same(scenario)


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
