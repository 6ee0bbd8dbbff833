"""Statistical checks with a stated error rate: |z| < 5, or p > 2e-5."""

from __future__ import annotations

import math

import scipy.stats
import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)


def mean_z(draws: Tensor, expected: float) -> float:
    """Standard errors between the mean of independent draws and what it should be."""
    draws = draws.double().flatten()
    return (draws.mean().item() - expected) * math.sqrt(len(draws)) / draws.std().item()


def count_z(hits: int, num_draws: int, probability: float) -> float:
    """Standard errors between a count and its expectation."""
    spread = math.sqrt(num_draws * probability * (1 - probability))
    return (hits - num_draws * probability) / spread


def chi_square_p(counts: Tensor, probs: Tensor) -> float:
    """p-value of counts of categories under exact probabilities."""
    counts, probs = counts.double(), probs.double()
    expected = counts.sum() * probs / probs.sum()
    assert expected.min() > 5, "too few draws for a chi-square test"
    return scipy.stats.chisquare(counts.numpy(), expected.numpy()).pvalue
