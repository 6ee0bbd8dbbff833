"""Share batches among the processes that torchrun starts.

    torchrun --nproc-per-node 2 examples/vae.py --gradient reinmax

Without torchrun the functions here have no effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_device(device: torch.device) -> torch.device:
    """Return this process's GPU, or ``device`` itself if it is not a GPU."""
    if device.type != "cuda":
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Connect the processes that torchrun started, unless they are connected."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_batches(num_images: int, batch_size: int) -> None:
    """Raise if a batch, such as the last one, has fewer images than there are processes."""
    smallest = min(batch_size, num_images % batch_size or batch_size)
    if smallest < world_size():
        raise ValueError(
            f"--batch-size {batch_size}: the smallest batch of {num_images} images has {smallest} "
            f"for {world_size()} processes; choose another batch size"
        )


def share(batch: torch.Tensor) -> torch.Tensor:
    """Return this process's images of a batch."""
    return batch[rank() :: world_size()] if world_size() > 1 else batch
