"""Runs that leave the random number generators as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch

__all__ = ["preserved_rng", "set_torch_generators", "torch_generators"]


def torch_generators() -> list[torch.Tensor]:
    """Read the state of torch's generator, and of the current CUDA device's where it is in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def set_torch_generators(states: list[torch.Tensor]) -> None:
    """Put back what :func:`torch_generators` read."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's generators (also the current CUDA device's)."""
    state = pyro.util.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
