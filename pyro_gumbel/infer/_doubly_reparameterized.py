r"""Doubly reparameterised gradients of the importance-weighted bound.

Let a site's :math:`\log q(z)` enter the log weight :math:`\ell_k` with the coefficient :math:`c`:
its scale and mask, over the scale of the common plates, which is outside of the logarithm. With
the normalised weight :math:`w_k`, the bound's gradient passes through particle ``k`` as

.. math::
    w_k \Bigl(\frac{\partial \ell_k}{\partial z} \frac{dz}{d\phi}
    - c\, \partial_\phi \log q_\phi(z)\Bigr),

:math:`\partial_\phi` holding ``z`` fixed. The value was drawn from :math:`q`, whatever its scale
and mask, so the score function's gradient of an expectation is the path's:

.. math::
    E[w_k\, \partial_\phi \log q_\phi(z)]
    = E\Bigl[\frac{\partial w_k}{\partial z} \frac{dz}{d\phi}\Bigr]
    = E\Bigl[(w_k - w_k^2) \frac{\partial \ell_k}{\partial z} \frac{dz}{d\phi}\Bigr].

So the score is dropped and the path has the weight :math:`w_k - c\,(w_k - w_k^2)`. The logarithm
supplies :math:`w_k`; the gradient that reaches the value is multiplied by the remaining
:math:`1 - c\,(1 - w_k)`.

The second step needs all of the weight's dependence on the value. Where a later site of the guide
is drawn from a distribution that depends on it, that site's draw is part of it, so that the plain
gradient is kept. The parameters :math:`\phi` of a site are all that its distribution is computed
from, earlier values included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor

from pyro_gumbel.distributions._law import has_law_of, wraps_like
from pyro_gumbel.distributions.families import event_dims, has_score_parts, unwrap, wrappers
from pyro_gumbel.estimators import Pathwise
from pyro_gumbel.estimators.pathwise import has_score_of_mean_zero, path_of_score
from pyro_gumbel.infer._dependence import Dependence, Mark
from pyro_gumbel.infer._log_weights import LogWeights
from pyro_gumbel.infer._run import Run

__all__ = ["doubly_reparameterize", "feeding_through_jumps"]


def doubly_reparameterize(weights: LogWeights, feeding: Set[str]) -> LogWeights:
    """Weigh the paths of the sites that allow it anew, and drop their scores.

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


def feeding_through_jumps(run: Run, dependence: Dependence) -> set[str]:
    """Find the sites that a later site of the guide reads without a gradient, as by an index."""
    return {
        name
        for later in run.estimators
        if not _is_given(run, later)
        for name, mark in dependence.marks(run.log_prob(later)).items()
        if name != later and mark is Mark.JUMP
    }


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
        if score.requires_grad and not _is_given(run, later):
            (grad,) = torch.autograd.grad(score, value, retain_graph=True, allow_unused=True)
            if grad is not None:
                return True
    return False


def _is_given(run: Run, name: str) -> bool:
    """Return whether a value is computed, not drawn: it may depend on others as part of a path."""
    return has_law_of(unwrap(run.guide[name]["fn"]), Delta)


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
