"""The exact gradient, by summing over all joint states of the discrete sites."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pyro_gumbel._validate import check_coords, check_dims, check_programs, integer
from pyro_gumbel.diagnostics._moments import dims_of
from pyro_gumbel.diagnostics._programs import (
    LONG_RUN,
    Minibatches,
    NotListable,
    expectations,
    find_states,
    run,
    walk,
)
from pyro_gumbel.diagnostics._state import (
    Params,
    check_complete,
    find_parameters,
    preserved,
    read_gradients,
    seed_everything,
    seed_torch,
    seeds,
)
from pyro_gumbel.estimators import Call

__all__ = ["exact_gradient", "sum_states"]

_FEW = 64  # minibatches that are all taken without a comparison
_COMPARED = 5  # pairs of minibatches
_LARGEST_TOLERANCE = 0.05  # in half precision
Arrangements = tuple[list[Tensor], list[Tensor]]


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
    return sum_states(call, params, max_states, seed, dims=dims).assign_coords(dict(coords or {}))


def sum_states(
    call: Call,
    params: Params,
    max_states: int,
    seed: int,
    *,
    dims: Any = None,
    deadline: float = math.inf,
) -> xr.Dataset:
    """Compute the gradient, unless ``time.perf_counter()`` passes ``deadline``: NotListable."""
    with preserved() as keep, torch.enable_grad():
        seed_everything(seeds(seed, 1)[0])  # parameters are made as gradient_draws makes them
        leaves = find_parameters(call, keep, params)
        check_dims(dims, leaves)
        own_dims = {name: dims_of(name, leaf.dim(), dims, leaves) for name, leaf in leaves.items()}
        read_gradients(leaves)
        exact = _ExactSum(call, leaves, max_states, deadline)
        choices = exact.find_minibatches()
        total = torch.zeros(())
        for minibatches in itertools.product(*choices.values()):
            total = total + exact.at(dict(zip(choices, minibatches, strict=True)))
        total = total / math.prod(map(len, choices.values()))
        check_complete(leaves, params)
    loss, *gradients = total.split([1, *(leaf.numel() for leaf in leaves.values())])
    variables = {}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        own = gradient.reshape(leaf.shape).to(leaf.dtype).numpy()
        variables[name] = (own_dims[name], own)
    attrs = {"loss": loss.item(), "states": exact.states, "estimator": "exact"}
    return xr.Dataset(variables, attrs=attrs)


class _ExactSum:
    """The loss and its gradient by sums over all states, for given minibatches."""

    def __init__(
        self, call: Call, leaves: dict[str, Tensor], max_states: int, deadline: float
    ) -> None:
        self.call, self.leaves, self.deadline = call, leaves, deadline
        self.max_states, self.batches = max_states, 1  # those that share the limit
        self.states, self.eps = 0, 0.0  # the number of states, and the coarsest precision met

    def at(self, given: Mapping[str, Tensor], found: Any = None) -> Tensor:
        """The loss and its gradient as one vector; ``found`` is what ``find_states`` returns."""
        limit = self.max_states // self.batches
        states, fewest = found or find_states(self.call, given, limit)
        if states is None and fewest.count > limit:
            each = f" in each of {self.batches:,} minibatches" if self.batches > 1 else ""
            raise NotListable(
                f"exact_gradient: {fewest.count:,} joint states of the sites "
                f"{[site.name for site in fewest.sites]}{each} are more than "
                f"max_states={self.max_states:,}. Raise max_states, or use {LONG_RUN}"
            )
        parts = expectations(self.call, given, states) if states else walk(self.call, given, limit)
        loss, number = 0.0, 0
        for part in parts:
            if time.perf_counter() > self.deadline:
                raise NotListable("exact_gradient: the joint states take too long.")
            loss, number = loss - part.item(), number + 1
            self.eps = max(self.eps, torch.finfo(part.dtype).eps)
            if part.requires_grad:
                (-part).backward()
        self.states = states.count if states else number
        gradients = [gradient.flatten().double().cpu() for gradient in read_gradients(self.leaves)]
        return torch.cat([torch.tensor([loss], dtype=torch.double), *gradients])

    def find_minibatches(self) -> dict[str, Tensor]:
        """Choose minibatches of each subsampled plate, ``(number, batch)``, to average over.

        If elements do not depend on the rest of their minibatch, the bound is a sum over elements.
        Minibatches that contain each element equally often then suffice. Otherwise all are taken.
        """
        with torch.no_grad(), Minibatches() as met:
            run(self.call)
        sizes = {n: (site["fn"].size, site["fn"].subsample_size) for n, site in met.sites.items()}
        sizes = {n: own for n, own in sizes.items() if own[1] is not None and own[1] < own[0]}
        choices: dict[str, Tensor] = {}
        for name, (size, batch) in sizes.items():  # windows have each element equally often
            starts = torch.arange(0, size, batch if size % batch == 0 else 1)
            windows = (starts[:, None] + torch.arange(batch)) % size
            choices[name] = windows.to(met.sites[name]["value"].device)
        start = {name: own[0] for name, own in choices.items()}
        dependent = []
        for name, (size, batch) in sizes.items():
            ordered = self._differ(start, name, size, _reverse)
            number = (math.perm if ordered else math.comb)(size, batch)
            if number > _FEW:
                if not (ordered or self._differ(start, name, size, _exchange)):
                    continue
                dependent.append(name)
            if number > self.max_states:
                raise NotListable(
                    f"exact_gradient: terms of plate {name!r} depend on the rest of their "
                    f"minibatch, as by batch normalisation: there are {number:,} minibatches, "
                    f"more than max_states={self.max_states:,}. Put such modules into .eval(), "
                    "run the whole plate (subsample_size=None), raise max_states, or use "
                    f"{LONG_RUN}"
                )
            choose = itertools.permutations if ordered else itertools.combinations
            choices[name] = start[name].new_tensor(list(choose(range(size), batch)))
        if dependent:
            self.batches = math.prod(map(len, choices.values()))
        return choices

    def _differ(
        self,
        start: Mapping[str, Tensor],
        plate: str,
        size: int,
        arrange: Callable[[Tensor, int], Arrangements],
    ) -> bool:
        """Compare the sums of minibatches that have the same elements in another arrangement."""
        generator = torch.Generator().manual_seed(0)
        found = find_states(self.call, start, self.max_states)

        def at(minibatch: Tensor) -> Tensor:
            seed_torch(0)  # the same noise in each run, if the programs draw some
            given = {**start, plate: minibatch.to(start[plate].device)}
            return self.at(given, found).nan_to_num(posinf=0.0, neginf=0.0)

        for _ in range(_COMPARED):
            order = torch.randperm(size, generator=generator)
            arranged = arrange(order, len(start[plate]))
            one, other = (torch.stack(list(map(at, part))) for part in arranged)
            tolerance = min(1e4 * self.eps, _LARGEST_TOLERANCE)
            difference = (one.sum(0) - other.sum(0)).abs().max()
            if difference > tolerance * torch.cat([one, other]).abs().max():
                return True
        return False


def _reverse(order: Tensor, batch: int) -> Arrangements:
    """Take a minibatch, and reverse it."""
    return [order[:batch]], [order[:batch].flip(0)]


def _exchange(order: Tensor, batch: int) -> Arrangements:
    """Take two minibatches that differ as far as possible, and exchange half of what differs."""
    differing = min(batch, len(order) - batch)
    shared, one, other = order[: batch + differing].tensor_split([batch - differing, batch])
    cut = differing // 2
    halves = [one[:cut], other[cut:]], [other[:cut], one[cut:]]
    whole = [torch.cat([shared, one]), torch.cat([shared, other])]
    return whole, [torch.cat([shared, *half]) for half in halves]
