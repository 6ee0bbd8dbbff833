"""Moments of gradient draws in one pass, and the figures that they give, with standard errors.

The memory does not grow with the number of draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

__all__ = ["BATCH", "Bias", "Moments", "Spread", "bias_of", "cosine_of", "snr_of", "two_sided_z"]

BATCH = 32
_INTERVAL = 1.959963984540054  # half the width of a normal's 95 % interval, in standard errors


@dataclass(frozen=True)
class Spread:
    r"""How draws of a vector scatter, with :math:`\Sigma` the covariance of one draw.

    Attributes:
        count: Number of draws ``N``.
        trace: Estimate of :math:`\mathrm{tr}\,\Sigma`, the sum of sample variances.
        trace_variance: Variance of that estimate.
        square_trace: Estimate of :math:`\mathrm{tr}\,\Sigma^2`, between
            :math:`(\mathrm{tr}\,\Sigma)^2` over the dimension and :math:`(\mathrm{tr}\,\Sigma)^2`.
    """

    count: int
    trace: float
    trace_variance: float
    square_trace: float

    @property
    def carriers(self) -> float:
        """How many draws carry the trace: the count over the kurtosis of the distances.

        That is a third of normal draws in one dimension, ``k`` if all but ``k`` are alike, and
        0 if all are.
        """
        if not self.trace:
            return 0.0
        return self.count / (1 + self.count * self.trace_variance / self.trace**2)


class Moments:
    """Mean and variance of each coordinate, and the scatter of each block of coordinates.

    Draws come in batches of rows. Everything is taken relative to the first draw, so that draws
    that are all equal have a variance of exactly zero.

    Args:
        sizes: Number of coordinates of each block.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.count = 0
        self._pairs = 0
        self._shift: Tensor | None = None

    def update(self, draws: Tensor) -> Tensor:
        """Take in a batch of shape ``(B, n)``; return cosines with the others' mean.

        Operations on single draws are in their own precision, sums over batches in double.
        """
        shift = self._start(draws) if self._shift is None else self._shift
        x = draws - shift
        batch, total = len(x), self.count + len(x)
        mean = x.mean(0)
        deviations = x.sub_(mean)
        step = mean.double() - self.offset
        self.squares += deviations.square().sum(0)
        self.squares += step**2 * (self.count * batch / total)
        self.offset += step * (batch / total)
        self.count = total
        self._scatter(deviations.add_((mean.double() - self.offset).to(x.dtype)))
        return self._cosines(draws)

    def _start(self, draws: Tensor) -> Tensor:
        self._shift = draws[0].clone()
        self.offset = torch.zeros_like(self._shift, dtype=torch.float64)
        self.squares = torch.zeros_like(self.offset)
        blocks = len(self.sizes) + 1
        # Sums over draws, for each block and last for all of them together.
        self._deviations = self.offset.new_zeros(blocks)
        self._deviations_squared = self.offset.new_zeros(blocks)
        self._square_traces = self.offset.new_zeros(blocks)
        return self._shift

    @property
    def mean(self) -> Tensor:
        """The mean of each coordinate, ``(n,)``."""
        assert self._shift is not None
        return self._shift + self.offset

    @property
    def variance(self) -> Tensor:
        """The sample variance of each coordinate, ``(n,)``."""
        return self.squares / (self.count - 1)

    def spread(self, block: int | None = None) -> Spread:
        """Sum up the scatter of a block, or of all coordinates."""
        index = -1 if block is None else block
        pieces = self.squares.split(self.sizes)
        squares = self.squares if block is None else pieces[block]
        trace = float(squares.sum()) / (self.count - 1)
        mean = self._deviations[index] / self.count
        spread = self._deviations_squared[index] / self.count - mean**2
        dimension = max(len(squares), 1)
        # Within the bounds that hold for any covariance; the upper one if there are too few draws.
        estimate = float(self._square_traces[index]) / self._pairs if self._pairs else trace**2
        square_trace = min(max(estimate, trace**2 / dimension), trace**2)
        return Spread(self.count, trace, max(float(spread), 0.0) / self.count, square_trace)

    def _scatter(self, x: Tensor) -> None:
        """Add up squared deviations, and products that estimate the trace of Sigma squared."""
        grams = [(piece @ piece.T).double() for piece in x.split(self.sizes, 1)]
        stacked = torch.stack([*grams, torch.stack(grams).sum(0)])  # (blocks, B, B)
        deviations = stacked.diagonal(dim1=1, dim2=2)
        self._deviations += deviations.sum(1)
        self._deviations_squared += (deviations**2).sum(1)
        batch = len(x)
        if batch < 4:
            return
        # For i != j, with the mean over the draws other than i and j: unbiased for tr Sigma^2,
        # for any distribution of the draws (Chen, Qin, 2010).
        others = stacked.sum(1, keepdim=True) - stacked - deviations[:, None, :]
        products = stacked - others / (batch - 2)  # (x_i - mean of others)' x_j
        both = products * products.transpose(1, 2)
        self._square_traces += both.sum((1, 2)) - both.diagonal(dim1=1, dim2=2).sum(1)
        self._pairs += batch * (batch - 1)

    def _cosines(self, draws: Tensor) -> Tensor:
        if self.count < 2:
            return draws.new_full((len(draws),), torch.nan)
        total = self.mean * self.count
        along = (draws @ total.to(draws.dtype)).double()
        lengths = torch.linalg.vector_norm(draws, dim=1).double().square()
        # With t the sum of all draws, the others' mean points along t - g.
        others = (total @ total - 2 * along + lengths).clamp(min=0)
        return (along - lengths) / (lengths * others).sqrt()


@dataclass(frozen=True)
class Bias:
    """The distance of a mean gradient from its reference, compared with noise.

    Attributes:
        norm: The distance.
        squared: Its square less the average contribution of noise. It may be negative.
        mcse: Without bias, ``norm`` is below 1.96 times this in 95 % of repetitions.
        log_tail: The log of the probability of a larger distance without bias.
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
        spreads: Of the draws, and of the reference's draws if it is a mean, too.
        floor: The distance that rounding may cause.
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

    It is corrected for their number (Bonferroni). NaN if one of them is.
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
