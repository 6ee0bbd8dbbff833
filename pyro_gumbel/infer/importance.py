"""The importance-weighted bound, for discrete and for reparameterised sites."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_gumbel.estimators import Call, Pathwise, Score
from pyro_gumbel.infer.costs import Frames
from pyro_gumbel.infer.particle_elbo import ParticleELBO
from pyro_gumbel.infer.paths import Paths
from pyro_gumbel.infer.run import Run

__all__ = ["ImportanceWeighted_ELBO"]


class ImportanceWeighted_ELBO(ParticleELBO):  # noqa: N801
    r"""The importance-weighted (IWAE) bound on the evidence.

    .. math::
        \mathcal L_K = E\Bigl[\log \frac1K \sum_k w_k\Bigr], \qquad
        w_k = \frac{p_\theta(x, z_k)}{q_\phi(z_k)}

    There is one bound for each element of the plates that every site is in (for each datum of a
    variational auto-encoder), and their sum, scaled for subsampling, is the value.

    Reparameterised and straight-through sites differentiate the bound as it stands. Sites of the
    score function use VIMCO, whose signal is what particle ``k`` adds to the bound:

    .. math::
        \Bigl(\mathcal L_K - \log \frac1K \bigl(\textstyle\sum_{j \ne k} w_j + \hat w_k\bigr)\Bigr)
        \nabla \log q_\phi(z_k), \qquad \log \hat w_k = \frac{1}{K-1} \sum_{j \ne k} \log w_j

    *Unbiased*: yes, at score-function and reparameterised sites. *Costs*: one evaluation a
    particle.

    Args:
        num_particles: Number ``K`` of importance samples.
        doubly_reparameterized: At reparameterised sites whose value no later site of the guide
            depends on, weight the path by :math:`\tilde w_k^2` and drop the score, so that the
            gradient's signal does not vanish as ``K`` grows. Other sites keep the plain gradient.
        **kwargs: As for :class:`~pyro_gumbel.infer.Estimator_ELBO`, without ``analytic_kl``.

    Raises:
        TypeError: If ``analytic_kl`` is given: a bound of weights has no such part.
        ValueError: When run, with the site's name, if a site's estimator has no
            importance-weighted form, or a score-function site meets a single particle.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016),
        https://arxiv.org/abs/1509.00519; VIMCO: Mnih, Rezende (2016),
        https://arxiv.org/abs/1602.06725; Doubly Reparameterized Gradient Estimators (Tucker,
        Lawson, Gu, Maddison, 2019), https://arxiv.org/abs/1810.04152

    Example:
        >>> ImportanceWeighted_ELBO(5, doubly_reparameterized=True).num_particles
        5
    """

    def __init__(
        self, num_particles: int, *, doubly_reparameterized: bool = False, **kwargs: Any
    ) -> None:
        if "analytic_kl" in kwargs:
            raise TypeError(
                "ImportanceWeighted_ELBO takes no analytic_kl: its weights need each draw's own "
                "log p and log q. Leave it out, or use Estimator_ELBO(analytic_kl=True)."
            )
        super().__init__(num_particles, **kwargs)
        self.doubly_reparameterized = doubly_reparameterized
        self.full_scores = True  # under the logarithm the score of q has no mean of zero

    def _value(self, paths: Paths) -> Tensor:
        return _bound(_LogWeights(paths)).sum()

    def _estimate(self, paths: Paths, call: Call) -> tuple[Tensor, Tensor]:
        self._check(paths)
        weights = _LogWeights(paths)
        if self.doubly_reparameterized:
            _double_reparameterize(paths, weights)
        bound = _bound(weights)
        surrogate = bound.sum()
        scored = [
            name for name, estimator in paths.estimators.items() if isinstance(estimator, Score)
        ]
        if scored:
            signal = _vimco_signal(weights, bound)
            for name in scored:
                log_prob = weights.align(paths, name)
                surrogate = surrogate + (signal * log_prob).sum()
        return bound.sum(), surrogate

    def _check(self, paths: Paths) -> None:
        for name, estimator in paths.estimators.items():
            if isinstance(estimator, Score):
                own = (self._auto.leave_one_out, self._auto.moving_average)
                if estimator.baseline is not None and estimator not in own:
                    raise ValueError(
                        f"At site {name!r}, ImportanceWeighted_ELBO has a baseline of its own "
                        f"(VIMCO) and cannot use {estimator.baseline!r}; write Score()."
                    )
                if self.num_particles < 2:
                    raise ValueError(
                        f"At site {name!r}, VIMCO needs num_particles >= 2; got 1. Write "
                        "ImportanceWeighted_ELBO(2), or Estimator_ELBO() for a single sample."
                    )
            elif getattr(estimator, "sticking_the_landing", False):
                raise ValueError(
                    f"At site {name!r}, sticking the landing is biased under importance weights; "
                    "write Pathwise() and ImportanceWeighted_ELBO(..., "
                    "doubly_reparameterized=True)."
                )
            elif not estimator.pathwise or estimator.relaxed:
                raise ValueError(
                    f"At site {name!r}, {estimator!r} has no importance-weighted form. Use "
                    "Score() (VIMCO), a straight-through estimator such as ReinMax(), or, where "
                    "the site is reparameterised, Pathwise()."
                )


class _LogWeights:
    """Log importance weights ``(K,) + common plates``, with gradient, and what they count for.

    Attributes:
        frames: The plates that every site is in.
        value: The log-weights, without the scale that subsampling puts on the common plates.
        scale: That scale.
    """

    def __init__(self, paths: Paths) -> None:
        runs = [group[0] for group in paths.groups]
        particles = {
            run.layout.particle_dim for run in runs if run.layout.particle_dim is not None
        }
        frames = [term.frames for run in runs for term in run.costs.terms]
        common = frozenset.intersection(*frames) if frames else frozenset()
        self.frames: Frames = frozenset(f for f in common if f.dim not in particles)
        self.scale = math.prod(_plate_scale(frame) for frame in self.frames)
        self.value = torch.cat([self._of_run(run) for run in runs])

    def _of_run(self, run: Run) -> Tensor:
        total = None
        for term in run.costs.terms:
            part = self.common(term.value, run) / self.scale
            total = part if total is None else total + part
        if total is None:
            return torch.zeros(run.layout.repetitions)
        return run.layout.split(total)[0]

    def common(self, value: Tensor, run: Run) -> Tensor:
        """Sum a tensor over the plates that are not common."""
        kept = {frame.dim for frame in self.frames} | {run.layout.particle_dim}
        dims = [dim for dim in range(-value.dim(), 0) if dim not in kept]
        return value.sum(dims, keepdim=True) if dims else value

    def align(self, paths: Paths, name: str) -> Tensor:
        """The score of a site for each weight, with as many dimensions."""
        score = paths.gather(name, lambda run: self.common(run.log_prob(name), run))[0]
        missing = self.value.dim() - score.dim()
        return score.reshape(score.shape[:1] + (1,) * missing + score.shape[1:])


def _plate_scale(frame: CondIndepStackFrame) -> float:
    full = frame.full_size if frame.full_size is not None else frame.size
    return full / frame.size


def _bound(weights: _LogWeights) -> Tensor:
    """The bound of each element of the common plates, scaled."""
    count = weights.value.shape[0]
    return weights.scale * (weights.value.logsumexp(0) - math.log(count))


@torch.no_grad()
def _vimco_signal(weights: _LogWeights, bound: Tensor) -> Tensor:
    """What each particle adds to the bound, ``(K,) + common plates``."""
    log_w = weights.value.detach()
    count = log_w.shape[0]
    stand_in = (log_w.sum(0) - log_w) / (count - 1)
    # Row k has particle k's weight replaced by the geometric mean of the others'.
    replaced = log_w.expand(count, *log_w.shape).clone()
    index = torch.arange(count, device=log_w.device)
    replaced[index, index] = stand_in
    without = weights.scale * (replaced.logsumexp(1) - math.log(count))
    return bound.detach() - without


def _double_reparameterize(paths: Paths, weights: _LogWeights) -> None:
    """Square the weights on the paths of the sites that allow it, and drop their scores."""
    normalised = weights.value.detach().softmax(0)
    corrections = []
    for index, (run, *_) in enumerate(paths.groups):
        share = normalised if len(paths.groups) == 1 else normalised[index : index + 1]
        total = torch.zeros_like(share)
        for name, estimator in run.estimators.items():
            if isinstance(estimator, Pathwise) and not _feeds_later_site(run, name):
                total = total + _drop_score(run, name, weights)
                _weigh_gradient(run, name, share)
        corrections.append(total)
    weights.value = weights.value + torch.cat(corrections)


def _feeds_later_site(run: Run, name: str) -> bool:
    """Tell whether the distribution of a later site of the guide depends on this one's value."""
    value, names = run.value(name), list(run.estimators)
    if not value.requires_grad:
        return True
    for later in names[names.index(name) + 1 :]:
        score = run.log_prob(later).sum()
        if score.requires_grad:
            (grad,) = torch.autograd.grad(score, value, retain_graph=True, allow_unused=True)
            if grad is not None:
                return True
    return False


def _drop_score(run: Run, name: str, weights: _LogWeights) -> Tensor:
    """What cancels the gradient of ``log q`` in its parameters, and has the value zero."""
    score = run.fixed_value_score(name)
    score = weights.common(score, run) / weights.scale
    return run.layout.split(score - score.detach())[0]


def _weigh_gradient(run: Run, name: str, share: Tensor) -> None:
    """Multiply the gradient that reaches a value by its particle's normalised weight."""
    value, event_dim = run.value(name), run.guide[name]["fn"].event_dim
    weight = share.reshape(share.shape + (1,) * event_dim)
    if run.layout.particle_dim is None:
        weight = weight[0]
        while weight.dim() > value.dim():
            weight = weight.squeeze(0)
        value.register_hook(lambda grad: grad * weight)
        return
    dim = run.layout.particle_dim - event_dim
    rows = weight.movedim(0, dim)
    value.register_hook(lambda grad: grad * rows)
