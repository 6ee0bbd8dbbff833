"""Train in several processes that torchrun starts; each takes a share of every batch.

    torchrun --nproc-per-node 2 examples/vae.py --gradient reinmax

Without torchrun the functions here have no effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
import torch.distributed as dist
from pyro.infer import SVI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyro_gumbel.estimators import MovingAverage
from pyro_gumbel.infer import Estimator_ELBO


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


@contextmanager
def same_everywhere(seed: int, epoch: int) -> Iterator[None]:
    """Draw the same random numbers in every process, from a separate stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000_003 * seed + epoch)
        yield


def seed_share(seed: int, epoch: int) -> None:
    """Seed each process differently, for the latents of its share."""
    if world_size() > 1:
        pyro.set_rng_seed((1_000_003 * seed + epoch) * world_size() + rank())


def same_averages(everything: nn.Module, num_images: int) -> None:
    """Replace moving averages of costs by their mean over processes.

    The mean is weighted by each process's ``num_images``. A moving average is linear in the costs,
    so the result is the average that one process with all images would have.
    """
    total = torch.tensor(float(num_images))
    averages = [module for module in everything.modules() if isinstance(module, MovingAverage)]
    for average in averages:
        state = average.get_extra_state()
        for site, mean in state["sums"].items():
            parts = torch.stack([mean * num_images, total.to(mean)])
            dist.all_reduce(parts)
            state["sums"][site] = parts[0] / parts[1]
        average.set_extra_state(state)


class _Loss(nn.Module):
    """The ELBO's loss as a module with every parameter, for DistributedDataParallel."""

    def __init__(
        self, elbo: Estimator_ELBO, model: Any, guide: Any, everything: nn.Module
    ) -> None:
        super().__init__()
        self.everything = everything
        self.programs = (model, guide)
        self.elbo = elbo

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.elbo.differentiable_loss(*self.programs, batch)


def make_svi(
    elbo: Estimator_ELBO, model: Any, guide: Any, optimizer: Any, everything: nn.Module
) -> SVI:
    """Make an ``SVI`` whose losses and gradients are sums over all processes.

    ``everything`` holds the modules whose parameters are trained, including the estimator.
    """
    if world_size() == 1:
        return SVI(model, guide, optimizer, loss=elbo)
    module = _Loss(elbo, model, guide, everything)
    if any(parameter.requires_grad for parameter in module.parameters()):
        module = DistributedDataParallel(module)

    def loss_and_grads(model: Any, guide: Any, batch: torch.Tensor) -> torch.Tensor:
        # DistributedDataParallel averages gradients; the loss is a sum over images.
        loss = module(batch) * world_size()
        loss.backward()
        same_averages(everything, len(batch))
        total = loss.detach() / world_size()
        dist.all_reduce(total)
        return total

    return SVI(model, guide, optimizer, loss=elbo.loss, loss_and_grads=loss_and_grads)
