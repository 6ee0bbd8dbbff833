"""The table that compares estimators: bias, noise, price."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_gumbel._arviz import folded_rhat, pareto_khat
from pyro_gumbel.diagnostics._rare import doubt
from pyro_gumbel.diagnostics._recorder import free_name
from pyro_gumbel.diagnostics._statistics import Bias, bias_of, cosine_of, snr_of, two_sided_z
from pyro_gumbel.diagnostics._tables import (
    Block,
    blocks_of,
    check_draws,
    check_reference,
    parameters_of,
    reference_blocks,
    rounding_of,
)

__all__ = ["compare_gradients"]

_HEAVY = 0.7
_TAIL_DRAWS = 200  # fewer have too short a tail to be told from a light one
_MOVING = 1.01
_VISIBLE = 5.0
_GROUPINGS = ("parameter", "coordinate", "site")


def compare_gradients(
    draws: Any, reference: Any = None, *, by: str | None = None, rhat: bool = False
) -> pd.DataFrame:
    r"""Compare estimators by the gradients drawn with them.

    With ``g`` one draw of the gradient as one long vector, ``N`` the number of draws,
    :math:`\bar g` their mean, :math:`\Sigma` the covariance of one draw and :math:`g^*` the
    reference:

    * ``bias``: :math:`\|\bar g - g^*\|`. Noise alone makes it positive; ``bias_mcse`` is such that
      it exceeds 1.96 standard errors in 5 % of repetitions if there is no bias.
    * ``bias_z``: the normal's two-sided quantile for the probability that noise alone goes as far:
      the smallest of those of the whole gradient and of each parameter's, corrected for their
      number. Above 5 the estimator is biased, unless rare events were missed (below); it grows
      with ``N`` if there is bias.
    * ``relative_bias``: ``bias`` over :math:`\|g^*\|`.
    * ``variance``: :math:`\mathrm{tr}\,\Sigma`, the sum of the coordinates' sample variances.
    * ``relative_std``: its root over :math:`\|g^*\|`, or :math:`\|\bar g\|` without a reference;
      over the mean in any case it is the reciprocal of ``snr``.
    * ``mse``: of one draw, variance plus squared bias, the latter less what noise adds to it.
    * ``snr``: :math:`\|E g\| / \sqrt{\mathrm{tr}\,\Sigma}`, likewise corrected.
    * ``cosine``: of :math:`\bar g` with :math:`g^*`.
    * ``khat``: the Pareto shape of the tail of :math:`\|g\|`. Above 1/2 the variance is infinite,
      and above 0.7 its estimate says nothing; ``nan`` where the largest draws are of
      fewer than ten different sizes, as those of few discrete states are.
    * ``seconds`` and ``evaluations`` of the model, a draw.
    * ``efficiency``: 1 over variance times seconds, the precision that a second buys.
    * ``warning``: what to mind, in words.

    An event that no draw meets leaves no trace in their variance and passes for a bias: a bit of
    logit -4.5 is off in all of 240 draws in 7 % of repetitions. Where fewer than ten draws carry
    the variance, ``warning`` says that the bias may be that; where the draws have other noise,
    nothing in them tells. An event of probability ``p`` is as unlikely to be missed as a
    ``bias_z`` of 5 from about ``15 / p`` draws on; and with more of them ``bias`` stays only if it
    is the estimator's.

    Monte Carlo standard errors stand beside them (``*_mcse``). Rows are sorted by ``mse``, or by
    ``variance`` where there is no reference; what a reference is needed for is ``nan`` without.

    Args:
        draws: What :func:`gradient_draws` returns (dicts of several calls may be merged, ``a |
            b``), or any dict of Datasets with dims ``chain, draw, ...``.
        reference: What :func:`exact_gradient` returns; or draws of an unbiased estimator, from a
            seed of their own, whose standard errors then are allowed for; or the label of such an
            estimator among ``draws``.
        by: ``"parameter"`` or ``"coordinate"`` for a row for each of these; ``"site"`` for the
            part of the variance that the sampling at each site answers for: ``variance``, half the
            mean squared distance of two gradients that share all noise but the site's (as many
            pairs as the ``site_draws`` of :func:`gradient_draws`), its standard error, and
            ``share`` of the total. Shares add up to more than one where sites act together.
        rhat: Add the column ``rhat``, the folded split R-hat of the gradient's norm: above 1.01
            the draws are not exchangeable, as when a baseline is still moving.

    Returns:
        One row an estimator, or with ``by`` an estimator and a parameter, coordinate or site.

    Raises:
        TypeError: If draws or reference are of another kind.
        ValueError: If draws are missing, too few, or of different parameters; if the reference has
            other parameters or shapes; if ``by`` is unknown, or needs what was not recorded; if
            R-hat is asked of a single chain.

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
    if reference is not None:
        check_reference(reference)
    if by is not None and by not in _GROUPINGS:
        raise ValueError(f"by must be one of {_GROUPINGS} or None; got {by!r}.")
    if rhat:
        _check_chains(draws)
    if by == "site":
        return _site_table(draws)
    rows: dict[Any, dict[str, Any]] = {}
    for label, dataset in draws.items():
        own = None if reference is dataset else reference
        source = _flat(dataset) if by == "coordinate" else dataset
        names = parameters_of(source)
        for part, row in _rows(source, own, by).items():
            rows[(label, part) if by else label] = row
            if rhat:
                row["rhat"] = _rhat(source, names if part == "all" else [part])
                if row["rhat"] > _MOVING:
                    moving = f"not exchangeable (rhat {row['rhat']:.3f}): is a baseline moving?"
                    row["warning"] = "; ".join(note for note in (row["warning"], moving) if note)
    table = pd.DataFrame.from_dict(rows, orient="index")
    if by:
        table.index = pd.MultiIndex.from_tuples(rows, names=["estimator", by])
        return table
    table.index.name = "estimator"
    return table.sort_values("variance" if reference is None else "mse", kind="stable")


