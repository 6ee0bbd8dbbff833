"""Learnable parameters of estimators: devices, dtypes and the parameter store."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_gumbel.distributions._categorical import CategoricalParameters
from pyro_gumbel.estimators import Estimator
from pyro_gumbel.estimators._module import STORE_PREFIX, is_newer, note_own, note_stored

__all__ = ["adopt_stored", "meet_site", "show_parameters"]


def meet_site(site: str, estimator: Estimator, fn: Any) -> None:
    """Prepare an estimator's parameters for a draw at a site with distribution ``fn``.

    At the first draw the parameters move to the distribution's device, and those of the default
    dtype to the distribution's dtype if it is wider. Values that were loaded into the parameter
    store replace the estimator's.
    """
    if next(estimator.parameters(), None) is None:
        return
    if not estimator.has_met_site:
        like = _tensor_of(fn)
        if like is not None:
            move_like(estimator, like)
        estimator.has_met_site = True
    adopt_stored(site, estimator)


def move_like(estimator: Estimator, like: Tensor) -> None:
    """Move parameters and buffers to a tensor's device, and to its dtype if it is wider."""
    usual = torch.get_default_dtype()
    wide = torch.promote_types(usual, like.dtype)
    estimator._apply(
        lambda tensor: tensor.to(like.device, wide if tensor.dtype == usual else tensor.dtype)
    )


def _tensor_of(fn: Any) -> Tensor | None:
    """Return a floating-point tensor among a distribution's parameters."""
    for value in getattr(fn, "__dict__", {}).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, (Distribution, CategoricalParameters)):
            found = _tensor_of(value)
            if found is not None:
                return found
    return None


@torch.no_grad()
def adopt_stored(site: str, estimator: Estimator) -> None:
    """Copy values from the store that were loaded later than the estimator's own.

    The store keeps them until ``show_parameters`` replaces them by the estimator's parameters.
    Frozen parameters keep their values.
    """
    adopted = False
    for key, parameter in _parameters(site, estimator):
        stored = pyro.get_param_store()._params.get(key)
        if stored is None or stored is parameter or not parameter.requires_grad:
            continue
        if stored.shape == parameter.shape and is_newer(stored, estimator):
            parameter.copy_(stored)
            adopted = True
    if adopted:
        estimator.loaded_at = note_stored()


def show_parameters(site: str, estimator: Estimator) -> None:
    """Register the estimator's parameters in the store, replacing another estimator's."""
    store = pyro.get_param_store()
    for key, parameter in _parameters(site, estimator):
        # Otherwise the optimiser would step an unused tensor. (The store copies parameters that
        # are not contiguous, so it never holds those themselves.)
        foreign = key in store and store[key].unconstrained() is not parameter
        if foreign and parameter.is_contiguous():
            del store[key]
        note_own(parameter)
    with warnings.catch_warnings():
        # learn=False or the user freezes parameters on purpose.
        warnings.filterwarnings("ignore", ".* was not registered in the param store")
        pyro.module(f"{STORE_PREFIX}{site}", estimator)


def _parameters(site: str, estimator: Estimator) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in estimator.named_parameters():
        yield f"{STORE_PREFIX}{site}$$${name}", parameter
