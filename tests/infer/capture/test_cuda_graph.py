"""Graphs of steps on a stand-in for CUDA's that runs on a CPU: what is frozen, and what is not."""

from __future__ import annotations

import contextlib

import pyro
import pytest
import torch
from captured import batches, one_hot_programs
from pyro.infer import SVI
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gumbel.estimators import Exponential, GumbelStraightThrough, ReinMax
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient
from pyro_gumbel.infer.capture import cuda_graph
from pyro_gumbel.infer.capture.cuda_graph import GraphedStep, NotGraphable
from pyro_gumbel.infer.capture.recording import record

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
        return loss.detach(), [torch.autograd.grad(loss, weight)[0]], []

    return step


def descend(weight):
    def apply(gradients):
        with torch.no_grad():
            weight.sub_(gradients[0], alpha=0.1)

    return apply


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    return [x, torch.tensor(0.5 + seed, dtype=torch.float64)]


def test_a_graph_takes_the_steps_of_its_recording(watched):
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    twin = weight.detach().clone().requires_grad_()
    watched.append(weight)
    _, recording = record(noisy_step(weight), inputs(0))
    before = weight.detach().clone()
    generator = torch.get_rng_state()
    graphed = GraphedStep(recording, inputs(0), CPU, descend(weight), [weight])
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), generator)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        loss, gradients, _ = graphed(inputs(seed))
        torch.manual_seed(seed)
        should, slopes, _ = noisy_step(twin)(*inputs(seed))
        torch.testing.assert_close((loss, gradients), (should, slopes))
        descend(twin)(slopes)
        torch.testing.assert_close(weight, twin)


def test_the_first_run_is_undone_where_an_operation_is_elsewhere(watched):
    weight = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    count = torch.zeros(())

    def step(x, scale):
        count.add_(1)
        return noisy_step(weight)(x, scale)

    _, recording = record(step, inputs(0))
    with pytest.raises(NotGraphable, match=r"aten\..* gives a tensor on cpu"):
        GraphedStep(recording, inputs(0), torch.device("cpu:0"), None, [])
    assert count == 1  # by the recording


def test_numbers_on_another_device_are_looked_after(watched, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_AllOn", contextlib.nullcontext)
    weight = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(0.5, dtype=torch.float64)

    def step(x, scale):
        return noisy_step(weight)(x, scale * beta)

    _, recording = record(step, inputs(0))
    assert any(tensor is beta for tensor in recording.held)
    elsewhere = torch.device("cpu:0")  # to torch that is not the CPU
    graphed = GraphedStep(recording, inputs(0), elsewhere, None, [])
    assert graphed.is_current()
    beta.fill_(0.25)
    assert not graphed.is_current()


def train(svi_class, estimator, steps=12):
    """Losses and parameters after some steps, as if the device could capture graphs."""
    pyro.clear_param_store()
    model, guide, parameters = one_hot_programs()
    svi = svi_class(
        model,
        config_gradient(guide, estimator),
        pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
        Estimator_ELBO(max_plate_nesting=1),
    )
    pyro.set_rng_seed(11)
    losses = []
    for batch in batches(steps):
        losses.append(svi.step(batch))
        for step in getattr(svi, "_steps", {}).values():
            step._graphable = step.replays == 0 or step._graphable
    return svi, losses, [p.detach().clone() for p in parameters]


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    "make", [ReinMax, lambda: GumbelStraightThrough(Exponential(1.0, 0.1, 0.05))]
)
def test_training_by_graphs_is_training(make):
    captured, *outcome = train(CapturedSVI, make())
    assert all(step._graphed is not None for step in captured._steps.values())
    torch.testing.assert_close(outcome, list(train(SVI, make())[1:]), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("watched")
def test_what_cannot_be_a_graph_is_told_once_and_played(monkeypatch):
    def refuse(*args):
        raise NotGraphable("aten.rand.default gives a tensor on cpu")

    monkeypatch.setattr("pyro_gumbel.infer.capture.step.GraphedStep", refuse)
    with pytest.warns(UserWarning, match="one CUDA graph, for aten.rand.default gives") as told:
        captured, *outcome = train(CapturedSVI, ReinMax())
    assert len(told) == 1
    assert all(step.recording is not None for step in captured._steps.values())
    torch.testing.assert_close(outcome, list(train(SVI, ReinMax())[1:]), rtol=1e-9, atol=1e-12)
