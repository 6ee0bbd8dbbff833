"""Noise in float32 or better, whatever the dtype that it is for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def noise_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision in which noise and densities of ``dtype`` are computed: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_exponential_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    r"""Draw :math:`\log E` with :math:`E \sim \mathrm{Exp}(1)`: minus a standard Gumbel.

    See :func:`gumbel_noise`, of which this is the negative (one pass cheaper).
    """
    dtype = noise_dtype(dtype)
    # torch.rand gives k * 2^-b, k = 0, 1, ... A shift by half a cell centres the lattice and keeps
    # E > 0. It is a hair less than half, so that the last cell does not round up to one (E < inf).
    # log1p keeps the lattice fine where E is small: there it is decided which category wins.
    half_cell = torch.finfo(dtype).eps * (0.25 - 2.0**-20)
    uniform = torch.rand(tuple(shape), dtype=dtype, device=device)
    return uniform.add_(half_cell).neg_().log1p_().neg_().log_()


def gumbel_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    r"""Draw standard Gumbel noise :math:`G = -\log E`, :math:`E = -\log(1 - U)`.

    The noise is computed and returned in float32 (in float64 where ``dtype`` is float64), never
    in half precision: eight bits of ``U`` cannot reach the upper tail. Every draw is finite.

    Args:
        shape: Shape of the noise.
        dtype: The dtype of the quantity that the noise is for.
        device: Device on which to draw.

    Returns:
        A tensor of ``shape``, float32 or float64.

    Example:
        >>> gumbel_noise((2, 3), torch.bfloat16).dtype
        torch.float32
    """
    return log_exponential_noise(shape, dtype, device).neg_()


def logistic_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    r"""Draw standard logistic noise :math:`\log U - \log(1 - U)`, in float32 or better.

    The difference of two independent Gumbels, from one uniform number. Finite and symmetric.
    """
    dtype = noise_dtype(dtype)
    half_cell = torch.finfo(dtype).eps * (0.25 - 2.0**-20)
    uniform = torch.rand(tuple(shape), dtype=dtype, device=device)
    # 1 - u is exact, so that each logarithm has the fine end of the lattice to itself.
    complement = (1 - uniform).sub_(half_cell)
    return uniform.add_(half_cell).log_().sub_(complement.log_())
