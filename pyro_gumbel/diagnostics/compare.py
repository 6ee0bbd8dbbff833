"""The table that compares estimators: bias, variance, cost."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from scipy import special, stats

from pyro_gumbel._arviz import folded_rhat, pareto_khat
from pyro_gumbel.diagnostics._moments import (
    Block,
    blocks_of,
    check_draws,
    reference_blocks,
    rounding_of,
)

__all__ = ["compare_gradients", "rare_events"]

_HEAVY = 0.7
_TAIL_DRAWS = 200  # fewer have too short a tail
_MOVING = 1.01
# Draws that met an event. With ten or more, a bias_z above 5 without bias has a probability below
# 1 in 4000, whatever the probability of the event; with none, it is likely for rare events.
_FEWEST = 10
_VISIBLE = 5.0
_GROUPINGS = ("parameter", "coordinate", "site")
_COLUMNS = (
    "bias bias_mcse bias_z relative_bias variance variance_mcse relative_std mse mse_mcse snr "
    "snr_mcse cosine cosine_mcse khat seconds seconds_mcse evaluations efficiency efficiency_mcse "
    "warning"
)


def compare_gradients(
    draws: Any, reference: Any = None, *, by: str | None = None, rhat: bool = False
) -> pd.DataFrame:
    r"""Compare estimators by the gradients drawn with them.

    With ``g`` one draw of the gradient as one long vector, ``N`` the number of draws,
    :math:`\bar g` their mean, :math:`\Sigma` the covariance of one draw and :math:`g^*` the
    reference:

    * ``bias``: :math:`\|\bar g - g^*\|`. It is positive even without bias, because of noise, and
      then exceeds 1.96 times ``bias_mcse`` in 5 % of repetitions.
    * ``bias_z``: the normal's two-sided quantile for the probability that noise alone goes as far:
      the smallest of the probabilities of the whole gradient and of each parameter, corrected for
      their number. Above 5 the estimator is biased, unless rare events were missed (below). With
      bias it grows with ``N``.
    * ``relative_bias``: ``bias`` over :math:`\|g^*\|`.
    * ``variance``: :math:`\mathrm{tr}\,\Sigma`, the sum of the coordinates' sample variances.
    * ``relative_std``: its root over :math:`\|g^*\|`, or :math:`\|\bar g\|` without a reference.
    * ``mse``: of one draw, variance plus squared bias, the latter without what noise adds to it.
    * ``snr``: :math:`\|E g\| / \sqrt{\mathrm{tr}\,\Sigma}`, likewise corrected.
    * ``cosine``: of :math:`\bar g` with :math:`g^*`.
    * ``khat``: the Pareto shape of the tail of :math:`\|g\|`. Above 1/2 the variance is infinite,
      and above 0.7 its estimate is useless; ``nan`` if the largest are of fewer than ten sizes.
    * ``seconds`` and ``evaluations`` of the model, a draw.
    * ``efficiency``: 1 over variance times seconds, the precision per second.
    * ``warning``: notes in words.

    A rare event that no draw met is missing from the mean and from the variance, so that it looks
    like a bias. If fewer than ten draws carry the variance, ``warning`` mentions this. With more
    than about ``15 / p`` draws, missing an event of probability ``p`` is less likely than a
    ``bias_z`` of 5 by chance. With more draws, ``bias`` stays only if it is the estimator's.

    Monte Carlo standard errors stand beside the columns (``*_mcse``). Rows are sorted by ``mse``,
    or without a reference by ``variance``; columns that need a reference are then ``nan``.

    Args:
        draws: What :func:`gradient_draws` returns (dicts of several calls may be merged, ``a |
            b``), or any dict of Datasets with dims ``chain, draw, ...``.
        reference: What :func:`exact_gradient` returns; or draws of an unbiased estimator with
            another seed, whose standard errors are taken into account; or the label of such an
            estimator among ``draws``.
        by: ``"parameter"`` or ``"coordinate"`` for a row for each of these; ``"site"`` for the
            contribution of each site's sampling: ``variance``, half the mean squared distance of
            two gradients that share all noise except the site's (``site_draws`` pairs), and
            ``share`` of the total. Shares add up to more than one if sites interact.
        rhat: Add the column ``rhat``, the folded split R-hat of the gradient's norm. Above 1.01
            the draws are not exchangeable, for example because a baseline is still moving.

    Returns:
        One row an estimator, or with ``by`` an estimator and a parameter, coordinate or site.

    Raises:
        TypeError: If draws or reference are of another kind.
        ValueError: If draws are missing, too few, or of different parameters; if the reference has
            other parameters or shapes; if ``by`` or R-hat is unknown or needs other draws.

    Example:
        >>> noisy = np.random.default_rng(0).normal(size=(4, 500))
        >>> draws = {"noisy": xr.Dataset({"l": (("chain", "draw"), noisy)})}
        >>> table = compare_gradients(draws, xr.Dataset({"l": 0.0}))
        >>> bool(np.isclose(table.loc["noisy", "variance"], noisy.var(ddof=1)))
        True
    """
    draws = check_draws(draws)
    if isinstance(reference, str):
        if reference not in draws:
            raise ValueError(f"reference: no draws are labelled {reference!r}: {list(draws)}.")
        reference = draws[reference]
    if by is not None and by not in _GROUPINGS:
        raise ValueError(f"by must be one of {_GROUPINGS} or None; got {by!r}.")
    if by == "site":
        return _site_table(draws)
    rows: dict[Any, dict[str, Any]] = {}
    for label, dataset in draws.items():
        own = None if reference is dataset else reference
        for part, row in _rows(label, dataset, own, by, rhat=rhat).items():
            rows[(label, part) if by else label] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    if by:
        table.index = pd.MultiIndex.from_tuples(rows, names=["estimator", by])
        return table
    table.index.name = "estimator"
    return table.sort_values("variance" if reference is None else "mse", kind="stable")


def _rows(
    label: str, dataset: xr.Dataset, reference: xr.Dataset | None, by: str | None, *, rhat: bool
) -> dict[str, dict[str, Any]]:
    each = by == "coordinate"
    blocks = blocks_of(dataset, each=each)
    names = [part for part in blocks if part != "all"]
    others = None if reference is None else reference_blocks(reference, dataset, each=each)
    rows = {}
    for part in names if by else ["all"]:
        row, biased = _row(blocks[part], dataset), ""
        if others is not None:
            # A part of the gradient is rounded like the whole, however small it is.
            rounding = float(rounding_of(dataset, np.linalg.norm(others["all"].mean)))
            tested = [part] if by or len(names) == 1 else ["all", *names]
            biases = {name: bias_of(blocks[name], others[name], rounding) for name in tested}
            row |= _against(blocks[part], others[part], biases)
            biased = _biased(row["bias_z"], biases, blocks)
        notes = [*_tail_notes(row["khat"], blocks[part].norms), biased]
        if rhat:
            row["rhat"] = _rhat(label, blocks[part].norms)
            if row["rhat"] > _MOVING:
                moving = f"not exchangeable (rhat {row['rhat']:.3f}): is a baseline moving?"
                notes.append(moving)
        rows[part] = row | {"warning": "; ".join(note for note in notes if note)}
    return rows


def _row(block: Block, dataset: xr.Dataset) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_COLUMNS.split(), math.nan)
    row["variance"], row["variance_mcse"] = block.trace, math.sqrt(block.trace_variance)
    length = float(np.linalg.norm(block.mean))
    row["relative_std"] = math.sqrt(block.trace) / length if length else math.nan
    row["snr"], row["snr_mcse"] = _snr(block)
    row["khat"] = pareto_khat(block.norms.reshape(-1))
    for name in ("seconds", "seconds_mcse", "evaluations"):
        row[name] = float(dataset.attrs.get(name, math.nan))
    return row | _efficiency(row)


def _efficiency(row: dict[str, Any]) -> dict[str, float]:
    if 0 in (row["variance"], row["seconds"]):  # though the other may not be known
        return {"efficiency": math.inf, "efficiency_mcse": math.nan}
    cost = row["variance"] * row["seconds"]
    relative = (row["variance_mcse"] / row["variance"]) ** 2
    relative += (row["seconds_mcse"] / row["seconds"]) ** 2
    return {"efficiency": 1 / cost, "efficiency_mcse": math.sqrt(relative) / cost}


class Bias(NamedTuple):
    """The distance of a mean gradient from its reference, compared with noise."""

    norm: float  # the distance
    squared: float  # its square less the average contribution of noise; it may be negative
    mcse: float  # without bias, norm is below 1.96 times this in 95 % of repetitions
    log_tail: float  # the log of the probability of a larger distance without bias
    squared_mcse: float


def bias_of(block: Block, reference: Block, floor: float) -> Bias:
    r"""Judge the difference of two means by the scatter of the draws behind them.

    Without bias the squared distance is a weighted sum of :math:`\chi^2` variables with mean
    :math:`\mathrm{tr}\,\Sigma / N` and variance :math:`2\,\mathrm{tr}\,\Sigma^2 / N^2`. It is
    taken for the multiple of one :math:`\chi^2` that has the same two moments (Satterthwaite,
    1946). In one dimension the standard error and the probability are the usual ones.

    ``floor`` is the distance that rounding may cause.
    """
    difference = block.mean - reference.mean
    squared_norm = float(difference @ difference)
    mean = block.trace / block.count + reference.trace / reference.count
    # Covariances of two independent means add; twice the trace of their product is at most the
    # product of the roots.
    deviations = (math.sqrt(2 * each.square_trace) / each.count for each in (block, reference))
    variance = sum(deviations) ** 2
    noise, noise_variance = mean + floor**2, variance + 2 * floor**4
    scale = noise_variance / (2 * noise) if noise else 0.0
    freedom = noise / scale if scale else 1.0
    norm = math.sqrt(squared_norm)
    squared = squared_norm - mean
    largest = math.sqrt(variance / 2)  # no direction has more variance
    squared_mcse = math.sqrt(4 * max(squared, 0.0) * largest + variance)
    if not scale:
        return Bias(norm, squared, 0.0, -math.inf if norm else 0.0, squared_mcse)
    mcse = math.sqrt(scale * stats.chi2.ppf(0.95, freedom)) / stats.norm.ppf(0.975)
    return Bias(norm, squared, mcse, _log_tail(squared_norm / scale, freedom), squared_mcse)


def _log_tail(value: float, freedom: float) -> float:
    """The log of the probability that a chi-squared variable is larger."""
    log_tail = stats.chi2.logsf(value, freedom)
    if not np.isfinite(log_tail) or log_tail < -600:  # underflow: the tail's leading term
        half = freedom / 2
        log_tail = (half - 1) * math.log(value / 2) - value / 2 - special.gammaln(half)
    return min(float(log_tail), 0.0)


def two_sided_z(log_tails: list[float]) -> float:
    """The normal's two-sided quantile at the smallest of several probabilities.

    It is corrected for their number (Bonferroni). NaN if one of them is.
    """
    if any(math.isnan(log_tail) for log_tail in log_tails):
        return math.nan
    log_tail = min(min(log_tails) + math.log(len(log_tails)), 0.0)
    return max(0.0, -float(special.ndtri_exp(log_tail - math.log(2))))


def _snr(block: Block) -> tuple[float, float]:
    """The norm of the mean over the root of the total variance, and its standard error."""
    signal = float(block.mean @ block.mean) - block.trace / block.count
    if block.trace <= 0:
        return (math.inf if signal > 0 else math.nan), math.nan
    if signal <= 0:
        return 0.0, math.sqrt(math.sqrt(2 * block.square_trace) / block.count / block.trace)
    ratio = math.sqrt(signal / block.trace)
    largest = math.sqrt(block.square_trace)
    signal_variance = 4 * signal * largest / block.count + 2 * block.square_trace / block.count**2
    relative = signal_variance / signal**2 + block.trace_variance / block.trace**2
    return ratio, ratio * math.sqrt(relative) / 2


def _cosine(block: Block, reference: Block) -> tuple[float, float]:
    """The cosine of the mean with the reference, and its standard error."""
    mean, exact = block.mean, reference.mean
    norms = float(np.linalg.norm(mean) * np.linalg.norm(exact))
    if norms == 0:
        return math.nan, math.nan
    cosine = float(np.clip(mean @ exact / norms, -1, 1))
    length = float(mean @ mean)
    across = math.sqrt(block.square_trace) / block.count / length
    away = block.trace / block.count / length / 2
    return cosine, math.sqrt((1 - cosine**2) * across + away**2)


def _against(block: Block, reference: Block, biases: dict[str, Bias]) -> dict[str, float]:
    bias = next(iter(biases.values()))
    length = float(np.linalg.norm(reference.mean))
    cosine, cosine_mcse = _cosine(block, reference)
    return {
        "bias": bias.norm,
        "bias_mcse": bias.mcse,
        "bias_z": two_sided_z([bias.log_tail for bias in biases.values()]),
        "relative_bias": bias.norm / length if length else math.nan,
        "relative_std": math.sqrt(block.trace) / length if length else math.nan,
        "mse": block.trace + max(bias.squared, 0.0),
        "mse_mcse": math.hypot(math.sqrt(block.trace_variance), bias.squared_mcse),
        "cosine": cosine,
        "cosine_mcse": cosine_mcse,
    }


def _tail_notes(khat: float, norms: np.ndarray) -> list[str]:
    notes = []
    if not np.isfinite(norms).all():
        notes.append("some draws are not finite")
    if khat > _HEAVY and norms.size >= _TAIL_DRAWS:
        notes.append(
            f"heavy tails (khat {khat:.2f}): the variance may be infinite, so its estimate and "
            "all standard errors are unreliable"
        )
    return notes


def _biased(z: float, biases: dict[str, Bias], blocks: dict[str, Block]) -> str:
    """Note a visible bias, and doubt it unless a block that shows it has met enough events."""
    if not z > _VISIBLE:
        return ""
    seen = [
        rare_events(blocks[name])
        for name, bias in biases.items()
        if two_sided_z([bias.log_tail] * len(biases)) > _VISIBLE
    ]
    doubt = min(seen, default="")
    return f"biased (z {z:.1f})" + (f", or {doubt}" if doubt else "")


def rare_events(block: Block) -> str:
    """Return a note if few draws carry the variance that a bias is compared with, else nothing.

    The bias may then be that of the draws: they may have missed a rare event.
    """
    if block.carriers >= _FEWEST:
        return ""
    return (
        f"short of rare events: about {block.carriers:.0f} of {block.count:,} draws carry the "
        "variance, so see whether the bias stays with many more"
    )


def _rhat(label: str, norms: np.ndarray) -> float:
    chains, number = norms.shape
    if chains < 2 or number < 4:
        raise ValueError(
            f"rhat: draws of {label!r} have {chains} chain(s) of {number}; R-hat takes at least 2 "
            "chains of 4. Write gradient_draws(..., num_chains=4)."
        )
    if np.ptp(norms) <= 1e-12 * norms.max():
        return math.nan  # all equal
    return folded_rhat(norms)


def _site_table(draws: dict[str, xr.Dataset]) -> pd.DataFrame:
    tables = {}
    for label, dataset in draws.items():
        if "site_effect" not in dataset.coords:
            raise ValueError(
                f"by='site': for {label!r} the noise of single sites was not renewed. Write "
                "gradient_draws(..., site_draws=200)."
            )
        effects = dataset.coords["site_effect"].sum("parameter").transpose("site", "repeat")
        table = pd.DataFrame(
            {"variance": effects.values.mean(1)}, effects["site"].values.astype(str)
        )
        several = effects.sizes["repeat"] > 1
        table["variance_mcse"] = stats.sem(effects.values, axis=1) if several else math.nan
        total = blocks_of(dataset)["all"].trace or math.nan
        shares = {"share": table.variance / total, "share_mcse": table.variance_mcse / total}
        tables[label] = table.assign(**shares)
    return pd.concat(tables, names=["estimator", "site"])
