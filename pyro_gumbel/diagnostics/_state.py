"""Measure and leave no trace: whatever a measurement changes is put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

__all__ = ["preserved", "seed_everything", "seeds"]


def seeds(seed: int, number: int) -> list[int]:
    """Spread one seed into several, for streams that do not overlap.

    Raises:
        TypeError: If ``seed`` is no integer.
        ValueError: If it is negative.
    """
    if not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer such as seed=0; got {seed!r}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}.")
    return [int(word) for word in np.random.SeedSequence(int(seed)).generate_state(number)]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (every device's)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _Keeper:
    """Remembers leaves and buffers, and puts them back."""

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, leaves: Iterable[Tensor]) -> None:
        """Remember leaves, with their gradients, and clear these."""
        for leaf in leaves:
            if id(leaf) not in self._leaves:
                storage = leaf.data
                self._leaves[id(leaf)] = (leaf, storage, storage.clone(), leaf.grad)
                leaf.grad = None

    def keep_buffers(self, module: nn.Module) -> None:
        self._buffers += [(buffer, buffer.clone()) for buffer in module.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        for leaf, storage, value, gradient in self._leaves.values():
            if not torch.equal(storage, value):
                storage.copy_(value)
            leaf.data = storage
            leaf.grad = gradient
        for buffer, value in self._buffers:
            buffer.copy_(value)


@contextmanager
def preserved(*programs: Callable[..., Any]) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Put back, on leaving: parameters and their gradients, buffers, random number generators.

    Parameters that a program makes inside are taken out of Pyro's store again. Buffers are those
    of the programs that are modules, or methods of modules.

    Yields:
        What remembers further leaves: those of a module that the parameter store has not met yet.
    """
    store = pyro.get_param_store()
    tables = (store._params, store._param_to_name, store._constraints)
    contents = [dict(table) for table in tables]
    keep = _Keeper()
    for module in {id(m): m for program in programs for m in _modules(program)}.values():
        keep(module.parameters())
        keep.keep_buffers(module)
    keep(store._params.values())
    generators = pyro.util.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield keep
    finally:
        for table, content in zip(tables, contents, strict=True):
            table.clear()
            table.update(content)
        keep.restore()
        pyro.util.set_rng_state(generators)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _modules(program: Callable[..., Any]) -> list[nn.Module]:
    owner = getattr(program, "__self__", program)
    wrapped = getattr(program, "__wrapped__", None)
    found = _modules(wrapped) if wrapped is not None else []
    return [*found, owner] if isinstance(owner, nn.Module) else found
