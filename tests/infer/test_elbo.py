"""Losses: their options, gradients, particles, dtypes, and losses as modules."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    LeaveOneOut,
    MovingAverage,
    NeuralBaseline,
    Rebar,
    ReinMax,
    Score,
)
from pyro_gumbel.guides import AutoDiscrete
from pyro_gumbel.infer import (
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    config_gradient,
    estimator_names,
)

X = torch.tensor([0.3, -1.0, 2.0])


def model(x):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        b = pyro.sample("b", dist.Bernoulli(0.3))
        means = (z * torch.tensor([0.0, 1.0, -2.0])).sum(-1)
        pyro.sample("x", dist.Normal(means + b, 1.0), obs=x)


def guide(x):
    logits = pyro.param("logits", torch.zeros(3, 3))
    odds = pyro.param("odds", torch.zeros(3))
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.OneHotCategorical(logits=logits[: len(x)]))
        pyro.sample("b", dist.Bernoulli(logits=odds[: len(x)]))


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_trial_run_takes_no_random_numbers(vectorize):
    """The first step of a loss draws what any later one draws; all three generators are kept."""

    def noisy(x):
        pyro.sample("y", dist.Normal(random.random() + np.random.rand(), 1.0))
        guide(x)

    def likely(x):
        pyro.sample("y", dist.Normal(0.0, 1.0))
        model(x)

    guide(X)  # makes the parameters
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
    losses = []
    for _ in range(3):
        pyro.set_rng_seed(5)
        losses.append(elbo.loss(likely, noisy, X))
    assert losses[0] == losses[1] == losses[2]


def test_a_given_nesting_is_the_found_one():
    guide(X)
    losses = []
    for nesting in (float("inf"), 1):
        pyro.set_rng_seed(5)
        elbo = Estimator_ELBO(3, vectorize_particles=True, max_plate_nesting=nesting)
        losses.append(elbo.loss(model, guide, X))
    assert losses[0] == losses[1]


def test_a_loss_keeps_no_reference_to_a_minibatch():
    """What a step was called with can be freed after it."""
    elbo = Estimator_ELBO(2, vectorize_particles=True)
    batch = X.clone()
    elbo.loss_and_grads(model, guide, batch)
    assert not any(thing is elbo for thing in gc.get_referrers(batch))
    gc.collect()
    held = [thing for thing in gc.get_referrers(batch) if isinstance(thing, (tuple, dict))]
    assert all(thing is globals() or "batch" in thing for thing in held)


def test_gradients_accumulate_like_torchs():
    """Two calls add up; the loss comes back detached and on its own."""
    elbo = Estimator_ELBO()
    configured = config_gradient(guide, {"z": ReinMax(), "b": ReinMax()})
    guide(X)
    parameter = pyro.get_param_store()._params["logits"]
    grads = []
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        parameter.grad = None
        loss = elbo.loss_and_grads(model, configured, X)
        assert not loss.requires_grad
        assert loss.shape == ()
        grads.append(parameter.grad.clone())
    parameter.grad = None
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        elbo.loss_and_grads(model, configured, X)
    torch.testing.assert_close(parameter.grad, grads[0] + grads[1])


def test_differentiable_loss_is_loss_and_grads():
    configured = config_gradient(guide, {"z": ReinMax(), "b": Score(LeaveOneOut())})
    guide(X)
    params = [pyro.get_param_store()._params[name] for name in ("logits", "odds")]
    elbo = Estimator_ELBO(3, vectorize_particles=True)
    pyro.set_rng_seed(3)
    loss = elbo.loss_and_grads(model, configured, X)
    expected = [parameter.grad.clone() for parameter in params]
    pyro.set_rng_seed(3)
    again = elbo.differentiable_loss(model, configured, X)
    assert again.item() == loss.item()
    for found, grad in zip(torch.autograd.grad(again, params), expected, strict=True):
        torch.testing.assert_close(found, grad)


# Half precision.

ONE_HOT_NAMES = [
    name for name in estimator_names() if name not in {"arms", "disarm", "pathwise", "rodeo"}
]


@functools.cache
def half_precision_gradients(name, dtype, seed):
    """Gradients of ten steps."""
    phi = torch.tensor([2.0, 0.5, -1.0, -30.0]).to(dtype).requires_grad_()

    def guide():
        with pyro.plate("n", 50):
            pyro.sample("z", dist.OneHotCategorical(logits=phi.expand(50, 4)))

    def target():
        with pyro.plate("n", 50):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(50, 4, dtype=dtype)))
            pyro.factor("f", z[..., 0] * 2)

    pyro.set_rng_seed(seed)
    elbo, configured = Estimator_ELBO(4), config_gradient(guide, name)
    gradients = []
    for _ in range(10):
        phi.grad = None
        loss = elbo.loss_and_grads(target, configured)
        assert loss.isfinite()
        assert phi.grad.isfinite().all()
        assert phi.grad.dtype == dtype
        gradients.append(phi.grad.double())
    return torch.stack(gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ONE_HOT_NAMES)
def test_half_precision_logits(name, dtype):
    """Finite losses and gradients; the gradient is float64's, rounded."""
    half = half_precision_gradients(name, dtype, 0)
    full = half_precision_gradients(name, torch.float64, 100)
    # 10 steps of 4 x 50 sites each way; rounding of a sum of 50 terms adds to the noise.
    rounding = 50 * torch.finfo(dtype).eps
    error = (half.var(0) / 10 + full.var(0) / 10).sqrt() + rounding
    assert ((half.mean(0) - full.mean(0)).abs() / error).max() < 5


