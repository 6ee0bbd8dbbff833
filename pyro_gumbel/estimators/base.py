"""The contract: how a gradient passes through one sample site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from pyro_gumbel.distributions.families import from_noise, log_mass, sample_detached
from pyro_gumbel.estimators._module import StatefulModule
from pyro_gumbel.estimators.schedules import Schedule

__all__ = ["Call", "Estimator", "Site", "SiteReader"]


@dataclass(frozen=True)
class Call:
    """The programs of one step and what they were called with.

    An estimator or baseline finds it as ``site.call``.

    Attributes:
        model: The model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.

    Example:
        >>> call = Call(print, print, args=(1, 2), kwargs={"sep": " + "})
        >>> call.guide(*call.args, **call.kwargs)
        1 + 2
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class SiteReader(Protocol):
    """Where a :class:`Site` has its tensors from."""

    def values(self) -> Tensor: ...
    def cost(self, *, live: bool) -> Tensor: ...
    def totals(self) -> Tensor: ...
    def later_scores(self) -> Tensor: ...
    def log_prob(self) -> Tensor: ...
    def score_function(self) -> Tensor: ...
    def logits(self) -> Tensor: ...
    def value_gradients(self) -> Tensor: ...
    def logits_gradients(self, output: Tensor, *, create_graph: bool) -> Tensor: ...


class Site:
    """What an estimator sees of its site after the programs have run.

    ``K`` is the number of coupled values that the estimator draws, ``R`` the number of particles.
    Both lead every tensor, whether particles are vectorised or looped; the site's batch shape
    follows. Tensors are put together when they are first asked for.

    Attributes:
        name: The site's name in the guide.
        fn: The main path's distribution without ``to_event`` and ``mask``.
        event_dims: How many of its batch dimensions ``to_event`` joined.
        call: The programs and their arguments.
        training: Whether this pass may change the state of estimators and baselines.
        values: The coupled values, ``(K, R) + batch_shape + event_shape``.
        cost: The detached cost that each value met, ``(K, R) + batch_shape``.
        live_cost: The same with its gradient.
        totals: The whole ELBO of each value's path, with gradient, ``(K, R)``.
        later_scores: What ``totals`` lacks for its gradient to be an expectation's, ``(K,)``.
        log_prob: ``log q`` of the first value, ``(R,) + batch_shape``.
        logits: Of a discrete site, with gradient: ``(R,) + batch_shape + joined + (C,)``.

    Example:
        The score function without a baseline. A user's estimator meets sites like this one in
        its :meth:`~Estimator.surrogate`.

        >>> class Plain(Estimator):
        ...     unbiased, sites = True, "any distribution"
        ...     def supports(self, fn):
        ...         return True
        ...     def surrogate(self, site):
        ...         print(site.name, tuple(site.values.shape), tuple(site.cost.shape))
        ...         return site.cost[0] * site.log_prob
        >>> from pyro_gumbel.infer import Estimator_ELBO
        >>> def model():
        ...     with pyro.plate("data", 4):
        ...         pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     logit = pyro.param("logit", torch.tensor(0.0))
        ...     with pyro.plate("data", 4):
        ...         pyro.sample("z", dist.Bernoulli(logits=logit), infer={"gradient": Plain()})
        >>> loss = Estimator_ELBO(num_particles=2).loss_and_grads(model, guide)
        z (1, 2, 4) (1, 2, 4)
    """

    def __init__(
        self,
        name: str,
        fn: Distribution,
        event_dims: int,
        call: Call,
        reader: SiteReader,
        *,
        training: bool = True,
    ) -> None:
        self.name = name
        self.fn = fn
        self.event_dims = event_dims
        self.call = call
        self.training = training
        self._reader = reader

    @cached_property
    def values(self) -> Tensor:
        """The coupled values, ``(K, R) + batch_shape + event_shape``."""
        return self._reader.values()

    @cached_property
    def cost(self) -> Tensor:
        """For each value the detached cost that it met, ``(K, R) + batch_shape``.

        The cost is the sum of the ``log p - log q`` terms that the site's plates let it influence,
        scaled and masked as in the ELBO.
        """
        return self._reader.cost(live=False)

    @cached_property
    def live_cost(self) -> Tensor:
        """The same with its gradient."""
        return self._reader.cost(live=True)

    @cached_property
    def totals(self) -> Tensor:
        """For each value the whole ELBO of its path, with gradient, ``(K, R)``."""
        return self._reader.totals()

    @cached_property
    def later_scores(self) -> Tensor:
        """What :attr:`totals` lacks for its gradient to be that of an expectation, ``(K,)``.

        It is the sum over particles, and over later sites of the guide whose values carry no
        gradient, of the detached cost times ``log q``: their law depends on this site's value too.
        Only its gradient has a meaning.
        """
        return self._reader.later_scores()

    @cached_property
    def log_prob(self) -> Tensor:
        """``log q`` of the first value, unscaled and unmasked, ``(R,) + batch_shape``."""
        return self._reader.log_prob()

    @cached_property
    def score_function(self) -> Tensor:
        """The log-density of the noise behind the first value, ``(R,) + batch_shape``.

        Only of distributions whose ``score_parts`` leave something to the score function, such as
        Pyro's ``Rejector``.
        """
        return self._reader.score_function()

    @cached_property
    def logits(self) -> Tensor:
        """Logits of a one-hot, categorical or Bernoulli site, with gradient.

        The shape is ``(R,) + batch_shape + joined + (C,)``, where ``joined`` are the dimensions
        that ``to_event`` joined; a bit has two categories, the first standing for 1.
        """
        return self._reader.logits()

    def per_variable(self, cost: Tensor) -> Tensor:
        """Align a cost with the variables of an event: append a one for each joined dimension."""
        return cost.reshape(cost.shape + (1,) * self.event_dims)

    def per_event(self, cost: Tensor) -> Tensor:
        """Align a cost with the values: append a one for each dimension of the event."""
        return cost.reshape(cost.shape + (1,) * (self.event_dims + self.fn.event_dim))

    def value_gradients(self) -> Tensor:
        """Differentiate each path's ELBO with respect to its value, shaped like ``values``."""
        return self._reader.value_gradients()

    def logits_gradients(self, output: Tensor, *, create_graph: bool = False) -> Tensor:
        """Differentiate a scalar in the logits that the values were drawn from.

        The shape is that of ``fn.logits``. Needs an estimator with ``draws_from_logits = True``.
        """
        return self._reader.logits_gradients(output, create_graph=create_graph)


