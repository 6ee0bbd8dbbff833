"""The importance-weighted bound for discrete and reparameterised sites."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Set
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_gumbel.distributions._law import wraps_like
from pyro_gumbel.distributions.families import event_dims, has_score_parts, unwrap, wrappers
from pyro_gumbel.estimators import Estimator, Pathwise, Route, Score
from pyro_gumbel.estimators.pathwise import has_score_of_mean_zero, path_of_score
from pyro_gumbel.infer._costs import Frames, Term
from pyro_gumbel.infer._execution import Execution
from pyro_gumbel.infer._run import Run
from pyro_gumbel.infer._site_view import Passes
from pyro_gumbel.infer.elbo import ParticleELBO

__all__ = [
    "ImportanceWeighted_ELBO",
    "LogWeights",
    "doubly_reparameterize",
    "filled",
    "vimco_signal",
]


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
        """Split a tensor of ``(K,) + common plates`` into one block of particles for each run."""
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
        mean = self.value.masked_fill(nowhere, 0.0).logsumexp(0) - math.log(len(self.value))
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


def doubly_reparameterize(weights: LogWeights, feeding: Set[str]) -> LogWeights:
    r"""Weigh the paths of the sites that allow it anew, and drop their scores.

    Let :math:`\log q(z)` enter the log weight :math:`\ell_k` with the coefficient ``c``: its scale
    and mask, over the scale of the common plates. With the normalised weight :math:`w_k` the
    bound's gradient through particle ``k`` is :math:`w_k (\partial_z \ell_k\, dz/d\phi - c\,
    \partial_\phi \log q_\phi(z))`. Since ``z`` was drawn from ``q``, whatever its scale and mask,

    .. math::
        E[w_k\, \partial_\phi \log q_\phi(z)]
        = E\Bigl[(w_k - w_k^2) \frac{\partial \ell_k}{\partial z} \frac{dz}{d\phi}\Bigr].

    So the score is dropped, and the path has the weight :math:`w_k - c\,(w_k - w_k^2)`. The
    logarithm supplies :math:`w_k`; the gradient that reaches the value is multiplied by
    :math:`1 - c\,(1 - w_k)`. This needs all of the weight's dependence on the value: a site keeps
    the plain gradient if the distribution of a later site of the guide depends on it.

    Args:
        weights: The log weights.
        feeding: Sites whose value reaches a later site of the guide without a gradient.

    Raises:
        ValueError: With the site's name, if its distribution cannot score a given value.
    """
    terms = []
    for run, shares in zip(weights.runs, weights.by_run(weights.normalised()), strict=True):
        lines = {}
        for name in [name for name in run.estimators if _applies(run, name, feeding)]:
            coefficient = _coefficient(run.guide[name])
            lines[name] = _path_of_log_q(run, name, coefficient)
            _weigh_gradient(run, name, shares, coefficient / weights.scale)
        terms.append(
            [
                dataclasses.replace(term, value=term.value.detach() - lines[term.site])
                if term.site in lines and not term.of_model
                else term
                for term in run.costs.terms
            ]
        )
    return LogWeights(weights.runs, terms)


def _applies(run: Run, name: str, feeding: Set[str]) -> bool:
    scale = run.guide[name]["scale"]
    return (
        name not in feeding
        and isinstance(run.estimators[name], Pathwise)
        and run.value(name).requires_grad
        and not (isinstance(scale, Tensor) and scale.requires_grad)  # its gradient needs log q
        and _is_reparameterised(unwrap(run.guide[name]["fn"]))
        and not _feeds_later_site(run, name)
    )


def _is_reparameterised(fn: Any) -> bool:
    """Return whether the score function's gradient is the path's.

    Straight-through values have no density, and the path of a rejection sampler is not all of its
    gradient.
    """
    if has_score_parts(fn) or not has_score_of_mean_zero(fn):
        return False
    try:
        return not fn.support.is_discrete
    except NotImplementedError:
        return True


def _feeds_later_site(run: Run, name: str) -> bool:
    """Return whether the distribution of a later site of the guide depends on this one's value."""
    value, names = run.value(name), list(run.estimators)
    for later in names[names.index(name) + 1 :]:
        score = run.log_prob(later).sum()
        if score.requires_grad and not run.is_computed(later):
            (grad,) = torch.autograd.grad(score, value, retain_graph=True, allow_unused=True)
            if grad is not None:
                return True
    return False


def _coefficient(site: Any) -> Tensor:
    """Scale and mask of each variable's ``log q``, of the unwrapped distribution's batch shape."""
    fn = site["fn"]
    scale, mask = (_per_variable(number, fn) for number in (site["scale"], site["mask"]))
    total = scale_and_mask(site["value"].new_ones(unwrap(fn).batch_shape), scale, mask)
    for wrapper in wrappers(fn):
        if wraps_like(wrapper, MaskedDistribution):
            total = scale_and_mask(total, mask=_per_variable(wrapper._mask, wrapper.base_dist))
    return total


def _per_variable(number: Any, fn: Any) -> Any:
    """Align a scale or mask of a distribution's batch with the variables of ``to_event``."""
    if isinstance(number, Tensor):
        return number.reshape(number.shape + (1,) * event_dims(fn))
    return number


def _path_of_log_q(run: Run, name: str, coefficient: Tensor) -> Tensor:
    """A tensor of value zero with the gradient of the site's ``log q`` in its value alone."""
    fn = run.guide[name]["fn"]
    instead = "ImportanceWeighted_ELBO(..., doubly_reparameterized=False)"
    try:
        path = path_of_score(unwrap(fn), run.value(name), instead=instead)
    except ValueError as error:
        raise ValueError(
            f"At site {name!r}, a doubly reparameterised gradient scores a copy of the value: "
            f"{error}"
        ) from error
    return sum_rightmost(coefficient * path, event_dims(fn))


def _weigh_gradient(run: Run, name: str, shares: Tensor, coefficient: Tensor) -> None:
    """Multiply the gradient that reaches a value by ``1 - c (1 - w)``."""
    value, fn = run.value(name), run.guide[name]["fn"]
    joined, event_dim = event_dims(fn), unwrap(fn).event_dim
    particle_dim = run.layout.particle_dim
    share = shares[0] if particle_dim is None else shares.movedim(0, particle_dim)
    batch_dims = value.dim() - joined - event_dim
    # What is left of the site's own dimensions are ones.
    share = share.reshape(share.shape[max(0, share.dim() - batch_dims) :] + (1,) * joined)
    factor = share + (1 - coefficient) * (1 - share)
    factor = factor.reshape(factor.shape + (1,) * event_dim).to(value.dtype)
    value.register_hook(lambda grad: grad * factor)


class ImportanceWeighted_ELBO(ParticleELBO):  # noqa: N801
    r"""The importance-weighted (IWAE) bound on the evidence.

    .. math::
        \mathcal L_K = E\Bigl[\log \frac1K \sum_k w_k\Bigr], \qquad
        w_k = \frac{p_\theta(x, z_k)}{q_\phi(z_k)}

    Each element of the plates that contain all sites has its own bound, such as each datum of a
    variational auto-encoder. The value is their sum, scaled for subsampling. All other scales are
    inside the logarithm, as in Pyro's ``RenyiELBO``. ``poutine.scale`` tempers the weights. In a
    subsampled plate that does not contain all sites, the weights are estimates, and the value may
    exceed the evidence.

    Reparameterised and straight-through sites differentiate the bound. Score-function sites, and
    the score terms of rejection sampling (``score_parts``), use VIMCO. Its signal is the
    contribution of particle ``k`` to the bound:

    .. math::
        \Bigl(\mathcal L_K - \log \frac1K \bigl(\textstyle\sum_{j \ne k} w_j + \hat w_k\bigr)\Bigr)
        \nabla \log q_\phi(z_k), \qquad \log \hat w_k = \frac{1}{K-1} \sum_{j \ne k} \log w_j

    :math:`\hat w_k` omits particles of weight zero.

    *Unbiased*: yes, at score-function and reparameterised sites. *Cost*: one evaluation per
    particle.

    Args:
        num_particles: Number ``K`` of importance samples.
        doubly_reparameterized: At reparameterised sites, omit the score and weight the path by
            :math:`\tilde w_k^2`, so that the gradient's signal-to-noise ratio does not vanish as
            ``K`` grows. A site keeps the plain gradient if the distribution of a later site of the
            guide depends on its value, or if a bound of its support is learnt. This costs another
            evaluation of :math:`\log q`, which needs the inverse of a flow.
        **kwargs: As for :class:`~pyro_gumbel.infer.Estimator_ELBO`, without ``analytic_kl``.

    Raises:
        TypeError: If ``analytic_kl`` is given.
        ValueError: When run, with the site's name, if the site's estimator has no
            importance-weighted form, if a score-function site has a single particle, or if
            ``doubly_reparameterized=True`` and a flow has no inverse.

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
                "ImportanceWeighted_ELBO does not support analytic_kl, since its weights need "
                "log p and log q of each draw. Remove it, or use Estimator_ELBO(analytic_kl=True)."
            )
        super().__init__(num_particles, **kwargs)
        self.doubly_reparameterized = doubly_reparameterized
        self.full_scores = True  # inside the logarithm the mean score of q is not zero

    def _choose(self, msg: Message) -> Estimator:
        estimator = super()._choose(msg)
        evaluates = not torch.is_grad_enabled()  # a loss without a gradient needs draws alone
        return Score() if evaluates and estimator.route is Route.ENUMERATE else estimator

    def _value(self, paths: Passes) -> Tensor:
        return LogWeights(_mains(paths)).bound().sum()

    def _estimate(self, paths: Passes, execution: Execution) -> tuple[Tensor, Tensor]:
        self._check(paths)
        weights = LogWeights(_mains(paths))
        if self.doubly_reparameterized:
            weights = doubly_reparameterize(weights, execution.plan.feeding)
        bound = weights.bound().sum()
        return bound, bound + _scores(weights)

    def _needs_all_dependence(self) -> bool:
        return self.doubly_reparameterized

    def _check(self, paths: Passes) -> None:
        for name, estimator in paths.estimators.items():
            if isinstance(estimator, Score):
                own = (self._auto["leave_one_out"], self._auto["moving_average"])
                if estimator.baseline is not None and estimator not in own:
                    raise ValueError(
                        f"At site {name!r}, ImportanceWeighted_ELBO uses its own baseline (VIMCO) "
                        f"and does not support {estimator.baseline!r}; write Score()."
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
            elif estimator.route is not Route.PATHWISE or estimator.relaxed:
                raise ValueError(
                    f"At site {name!r}, {estimator!r} has no importance-weighted form. Use "
                    "Score() (VIMCO), a straight-through estimator such as ReinMax(), or, at a "
                    "reparameterised site, Pathwise()."
                )


def _mains(paths: Passes) -> list[Run]:
    """Return the runs of the main path: one of all particles, or one per particle."""
    return [group[0] for group in paths.groups]


def _scores(weights: LogWeights) -> Tensor:
    """Sum VIMCO's signal times the score over sites without a pathwise gradient."""
    total = weights.value.new_zeros(())
    scored = [[name for name in run.estimators if _is_scored(run, name)] for run in weights.runs]
    if not any(scored):
        return total
    signals = weights.by_run(vimco_signal(weights))
    for run, names, signal in zip(weights.runs, scored, signals, strict=True):
        for name in names:
            score = run.layout.split(weights.common(run.draw_score(name), run))[0]
            total = total + (signal * filled(score, signal.dim())).sum()
    return total


def _is_scored(run: Run, name: str) -> bool:
    estimator = run.estimators[name]
    if isinstance(estimator, Pathwise):
        return has_score_parts(unwrap(run.guide[name]["fn"]))
    return isinstance(estimator, Score)
