"""Losses: their options, gradients, particles and dtypes."""

from __future__ import annotations

import functools
import gc
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gumbel.estimators import (
    LeaveOneOut,
    ReinMax,
    Score,
)
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
        ValueError,
        r"num_particles must be an integer of at least 1; got 1.5",
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
