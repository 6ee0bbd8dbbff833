"""What torch does at each call of an autograd function, done once."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch

F = TypeVar("F", bound=type[torch.autograd.Function])


def with_signature(function: F) -> F:
    """Keep the signature of ``forward``, which torch derives anew whenever it is applied.

    That takes as long as an operation on some thousand numbers.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function
