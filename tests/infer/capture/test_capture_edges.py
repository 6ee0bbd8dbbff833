"""A captured step beside Pyro's own from the same seed, where programs do unusual things."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    ReinMax,
    Score,
)
from pyro_gumbel.guides import AutoDiscrete
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))


def make(svi_class, model, guide=lambda *args, **kwargs: None, optim=None, elbo=None, **options):
    options = options if svi_class is CapturedSVI else {}
    optim = optim or pyro.optim.Adam({"lr": 0.05})
    return svi_class(model, guide, optim, elbo or Estimator_ELBO(max_plate_nesting=1), **options)


def same(scenario):
    """Run a scenario, given the class, by both; return what it returned."""
    outcomes = []
    for svi_class in (SVI, CapturedSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        outcome = scenario(svi_class)
        store = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
        outcomes.append((outcome, store))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-5)
    return outcomes[1][0]


def refused(scenario, match):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pytest.raises(RuntimeError, match=match) as error:
        scenario(CapturedSVI)
    assert "Trace Shapes" not in str(error.value)


def observe(mean, x, scale=1.0):
    pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)


# Memory: what is written to, and what is the same


def written_by_unbind(a, x):
    rows, _ = torch.zeros(2, 5).unbind(0)
    return a * rows.add_(x)


def written_as_out(a, x):
    total = torch.zeros(5)
    torch.add(total, x, out=total)
    return a * total


def written_in_a_list(a, x):
    total = torch.zeros(5)
    torch._foreach_add_([total[1:], total[:1]], [x[1:], x[:1]])
    return a * total


@pytest.mark.parametrize("mean", [written_by_unbind, written_as_out, written_in_a_list])
def test_scratch_tensors_are_made_anew(mean):
    def scenario(svi_class):
        def model(x):
            observe(mean(pyro.param("a", torch.ones(5)), x), x + 1)

        svi = make(svi_class, model)
        return [svi.step(x) for x in X[:10]]

    same(scenario)


@pytest.mark.parametrize("how", ["out", "chunk", "argument"])
def test_what_a_step_counts_is_counted_once(how):
    def scenario(svi_class):
        count = torch.zeros(2)

        def model(x, given):
            with torch.no_grad():
                if how == "out":
                    torch.add(count, 1.0, out=count)
                elif how == "chunk":
                    count.chunk(2)[0].add_(1.0)
                    torch._foreach_add_([count[1:]], 1.0)
                else:
                    given.add_(1.0)
            observe(pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model, check_every=3)
        for x in X[:10]:
            svi.step(x, count)
        return count

    assert torch.equal(same(scenario), torch.full((2,), 10.0))


def test_arguments_that_were_one_tensor_when_recorded():
    def scenario(svi_class):
        def model(x, y):
            observe(pyro.param("a", torch.zeros(5)) * x, y)

        svi = make(svi_class, model)
        pairs = [(x, x) for x in X[:4]] + [(x, 2 * x + 1) for x in X[4:30]]
        return [svi.step(*pair) for pair in pairs]

    same(scenario)


def test_an_argument_that_the_program_holds_too():
    data = X[0]

    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)) * data, x)

        svi = make(svi_class, model)
        return [svi.step(x) for x in (data, data, data, *X[1:20])]

    same(scenario)


def test_gradients_that_are_one_tensor_are_clipped_apart():
    def scenario(svi_class):
        def model(x):
            a, b = (pyro.param(name, torch.zeros(5)) for name in "ab")
            observe(a + b, x + 3)

        def clip(*names):
            return {"clip_value": 0.1} if "a" in names else {"clip_value": 100.0}

        svi = make(svi_class, model, optim=pyro.optim.SGD({"lr": 0.05}, clip))
        return [svi.step(x) for x in X[:10]]

    same(scenario)


# Parameters and their gradients


def test_parameters_that_come_later_are_trained():
    def scenario(svi_class):
        state = {"more": False}

        def model(x):
            mean = pyro.param("a", torch.zeros(5))
            if state["more"]:
                mean = mean + pyro.param("b", torch.zeros(5))
            observe(mean, x + 2)

        svi = make(svi_class, model)
        losses = [svi.step(X[0])]
        state["more"] = True  # before the step is recorded
        return losses + [svi.step(x) for x in X[:10]]

    same(scenario)


def test_parameters_that_come_after_the_recording_are_told():
    state = {"more": False}

    def model(x):
        observe(pyro.param("a", torch.zeros(5)), x)
        if state["more"]:
            pyro.sample("y", dist.Normal(pyro.param("c", torch.zeros(())), 1.0), obs=x[0])

    svi = make(CapturedSVI, model, check_every=3)
    for x in X[:4]:
        svi.step(x)
    state["more"] = True
    with pytest.raises(RuntimeError, match=r"parameters \['c'\] were not there.*svi.reset\(\)"):
        [svi.step(x) for x in X[:4]]
    for x in X[:10]:
        svi.step(x)
    assert pyro.param("c").abs() > 0.01


def test_frozen_and_released_parameters():
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)) + pyro.param("b", torch.zeros(5)), x + 2)

        svi = make(svi_class, model)
        losses = []
        for step, x in enumerate(X[:30]):
            if step in (8, 20):
                pyro.get_param_store()._params["b"].requires_grad_(step == 20)
                if svi_class is SVI:  # whose optimiser would go on with zeros and its momentum
                    svi.optim.optim_objs.pop(pyro.get_param_store()._params["b"])
            losses.append(svi.step(x))
            if step == 10:
                frozen = pyro.param("b").detach().clone()
            if step == 19:
                assert torch.equal(pyro.param("b"), frozen)
        return losses

    pyro.set_rng_seed(0)
    scenario(CapturedSVI)
    assert pyro.param("b").detach().abs().max() > 0.5


def test_gradients_rest_at_zero_and_others_are_added():
    def scenario(svi_class):
        def model(x, both):
            mean = pyro.param("a", torch.zeros(5))
            b = pyro.param("b", torch.ones(5))
            observe(mean + b if both else mean, x + 2)

        svi = make(svi_class, model, optim=pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}))
        parameters = pyro.get_param_store()._params
        losses = []
        for step, x in enumerate(X[:30]):
            losses.append(svi.step(x, step % 3 == 0))  # momentum carries b on in between
            assert all((p.grad == 0).all() for p in parameters.values())
            if step % 5 == 4:
                parameters["a"].grad.add_(0.3)
            if step == 17:
                parameters["b"].grad = torch.full((5,), -0.2)
        return losses

    same(scenario)


def test_other_leaves_are_told_once():
    outside = torch.nn.Linear(5, 5)

    def with_a_module(svi_class):
        def model(x):
            observe(outside(x) + pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model, check_every=2)
        return [svi.step(x) for x in X[:9]]

    def with_an_argument(svi_class, double=lambda x: x):
        def model(x):
            observe(x * pyro.param("a", torch.zeros(5)), x.detach())

        svi = make(svi_class, model, check_every=2)
        return [svi.step(double(x.clone().requires_grad_())) for x in X[:9]]

    for scenario in (
        with_a_module,
        with_an_argument,
        lambda svi_class: with_an_argument(svi_class, lambda x: x * 2),
    ):
        with pytest.warns(UserWarning, match=r"shape \(5,.* is no parameter of Pyro's") as told:
            same(scenario)
        assert len(told) == 1


def test_arguments_that_could_have_gradients_and_get_none():
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)), x.detach())

        svi = make(svi_class, model)
        return [svi.step(x.clone().requires_grad_()) for x in X[:6]]

    same(scenario)


def test_sparse_gradients_and_late_hooks_are_told():
    def sparse(svi_class):
        table = torch.nn.Embedding(4, 5, sparse=True)

        def model(x):
            pyro.module("table", table)
            observe(table(torch.tensor(1)), x)

        svi = make(svi_class, model, optim=pyro.optim.SGD({"lr": 0.1}))
        [svi.step(x) for x in X[:3]]

    def hooked(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model)
        svi.step(X[0])
        pyro.get_param_store()._params["a"].register_post_accumulate_grad_hook(lambda p: None)
        svi.step(X[0])

    refused(sparse, "a gradient is sparse; write sparse=False")
    refused(hooked, "a hook that runs after.*use register_hook")


# What Python does


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist()[0],
        lambda x: float(x.numpy()[0]),
        lambda x: torch.tensor([x[0], x[1]])[0],
    ],
    ids=["tolist", "numpy", "tensor"],
)
def test_numbers_read_without_an_operation_are_told(read):
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)) * read(x), x)

        svi = make(svi_class, model)
        [svi.step(X[0]) for _ in range(3)]

    refused(scenario, "turns a tensor into numbers")


def test_buffers_that_are_replaced_are_told_and_put_back():
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(5))
            self.norm = torch.nn.BatchNorm1d(1)

        def forward(self, x):
            self.norm(x.unsqueeze(-1))
            self.mean = 0.9 * self.mean + 0.1 * x
            return x

    mean = Mean()

    def scenario(svi_class):
        def model(x):
            observe(mean(x) * pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model)
        [svi.step(x) for x in X[:3]]

    refused(scenario, r"in place of the buffers \['mean'\]; write to them")
    torch.testing.assert_close(mean.mean, 0.1 * X[0])
    assert mean.norm.num_batches_tracked == 1


def test_small_terms_count_in_a_comparison():
    """The gradient of one parameter is wrong, and small beside that of another."""
    state = {"weight": 1.0}

    def model(x):
        observe(pyro.param("a", torch.zeros(5)), 1e4 * x)
        b = pyro.param("b", torch.tensor(3.0))
        pyro.sample("y", dist.Normal(b * state["weight"], 1.0), obs=x[0])

    svi = make(CapturedSVI, model, check_every=1)
    for x in X[:4]:
        svi.step(x)
    state["weight"] = 0.5
    with pytest.raises(RuntimeError, match="has changed since it was recorded"):
        svi.step(X[0])


def test_validation_of_the_step_that_is_recorded():
    def model(x):
        observe(pyro.param("a", torch.zeros(5)), x)

    svi = make(CapturedSVI, model)
    svi.step(X[0])
    before = pyro.param("a").detach().clone()
    with pytest.raises(ValueError, match="within the support"):
        svi.step(X[1] * float("nan"))
    assert torch.equal(pyro.param("a"), before)
    svi.step(X[1])


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
def test_modes_of_modules_behind_methods(wrap, part):
    vae = Dropping()
    guide = wrap(vae.guide, {}) if wrap is config_gradient else wrap(vae.guide)
    svi = make(CapturedSVI, vae.model, guide, pyro.optim.SGD({"lr": 0.0}))
    assert len({svi.step(X[0]) for _ in range(8)}) > 3
    part(vae).eval()
    assert len({svi.step(X[0]) for _ in range(8)}) == 1


NET = torch.nn.Dropout(0.5)


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


def test_released_weights_of_a_module_are_trained():
    def scenario(svi_class):
        net = torch.nn.Linear(5, 5)
        net.weight.requires_grad_(False)

        def model(x):
            pyro.module("net", net)
            observe(net(x), x + 2)

        svi = make(svi_class, model)
        losses = [svi.step(x) for x in X[:8]]
        net.weight.requires_grad_(True)
        return losses + [svi.step(x) for x in X[8:30]], net.weight.detach().clone()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was not registered in the param store")
        same(scenario)


class Plain:
    def __init__(self):
        self.net = torch.nn.Dropout(0.5)

    def model(self, x, net=None):
        observe((net or self.net)(pyro.param("a", torch.ones(5)) * x), x + 1)


@pytest.mark.parametrize("as_argument", [False, True])
def test_modes_of_modules_in_plain_objects_and_arguments(as_argument):
    plain = Plain()
    given = [plain.net] if as_argument else []
    svi = make(CapturedSVI, plain.model, optim=pyro.optim.SGD({"lr": 0.0}))
    assert len({svi.step(X[0], *given) for _ in range(8)}) > 3
    plain.net.eval()
    assert len({svi.step(X[0], *given) for _ in range(8)}) == 1


def test_handlers_and_methods_made_at_each_step():
    plain = Plain()
    svi = make(CapturedSVI, plain.model)
    for x in X[:40]:
        svi.model = plain.model
        with poutine.scale(scale=0.5):
            svi.step(x)
    (step,) = svi._steps.values()
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
    assert len(svi._steps) <= 32
    assert next(iter(svi._steps.values())).replays == 98  # what comes again is kept


def test_parameters_of_a_cleared_store_are_let_go():
    svi = make(CapturedSVI, Plain().model)
    for x in X[:4]:
        svi.step(x)
    gone = weakref.ref(pyro.get_param_store()._params["a"])
    pyro.clear_param_store()
    svi.optim = pyro.optim.Adam({"lr": 0.1})
    svi.reset()
    gc.collect()
    assert gone() is None


def test_parameters_that_change_their_dtype():
    svi = make(CapturedSVI, Plain().model, optim=pyro.optim.SGD({"lr": 0.1}))
    for x in X[:4]:
        svi.step(x)
    parameter = pyro.get_param_store()._params["a"]
    parameter.data = parameter.data.double()
    parameter.grad = None
    for x in X[:4]:
        svi.step(x.double())
    assert parameter.dtype == parameter.grad.dtype == torch.float64


def test_sparse_arguments():
    def scenario(svi_class):
        def model(x):
            observe(torch.sparse.mm(x, pyro.param("a", torch.ones(5, 1)))[:, 0], X[0])

        svi = make(svi_class, model)
        weights = [torch.diag(x).to_sparse() for x in X[:3]]
        return [svi.step(weight) for weight in weights]

    same(scenario)


def test_gradients_that_are_no_numbers_are_no_change():
    def model(x):
        a = pyro.param("a", torch.zeros(5))
        observe(a + 0 * (a - a).sqrt(), x)

    with pyro.validation_enabled(False):
        svi = make(CapturedSVI, model, check_every=1, optim=pyro.optim.SGD({"lr": 0.0}))
        losses = [svi.step(x) for x in X[:6]]
    assert all(math.isfinite(loss) for loss in losses[:1])
