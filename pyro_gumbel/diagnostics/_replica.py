"""A copy of an estimator to draw from: what it learns or remembers does not reach the original."""

from __future__ import annotations

import copy
import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.elbo import ELBO
from pyro.infer.util import torch_item
from pyro.ops.jit import CompiledFunction
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_gumbel.diagnostics._state import read_gradients, seed_everything, seed_torch, seeds
from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.estimators.registry import NamedEstimators
from pyro_gumbel.infer import Estimator_ELBO, config_gradient
from pyro_gumbel.infer._configured_guide import configure_module
from pyro_gumbel.infer._layout import PARTICLE_PLATE

__all__ = ["Replica", "Step", "site_effects", "split_choice"]


class Step(NamedTuple):
    """The record of a gradient: the loss, its seconds, and evaluations of the model."""

    loss: float
    seconds: float
    evaluations: int


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
        num_particles: Number of particles where the choice is not an ELBO.
        vectorize_particles: Whether they are evaluated in one run, likewise.
    """

    def __init__(
        self, choice: Any, call: Call, num_particles: int = 1, vectorize_particles: bool = False
    ) -> None:
        config, elbo = split_choice(choice)
        if elbo is None:
            elbo = Estimator_ELBO(num_particles, vectorize_particles=vectorize_particles)
        self.call = call
        self.elbo = _own(elbo, call)
        self.counter = EvaluationCounter()
        counted = self.counter.count(call)
        self.model = counted.model
        guide = counted.guide if config is None else config_gradient(counted.guide, config)
        # The outermost configuration sees what the inner ones chose, and puts copies in its place.
        self.guide = config_gradient(guide, self._replace)
        self.on_site: Callable[[str], None] | None = None
        self.sites: dict[str, None] = {}
        self._copies: dict[int, tuple[Estimator, Estimator]] = {}

    def step(self) -> Step:
        """Estimate the gradient once, into ``.grad``."""
        before, start = self.counter.total, time.perf_counter()
        with torch.enable_grad():
            loss = self.elbo.loss_and_grads(
                self.model, self.guide, *self.call.args, **self.call.kwargs
            )
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        loss = loss[0] if isinstance(loss, tuple) else loss  # as of reweighted wake-sleep
        return Step(torch_item(loss), seconds, self.counter.total - before)

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


class EvaluationCounter(Messenger):
    """Counts evaluations of a model, whether they are runs of their own or parts of one run.

    A run counts with the number of elements, left of the model's own plates, of the site that has
    the most: particles and enumerated values are such elements.

    Attributes:
        total: Evaluations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def count(self, call: Call) -> Call:
        """Return the programs; runs of the model, or of a guide that runs it, are counted."""
        if isinstance(call.guide, GuideMessenger):
            return replace(call, guide=configure_module(call.guide, self))
        if isinstance(call.model, nn.Module):  # estimators look at its signature and parameters
            return replace(call, model=configure_module(call.model, self))
        counted = functools.partial(self.run, call.model)
        return replace(call, model=functools.update_wrapper(counted, call.model))

    def run(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model once, and count."""
        self._elements = 1
        with self:
            result = program(*args, **kwargs)
        self.total += self._elements
        return result

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        fn: Any = msg["fn"]
        batch = list(fn.batch_shape)
        for frame in msg["cond_indep_stack"]:
            own = frame.vectorized and frame.name != PARTICLE_PLATE
            if own and frame.dim is not None and len(batch) >= -frame.dim:
                batch[frame.dim] = 1
        self._elements = max(self._elements, math.prod(batch))


def site_effects(
    replica: Replica, leaves: dict[str, Tensor], number: int, seed: int
) -> dict[str, Any]:
    r"""Repeat draws of the gradient with the noise of one site renewed.

    The noise of a site is every random number from the moment at which the guide arrives there to
    its arrival at the next one. With ``g`` and ``g'`` two gradients that share all noise but that
    of site ``s``,

    .. math:: T_s = \tfrac12 E \|g - g'\|^2 = E[\mathrm{tr\,Var}(g \mid \epsilon_{-s})]

    with :math:`\epsilon_{-s}` the noise of all others, is the variance that would be left if all
    other sites were held fixed, on average: the *total effect* of the site. What is random without
    being a site's, a minibatch say, is held fixed too. Effects add up to the whole variance if
    each site adds noise of its own, and to more where sites act together. Estimators and their
    state are the same in both gradients: that of ``replica``, which has taken a step before.

    References:
        Analysis of variance designs for model output (Jansen, 1999),
        https://doi.org/10.1016/S0010-4655(98)00154-4

    Returns:
        Coordinates: ``site``, ``parameter``, and the squared distances ``site_effect`` of dims
        ``site, repeat, parameter``.
    """
    restore = replica.save()
    base_seeds = seeds(seed, 2 * number)
    sites = list(replica.sites)
    effects = np.zeros((len(sites), number, len(leaves)))
    for repeat in range(number):
        base, renewed = base_seeds[2 * repeat : 2 * repeat + 2]
        read_gradients(leaves)
        gradients = _gradients(replica, leaves, base, {})
        for index, site in enumerate(sites):
            restore()
            other = _gradients(replica, leaves, base, {site: renewed})
            effects[index, repeat] = [
                float((one - two).double().square().sum()) / 2
                for one, two in zip(gradients, other, strict=True)
            ]
        restore()
    replica.on_site = None
    return {
        "site": sites,
        "parameter": list(leaves),
        "site_effect": (["site", "repeat", "parameter"], effects),
    }


def _gradients(
    replica: Replica, leaves: dict[str, Tensor], base: int, renewed: dict[str, int]
) -> list[Tensor]:
    """Take a gradient whose noise is seeded at the start and again at each arrival at a site."""
    visits: dict[str, int] = {}

    def arrive(name: str) -> None:
        visits[name] = visits.get(name, 0) + 1
        word = f"{renewed.get(name, base)}/{name}/{visits[name]}"
        seed_torch(zlib.crc32(word.encode()))

    replica.on_site = arrive
    seed_everything(base)
    replica.step()
    return [gradient.clone() for gradient in read_gradients(leaves)]
