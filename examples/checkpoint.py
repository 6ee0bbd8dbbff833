"""Save a run of SVI after an epoch, and resume it with the same results."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI
from torch import nn

DAMAGED = (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError)
FORMAT = "pyro_gumbel examples, checkpoint 1"


class CheckpointError(ValueError):
    """The file is not a checkpoint of this run."""


def save(path: Path, svi: SVI, module: nn.Module, settings: dict[str, Any], epochs: list) -> None:
    """Save everything that the next step depends on.

    This is the state of ``module`` (networks and estimator), of the optimiser and of the random
    number generators. The file is first written under another name and then moved, so that an
    interrupted save leaves the previous checkpoint intact.
    """
    state = {
        "format": FORMAT,
        "settings": settings,
        "epochs": epochs,
        "module": module.state_dict(),
        "optimizer": svi.optim.get_state(),
        "generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(state, partial)
    partial.replace(path)


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
    module.load_state_dict(state["module"])
    svi.optim.set_state(state["optimizer"])
    torch.set_rng_state(state["generator"])
    if state["cuda_generators"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_generators"])
    return state["epochs"]


def read(path: Path) -> dict[str, Any]:
    """Read a file that :func:`save` wrote.

    Raises:
        CheckpointError: The file is not a complete checkpoint of these examples.
    """
    if not path.exists():
        raise CheckpointError(f"the checkpoint {path} does not exist")
    if path.is_dir():
        raise CheckpointError(
            f"the checkpoint {path} is a folder; give a file, such as {path / 'run.pt'}"
        )
    try:
        # weights_only: an untrusted file must not execute code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({error})") from error
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({type(error).__name__}); remove it, or give "
            "another file"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this example; give another file")
    return state
