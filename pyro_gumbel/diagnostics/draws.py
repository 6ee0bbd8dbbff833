"""Draws of the gradient at fixed parameters, by several estimators."""

from __future__ import annotations

import datetime
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gumbel._validate import (
    check_coords,
    check_dims,
    check_estimators,
    check_names,
    check_programs,
    integer,
)
from pyro_gumbel.diagnostics._moments import BATCH, SPREAD, Moments, dims_of, free_name
from pyro_gumbel.diagnostics._state import (
    Params,
    Replica,
    Step,
    check_complete,
    find_parameters,
    preserved,
    read_gradients,
    seed_everything,
    seed_torch,
    seeds,
)
from pyro_gumbel.estimators import Call

__all__ = ["gradient_draws"]

_SITE_SHARE = 0.05  # cost of site effects over that of the draws
_MAX_BYTES = 4 * 2**30


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

    Parameters, gradients, the state of estimators, the parameter store and all random number
    generators are restored. Parameters that do not exist yet are made under ``seed``, and removed.

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
            random directions, their norms and cosines with the mean of the others so far, and the
            mean and variance of every coordinate.
        site_draws: Number of draws that are repeated with new noise at one site, for
            ``compare_gradients(by="site")``, a gradient a site each. The default adds 5 % of cost.
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
        unconstrained value, flattened, ``<name>.value`` (with an underscore more where a parameter
        has that name); attributes the label, configuration, particles, seed, device, and the
        medians of ``seconds`` and ``evaluations``.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If estimators, draws or parameters are missing, or the draws would take more
            than 4 GiB.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))
        >>> draws = gradient_draws(model, guide, estimators={"r": "reinmax"}, num_draws=50)
        >>> draws["r"]["l"].dims
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
                recorders[label] = _Recorder(leaves, (num_chains, num_draws), dims, project)
                trials[label] = replica(choice)
                trials[label].step()  # what fails does so before the others are drawn
        for chain_seed in chain_seeds:
            # In turns: what slows the machine slows all alike.
            for label, choice in estimators.items():
                bar.set_description(label)
                seed_everything(chain_seed)
                with _named(label):
                    own = replica(choice)
                    for _ in range(num_warmup):
                        own.step()
                    read_gradients(leaves)  # what earlier steps left
                    for _ in range(num_draws):
                        step = own.step()
                        recorders[label].add(step, read_gradients(leaves))
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


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Add the label of the estimator to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This was met with estimators[{label!r}].")
        raise


