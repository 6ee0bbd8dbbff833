"""Schedules and baselines advance once per pass that makes a gradient, and never otherwise."""

from __future__ import annotations

import contextlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    Rebar,
    Score,
)
from pyro_gumbel.infer import (
    CapturedSVI,
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    config_gradient,
    estimator_names,
)

X = torch.tensor([0.3, -1.0, 2.0])


class Model(PyroModule):
    def forward(self, x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
            b = pyro.sample("b", dist.Bernoulli(0.3))
            mean = z @ torch.tensor([0.0, 1.0, -2.0]) + b
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.logits = PyroParam(torch.tensor([0.2, 0.1, -0.3]))
        self.odds = PyroParam(torch.tensor(0.3))

    def forward(self, x):
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.logits))
            pyro.sample("b", dist.Bernoulli(logits=self.odds))


class Setting:
    """A loss of a model and a guide whose estimators have a schedule and a moving average."""

    def __init__(self, make_elbo=Estimator_ELBO):
        self.schedule = Exponential(1.0, 0.1, 0.1)
        self.baseline = MovingAverage(0.5)
        self.model = Model()
        self.guide = config_gradient(
            Guide(), {"z": GumbelStraightThrough(self.schedule), "b": Score(self.baseline)}
        )
        self.elbo = make_elbo()
        self.module = self.elbo(self.model, self.guide)
        self.svi = SVI(self.model, self.guide, pyro.optim.Adam({"lr": 0.01}), self.elbo)

    def passes(self):
        """How many passes moved the schedule, and how many the moving average."""
        weight = self.baseline.get_extra_state()["weights"].get("b", torch.tensor(0.0))
        return self.schedule.step_count, round(-torch.log2(1 - weight.double()).item(), 9)

    def programs(self):
        return self.model, self.guide, X


TRAINING = {
    "svi.step": lambda own: own.svi.step(X),
    "loss_and_grads": lambda own: own.elbo.loss_and_grads(*own.programs()),
    "differentiable_loss": lambda own: own.elbo.differentiable_loss(*own.programs()),
    "module": lambda own: own.module(X),
    "module after eval and train": lambda own: own.module.eval().train()(X),
    "module under enable_grad": lambda own: torch.enable_grad()(own.module)(X),
}
EVALUATION = {
    "svi.evaluate_loss": lambda own: own.svi.evaluate_loss(X),
    "loss": lambda own: own.elbo.loss(*own.programs()),
    "module after eval": lambda own: own.module.eval()(X),
    "module after eval of a parent": lambda own: torch.nn.ModuleList([own.module]).eval()[0](X),
    "module under no_grad": lambda own: torch.no_grad()(own.module)(X),
    "module under inference_mode": lambda own: torch.inference_mode()(own.module)(X),
    "module after eval under no_grad": lambda own: torch.no_grad()(own.module.eval())(X),
    "differentiable_loss under no_grad": lambda own: torch.no_grad()(own.elbo.differentiable_loss)(
        *own.programs()
    ),
    "differentiable_loss under inference_mode": lambda own: torch.inference_mode()(
        own.elbo.differentiable_loss
    )(*own.programs()),
    "loss_and_grads under no_grad": lambda own: torch.no_grad()(own.elbo.loss_and_grads)(
        *own.programs()
    ),
}
ELBOS = {
    "one particle": Estimator_ELBO,
    "loop": lambda: Estimator_ELBO(3),
    "rows": lambda: Estimator_ELBO(3, vectorize_particles=True),
}


