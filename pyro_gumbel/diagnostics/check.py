"""Checks: of an estimator, whether it is unbiased; of a fitted guide, how far it is off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_gumbel._arviz import tail_khat
from pyro_gumbel._validate import check_programs, integer, positive
from pyro_gumbel.diagnostics._moments import (
    Block,
    blocks_of,
    check_reference,
    own_array,
    parameters_of,
    reference_blocks,
    rounding_of,
)
from pyro_gumbel.diagnostics._programs import run
from pyro_gumbel.diagnostics._state import Params, preserved, seed_everything, seeds
from pyro_gumbel.diagnostics.compare import rare_events
from pyro_gumbel.diagnostics.draws import gradient_draws
from pyro_gumbel.diagnostics.exact import exact_gradient
from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._costs import site_frames
from pyro_gumbel.infer._run import Run
from pyro_gumbel.infer._sampling import SharedSubsample, left_filled

__all__ = ["UnbiasedCheck", "check_unbiased", "guide_khat"]

_COARSE = 0.1
_EQUAL = 0.01  # log weights closer than that are equal: rounding in float32 comes near it


class UnbiasedCheck(NamedTuple):
    """The result of a check that passed.

    Attributes:
        coordinate: The coordinate farthest from the reference, ``name[i, j]``.
        z: Its distance in standard errors.
        resolution: The standard error of the mean gradient over the reference's norm. A much
            smaller bias is not visible.
        num_draws: Number of draws.
    """

    coordinate: str
    z: float
    resolution: float
    num_draws: int


def check_unbiased(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    estimator: Any,
    num_draws: int = 4000,
    num_particles: int | None = None,
    vectorize_particles: bool = False,
    reference: xr.Dataset | None = None,
    params: Params = None,
    max_z: float = 5.0,
    max_states: int = 100_000,
    seed: int = 0,
    progress: bool = False,
    **kwargs: Any,
) -> UnbiasedCheck:
    r"""Check that an estimator's mean gradient is the exact one.

    The mean of each coordinate is compared with its exact value, in standard errors of the mean.
    The variance of a coordinate counts as at least a hundredth of its parameter's mean variance,
    since the estimate may rest on few events. A rare event that no draw met may still look like a
    bias (see :func:`compare_gradients`): the error mentions it where that is likely.

    Args:
        model: The model.
        guide: The guide.
        *args: Arguments of both.
        estimator: A config for :func:`~pyro_gumbel.infer.config_gradient`, an ``ELBO``, or a pair
            of the two.
        num_draws: Draws in all.
        num_particles: Particles of each; by default as many as the estimator needs.
        vectorize_particles: Whether they are evaluated in one run.
        reference: The exact gradient, or draws of an unbiased estimator; by default
            :func:`exact_gradient` computes it.
        params: As in :func:`gradient_draws`.
        max_z: The distance in standard errors above which the check fails.
        max_states: As in :func:`exact_gradient`.
        seed: Seed of the draws.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of both programs.

    Returns:
        The worst coordinate, its ``z``, and the resolution. Above 10 % it gives a warning.

    Raises:
        AssertionError: If a coordinate is off by more than ``max_z``: names the worst, its ``z``,
            and the number of draws needed to see it.
        TypeError: If an argument is of another kind.
        ValueError: If there are fewer than two draws, or the reference does not fit.

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))
        >>> check_unbiased(model, guide, estimator="score", num_draws=2000).z < 5
        True
    """
    num_draws = integer("check_unbiased: num_draws", num_draws, 2)
    max_z = positive("check_unbiased: max_z", max_z)
    if num_particles is None:
        choices = estimator.values() if isinstance(estimator, dict) else [estimator]
        num_particles = max((getattr(own, "min_particles", 1) for own in choices), default=1)
    if reference is None:
        reference = exact_gradient(
            model, guide, *args, params=params, max_states=max_states, seed=seed, **kwargs
        )
    check_reference(reference)
    draws = gradient_draws(
        model,
        guide,
        *args,
        estimators={"estimator": estimator},
        num_draws=num_draws,
        num_chains=1,
        num_particles=num_particles,
        vectorize_particles=vectorize_particles,
        params=params,
        project=1,
        site_draws=0,
        seed=seed,
        progress=progress,
        **kwargs,
    )["estimator"]
    return _judge(draws, reference, num_draws, max_z)


def _judge(
    draws: xr.Dataset, reference: xr.Dataset, num_draws: int, max_z: float
) -> UnbiasedCheck:
    blocks, others = blocks_of(draws), reference_blocks(reference, draws)
    z, name, index, squared_error = -1.0, "", 0, 0.0
    for each in parameters_of(draws):
        block, other = blocks[each], others[each]
        if not block.mean.size:
            continue
        variance = np.maximum(block.variance, block.variance.mean() / 100) / block.count
        variance = variance + other.variance / other.count
        squared_error += float(variance.sum())
        zs = _distances(block.mean, other.mean, variance, draws)
        if zs.max() > z:
            z, name, index = float(zs.max()), each, int(zs.argmax())
    at = np.unravel_index(index, own_array(draws, name).shape) if name else ()
    coordinate = f"{name}{list(map(int, at)) if at else ''}"
    if z > max_z:
        mean, exact = blocks[name].mean[index], others[name].mean[index]
        raise AssertionError(_explain_bias(coordinate, blocks[name], mean, exact, z, max_z))
    length = float(np.linalg.norm(others["all"].mean))
    resolution = math.sqrt(squared_error) / length if length else math.inf
    if resolution > _COARSE:
        needed = math.ceil(num_draws * (resolution / _COARSE) ** 2) if length else num_draws
        warnings.warn(
            f"check_unbiased: the mean gradient is known to {resolution:.0%} of the exact one's "
            f"norm only, so a smaller bias goes unseen; num_draws={needed:,} would show 10 %.",
            stacklevel=3,
        )
    return UnbiasedCheck(coordinate, z, resolution, num_draws)


def _distances(
    mean: np.ndarray, exact: np.ndarray, variance: np.ndarray, draws: xr.Dataset
) -> np.ndarray:
    """The distance of each coordinate from its exact value, in standard errors."""
    rounding = rounding_of(draws, np.abs(exact) + np.abs(exact).max())
    error, distance = np.sqrt(variance + rounding**2), np.abs(mean - exact)
    z = np.divide(distance, error, out=np.zeros_like(error), where=distance != 0)
    return np.where(np.isfinite(distance) & np.isfinite(error), z, np.inf)


def _explain_bias(
    coordinate: str, block: Block, mean: float, exact: float, z: float, max_z: float
) -> str:
    number, doubt = block.count, rare_events(block)
    text = f"at {coordinate} the mean of {number:,} draws is {mean:.6g}"
    if math.isinf(z):
        return f"no estimate: {text}. Look at gradient_draws(...) for draws that are not finite."
    needed = max(math.ceil(number * (max_z / z) ** 2), 2)
    return (
        f"biased: {text}, the exact gradient {exact:.6g}, {z:.1f} standard errors apart; about "
        f"{needed:,} draws are enough to see it."
    ) + (f" Or it is {doubt}." if doubt else "")


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
        ``nan`` where the largest weights have fewer than ten values (few states have no tail).

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
        with keep:
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
    frames = [(term, frame) for term in found.terms for frame in term.frames]
    rows = []
    for term, frame in frames:
        if frame.name == plate:
            value = left_filled(term.value, -frame.dim).movedim(frame.dim, 0)
            rows.append(value.reshape(frame.size, -1).double().sum(1))
    if not rows:
        plates = sorted({frame.name for _, frame in frames})
        raise ValueError(f"guide_khat: no plate is called {plate!r}; there are {plates}.")
    return torch.stack(rows).sum(0)
