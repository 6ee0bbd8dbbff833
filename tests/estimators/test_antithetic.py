"""DisARM, ARMS and DisARMTree: formulas, exact means, joint distributions, variances."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.bit_costs import DRAWS, check_variance, gradients
from helpers.coupled_draws import (
    EXACT,
    PARTICLES,
    BitSite,
    OneHotSite,
    check,
    pattern_law,
    per_bit,
    prescribe,
    step,
)
from helpers.coupled_laws import BIT_LOGITS, bits, categories, chi_square, code, dtypes

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    LeaveOneOut,
    Score,
)

DOUBLE = torch.float64


def test_disarm_follows_its_formula(vectorize):
    gradient, program, (b, c) = step(BitSite, DisARM(), vectorize)
    phi = program.phi.detach()
    difference = (program.cost(b) - program.cost(c)).unsqueeze(-1)
    expected = difference * (b - c) * torch.maximum(phi, -phi).sigmoid() / 2
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_arms_follows_its_formula(num_samples, vectorize):
    gradient, program, values = step(BitSite, ARMS(num_samples), vectorize)
    theta = program.phi.detach().sigmoid()
    p = torch.where(theta > 0.5, 1 - theta, theta)
    together = (2 * p ** (1 / (num_samples - 1)) - 1).clamp(min=0) ** (num_samples - 1)
    rho = theta * (1 - theta) / (p - together)
    cost = program.cost(values)
    centred = (cost - cost.mean(0)).unsqueeze(-1) * (values - theta)
    expected = rho * centred.sum(0) / (num_samples - 1)
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


def test_arms_of_two_is_disarm_at_the_same_values():
    """At every combination of two values of three bits."""
    block = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=DOUBLE)
    block = block.reshape(-1, 2, 3).movedim(1, 0)
    one, _ = BitSite(block.shape[1]).gradient(prescribe(ARMS(2), block))
    other, _ = BitSite(block.shape[1]).gradient(prescribe(DisARM(), block))
    assert one.abs().max() > 1
    torch.testing.assert_close(one, other, **EXACT)


def test_tree_follows_its_formula(vectorize):
    """Three nodes over four leaves, their logits written out."""
    gradient, program, values = step(OneHotSite, DisARMTree(), vectorize)
    phi = program.phi.detach().clone().requires_grad_()
    nodes = torch.stack(
        [
            phi[:, 2:].logsumexp(-1) - phi[:, :2].logsumexp(-1),
            phi[:, 1] - phi[:, 0],
            phi[:, 3] - phi[:, 2],
        ],
        -1,
    )
    difference = program.cost(values[0]) - program.cost(values[1])
    leaves = values.argmax(-1)
    total = torch.zeros((), dtype=DOUBLE)
    for r, n in itertools.product(range(PARTICLES), range(2)):
        one, two = (int(leaf) for leaf in leaves[:, r, n])
        walks = [{0: z // 2, 1 + z // 2: z % 2} for z in (one, two)]
        for node in range(3):
            alpha = nodes[n, node]
            weight = alpha.detach().sigmoid()
            if node in walks[0] and node in walks[1]:
                factor = (walks[0][node] - walks[1][node]) * alpha.detach().abs().sigmoid()
            elif node in walks[0]:
                factor = walks[0][node] - weight
            elif node in walks[1]:
                factor = weight - walks[1][node]
            else:
                factor = 0.0
            total = total + difference[r, n] * factor * alpha / 2
    (expected,) = torch.autograd.grad(total / PARTICLES, phi)
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_disarm_has_the_exact_mean():
    theta = BitSite(1).phi.detach()[0].sigmoid()
    check(BitSite, DisARM(), per_bit(list(pattern_law(theta, 2))))


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_arms_has_the_exact_mean(num_samples):
    theta = BitSite(1).phi.detach()[0].sigmoid()
    check(BitSite, ARMS(num_samples), per_bit(list(pattern_law(theta, num_samples))))


def test_tree_has_the_exact_mean():
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


@dtypes
@pytest.mark.parametrize("estimator", [DisARM(), ARMS(2), ARMS(3), ARMS(4), ARMS(6)], ids=repr)
def test_bits_of_a_copula(estimator, dtype):
    """Test the joint distribution of K draws, at each of five probabilities."""
    values = bits(estimator, dtype)
    theta = torch.tensor(BIT_LOGITS, dtype=torch.float64).sigmoid()
    law = dict(pattern_law(theta, estimator.num_values))
    probs = torch.stack([law[pattern] for pattern in sorted(law)])
    torch.testing.assert_close(probs.sum(0), torch.ones_like(theta))
    for bit in range(len(theta)):
        assert chi_square(code(values[..., bit], 2), probs[:, bit].clamp(min=0)) > 2e-5


@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_published_pair_probability(num_samples):
    """Both formulas of P11 agree, and the marginal is that of the guide."""
    theta = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)
    law = list(pattern_law(theta, num_samples))
    both = sum(prob for pattern, prob in law if pattern[0] and pattern[1])
    published = (2 * theta ** (1 / (num_samples - 1)) - 1).clamp(min=0) ** (num_samples - 1)
    torch.testing.assert_close(both, published, rtol=0, atol=1e-12)
    one = sum(prob for pattern, prob in law if pattern[0])
    torch.testing.assert_close(one, theta)


@dtypes
@pytest.mark.parametrize("num_categories", [2, 3, 4, 5])
def test_pairs_of_walks(num_categories, dtype):
    """Test the joint distribution of both categories, also in a padded tree."""
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
    """Joint probabilities of two walks below a node, independent once they part."""
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


@pytest.mark.parametrize(
    ("t", "theta"),
    [(0.45, 0.1), (0.45, 0.5), (0.49, 0.25), (0.49, 0.5), (0.499, 0.1), (0.49, 0.8)],
)
def test_squared_error_of_a_bit(t, theta):
    """Compare variances of leave-one-out and DisARM with their closed forms."""
    a, spread = 1 - 2 * t, theta * (1 - theta)
    rarer, s = min(theta, 1 - theta), 2 * theta * (1 - theta)
    logits = torch.full((DRAWS,), theta, dtype=DOUBLE).logit()
    pair = a**2 * rarer * (1 - rarer) ** 2 / 2 - (a * spread) ** 2
    for estimator, particles, variance in [
        (Score(LeaveOneOut()), 2, a**2 * s * (1 - s) / 4),
        (DisARM(), 1, pair),
        (ARMS(2), 1, pair),
    ]:
        draws = gradients(lambda b: (b - t) ** 2, logits, estimator, particles)
        check_variance(draws, a * spread, variance)


def test_two_hundred_bits_at_the_start():
    """Per-coordinate variances at one half, t = .499: 1.250e-9 and 1.244e-9.

    A gradient is a sum over 200 bits; 4,000 draws of 200 coordinates each.
    """
    logits = torch.zeros(4_000, 200, dtype=DOUBLE)
    for estimator, particles, known in [
        (Score(LeaveOneOut()), 2, 1.250e-9),
        (DoubleControlVariate(2), 1, 1.250e-9),
        (DisARM(), 1, 1.244e-9),
    ]:
        draws = gradients(
            lambda b: ((b - 0.499) ** 2).mean(-1), logits, estimator, particles, event=True
        )
        squares = ((draws - draws.mean(0)) ** 2).mean(1)
        error = squares.std() / len(squares) ** 0.5
        assert abs(squares.mean() - known) < 5 * error
        assert error < 0.05 * known
