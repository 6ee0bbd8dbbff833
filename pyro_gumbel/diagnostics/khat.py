"""How good a fitted guide is: the tail of its importance weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_gumbel._arviz import tail_khat
from pyro_gumbel._validate import check_programs, integer
from pyro_gumbel.diagnostics._programs import run
from pyro_gumbel.diagnostics._state import preserved, seed_everything, seeds
from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._costs import site_frames
from pyro_gumbel.infer._run import Run
from pyro_gumbel.infer._sampling import SharedSubsample

__all__ = ["guide_khat"]

_EQUAL = 0.01  # log weights closer than that are equal: rounding in float32 comes near it


@torch.no_grad()
def guide_khat(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    plate: str | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> float | xr.DataArray:
    r"""Judge a fitted guide by the Pareto shape of its importance weights.

    With exact, hard draws :math:`z \sim q` the log weights are
    :math:`\log p(x, z) - \log q(z)`. Below 0.5 the guide is close to the posterior, up to 0.7 it
    is of use for importance sampling, above 0.7 it is far from it. The joint weight of many
    independent data points has a much larger k-hat than the weight of each. Give their ``plate``
    to get one value for each data point.

    Scales (``poutine.scale``, subsampling) multiply a loss and not a density, so they are left
    out; masks are kept. All draws have the minibatch of the first.

    Args:
        model: The model.
        guide: The guide; gradient estimators configured in it play no part.
        *args: Arguments of both.
        num_samples: Number of draws, at least 25.
        plate: A plate whose elements are judged one by one, each by the terms inside the plate.
        seed: Seed of the draws.
        **kwargs: Keyword arguments of both.

    Returns:
        The shape k-hat, or with ``plate`` a DataArray of that dimension. It is 0 where all weights
        are equal to within a percent (the guide is the posterior), ``inf`` where all are zero, and
        ``nan`` where the largest weights have fewer than ten different values (a guide with few
        states has no tail).

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If there are fewer than 25 samples, no plate of that name, or one of the
            model's latent sites is missing from the guide.

    Warns:
        UserWarning: If ``plate`` is not given and a latent site is outside a subsampled plate: it
            is judged by the posterior given the minibatch alone.

    References:
        Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman,
        2018), https://arxiv.org/abs/1802.02538

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.1))
        >>> guide_khat(model, guide) < 0.5
        True
    """
    check_programs(model, guide)
    num_samples = integer("guide_khat: num_samples", num_samples, 25)  # fewer have no tail
    call = Call(model, guide, args, kwargs)
    with preserved() as keep, SharedSubsample(), _Unscaled():
        with keep.watch():
            seed_everything(seeds(seed, 1)[0])
            first = run(call)
        if plate is None:
            _warn_of_minibatch(first)
        draws = [_log_weights(run(call, layout=first.layout), plate) for _ in range(num_samples)]
    log_weights = torch.stack(draws, -1).cpu().numpy()
    khats = np.array([_khat(row) for row in log_weights.reshape(-1, num_samples)])
    if plate is None:
        return float(khats[0])
    return xr.DataArray(khats.reshape(log_weights.shape[:-1]), dims=[plate])


class _Unscaled(Messenger):
    """Undoes the scales of handlers inside: an importance weight is a ratio of densities."""

    def _pyro_sample(self, msg: Message) -> None:
        msg["scale"] = 1.0


def _warn_of_minibatch(first: Run) -> None:
    plates = frozenset(frame for term in first.terms for frame in term.frames)
    for frame in plates:
        if frame.full_size is None or frame.full_size <= frame.size:
            continue
        outside = [name for name, site in first.guide.items() if frame not in site_frames(site)]
        if outside:
            warnings.warn(
                f"guide_khat: site {outside[0]!r} is outside the plate {frame.name!r}, of which "
                f"the weights have {frame.size} of its {frame.full_size} elements: the guide is "
                "judged by the posterior given these alone. Run the programs without "
                f"subsample_size, or judge the elements by guide_khat(..., plate={frame.name!r}).",
                stacklevel=3,
            )


def _khat(log_weights: np.ndarray) -> float:
    impossible = log_weights == -math.inf
    if impossible.all():
        return math.inf
    if np.ptp(log_weights) < _EQUAL:
        return 0.0
    # A weight of zero is in the lower tail, whatever its logarithm is set to.
    return tail_khat(np.maximum(log_weights, log_weights[~impossible].min() - 100))


def _log_weights(found: Run, plate: str | None) -> Tensor:
    """Sum a run's terms; with ``plate``, those inside it, ``(elements,)``."""
    if plate is None:
        return torch.stack([term.value.double().sum() for term in found.terms]).sum()
    inside = [
        (term, frame) for term in found.terms for frame in term.frames if frame.name == plate
    ]
    if not inside:
        plates = sorted({frame.name for term in found.terms for frame in term.frames})
        raise ValueError(f"guide_khat: no plate is called {plate!r}; there are {plates}.")
    rows = []
    for term, frame in inside:
        value = term.value.reshape((1,) * (-frame.dim - term.value.dim()) + term.value.shape)
        rows.append(value.movedim(frame.dim, 0).reshape(frame.size, -1).double().sum(1))
    return torch.stack(rows).sum(0)
