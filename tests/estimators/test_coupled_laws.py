"""The joint laws of coupled draws: what the exact expectations take for granted.

Counts of 200,000 draws against exact probabilities by chi-square, p > 2e-5.
"""

from __future__ import annotations

import itertools

import pyro.distributions as dist
import pytest
import torch
from helpers.coupled_draws import OneHotSite, pattern_law
from scipy import stats

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

DRAWS = 200_000
BIT_LOGITS = [-3.0, -1.1, 0.0, 0.4, 2.5]
LOGITS = OneHotSite(1).phi.detach()[0]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def chi_square(codes, probs):
    """P-value of integer codes against their probabilities; the impossible must not come."""
    counts = torch.bincount(codes.flatten(), minlength=len(probs)).double()
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = probs[possible] * codes.numel()
    rare = expected < 5  # pooled, as the approximation wants it
    observed = counts[possible]
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum().reshape(1)])
        expected = torch.cat([expected[~rare], expected[rare].sum().reshape(1)])
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return stats.chi2.sf(statistic.item(), len(expected) - 1)


def code(values, base):
    """Number the patterns of ``(K, draws)`` categories, the first value's digit first."""
    total = torch.zeros_like(values[0])
    for value in values:
        total = base * total + value
    return total


def bits(estimator, dtype):
    logits = torch.tensor(BIT_LOGITS, dtype=dtype).expand(DRAWS, -1)
    with torch.no_grad():
        return estimator.draw_block(dist.Bernoulli(logits=logits), 0).long()


def categories(estimator, dtype, logits=LOGITS):
    fn = dist.OneHotCategorical(logits=logits.to(dtype).expand(DRAWS, -1))
    with torch.no_grad():
        return estimator.draw_block(fn, 0)


@dtypes
@pytest.mark.parametrize("estimator", [DisARM(), ARMS(2), ARMS(3), ARMS(4), ARMS(6)], ids=repr)
def test_bits_of_a_copula(estimator, dtype):
    """Whole patterns of K, at each of five probabilities."""
    values = bits(estimator, dtype)
    theta = torch.tensor(BIT_LOGITS, dtype=torch.float64).sigmoid()
    law = dict(pattern_law(theta, estimator.num_values))
    probs = torch.stack([law[pattern] for pattern in sorted(law)])
    torch.testing.assert_close(probs.sum(0), torch.ones_like(theta))
    for bit in range(len(theta)):
        assert chi_square(code(values[..., bit], 2), probs[:, bit].clamp(min=0)) > 2e-5


@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_published_pair_probability(num_samples):
    """The two ways to write P11 agree, and the marginal is the guide's."""
    theta = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
    law = list(pattern_law(theta, num_samples))
    both = sum(prob for pattern, prob in law if pattern[0] and pattern[1])
    published = (2 * theta ** (1 / (num_samples - 1)) - 1).clamp(min=0) ** (num_samples - 1)
    torch.testing.assert_close(both, published, rtol=0, atol=1e-12)
    one = sum(prob for pattern, prob in law if pattern[0])
    torch.testing.assert_close(one, theta)


@dtypes
@pytest.mark.parametrize(
    "estimator", [DoubleControlVariate(2), Rodeo(3), MuProp(), Rebar()], ids=repr
)
def test_hard_bits_are_independent(estimator, dtype):
    values = bits(estimator, dtype)
    hard = values if isinstance(estimator, (DoubleControlVariate, Rodeo)) else values[:1]
    theta = torch.tensor(BIT_LOGITS, dtype=torch.float64).sigmoid()
    for bit, prob in enumerate(theta):
        pair = torch.stack([1 - prob, prob])
        probs = pair
        for _ in range(len(hard) - 1):
            probs = (probs[:, None] * pair).flatten()
        assert chi_square(code(hard[..., bit], 2), probs) > 2e-5


@dtypes
@pytest.mark.parametrize(
    "estimator", [DoubleControlVariate(2), MuProp(), Rebar(), LocalExpectation()], ids=repr
)
def test_first_category_is_the_guides(estimator, dtype):
    first = categories(estimator, dtype)[0].argmax(-1)
    assert chi_square(first, LOGITS.softmax(-1)) > 2e-5


@dtypes
def test_local_expectation_lists_the_other_categories(dtype):
    index = categories(LocalExpectation(), dtype)[:, :1000].argmax(-1)
    assert (index.sort(0).values == torch.arange(4)[:, None]).all()


@dtypes
@pytest.mark.parametrize(
    "estimator", [SumAndSample(1), SumAndSample(2), UnorderedSet(2), UnorderedSet(4)], ids=repr
)
def test_order_of_draws_without_replacement(estimator, dtype):
    values = categories(estimator, dtype).argmax(-1)
    weights = LOGITS.softmax(-1)
    probs = torch.zeros([4] * estimator.num_values, dtype=torch.float64)
    for drawn in itertools.permutations(range(4), estimator.num_values):
        left, prob = 1.0, 1.0
        for category in drawn:
            prob, left = prob * weights[category] / left, left - weights[category]
        probs[drawn] = prob
    assert chi_square(code(values, 4), probs.flatten()) > 2e-5


@dtypes
@pytest.mark.parametrize("num_categories", [2, 3, 4, 5])
def test_pairs_of_walks(num_categories, dtype):
    """Joint law of the two categories of a tree, padded where it is no power of two."""
    logits = torch.tensor([0.4, -1.1, 0.9, 0.1, -0.3], dtype=torch.float64)[:num_categories]
    pair = categories(DisARMTree(), dtype, logits).argmax(-1)
    leaves = 1 << (num_categories - 1).bit_length()
    weights = torch.cat([logits.exp(), torch.zeros(leaves - num_categories)])
    joint = _walks(weights)
    probs = joint[:num_categories, :num_categories]
    torch.testing.assert_close(probs.sum(1), logits.softmax(-1))
    torch.testing.assert_close(probs.sum(0), logits.softmax(-1))
    assert chi_square(code(pair, num_categories), probs.flatten()) > 2e-5


def _walks(weights):
    """Joint probabilities of two walks below a node: antithetic there, apart once they part."""
    if len(weights) == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    left, right = weights.chunk(2)
    if right.sum() == 0:
        return torch.nn.functional.pad(_walks(left), (0, len(right), 0, len(right)))
    law = dict(pattern_law(right.sum() / weights.sum(), 2))
    alone = [half / half.sum() for half in (left, right)]
    apart = alone[0][:, None] * alone[1]
    top = torch.cat([law[0, 0] * _walks(left), law[0, 1] * apart], 1)
    bottom = torch.cat([law[1, 0] * apart.T, law[1, 1] * _walks(right)], 1)
    return torch.cat([top, bottom])


@dtypes
def test_relaxed_pair_of_rebar_has_one_law(dtype):
    """Given nothing, the conditional relaxation has the law of the unconditional one."""
    _, free, given = categories(Rebar(0.7), dtype)
    for category in range(4):
        test = stats.ks_2samp(free[:, category].numpy(), given[:, category].numpy())
        assert test.pvalue > 2e-5


@dtypes
def test_conditional_relaxation_agrees_with_its_category(dtype):
    hard, free, given = categories(Rebar(0.7), dtype)
    assert (free.argmax(-1) == hard.argmax(-1)).all()
    assert (given.argmax(-1) == hard.argmax(-1)).all()
    mixed = (free - given).abs().amax(-1) > 1e-3
    assert mixed.float().mean() > 0.9
