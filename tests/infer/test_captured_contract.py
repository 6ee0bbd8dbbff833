"""Captured steps leave the user's program, optimiser and settings as eager ones do."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import X, make, observe, same, steps_of
from pyro import poutine
from pyro.infer import SVI

from pyro_gumbel.estimators import DisARM, GumbelStraightThrough, ReinMax
from pyro_gumbel.infer import (
    CapturedSVI,
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    config_gradient,
)


def bit_programs(runs=None):
    def model(x):
        if runs is not None:
            runs.append(dist.is_validation_enabled())
        z = pyro.sample("z", dist.Bernoulli(0.3))
        observe(z.unsqueeze(-1).expand(z.shape + (5,)), x)

    def guide(x):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))

    return model, guide


@pytest.mark.parametrize("estimator", [ReinMax, DisARM, lambda: GumbelStraightThrough(0.5)])
@pytest.mark.parametrize("vectorize", [False, True])
def test_four_steps_run_the_programs_eight_times_at_most(estimator, vectorize):
    runs: list[bool] = []
    model, guide = bit_programs(runs)
    elbo = Estimator_ELBO(vectorize_particles=True) if vectorize else Estimator_ELBO()
    svi = make(CapturedSVI, model, config_gradient(guide, estimator()), elbo=elbo)
    for x in X[:4]:
        svi.step(x)
    assert len(runs) <= 8
    more = len(runs)
    for x in X[4:30]:
        svi.step(x)
    assert len(runs) == more
    (step,) = steps_of(svi)
    assert step.replays == 28


@pytest.mark.parametrize("enabled", [False, True])
def test_validation_is_what_the_user_set_in_every_run(enabled):
    runs: list[bool] = []
    model, guide = bit_programs(runs)
    with pyro.validation_enabled(enabled):
        svi = make(CapturedSVI, model, config_gradient(guide, ReinMax()), check_every=2)
        for x in X[:8]:
            svi.step(x)
    assert set(runs) == {enabled}


@pytest.mark.parametrize(
    "make_optim",
    [
        lambda: pyro.optim.Adam({"lr": 0.05}),
        lambda: pyro.optim.SGD({"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        lambda: pyro.optim.RMSprop({"lr": 0.05}),
        lambda: pyro.optim.Adagrad({"lr": 0.05}),
        lambda: pyro.optim.AdamW({"lr": 0.05, "amsgrad": True, "foreach": True}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "l" else 0.01}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}),
        lambda: pyro.optim.AdagradRMSProp({}),
    ],
)
def test_optimisers_end_in_the_same_state(make_optim):
    def scenario(svi_class):
        optim = make_optim()
        model, guide = bit_programs()
        svi = make(svi_class, model, config_gradient(guide, ReinMax()), optim)
        losses = [svi.step(x) for x in X[:10]]
        return losses, optim.get_state()

    same(scenario)


def test_an_optimiser_that_needs_a_closure_is_refused_by_name():
    model, guide = bit_programs()
    for optim in (
        pyro.optim.PyroOptim(torch.optim.LBFGS, {"lr": 0.1}),
        pyro.optim.StepLR({"optimizer": torch.optim.LBFGS, "optim_args": {}, "step_size": 1}),
    ):
        with pytest.raises(TypeError, match=r"LBFGS evaluates the loss by a closure.*Adam"):
            make(CapturedSVI, model, guide, optim)


def test_two_that_share_an_optimiser():
    def scenario(svi_class):
        optim = pyro.optim.Adam({"lr": 0.05})

        def other(x):
            observe(pyro.param("l", torch.tensor(0.0)) + pyro.param("m", torch.zeros(5)), x)

        model, guide = bit_programs()
        first = make(svi_class, model, config_gradient(guide, ReinMax()), optim)
        second = make(svi_class, other, optim=optim)
        return [svi.step(x) for x in X[:10] for svi in (first, second)]

    same(scenario)


OPTIONS = {
    "num_particles": (Estimator_ELBO, {"num_particles": 2}, 3),
    "vectorize_particles": (Estimator_ELBO, {"num_particles": 2}, True),
    "analytic_kl": (Estimator_ELBO, {}, True),
    "doubly_reparameterized": (ImportanceWeighted_ELBO, {"num_particles": 3}, True),
    "default": (Estimator_ELBO, {"default": "auto"}, "score"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_loss_that_change(option):
    kind, options, value = OPTIONS[option]

    def model(x):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        observe((y + z).unsqueeze(-1).expand((y + z).shape + (5,)), x)

    def guide(x):
        pyro.sample("y", dist.Normal(pyro.param("mu", torch.tensor(0.3)), 1.0))
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))

    def scenario(svi_class):
        elbo = kind(**options, max_plate_nesting=0)
        svi = make(svi_class, model, guide, elbo=elbo)
        losses = [svi.step(x) for x in X[:6]]
        setattr(elbo, option, value)
        return losses + [svi.step(x) for x in X[6:14]]

    same(scenario)


def test_a_graph_that_is_retained():
    def scenario(svi_class):
        weight = torch.ones(5, requires_grad=True)
        data = 2 * weight  # one graph for all steps
        elbo = Estimator_ELBO(max_plate_nesting=0, retain_graph=True)

        def model(x):
            observe(pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model, elbo=elbo, check_every=2)
        return [svi.step(data) for _ in range(8)], weight.grad

    same(scenario)


@pytest.mark.parametrize("how", ["set", "delete", "clear", "load"])
def test_parameters_that_are_replaced_in_the_store(how, tmp_path):
    def scenario(svi_class):
        def model(x):
            scale = pyro.param("s", torch.ones(()), constraint=dist.constraints.positive)
            observe(pyro.param("a", torch.zeros(5)), x, scale)

        svi = make(svi_class, model)
        store = pyro.get_param_store()
        losses = [svi.step(x) for x in X[:4]]
        store.save(tmp_path / "store")
        losses += [svi.step(x) for x in X[4:8]]
        if how == "set":
            store["s"] = torch.tensor(3.0)
        elif how == "delete":
            del store["s"]
        elif how == "clear":
            pyro.clear_param_store()
        else:
            store.load(tmp_path / "store")
        return losses + [svi.step(x) for x in X[8:16]]

    same(scenario)


def test_views_of_one_tensor_as_arguments():
    def scenario(svi_class):
        def model(x, y):
            with torch.no_grad():
                x.mul_(0.5)
            observe(pyro.param("a", torch.zeros(5)) * y[:5], x[:5])

        svi = make(svi_class, model, check_every=3)
        losses = []
        for number, row in enumerate(X[:12]):
            memory = torch.cat([row, row])
            pair = (memory[:6], memory[1:7]) if number % 2 else (memory[:6], memory[:6] + 1)
            losses += [svi.step(*pair), memory.sum().item()]
        return losses

    same(scenario)


def test_a_trace_around_the_steps_sees_the_parameters():
    model, guide = bit_programs()
    svi = make(CapturedSVI, model, config_gradient(guide, ReinMax()))
    for x in X[:5]:
        with poutine.trace(param_only=True) as traced:
            svi.step(x)
        assert set(traced.trace.nodes) == {"l"}


def test_a_number_that_the_program_counts_is_left_to_it():
    counts = {}
    for svi_class in (SVI, CapturedSVI):
        seen: list[int] = []

        def model(x, seen=seen):
            seen.append(len(seen))
            observe(pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model)
        for x in X[:20]:
            svi.step(x)
        assert seen == list(range(len(seen)))  # no invented counts
        counts[svi_class] = len(seen)
    assert counts[CapturedSVI] < counts[SVI]


def test_probabilities_that_become_extreme():
    """Whether torch has clamped the logits decides which parameter is read."""
    usual, extreme = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1e-9, 0.4, 0.6])
    runs = []

    def model(x, probs):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(z @ pyro.param("a", torch.ones(3)), 1.0), obs=x)

    def guide(x, probs):
        runs.append(probs)
        with pyro.plate("data", 5):
            pyro.sample("z", dist.OneHotCategorical(probs * pyro.param("b", torch.ones(3))))

    def scenario(svi_class):
        runs.clear()
        svi = make(svi_class, model, config_gradient(guide, ReinMax()))
        return [svi.step(x, usual if n < 5 or n % 2 else extreme) for n, x in enumerate(X[:30])]

    with pyro.validation_enabled(True):
        same(scenario)
    assert len(runs) < 10
