"""The contract: how a gradient passes through one sample site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

from pyro_gumbel.estimators._repr import rebuilding_repr
from pyro_gumbel.estimators.families import exact_draw, log_mass
from pyro_gumbel.estimators.schedules import Schedule

__all__ = ["Call", "Estimator", "Site"]


@dataclass(frozen=True)
class Call:
    """The programs of one step and what they were called with."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """What an estimator sees of its site after the programs have run.

    ``K`` is the number of coupled values that the estimator draws (``num_values``), ``R`` the
    number of particles. Both lead every tensor, whether particles are vectorised or looped; the
    site's batch shape follows.

    Attributes:
        name: The site's name in the guide.
        values: The coupled values, ``(K, R) + batch_shape + event_shape``.
        cost: For each value the detached sum of the ``log p - log q`` terms that the site's plates
            let it influence, scaled and masked as in the ELBO, ``(K, R) + batch_shape``.
        log_prob: ``log q`` of the first value with its gradient, neither scaled nor masked, ``(R,)
            + batch_shape``.
        logits: For one-hot, categorical and Bernoulli sites the logits (of two categories for a
            bit, the first being 1), with gradient, ``(R,) + batch_shape + event_batch + (C,)``;
            ``None`` elsewhere.
        call: The programs and their arguments.
    """

    name: str
    values: Tensor
    cost: Tensor
    log_prob: Tensor
    logits: Tensor | None
    call: Call


class Estimator(nn.Module):
    r"""How the gradient of an expected cost passes through one kind of sample site.

    An estimator is two steps. :meth:`draw` draws a value at the guide's site, or a block of
    ``num_values`` coupled ones. :meth:`surrogate` then turns the cost that each value met
    downstream into a scalar whose gradient is the estimate. Where the value itself carries the
    gradient (``pathwise = True``) there is nothing left for the second step to do.

    Class attributes that a subclass sets:

    * ``unbiased``: whether the gradient's expectation is that of the exact gradient;
    * ``sites``: in words, what the estimator needs of a distribution;
    * ``num_values``: how many coupled values it draws, one program evaluation each; if more than
      one, :meth:`draw` stacks them along a new first dimension;
    * ``pathwise``: whether values carry the gradient.

    Hyper-parameters are kept as attributes under the constructor's names, so that ``repr``
    rebuilds the object. One estimator may serve several sites; state is kept by site name.

    Example:
        A complete estimator, the score function with the exponentiated cost's sign left alone and
        a constant subtracted:

        >>> class ShiftedScore(Estimator):
        ...     unbiased = True
        ...     sites = "any site with log_prob"
        ...     def __init__(self, shift: float = 0.0) -> None:
        ...         super().__init__()
        ...         self.shift = shift
        ...     def supports(self, fn) -> bool:
        ...         return hasattr(fn, "log_prob")
        ...     def surrogate(self, site: Site) -> Tensor:
        ...         return (site.cost[0] - self.shift) * site.log_prob
        >>> ShiftedScore(2.0)
        ShiftedScore(2.0)
    """

    unbiased: ClassVar[bool]
    sites: ClassVar[str]
    pathwise: ClassVar[bool] = False
    relaxed: ClassVar[bool] = False  # the program runs on values outside the support
    enumerates: ClassVar[bool] = False  # a value is the whole support
    branches_are_draws: ClassVar[bool] = True  # every coupled value has the guide's law
    num_values: int = 1
    min_particles: int = 1

    def supports(self, fn: Distribution) -> bool:
        """Tell whether it can serve ``fn`` (given without ``to_event`` and ``mask``)."""
        raise NotImplementedError

    def draw(self, fn: Distribution) -> Tensor:
        """Draw a value of shape ``fn.batch_shape + fn.event_shape``, without gradient."""
        return exact_draw(fn)

    def log_prob(self, fn: Distribution, value: Tensor) -> Tensor:
        """Score ``value`` with the gradient that the estimator wants, ``fn.batch_shape``."""
        return log_mass(fn, value)

    def surrogate(self, site: Site) -> Tensor | None:
        """Build a tensor whose sum, divided by ``R``, has the estimate as its gradient."""
        return None

    def schedules(self) -> list[Schedule]:
        """Return the schedules to advance after a step."""
        return [module for module in self.modules() if isinstance(module, Schedule)]

    __repr__ = rebuilding_repr
