"""Use parameters of the parameter store in a guide."""

from __future__ import annotations

import pyro
import torch
from torch import nn

__all__ = ["adopt_stored"]


@torch.no_grad()
def adopt_stored(prefix: str, module: nn.Module) -> None:
    """Replace a module's parameters by those that the store has under its names.

    The optimiser trains the parameters in the store. A module with other parameters under these
    names would silently not be trained.

    Args:
        prefix: The module's name in ``pyro.module``.
        module: The module.

    Raises:
        ValueError: If a stored parameter has another shape.
    """
    store = pyro.get_param_store()
    for path, parameter in list(module.named_parameters()):
        name = f"{prefix}$$${path}"
        stored = store._params.get(name)
        if stored is None or stored is parameter:
            continue
        if stored.shape != parameter.shape:
            raise ValueError(
                f"The parameter store has {name!r} with shape {tuple(stored.shape)}; this guide "
                f"needs shape {tuple(parameter.shape)}. Call pyro.clear_param_store() before "
                "making a new guide."
            )
        if isinstance(stored, nn.Parameter):
            owner, _, leaf = path.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = stored
        else:
            parameter.copy_(stored)
            del store[name]  # the module's parameter replaces it when the guide runs
