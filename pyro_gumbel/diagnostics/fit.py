"""How good a fitted guide is: the tail of its importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_gumbel._arviz import tail_khat
from pyro_gumbel.diagnostics._arguments import check_programs, integer
from pyro_gumbel.diagnostics._programs import Evaluation, evaluate
from pyro_gumbel.diagnostics._state import preserved, seed_everything, seeds
from pyro_gumbel.estimators import Call

__all__ = ["guide_khat"]


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
    independent data points is judged far more severely than each of theirs: name their ``plate``
    for a value for each of them.

    Args:
        model: The model.
        guide: The guide; gradient estimators configured in it play no part.
        *args: Arguments of both.
        num_samples: Number of draws, at least 25.
        plate: A plate whose elements are judged one by one, each by the terms inside the plate.
        seed: Seed of the draws.
        **kwargs: Keyword arguments of both.

    Returns:
        The shape k-hat, or with ``plate`` a DataArray of that dimension; ``nan`` where the largest
        weights are of fewer than ten sizes (a guide of few states: there is no tail).

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If there are fewer than 25 samples, no plate of that name, or one of the
            model's latent sites is missing from the guide.

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
    with preserved() as keep:
        with keep.watch():
            seed_everything(seeds(seed, 1)[0])
            evaluate(call, {}, {})
        runs = [_log_weights(evaluate(call, {}, {}), plate) for _ in range(num_samples)]
    log_weights = torch.stack(runs, -1).double().cpu().numpy()
    khats = np.array([_khat(row) for row in log_weights.reshape(-1, num_samples)])
    if plate is None:
        return float(khats[0])
    return xr.DataArray(khats.reshape(log_weights.shape[:-1]), dims=[plate])


def _khat(log_weights: np.ndarray) -> float:
    finite = np.isfinite(log_weights)
    if not finite.any() or np.ptp(log_weights[finite]) < 1e-6:
        return math.nan  # all weights are equal: the guide is the posterior
    # A weight of zero is in the lower tail, whatever its logarithm is set to.
    return tail_khat(np.maximum(log_weights, log_weights[finite].min() - 100))


def _log_weights(run: Evaluation, plate: str | None) -> Tensor:
    """Sum a run's terms; with ``plate``, those inside it, ``(elements,)``."""
    if plate is None:
        return torch.stack([term.value.sum() for term in run.terms]).sum()
    inside = [(term, frame) for term in run.terms for frame in term.plates if frame.name == plate]
    if not inside:
        plates = sorted({frame.name for term in run.terms for frame in term.plates})
        raise ValueError(f"guide_khat: no plate is called {plate!r}; there are {plates}.")
    rows = []
    for term, frame in inside:
        value = term.value.reshape((1,) * (-frame.dim - term.value.dim()) + term.value.shape)
        rows.append(value.movedim(frame.dim, 0).reshape(frame.size, -1).sum(1))
    return torch.stack(rows).sum(0)