def test_the_first_step_of_an_enumerated_loop_draws_as_rows_do():
    """Finding out the number of plates breaks a run off; nothing of it may remain."""
    data = torch.randn(8)

    def model():
        with pyro.plate("data", 8, subsample_size=3) as index:
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    def guide():
        q = pyro.param("q", torch.tensor(0.2))
        with pyro.plate("data", 8, subsample_size=3):
            pyro.sample("z", dist.Bernoulli(logits=q))

    losses = []
    for vectorize in (True, False):
        pyro.set_rng_seed(11)
        elbo = Estimator_ELBO(vectorize_particles=vectorize)
        configured = config_gradient(guide, "enumerate")
        losses.append([float(elbo.loss_and_grads(model, configured)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


ROWS = {
    "default: unknown": (
        lambda: Estimator_ELBO(default="reinmaks"),
        ValueError,
        r"Estimator_ELBO: default is 'reinmaks', an unknown estimator name.*'reinmax'\?",
    ),
    "default: a class": (
        lambda: Estimator_ELBO(default=Score),
        TypeError,
        r"Estimator_ELBO: default is the class Score; give an object: Score\(\)",
    ),
    "no particles": (
        lambda: Estimator_ELBO(num_particles=0),
        ValueError,
        r"Estimator_ELBO: num_particles must be an integer of at least 1; got 0",
    ),
    "half a particle": (
        lambda: Estimator_ELBO(num_particles=1.5),
        TypeError,
        r"num_particles must be an integer of at least 1; got 1.5",
    ),
    "plates below none": (
        lambda: Estimator_ELBO(max_plate_nesting=-1),
        ValueError,
        r"Estimator_ELBO: max_plate_nesting must be an integer of at least 0; got -1",
    ),
    "half a plate": (
        lambda: Estimator_ELBO(max_plate_nesting=2.5),
        TypeError,
        r"max_plate_nesting must be an integer of at least 0; got 2.5",
    ),
    "a misspelt option": (
        lambda: Estimator_ELBO(vectorise_particles=True),
        TypeError,
        r"Estimator_ELBO has no argument 'vectorise_particles'; its arguments are \["
        r"'num_particles', 'analytic_kl', .*Did you mean 'vectorize_particles'\?",
    ),
    "a misspelt option of the importance-weighted bound": (
        lambda: ImportanceWeighted_ELBO(2, doubly_reparametrized=True),
        TypeError,
        r"ImportanceWeighted_ELBO has no argument .*Did you mean 'doubly_reparameterized'\?",
    ),
    "recording by torch.jit": (
        lambda: Estimator_ELBO(jit_options={"check_trace": False}),
        TypeError,
        r"Estimator_ELBO: jit_options has no effect; .*CapturedSVI\(model, guide, optim, loss\)",
    ),
    "another bound's exponent": (
        lambda: ImportanceWeighted_ELBO(2, tail_adaptive_beta=-0.5),
        TypeError,
        r"ImportanceWeighted_ELBO: tail_adaptive_beta has no effect; .*TraceTailAdaptive_ELBO",
    ),
    "a deprecated option": (
        lambda: Estimator_ELBO(max_iarange_nesting=1),
        TypeError,
        r"Estimator_ELBO: max_iarange_nesting has no effect; write max_plate_nesting",
    ),
    "an option of no kind": (
        lambda: Estimator_ELBO(kwargs=3),
        TypeError,
        r"Estimator_ELBO has no argument 'kwargs'",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_message(row):
    run, kind, pattern = ROWS[row]
    with pytest.raises(kind, match="(?s)" + pattern):
        run()


def test_options_of_pyro_and_of_subclasses_are_known():
    class Louder(Estimator_ELBO):
        def __init__(self, *, volume=1, **kwargs):
            super().__init__(**kwargs)

    assert Louder(volume=2, retain_graph=True, max_plate_nesting=1).retain_graph
    with pytest.raises(TypeError, match="Louder has no argument 'volumes'.*Did you mean 'volume'"):
        Louder(volumes=2)
    with pytest.raises(TypeError, match="Louder: jit_options has no effect"):
        Louder(jit_options={})


def test_only_options_with_an_effect_are_suggested():
    with pytest.raises(TypeError, match="has no argument 'jit_option'") as caught:
        Estimator_ELBO(jit_option={})
    assert "'retain_graph'" in str(caught.value)
    assert "'jit_options'" not in str(caught.value)


def test_switches_of_warnings_are_accepted():
    elbo = Estimator_ELBO(ignore_jit_warnings=True, strict_enumeration_warning=False)
    assert elbo.num_particles == 1


INPUTS = torch.tensor([[1.0, 0.2], [-0.3, 0.8], [0.5, -1.0]])
FOR_BITS = ("arms", "disarm", "rodeo")
NAMES = (*FOR_BITS, "double_control_variate", "muprop", "rebar", "reinmax", "score")


class Model(PyroModule):
    def forward(self, x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
            b = pyro.sample("b", dist.Bernoulli(0.3))
            mean = z @ torch.tensor([0.0, 1.0, -2.0]) + b
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(2, 3)
        self.scale = PyroParam(torch.tensor(1.5), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.encode(x) * self.scale))
            pyro.sample("b", dist.Bernoulli(logits=self.encode(x)[:, 0]))


class GuideWithOptions(Guide):
    """Chooses in place, by a handler around its sites."""

    def __init__(self, estimators):
        super().__init__()
        self.choices = estimators

    def forward(self, x):
        with poutine.infer_config(config_fn=self.options):
            super().forward(x)

    def options(self, site):
        name = site["name"]
        return {"gradient": self.choices[name]} if name in self.choices else {}


def stateful():
    """One estimator with a schedule, one with a moving average and learnable parts."""
    torch.manual_seed(3)
    return {
        "z": GumbelStraightThrough(Exponential(1.0, 0.1, 0.1)),
        "b": Score(MovingAverage(0.5)),
    }


def learnable():
    torch.manual_seed(3)
    return {"z": Rebar(), "b": Score(NeuralBaseline(nn.Linear(2, 1), "x"))}


PLACES = {
    "dict": lambda choices: config_gradient(Guide(), choices),
    "callable": lambda choices: config_gradient(Guide(), lambda msg: choices[msg["name"]]),
    "site": GuideWithOptions,
    "nested": lambda choices: config_gradient(config_gradient(Guide(), choices), {}),
}


def make(place, choices, *, call=True):
    """A module after its first call, which finds all estimators, and an optimiser."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    guide = PLACES[place](choices())
    loss = Estimator_ELBO(2)(Model(), guide)
    if call:
        with torch.no_grad():
            loss(INPUTS)
    return loss, torch.optim.Adam(loss.parameters(), lr=0.1)


def run(loss, optimiser, seeds):
    losses = []
    for seed in seeds:
        pyro.set_rng_seed(seed)
        optimiser.zero_grad()
        value = loss(INPUTS)
        value.backward()
        losses.append(value.item())
        optimiser.step()
    return losses


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# An optimiser made before the first call lacks parameters of estimators that only a run finds.
RESUMED = [
    pytest.param(place, choices, called, id=f"{place}-{choices.__name__}-{called}")
    for place in PLACES
    for choices in (stateful, learnable)
    for called in (True, False)
    if called or choices is stateful or place == "dict"
]


@pytest.mark.parametrize(("place", "choices", "called"), RESUMED)
def test_training_resumes_bit_for_bit(place, choices, called):
    """Before the first call of the new module as well as after it."""
    loss, optimiser = make(place, choices)
    run(loss, optimiser, range(5))
    state = through_a_file({"loss": loss.state_dict(), "optimiser": optimiser.state_dict()})
    straight = run(loss, optimiser, range(5, 9))
    loss, optimiser = make(place, choices, call=called)
    loss.load_state_dict(state["loss"])
    optimiser.load_state_dict(state["optimiser"])
    assert run(loss, optimiser, range(5, 9)) == straight


@pytest.mark.parametrize("place", PLACES)
def test_a_state_that_waits_for_its_estimators_is_saved_again(place):
    loss, optimiser = make(place, stateful)
    run(loss, optimiser, range(3))
    state = loss.state_dict()
    again, _ = make(place, stateful, call=False)
    again.load_state_dict(copy.deepcopy(state))
    assert flat(again.state_dict()) == flat(state)
    again(INPUTS)
    assert again.state_dict().keys() == state.keys()


def flat(state):
    return {name: str(value) for name, value in state.items()}


@pytest.mark.parametrize("place", PLACES)
def test_a_state_of_before_the_first_call_lacks_nothing(place):
    """What it does not have of the estimators stays."""
    early, _ = make(place, stateful, call=False)
    state = copy.deepcopy(early.state_dict())
    loss, optimiser = make(place, stateful)
    run(loss, optimiser, range(3))
    before = flat(loss.estimators[-1].state_dict())
    loss.load_state_dict(state)
    assert torch.equal(loss.guide.encode.weight, early.guide.encode.weight)
    assert place == "dict" or flat(loss.estimators[-1].state_dict()) == before


def test_a_state_of_other_estimators_is_refused():
    loss, _ = make("dict", stateful)
    other, _ = make("dict", learnable)
    with pytest.raises(RuntimeError, match="estimators.0"):
        other.load_state_dict(loss.state_dict())


def test_a_nested_loss_module_is_saved_with_its_parent():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss, _ = make("callable", stateful, call=False)

    parent = Parent()
    for _ in range(3):
        parent.loss(INPUTS).backward()
    again = Parent()
    again.load_state_dict(parent.state_dict())
    again.loss(INPUTS)
    counts = [one.loss.estimators[-2].temperature.step_count for one in (parent, again)]
    assert counts == [3, 4]


# Copies


def unpickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": unpickled, "torch.save": saved}
MODULES = {
    **{name: lambda name=name: by_name(name) for name in NAMES},
    "default": lambda: Estimator_ELBO(default="rebar")(OneHotModel(), OneHotGuide()),
    "schedule": lambda: Estimator_ELBO()(Model(), config_gradient(Guide(), stateful())),
    "baseline": lambda: Estimator_ELBO()(Model(), config_gradient(Guide(), learnable())),
    "importance weighted": lambda: ImportanceWeighted_ELBO(2)(Model(), Guide()),
    "AutoDiscrete": lambda: with_autoguide(Model()),
}
WITHOUT_ITS_MODEL = {("AutoDiscrete", "pickle"), ("AutoDiscrete", "torch.save")}


def with_autoguide(model):
    return Estimator_ELBO()(model, AutoDiscrete(model, gradient={"z": "rebar"}))


class OneHotModel(PyroModule):
    def forward(self, x):
        pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))


class OneHotGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, 0.1]))

    def forward(self, x):
        pyro.sample("z", dist.OneHotCategorical(logits=self.logits))


def by_name(name):
    site = "b" if name in FOR_BITS else "z"
    options = {"num_particles": 2, "vectorize_particles": True}
    return Estimator_ELBO(**options)(Model(), config_gradient(Guide(), {site: name}))


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("copying", COPIES)
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_trains_by_itself(name, copying, local):
    """After a step, which leaves marks on modules and in the parameter store."""
    with pyro.settings.context(module_local_params=local):
        loss = MODULES[name]()
        loss(INPUTS).backward()
        pyro.clear_param_store()  # where both modules would have the same names
        twin = COPIES[copying](loss)
        if (name, copying) in WITHOUT_ITS_MODEL:
            twin.guide.model = twin.model
        assert flat(twin.state_dict()) == flat(loss.state_dict())
        own = {id(parameter) for parameter in loss.parameters()}
        assert not any(id(parameter) in own for parameter in twin.parameters())
        loss.zero_grad()
        pyro.set_rng_seed(2)
        expected = loss(INPUTS)
        expected.backward()
        grads = [parameter.grad for parameter in loss.parameters()]
        pyro.clear_param_store()
        twin.zero_grad()
        pyro.set_rng_seed(2)
        found = twin(INPUTS)
        found.backward()
        assert torch.equal(found, expected)
        for parameter, grad in zip(twin.parameters(), grads, strict=True):
            assert (parameter.grad is None) == (grad is None)
            assert grad is None or torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_counts_its_own_steps(make_copy):
    loss, optimiser = make("dict", stateful)
    run(loss, optimiser, range(2))
    twin = make_copy(loss)
    twin(INPUTS)
    assert loss.estimators[0].temperature.step_count == 2
    assert twin.estimators[0].temperature.step_count == 3
    assert loss.estimators[1].baseline._weights["b"] < twin.estimators[1].baseline._weights["b"]
