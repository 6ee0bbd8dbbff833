"""The two attributes that classify estimators, and the flags of version 0.1 that they replace."""

from __future__ import annotations

import warnings
from enum import Enum
from typing import Any


class Route(Enum):
    """The route of the gradient through a site.

    Attributes:
        SCORE: The surrogate weighs scores with detached costs.
        PATHWISE: Values carry the gradient.
        COST_GRADIENT: The surrogate uses the cost's gradient in the values.
        ENUMERATE: A value is the whole support, and the ELBO is summed over it.
    """

    SCORE = "score"
    PATHWISE = "pathwise"
    COST_GRADIENT = "cost_gradient"
    ENUMERATE = "enumerate"


class Branches(Enum):
    """The kind of an estimator's coupled values after the first.

    Attributes:
        SAMPLES: Draws of the guide. The ELBO is averaged over them.
        RELAXED: Other values, such as relaxed ones.
        COUNTERFACTUAL: Other values in all elements of a plate at once, without a graph. Sites
            outside the plate must not depend on them.
    """

    SAMPLES = "samples"
    RELAXED = "relaxed"
    COUNTERFACTUAL = "counterfactual"


class BranchGraph:
    """The default of ``differentiates_branches``: whether branches of this kind have a graph."""

    def __get__(self, estimator: Any, kind: Any) -> bool:
        """Return it for an estimator or a class of estimators."""
        return (kind if estimator is None else estimator).branches is not Branches.COUNTERFACTUAL


# The attribute that replaces each flag, and its values if the flag is true and if it is false.
_REPLACED: dict[str, tuple[str, Any, Any]] = {
    "differentiates": ("route", Route.COST_GRADIENT, Route.SCORE),
    "pathwise": ("route", Route.PATHWISE, Route.SCORE),
    "enumerates": ("route", Route.ENUMERATE, Route.SCORE),
    "branches_are_draws": ("branches", Branches.SAMPLES, Branches.RELAXED),
    "moves_plates": ("branches", Branches.COUNTERFACTUAL, Branches.SAMPLES),
    "needs_linked_value": ("needs_smooth_cost", True, False),
}
FLAGS = (*_REPLACED, "branches_have_graph")


def convert_class(kind: Any) -> None:
    """Convert the flags and methods that a subclass of ``Estimator`` has from version 0.1."""
    own = dict(vars(kind))
    flags = {name: own[name] for name in FLAGS if isinstance(own.get(name), bool)}
    convert_flags(kind, kind, flags, stacklevel=5)
    if "objection" in own:
        kind.why_unsupported = own["objection"]
        _warn(kind, "the method objection", "Rename it to why_unsupported", stacklevel=4)
    elif "why_unsupported" in own:
        kind.objection = own["why_unsupported"]  # which a subclass of version 0.1 calls
    if "draw_shared" in own:
        instead = "It is not called any more: override shares_noise and draw_from_noise"
        _warn(kind, "the method draw_shared", instead, stacklevel=4)


def read_flag(estimator: Any, flag: str) -> bool:
    """Return the value of a flag of version 0.1, by the attribute that replaces it."""
    name, if_true, _ = _REPLACED.get(flag, ("differentiates_branches", True, False))
    instead = name if if_true is True else f"{name} is {if_true}"
    warnings.warn(
        f"{type(estimator).__name__}.{flag} is of version 0.1 of pyro_gumbel. Read {instead}.",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(estimator, name) is if_true


def convert_flags(target: Any, kind: type, flags: dict[str, bool], *, stacklevel: int) -> None:
    """Set what replaces flags of version 0.1, in a class or in an estimator of the class."""
    if not flags:
        return
    has_graph = flags.get("branches_have_graph", target.differentiates_branches)
    new = {name: getattr(target, name) for name in ("route", "branches", "needs_smooth_cost")}
    for flag, (name, if_true, if_false) in _REPLACED.items():
        if flags.get(flag):
            new[name] = if_true
        elif flag in flags and new[name] is if_true:
            new[name] = if_false
    new["differentiates_branches"] = has_graph  # the last, since it follows the branches
    changed = {}
    for name, value in new.items():
        if value != getattr(target, name):
            changed[name] = value
            setattr(target, name, value)
    written, instead = (
        ", ".join(f"{name} = {value}" for name, value in attributes.items())
        for attributes in (flags, changed)
    )
    _warn(kind, written, f"Write {instead}" if changed else "Delete it", stacklevel=stacklevel)


def _warn(kind: type, old: str, instead: str, *, stacklevel: int) -> None:
    message = f"{kind.__name__} has {old}, of version 0.1 of pyro_gumbel. {instead}."
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
