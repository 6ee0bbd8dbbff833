"""The optimiser's step over all parameters equals Pyro's step of one after the other."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import optim

from pyro_gumbel.infer._captured_state import Updater

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


def train(make, step, dtype):
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
    expected = train(OPTIMISERS[name], lambda optimiser, ps: optimiser(ps), dtype)
    found = train(OPTIMISERS[name], Updater()._step, dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def counted(optimiser, parameters, updater):
    """Count the operations of torch's optimisers in a step."""
    with torch.profiler.profile() as profiled:
        updater._step(optimiser, parameters)
    return sum("Optimizer.step" in event.name for event in profiled.events())


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end:UserWarning")
@pytest.mark.parametrize(("name", "number"), [("adam", 1), ("by name", 2), ("not for each", 4)])
def test_parameters_of_the_same_options_are_stepped_at_once(name, number):
    pyro.clear_param_store()
    for place in range(4):
        pyro.param(f"p{place}", torch.ones(3)).grad = torch.ones(3)
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    optimiser, updater = OPTIMISERS[name](), Updater()
    optimiser(parameters)
    assert counted(optimiser, parameters, updater) == number


def test_hooks_of_an_optimiser_run():
    pyro.clear_param_store()
    pyro.param("p", torch.ones(3)).grad = torch.ones(3)
    (parameter,) = [p for _, p in pyro.get_param_store().named_parameters()]
    optimiser, seen = OPTIMISERS["adam"](), []
    optimiser([parameter])
    optimiser.optim_objs[parameter].register_step_post_hook(lambda *args: seen.append(args[0]))
    Updater()._step(optimiser, [parameter])
    assert seen == [optimiser.optim_objs[parameter]]