@pytest.mark.parametrize("make_elbo", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("call", TRAINING.values(), ids=TRAINING)
def test_training_moves_state_once(call, make_elbo):
    own = Setting(make_elbo)
    for count in (1, 2, 3):
        call(own)
        assert own.passes() == (count, count)


@pytest.mark.parametrize("make_elbo", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("call", EVALUATION.values(), ids=EVALUATION)
def test_evaluation_moves_no_state(call, make_elbo):
    own = Setting(make_elbo)
    call(own)
    assert own.passes() == (0, 0)
    own.module.train()(X)
    before = {name: value.clone() for name, value in own.baseline._sums.items()}
    for _ in range(3):
        call(own)
    assert own.passes() == (1, 1)
    assert own.baseline._sums == before
    # The next training pass goes on from there.
    own.module.train()(X)
    assert own.passes() == (2, 2)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
def test_the_importance_weighted_bound_follows_the_same_rule(mode):
    schedule = Exponential(1.0, 0.1, 0.1)
    guide = config_gradient(Guide(), {"z": GumbelStraightThrough(schedule), "b": Score()})
    module = ImportanceWeighted_ELBO(2)(Model(), guide).train(mode == "train")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with context.get(mode, contextlib.nullcontext)():
        module(X)
    assert schedule.step_count == (mode == "train")


def test_a_recorded_step_moves_state_and_evaluation_does_not():
    own = Setting(lambda: Estimator_ELBO(2, vectorize_particles=True))
    svi = CapturedSVI(own.model, own.guide, pyro.optim.Adam({"lr": 0.01}), own.elbo)
    for count in range(1, 5):
        svi.step(X)
        svi.evaluate_loss(X)
        assert own.passes() == (count, count)


def test_the_defaults_moving_average_follows_the_same_rule():
    elbo = Estimator_ELBO()
    module = elbo(Model(), Guide())
    average = elbo.known_estimators(module.guide)[0].baseline
    for mode, expected in ((True, {"z", "b"}), (False, set())):
        average.set_extra_state({"sums": {}, "weights": {}})
        module.train(mode)(X)
        assert set(average.get_extra_state()["sums"]) == expected


def gradient(own, training):
    pyro.set_rng_seed(5)
    own.module.train(training).zero_grad()
    own.module(X).backward()
    return torch.cat([parameter.grad.flatten() for parameter in own.module.parameters()])


@pytest.mark.parametrize("make_elbo", ELBOS.values(), ids=ELBOS)
def test_in_eval_mode_the_gradient_is_that_of_training(make_elbo):
    """Only the state stays: it is asked for often, and answers the same."""
    own = Setting(make_elbo)
    own.module(X)
    frozen = [gradient(own, training=False) for _ in range(2)]
    assert torch.equal(frozen[0], frozen[1])
    assert torch.equal(gradient(own, training=True), frozen[0])
    assert not torch.equal(gradient(own, training=True), frozen[0])


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", sorted({*estimator_names()} - {"pathwise"}))
def test_without_gradients_a_module_returns_the_loss(name, mode):
    """For every estimator, the relaxed and coupled ones too: exact draws and masses."""
    site = "b" if name in {"arms", "disarm", "rodeo"} else "z"
    elbo = Estimator_ELBO(2, vectorize_particles=True)
    module = elbo(Model(), config_gradient(Guide(), {site: name}))
    pyro.set_rng_seed(3)
    expected = elbo.loss(module.model, module.guide, X)
    pyro.set_rng_seed(3)
    with getattr(torch, mode)():
        loss = module(X)
    assert loss.item() == expected
    assert not loss.requires_grad
    module(X).backward()


SHOWN = {
    "svi.step": True,
    "loss_and_grads": True,
    "differentiable_loss": True,
    "module": False,  # which holds them itself
}


@pytest.mark.parametrize("name", SHOWN)
def test_learnable_parts_are_shown_in_the_store_by_training_with_it(name):
    own = Setting()
    own.guide.gradient_messenger.config["z"] = Rebar()
    for evaluate in EVALUATION.values():
        evaluate(own)
    assert not any(name.startswith("gradient$") for name in pyro.get_param_store())
    own.module.train()
    TRAINING[name](own)
    found = {name for name in pyro.get_param_store() if name.startswith("gradient$")}
    expected = {"gradient$z$$$log_temperature", "gradient$z$$$scale"}
    assert found == (expected if SHOWN[name] else set())
