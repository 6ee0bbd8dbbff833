"""Statistical checks with a stated error rate: |z| < 5, or p > 2e-5."""

from __future__ import annotations

import math

import scipy.stats
import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)


def mean_z(draws: Tensor, expected: float) -> float:
    """Return the error of the mean of independent draws in standard errors."""
    draws = draws.double().flatten()
    return (draws.mean().item() - expected) * math.sqrt(len(draws)) / draws.std().item()


def count_z(hits: int, num_draws: int, probability: float) -> float:
    """Return the error of a count in standard errors."""
    spread = math.sqrt(num_draws * probability * (1 - probability))
    return (hits - num_draws * probability) / spread


def chi_square_p(counts: Tensor, probs: Tensor) -> float:
    """p-value of counts of categories under exact probabilities."""
    counts, probs = counts.double(), probs.double()
    expected = counts.sum() * probs / probs.sum()
    assert expected.min() > 5, "too few draws for a chi-square test"
    return scipy.stats.chisquare(counts.numpy(), expected.numpy()).pvalue
