"""Draws without replacement: formulas, exact means, order, refusals."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.coupled_draws import (
    EXACT,
    PARTICLES,
    OneHotSite,
    check,
    ordered,
    step,
)
from helpers.coupled_laws import LOGITS, categories, chi_square, code, dtypes

from pyro_gumbel.estimators import (
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient


@pytest.mark.parametrize("num_sum", [1, 2])
def test_sum_and_sample_follows_its_formula(num_sum, vectorize):
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
def test_unordered_set_follows_its_formula(num_samples, vectorize):
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


DOUBLE = torch.float64


@pytest.mark.parametrize("num_sum", [1, 2, 3])
def test_sum_and_sample_has_the_exact_mean(num_sum):
    check(OneHotSite, SumAndSample(num_sum), ordered(OneHotSite(1), num_sum + 1))


@pytest.mark.parametrize("num_samples", [2, 3, 4])
def test_unordered_set_has_the_exact_mean(num_samples):
    check(OneHotSite, UnorderedSet(num_samples), ordered(OneHotSite(1), num_samples))


def test_whole_support_needs_no_expectation():
    """A set of all categories, and a sum of all but one, are the exact sum whatever the order."""
    for estimator in (UnorderedSet(4), SumAndSample(3)):
        gradient, _ = OneHotSite(1).gradient(estimator)
        torch.testing.assert_close(gradient[0], OneHotSite(1).exact(), **EXACT)


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


SITES = {
    "bits": lambda: dist.Bernoulli(logits=torch.zeros(2)),
    "one_hot": lambda: dist.OneHotCategorical(logits=torch.zeros(2, 3)),
    "categorical": lambda: dist.Categorical(logits=torch.zeros(2, 3)),
    "poisson": lambda: dist.Poisson(torch.ones(2)),
}


def one_site(fn, estimator):
    """Programs of one latent site, wrapped as given."""

    def program():
        with pyro.plate("n", 2):
            pyro.sample("z", fn)

    return program, config_gradient(program, estimator)


@pytest.mark.parametrize("estimator", [SumAndSample(3), UnorderedSet(4)])
def test_too_few_categories(estimator):
    model, guide = one_site(SITES["one_hot"](), estimator)
    with pytest.raises(ValueError, match=r"At site 'z'.*draws 4 different categories of 3"):
        Estimator_ELBO().loss_and_grads(model, guide)


@pytest.mark.parametrize("estimator", [SumAndSample(1), UnorderedSet(2)])
def test_one_variable_is_needed(estimator):
    fn = dist.OneHotCategorical(logits=torch.zeros(2, 2, 3)).to_event(1)
    model, guide = one_site(fn, estimator)
    with pytest.raises(ValueError, match=r"At site 'z'.*to_event joins its variables.*pyro.plate"):
        Estimator_ELBO().loss_and_grads(model, guide)


@pytest.mark.parametrize("estimator", [SumAndSample(1), UnorderedSet(2)])
def test_an_event_of_one_variable_is_one(estimator):
    fn = dist.OneHotCategorical(logits=torch.zeros(2, 1, 3)).to_event(1)
    model, guide = one_site(fn, estimator)
    assert Estimator_ELBO().loss_and_grads(model, guide).isfinite()
