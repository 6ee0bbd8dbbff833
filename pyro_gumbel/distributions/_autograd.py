"""Reduce the overhead of torch's autograd functions."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch

F = TypeVar("F", bound=type[torch.autograd.Function])


def with_signature(function: F) -> F:
    """Cache the signature of ``forward``, which torch otherwise computes at every call.

    Computing it takes as long as an operation on some thousand numbers.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function
