"""The base class of gradient estimators, and the view of a site that they get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from pyro_gumbel.distributions.families import from_noise, log_mass, sample_detached
from pyro_gumbel.estimators._flags import (
    FLAGS,
    Branches,
    BranchGraph,
    Route,
    convert_class,
    convert_flags,
    read_flag,
)
from pyro_gumbel.estimators._module import StatefulModule
from pyro_gumbel.estimators.schedules import Schedule

Families = tuple[Callable[[Any], bool], ...]

__all__ = ["Branches", "Call", "Estimator", "Route", "Site"]


@dataclass(frozen=True)
class Call:
    """The programs of one step and the arguments of both, as ``site.call``.

    Example:
        >>> call = Call(print, print, args=(1, 2), kwargs={"sep": " + "})
        >>> call.guide(*call.args, **call.kwargs)
        1 + 2
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Site(ABC):
    """A site after the programs have run, as an estimator sees it.

    ``K`` is the number of coupled values that the estimator draws, and ``R`` the number of
    particles. Tensors have these two dimensions before the site's batch shape, for vectorised and
    for looped particles. Each tensor is computed at its first use.

    Attributes:
        name: The site's name in the guide.
        fn: The main path's distribution without ``to_event`` and ``mask``.
        event_dims: Number of its batch dimensions that ``to_event`` joined.
        call: The programs and their arguments.
        training: Whether this pass may change the state of estimators and baselines.
        values: The coupled values, ``(K, R) + batch_shape + event_shape``.
        cost: The detached cost of each value, ``(K, R) + batch_shape``. It is the sum of the
            ``log p - log q`` terms that the site can influence according to its plates, scaled and
            masked as in the ELBO.
        live_cost: The cost of each value with its gradient.
        totals: The whole ELBO of each value's path, with gradient, ``(K, R)``.
        later_scores: Terms that, added to ``totals``, give its mean an unbiased gradient,
            ``(K,)``. They sum the detached cost times ``log q`` over particles, and over later
            sites of the guide whose values have no gradient. The distributions of these sites
            depend on this site's value, too. Only the gradient of the terms is meaningful.
        log_prob: ``log q`` of the first value, unscaled and unmasked, ``(R,) + batch_shape``.
        score_function: The log-density of the first value's accepted noise, ``(R,) +
            batch_shape``, for distributions with their own ``score_parts`` (Pyro's ``Rejector``).
        logits: Logits of a one-hot, categorical or Bernoulli site, with gradient, ``(R,) +
            batch_shape + joined + (C,)``, where ``joined`` are the dimensions that ``to_event``
            joined. A Bernoulli variable has two categories; the first is the value 1.

    Example:
        The score function without a baseline. The ELBO calls :meth:`~Estimator.surrogate` of a
        user's estimator with such a site.

        >>> class Plain(Estimator):
        ...     unbiased, sites = True, "any distribution"
        ...     def supports(self, fn):
        ...         return True
        ...     def surrogate(self, site):
        ...         print(site.name, tuple(site.values.shape), tuple(site.cost.shape))
        ...         return site.cost[0] * site.log_prob
        >>> from pyro_gumbel.infer import Estimator_ELBO, config_gradient
        >>> def program():
        ...     with pyro.plate("data", 4):
        ...         pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.3))))
        >>> loss = Estimator_ELBO(2).loss_and_grads(program, config_gradient(program, Plain()))
        z (1, 2, 4) (1, 2, 4)
    """

    name: str
    fn: Distribution
    event_dims: int
    call: Call
    training: bool
    values: Tensor
    cost: Tensor
    live_cost: Tensor
    totals: Tensor
    later_scores: Tensor
    log_prob: Tensor
    score_function: Tensor
    logits: Tensor

    @abstractmethod
    def value_gradients(self) -> Tensor:
        """Return the gradient of each path's ELBO in its value, shaped like ``values``."""

    @abstractmethod
    def logits_gradients(self, output: Tensor, *, create_graph: bool = False) -> Tensor:
        """Return the gradient of a scalar in the logits of the values, shaped like ``fn.logits``.

        This needs an estimator with ``draws_from_logits = True``.
        """

    def per_variable(self, cost: Tensor) -> Tensor:
        """Align a cost with the variables of an event: append a one for each joined dimension."""
        return cost.reshape(cost.shape + (1,) * self.event_dims)

    def per_event(self, cost: Tensor) -> Tensor:
        """Align a cost with the values: append a one for each dimension of the event."""
        return cost.reshape(cost.shape + (1,) * (self.event_dims + self.fn.event_dim))


