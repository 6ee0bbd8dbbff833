"""Parameters and gradients of captured steps."""

from __future__ import annotations

import gc
import math
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import Plain, X, make, observe, refused, replayed, same
from pyro.infer import SVI

from pyro_gumbel.infer import CapturedSVI


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


def test_parameters_that_come_after_the_recording_are_noticed():
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


@replayed()
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


def test_leaves_that_are_not_parameters_get_gradients():
    """An optimiser of the user's own may train them."""

    def scenario(svi_class):
        pyro.set_rng_seed(1)
        outside = torch.nn.Linear(5, 5)
        plain = torch.optim.SGD(outside.parameters(), lr=0.01)

        def model(x):
            observe(outside(x) + pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model, check_every=3)
        losses = []
        for number, x in enumerate(X[:12]):
            losses.append(svi.step(x))
            if number % 3 != 1:  # else they add up
                plain.step()
                plain.zero_grad()
        return losses, outside.weight.detach().clone()

    same(scenario)


@pytest.mark.parametrize("computed", [False, True])
def test_arguments_get_gradients(computed):
    def scenario(svi_class):
        weight = torch.ones(5, requires_grad=True)

        def model(x, weight):
            observe(x * weight * pyro.param("a", torch.ones(5)), x)

        svi = make(svi_class, model, check_every=3)
        losses, gradients = [], []
        for x in X[:9]:
            losses.append(svi.step(x, 2 * weight if computed else weight))
            gradients.append(weight.grad.clone())
        return losses, gradients

    same(scenario)


def test_arguments_that_could_have_gradients_and_get_none():
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)), x.detach())

        svi = make(svi_class, model)
        return [svi.step(x.clone().requires_grad_()) for x in X[:6]]

    same(scenario)


def test_sparse_gradients_and_late_hooks_are_refused():
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


@replayed()
def test_gradients_that_are_no_numbers_are_no_change():
    def model(x):
        a = pyro.param("a", torch.zeros(5))
        observe(a + 0 * (a - a).sqrt(), x)

    with pyro.validation_enabled(False):
        svi = make(CapturedSVI, model, check_every=1, optim=pyro.optim.SGD({"lr": 0.0}))
        losses = [svi.step(x) for x in X[:6]]
    assert all(math.isfinite(loss) for loss in losses[:1])


@replayed()
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


@replayed()
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
