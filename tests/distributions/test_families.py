"""Families over shapes, numbers of categories, dtypes and forms of the parameters."""

from __future__ import annotations

import functools
import math

import pyro.distributions as dist
import pytest
import torch
from helpers.laws import chi_square_p
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_gumbel.distributions import OneHot, RelaxedBernoulli, RelaxedOneHot
from pyro_gumbel.distributions._categorical import log_probs, weights
from pyro_gumbel.distributions.families import (
    base_noise,
    event_dims,
    from_index,
    from_noise,
    log_mass,
    masks,
    one_hot_logits,
    sample_detached,
    to_index,
    unwrap,
    value_dtype,
    wrap_like,
    wrap_score,
)

FAMILIES = {
    "Categorical": dist.Categorical,
    "OneHotCategorical": dist.OneHotCategorical,
    "OneHot": OneHot,
    "RelaxedOneHot": functools.partial(RelaxedOneHot, 0.5, straight_through=True),
    "Bernoulli": dist.Bernoulli,
    "RelaxedBernoulli": functools.partial(RelaxedBernoulli, 0.5, straight_through=True),
}
# The largest relative error of a probability, by rounding of the parameter.
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}
quantified = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def cases(draw, dtypes=tuple(PRECISION)):
    """Draw a distribution and its exact probabilities, ``batch + (C,)``; a bit has 1 first."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    form = draw(st.sampled_from(["probs", "logits"]))
    dtype = draw(st.sampled_from(dtypes))
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    binary = "Bernoulli" in family
    categories = 2 if binary else draw(st.sampled_from([1, 2, 3, 7, 64, 65]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    spread = draw(st.sampled_from([0.1, 1.0, 2.0]))
    scores = spread * torch.randn(*batch, categories, dtype=torch.float64, generator=generator)
    probs = scores.softmax(-1)
    if draw(st.booleans()) and categories > 1:
        probs[..., -1] = 0.0
        probs = probs / probs.sum(-1, keepdim=True)
    number = probs[..., 0] if binary else probs
    if form == "logits":
        number = number.logit() if binary else number.log()
    fn = FAMILIES[family](**{form: number.to(dtype)}, validate_args=False)
    if draw(st.booleans()):
        assert fn.probs.shape == fn.logits.shape  # torch computes the other form here
    if draw(st.booleans()):
        fn, probs = fn.expand((2, *batch)), probs.expand(2, *probs.shape)
    return fn, probs


@quantified
@given(cases())
def test_masses_are_the_given_probabilities(case):
    fn, probs = case
    tolerance = {"rtol": PRECISION[value_dtype(fn)], "atol": 1e-6}
    torch.testing.assert_close(one_hot_logits(fn).softmax(-1).double(), probs, **tolerance)
    for category in range(probs.shape[-1]):
        index = torch.full(probs.shape[:-1], category)
        value = from_index(fn, index)
        assert value.shape == fn.batch_shape + fn.event_shape
        assert torch.equal(to_index(fn, value).long(), index)
        mass = log_mass(fn, value).double().exp()
        torch.testing.assert_close(mass, probs[..., category], **tolerance)
        assert (mass[probs[..., category] == 0] == 0).all()


@quantified
@given(cases())
def test_draws_are_possible_values(case):
    fn, probs = case
    drawn = [sample_detached(fn), from_noise(fn, base_noise(fn))]
    for value in drawn:
        assert value.shape == fn.batch_shape + fn.event_shape
        assert value.dtype == (torch.int64 if value.dtype == torch.int64 else value_dtype(fn))
        assert not value.requires_grad
        assert (probs.gather(-1, to_index(fn, value).long().unsqueeze(-1)) > 0).all()


@settings(quantified, max_examples=25)
@given(cases(dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_draws_follow_the_masses(case):
    """20,000 draws of the first element, p > 2e-5 in each of 25 cases."""
    fn, _ = case
    many = fn.expand((20_000, *fn.batch_shape))
    exact = one_hot_logits(fn).double().softmax(-1).reshape(-1, one_hot_logits(fn).shape[-1])[0]
    for value in (sample_detached(many), from_noise(many, base_noise(many))):
        index = to_index(many, value).long().reshape(20_000, -1)[:, 0]
        counts = torch.bincount(index, minlength=len(exact))
        common = exact * 20_000 > 20
        assert counts[exact == 0].sum() == 0
        if common.sum() > 1:
            assert chi_square_p(counts[common], exact[common]) > 2e-5


@quantified
@given(cases(), st.integers(0, 2), st.booleans())
def test_wrappers_are_removed_and_put_back(case, joined, masked):
    fn, _ = case
    joined = min(joined, len(fn.batch_shape))
    mask = torch.rand(fn.batch_shape) < 0.5
    wrapped = fn.mask(mask) if masked else fn
    wrapped = wrapped.to_event(joined) if joined else wrapped
    assert type(unwrap(wrapped)) is type(fn)
    assert event_dims(wrapped) == joined
    assert len(masks(wrapped)) == masked
    value = sample_detached(fn)
    score = wrap_score(wrapped, log_mass(fn, value))
    expected = log_mass(fn, value) * (mask if masked else 1)
    expected = expected.reshape(*expected.shape[: expected.dim() - joined], -1).sum(-1)
    torch.testing.assert_close(score, expected if joined else log_mass(fn, value) * mask**masked)
    assert wrap_like(wrapped, fn).batch_shape == wrapped.batch_shape


@pytest.mark.parametrize("expanded", [False, True])
def test_clamped_logits_are_not_used(expanded):
    """Torch clamps the logits of small probabilities. Masses come from the probabilities."""
    probs = torch.tensor([1e-6, 0.0, 1.0], dtype=torch.bfloat16)
    fn = dist.OneHotCategorical(probs=probs)
    assert fn.logits[1] > -6
    fn = fn.expand((2,)) if expanded else fn
    assert log_probs(fn)[..., 1].max() == -math.inf
    assert weights(fn)[..., 0].max() < 1e-5


@pytest.mark.parametrize("read_before", [False, True])
def test_given_logits_are_read_without_a_copy(read_before):
    """This includes logits whose probabilities torch has computed before."""
    fn = dist.Categorical(logits=torch.randn(4, 300))
    if read_before:
        assert fn.probs.shape == (4, 300)
    assert log_probs(fn) is fn.logits
