"""Errors of distributions name the argument, its value and a remedy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyro_gumbel.distributions import (
    ExpRelaxedOneHot,
    Gumbel,
    OneHot,
    RelaxedBernoulli,
    RelaxedOneHot,
    TruncatedGumbel,
)

PHI = torch.zeros(5, 3)
NAN = torch.tensor([0.0, math.nan, 1.0])
INF = torch.tensor([0.0, math.inf, 1.0])

TEMPERED = {
    "RelaxedOneHot": RelaxedOneHot,
    "ExpRelaxedOneHot": ExpRelaxedOneHot,
    "RelaxedBernoulli": RelaxedBernoulli,
}


@pytest.mark.parametrize("cls", TEMPERED.values(), ids=TEMPERED)
@pytest.mark.parametrize("bad", [0.0, -1, math.nan, torch.tensor(0.0), torch.tensor([1.0, -1.0])])
def test_temperature_must_be_positive(cls, bad):
    phi = torch.zeros(2) if cls is RelaxedBernoulli else torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature must be positive; got .* Write"):
        cls(bad, logits=phi)


@pytest.mark.parametrize("cls", TEMPERED.values(), ids=TEMPERED)
@pytest.mark.parametrize("bad", [None, "hot", "1", True, PHI.sum])
def test_temperature_must_be_a_number(cls, bad):
    with pytest.raises(TypeError, match="temperature must be a positive number or tensor"):
        cls(bad, logits=PHI)


@pytest.mark.parametrize("cls", [RelaxedOneHot, ExpRelaxedOneHot])
@pytest.mark.parametrize("shape", [(4,), (3,), (5, 3), (4, 1), (7, 1), (2, 5, 3)])
def test_temperature_must_fit_the_batch(cls, shape):
    with pytest.raises(ValueError, match=r"temperature of shape .* batch_shape \(5,\)"):
        cls(torch.ones(shape), logits=PHI)


@pytest.mark.parametrize("cls", [RelaxedOneHot, ExpRelaxedOneHot])
def test_temperature_must_be_unambiguous(cls):
    with pytest.raises(ValueError, match="ambiguous"):
        cls(torch.ones(5, 1), logits=torch.zeros(5, 5, 3))


def test_temperature_of_a_bit_must_broadcast():
    with pytest.raises(ValueError, match="does not broadcast"):
        RelaxedBernoulli(torch.ones(4), logits=torch.zeros(5))


@pytest.mark.parametrize("cls", [OneHot, *TEMPERED.values()])
def test_exactly_one_parameter(cls):
    before = () if cls is OneHot else (0.5,)
    with pytest.raises(ValueError, match="Exactly one of probs and logits .* got neither"):
        cls(*before)
    with pytest.raises(ValueError, match="Exactly one of probs and logits .* got both"):
        cls(*before, probs=torch.ones(3), logits=torch.ones(3))


@pytest.mark.parametrize("cls", [OneHot, *TEMPERED.values()])
def test_nan_logits(cls):
    before = () if cls is OneHot else (0.5,)
    with pytest.raises(ValueError, match="logits .*NaN"):
        cls(*before, logits=NAN)
    cls(*before, logits=NAN, validate_args=False)


VALUES = [
    (lambda: OneHot(logits=INF), "logits must be numbers below"),
    (lambda: OneHot(logits=torch.full((3,), -math.inf)), "logits .* not all -inf"),
    (lambda: OneHot(probs=torch.tensor([0.5, -0.5])), "probs must be non-negative"),
    (lambda: OneHot(probs=torch.zeros(3)), "probs .* positive sum"),
    (lambda: OneHot(probs=NAN), "probs .*NaN"),
    (lambda: OneHot(logits=0.5), "logits must have a last dimension of categories"),
    (lambda: OneHot(probs=torch.zeros(2, 0)), "probs must have a last dimension of categories"),
    (lambda: RelaxedBernoulli(0.5, probs=1.5), r"probs must lie in \[0, 1\]; got .*Write logits="),
    (lambda: RelaxedBernoulli(0.5, probs=NAN), r"probs must lie in \[0, 1\]"),
    (lambda: Gumbel(0.0, 0.0), "scale must be positive"),
    (lambda: Gumbel(0.0, torch.tensor([1.0, -1.0])), "scale must be positive"),
    (lambda: Gumbel(NAN, 1.0), "loc must be a number"),
    (lambda: TruncatedGumbel(0.0, math.nan), "upper must be a number"),
    (lambda: TruncatedGumbel(0.0, -math.inf), "upper must be a number above -inf"),
    (lambda: TruncatedGumbel(NAN, 1.0), "loc must be a number"),
    (lambda: TruncatedGumbel(0.0, 1.0, -1.0), "scale must be positive"),
    (lambda: Gumbel(0.0).icdf(torch.tensor(1.5)), "value of icdf must be a probability"),
    (lambda: OneHot(logits=PHI).log_prob(torch.ones(5, 3)), "must lie within"),
    (lambda: OneHot(logits=PHI).log_prob(torch.eye(4)), r"event_shape \(3,\)"),
    (lambda: OneHot(logits=PHI).log_prob(torch.eye(3)[:2]), r"broadcast against \(5, 3\)"),
    (lambda: RelaxedOneHot(0.5, logits=PHI).log_prob(PHI), "must lie within RelaxedSimplex"),
    (lambda: ExpRelaxedOneHot(0.5, logits=PHI).log_prob(PHI), "must lie within LogSimplex"),
    (lambda: RelaxedBernoulli(0.5, logits=0).log_prob(torch.tensor(1.5)), "must lie within"),
    (lambda: TruncatedGumbel(0.0, 1.0).log_prob(torch.tensor(2.0)), "must lie within LessThanEq"),
    (lambda: Gumbel(0.0).log_prob(torch.tensor(math.nan)), "must lie within Real"),
]


@pytest.mark.parametrize(("call", "message"), VALUES)
def test_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("cls", TEMPERED.values(), ids=TEMPERED)
def test_temperature_may_be_a_number_of_numpy(cls):
    assert cls(np.float32(0.5), logits=PHI).temperature == 0.5


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Gumbel("a", 1.0), "loc"),
        (lambda: Gumbel(0.0, None), "scale"),
        (lambda: TruncatedGumbel(torch.zeros(2), "a"), "upper"),
    ],
)
def test_location_and_scale_must_be_numbers(call, name):
    with pytest.raises(TypeError, match=f"{name} must be a number or a tensor; got"):
        call()


def test_value_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"must be a tensor; got float. Write torch.tensor"):
        Gumbel(0.0).log_prob(1.0)


def test_validation_can_be_switched_off():
    assert RelaxedOneHot(0.5, logits=PHI, validate_args=False).log_prob(PHI).shape == (5,)
