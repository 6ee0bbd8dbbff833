"""Coupled estimators with a planted error must fail the test of bias."""

from __future__ import annotations

import pytest
import torch
from helpers.coupled_problems import copies, copy_gradients, exact
from helpers.problems import worst_z
from torch import nn

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    LocalExpectation,
    MuProp,
    Rebar,
    Relax,
    Rodeo,
    SumAndSample,
    UnorderedSet,
)
from pyro_gumbel.estimators.control_variates import independent_draws

COPIES = 7_500


def mean_value(site):
    """The site's mean with gradient, in the shape of one value."""
    probs = site.logits.softmax(-1)
    return probs if probs.shape == site.values.shape[1:] else probs[..., 0]


class UnweightedPair(DisARM):
    """No weight for the noise that was integrated out."""

    def surrogate(self, site):
        first, second = site.values
        logits = site.logits[..., 0]
        return site.per_variable(site.cost[0] - site.cost[1]) * (first - second) / 2 * logits


class SingleNoise(DisARM):
    """Independent draws instead of an antithetic pair."""

    def draw(self, fn):
        return independent_draws(fn, 2)


class UncorrelatedWeight(ARMS):
    """The weight is that of independent draws, one."""

    def surrogate(self, site):
        logits = site.logits[..., 0]
        advantage = site.per_variable(site.cost - site.cost.mean(0)) / (self.num_samples - 1)
        return (advantage * (site.values - logits.detach().sigmoid())).sum(0) * logits


class OverAllSamples(ARMS):
    """The sum is divided by K instead of K - 1."""

    def surrogate(self, site):
        return super().surrogate(site) * (self.num_samples - 1) / self.num_samples


class WithoutFlip(ARMS):
    """The copula is not reflected above one half, so weights and draws disagree."""

    def draw(self, fn):
        values = super().draw(fn)
        common = fn.logits.detach() > 0
        again = independent_draws(fn, self.num_samples)
        return torch.where(common, again, values)


class SharedNodesOnly(DisARMTree):
    """Nodes on only one of the walks are omitted."""

    def surrogate(self, site):
        index = site.values.argmax(-1) if site.values.dtype.is_floating_point else site.values
        parted = (index[0] // 2 != index[1] // 2) | (index[0] == index[1])
        kept = torch.where(parted, 0.0, 1.0)
        return super().surrogate(site) * kept


class WithoutDirectTerm(DoubleControlVariate):
    """The control variate's mean is not added back."""

    def surrogate(self, site):
        direct = (site.value_gradients().mean(0) * mean_value(site)).sum()
        return super().surrogate(site) + self.alpha.detach() * direct


class InvertedWeights(Rodeo):
    """The operator weighs neighbours by the wrong probability, so its mean is not zero."""

    def _stein(self, values, probs, slopes, cost):
        return super()._stein(values, 1 - probs, slopes, cost)


class WithoutMean(MuProp):
    """The expansion is subtracted and its mean not added."""

    def surrogate(self, site):
        return super().surrogate(site) - (site.value_gradients()[1] * mean_value(site)).sum()


class AttachedSlope(MuProp):
    """The cost enters with its gradient."""

    def surrogate(self, site):
        return super().surrogate(site).sum() + (site.live_cost[0] * site.log_prob).sum()


class SameTwin(Rebar):
    """The unconditional relaxed value replaces the conditional one."""

    def draw(self, fn):
        return super().draw(fn)[[0, 1, 1]]


class ForgottenTwin(Rebar):
    """The conditional value's own gradient is dropped."""

    def draw(self, fn):
        block = super().draw(fn)
        return torch.stack([block[0], block[1], block[2].detach()])


class BlindToLaterSites(Rebar):
    """The dependence of later sites' distributions on the relaxed value is omitted."""

    def surrogate(self, site):
        site.__dict__["later_scores"] = torch.zeros(3, dtype=site.cost.dtype)
        return super().surrogate(site)


class CriticOfTheFreeTwin(Relax):
    """The network enters at only one of the two relaxed values."""

    def _extra(self, site):
        extra = super()._extra(site)
        return torch.stack([extra[0], torch.zeros_like(extra[1])])


class UnweightedCategories(LocalExpectation):
    """All categories have the same weight."""

    def surrogate(self, site):
        gain = (site.cost[1:] - site.cost[0]).mean(0)
        return gain * site.log_prob


class WholeRest(SumAndSample):
    """The last draw has weight one."""

    def surrogate(self, site):
        log_probs, cost = self._drawn(site)
        return (log_probs[:-1].exp() * cost[:-1]).sum(0) + cost[-1] * log_probs[-1]


class SetMean(UnorderedSet):
    """The set's members weighted by their shares, without the leave-out ratios."""

    def surrogate(self, site):
        log_probs, cost = self._drawn(site)
        share = log_probs.detach().softmax(0)
        return (share * (cost - (share * cost).sum(0)) * log_probs).sum(0)


PLANTED = {
    "unweighted_pair": ("bits", UnweightedPair),
    "single_noise": ("bits", SingleNoise),
    "uncorrelated_weight": ("bits", lambda: UncorrelatedWeight(3)),
    "over_all_samples": ("bits", lambda: OverAllSamples(3)),
    "without_flip": ("bits", lambda: WithoutFlip(3)),
    "shared_nodes_only": ("one_hot", SharedNodesOnly),
    "without_direct_term": ("bits", lambda: with_alpha(WithoutDirectTerm())),
    "inverted_weights": ("bits", lambda: with_scales(InvertedWeights(2, hidden=8))),
    "without_mean": ("bits", WithoutMean),
    "attached_slope": ("one_hot", AttachedSlope),
    "same_twin": ("one_hot", SameTwin),
    "forgotten_twin": ("bits", ForgottenTwin),
    "blind_to_later_sites": ("one_hot", BlindToLaterSites),
    "critic_of_the_free_twin": ("one_hot", lambda: CriticOfTheFreeTwin(AnySize().double())),
    "unweighted_categories": ("one_hot", UnweightedCategories),
    "whole_rest": ("one_hot", lambda: WholeRest(1)),
    "set_mean": ("one_hot", lambda: SetMean(2)),
}


class AnySize(nn.Module):
    """A critic of the first coordinate, since the sites differ in size."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, value):
        return self.net(value[..., :1])


def with_alpha(estimator):
    with torch.no_grad():
        estimator.alpha.fill_(-0.5)
    return estimator


def with_scales(estimator):
    with torch.no_grad():
        estimator.scales.fill_(-0.5)
    return estimator


@pytest.mark.parametrize("error", PLANTED)
def test_planted_error_is_caught(error):
    """7,500 estimates, as in the tests of the estimators."""
    name, make = PLANTED[error]
    draws = copy_gradients(copies(name, COPIES), make())
    assert worst_z(draws, exact(name)[1]) > 5


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("bits", with_scales(Rodeo(2, hidden=8))),
        ("bits", with_alpha(DoubleControlVariate())),
        ("one_hot", Relax(AnySize().double())),
    ],
)
def test_unbiased_with_the_same_coefficients(name, estimator):
    """The coefficients used above cause no bias. 7,500 estimates."""
    draws = copy_gradients(copies(name, COPIES), estimator)
    assert worst_z(draws, exact(name)[1]) < 5
