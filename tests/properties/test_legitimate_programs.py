"""Unusual programs that must not raise errors."""

from __future__ import annotations

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import steps_of
from pyro.infer import SVI
from pyro.nn import PyroModule
from torch import nn

from pyro_gumbel.estimators import Exponential, Linear, MovingAverage, NeuralBaseline, Rebar, Score
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient

BITS = dist.Bernoulli(torch.full((3,), 0.3)).to_event(1)
ONE_HOT = dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5]))


def mixture(component):
    return lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), component)


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        (BITS, mixture(dist.Bernoulli(torch.full((2, 3), 0.4)).to_event(1))),
        (ONE_HOT, mixture(dist.OneHotCategorical(torch.ones(2, 3)))),
        (dist.Bernoulli(0.3), lambda: dist.Binomial(1, torch.tensor(0.4))),
        (ONE_HOT, lambda: dist.Multinomial(1, torch.ones(3))),
    ],
    ids=["mixture of bits", "mixture of one-hots", "Binomial", "Multinomial"],
)
def test_another_family_with_the_models_values_serves(prior, guide):
    loss = Estimator_ELBO(2).loss_and_grads(
        lambda: pyro.sample("z", prior), lambda: pyro.sample("z", guide())
    )
    assert loss.isfinite()


def test_a_users_own_error_in_the_trial_run_comes_through():
    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(0.0, 1.0))
        raise ValueError("mine", z.shape)

    def guide():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Bernoulli(0.4), infer={"gradient": "enumerate"})
            pyro.sample("y", dist.Normal(z, 1.0))

    with pytest.raises(ValueError, match="mine"):
        Estimator_ELBO().loss_and_grads(model, guide)


def test_numbers_without_dimensions_are_numbers():
    half = torch.tensor(0.5)
    assert repr(Rebar(half)) == repr(Rebar(0.5))
    assert MovingAverage(half).decay == 0.5
    assert Exponential(torch.tensor(1.0), half, 0.1).value == 1.0
    assert Linear(1.0, np.array(0.5), 1e4).steps == 10_000


# Loaded stores


def bit_model():
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.tensor(2.0))


def bit_guide():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))


def load_learned(path):
    guide = config_gradient(bit_guide, {"z": Rebar(0.5)})
    svi = SVI(bit_model, guide, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    for _ in range(5):
        svi.step()
    pyro.get_param_store().save(path)
    pyro.clear_param_store()
    pyro.get_param_store().load(path)


def test_a_loss_leaves_what_was_loaded(tmp_path):
    load_learned(tmp_path / "store")
    keys = set(pyro.get_param_store().keys())
    rebar = Rebar(0.5)
    before = rebar.log_temperature.item()
    Estimator_ELBO().loss(bit_model, config_gradient(bit_guide, {"z": rebar}))
    assert set(pyro.get_param_store().keys()) == keys
    assert rebar.log_temperature.item() == before


def test_a_frozen_estimator_keeps_its_values(tmp_path):
    load_learned(tmp_path / "store")
    rebar = Rebar(0.1, learn=False)
    before = rebar.log_temperature.item()
    Estimator_ELBO().loss_and_grads(bit_model, config_gradient(bit_guide, {"z": rebar}))
    assert rebar.log_temperature.item() == before


# Loss modules


class Model(PyroModule):
    def forward(self):
        bit_model()


class Guide(PyroModule):
    def __init__(self, *own):
        super().__init__()
        self.l = nn.Parameter(torch.tensor(0.2))
        self.own = list(own)

    def forward(self):
        infer = {"gradient": self.own[0]} if self.own else {}
        pyro.sample("z", dist.Bernoulli(logits=self.l), infer=infer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guide(Rebar()),
        lambda: config_gradient(Guide(), lambda site: "rebar"),
        lambda: config_gradient(Guide(), {"z": "rebar"}),
    ],
    ids=["in place", "callable", "name"],
)
def test_the_state_of_a_loss_module_goes_into_a_new_one(make):
    old = Estimator_ELBO()(Model(), make())
    old().backward()
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            parameter.fill_(0.3 + 0.1 * len(name))
    pyro.clear_param_store()
    new = Estimator_ELBO()(Model(), make())
    new.load_state_dict(old.state_dict())
    new()
    state = new.state_dict()
    for name, value in old.named_parameters():
        assert torch.equal(state[name], value)


def test_a_copy_of_a_loss_module_uses_the_estimators_that_it_holds():
    module = Estimator_ELBO()(Model(), config_gradient(Guide(), {"z": "rebar"}))
    module().backward()
    twin = copy.deepcopy(module)
    twin()
    assert twin.state_dict().keys() == module.state_dict().keys()


# Captured steps


class Notebook:
    """What a program writes down as it runs."""

    def __init__(self):
        self.n, self.word, self.flag, self.either = 0, "", False, None
        self.steps = [0.0] * 1000


def in_words(book):
    book.n += 1
    book.word = f"run {book.n}"


def by_flag(book):
    book.flag = not book.flag


def sometimes_none(book):
    book.either = 1 if book.either is None else None


def up_to_an_end(book):
    book.n += 1
    book.steps[book.n] = 1.0


class Odd:
    __slots__ = ("inner",)

    def __init__(self):
        self.inner = {}

    def __getattr__(self, name):
        return self.inner[name]


ODD = Odd()


def beside_an_odd_object(book):
    assert ODD is not None


@pytest.mark.parametrize(
    "write", [in_words, by_flag, sometimes_none, up_to_an_end, beside_an_odd_object]
)
def test_a_program_that_keeps_a_book_is_recorded(write):
    class Program:
        def model(self):
            write(BOOK)
            bit_model()

    program = Program()
    svi = CapturedSVI(program.model, bit_guide, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    for _ in range(8):
        svi.step()
    (step,) = steps_of(svi)
    assert step.replays == 6


BOOK = Notebook()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.best = nn.Linear(1, 1), 0, float("nan")

    def forward(self, x):
        self.calls += 1
        return self.layer(x).squeeze(-1)


def test_a_baseline_that_counts_is_recorded():
    baseline = NeuralBaseline(Counting(), lambda: torch.ones(1))
    guide = config_gradient(bit_guide, {"z": Score(baseline)})
    svi = CapturedSVI(bit_model, guide, pyro.optim.Adam({"lr": 0.1}), Estimator_ELBO())
    for _ in range(8):
        svi.step()
    (step,) = steps_of(svi)
    assert step.replays == 6
