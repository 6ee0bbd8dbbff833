"""Exact one-hot draws on a GPU by Triton, in one pass over the logits and one over the draw.

The draw by torch's operations takes a dozen passes. Each program draws several short rows. A long
row is split into chunks, and each program finds the winner of a chunk; a second, small kernel
writes the one of each row. One number seeds the noise of a draw. It comes from torch's generator,
so ``torch.manual_seed`` applies, and each replay of a CUDA graph draws new noise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["one_hot_draw", "try_out"]

_TILE = 1024  # logits per program, for short rows
_CHUNK = 4096  # logits per program, for chunks of long rows
_MOST = 2**31 - 1  # the kernels have 32-bit indices


@triton.jit
def _log_exponential(seed, SIZE: tl.constexpr):
    """Draw ``SIZE`` numbers ``log E``, ``E = -log(1 - u)``, with u on a lattice of 2^-31.

    The lattice is shifted by half a cell. The logarithm of ``1 - u`` is corrected for the rounding
    of ``1 - u``, since small E decide the winner.
    """
    QUARTER: tl.constexpr = SIZE // 4
    place = tl.program_id(0) * QUARTER + tl.arange(0, QUARTER)
    a, b, c, d = tl.rand4x(tl.load(seed), place)
    uniform = tl.interleave(tl.interleave(a, b), tl.interleave(c, d))
    u = tl.minimum(uniform + 2.3283064e-10, 0.99999994)
    rest = 1.0 - u
    correction = tl.where(rest == 1.0, 1.0, tl.log(rest) / (rest - 1.0))
    return tl.log(u * correction)


@triton.jit
def _below(logits, top):
    """Return logits minus their maximum, since an offset would increase rounding errors."""
    return logits - tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _draw_rows(logits, seed, draw, rows, given, size, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Draw ``ROWS`` rows; row ``r`` has the logits of row ``r % given``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < size)
    x = tl.load(logits + (row % given) * size + column, mask=inside, other=float("-inf"))
    x = _below(x.to(tl.float32), tl.max(x.to(tl.float32), 1, keep_dims=True))
    noise = tl.reshape(_log_exponential(seed, ROWS * WIDTH), [ROWS, WIDTH])
    winner = tl.argmax(x - noise, 1, keep_dims=True)
    one_hot = tl.where(column == winner, 1.0, 0.0)
    tl.store(draw + row * size + column, one_hot, mask=inside)


@triton.jit
def _draw_chunk(logits, seed, draw, best, given, size, chunks, CHUNK: tl.constexpr):
    """Write zeros, and write the chunk's winner to ``best``: score, offset and index."""
    program = tl.program_id(0)
    row = program // chunks
    column = program % chunks * CHUNK + tl.arange(0, CHUNK)
    inside = column < size
    x = tl.load(logits + (row % given) * size + column, mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    top = tl.max(x, 0)
    scores = _below(x, top) - _log_exponential(seed, CHUNK)
    score, winner = tl.max(scores, 0, return_indices=True)
    tl.store(draw + row * size + column, tl.zeros([CHUNK], tl.float32), mask=inside)
    programs = tl.num_programs(0)
    tl.store(best + program, score)
    tl.store(best + programs + program, top)
    tl.store(best + 2 * programs + program, winner.to(tl.float32))  # a small number: exact


@triton.jit
def _place_one(best, draw, rows, size, chunks, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Find the winner of a row among its chunks and write the one."""
    row = tl.program_id(0)
    chunk = tl.arange(0, WIDTH)
    here = best + row * chunks + chunk
    inside = chunk < chunks
    score = tl.load(here, mask=inside, other=float("-inf"))
    top = tl.load(here + rows * chunks, mask=inside, other=float("-inf"))
    chosen = tl.argmax(score + _below(top, tl.max(top, 0)), 0)
    winner = tl.load(best + 2 * rows * chunks + row * chunks + chosen).to(tl.int32)
    tl.store(draw + row * size + chosen * CHUNK + winner, 1.0)


@torch.library.custom_op("pyro_gumbel::one_hot_draw", mutates_args=())
def _one_hot_draw(logits: Tensor, seed: Tensor, copies: int) -> Tensor:
    size = logits.shape[-1]
    given = logits.numel() // size
    rows = given * copies
    draw = torch.empty((copies, *logits.shape), dtype=logits.dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        if size <= _TILE:
            width = triton.next_power_of_2(size)
            at_once = _TILE // width
            grid = (triton.cdiv(rows, at_once),)
            _draw_rows[grid](logits, seed, draw, rows, given, size, ROWS=at_once, WIDTH=width)
        else:
            chunks = triton.cdiv(size, _CHUNK)
            best = torch.empty((3, rows, chunks), dtype=torch.float32, device=logits.device)
            _draw_chunk[(rows * chunks,)](
                logits, seed, draw, best, given, size, chunks, CHUNK=_CHUNK
            )
            width = triton.next_power_of_2(chunks)
            _place_one[(rows,)](best, draw, rows, size, chunks, CHUNK=_CHUNK, WIDTH=width)
    return draw


@_one_hot_draw.register_fake
def _(logits: Tensor, seed: Tensor, copies: int) -> Tensor:
    return logits.new_empty((copies, *logits.shape))


def one_hot_draw(logits: Tensor, sample_shape: torch.Size) -> Tensor | None:
    """Draw as :func:`~pyro_gumbel.distributions.draw_one_hot` does, from noise in float32.

    Args:
        logits: Log-probabilities up to a constant, ``batch_shape + (C,)``, float32 or lower.
        sample_shape: Leading shape of the draw.

    Returns:
        One-hot values ``sample_shape + batch_shape + (C,)``, or ``None`` if their number is
        zero or too large for the kernels.
    """
    copies = sample_shape.numel()
    if not 0 < logits.numel() * copies <= _MOST:
        return None
    seed = torch.randint(2**62, (1,), device=logits.device)
    draw = _one_hot_draw(logits.contiguous(), seed, copies)
    return draw.view(*sample_shape, *logits.shape)


def try_out(device: torch.device) -> None:
    """Draw once, without using random numbers; raises if Triton cannot compile."""
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    _one_hot_draw(torch.zeros(2, device=device), seed, 1)
