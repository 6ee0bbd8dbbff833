"""Measure and leave no trace: seeds, and whatever a measurement changes put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_gumbel._validate import is_integer

__all__ = ["Keeper", "preserved", "seed_everything", "seed_torch", "seeds"]


def seeds(seed: int, number: int) -> list[int]:
    """Spread one seed into several, for streams that do not overlap.

    Raises:
        TypeError: If ``seed`` is not an integer.
        ValueError: If it is negative.
    """
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer such as seed=0; got {seed!r}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}.")
    return [int(word) for word in np.random.SeedSequence(int(seed)).generate_state(number)]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's generators in use; ``torch.manual_seed`` takes a millisecond without CUDA."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Keeper:
    """Remembers parameters and other tensors, and puts them back."""

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
        self._others: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, leaves: Iterable[Tensor]) -> None:
        """Remember leaves with their gradients, and clear these."""
        for leaf in leaves:
            if id(leaf) not in self._leaves:
                storage = leaf.data
                self._leaves[id(leaf)] = (leaf, storage, storage.clone(), leaf.grad)
                leaf.grad = None

    def watch(self) -> Watch:
        """Remember each tensor that is used inside, before it is used first.

        Buffers that a program moves as it runs, and parameters that no store has, are among them.
        """
        return Watch(self._remember)

    def _remember(self, tensor: Tensor) -> None:
        if tensor.is_leaf and tensor.requires_grad:
            self([tensor])
        elif id(tensor) not in self._others and tensor.layout == torch.strided:
            self._others[id(tensor)] = (tensor, tensor.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        for leaf, storage, value, gradient in self._leaves.values():
            if not torch.equal(storage, value):
                storage.copy_(value)
            leaf.data = storage
            leaf.grad = gradient
        for tensor, value in self._others.values():
            if not torch.equal(tensor, value):
                tensor.copy_(value)


class Watch(TorchDispatchMode):
    """Shows tensors that operations read, unless earlier operations made them.

    It sees the operations of its own thread alone, those of scripted modules included.

    Args:
        show: Called with each tensor before the first operation that reads it.
    """

    def __init__(self, show: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._show = show
        self._known: dict[int, Tensor] = {}  # held, so that no other tensor has the id

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports the compiler, which takes a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            if id(tensor) not in self._known:
                self._known[id(tensor)] = tensor
                self._show(tensor)
        result = func(*args, **kwargs)
        self._known |= {id(tensor): tensor for tensor in _tensors(result)}
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextmanager
def preserved() -> Iterator[Keeper]:
    """Put back, on leaving: parameters and their gradients, buffers, random number generators.

    Parameters that a program makes inside are taken out of Pyro's store again.

    Yields:
        A keeper of what the parameter store does not know yet. It is called with leaves, and its
        ``watch()`` has to be around the first run of the programs.
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