def _rows(dataset: xr.Dataset, reference: Any, by: str | None) -> dict[str, dict[str, Any]]:
    names = parameters_of(dataset)
    if by == "coordinate" and reference is not None:
        reference = _flat(reference)
    blocks = blocks_of(dataset, names)
    others = None if reference is None else reference_blocks(reference, dataset, names)
    parts = ["all"] if by is None else names
    rows = {}
    for part in parts:
        row, doubtful = _row(blocks[part], dataset), ""
        if others is not None:
            # A part of the gradient is rounded like the whole, however small it is.
            rounding = float(rounding_of(dataset, np.linalg.norm(others["all"].mean)))
            tested = [part] if by or len(names) == 1 else ["all", *names]
            biases = {name: _bias(blocks[name], others[name], rounding) for name in tested}
            row |= _against(blocks[part], others[part], biases)
            doubtful = _doubt(biases, blocks)
        row["warning"] = _warning(row, blocks[part], doubtful)
        rows[part] = row
    return rows


def _row(block: Block, dataset: xr.Dataset) -> dict[str, Any]:
    spread = block.spread
    assert spread is not None
    row: dict[str, Any] = dict.fromkeys(_COLUMNS, math.nan)
    row["variance"], row["variance_mcse"] = spread.trace, math.sqrt(spread.trace_variance)
    length = float(np.linalg.norm(block.mean))
    row["relative_std"] = math.sqrt(spread.trace) / length if length else math.nan
    row["snr"], row["snr_mcse"] = snr_of(block.mean, spread)
    row["khat"] = pareto_khat(block.norms)
    for name in ("seconds", "seconds_mcse", "evaluations"):
        row[name] = float(dataset.attrs.get(name, math.nan))
    return row | _efficiency(row)


def _efficiency(row: dict[str, Any]) -> dict[str, float]:
    if 0 in (row["variance"], row["seconds"]):  # though the other may not be known
        return {"efficiency": math.inf, "efficiency_mcse": math.nan}
    price = row["variance"] * row["seconds"]
    relative = (row["variance_mcse"] / row["variance"]) ** 2
    relative += (row["seconds_mcse"] / row["seconds"]) ** 2
    return {"efficiency": 1 / price, "efficiency_mcse": math.sqrt(relative) / price}


def _bias(block: Block, reference: Block, rounding: float) -> Bias:
    assert block.spread is not None
    spreads = [block.spread] if reference.spread is None else [block.spread, reference.spread]
    return bias_of(block.mean - reference.mean, spreads, rounding)


def _against(block: Block, reference: Block, biases: dict[str, Bias]) -> dict[str, float]:
    spread, bias = block.spread, next(iter(biases.values()))
    assert spread is not None
    length = float(np.linalg.norm(reference.mean))
    cosine, cosine_mcse = cosine_of(block.mean, reference.mean, spread)
    return {
        "bias": bias.norm,
        "bias_mcse": bias.mcse,
        "bias_z": two_sided_z([bias.log_tail for bias in biases.values()]),
        "relative_bias": bias.norm / length if length else math.nan,
        "relative_std": math.sqrt(spread.trace) / length if length else math.nan,
        "mse": spread.trace + max(bias.squared, 0.0),
        "mse_mcse": math.hypot(math.sqrt(spread.trace_variance), bias.squared_mcse),
        "cosine": cosine,
        "cosine_mcse": cosine_mcse,
    }


