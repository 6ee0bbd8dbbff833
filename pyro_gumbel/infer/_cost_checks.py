"""Checks that each site's cost depends on its value as the site's estimator requires."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_gumbel.estimators import Branches, Estimator
from pyro_gumbel.infer._dependence import Mark, Marks

__all__ = ["GradientWarning", "ReachedTerm", "check_costs"]

Frames = frozenset[CondIndepStackFrame]


class GradientWarning(UserWarning):
    """An estimator ignores part of the cost's dependence on its site's value."""


@dataclass(frozen=True)
class ReachedTerm:
    """A term of the bound.

    Attributes:
        site: The site that it scores, in the guide or in the model.
        marks: How each latent value reached the score.
        frames: The vectorised plates of the site.
    """

    site: str
    marks: Marks
    frames: Frames


def check_costs(
    estimators: Mapping[str, Estimator],
    frames: Mapping[str, Frames],
    terms: Iterable[ReachedTerm],
) -> None:
    """Check the dependence of every term on every site whose estimator restricts it.

    Relaxed and straight-through values need a cost with a gradient in the value
    (``needs_linked_value``). Control variates that use the gradient do not: they have mean zero
    for any vector in its place. Values that are not draws of the guide in all elements of a plate
    at once must not reach terms outside the plate (``moves_plates``).

    Args:
        estimators: The estimator of each latent site of the guide.
        frames: The vectorised plates of each of these sites.
        terms: The terms of both programs, scored at values followed by
            :class:`~pyro_gumbel.infer._dependence.Dependence`.

    Raises:
        ValueError: If the estimate would be biased and the estimator claims that it is not, or
            if it would be unusable. A biased estimator that ignores a term gives a
            :class:`GradientWarning`.
    """
    terms = list(terms)
    for name, estimator in estimators.items():
        reached = [term for term in terms if name in term.marks]
        if estimator.needs_smooth_cost:
            _check_smooth(name, estimator, reached)
        if estimator.branches is Branches.COUNTERFACTUAL:
            _check_inside(name, estimator, frames[name], reached)


def _check_smooth(name: str, estimator: Estimator, reached: list[ReachedTerm]) -> None:
    reader = next((term.site for term in reached if term.marks[name] is Mark.JUMP), None)
    if reader is None:
        return
    what = (
        f"At site {name!r}, {estimator!r} needs the cost's gradient in the value, and site "
        f"{reader!r} depends on the value without one, as through an index, a comparison or a "
        "number read into Python"
    )
    advice = (
        "Write the model with products and sums of the value, such as z @ table, or use an "
        "estimator that needs no gradient: DisARM() for bits, DisARMTree() for categories, "
        "Score(LeaveOneOut()) for both."
    )
    if estimator.unbiased:
        raise ValueError(f"{what}: the estimate would be biased. {advice}")
    message = f"{what}: this part of the dependence is not learnt. {advice}"
    warnings.warn(message, GradientWarning, stacklevel=2)


def _check_inside(
    name: str, estimator: Estimator, frames: Frames, reached: list[ReachedTerm]
) -> None:
    plates = {frame for frame in frames if frame.size > 1}
    for term in reached:
        outside = sorted(frame.name for frame in plates - term.frames)
        if outside:
            raise ValueError(
                f"At site {name!r}, {estimator!r} moves all elements of the plate "
                f"{outside[0]!r} at once, and site {term.site!r} outside that plate depends on "
                "them: the estimate would be biased. Use an estimator whose values are all draws "
                "of the guide, such as Score(LeaveOneOut()), DisARM() for bits or DisARMTree() "
                "for categories; or, for LocalExpectation, write .to_event(...) in place of the "
                "plate."
            )
