"""Log importance weights of a step's particles, the bound that they make, and VIMCO's signal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_gumbel.infer._costs import Frames, Term
from pyro_gumbel.infer._run import Run

__all__ = ["LogWeights", "filled", "vimco_signal"]


class LogWeights:
    """Log importance weights ``(K,) + common plates``, with gradient, and what they count for.

    Attributes:
        runs: The passes: one with all particles vectorised, or one for each particle.
        frames: The plates that every site is in.
        scale: The scale that subsampling puts on these plates.
        value: The log weights without that scale.
    """

    def __init__(self, runs: Sequence[Run], terms: Sequence[Sequence[Term]] | None = None) -> None:
        """Sum each run's terms, or others in their place."""
        self.runs = runs
        self.frames = _common_frames(runs)
        self.scale = math.prod(_plate_scale(frame) for frame in self.frames)
        if terms is None:
            terms = [run.costs.terms for run in runs]
        blocks = [self._sum(run, own) for run, own in zip(runs, terms, strict=True)]
        dims = max(block.dim() for block in blocks)
        self.value = torch.cat([filled(block, dims) for block in blocks])

    def _sum(self, run: Run, terms: Sequence[Term]) -> Tensor:
        if not terms:
            return torch.zeros(run.layout.repetitions)
        parts = [self.common(term.value, run) for term in terms]
        return run.layout.split(sum(parts[1:], parts[0]) / self.scale)[0]

    def common(self, tensor: Tensor, run: Run) -> Tensor:
        """Sum a tensor of a run over the plates that are not common."""
        kept = {frame.dim for frame in self.frames} | {run.layout.particle_dim}
        dims = [dim for dim in range(-tensor.dim(), 0) if dim not in kept]
        return tensor.sum(dims, keepdim=True) if dims else tensor

    def by_run(self, tensor: Tensor) -> list[Tensor]:
        """Take apart a tensor of ``(K,) + common plates``: a block of particles for each run."""
        return [tensor] if len(self.runs) == 1 else list(tensor.split(1))

    @property
    def impossible(self) -> Tensor:
        """Where all particles have the weight zero, of the common plates' shape."""
        return (self.value == -math.inf).all(0)

    def normalised(self) -> Tensor:
        """The weights as shares of their sum, detached; zero where all weights are."""
        nowhere = self.impossible
        shares = self.value.detach().masked_fill(nowhere, 0.0).softmax(0)
        return shares.masked_fill(nowhere, 0.0)

    def bound(self) -> Tensor:
        """The bound of each element of the common plates, scaled.

        It is ``-inf``, with a gradient of zero, where all weights are zero.
        """
        nowhere = self.impossible
        mean = _log_mean(self.value.masked_fill(nowhere, 0.0))
        return self.scale * mean.masked_fill(nowhere, -math.inf)


@torch.no_grad()
def vimco_signal(weights: LogWeights) -> Tensor:
    """Each particle's contribution to the bound, ``(K,) + common plates``.

    The particle is compared with one of the others' mean log weight. Others of weight zero would
    make that minus infinity, so they are left out; a particle that is alone with a weight has
    nothing to be compared with, and its signal is zero. A single particle has the whole bound.
    """
    log_w, bound = weights.value.detach(), weights.bound()
    count = log_w.shape[0]
    if count == 1:
        return bound.unsqueeze(0)
    possible = log_w != -math.inf
    others = possible.sum(0) - possible.long()
    finite = log_w.masked_fill(~possible, 0.0)
    stand_in = (finite.sum(0) - finite) / others.clamp(min=1)
    without = torch.logaddexp(_others(log_w), stand_in) - math.log(count)
    return (bound - weights.scale * without).masked_fill(others == 0, 0.0)


def _others(log_w: Tensor) -> Tensor:
    """For each particle the logarithm of the others' sum: of those before and those after it."""
    none = torch.full_like(log_w[:1], -math.inf)
    before = torch.cat([none, log_w[:-1].logcumsumexp(0)])
    after = torch.cat([log_w[1:].flip(0).logcumsumexp(0).flip(0), none])
    return torch.logaddexp(before, after)


def _log_mean(log_values: Tensor) -> Tensor:
    """The logarithm of the mean over the first dimension."""
    return log_values.logsumexp(0) - math.log(log_values.shape[0])


def _common_frames(runs: Sequence[Run]) -> Frames:
    particles = {run.layout.particle_dim for run in runs}
    frames = [term.frames for run in runs for term in run.costs.terms]
    common: Frames = frozenset.intersection(*frames) if frames else frozenset()
    return frozenset(frame for frame in common if frame.dim not in particles)


def _plate_scale(frame: CondIndepStackFrame) -> float:
    full = frame.full_size if frame.full_size is not None else frame.size
    return full / frame.size


def filled(tensor: Tensor, dims: int) -> Tensor:
    """Give a tensor ``dims`` dimensions, by ones after the first."""
    missing = dims - tensor.dim()
    return tensor.reshape(tensor.shape[:1] + (1,) * missing + tensor.shape[1:])
