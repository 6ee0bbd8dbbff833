"""Every estimator respects the prior and reports the loss of the discrete ELBO."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.problems import worst_z
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import ExponentialLR

from pyro_gumbel.infer import Estimator_ELBO, config_gradient, estimator_names

DOUBLE = torch.float64
PRIOR = torch.tensor([0.05, 0.15, 0.30, 0.50], dtype=DOUBLE)
BIT_PRIOR = torch.tensor(0.2, dtype=DOUBLE)
# For bits alone, and for values that are drawn smoothly.
NOT_FOR_ONE_HOT = {"arms", "disarm", "pathwise", "rodeo"}
NOT_FOR_BITS = {
    "disarm_tree",
    "gapped_straight_through",
    "pathwise",
    "reinmax_rao",
    "sum_and_sample",
    "unordered_set",
}
CASES = [("one_hot", name) for name in estimator_names() if name not in NOT_FOR_ONE_HOT] + [
    ("bit", name) for name in estimator_names() if name not in NOT_FOR_BITS
]


REFUSED = [("one_hot", name) for name in sorted(NOT_FOR_ONE_HOT)] + [
    ("bit", name) for name in sorted(NOT_FOR_BITS)
]


def law(kind, **parameters):
    if kind == "one_hot":
        return dist.OneHotCategorical(**parameters)
    return dist.Bernoulli(**parameters)


def prior(kind):
    return PRIOR if kind == "one_hot" else BIT_PRIOR


def probs(kind, logits):
    return logits.softmax(-1) if kind == "one_hot" else logits.sigmoid()


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_without_data_the_guide_goes_to_the_prior(kind, name):
    """150 steps of 16 particles from a uniform guide."""
    pyro.param("logits", torch.zeros_like(prior(kind)))

    def model():
        pyro.sample("z", law(kind, probs=prior(kind)))

    def guide():
        pyro.sample("z", law(kind, logits=pyro.param("logits")))

    decay = {
        "optimizer": torch.optim.Adam,
        "optim_args": {"lr": 0.2, "betas": (0.8, 0.99)},
        "gamma": 0.97,
    }
    optimiser = ExponentialLR(decay)
    elbo = Estimator_ELBO(16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, config_gradient(guide, name), optimiser, elbo)
    for _ in range(150):
        svi.step()
        optimiser.step()
    gap = (probs(kind, pyro.param("logits")) - prior(kind)).abs().max().item()
    # The relaxed objective has another optimum, near by.
    assert gap < (0.05 if name == "gumbel_softmax" else 0.005)


def logits_of_model(kind):
    return PRIOR.log() if kind == "one_hot" else torch.logit(BIT_PRIOR)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_loss_is_zero_where_guide_and_prior_agree(kind, name, dtype):
    torch.set_default_dtype(dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13

    def program():
        with pyro.plate("n", 3), poutine.scale(scale=2.5):
            pyro.sample("z", law(kind, logits=logits_of_model(kind).to(dtype)))

    guide = config_gradient(program, name)
    for vectorize in (False, True):
        elbo = Estimator_ELBO(2, vectorize_particles=vectorize)
        assert abs(elbo.loss(program, guide)) < tolerance
        assert abs(float(elbo.loss_and_grads(program, guide))) < tolerance


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_loss_is_the_enumerated_one(kind, name):
    """24 steps of 1,700 particles, through the gradient's code and through that of ``loss``."""
    logits = torch.zeros_like(prior(kind)).requires_grad_()
    q, p = probs(kind, logits.detach()), prior(kind)
    exact = 3 * 2.5 * (q * (q / p).log()).sum()
    if kind == "bit":
        exact = exact + 3 * 2.5 * (1 - q) * ((1 - q) / (1 - p)).log()

    def program(logits):
        with pyro.plate("n", 3), poutine.scale(scale=2.5):
            pyro.sample("z", law(kind, logits=logits))

    guide = config_gradient(lambda: program(logits), name)
    elbo = Estimator_ELBO(1700, vectorize_particles=True, max_plate_nesting=1)
    model = functools.partial(program, logits_of_model(kind))
    for evaluate in (elbo.loss, elbo.loss_and_grads):
        losses = torch.tensor([float(evaluate(model, guide)) for _ in range(24)], dtype=DOUBLE)
        assert losses.std() / 24**0.5 < 0.02 * exact
        assert worst_z(losses[:, None], exact[None]) < 5


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_other_estimators_refuse_the_site(kind, name):
    def program():
        pyro.sample("z", law(kind, probs=prior(kind)))

    with pytest.raises(ValueError, match=r"At site 'z', .* does not support a .* site: it needs"):
        Estimator_ELBO(4).loss_and_grads(program, config_gradient(program, name))
