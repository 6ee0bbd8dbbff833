"""Exchange values with the other processes of an initialised group, if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "num_processes", "of_first", "rank", "sum_over_processes"]


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if num_processes() > 1 else 0


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in their order."""
    values = [value] * num_processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def of_first(value: Any) -> Any:
    """Return the first process's value."""
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def sum_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each tensor over processes, those of one type and device at once."""
    found: list[Tensor] = list(tensors)
    kinds: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(index)
    for indices in kinds.values():
        flat = torch.cat([tensors[index].detach().reshape(-1) for index in indices])
        if flat.is_cpu and "gloo" not in str(dist.get_backend()):
            flat = flat.cuda()  # nccl sums on GPUs only
        dist.all_reduce(flat)
        parts = flat.split([tensors[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            found[index] = part.view(tensors[index].shape).to(tensors[index].device)
    return found
