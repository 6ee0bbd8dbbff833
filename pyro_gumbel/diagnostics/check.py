"""Is an estimator unbiased: a test to be run by whoever writes one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from pyro_gumbel.diagnostics._arguments import integer, positive
from pyro_gumbel.diagnostics._parameters import Params
from pyro_gumbel.diagnostics._rare import doubt
from pyro_gumbel.diagnostics._recorder import statistic
from pyro_gumbel.diagnostics._tables import (
    blocks_of,
    check_reference,
    is_drawn,
    parameters_of,
    rounding_of,
)
from pyro_gumbel.diagnostics.draws import gradient_draws
from pyro_gumbel.diagnostics.exact import exact_gradient

__all__ = ["UnbiasedCheck", "check_unbiased"]

_COARSE = 0.1


class UnbiasedCheck(NamedTuple):
    """What a check that was passed found.

    Attributes:
        coordinate: The coordinate farthest from the reference, ``name[i, j]``.
        z: Its distance in standard errors.
        resolution: The standard error of the mean gradient over the reference's norm: a bias well
            below it goes unseen.
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
    A coordinate with much less variance than the rest of its parameter is judged by a hundredth
    of their mean variance at least, since its own estimate may rest on few events. An event that
    no draw meets may still pass for a bias (:func:`compare_gradients` has the numbers); the error
    says so where fewer than ten draws carry a parameter's variance.

    Args:
        model: The model.
        guide: The guide.
        *args: Arguments of both.
        estimator: What :func:`~pyro_gumbel.infer.config_gradient` takes, an ``ELBO``, or a pair.
        num_draws: Draws in all.
        num_particles: Particles of each; by default as many as the estimator needs.
        vectorize_particles: Whether they are rows of one run.
        reference: The exact gradient where it is known, or draws of an unbiased estimator; by
            default it is computed by :func:`exact_gradient`.
        params: As in :func:`gradient_draws`.
        max_z: The distance in standard errors from which on there is a bias.
        max_states: As in :func:`exact_gradient`.
        seed: Seed of the draws.
        progress: Show a progress bar.
        **kwargs: Keyword arguments of both programs.

    Returns:
        The worst coordinate, its ``z``, and how small a bias could have been seen. A coarse check,
        with a resolution above 10 %, warns.

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
        >>> found = check_unbiased(model, guide, estimator="score", num_draws=2000)
        >>> found.z < 5
        True
    """
    num_draws = integer("check_unbiased: num_draws", num_draws, 2)
    max_z = positive("check_unbiased: max_z", max_z)
    num_particles = _particles(estimator) if num_particles is None else num_particles
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


def _particles(estimator: Any) -> int:
    choices = estimator.values() if isinstance(estimator, dict) else [estimator]
    return max((getattr(choice, "min_particles", 1) for choice in choices), default=1)


def _judge(
    draws: xr.Dataset, reference: xr.Dataset, num_draws: int, max_z: float
) -> UnbiasedCheck:
    worst, coordinate, message = -1.0, "", ""
    errors, length = 0.0, 0.0
    for name in parameters_of(draws):
        if not statistic(draws, name, "mean").size:
            continue  # nothing to compare
        mean = statistic(draws, name, "mean").values
        exact, reference_error = _reference(reference, name, mean.shape)
        variance = statistic(draws, name, "variance").values
        variance = np.maximum(variance, variance.mean() / 100) / num_draws + reference_error
        rounding = rounding_of(draws, np.abs(exact) + np.abs(exact).max())
        error = np.sqrt(variance + rounding**2)
        distance = np.abs(mean - exact)
        z = np.divide(distance, error, out=np.zeros_like(error), where=distance != 0)
        z = np.where(np.isfinite(distance) & np.isfinite(error), z, np.inf)
        index = np.unravel_index(int(np.argmax(z)), z.shape)
        errors += float(variance.sum())
        length += float((exact**2).sum())
        if z[index] > worst:
            worst = float(z[index])
            coordinate = f"{name}{list(map(int, index)) if index else ''}"
            needed = max(math.ceil(num_draws * (max_z / worst) ** 2), 2) if worst > 0 else 0
            message = (
                f"biased: at {coordinate} the mean of {num_draws:,} draws is {mean[index]:.6g}, "
                f"the exact gradient {exact[index]:.6g}, {worst:.1f} standard errors apart; about "
                f"{needed:,} draws are enough to see it."
            )
            doubtful = doubt(blocks_of(draws, [name])[name])
            message += f" Or it is {doubtful}." if doubtful else ""
            if math.isinf(worst):
                message = (
                    f"no estimate: at {coordinate} the mean of {num_draws:,} draws is "
                    f"{mean[index]:.6g}. Look at gradient_draws(...) for the draws that are not "
                    "finite."
                )
    if worst > max_z:
        raise AssertionError(message)
    resolution = math.sqrt(errors / length) if length else math.inf
    if resolution > _COARSE:
        needed = math.ceil(num_draws * (resolution / _COARSE) ** 2) if length else num_draws
        warnings.warn(
            f"check_unbiased: the mean gradient is known to {resolution:.0%} of the exact one's "
            f"norm only, so a smaller bias goes unseen; num_draws={needed:,} would tell 10 %.",
            stacklevel=3,
        )
    return UnbiasedCheck(coordinate, worst, resolution, num_draws)


def _reference(
    reference: xr.Dataset, name: str, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | float]:
    """The value of a reference and the variance of its mean."""
    if name not in reference:
        raise ValueError(
            f"reference has no parameter {name!r}; it has {parameters_of(reference)}."
        )
    error: np.ndarray | float = 0.0
    if not is_drawn(reference):
        value = reference[name].values
    elif "project" in reference.attrs:
        value = statistic(reference, name, "mean").values
        count = reference.sizes["chain"] * reference.sizes["draw"]
        error = statistic(reference, name, "variance").values / count
    else:
        array = reference[name].astype(float)
        value = array.mean(("chain", "draw")).values
        count = reference.sizes["chain"] * reference.sizes["draw"]
        error = array.var(("chain", "draw"), ddof=1).values / count
    if not np.isfinite(value).all():
        raise ValueError(f"reference is not finite at parameter {name!r}.")
    if value.shape != shape:
        raise ValueError(
            f"reference has shape {value.shape} at parameter {name!r}; the draws have {shape}."
        )
    return value.astype(float), error
