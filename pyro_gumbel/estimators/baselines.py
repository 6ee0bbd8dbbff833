"""Baselines, which reduce the variance of the score function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_gumbel._validate import check_number
from pyro_gumbel.distributions._base import broadcasts_to
from pyro_gumbel.estimators._module import StatefulModule
from pyro_gumbel.estimators.base import Call, Site

__all__ = ["Baseline", "LeaveOneOut", "MovingAverage", "NeuralBaseline"]


class Baseline(StatefulModule):
    """A term subtracted from a particle's cost, independent of the particle's own draw.

    A baseline changes its state only if ``site.training`` is true. Arguments raise errors as those
    of an :class:`~pyro_gumbel.estimators.Estimator` do.

    Example:
        A custom baseline: the lowest cost of the other particles, for each element of a plate.

        >>> class LeastOfOthers(Baseline):
        ...     min_particles = 2
        ...     def forward(self, site):
        ...         least = site.cost[0].topk(2, 0, largest=False).values
        ...         is_least = site.cost[0] == least[0]
        ...         return torch.where(is_least, least[1], least[0]), None
        >>> from pyro_gumbel.estimators import Score
        >>> Score(LeastOfOthers())
        Score(LeastOfOthers())
    """

    min_particles: int = 1

    def forward(self, site: Site) -> tuple[Tensor | float, Tensor | None]:
        """Return a baseline that broadcasts to ``(R,) + batch_shape``, and its loss or None."""
        raise NotImplementedError


class LeaveOneOut(Baseline):
    r"""The mean cost of the other particles.

    .. math:: b_r = \frac{1}{R - 1} \sum_{s \ne r} f_s

    It has no state and no network. Each element of a plate has its own baseline. It needs
    ``num_particles >= 2``. In programs of varying structure, a site that only one particle has
    gets no baseline. For a Bernoulli variable that is 1 with probability :math:`\theta` and costs
    :math:`f_0, f_1`, the variance of the gradient in the logit is

    .. math::
        \frac{v}{R} \Bigl((1 - 2 \theta)^2 + \frac{2 v}{R - 1}\Bigr) (f_1 - f_0)^2, \quad
        v = \theta (1 - \theta),

    which near :math:`\theta = 1/2` falls faster than :math:`1 / R`. Without a baseline it is
    :math:`\frac{v}{R} (\theta f_0 + (1 - \theta) f_1)^2`, which grows with a constant in the cost.

    References:
        Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool, van Hoof, Welling, 2019),
        https://openreview.net/forum?id=r1lgTGL5DE

    Example:
        >>> LeaveOneOut()
        LeaveOneOut()
    """

    min_particles = 2

    def forward(self, site: Site) -> tuple[Tensor | float, None]:
        cost = site.cost[0]
        others = cost.shape[0] - 1
        if others == 0:  # varying structure: no other particle has this site
            return 0.0, None
        return (cost.sum(0) - cost) / others, None


class MovingAverage(Baseline):
    """An exponential moving average of past costs, one number per site.

    The average does not include the current draws, and is corrected for its initial value of zero;
    the first step has no baseline. It only changes in training. It is one number for all elements
    of a minibatch, so minibatches may differ in size. The state is part of ``state_dict``.

    Args:
        decay: Weight of the past, from 0 (only the last step) to below 1.

    References:
        Simple statistical gradient-following algorithms for connectionist reinforcement learning
        (Williams, 1992)

    Example:
        >>> MovingAverage(decay=0.95)
        MovingAverage(0.95)
    """

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = check_number("MovingAverage", "decay", decay, example=0.9)
        if not 0 <= self.decay < 1:
            raise ValueError(f"MovingAverage: decay must lie in [0, 1); got {decay!r}.")
        # Sums of past costs and of their weights, as tensors, to avoid device synchronisation.
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def forward(self, site: Site) -> tuple[Tensor | float, None]:
        mean = site.cost[0].mean()
        past = self._sums.get(site.name)
        if past is None:
            baseline: Tensor | float = 0.0
            past, weight = torch.zeros_like(mean), torch.zeros_like(mean)
        else:
            past, weight = past.to(mean), self._weights[site.name].to(mean)
            baseline = past / weight
        if not site.training:
            return baseline, None
        # An infinite cost would stay in the average for ever (inf - inf is not zero).
        mean = torch.where(mean - mean == 0, mean, baseline)
        self._sums[site.name] = torch.lerp(past, mean, 1 - self.decay)
        self._weights[site.name] = self.decay * weight + (1 - self.decay)
        return baseline, None

    def get_extra_state(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])


class NeuralBaseline(Baseline):
    """A network's prediction of the cost, which the user's optimiser trains.

    Args:
        module: Maps the input to a prediction that broadcasts to the site's batch shape. A
            trailing dimension of one is dropped if necessary.
        input: The name of an argument of the guide or the model, or a callable of their arguments.

    Raises:
        ValueError: At a site, if no argument has that name, or the prediction does not broadcast.

    References:
        Neural Variational Inference and Learning in Belief Networks (Mnih, Gregor, 2014),
        https://arxiv.org/abs/1402.0030

    Example:
        >>> NeuralBaseline(nn.Linear(3, 1), "x").input
        'x'
    """

    def __init__(self, module: nn.Module, input: str | Callable[..., Any]) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                "NeuralBaseline: module must be a torch.nn.Module that predicts the cost, such as "
                f"nn.Linear(3, 1); got {module!r}."
            )
        if not (isinstance(input, str) or callable(input)):
            raise TypeError(
                "NeuralBaseline: input must be the name of an argument of the guide or the model, "
                f"such as 'x', or a callable of their arguments; got {input!r}."
            )
        self.module = module
        self.input = input

    def forward(self, site: Site) -> tuple[Tensor, Tensor]:
        prediction = self._fit(self.module(self._converted(self._read_input(site))), site)
        error = site.cost[0] - prediction
        # The mean over particles and the sum over plates, scaled as the cost is.
        return prediction.detach(), (error**2).sum() / error.shape[0]

    def _read_input(self, site: Site) -> Any:
        call = site.call
        if callable(self.input):
            return self.input(*call.args, **call.kwargs)
        arguments = _bind(call.model, call) | _bind(call.guide, call)
        if self.input in arguments:
            return arguments[self.input]
        raise ValueError(
            f"NeuralBaseline at site {site.name!r}: guide and model have no argument "
            f"{self.input!r}; their arguments are {sorted(arguments)}. Use one of these as input, "
            "or a callable of the arguments."
        )

    def _converted(self, value: Any) -> Any:
        """Convert a floating-point input to the module's dtype."""
        weight = next(self.module.parameters(), None)
        both = (value, weight)
        if all(isinstance(one, Tensor) and one.is_floating_point() for one in both):
            return value.to(cast(Tensor, weight).dtype)
        return value

    def _fit(self, prediction: Tensor, site: Site) -> Tensor:
        shape = site.cost.shape[2:]
        for candidate in (prediction, prediction.squeeze(-1) if prediction.dim() else prediction):
            if broadcasts_to(candidate.shape, shape):
                return candidate
        raise ValueError(
            f"NeuralBaseline at site {site.name!r}: the module returned shape "
            f"{tuple(prediction.shape)}, which does not broadcast to the site's batch shape "
            f"{tuple(shape)}; return one prediction for each element of the plate."
        )


def _bind(program: Callable[..., Any], call: Call) -> dict[str, Any]:
    function = program.forward if isinstance(program, nn.Module) else program
    try:
        bound = inspect.signature(function).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)
