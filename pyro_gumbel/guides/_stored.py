"""Parameters of a guide that the parameter store has already."""

from __future__ import annotations

import pyro
import torch
from torch import nn

__all__ = ["adopt_stored"]


@torch.no_grad()
def adopt_stored(prefix: str, module: nn.Module) -> None:
    """Let a module go on with the parameters that the store has under its names.

    An optimiser steps what the store has; a module that kept parameters of its own beside it would
    not be trained, without a warning.

    Args:
        prefix: What ``pyro.module`` calls the module.
        module: The module.

    Raises:
        ValueError: If a stored parameter is of another shape.
    """
    store = pyro.get_param_store()
    for path, parameter in list(module.named_parameters()):
        name = f"{prefix}$$${path}"
        stored = store._params.get(name)
        if stored is None or stored is parameter:
            continue
        if stored.shape != parameter.shape:
            raise ValueError(
                f"The parameter store has {name!r} of shape {tuple(stored.shape)}, of another "
                f"guide; this guide's has shape {tuple(parameter.shape)}. Call "
                "pyro.clear_param_store() before you make another guide."
            )
        if isinstance(stored, nn.Parameter):
            owner, _, leaf = path.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = stored
        else:
            parameter.copy_(stored)
            del store[name]  # the module's own takes its place when the guide runs
