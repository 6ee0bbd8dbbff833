"""Held-out bounds on the log evidence, computed in the same way for every program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample


class Bounds(NamedTuple):
    """Lower bounds on the log evidence in nats per image, and the ELBO's standard error."""

    elbo: float
    elbo_se: float
    importance_weighted: float


@torch.no_grad()
def held_out_bounds(
    model: Callable[..., object],
    guide: Callable[..., object],
    images: torch.Tensor,
    num_samples: int = 100,
    batch_size: int = 100,
    seed: int = 0,
) -> Bounds:
    r"""Estimate the ELBO and the importance-weighted bound (Burda et al. 2016, 1509.00519).

    For hard draws :math:`z \sim q` and :math:`\log w = \log p(x, z) - \log q(z \mid x)`, the ELBO
    is the mean of :math:`\log w`, and the importance-weighted bound is the log of the mean of
    :math:`w` over ``num_samples`` draws. The estimates use no gradient estimator: ``model`` and
    ``guide`` must hold the discrete distributions, and each must have one plate, over the images,
    at dim -1. The draws have their own ``seed`` and leave the global generator unchanged.
    """
    elbos, importance_weighted = [], []
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        for batch in images.split(batch_size):
            log_weights = log_importance_weights(model, guide, batch, num_samples)
            elbos.append(log_weights.mean(0))
            importance_weighted.append(log_weights.logsumexp(0) - math.log(num_samples))
    elbo = torch.cat(elbos).double()
    return Bounds(
        elbo.mean().item(),
        elbo.std().item() / math.sqrt(len(elbo)),
        torch.cat(importance_weighted).double().mean().item(),
    )


def log_importance_weights(
    model: Callable[..., object],
    guide: Callable[..., object],
    images: torch.Tensor,
    num_samples: int,
) -> torch.Tensor:
    """Draw log importance weights of shape ``(num_samples, len(images))``."""
    samples = pyro.plate("samples", num_samples, dim=-2)
    with samples:
        guide_trace = poutine.trace(guide).get_trace(images)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(images)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return _log_joint(model_trace) - _log_joint(guide_trace)


def _log_joint(trace: poutine.Trace) -> torch.Tensor:
    sites = (site for site in trace.nodes.values() if site["type"] == "sample")
    log_probs = [site["log_prob"] for site in sites if not site_is_subsample(site)]
    return torch.stack(torch.broadcast_tensors(*log_probs)).sum(0)
