"""Counts of coupled draws of bits and categories, to compare with exact probabilities."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from helpers.coupled_draws import OneHotSite

DRAWS = 200_000
BIT_LOGITS = [-3.0, -1.1, 0.0, 0.4, 2.5]
LOGITS = OneHotSite(1).phi.detach()[0]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def chi_square(codes, probs):
    """Return the p-value of integer codes, and check that impossible ones are absent."""
    counts = torch.bincount(codes.flatten(), minlength=len(probs)).double()
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = probs[possible] * codes.numel()
    rare = expected < 5  # pooled, because the approximation needs larger counts
    observed = counts[possible]
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum().reshape(1)])
        expected = torch.cat([expected[~rare], expected[rare].sum().reshape(1)])
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return stats.chi2.sf(statistic.item(), len(expected) - 1)


def code(values, base):
    """Encode ``(K, draws)`` categories as integers. The first value is the leading digit."""
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
