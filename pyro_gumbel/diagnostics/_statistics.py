"""From moments to the figures that compare estimators, each with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from pyro_gumbel.diagnostics._moments import Spread

__all__ = ["Bias", "bias_of", "cosine_of", "snr_of", "two_sided_z"]

_INTERVAL = 1.959963984540054  # half the width of a normal's 95 % interval, in standard errors


@dataclass(frozen=True)
class Bias:
    """The distance of a mean gradient from its reference, and how much of it noise explains.

    Attributes:
        norm: The distance.
        squared: Its square less what noise adds to it on average: unbiased, so it may be negative.
        mcse: So much that ``norm`` is below 1.96 of it in 95 % of repetitions if there is no bias.
        log_tail: The log of the probability that noise alone goes that far.
        squared_mcse: Standard error of ``squared``.
    """

    norm: float
    squared: float
    mcse: float
    log_tail: float
    squared_mcse: float


def bias_of(difference: np.ndarray, spreads: list[Spread], floor: float) -> Bias:
    r"""Judge the difference of two means by the scatter of the draws behind them.

    Without bias the squared distance is a weighted sum of :math:`\chi^2` variables with mean
    :math:`\mathrm{tr}\,\Sigma / N` and variance :math:`2\,\mathrm{tr}\,\Sigma^2 / N^2`. It is
    taken for the multiple of one :math:`\chi^2` that has the same two moments (Satterthwaite,
    1946). In one dimension the standard error and the probability are the usual ones.

    Args:
        difference: Mean minus reference, ``(n,)``.
        spreads: Of the draws, and of the reference's where it is a mean of draws too.
        floor: The distance that rounding explains.
    """
    squared_norm = float(difference @ difference)
    mean = sum(spread.trace / spread.count for spread in spreads)
    variance = sum(2 * spread.square_trace / spread.count**2 for spread in spreads)
    # Covariances of two independent means add; twice the trace of their product is at most this.
    if len(spreads) == 2:
        one, two = (2 * spread.square_trace / spread.count**2 for spread in spreads)
        variance += 2 * math.sqrt(one * two)
    noise, noise_variance = mean + floor**2, variance + 2 * floor**4
    scale = noise_variance / (2 * noise) if noise else 0.0
    freedom = noise / scale if scale else 1.0
    norm = math.sqrt(squared_norm)
    squared = squared_norm - mean
    largest = math.sqrt(variance / 2)  # no direction has more variance
    squared_mcse = math.sqrt(4 * max(squared, 0.0) * largest + variance)
    if not scale:
        return Bias(norm, squared, 0.0, -math.inf if norm else 0.0, squared_mcse)
    mcse = math.sqrt(scale * stats.chi2.ppf(0.95, freedom)) / _INTERVAL
    return Bias(norm, squared, mcse, _log_tail(squared_norm / scale, freedom), squared_mcse)


def _log_tail(value: float, freedom: float) -> float:
    """The log of the probability that a chi-squared variable is larger."""
    log_tail = stats.chi2.logsf(value, freedom)
    if not np.isfinite(log_tail) or log_tail < -600:  # underflow: the tail's leading term
        half = freedom / 2
        log_tail = (half - 1) * math.log(value / 2) - value / 2 - special.gammaln(half)
    return min(float(log_tail), 0.0)


def two_sided_z(log_tails: list[float]) -> float:
    """The normal's two-sided quantile at the smallest of several probabilities.

    It is corrected for their number (Bonferroni): one of many is small by chance. NaN where one
    of them is.
    """
    if any(math.isnan(log_tail) for log_tail in log_tails):
        return math.nan
    log_tail = min(min(log_tails) + math.log(len(log_tails)), 0.0)
    return max(0.0, -float(special.ndtri_exp(log_tail - math.log(2))))


def snr_of(mean: np.ndarray, spread: Spread) -> tuple[float, float]:
    """The norm of the mean over the root of the total variance, and its standard error."""
    signal = float(mean @ mean) - spread.trace / spread.count
    if spread.trace <= 0:
        return (math.inf if signal > 0 else math.nan), math.nan
    if signal <= 0:
        return 0.0, math.sqrt(math.sqrt(2 * spread.square_trace) / spread.count / spread.trace)
    ratio = math.sqrt(signal / spread.trace)
    largest = math.sqrt(spread.square_trace)
    signal_variance = (
        4 * signal * largest / spread.count + 2 * spread.square_trace / spread.count**2
    )
    relative = signal_variance / signal**2 + spread.trace_variance / spread.trace**2
    return ratio, ratio * math.sqrt(relative) / 2


def cosine_of(mean: np.ndarray, reference: np.ndarray, spread: Spread) -> tuple[float, float]:
    """The cosine of the mean with the reference, and its standard error."""
    norms = float(np.linalg.norm(mean) * np.linalg.norm(reference))
    if norms == 0:
        return math.nan, math.nan
    cosine = float(np.clip(mean @ reference / norms, -1, 1))
    length = float(mean @ mean)
    across = math.sqrt(spread.square_trace) / spread.count / length
    away = spread.trace / spread.count / length / 2
    return cosine, math.sqrt((1 - cosine**2) * across + away**2)
