"""Steps as graphs, on a stand-in for CUDA graphs that runs on a CPU."""

from __future__ import annotations

import contextlib
import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import batches, one_hot_programs, steps_of
from pyro.infer import SVI
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    ReinMax,
    Score,
)
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient
from pyro_gumbel.infer._captured_step import GraphedFunction
from pyro_gumbel.infer._recording import record

CPU = torch.device("cpu")


class Graph:
    """Keeps operations with the tensors that they were given and gave, as a CUDA graph does."""

    def __init__(self):
        self.launched = []

    def replay(self):
        for func, args, kwargs, result in self.launched:
            new = pytree.tree_leaves(func(*args, **kwargs))
            for old, value in zip(pytree.tree_leaves(result), new, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


class Capture(TorchDispatchMode):
    """Hands operations to a graph; what they changed and drew is put back, as if not run."""

    def __init__(self, graph, watched):
        super().__init__()
        self.graph, self.watched = graph, watched

    def __enter__(self):
        self.kept = [tensor.detach().clone() for tensor in self.watched]
        self.generator = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        torch.set_rng_state(self.generator)
        with torch.no_grad():
            for tensor, value in zip(self.watched, self.kept, strict=True):
                tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.graph.launched.append((func, args, kwargs or {}, result))
        return result


class Stream:
    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def watched(monkeypatch):
    """Put the stand-in in CUDA's place; the list returned is of what captures must not change."""
    tensors: list[torch.Tensor] = []
    stand_ins = {
        "CUDAGraph": Graph,
        "graph": lambda graph, capture_error_mode: Capture(graph, tensors),
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return tensors


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
    step = GraphedFunction(recording, inputs(0), CPU)
    (_, gradient), _ = step(inputs(0))
    torch.set_rng_state(generator)
    update = GraphedFunction(lambda _: descend(weight)(gradient), [], CPU)
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


class Capturable(torch.optim.SGD):
    """An optimiser that says that it can be captured, as Adam does on a GPU alone."""

    def __init__(self, params, lr, momentum):
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group["capturable"] = True


def capturable():
    return pyro.optim.PyroOptim(Capturable, {"lr": 0.01, "momentum": 0.9})


def scheduled():
    settings = {"lr": 0.01, "momentum": 0.9}
    schedule = {"optimizer": Capturable, "optim_args": settings, "gamma": 0.8}
    return pyro.optim.ExponentialLR(schedule)


def ordinary():
    return pyro.optim.SGD({"lr": 0.01, "momentum": 0.9})


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


@pytest.mark.parametrize("make_optim", [capturable, scheduled, ordinary])
@pytest.mark.parametrize(
    "make", [ReinMax, lambda: GumbelStraightThrough(Exponential(1.0, 0.1, 0.05))]
)
def test_training_by_graphs_is_training(make, make_optim, watched):
    svi, *outcome = train(CapturedSVI, make(), make_optim, watched)
    (step,) = steps_of(svi)
    assert step.graph is not None
    assert (step.update is not None) == (make_optim is not ordinary)
    expected = list(train(SVI, make(), make_optim, [])[1:])
    torch.testing.assert_close(outcome, expected, rtol=1e-9, atol=1e-12)


def test_states_of_estimators_are_not_overwritten(watched):
    estimator = Score(MovingAverage(0.8))
    svi, *_ = train(CapturedSVI, estimator, ordinary, watched)
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
