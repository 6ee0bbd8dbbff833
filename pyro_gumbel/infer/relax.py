"""Relax a discrete latent of a model, for HMC, autoguides and Pyro's ELBOs."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Transform, constraints, transform_to

from pyro_gumbel.distributions import ExpRelaxedOneHot
from pyro_gumbel.distributions import straight_through as pass_straight_through
from pyro_gumbel.distributions.families import (
    is_bit,
    is_categorical,
    is_one_hot,
    is_relaxed,
    unwrap,
    wrap_like,
)
from pyro_gumbel.distributions.one_hot import one_hot_argmax
from pyro_gumbel.estimators.schedules import Schedule, check_temperature

__all__ = ["RelaxReparam"]

# The start of a coordinate that is exactly zero: inside the simplex, within 1e-6 of the boundary.
_INTERIOR = 1e-6


class RelaxReparam(Reparam):
    r"""Relax a one-hot or Bernoulli latent, and sample it in log-coordinates.

    Use it as ``poutine.reparam(model, {"z": RelaxReparam(0.5)})``. A one-hot site ``z`` becomes

    .. math:: u \sim \mathrm{ExpConcrete}(\phi, \tau), \qquad z = e^u \in \Delta^{C-1}

    with a new latent site ``z_log`` for ``u``. A Bernoulli site becomes :math:`z = \sigma(\ell)`,
    :math:`\ell \sim \mathrm{Logistic}(\phi / \tau, 1 / \tau)`, with a new site ``z_logit``. The
    site ``z`` becomes deterministic, and ``Predictive`` returns it for the draws of a chain.
    Densities in these coordinates are exact at every temperature, and the coordinates have no
    boundary. The model runs on values between the categories. The posterior of the relaxed model
    tends to that of the discrete model as :math:`\tau \to 0`, while its geometry gets harder.

    With ``straight_through=True`` the model runs on the one-hot :math:`\mathrm{onehot}(\arg\max
    u)`, with the gradient of the relaxed value. By the Gumbel-max trick the distribution of ``z``
    is unchanged, so an ELBO of the new model bounds the evidence of the old one. Do not use it
    with HMC, which ignores the jumps of such a model's density.

    An initial value of ``z`` (``init_to_value(values={"z": ...})``) is kept: exactly inside the
    simplex, within 1e-6 if it is one-hot. Other initialisation strategies choose ``z_log``. Pyro's
    default strategies first need a map from the reals to the discrete support, which Pyro lacks.
    While a ``RelaxReparam`` is active they get one, whose result is ignored. Otherwise they raise
    as before.

    Shapes: ``z_log`` and ``z_logit`` have the shape of ``z``, with the same ``to_event``, plates
    and ``mask``.

    Args:
        temperature: Positive number, or tensor that broadcasts against the site's batch shape.
        straight_through: Whether the model runs on one-hot values.

    Raises:
        TypeError: If the temperature is neither a number nor a tensor.
        ValueError: If the temperature is not positive; when the model runs, if the site is
            observed or of another family.

    References:
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.8])))
        ...     pyro.sample("x", dist.Normal(z[..., 1], 1.0), obs=torch.tensor(0.7))
        >>> relaxed = pyro.poutine.reparam(model, {"z": RelaxReparam(0.5)})
        >>> list(AutoNormal(relaxed)())
        ['z_log']
    """

    def __init__(self, temperature: float | Tensor, *, straight_through: bool = False) -> None:
        if isinstance(temperature, Schedule):
            raise TypeError(
                "RelaxReparam: temperature must be a number or a tensor, since a schedule inside "
                f"a model does not advance; got {temperature!r}. Write "
                "RelaxReparam(temperature.value), with a new object for each temperature."
            )
        self.temperature = check_temperature(
            "RelaxReparam", "temperature", temperature, kinds=("number", "tensor")
        )
        self.straight_through = straight_through

    def __repr__(self) -> str:
        return f"RelaxReparam({self.temperature!r}, straight_through={self.straight_through!r})"

    def apply(self, msg: Any) -> Any:
        """Sample the log-coordinates and put a deterministic site in place of the discrete one."""
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        base = unwrap(fn)
        _check_site(name, base, msg["is_observed"])
        if not getattr(value, "_pyro_custom_init", True):
            value = None  # a default: the strategy will initialise the new site instead
        relax = self._relax_bit if is_bit(base) else self._relax_one_hot
        relaxed = relax(name, fn, value)
        # Return a given value itself, since Pyro compares the two.
        result = relaxed if value is None else value
        return {
            "fn": dist.Delta(result, event_dim=fn.event_dim).mask(False),
            "value": result,
            "is_observed": True,
        }

    def _relax_one_hot(self, name: str, fn: Any, value: Tensor | None) -> Tensor:
        concrete = ExpRelaxedOneHot(self.temperature, logits=unwrap(fn).logits)
        start = None if value is None else _log_coordinates(value)
        log_value = _sample(f"{name}_log", wrap_like(fn, concrete), start)
        soft = log_value.exp()
        if not self.straight_through:
            return soft
        return pass_straight_through(one_hot_argmax(log_value.detach(), soft.dtype), soft)

    def _relax_bit(self, name: str, fn: Any, value: Tensor | None) -> Tensor:
        logits = unwrap(fn).logits
        logistic = dist.Logistic(
            logits / self.temperature, torch.ones_like(logits) / self.temperature
        )
        start = None if value is None else _log_odds(value)
        log_odds = _sample(f"{name}_logit", wrap_like(fn, logistic), start)
        soft = log_odds.sigmoid()
        if not self.straight_through:
            return soft
        return pass_straight_through((log_odds.detach() > 0).to(soft.dtype), soft)


def _sample(name: str, fn: Any, start: Tensor | None) -> Tensor:
    # obs with is_observed False sets an initial value.
    return pyro.sample(name, fn, obs=start, infer={"is_observed": False})


def _log_coordinates(value: Tensor) -> Tensor:
    interior = torch.where(value == 0, _INTERIOR / value.shape[-1], value)
    return interior.log().log_softmax(-1)


def _log_odds(value: Tensor) -> Tensor:
    on_boundary = (value == 0) | (value == 1)
    return torch.where(on_boundary, value.clamp(_INTERIOR, 1 - _INTERIOR), value).logit()


def _check_site(name: str, base: Any, is_observed: bool) -> None:
    family = type(base).__name__
    if is_observed:
        raise ValueError(
            f"RelaxReparam: site {name!r} is observed, and only latent sites can be relaxed. "
            f"Remove {name!r} from poutine.reparam's config, or obs=... from its pyro.sample."
        )
    if is_one_hot(base) or is_bit(base):
        return
    if is_categorical(base):
        remedy = (
            "an index cannot be relaxed. Write OneHotCategorical(logits=...), and replace "
            f"indexing by a product with the one-hot: {name} @ locs for locs[{name}]"
        )
    elif is_relaxed(base):
        remedy = (
            "it is already relaxed. Write the discrete distribution, OneHotCategorical("
            "logits=...) or Bernoulli(logits=...)"
        )
    else:
        remedy = (
            "RelaxReparam supports OneHotCategorical and Bernoulli. Enumerate other discrete "
            f"sites, or remove {name!r} from poutine.reparam's config"
        )
    raise ValueError(f"RelaxReparam: site {name!r} is a {family}: {remedy}.")


class _Round(Transform):
    """A map from the reals to a discrete support, for initialisation strategies."""

    bijective = False

    def __init__(self, support: constraints.Constraint) -> None:
        super().__init__()
        self.one_hot = support.event_dim == 1
        self.domain = constraints.real_vector if self.one_hot else constraints.real
        self.codomain = support

    def _call(self, x: Tensor) -> Tensor:
        return one_hot_argmax(x, x.dtype) if self.one_hot else (x > 0).to(x.dtype)

    def _inverse(self, y: Tensor) -> Tensor:
        return y


def _round(support: constraints.Constraint) -> Transform:
    """Return a map to a discrete support while a model is relaxed; raise otherwise."""
    for handler in _PYRO_STACK:  # private in Pyro: if it moves, this import fails
        if isinstance(handler, ReparamMessenger):
            config = handler.config
            if not isinstance(config, dict) or any(
                isinstance(reparam, RelaxReparam) for reparam in config.values()
            ):
                return _Round(support)
    raise NotImplementedError(f"Cannot transform {type(support).__name__} constraints")


transform_to.register(type(constraints.one_hot), _round)
transform_to.register(type(constraints.boolean), _round)
