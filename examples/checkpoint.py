"""Resume a run that vae.py saved, also one of version 0.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI
from torch import nn

from pyro_gumbel.infer import load_checkpoint

OLD_FORMAT = "pyro_gumbel examples, checkpoint 1"  # of version 0.1


class CheckpointError(ValueError):
    """The file is not a checkpoint of this run."""


def load(path: Path, svi: SVI, module: nn.Module, settings: dict[str, Any]) -> list:
    """Restore a saved run and return the records of its epochs.

    Raises:
        CheckpointError: The file is not a complete checkpoint, or its run has other settings.
    """
    state = read(path)
    ours, theirs = settings, state["settings"]
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        listed = ", ".join(f"{k} {theirs.get(k)!r} saved, {ours[k]!r} now" for k in differing)
        raise CheckpointError(
            f"the checkpoint {path} has other settings ({listed}); use the saved settings, or "
            "write to another file"
        )
    if "module" not in state:
        load_checkpoint(path, svi)
        return state["epochs"]
    module.load_state_dict(state["module"])
    svi.optim.set_state(state["optimizer"])
    torch.set_rng_state(state["generator"])
    if state["cuda_generators"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_generators"])
    return state["epochs"]


def read(path: Path) -> dict[str, Any]:
    """Read a run's settings and epochs, and all of a run of version 0.1.

    Raises:
        CheckpointError: The file is not a complete checkpoint of vae.py.
    """
    try:
        state = load_checkpoint(path)
    except (OSError, ValueError) as error:
        old = _read_old(path)
        if old is None:
            raise CheckpointError(str(error)) from error
        return old
    if not {"settings", "epochs"} <= state.keys():
        raise CheckpointError(f"{path} was not written by this example; give another file")
    return state


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of the model that :func:`read` accepts."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["format"] == OLD_FORMAT:  # the estimator's state is under "1."
        return {k[2:]: v for k, v in state["module"].items() if k.startswith("0.")}
    return state["modules"]["model.self"]


def _read_old(path: Path) -> dict[str, Any] | None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # then the first error is of use
        return None
    is_old = isinstance(state, dict) and state.get("format") == OLD_FORMAT
    return state if is_old else None