def _doubt(biases: dict[str, Bias], blocks: dict[str, Block]) -> str:
    """Doubt a bias unless a block that shows it is beyond doubt."""
    seen = [
        blocks[name]
        for name, bias in biases.items()
        if two_sided_z([bias.log_tail] * len(biases)) > _VISIBLE
    ]
    return min(map(doubt, seen), default="")


def _warning(row: dict[str, Any], block: Block, doubtful: str) -> str:
    notes = []
    if not np.isfinite(block.norms).all():
        notes.append("some draws are not finite")
    if row["khat"] > _HEAVY and len(block.norms) >= _TAIL_DRAWS:
        notes.append(
            f"heavy tails (khat {row['khat']:.2f}): the variance may be infinite, its estimate "
            "and all standard errors say little"
        )
    if row["bias_z"] > _VISIBLE:
        biased = f"biased (z {row['bias_z']:.1f})"
        notes.append(f"{biased}, or {doubtful}" if doubtful else biased)
    return "; ".join(notes)


_COLUMNS = (
    "bias",
    "bias_mcse",
    "bias_z",
    "relative_bias",
    "variance",
    "variance_mcse",
    "relative_std",
    "mse",
    "mse_mcse",
    "snr",
    "snr_mcse",
    "cosine",
    "cosine_mcse",
    "khat",
    "seconds",
    "seconds_mcse",
    "evaluations",
    "efficiency",
    "efficiency_mcse",
    "warning",
)


def _flat(dataset: xr.Dataset) -> xr.Dataset:
    """Make each coordinate a variable of its own, ``name[i, j]``."""
    if "project" in dataset.attrs:
        raise ValueError(
            "by='coordinate' needs the draws themselves; these were kept as projections. Draw "
            "without project=, for the parameters of interest: params=[...]."
        )
    flat = {}
    for name in parameters_of(dataset):
        array = dataset[name]
        own = [dim for dim in array.dims if dim not in ("chain", "draw")]
        for index in np.ndindex(*(array.sizes[dim] for dim in own)):
            at = dict(zip(own, index, strict=True))
            labels = [str(array[dim].values[i]) for dim, i in at.items()]
            label = free_name(f"{name}[{', '.join(labels)}]", dataset) if labels else name
            flat[label] = array.isel(at, drop=True)
    return xr.Dataset(
        {name: array.drop_vars(list(array.coords)) for name, array in flat.items()},
        attrs=dataset.attrs,
    )


def _check_chains(draws: dict[str, xr.Dataset]) -> None:
    for label, dataset in draws.items():
        if dataset.sizes["chain"] < 2 or dataset.sizes["draw"] < 4:
            raise ValueError(
                f"rhat: draws of {label!r} have {dataset.sizes['chain']} chain(s) of "
                f"{dataset.sizes['draw']}; R-hat takes at least 2 chains of 4. Write "
                "gradient_draws(..., num_chains=4)."
            )


def _norms(dataset: xr.Dataset, names: list[str]) -> np.ndarray:
    """The norm of each draw over some parameters, ``(chain, draw)``."""
    if "project" in dataset.attrs:
        return np.sqrt(
            (dataset.coords["parameter_norm"].sel(parameter=names) ** 2).sum("parameter")
        )
    squares = np.zeros((dataset.sizes["chain"], dataset.sizes["draw"]))
    for name in names:
        values = dataset[name].values.astype(float)
        squares += (values**2).sum(tuple(range(2, values.ndim)))
    return np.sqrt(squares)


def _rhat(dataset: xr.Dataset, names: list[str]) -> float:
    norms = np.asarray(_norms(dataset, names))
    if np.ptp(norms) <= 1e-12 * norms.max():
        return math.nan  # all equal
    return folded_rhat(norms)


def _site_table(draws: dict[str, xr.Dataset]) -> pd.DataFrame:
    rows = {}
    for label, dataset in draws.items():
        if "site_effect" not in dataset.coords:
            raise ValueError(
                f"by='site': for {label!r} the noise of single sites was not renewed. Write "
                "gradient_draws(..., site_draws=200)."
            )
        spread = blocks_of(dataset, parameters_of(dataset))["all"].spread
        assert spread is not None
        effects = dataset.coords["site_effect"].sum("parameter")
        for site in effects.coords["site"].values:
            values = effects.sel(site=site).values
            variance = float(values.mean())
            mcse = (
                float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
            )
            share = variance / spread.trace if spread.trace else math.nan
            rows[label, str(site)] = {
                "variance": variance,
                "variance_mcse": mcse,
                "share": share,
                "share_mcse": mcse / spread.trace if spread.trace else math.nan,
            }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=["estimator", "site"])
    return table
