"""Draw noise in float32 or better, also for half-precision distributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def noise_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for computing noise and densities of ``dtype``: float32 or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_exponential_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    r"""Draw :math:`\log E` with :math:`E \sim \mathrm{Exp}(1)`, a negative standard Gumbel.

    This is the negative of :func:`gumbel_noise`, and one pass cheaper.
    """
    dtype = noise_dtype(dtype)
    # torch.rand returns k * 2^-b, k = 0, 1, ... A shift by half a cell centres the lattice and
    # keeps E > 0. It is slightly less than half, so that the last cell does not round to one
    # (E < inf). log1p keeps a fine resolution at small E, which decide the largest category.
    half_cell = torch.finfo(dtype).eps * (0.25 - 2.0**-20)
    uniform = torch.rand(tuple(shape), dtype=dtype, device=device)
    return uniform.add_(half_cell).neg_().log1p_().neg_().log_()


def gumbel_noise(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    r"""Draw standard Gumbel noise :math:`G = -\log E`, :math:`E = -\log(1 - U)`.

    The noise is computed and returned in float32, or in float64 if ``dtype`` is float64. Half
    precision of ``U`` would cut off the upper tail. Every draw is finite.

    Args:
        shape: Shape of the noise.
        dtype: The dtype of the distribution.
        device: Device of the noise.

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

    This is the difference of two independent Gumbels, from one uniform number. Draws are finite
    and symmetric.
    """
    dtype = noise_dtype(dtype)
    half_cell = torch.finfo(dtype).eps * (0.25 - 2.0**-20)
    uniform = torch.rand(tuple(shape), dtype=dtype, device=device)
    # 1 - u is exact, so both logarithms have a fine resolution near zero.
    complement = (1 - uniform).sub_(half_cell)
    return uniform.add_(half_cell).log_().sub_(complement.log_())
