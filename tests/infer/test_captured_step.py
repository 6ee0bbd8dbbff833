"""Parameters, tensors, comparisons and CUDA graphs of captured steps."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import (
    Plain,
    X,
    batches,
    make,
    observe,
    one_hot_programs,
    refused,
    replayed,
    same,
    steps_of,
)
from helpers.cuda_graphs import cuda_graphs_on_the_cpu
from pyro import poutine
from pyro.infer import SVI

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    ReinMax,
    Score,
)
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, captured_svi, config_gradient
from pyro_gumbel.infer._recording import CudaGraph, record

# Parameters and gradients


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


def test_a_trace_around_the_steps_sees_the_parameters():
    svi = make(CapturedSVI, Plain().model)
    for x in X[:5]:
        with poutine.trace(param_only=True) as traced:
            svi.step(x)
        assert set(traced.trace.nodes) == {"a"}


def test_a_parameter_of_the_first_step_only():
    def scenario(svi_class):
        first = [True]

        def model():
            shift = pyro.param("shift", torch.ones(())) if first else 0.0
            mean = pyro.param("mean", torch.zeros(()))
            pyro.sample("x", dist.Normal(mean + shift, 1.0), obs=torch.tensor(3.0))

        svi = make(svi_class, model)
        losses = [svi.step()]
        first.clear()
        return losses + [svi.step() for _ in range(10)]

    same(scenario)


def test_a_parameter_that_goes_later_is_noticed():
    early = [True]

    def model():
        shift = pyro.param("shift", torch.ones(())) if early else 0.0
        mean = pyro.param("mean", torch.zeros(()))
        pyro.sample("x", dist.Normal(mean + shift, 1.0), obs=torch.tensor(3.0))

    svi = make(CapturedSVI, model, check_every=3)
    for _ in range(4):
        svi.step()
    early.clear()
    with pytest.raises(RuntimeError, match=r"\['shift'\] were there in the first step only"):
        [svi.step() for _ in range(4)]
    for _ in range(4):
        svi.step()


# Tensors that programs write to, hold and replace


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


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_arguments(convert):
    def scenario(svi_class):
        def model(x):
            observe((x @ pyro.param("a", torch.ones(5, 1)))[:, 0], X[0])

        svi = make(svi_class, model)
        return [svi.step(convert(torch.diag(x))) for x in X[:6]]

    same(scenario)


class Recurrent(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net = kind(1, 5, num_layers=2, bidirectional=True)

    def model(self, x):
        pyro.module("net", self.net)
        observe(self.net(x.reshape(-1, 1, 1))[0][-1, 0, :5], x)


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_recurrent_networks(kind):
    def scenario(svi_class):
        pyro.set_rng_seed(1)
        svi = make(svi_class, Recurrent(kind).model, check_every=3)
        return [svi.step(x) for x in X[:8]]

    same(scenario)


# Compiling turns torch's validation off.
@pytest.mark.filterwarnings("ignore")
def test_compiled_modules():
    def scenario(svi_class):
        pyro.set_rng_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh())
        compiled = torch.compile(net, backend="aot_eager")

        def model(x):
            pyro.module("net", net)
            observe(compiled(x), x)

        svi = make(svi_class, model, check_every=3)
        return [svi.step(x) for x in X[:8]]

    with pyro.validation_enabled(False):
        same(scenario)


def test_buffers_that_are_replaced_are_refused_and_restored():
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


# Comparisons with eager steps


def counting_model(state):
    def model():
        state["calls"] += 1
        loc = pyro.param("loc", torch.tensor(0.0))
        with poutine.scale(scale=min(1.0, state["calls"] / 1000)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    return model


def from_an_iterator():
    batches_to_come = iter(torch.arange(100.0))
    return lambda: next(batches_to_come)


def from_a_generator_of_numpys():
    generator = np.random.default_rng(0)
    return lambda: torch.as_tensor(generator.normal())


def from_a_state_in_an_attribute():
    holder = torch.nn.Module()
    holder.state = torch.tensor(1.0)

    def advance():
        holder.state = holder.state * 2
        return holder.state

    return advance


@pytest.mark.parametrize(
    "make_source", [from_an_iterator, from_a_generator_of_numpys, from_a_state_in_an_attribute]
)
def test_data_that_the_program_moves_on_itself_is_noticed_at_the_first_replay(make_source):
    source = make_source()

    def model():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=source())

    svi = make(CapturedSVI, model)
    svi.step()
    svi.step()
    before = pyro.param("loc").detach().clone()
    with pytest.raises(RuntimeError, match=r"the loss differs|gradient of 'loc' differs"):
        svi.step()
    assert torch.equal(pyro.param("loc").detach(), before)


def test_number_that_changes_is_noticed():
    svi = make(CapturedSVI, counting_model({"calls": 0}))
    svi.step()
    svi.step()
    with pytest.raises(RuntimeError, match=r"svi.step\(x, torch.tensor\(beta\)\)"):
        svi.step()


def test_number_that_changes_later_is_noticed_at_the_next_comparison():
    state = {"calls": 10_000}
    svi = make(
        CapturedSVI, counting_model(state), optim=pyro.optim.Adam({"lr": 0.01}), check_every=5
    )
    for _ in range(5):
        svi.step()
    state["calls"] = 500
    with pytest.raises(RuntimeError, match="has changed since it was recorded"):
        [svi.step() for _ in range(6)]
    assert svi.step() == pytest.approx(0.5 * 1.4189385, rel=0.2)  # starts anew


def test_structure_that_changes_is_noticed():
    state = {"extra": False}

    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))
        if state["extra"]:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(2.0))

    svi = make(CapturedSVI, model, check_every=3)
    for _ in range(4):
        svi.step()
    state["extra"] = True
    with pytest.raises(RuntimeError, match="has changed since it was recorded"):
        [svi.step() for _ in range(4)]


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


# Steps as graphs, on a stand-in for CUDA graphs that runs on a CPU


CPU = torch.device("cpu")


@pytest.fixture
def watched():
    """The tensors that the capture of a graph must not change."""
    with cuda_graphs_on_the_cpu() as tensors:
        yield tensors


def noisy_step(weight):
    def step(x, scale):
        loss = (x @ weight * scale + torch.randn(3, dtype=weight.dtype)).square().sum()
        return [loss.detach(), torch.autograd.grad(loss, weight)[0]]

    return step


def descend(weight):
    @torch.no_grad()
    def apply(gradient):
        weight.sub_(gradient, alpha=0.1)

    return apply


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    return [x, torch.tensor(0.5 + seed, dtype=torch.float64)]


def test_a_graph_computes_what_its_recording_does(watched):
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    twin = weight.detach().clone().requires_grad_()
    watched.append(weight)
    _, recording = record(noisy_step(weight), inputs(0))
    before, generator = weight.detach().clone(), torch.get_rng_state()
    step = CudaGraph(recording, inputs(0), CPU)
    (_, gradient), _ = step(inputs(0))
    torch.set_rng_state(generator)
    update = CudaGraph(lambda _: descend(weight)(gradient), [], CPU)
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), generator)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        (loss, _), _ = step(inputs(seed))
        update([])
        torch.manual_seed(seed)
        expected_loss, expected_gradient = noisy_step(twin)(*inputs(seed))
        descend(twin)(expected_gradient)
        torch.testing.assert_close((loss, gradient), (expected_loss, expected_gradient))
        torch.testing.assert_close(weight, twin)


def graphed():
    return pyro.optim.SGD({"lr": 0.01, "momentum": 0.9})


def scheduled():
    settings = {"lr": 0.01, "momentum": 0.9}
    schedule = {"optimizer": torch.optim.SGD, "optim_args": settings, "gamma": 0.8}
    return pyro.optim.ExponentialLR(schedule)


def counting():
    return pyro.optim.Adam({"lr": 0.01, "foreach": True})  # reads the number of steps


def train(svi_class, estimator, make_optim, watched, steps=12):
    """Losses and parameters after some steps, as if the device could capture graphs."""
    pyro.clear_param_store()
    watched.clear()
    model, guide, parameters = one_hot_programs()
    watched += parameters
    optim = make_optim()
    elbo = Estimator_ELBO(max_plate_nesting=1)
    svi = svi_class(model, config_gradient(guide, estimator), optim, elbo)
    pyro.set_rng_seed(11)
    losses = []
    for number, batch in enumerate(batches(steps)):
        losses.append(svi.step(batch))
        watched += [
            value
            for one in optim.optim_objs.values()
            for state in getattr(one, "optimizer", one).state.values()
            for value in state.values()
            if all(value is not other for other in watched)
        ]
        if number % 4 == 3 and make_optim is scheduled:
            optim.step()
        if svi_class is CapturedSVI:
            for step in steps_of(svi):
                step._graphable = step.replays == 0 or step._graphable
    return svi, losses, [p.detach().clone() for p in parameters]


@pytest.mark.parametrize(("make_optim", "graphs"), [(graphed, 1), (scheduled, 3), (counting, 0)])
@pytest.mark.parametrize(
    "make", [ReinMax, lambda: GumbelStraightThrough(Exponential(1.0, 0.1, 0.05))]
)
def test_training_by_graphs_is_training(make, make_optim, graphs, watched, monkeypatch):
    made = []  # of steps of the optimiser, one for each rate
    counted = lambda *args: made.append(args) or CudaGraph(*args)  # noqa: E731
    monkeypatch.setattr(captured_svi, "CudaGraph", counted)
    monkeypatch.setattr(captured_svi, "_SETTLED", 1)
    svi, *outcome = train(CapturedSVI, make(), make_optim, watched)
    (step,) = steps_of(svi)
    assert step.graph is not None
    assert len(made) == graphs
    expected = list(train(SVI, make(), make_optim, [])[1:])
    torch.testing.assert_close(outcome, expected, rtol=1e-9, atol=1e-12)


def test_states_of_estimators_are_not_overwritten(watched):
    estimator = Score(MovingAverage(0.8))
    svi, *_ = train(CapturedSVI, estimator, counting, watched)
    kept = estimator.baseline.state_dict()
    values = copy.deepcopy(kept)
    svi.step(batches(1)[0])
    torch.testing.assert_close(kept, values, rtol=0, atol=0)


ELSEWHERE = torch.device("cpu:0")  # to torch that is not the CPU


def recorded(beta):
    """Record a step that reads ``beta``, as if its parameter were on a device that has graphs."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))

    def model(x):
        mean = pyro.param("weight", weight) * beta
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x[0])

    pyro.clear_param_store()
    optim = pyro.optim.SGD({"lr": 0.01})
    svi = CapturedSVI(model, lambda x: None, optim, Estimator_ELBO(max_plate_nesting=0))
    for batch in batches(2):
        svi.step(batch)
    (step,) = steps_of(svi)
    step.device, step._graphable = ELSEWHERE, True
    return svi, step


def test_a_step_with_tensors_elsewhere_is_replayed_with_a_warning(watched):
    svi, step = recorded(torch.tensor(0.5).double())
    with pytest.warns(
        UserWarning, match=r"one CUDA graph, for aten.* gives a tensor on cpu"
    ) as got:
        losses = {svi.step(batch) for batch in batches(3)}
    assert len(got) == 1
    assert step.graph is None
    assert len(losses) == 3


def test_numbers_on_another_device_are_watched(watched):
    beta = torch.tensor(0.5, dtype=torch.float64)
    _, step = recorded(beta)
    step.recording.devices.clear()
    graphs = []
    for value in (0.5, 0.5, 0.25):
        if beta != value:
            beta.fill_(value)
        step.replay([batches(1)[0]])
        graphs.append(step.graph)
    assert graphs[0] is graphs[1] is not graphs[2]
