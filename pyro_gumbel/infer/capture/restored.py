"""Runs that leave tensors as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["restored"]


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their values back, in place, on leaving."""
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
