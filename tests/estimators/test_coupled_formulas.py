"""The published formulas of the coupled estimators, by hand, at the values that were drawn."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.coupled_draws import EXACT, PARTICLES, BitSite, OneHotSite, prescribe, step

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    LeaveOneOut,
    LocalExpectation,
    MuProp,
    Rodeo,
    Score,
    SumAndSample,
    UnorderedSet,
)

DOUBLE = torch.float64
both_sites = pytest.mark.parametrize("site_type", [BitSite, OneHotSite])


@pytest.fixture(params=[False, True], ids=["looped", "vectorised"])
def vectorize(request):
    return request.param


def leave_one_out(cost):
    return (cost - cost.mean(0)) * len(cost) / (len(cost) - 1)


def test_disarm(vectorize):
    gradient, program, (b, c) = step(BitSite, DisARM(), vectorize)
    phi = program.phi.detach()
    difference = (program.cost(b) - program.cost(c)).unsqueeze(-1)
    expected = difference * (b - c) * torch.maximum(phi, -phi).sigmoid() / 2
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_arms(num_samples, vectorize):
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


def test_tree(vectorize):
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


@both_sites
@pytest.mark.parametrize("num_samples", [2, 4])
def test_double_control_variate(site_type, num_samples, vectorize):
    estimator = DoubleControlVariate(num_samples, learn=False)
    with torch.no_grad():
        estimator.alpha.fill_(-0.6)
    gradient, program, values = step(site_type, estimator, vectorize)
    alpha = estimator.alpha.double()
    slopes = program.slope(values)
    mean = program.mean(program.phi.detach())
    cost = program.cost(values)
    corrected = []
    for k in range(num_samples):
        others = torch.stack([slopes[j] for j in range(num_samples) if j != k]).mean(0)
        corrected.append(cost[k] + alpha * (others * (values[k] - mean)).sum(-1))
    advantage = leave_one_out(torch.stack(corrected)).unsqueeze(-1)
    expected = (advantage * program.score(values)).mean(0)
    expected = expected - alpha * program.jacobian_product(slopes.mean(0))
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


def test_double_control_variate_starts_as_leave_one_out():
    gradient, program, values = step(OneHotSite, DoubleControlVariate(3), True)
    advantage = leave_one_out(program.cost(values)).unsqueeze(-1)
    expected = (advantage * program.score(values)).mean(0).mean(0)
    torch.testing.assert_close(gradient, expected, **EXACT)
    score = Score(LeaveOneOut())
    score.draw_block = lambda fn, event_dims: values[:, 0]
    again, _ = program.gradient(score, num_particles=3)
    advantage = leave_one_out(program.cost(values[:, 0])).unsqueeze(-1)
    torch.testing.assert_close(again, (advantage * program.score(values[:, 0])).mean(0), **EXACT)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_rodeo(num_samples, vectorize):
    """The Stein operator written as a sum over flipped bits of functions of the whole value."""
    estimator = Rodeo(num_samples, learn=False, hidden=6).double()
    with torch.no_grad():
        estimator.scales.copy_(torch.tensor([0.7, -1.3]))
    gradient, program, values = step(BitSite, estimator, vectorize)
    theta = program.phi.detach().sigmoid()
    cost, slopes = program.cost(values), program.slope(values)
    alpha, beta = estimator.scales

    def network(x, j):
        linear = (slopes[j] * (x - values[j])).sum(-1)
        return estimator.network(torch.stack([linear, cost[j]], -1))

    def stein(function, x):
        total = 0.0
        for i in range(3):
            flipped = x.clone()
            flipped[..., i] = 1 - x[..., i]
            weight = torch.where(x[..., i] > 0, 1 - theta[:, i], theta[:, i])
            change = function(flipped) - function(x)
            total = total + (weight if change.dim() == 2 else weight.unsqueeze(-1)) * change / 3
        return total

    def averaged(k, component, x):
        others = [j for j in range(num_samples) if j != k]
        return torch.stack([network(x, j)[..., component] for j in others]).mean(0)

    expected = 0.0
    for k in range(num_samples):
        baseline = torch.stack(
            [
                cost[j] + alpha * stein(lambda x, j=j: averaged(j, 0, x), values[j])
                for j in range(num_samples)
                if j != k
            ]
        ).mean(0)
        expected = expected + (cost[k] - baseline).unsqueeze(-1) * (values[k] - theta)
        expected = expected + beta * stein(
            lambda x, k=k: averaged(k, 1, x).unsqueeze(-1) * (x - theta), values[k]
        )
    expected = (expected / num_samples).detach()
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


@both_sites
def test_muprop(site_type, vectorize):
    gradient, program, values = step(site_type, MuProp(), vectorize)
    mean = program.mean(program.phi.detach()).expand_as(values[0])
    torch.testing.assert_close(values[1], mean, **EXACT)
    slope = program.slope(mean)
    first_order = program.cost(mean) + (slope * (values[0] - mean)).sum(-1)
    advantage = (program.cost(values[0]) - first_order).unsqueeze(-1)
    expected = advantage * program.score(values[0]) + program.jacobian_product(slope)
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


def test_local_expectation(vectorize):
    gradient, program, values = step(OneHotSite, LocalExpectation(), vectorize)
    pi = program.phi.detach().softmax(-1)
    costs = program.cost(torch.eye(4, dtype=DOUBLE)[:, None]).T  # (elements, C)
    expected = pi * (costs - (pi * costs).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert len(values) == 4


def test_local_expectation_of_bits(vectorize):
    gradient, program, values = step(BitSite, LocalExpectation(chunk_size=2), vectorize)
    theta = program.phi.detach().sigmoid()
    expected = []
    for bit in range(3):
        on, off = values[0].clone(), values[0].clone()
        on[..., bit], off[..., bit] = 1.0, 0.0
        expected.append(program.cost(on) - program.cost(off))
    expected = theta * (1 - theta) * torch.stack(expected, -1)
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


@pytest.mark.parametrize("num_sum", [1, 2])
def test_sum_and_sample(num_sum, vectorize):
    gradient, program, values = step(OneHotSite, SumAndSample(num_sum), vectorize)
    probs = (values * program.phi.detach().softmax(-1)).sum(-1, keepdim=True)
    term = program.cost(values).unsqueeze(-1) * program.score(values)
    expected = (probs[:-1] * term[:-1]).sum(0) + (1 - probs[:-1].sum(0)) * term[-1]
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


def set_probability(probs, total):
    """Draw the members in any order, from a domain of mass ``total``: a sum over orders."""
    chance = 0.0
    for order in itertools.permutations(probs):
        prob, left = 1.0, total
        for p in order:
            prob, left = prob * p / left, left - p
        chance = chance + prob
    return chance


@pytest.mark.parametrize("num_samples", [2, 3])
def test_unordered_set(num_samples, vectorize):
    gradient, program, values = step(OneHotSite, UnorderedSet(num_samples), vectorize)
    pi = program.phi.detach().softmax(-1)
    expected = torch.zeros_like(gradient)
    for r, n in itertools.product(range(PARTICLES), range(2)):
        drawn = values[:, r, n].argmax(-1).tolist()
        p = {s: pi[n, s].item() for s in drawn}
        cost = {s: program.cost(values)[k, r, n].item() for k, s in enumerate(drawn)}
        everything = set_probability(p.values(), 1.0)
        for k, s in enumerate(drawn):
            rest = [p[t] for t in drawn if t != s]
            without = set_probability(rest, 1 - p[s])
            baseline = 0.0
            for t in drawn:
                fewer = [p[u] for u in drawn if u not in (s, t)]
                ratio = 1.0 if t == s else set_probability(fewer, 1 - p[s] - p[t]) / without
                baseline += p[t] * ratio * cost[t]
            weight = p[s] * without / everything * (cost[s] - baseline)
            expected[n] += weight * (values[k, r, n] - pi[n]) / PARTICLES
    torch.testing.assert_close(gradient, expected, **EXACT)
