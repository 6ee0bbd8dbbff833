"""Learnable parameters of estimators, and the places that they have in the parameter store."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pyro
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_gumbel.estimators import Estimator

__all__ = ["adopt_stored", "show_parameters"]

# Parameters that an estimator has put into the store: those that are not were loaded from a file.
_shown = WeakTensorKeyDictionary()


@torch.no_grad()
def adopt_stored(site: str, estimator: Estimator) -> None:
    """Let an estimator go on with values that were loaded into the store before it was shown.

    They stay there until its own are shown in their place; what is frozen keeps its values.
    """
    for key, parameter in _parameters(site, estimator):
        stored = pyro.get_param_store()._params.get(key)
        loaded = stored is not None and stored is not parameter and stored not in _shown
        if loaded and parameter.requires_grad and stored.shape == parameter.shape:
            parameter.copy_(stored)


def show_parameters(site: str, estimator: Estimator) -> None:
    """Put the estimator's parameters into the store, in place of another estimator's."""
    store = pyro.get_param_store()
    for key, parameter in _parameters(site, estimator):
        # Else the optimiser would step a tensor that nothing uses any more. (The store copies
        # what is not contiguous, so that such a parameter is never found in it.)
        foreign = key in store and store[key].unconstrained() is not parameter
        if foreign and parameter.is_contiguous():
            del store[key]
        _shown[parameter] = True
    with warnings.catch_warnings():
        # Parameters are frozen on purpose here, by learn=False or by the user.
        warnings.filterwarnings("ignore", ".* was not registered in the param store")
        pyro.module(f"gradient${site}", estimator)


def _parameters(site: str, estimator: Estimator) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in estimator.named_parameters():
        yield f"gradient${site}$$${name}", parameter
