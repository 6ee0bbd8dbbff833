"""Expectations without chance: every coupled draw with its probability, to 1e-10.

Each element of a plate is given one combination of coupled values; the estimates, weighted by the
combinations' probabilities, must add up to the exact gradient. That the draws have these
probabilities is tested in ``test_coupled_laws.py``.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.coupled_draws import EXACT, BitSite, OneHotSite, pattern_law, prescribe

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    LocalExpectation,
    MuProp,
    Rodeo,
    SumAndSample,
    UnorderedSet,
)

DOUBLE = torch.float64


def set_alpha(estimator, alpha):
    with torch.no_grad():
        estimator.alpha.fill_(alpha)
    return estimator


def set_scales(estimator):
    """Coefficients far from their start, and a network that is not small."""
    with torch.no_grad():
        estimator.scales.copy_(torch.tensor([-0.7, 0.4]))
        for parameter in estimator.network.parameters():
            parameter.mul_(2.0)
    return estimator


def expectation(site_type, estimator, combinations):
    """Average over ``[(values of shape (K, ...), probability), ...]``."""
    blocks, probs = zip(*combinations, strict=True)
    probs = torch.stack([torch.as_tensor(prob, dtype=DOUBLE) for prob in probs])
    torch.testing.assert_close(probs.sum(), torch.ones((), dtype=DOUBLE), **EXACT)
    site = site_type(1)
    phi = site.phi.detach()
    site.phi = phi.expand(len(blocks), *phi.shape[1:]).clone().requires_grad_()
    site.size = len(blocks)
    gradients, _ = site.gradient(prescribe(estimator, torch.stack(blocks, 1).to(DOUBLE)))
    return (probs.reshape(-1, *[1] * (phi.dim() - 1)) * gradients).sum(0), site_type(1).exact()


def per_bit(joint):
    """Combinations of all bits: ``joint`` lists each bit's patterns over the ``K`` values."""
    patterns, probs = zip(*joint, strict=True)
    patterns = torch.tensor(patterns, dtype=DOUBLE)  # (patterns, K)
    probs = torch.stack(probs)  # (patterns, bits)
    combinations = []
    for choice in itertools.product(range(len(patterns)), repeat=3):
        value = torch.stack([patterns[c] for c in choice], -1)  # (K, bits)
        prob = torch.stack([probs[c, bit] for bit, c in enumerate(choice)]).prod()
        combinations.append((value, prob))
    return [(value, prob) for value, prob in combinations if prob > 0]


def independent(site, count):
    """All combinations of ``count`` independent draws."""
    states = site.states()
    mass = site.log_mass(states, site.phi.detach()[0]).exp()
    return [
        (states[list(index)], mass[list(index)].prod())
        for index in itertools.product(range(len(states)), repeat=count)
    ]


def check(site_type, estimator, combinations):
    mean, exact = expectation(site_type, estimator, combinations)
    assert exact.abs().min() > 0.01
    torch.testing.assert_close(mean, exact, **EXACT)


def test_disarm():
    theta = BitSite(1).phi.detach()[0].sigmoid()
    check(BitSite, DisARM(), per_bit(list(pattern_law(theta, 2))))


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_arms(num_samples):
    theta = BitSite(1).phi.detach()[0].sigmoid()
    check(BitSite, ARMS(num_samples), per_bit(list(pattern_law(theta, num_samples))))


@pytest.mark.parametrize("site_type", [BitSite, OneHotSite])
@pytest.mark.parametrize("alpha", [0.0, -0.8, 3.0])
@pytest.mark.parametrize("num_samples", [2, 3])
def test_double_control_variate(site_type, alpha, num_samples):
    estimator = set_alpha(DoubleControlVariate(num_samples, learn=False), alpha)
    check(site_type, estimator, independent(site_type(1), num_samples))


@pytest.mark.parametrize("num_samples", [2, 3])
def test_rodeo(num_samples):
    estimator = set_scales(Rodeo(num_samples, learn=False, hidden=7).double())
    check(BitSite, estimator, independent(BitSite(1), num_samples))


@pytest.mark.parametrize("site_type", [BitSite, OneHotSite])
def test_muprop(site_type):
    site = site_type(1)
    mean = site.mean(site.phi.detach()[0])
    combinations = [(torch.stack([value[0], mean]), prob) for value, prob in independent(site, 1)]
    check(site_type, MuProp(), combinations)


def test_local_expectation_of_bits():
    """Variable by variable turned round, the others held."""
    turned = torch.cat([torch.zeros(1, 3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE)])
    combinations = [((value - turned).abs(), prob) for value, prob in independent(BitSite(1), 1)]
    check(BitSite, LocalExpectation(), combinations)


def test_local_expectation_of_one_variable_needs_no_expectation():
    site = OneHotSite(3)
    gradient, _ = site.gradient(LocalExpectation())
    again, _ = site.gradient(LocalExpectation())
    torch.testing.assert_close(gradient, again, **EXACT)
    torch.testing.assert_close(OneHotSite(1).gradient(LocalExpectation())[0][0], site.exact())


def ordered(site, count):
    """Every ordered draw of different categories with its probability."""
    probs = site.phi.detach()[0].softmax(-1)
    combinations = []
    for drawn in itertools.permutations(range(4), count):
        left, prob = 1.0, 1.0
        for category in drawn:
            prob = prob * probs[category] / left
            left = left - probs[category]
        combinations.append((site.states()[list(drawn)], prob))
    return combinations


@pytest.mark.parametrize("num_sum", [1, 2, 3])
def test_sum_and_sample(num_sum):
    check(OneHotSite, SumAndSample(num_sum), ordered(OneHotSite(1), num_sum + 1))


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_unordered_set(num_samples):
    check(OneHotSite, UnorderedSet(num_samples), ordered(OneHotSite(1), num_samples))


def test_whole_support_needs_no_expectation():
    """A set of all categories, and a sum of all but one, are the exact sum whatever the order."""
    for estimator in (UnorderedSet(4), SumAndSample(3)):
        gradient, _ = OneHotSite(1).gradient(estimator)
        torch.testing.assert_close(gradient[0], OneHotSite(1).exact(), **EXACT)


def test_tree():
    """Antithetic turns at each of the three nodes of four leaves."""
    logits = OneHotSite(1).phi.detach()[0]
    right = torch.stack(
        [logits[2:].logsumexp(0) - logits[:2].logsumexp(0), logits[1] - logits[0]]
        + [logits[3] - logits[2]]
    ).sigmoid()
    joint = list(pattern_law(right, 2))
    combinations = []
    for choice in itertools.product(joint, repeat=3):
        prob = torch.stack([probs[node] for node, (_, probs) in enumerate(choice)]).prod()
        root, *below = (turns for turns, _ in choice)
        leaves = [2 * root[k] + below[root[k]][k] for k in (0, 1)]
        if prob > 0:
            combinations.append((OneHotSite(1).states()[leaves], prob))
    check(OneHotSite, DisARMTree(), combinations)
