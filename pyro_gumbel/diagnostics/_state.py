"""Measure and leave no trace: whatever a measurement changes is put back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_gumbel._integers import is_integer

__all__ = ["Keeper", "preserved", "seed_everything", "seed_torch", "seeds"]


def seeds(seed: int, number: int) -> list[int]:
    """Spread one seed into several, for streams that do not overlap.

    Raises:
        TypeError: If ``seed`` is no integer.
        ValueError: If it is negative.
    """
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer such as seed=0; got {seed!r}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}.")
    return [int(word) for word in np.random.SeedSequence(int(seed)).generate_state(number)]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (every device's)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's generators in use; ``torch.manual_seed`` takes a millisecond without CUDA."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Keeper:
    """Remembers leaves and buffers, and puts them back."""

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._modules: dict[int, nn.Module] = {}

    def __call__(self, leaves: Iterable[Tensor]) -> None:
        """Remember leaves, with their gradients, and clear these."""
        for leaf in leaves:
            if id(leaf) not in self._leaves:
                storage = leaf.data
                self._leaves[id(leaf)] = (leaf, storage, storage.clone(), leaf.grad)
                leaf.grad = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Remember, before it runs, each module that runs inside."""

        def remember(module: nn.Module, _: Any) -> None:
            if id(module) not in self._modules:
                self._modules[id(module)] = module
                self(module.parameters(recurse=False))
                buffers = module.buffers(recurse=False)
                self._buffers += [(buffer, buffer.clone()) for buffer in buffers]

        handle = register_module_forward_pre_hook(remember)
        try:
            yield
        finally:
            handle.remove()

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
def preserved() -> Iterator[Keeper]:
    """Put back, on leaving: parameters and their gradients, buffers, random number generators.

    Parameters that a program makes inside are taken out of Pyro's store again.

    Yields:
        What remembers more than the parameter store has met yet: it is called with leaves, and
        its ``watch()`` has to be around the first run of the programs.
    """
    store = pyro.get_param_store()
    tables = (store._params, store._param_to_name, store._constraints)
    contents = [dict(table) for table in tables]
    keep = Keeper()
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