class _Recorder:
    """Takes in the gradients of one estimator, in batches.

    It keeps each coordinate of each draw, in the parameter's own precision; or, with ``project``,
    inner products with a few random directions, cosines and moments.
    """

    def __init__(
        self,
        leaves: dict[str, Tensor],
        shape: tuple[int, int],
        dims: dict[str, list[str]] | None,
        project: int | None,
    ) -> None:
        self.leaves, self.shape, self.project = leaves, shape, project
        self.dims = {n: dims_of(n, leaf.dim(), dims, leaves) for n, leaf in leaves.items()}
        size = math.prod(shape) * sum(leaf.nbytes for leaf in leaves.values())
        if project is None and size > _MAX_BYTES:
            raise ValueError(
                f"{shape[0]} x {shape[1]} draws of {list(leaves)} take {size / 2**30:.1f} GiB. "
                "Keep projections and moments instead, project=8, or name the parameters to "
                "record, params=[...]."
            )
        self._steps: list[Step] = []
        self._rows: list[Tensor] = []  # of the batch
        self._moments = Moments([leaf.numel() for leaf in leaves.values()])
        self._cosines: list[np.ndarray] = []
        self._kept, self._directions = {}, []
        generator = torch.Generator().manual_seed(0)  # the same directions in every call
        for name, leaf in leaves.items():
            own, dtype = leaf.shape, _numpy(leaf.new_empty(0)).dtype
            if project is not None:
                own, dtype = torch.Size([project]), np.dtype(float)
                random = torch.randn(leaf.numel(), project, generator=generator)
                self._directions.append(torch.nn.functional.normalize(random, dim=0).to(leaf))
            self._kept[name] = np.empty((math.prod(shape), *own), dtype)

    def add(self, step: Step, gradients: list[Tensor]) -> None:
        """Take in the next draw."""
        self._steps.append(step)
        device = gradients[0].device
        self._rows.append(torch.cat([gradient.flatten().to(device) for gradient in gradients]))
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        rows = torch.stack(self._rows)
        self._cosines.append(self._moments.update(rows).cpu().numpy())
        pieces = rows.split(self._moments.sizes, 1)
        if self.project is not None:
            pieces = [one @ own.to(one) for one, own in zip(pieces, self._directions, strict=True)]
        taken = slice(len(self._steps) - len(rows), len(self._steps))
        for array, piece in zip(self._kept.values(), pieces, strict=True):
            array[taken] = _numpy(piece).reshape(array[taken].shape)
        self._rows.clear()

    def dataset(self) -> xr.Dataset:
        """Label the draws, and what was noted beside them."""
        if self._rows:
            self._flush()
        each, leaves = ("chain", "draw"), self.leaves
        by_leaf = self._moments.norms.reshape(*self.shape, -1)
        steps = np.array(self._steps, float).reshape(*self.shape, -1)
        coords: dict[str, Any] = {
            "chain": np.arange(self.shape[0]),
            "draw": np.arange(self.shape[1]),
            "grad_norm": (each, np.linalg.norm(by_leaf, axis=-1)),
            **{name: (each, steps[..., i]) for i, name in enumerate(Step._fields)},
        }
        for name, leaf in leaves.items():
            # Values have a dimension of their own: a coordinate that only some of the variables
            # have stands in the way of stacking them, which ArviZ does.
            value = leaf.detach().double().flatten().cpu().clone().numpy()
            index = free_name(f"{name}.index", leaves)
            coords[free_name(f"{name}.value", leaves)] = ([index], value)
        attrs, dims = self._attributes(steps), self.dims
        if self.project is not None:
            dims = dict.fromkeys(leaves, ["direction"])
            coords["cosine"] = (each, np.concatenate(self._cosines).reshape(self.shape))
            coords |= {
                "parameter": list(leaves),
                "parameter_norm": ([*each, "parameter"], by_leaf),
            }
            coords |= self._summary()
            attrs |= {"project": self.project, "moments_of": len(self._steps)}
        data = {
            name: ([*each, *dims[name]], kept.reshape(*self.shape, *kept.shape[1:]))
            for name, kept in self._kept.items()
        }
        return xr.Dataset(data, coords, attrs)

    def _summary(self) -> dict[str, Any]:
        columns = zip(SPREAD, self._moments.spreads().T, strict=True)
        coords: dict[str, Any] = {"block": [*self.leaves, "all"]}
        coords |= {name: (["block"], column) for name, column in columns}
        for statistic in ("mean", "variance"):
            pieces = getattr(self._moments, statistic).cpu().split(self._moments.sizes)
            for (name, leaf), piece in zip(self.leaves.items(), pieces, strict=True):
                label = free_name(f"{name}.{statistic}", self.leaves)
                coords[label] = (self.dims[name], piece.reshape(leaf.shape).numpy())
        return coords

    def _attributes(self, steps: np.ndarray) -> dict[str, Any]:
        leaves = self.leaves.values()
        coarsest = max((leaf.dtype for leaf in leaves), key=lambda dtype: torch.finfo(dtype).eps)
        _, seconds, evaluations = np.moveaxis(steps, -1, 0)
        # The median's standard deviation, from the median absolute deviation of normal draws: the
        # machine's pauses count for nothing.
        deviation = stats.median_abs_deviation(seconds, axis=None, scale="normal")
        return {
            "gradient_of": "loss (negative ELBO), by unconstrained parameters",
            "device": str(next(iter(leaves)).device),
            "dtype": str(coarsest).removeprefix("torch."),  # the precision of the gradients
            "seconds": float(np.median(seconds)),
            "seconds_mcse": float(1.2533 * deviation / np.sqrt(seconds.size)),
            "evaluations": int(np.percentile(evaluations, 50, method="lower")),
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        }


def _numpy(tensor: Tensor) -> np.ndarray:
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if half else tensor).cpu().numpy()


def _site_effects(
    replica: Replica, leaves: dict[str, Tensor], number: int, seed: int
) -> dict[str, Any]:
    r"""Repeat draws of the gradient with the noise of one site renewed.

    The noise of a site is every random number from the moment at which the guide arrives there to
    its arrival at the next one. With ``g`` and ``g'`` two gradients that share all noise but that
    of a site, the mean of :math:`\tfrac12 \|g - g'\|^2` is the variance that is left if all
    other sites are held fixed: the *total effect* of the site (Jansen, 1999,
    https://doi.org/10.1016/S0010-4655(98)00154-4). Other noise, as of a minibatch, is held fixed.
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
