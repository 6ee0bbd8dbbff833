"""The exact gradient, by summing over all joint states of the discrete sites."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_gumbel._validate import check_coords, check_programs, integer
from pyro_gumbel.diagnostics._minibatches import Minibatches, find_minibatches
from pyro_gumbel.diagnostics._state import (
    Params,
    check_complete,
    find_parameters,
    preserved,
    read_gradients,
    seed_everything,
    seeds,
)
from pyro_gumbel.diagnostics._storage import check_dims, dims_of
from pyro_gumbel.diagnostics._sums import expectations, find_states, walk
from pyro_gumbel.estimators import Call

__all__ = ["exact_gradient", "sum_states"]


def exact_gradient(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: Params = None,
    max_states: int = 100_000,
    coords: Mapping[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> xr.Dataset:
    r"""Compute the exact gradient of the loss by enumerating all discrete states.

    .. math:: -\nabla_\phi \sum_z q_\phi(z)\,(\log p(x, z) - \log q_\phi(z))

    The gradient is that of the loss, the negative ELBO, with respect to each parameter's
    unconstrained value: what the draws of :func:`gradient_draws` estimate. No gradient estimator
    takes part in it.

    The elements of a plate are summed one by one where they are independent of one another, which
    is checked by comparing runs; eight latents of four categories for each of a hundred images
    then are :math:`4^8` states and not :math:`4^{800}`. States are rows of one run where the
    programs broadcast, and runs of their own where not. A plate that draws a minibatch is averaged
    over minibatches that hold each element equally often. If its elements depend on the rest of
    their minibatch, as by batch normalisation, all minibatches are taken, and ``max_states``
    bounds their joint states; this is found by exchanging elements between minibatches.

    Args:
        model: The model.
        guide: The guide; gradient estimators configured in it play no part.
        *args: Arguments of both.
        params: As in :func:`gradient_draws`: names to restrict to, or values to take it at.
        max_states: The number of joint states that are still summed, those of all minibatches if
            their elements depend on one another.
        coords: Coordinates of named dimensions.
        dims: For each parameter the names of its dimensions.
        seed: Seed under which parameters are made that the programs have not made yet.
        **kwargs: Keyword arguments of both.

    Returns:
        A Dataset with one variable a parameter; the attributes hold the exact ``loss`` and the
        number of ``states``.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If there are more states or minibatches than ``max_states``, a site of the
            guide is not discrete, or one of the model's latent sites is missing from the guide.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> exact = exact_gradient(model, guide)
        >>> round(float(exact["l"]), 4)  # (log 0.7 - log 0.3) / 4
        0.2118
    """
    check_programs(model, guide)
    check_coords(coords)
    max_states = integer("max_states", max_states, 1)
    call = Call(model, guide, args, kwargs)
    gradients, attrs = sum_states(call, params, max_states, seed)
    check_dims(dims, gradients)
    variables = {
        name: (dims_of(name, gradient.ndim, dims, gradients), gradient)
        for name, gradient in gradients.items()
    }
    return xr.Dataset(variables, dict(coords or {}), attrs)


def sum_states(
    call: Call, params: Params, max_states: int, seed: int, deadline: float = math.inf
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Compute the gradients by name, and the attributes that go with them.

    Raises:
        TimeoutError: If ``time.perf_counter()`` passes ``deadline``.
    """
    with preserved() as keep, torch.enable_grad():
        seed_everything(seeds(seed, 1)[0])  # parameters are made as gradient_draws makes them
        leaves = find_parameters(call, keep, params)
        read_gradients(leaves)
        loss, count = 0.0, 0
        batches = find_minibatches(call, list(leaves.values()), max_states)
        for subsamples in batches:
            parts, count = _parts(call, subsamples, batches, max_states, deadline)
            for part in parts:
                loss -= part.item() / len(batches)
                if part.requires_grad:
                    (-part / len(batches)).backward()
        check_complete(leaves, params)
        gradients = {
            name: gradient.detach().cpu().numpy().copy()
            for name, gradient in zip(leaves, read_gradients(leaves), strict=True)
        }
    return gradients, {"loss": loss, "states": count, "estimator": "exact"}


def _parts(
    call: Call,
    subsamples: Mapping[str, Tensor],
    batches: Minibatches,
    max_states: int,
    deadline: float,
) -> tuple[Iterable[Tensor], int]:
    limit = max_states // len(batches) if batches.dependent else max_states
    with torch.no_grad():
        states, smallest = find_states(call, subsamples, limit)
    if states is not None:
        return _until(deadline, expectations(call, subsamples, states)), states.count
    if smallest.count > limit:
        each = f" in each of {len(batches):,} minibatches" if batches.dependent else ""
        raise ValueError(
            f"exact_gradient: {smallest.count:,} joint states of the sites "
            f"{[site.name for site in smallest.sites]}{each} are more than "
            f"max_states={max_states:,}. "
            "Raise max_states, or take a long run of an unbiased estimator as the reference: "
            "gradient_draws(..., estimators={'reference': 'auto'}, num_draws=100_000, project=8, "
            "seed=1)['reference']."
        )
    # Their number is known when all are visited.
    parts = list(_until(deadline, walk(call, subsamples, limit)))
    return parts, len(parts)


def _until(deadline: float, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        if time.perf_counter() > deadline:
            raise TimeoutError("the joint states take too long")
        yield part
