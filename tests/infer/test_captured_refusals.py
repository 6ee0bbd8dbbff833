"""Programs that a captured step refuses, and changes that a comparison notices."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import batches, one_hot_programs, replayed
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_gumbel.estimators import ReinMax
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient


def make(model, guide=lambda *args: None, **options):
    pyro.clear_param_store()
    return CapturedSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Estimator_ELBO(), **options)


def take_steps(svi, number, args=lambda number: ()):
    return [svi.step(*args(step)) for step in range(number)]


def test_a_branch_on_a_tensor_is_refused():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        x = pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.randn(()))
        pyro.sample("x", dist.Normal(loc, 1.0 if x > 0 else 2.0), obs=torch.tensor(1.0))

    svi = make(model)
    svi.step()
    with pytest.raises(
        RuntimeError, match=r"(?s)turns a tensor into a number.*Use pyro.infer.SVI"
    ):
        svi.step()


def test_a_branch_that_brings_parameters_is_refused():
    def model():
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.randn(()))
        loc = pyro.param("loc" if y > 0 else "other", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    svi = make(model)
    svi.step()
    with pytest.raises(RuntimeError, match="turns a tensor into a number"):
        take_steps(svi, 20)


def test_selection_by_a_mask_is_refused():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", int((x > 0).sum())):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[x > 0])

    svi = make(model)
    svi.step(torch.tensor([1.0, -1.0]))
    with pytest.raises(RuntimeError, match="cannot record this step"):
        svi.step(torch.tensor([1.0, -1.0]))


def test_draws_of_pythons_generator_are_refused():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = random.choice([1.0, 2.0])
        pyro.sample("x", dist.Normal(loc, scale), obs=torch.tensor(1.0))

    svi = make(model)
    svi.step()
    with pytest.raises(RuntimeError, match="Python's or NumPy's generator"):
        svi.step()


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

    svi = make(model)
    svi.step()
    svi.step()
    before = pyro.param("loc").detach().clone()
    with pytest.raises(RuntimeError, match=r"the loss differs|gradient of 'loc' differs"):
        svi.step()
    assert torch.equal(pyro.param("loc").detach(), before)


def test_number_that_changes_is_noticed():
    svi = make(counting_model({"calls": 0}))
    svi.step()
    svi.step()
    with pytest.raises(RuntimeError, match=r"svi.step\(x, torch.tensor\(beta\)\)"):
        svi.step()


def test_number_that_changes_later_is_noticed_at_the_next_comparison():
    state = {"calls": 10_000}
    svi = make(counting_model(state), check_every=5)
    for _ in range(5):
        svi.step()
    state["calls"] = 500
    with pytest.raises(RuntimeError, match="has changed since it was recorded"):
        take_steps(svi, 6)
    assert svi.step() == pytest.approx(0.5 * 1.4189385, rel=0.2)  # starts anew


def test_structure_that_changes_is_noticed():
    state = {"extra": False}

    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))
        if state["extra"]:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(2.0))

    svi = make(model, check_every=3)
    for _ in range(4):
        svi.step()
    state["extra"] = True
    with pytest.raises(RuntimeError, match="has changed since it was recorded"):
        take_steps(svi, 4)


@replayed()
def test_other_arguments_than_tensors_are_part_of_the_key():
    def model(scale):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, scale), obs=torch.tensor(1.0))

    svi = make(model)
    svi.optim = pyro.optim.SGD({"lr": 0.0})
    losses = {scale: [svi.step(scale) for _ in range(4)] for scale in (1.0, 2.0)}
    for scale, found in losses.items():
        expected = -dist.Normal(0.0, scale).log_prob(torch.tensor(1.0)).item()
        assert found == pytest.approx([expected] * 4, rel=1e-6)


def test_many_kinds_of_arguments_bring_a_warning():
    def model(scale):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, scale), obs=torch.tensor(1.0))

    svi = make(model)
    with pytest.warns(UserWarning, match="more than 32 kinds of arguments"):
        take_steps(svi, 34, lambda number: (1.0 + number,))


@replayed()
def test_module_in_another_mode_is_another_recording():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)
            self.loc = torch.nn.Parameter(torch.linspace(1.0, 2.0, 100))

        def forward(self):
            pyro.module("model", self)
            with pyro.plate("data", 100):
                pyro.sample("x", dist.Normal(self.drop(self.loc), 1.0), obs=torch.zeros(100))

    module = Model()
    svi = make(module)
    svi.optim = pyro.optim.SGD({"lr": 0.0})
    training = {svi.step() for _ in range(6)}
    module.eval()
    assert len(training) == 6
    assert len({svi.step() for _ in range(6)}) == 1


@replayed()
def test_nan_parameters_are_reported():
    model, guide, parameters = one_hot_programs()
    svi = make(model, config_gradient(guide, ReinMax()))
    for batch in batches(4):
        svi.step(batch)
    with torch.no_grad():
        parameters[0].fill_(float("nan"))
    with pytest.raises(ValueError, match="logits"):
        svi.step(batches(1)[0])


def test_errors():
    def model(x):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    adam = pyro.optim.Adam({"lr": 0.01})
    with pytest.raises(TypeError, match="loss must be an Estimator_ELBO"):
        CapturedSVI(model, lambda x: None, adam, Trace_ELBO())
    with pytest.raises(ValueError, match="check_every must be at least 1"):
        CapturedSVI(model, lambda x: None, adam, Estimator_ELBO(), check_every=0)
    svi = make(lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)))
    with pytest.raises(ValueError, match="neither model nor guide has a parameter"):
        svi.step()
    with pytest.raises(TypeError, match="every argument must be a tensor or hashable"):
        make(lambda x: None).step({1, 2})
