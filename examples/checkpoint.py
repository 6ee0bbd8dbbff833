"""Save a run of SVI after an epoch, and take it up again as if it had never stopped."""

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
    """The file is no checkpoint, or not of this run."""


def save(path: Path, svi: SVI, module: nn.Module, settings: dict[str, Any], epochs: list) -> None:
    """Write all that the next step depends on: parameters, optimiser, estimator, generators.

    ``module`` holds everything with a state of its own, the estimator included.

    The file is written beside its place and then moved there, so that a run that is cut off while
    saving leaves the previous checkpoint whole.
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
    """Put a saved run back in place and return the epochs that it has behind it.

    Raises:
        CheckpointError: The file is no whole checkpoint, or that of a run with other settings.
    """
    state = read(path)
    ours, theirs = settings, state["settings"]
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        listed = ", ".join(f"{k} {theirs.get(k)!r} there, {ours[k]!r} here" for k in differing)
        raise CheckpointError(
            f"the checkpoint {path} is of another run ({listed}): repeat its settings, or name "
            f"another file"
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
        CheckpointError: The file is no whole checkpoint of these examples.
    """
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if path.is_dir():
        raise CheckpointError(
            f"the checkpoint {path} is a folder: name a file, such as {path / 'run.pt'}"
        )
    try:
        # weights_only: a file from elsewhere must not be able to run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({error})") from error
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} is no whole checkpoint ({type(error).__name__}): remove it, or name another "
            f"file"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this example: name another file")
    return state
