"""Whether programs read a site's value by operations that have a gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.distributions.families import is_bit, unwrap
from pyro_gumbel.estimators import Call, Estimator
from pyro_gumbel.infer._rng import preserved_rng
from pyro_gumbel.infer.particles import SharedSubsample
from pyro_gumbel.infer.run import Run, in_rows

__all__ = ["GradientWarning", "check_reading", "score_given"]

_TRIED_CHANGES = 3


class GradientWarning(UserWarning):
    """An estimator cannot see part of the cost that depends on its site's value."""


def check_reading(name: str, run: Run, call: Call, subsample: SharedSubsample) -> None:
    """Look for sites that depend on a discrete value without a gradient, as through an index.

    The programs are run anew with the site's value changed and all else held. A site whose score
    changes, and that no differentiable operation links to the value, has lost the gradient that
    the estimator lives on.

    Args:
        name: The latent site.
        run: The pass with the main path.
        call: The programs and their arguments.
        subsample: The step's minibatch.

    Raises:
        ValueError: If there is such a site and the estimator says that it is unbiased; if it does
            not, there is a :class:`GradientWarning`.
    """
    names = list(run.estimators)
    later = names[names.index(name) + 1 :]
    suspects = {  # of each program the sites that no gradient reaches
        call.guide: {site for site in later if not _linked(run.log_prob(site), run.value(name))},
        call.model: _unlinked_terms(name, run),
    }
    values = {site: run.value(site).detach() for site in run.estimators}
    hard = _harden(run, name, values[name])
    for program, sites in suspects.items():
        if not sites:
            continue
        before = score_given(program, call, run, subsample, {**values, name: hard})
        for shift in range(1, _TRIED_CHANGES + 1):
            changed = 1 - hard if is_bit(unwrap(run.guide[name]["fn"])) else hard.roll(shift, -1)
            after = score_given(program, call, run, subsample, {**values, name: changed})
            for site in sorted(sites & before.keys() & after.keys()):
                if not torch.equal(before[site].nan_to_num(), after[site].nan_to_num()):
                    _tell(name, site, run.estimators[name])
                    return


def _unlinked_terms(name: str, run: Run) -> set[str]:
    """The model's sites, but for ``name``, whose term has no gradient in its value."""
    return {
        term.site
        for term in run.costs.terms
        if term.of_model and term.site != name and not _linked(term.value, run.value(name))
    }


def _harden(run: Run, name: str, value: Tensor) -> Tensor:
    if is_bit(unwrap(run.guide[name]["fn"])):
        return (value > 0.5).to(value)
    index = value.max(-1, keepdim=True).indices
    return torch.zeros_like(value).scatter_(-1, index, 1.0)


def score_given(
    program: Callable[..., Any],
    call: Call,
    run: Run,
    subsample: SharedSubsample,
    values: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Score every site of a program, given values for the latent ones, relaxed ones too."""
    held = poutine.condition(in_rows(program, run.layout), data=values)
    unchecked = pyro.validation_enabled(False)  # a relaxed value is no member of the support
    with torch.no_grad(), preserved_rng(), poutine.block(), subsample, unchecked:
        trace = poutine.trace(held).get_trace(*call.args, **call.kwargs)
        return {
            name: site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        }


def _linked(score: Tensor, value: Tensor) -> bool:
    if not (score.requires_grad and value.requires_grad):
        return False
    (gradient,) = torch.autograd.grad(score.sum(), value, retain_graph=True, allow_unused=True)
    return gradient is not None


def _tell(name: str, reader: str, estimator: Estimator) -> None:
    what = (
        f"At site {name!r}, {estimator!r} needs the cost's gradient in the value, and site "
        f"{reader!r} depends on the value without one, as through an index or a comparison"
    )
    advice = (
        "Write the model with products and sums of the value, such as z @ table, or use an "
        "estimator that needs no gradient: DisARM() for bits, DisARMTree() for categories, "
        "Score(LeaveOneOut()) for both."
    )
    if estimator.unbiased:
        raise ValueError(f"{what}: the estimate would be biased. {advice}")
    unlearnt = f"{what}: what it does there is not learnt. {advice}"
    warnings.warn(unlearnt, GradientWarning, stacklevel=2)