class Estimator(StatefulModule):
    r"""How the gradient of an expected cost passes through one kind of sample site.

    An estimator is two steps. :meth:`draw` draws a value at the guide's site, or a block of
    ``num_values`` coupled ones. :meth:`surrogate` then turns the cost that each value met
    downstream into a scalar whose gradient is the estimate. Where the value itself carries the
    gradient (``pathwise = True``) there is nothing left for the second step to do.

    Class attributes that a subclass sets:

    * ``unbiased``: whether the gradient's expectation is that of the exact gradient;
    * ``sites``: in words, what the estimator needs of a distribution;
    * ``num_values``: how many coupled values it draws, one program evaluation each; if more than
      one, :meth:`draw` stacks them along a new first dimension, a draw of the guide first;
    * ``pathwise``: whether values carry the gradient.

    Hyper-parameters are kept as attributes under the constructor's names, so that ``repr``
    rebuilds the object. One estimator may serve several sites; state is kept by site name.

    Example:
        A complete estimator for bits: pairs of draws from the same noise, turned round.

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

        ``pyro_gumbel.diagnostics.check_unbiased`` tells whether it is what it says.
    """

    unbiased: ClassVar[bool]
    sites: ClassVar[str]
    pathwise: ClassVar[bool] = False
    relaxed: ClassVar[bool] = False  # the program runs on values outside the support
    enumerates: ClassVar[bool] = False  # a value is the whole support
    differentiates: ClassVar[bool] = False  # the surrogate uses the cost's gradient in the value
    branches_are_draws: ClassVar[bool] = True  # every coupled value has the guide's law
    moves_plates: ClassVar[bool] = False  # other values' laws differ, in all elements at once
    draws_from_logits: ClassVar[bool] = False  # values carry a gradient to logits of their own
    needs_linked_value: ClassVar[bool] = False  # wrong where the cost has no gradient in the value
    branches_have_graph: ClassVar[bool] = True  # more than the cost's number is wanted of them
    num_values: int = 1
    chunk_size: int | None = None  # branches without graph that are evaluated at once
    min_particles: int = 1

    def supports(self, fn: Distribution) -> bool:
        """Tell whether it can serve ``fn`` (given without ``to_event`` and ``mask``)."""
        raise NotImplementedError

    def why_unsupported(self, fn: Distribution, event_dims: int) -> str | None:
        """Say what of a site of a supported family stands in the way, if anything."""
        return None

    def draw(self, fn: Distribution) -> Tensor:
        """Draw a value of shape ``fn.batch_shape + fn.event_shape``, without gradient."""
        return sample_detached(fn)

    def block_size(self, fn: Distribution, event_dims: int) -> int:
        """Count the coupled values of a site whose last ``event_dims`` dimensions are joined."""
        return self.num_values

    def draw_block(self, fn: Distribution, event_dims: int) -> Tensor:
        """Draw the coupled values: ``(K,)`` before the shape of one, if ``K`` is more than one."""
        return self.draw(fn)

    def log_prob(self, fn: Distribution, value: Tensor) -> Tensor:
        """Score ``value`` with the gradient that the estimator wants, ``fn.batch_shape``."""
        return log_mass(fn, value)

    def surrogate(self, site: Site) -> Tensor | None:
        """Build a tensor whose sum, divided by ``R``, has the estimate as its gradient."""
        return None

    def shares_noise(self, fn: Distribution) -> bool:
        """Return whether branches may draw with the main path's noise: where draws are plain."""
        kind = type(self)
        return kind.draw is Estimator.draw and kind.draw_block is Estimator.draw_block

    def draw_from_noise(self, fn: Distribution, noise: Tensor) -> Tensor:
        """Draw a value by noise of :func:`~pyro_gumbel.distributions.families.base_noise`."""
        return from_noise(fn, noise).detach()

    @property
    def keeps_score_gradient(self) -> bool:
        """Whether :meth:`log_prob` enters the ELBO's terms with its gradient."""
        return self.pathwise or self.enumerates or self.differentiates

    def schedules(self) -> list[Schedule]:
        """Return the schedules to advance after a step."""
        return [module for module in self.modules() if isinstance(module, Schedule)]
