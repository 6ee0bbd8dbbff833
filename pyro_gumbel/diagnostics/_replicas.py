"""A copy of an estimator to draw from: what it learns or remembers does not reach the original."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from pyro.ops.jit import CompiledFunction

from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.estimators.registry import NamedEstimators
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

__all__ = ["Replica", "site_seed", "split_choice"]


def split_choice(choice: Any) -> tuple[Any, ELBO | None]:
    """Read a choice of estimator: a config, an ``ELBO``, or a pair of the two."""
    if isinstance(choice, ELBO):
        return None, choice
    if isinstance(choice, tuple):
        if len(choice) == 2 and isinstance(choice[1], ELBO):
            return choice
        raise TypeError(
            "estimators: a pair must be (config, ELBO), such as (ReinMax(), "
            f"Estimator_ELBO(num_particles=4)); got {choice!r}."
        )
    return choice, None


class Replica:
    """One independent copy of an estimator, with the state that the original had.

    Args:
        choice: What :func:`split_choice` reads.
        call: The programs and their arguments.
        num_particles: Number of particles where the choice is no ELBO.
        vectorize_particles: Whether they are rows, likewise.
    """

    def __init__(
        self,
        choice: Any,
        call: Call,
        *,
        num_particles: int = 1,
        vectorize_particles: bool = False,
    ) -> None:
        config, elbo = split_choice(choice)
        if elbo is None:
            elbo = Estimator_ELBO(num_particles, vectorize_particles=vectorize_particles)
        self.call = call
        self.elbo = _own(elbo, call)
        guide = call.guide if config is None else config_gradient(call.guide, config)
        # The outermost configuration sees what the inner ones chose, and puts copies in its place.
        self.guide = config_gradient(guide, self._replace)
        self.on_site: Callable[[str], None] | None = None
        self.sites: dict[str, None] = {}
        self._copies: dict[int, tuple[Estimator, Estimator]] = {}

    def step(self) -> Any:
        """Estimate the gradient once, into ``.grad``, and return the loss."""
        call = self.call
        with torch.enable_grad():
            return self.elbo.loss_and_grads(call.model, self.guide, *call.args, **call.kwargs)

    def save(self) -> Callable[[], None]:
        """Remember the estimators' state; return what puts it back."""
        copies = [own for _, own in self._copies.values()]
        held = [*copies, *_estimators(vars(self.elbo))]
        states = [(estimator, copy.deepcopy(estimator.state_dict())) for estimator in held]

        def restore() -> None:
            for estimator, state in states:
                estimator.load_state_dict(copy.deepcopy(state))

        return restore

    def _replace(self, msg: Any) -> Any:
        name = msg["name"]
        self.sites[name] = None
        if self.on_site is not None:
            self.on_site(name)
        chosen = (msg["infer"] or {}).get("gradient")
        if not isinstance(chosen, Estimator):
            return chosen
        if id(chosen) not in self._copies:
            # The original is kept beside its copy, so that its id stays its own.
            self._copies[id(chosen)] = (chosen, copy.deepcopy(chosen))
        return self._copies[id(chosen)][1]


def _own(elbo: ELBO, call: Call) -> ELBO:
    """Copy an ELBO with all that it holds, except the programs and what is compiled of them."""
    compiled = [value for value in vars(elbo).values() if isinstance(value, CompiledFunction)]
    shared = [call.model, call.guide, *compiled]
    return copy.deepcopy(elbo, {id(value): value for value in shared})


def _estimators(value: Any) -> Iterator[Estimator]:
    """Find the estimators in containers."""
    if isinstance(value, Estimator):
        yield value
    elif isinstance(value, NamedEstimators):
        yield from _estimators(value.made())
    elif isinstance(value, Mapping):
        yield from _estimators(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from _estimators(part)


def site_seed(base: int, name: str, visit: int) -> int:
    """Mix a step's seed with a site's name and how often it was visited."""
    return zlib.crc32(f"{base}/{name}/{visit}".encode())
