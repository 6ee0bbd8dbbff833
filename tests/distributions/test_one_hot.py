"""Exact one-hot draws and the multilinear log-mass."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.laws import DTYPES, HALF, chi_square_p, count_z, mean_z
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch.distributions import kl_divergence

from pyro_gumbel.distributions import OneHot, RelaxedOneHot, draw_one_hot, multilinear_log_prob

DRAWS = {
    "draw_one_hot": draw_one_hot,
    "OneHot": lambda logits, shape: OneHot(logits=logits).sample(shape),
    "sample": lambda logits, shape: RelaxedOneHot(
        0.3, logits=logits, straight_through=True
    ).sample(shape),
    "rsample": lambda logits, shape: RelaxedOneHot(
        0.3, logits=logits, straight_through=True
    ).rsample(shape),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_law(draw, dtype):
    logits = torch.tensor([[0.0, 1.0, -2.0, 0.5], [3.0, -1.0, 0.0, 0.0]], dtype=dtype)
    values = draw(logits, (40_000,))
    assert values.shape == (40_000, 2, 4)
    assert values.dtype == dtype
    assert ((values == 0) | (values == 1)).all()
    assert (values.sum(-1) == 1).all()
    for row in range(2):
        counts = values[:, row].double().sum(0)
        assert chi_square_p(counts, logits[row].double().softmax(-1)) > 2e-5


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_keeps_the_law(draw, dtype):
    index = draw(torch.zeros(1000, dtype=dtype), (20_000,)).max(-1).indices
    assert abs(mean_z(index, 499.5)) < 5
    probs = torch.full((20,), (1 - 1e-3) / 19)
    probs[7] = 1e-3
    logits = probs.log().to(dtype)
    exact = logits.double().softmax(-1)[7].item()
    hits = draw(logits, (100_000,))[:, 7].sum(dtype=torch.float32).item()
    assert abs(count_z(hits, 100_000, exact)) < 5


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_large_offsets_cost_no_digits(draw):
    logits = torch.full((1000,), 1e4)
    index = draw(logits, (20_000,)).max(-1).indices
    assert abs(mean_z(index, 499.5)) < 5
    assert abs(mean_z((index - 499.5).square(), (1000**2 - 1) / 12)) < 5


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_impossible_categories_are_never_drawn(draw):
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0])
    counts = draw(logits, (20_000,)).sum(0)
    assert counts[0] == counts[2] == 0
    assert chi_square_p(counts[[1, 3]], torch.tensor([0.0, 1.0]).softmax(-1)) > 2e-5


def test_draws_are_independent_across_the_batch():
    values = OneHot(logits=torch.zeros(2, 3)).sample((30_000,))
    joint = (values[:, 0].unsqueeze(-1) * values[:, 1].unsqueeze(-2)).sum(0)
    assert chi_square_p(joint.flatten(), torch.full((9,), 1 / 9)) > 2e-5


def test_extreme_logits():
    logits = torch.tensor([1e4, -1e4, 0.0])
    d = OneHot(logits=logits)
    assert (d.sample((100,))[:, 0] == 1).all()
    assert d.log_prob(torch.eye(3)).tolist() == [0, -2e4, -1e4]


def test_probs_of_zero_are_exact():
    probs = torch.tensor([0.0, 0.25, 0.75], requires_grad=True)
    d = OneHot(probs=probs)
    score = d.log_prob(torch.eye(3))
    expected = torch.tensor([-math.inf, math.log(0.25), math.log(0.75)])
    torch.testing.assert_close(score, expected)
    assert d.probs.tolist() == pytest.approx([0, 0.25, 0.75])
    assert torch.autograd.grad(score[1:].sum() + d.entropy(), probs)[0].isfinite().all()
    exact_entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert d.entropy().item() == pytest.approx(exact_entropy, rel=1e-6)


def test_probs_are_normalised():
    d = OneHot(probs=torch.tensor([2.0, 6.0]))
    torch.testing.assert_close(d.probs, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(d.logits, torch.tensor([0.25, 0.75]).log())


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_one_hot_categorical(dtype):
    logits = torch.randn(4, 5, dtype=torch.float64).to(dtype)
    ours, exact = OneHot(logits=logits), dist.OneHotCategorical(logits=logits.double())
    values = exact.sample((3,)).to(dtype)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    for name in ("probs", "logits", "mean", "variance"):
        torch.testing.assert_close(getattr(ours, name), getattr(exact, name).to(dtype), **close)
    torch.testing.assert_close(ours.entropy(), exact.entropy().to(dtype), **close)
    score = ours.log_prob(values)
    assert score.dtype == dtype
    torch.testing.assert_close(score, exact.log_prob(values.double()).to(dtype), **close)
    assert torch.equal(ours.mode.double(), exact.mode)
    for expand in (True, False):
        ours_support = ours.enumerate_support(expand)
        assert torch.equal(ours_support.double(), exact.enumerate_support(expand))


def test_log_mass_is_linear_in_the_value():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    value = torch.rand(2, 3, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    d = OneHot(logits=logits)
    expected = (value * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(d.log_prob(value), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda v, phi: OneHot(logits=phi, validate_args=False).log_prob(v), (value, logits)
    )
    by_value = torch.autograd.grad(d.log_prob(value).sum(), value)[0]
    torch.testing.assert_close(by_value, logits.log_softmax(-1).expand_as(value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_multilinear_log_prob_with_impossible_categories(dtype):
    log_probs = torch.tensor([0.0, -math.inf], dtype=dtype, requires_grad=True)
    values = torch.eye(2, dtype=dtype, requires_grad=True)
    score = multilinear_log_prob(values, log_probs)
    assert score.dtype == dtype
    assert score.tolist() == [0, -math.inf]
    by_value, by_log_probs = torch.autograd.grad(score.sum(), (values, log_probs))
    assert by_value.isfinite().all()
    assert (by_value[:, 1] < -1e4).all()  # away from the impossible
    assert by_log_probs.isfinite().all()
    transformed = torch.func.vmap(multilinear_log_prob, in_dims=(0, None))(values, log_probs)
    assert torch.equal(transformed, score)


def test_multilinear_log_prob_is_exact_far_out():
    log_probs = torch.tensor([0.0, -1e6])
    assert multilinear_log_prob(torch.eye(2), log_probs).tolist() == [0, -1e6]
    not_a_number = multilinear_log_prob(torch.tensor([math.nan, 0.0]), log_probs)
    assert not_a_number.isnan()


def test_multilinear_log_prob_derivatives():
    arguments = torch.randn(2, 5, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(multilinear_log_prob, arguments)
    assert torch.autograd.gradgradcheck(multilinear_log_prob, arguments)


def test_enumeration_in_pyro():
    probs, prior = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.6, 0.3])

    def model():
        pyro.sample("z", OneHot(probs=prior))

    @config_enumerate
    def guide():
        pyro.sample("z", OneHot(probs=probs))

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide)
    assert loss == pytest.approx((probs * (probs / prior).log()).sum().item(), rel=1e-5)


@pytest.mark.parametrize("form", ["probs", "logits"])
def test_torch_code_for_one_hot_vectors_serves_it(form):
    """Functions written for OneHotCategorical read its parts, which are computed on demand."""
    law = torch.distributions.OneHotCategorical
    probs = torch.tensor([0.2, 0.3, 0.5])
    numbers = {form: probs if form == "probs" else probs.log()}
    ours, theirs = OneHot(**numbers).expand([2]), law(**numbers).expand([2])
    value = torch.eye(3)[1:]
    torch.testing.assert_close(law.entropy(ours), theirs.entropy())
    torch.testing.assert_close(law.log_prob(ours, value), theirs.log_prob(value))
    for name in ("mean", "mode", "variance", "param_shape"):
        torch.testing.assert_close(getattr(law, name).fget(ours), getattr(theirs, name))
    torch.testing.assert_close(law._param.fget(ours), getattr(ours, form))
    assert law.sample(ours, torch.Size([4])).shape == (4, 2, 3)
    assert law._new(ours, (2,)).dtype == torch.float32
    index = torch.distributions.Independent(ours._categorical, 0)
    assert index.batch_shape == (2,)
    other = law(logits=torch.zeros(3))
    for q, p in ((ours, other), (other, ours)):
        torch.testing.assert_close(
            kl_divergence(q, p), kl_divergence(q._categorical, p._categorical).expand(2)
        )
