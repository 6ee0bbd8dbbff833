"""Moments of gradient draws, in one pass and in memory that does not grow with their number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BATCH", "Moments", "Spread"]

BATCH = 32


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

        That is a third of normal draws in one dimension, ``k`` where all but ``k`` are alike, and
        none where all are.
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

        What is done to each draw is done in its own precision, sums over batches in double.
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
        # Within the bounds that hold for any covariance; the upper one where too few draws tell.
        estimate = float(self._square_traces[index]) / self._pairs if self._pairs else trace**2
        square_trace = min(max(estimate, trace**2 / dimension), trace**2)
        return Spread(self.count, trace, max(float(spread), 0.0) / self.count, square_trace)

    def _scatter(self, x: Tensor) -> None:
        """Add up squared deviations, and what tells the trace of the squared covariance."""
        grams = [(piece @ piece.T).double() for piece in x.split(self.sizes, 1)]
        stacked = torch.stack([*grams, torch.stack(grams).sum(0)])  # (blocks, B, B)
        deviations = stacked.diagonal(dim1=1, dim2=2)
        self._deviations += deviations.sum(1)
        self._deviations_squared += (deviations**2).sum(1)
        batch = len(x)
        if batch < 4:
            return
        # For i != j, with the mean over the draws other than i and j: unbiased for tr Sigma^2,
        # whatever the law of the draws (Chen, Qin, 2010).
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