class Estimator(StatefulModule):
    r"""An estimator of the gradient of an expected cost in the parameters of a sample site.

    An estimator has two parts. :meth:`draw` draws a value at the guide's site, or a block of
    ``num_values`` coupled values. :meth:`surrogate` then returns a scalar of the values' costs
    whose gradient is the estimate. If the values carry the gradient, it returns None.

    Class attributes that a subclass sets:

    * ``unbiased``: whether the estimate's expectation is the exact gradient;
    * ``sites``: a description of the supported distributions;
    * ``num_values``: the number of coupled values, with one program evaluation each. If it is more
      than one, :meth:`draw` stacks them along a new first dimension, with a draw of the guide
      first;
    * ``route``: how the gradient passes the site, see :class:`Route`;
    * ``branches``: what values other than the first are, see :class:`Branches`;
    * ``needs_smooth_cost``: whether the estimate is wrong where the cost depends on the value
      without a gradient, as through an index.

    Keep hyper-parameters as attributes under the constructor's names, so that ``repr`` can rebuild
    the object. Several sites may share an estimator, so keep state by site name.

    For an argument of another kind than documented, or out of range, a constructor raises
    ``TypeError`` or ``ValueError``. A loss raises ``ValueError`` at an unsupported site.

    Example:
        A complete estimator for Bernoulli sites, with pairs of antithetic draws.

        >>> from pyro_gumbel.distributions.families import is_bit
        >>> class AntitheticPair(Estimator):
        ...     unbiased = True
        ...     sites = "Bernoulli"
        ...     num_values = 2
        ...     def supports(self, fn):
        ...         return is_bit(fn)
        ...     def draw(self, fn):
        ...         noise, probs = torch.rand_like(fn.probs), fn.probs.detach()
        ...         return torch.stack([noise < probs, 1 - noise < probs]).to(noise.dtype)
        ...     def surrogate(self, site):
        ...         first, second = site.values
        ...         logits = site.logits[..., 0]
        ...         weight = (first - second) * logits.detach().abs().sigmoid() / 2
        ...         return site.per_variable(site.cost[0] - site.cost[1]) * weight * logits

        Check it with ``pyro_gumbel.diagnostics.check_unbiased``.
    """

    unbiased: ClassVar[bool]
    sites: ClassVar[str]
    families: ClassVar[Families] = ()
    route: ClassVar[Route] = Route.SCORE
    branches: ClassVar[Branches] = Branches.SAMPLES
    needs_smooth_cost: ClassVar[bool] = False  # biased where the cost ignores the value's gradient
    relaxed: ClassVar[bool] = False  # all values are outside the support; another run has the loss
    draws_from_logits: ClassVar[bool] = False  # values carry a gradient to a copy of the logits
    differentiates_branches: ClassVar[BranchGraph] = BranchGraph()
    num_values: int = 1
    chunk_size: int | None = None  # number of branches without graph to evaluate at once
    min_particles: int = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        convert_class(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FLAGS and isinstance(value, bool):
            convert_flags(self, type(self), {name: value}, stacklevel=4)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # a submodule may have the name of a flag
        except AttributeError:
            if name in FLAGS:
                return read_flag(self, name)
            raise

    def supports(self, fn: Distribution) -> bool:
        """Return whether it supports ``fn``, a distribution without ``to_event`` and ``mask``.

        By default it supports the families of the class attribute ``families``, such as
        ``(is_bit,)``.
        """
        return any(is_family(fn) for is_family in self.families)

    def why_unsupported(self, fn: Distribution, event_dims: int) -> str | None:
        """Return why a site of a supported family is unsupported, or ``None``."""
        return None

    objection = why_unsupported  # the name of version 0.1

    def draw(self, fn: Distribution) -> Tensor:
        """Draw a value of shape ``fn.batch_shape + fn.event_shape``, without gradient."""
        return sample_detached(fn)

    def block_size(self, fn: Distribution, event_dims: int) -> int:
        """Return the number of coupled values if ``to_event`` joined ``event_dims`` dimensions."""
        return self.num_values

    def draw_block(self, fn: Distribution, event_dims: int) -> Tensor:
        """Draw the coupled values, with a first dimension ``K`` if it is more than one."""
        return self.draw(fn)

    def log_prob(self, fn: Distribution, value: Tensor) -> Tensor:
        """Return ``log q`` with the gradient that the estimator needs, ``fn.batch_shape``."""
        return log_mass(fn, value)

    def surrogate(self, site: Site) -> Tensor | None:
        """Return a tensor whose sum, divided by ``R``, has the estimate as its gradient."""
        return None

    def shares_noise(self, fn: Distribution) -> bool:
        """Return whether branches may reuse the main path's noise, as plain draws can."""
        kind = type(self)
        return kind.draw is Estimator.draw and kind.draw_block is Estimator.draw_block

    def draw_from_noise(self, fn: Distribution, noise: Tensor) -> Tensor:
        """Draw a value from noise of :func:`~pyro_gumbel.distributions.families.base_noise`."""
        return from_noise(fn, noise).detach()

    @property
    def keeps_score_gradient(self) -> bool:
        """True if :meth:`log_prob` enters the ELBO with its gradient."""
        return self.route is not Route.SCORE

    def schedules(self) -> list[Schedule]:
        """Return the schedules to advance after a step."""
        return [module for module in self.modules() if isinstance(module, Schedule)]
