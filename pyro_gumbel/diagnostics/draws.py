"""Draws of the gradient at fixed parameters, by several estimators."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.infer.elbo import ELBO
from pyro.infer.util import torch_item
from pyro.ops.jit import CompiledFunction
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gumbel._validate import (
    check_coords,
    check_estimators,
    check_programs,
    integer,
)
from pyro_gumbel.diagnostics._state import (
    EvaluationCounter,
    Params,
    Step,
    check_complete,
    find_parameters,
    preserved,
    read_gradients,
    seed_everything,
    seed_torch,
    seeds,
)
from pyro_gumbel.diagnostics._storage import Recorder, check_dims, check_names
from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.estimators.registry import NamedEstimators
from pyro_gumbel.infer import Estimator_ELBO, config_gradient
from pyro_gumbel.infer._operations import leaves as nested

__all__ = ["Replica", "gradient_draws"]

_SITE_SHARE = 0.05  # cost of site effects over that of the draws


def gradient_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    estimators: Mapping[str, Any],
    num_draws: int = 1000,
    num_chains: int = 4,
    num_warmup: int = 0,
    num_particles: int = 1,
    vectorize_particles: bool = False,
    params: Params = None,
    project: int | None = None,
    site_draws: int | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> dict[str, xr.Dataset]:
    r"""Draw the gradient of the loss many times at the same parameters, by several estimators.

    A draw is the gradient that one call of ``loss_and_grads`` adds to ``.grad``. It estimates the
    gradient of the loss, the negative ELBO, with respect to a parameter's *unconstrained* value,
    the one that an optimiser moves. Chains are independent: each has its own seed and its own copy
    of the estimator's state, such as a moving average. All estimators use the same seeds, which
    reduces the noise of their differences.

    Parameters and their gradients, the state of estimators and baselines, the parameter store and
    all random number generators are restored. Parameters that the programs have not made yet are
    made under ``seed``, and removed.

    Args:
        model: The model.
        guide: The guide.
        *args: Arguments of both.
        estimators: For each label a config for :func:`~pyro_gumbel.infer.config_gradient`, an
            ``ELBO`` (with the guide as it is), or a pair of the two.
        num_draws: Draws a chain.
        num_chains: Independent chains.
        num_warmup: Draws that each chain drops at its start, for a baseline to settle.
        num_particles: Particles of each draw, where the estimator is not an ``ELBO``.
        vectorize_particles: Whether these are evaluated in one run, likewise.
        params: Names of the parameters to record (shell patterns such as ``"encoder*"`` too), or a
            dict of values at which to take the gradient. Parameters that are not in the dict keep
            their values; all are recorded.
        project: For networks: instead of the draws, keep their inner products with this many fixed
            random directions, their norms and cosines with the mean, and the mean and variance of
            every coordinate. The memory for coordinates then does not grow with the number of
            draws.
        site_draws: Number of draws that are repeated with new noise at one site, for
            ``compare_gradients(by="site")``. Each takes one more gradient a site. The default adds
            5 % to the cost.
        coords: Coordinates of named dimensions.
        dims: For each parameter the names of its dimensions; else ``<name>_dim_0``, ...
        seed: Seed of all noise. On a CPU the same seed gives the same draws bit for bit, but for
            ``seconds``.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of model and guide.

    Returns:
        A Dataset for each label with one variable a parameter, of dims ``chain, draw`` and the
        parameter's own (with ``project`` instead ``direction``). Coordinates hold each draw's
        ``loss``, ``grad_norm``, ``seconds`` and ``evaluations`` of the model, and the parameter's
        unconstrained value, flattened, ``<name>.value``; attributes the label, configuration,
        particles, seed, device, and the medians of ``seconds`` and ``evaluations``. Where a
        parameter has one of these names, the other's has an underscore more.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If estimators, draws or parameters are missing, or the draws would take more
            than 4 GiB.

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.9))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))
        >>> draws = gradient_draws(
        ...     model, guide, estimators={"reinmax": "reinmax"}, num_draws=50, progress=False
        ... )
        >>> draws["reinmax"]["l"].dims
        ('chain', 'draw')
    """
    check_programs(model, guide)
    check_estimators(estimators)
    check_coords(coords)
    num_draws = integer("num_draws", num_draws, 1)
    num_chains = integer("num_chains", num_chains, 1)
    num_warmup = integer("num_warmup", num_warmup, 0)
    num_particles = integer("num_particles", num_particles, 1)
    project = None if project is None else integer("project", project, 1)
    site_draws = None if site_draws is None else integer("site_draws", site_draws, 0)
    first, *chain_seeds = seeds(seed, num_chains + 1)
    total = len(estimators) * num_chains * num_draws
    call = Call(model, guide, args, kwargs)

    def replica(choice: Any) -> Replica:
        return Replica(choice, call, num_particles, vectorize_particles)

    with preserved() as keep, tqdm(total=total, disable=not progress, unit="draw") as bar:
        seed_everything(first)
        leaves = find_parameters(call, keep, params)
        check_names(leaves)
        check_dims(dims, leaves)
        recorders, trials = {}, {}
        for label, choice in estimators.items():
            with _named(label):
                recorders[label] = Recorder(leaves, (num_chains, num_draws), dims, project)
                trials[label] = replica(choice)
                trials[label].step()  # what fails does so before the others are drawn
        for chain, chain_seed in enumerate(chain_seeds):
            # In turns: what slows the machine slows all alike.
            for label, choice in estimators.items():
                bar.set_description(label)
                seed_everything(chain_seed)
                with _named(label):
                    steps = _steps(replica(choice), leaves, num_warmup, num_draws)
                    for draw, step in enumerate(steps):
                        recorders[label].add(chain, draw, step, read_gradients(leaves))
                        bar.update()
                    check_complete(leaves, params)
        datasets = {}
        for label, trial in trials.items():
            dataset = recorders[label].dataset().assign_coords(dict(coords or {}))
            share = _SITE_SHARE * num_chains * num_draws / (len(trial.sites) + 1)
            number = round(share) if site_draws is None else site_draws
            if number:
                dataset = dataset.assign_coords(_site_effects(trial, leaves, number, first))
            datasets[label] = dataset.assign_attrs(
                estimator=label,
                config=repr(estimators[label]),
                num_particles=int(trial.elbo.num_particles),
                seed=int(seed),
            )
    return datasets


def _steps(
    replica: Replica, leaves: dict[str, Tensor], num_warmup: int, num_draws: int
) -> Iterator[Step]:
    for _ in range(num_warmup):
        replica.step()
    read_gradients(leaves)  # what earlier steps left
    for _ in range(num_draws):
        yield replica.step()


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Add the label of the estimator to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This was met with estimators[{label!r}].")
        raise


class Replica:
    """One independent copy of an estimator, with the state that the original had.

    ``choice`` is a config, an ``ELBO``, or a pair of the two; options of particles are for a
    config alone.
    """

    def __init__(
        self, choice: Any, call: Call, num_particles: int = 1, vectorize_particles: bool = False
    ) -> None:
        if isinstance(choice, ELBO):
            choice = (None, choice)
        elif not isinstance(choice, tuple):
            elbo = Estimator_ELBO(num_particles, vectorize_particles=vectorize_particles)
            choice = (choice, elbo)
        if len(choice) != 2 or not isinstance(choice[1], ELBO):
            raise TypeError(
                "estimators: a pair must be (config, ELBO), such as (ReinMax(), "
                f"Estimator_ELBO(num_particles=4)); got {choice!r}."
            )
        config, elbo = choice
        # A copy of all that it holds, except the programs and what is compiled of them.
        compiled = [value for value in vars(elbo).values() if isinstance(value, CompiledFunction)]
        shared = [call.model, call.guide, *compiled]
        self.elbo = copy.deepcopy(elbo, {id(value): value for value in shared})
        self.call = call
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
        held = [own for _, own in self._copies.values()]
        for value in nested(vars(self.elbo)):
            made = value.made() if isinstance(value, NamedEstimators) else {"": value}
            held += [estimator for estimator in made.values() if isinstance(estimator, Estimator)]
        states = [(estimator, copy.deepcopy(estimator.state_dict())) for estimator in held]

        def restore() -> None:
            for estimator, state in states:
                estimator.load_state_dict(copy.deepcopy(state))

        return restore

    def _replace(self, msg: Any) -> Any:
        self.sites[msg["name"]] = None
        if self.on_site is not None:
            self.on_site(msg["name"])
        chosen = (msg["infer"] or {}).get("gradient")
        if not isinstance(chosen, Estimator):
            return chosen
        if id(chosen) not in self._copies:
            # The original is kept beside its copy, so that its id stays its own.
            self._copies[id(chosen)] = (chosen, copy.deepcopy(chosen))
        return self._copies[id(chosen)][1]


def _site_effects(
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
