"""A recorded step held against an eager one of the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["difference_told"]

Gradients = Sequence[Tensor | None]

_ROUNDING = 1e-4  # relative, of a loss and of each parameter's gradient
_CANCELLED = 1e-6  # what rounding leaves of a gradient that should be zero, relative to them all
_OTHER_DRAW = 0.1  # another compiler's rounding makes another draw of a few


def difference_told(
    loss: Tensor, gradients: Gradients, should: Tensor, slopes: Gradients, compiled: bool
) -> str | None:
    """Say how a step's loss and gradients differ from those they should be, if they do.

    Args:
        loss: The recorded step's loss.
        gradients: Its gradients; ``None`` counts as zero.
        should: The eager step's loss.
        slopes: Its gradients.
        compiled: Whether the recorded step was compiled, and so rounds in another way.

    Returns:
        The difference in words, or ``None`` where there is none beyond rounding.
    """
    did, ought = loss.item(), should.item()
    if ought != ought:
        return None  # that is told elsewhere
    errors, sizes = _norms(gradients, slopes, loss)
    # Where the eager gradient is no number, nor need the recorded one be.
    errors = errors.where(sizes.isfinite(), 0.0)
    sizes = sizes.where(sizes.isfinite(), 0.0)
    size, error = sizes.norm(), errors.norm()
    if compiled:
        tolerance = _OTHER_DRAW
        same = bool(error <= tolerance * (size + tolerance))
    else:
        tolerance = _ROUNDING
        bounds = tolerance * sizes + _CANCELLED * size + tolerance**2
        same = bool((errors <= bounds).all())
    if same and (did == ought or abs(did - ought) <= tolerance * (1 + abs(ought))):
        return None
    return (
        f"the recorded step gives the loss {did:g} and an eager one with the same random numbers "
        f"{ought:g}; their gradients, of norm {size.item():g}, differ by {error.item():g}."
    )


def _norms(one: Gradients, other: Gradients, like: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the differences of gradients, and those of the second, in float64."""
    differences, sizes = (
        [like.new_zeros((), dtype=torch.float64)],
        [like.new_zeros((), dtype=torch.float64)],
    )
    for a, b in zip(one, other, strict=True):
        present = a if a is not None else b
        if present is None:
            continue
        a = torch.zeros_like(present) if a is None else a
        b = torch.zeros_like(present) if b is None else b
        differences.append((a - b).norm().double())
        sizes.append(b.norm().double())
    return torch.stack(differences), torch.stack(sizes)
