"""Errors of coupled estimators about sites, plates and arguments."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    LocalExpectation,
    MuProp,
    Rebar,
    Rodeo,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

vectorized = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])


def outside_its_plate(kind):
    """A site outside the plate that depends on all of the plate's elements."""

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        total = z[..., 0].sum(-1, keepdim=z.dim() > 2)
        if kind == "observed":
            pyro.sample("x", dist.Normal(total, 0.5), obs=torch.tensor(1.0))
        else:
            pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))

    logits = torch.zeros(2, 3, requires_grad=True)

    def guide():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.OneHotCategorical(logits=logits))
        total = z[..., 0].sum(-1, keepdim=z.dim() > 2)
        if kind == "latent":
            pyro.sample("u", dist.Normal(total, 1.0))
        if kind == "independent":
            pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))

    return model, guide


@vectorized
@pytest.mark.parametrize("kind", ["observed", "latent"])
@pytest.mark.parametrize(
    "estimator", [LocalExpectation(), SumAndSample(1), UnorderedSet(2)], ids=repr
)
def test_sites_outside_the_plate_that_depend_on_it_are_refused(estimator, kind, vectorize):
    model, guide = outside_its_plate(kind)
    other = {"observed": "x", "latent": "u"}[kind]
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    message = rf"At site 'z', {estimator!r} moves .*'n' at once, and site '{other}' outside"
    message = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=message):
        elbo.loss_and_grads(model, config_gradient(guide, {"z": estimator}))


@vectorized
@pytest.mark.parametrize(
    "estimator", [LocalExpectation(), SumAndSample(1), UnorderedSet(2)], ids=repr
)
def test_sites_outside_the_plate_that_do_not_depend_on_it_are_accepted(estimator, vectorize):
    model, guide = outside_its_plate("independent")
    elbo = Estimator_ELBO(2, vectorize_particles=vectorize, max_plate_nesting=1)
    assert elbo.loss_and_grads(model, config_gradient(guide, {"z": estimator})).isfinite()


SITES = {
    "bits": lambda: dist.Bernoulli(logits=torch.zeros(2)),
    "one_hot": lambda: dist.OneHotCategorical(logits=torch.zeros(2, 3)),
    "categorical": lambda: dist.Categorical(logits=torch.zeros(2, 3)),
    "poisson": lambda: dist.Poisson(torch.ones(2)),
}
UNSUITED = [
    (DisARM(), "one_hot", "needs Bernoulli", "disarm_tree"),
    (ARMS(3), "categorical", "needs Bernoulli", "disarm_tree"),
    (DisARMTree(), "bits", "needs one-hot or categorical", "arms"),
    (DoubleControlVariate(2), "categorical", "needs one-hot or Bernoulli", "local_expectation"),
    (Rodeo(2), "one_hot", "needs Bernoulli", "double_control_variate"),
    (MuProp(), "poisson", "needs one-hot or Bernoulli", "score"),
    (Rebar(), "categorical", "needs one-hot or Bernoulli", "unordered_set"),
    (LocalExpectation(), "poisson", "needs factorised one-hot", "score"),
    (SumAndSample(1), "bits", "needs one-hot or categorical", "local_expectation"),
    (UnorderedSet(2), "poisson", "needs one-hot or categorical", "score"),
]


def one_site(fn, estimator):
    """Return a model and a guide with one latent site."""

    def program():
        with pyro.plate("n", 2):
            pyro.sample("z", fn)

    return program, config_gradient(program, estimator)


@vectorized
@pytest.mark.parametrize(("estimator", "family", "need", "instead"), UNSUITED)
def test_an_unsupported_site_is_named(estimator, family, need, instead, vectorize):
    model, guide = one_site(SITES[family](), estimator)
    elbo = Estimator_ELBO(vectorize_particles=vectorize)
    with pytest.raises(
        ValueError, match=rf"At site 'z'.*{need}.*Supported estimators: .*{instead}"
    ):
        elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ARMS(1), "ARMS: num_samples must be an integer of at least 2; got 1"),
        (lambda: ARMS(2.0), "ARMS: num_samples must be an integer of at least 2; got 2.0"),
        (lambda: DoubleControlVariate(1), "DoubleControlVariate: num_samples .*got 1"),
        (lambda: Rodeo(1), "Rodeo: num_samples .*got 1"),
        (lambda: Rodeo(2, hidden=0), "Rodeo: hidden must be an integer of at least 1; got 0"),
        (lambda: SumAndSample(0), "SumAndSample: num_sum must be an integer of at least 1; got 0"),
        (lambda: UnorderedSet(1), "UnorderedSet: num_samples .*at least 2; got 1"),
        (lambda: UnorderedSet(11), "UnorderedSet: num_samples must be at most 10.*got 11"),
        (lambda: LocalExpectation(chunk_size=0), "LocalExpectation: chunk_size .*got 0"),
        (lambda: Rebar(0.0), "Rebar: temperature .*got 0.0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make", [ARMS, DoubleControlVariate, Rodeo, SumAndSample, UnorderedSet, Estimator_ELBO]
)
def test_integers_of_other_libraries_are_accepted(make):
    made = make(np.int64(3))
    numbers = {name: value for name, value in vars(made).items() if name.startswith("num_")}
    assert numbers
    assert all(type(value) is int for value in numbers.values())
    with pytest.raises((TypeError, ValueError), match="an integer of at least .; got True"):
        make(True)
