"""Whether the elements of a plate can be moved at once as if each were moved alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_gumbel.distributions.families import from_index, one_hot_logits, to_index, unwrap
from pyro_gumbel.estimators import Call
from pyro_gumbel.infer.particles import SharedSubsample
from pyro_gumbel.infer.probe import score_given
from pyro_gumbel.infer.run import Run

__all__ = ["check_apart"]

_TRIED_CHANGES = 3


def check_apart(name: str, run: Run, call: Call, subsample: SharedSubsample) -> None:
    """Look for sites outside a latent site's plates that depend on its value.

    An estimator that gives all elements of a plate values that are no draws of the guide would
    count, for one element, costs that the others' values have changed. Sites inside the plates
    depend on their own element alone. Those outside are scored anew with the value moved, a few
    times, and all else held.

    Args:
        name: The latent site.
        run: The pass with the main path.
        call: The programs and their arguments.
        subsample: The step's minibatch.

    Raises:
        ValueError: If there is such a site.
    """
    site = run.guide[name]
    plates = {frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.size > 1}
    outside = {term.site: plates - term.frames for term in run.costs.terms}
    outside = {other: left for other, left in outside.items() if left}
    if not outside:
        return
    values = {latent: run.value(latent).detach() for latent in run.estimators}
    for program in (call.guide, call.model):
        before = score_given(program, call, run, subsample, values)
        names = sorted(outside.keys() & before.keys())
        for moved in _other_values(unwrap(site["fn"]), values[name]) if names else ():
            after = score_given(program, call, run, subsample, {**values, name: moved})
            for other in names:
                if not torch.equal(before[other].nan_to_num(), after[other].nan_to_num()):
                    plate = min(frame.name for frame in outside[other])
                    _refuse(name, repr(run.estimators[name]), other, plate)


def _other_values(fn: Any, value: Tensor) -> Iterator[Tensor]:
    """Values to try: all elements alike, which moves every sum, and any, which moves the rest."""
    index = to_index(fn, value)
    categories = one_hot_logits(fn).shape[-1]
    for category in range(min(categories, _TRIED_CHANGES)):
        yield from_index(fn, torch.full_like(index, category))
    noise = torch.Generator().manual_seed(0)  # the programs' own is left alone
    for _ in range(_TRIED_CHANGES):
        other = torch.randint(categories, index.shape, generator=noise)
        yield from_index(fn, other.to(index.device))


def _refuse(name: str, estimator: str, other: str, plate: str) -> None:
    raise ValueError(
        f"At site {name!r}, {estimator} moves all elements of the plate {plate!r} at once, and "
        f"site {other!r} outside that plate depends on them: the estimate would be biased. "
        "Use an estimator whose values are all draws of the guide, such as "
        "Score(LeaveOneOut()), DisARM() for bits or DisARMTree() for categories; or, for "
        "LocalExpectation, write .to_event(...) in place of the plate."
    )
