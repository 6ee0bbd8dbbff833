"""Several implementations of a training step of a categorical VAE."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F  # noqa: N812
from _timing import Step
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_gumbel.estimators import Estimator, GumbelStraightThrough, LeaveOneOut, Score
from pyro_gumbel.infer import CapturedSVI, Estimator_ELBO, config_gradient

LATENTS, CATEGORIES, TEMPERATURE, LR = 30, 10, 1.0, 1e-3
Hidden = tuple[int, ...]
LARGE, SMALL = (512, 256), (200,)
_numbers = itertools.count()


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """A VAE with layers 784-512-256-[30 x 10] and a mirrored decoder, as Pyro programs."""

    def __init__(self, device: torch.device, hidden: Hidden = LARGE) -> None:
        super().__init__()
        self.name = f"vae{next(_numbers)}"  # unique in Pyro's parameter store
        self.encoder = mlp(784, *hidden, LATENTS * CATEGORIES)
        self.decoder = mlp(LATENTS * CATEGORIES, *hidden[::-1], 784)
        self.register_buffer("prior", torch.zeros(LATENTS, CATEGORIES))
        self.to(device)

    def logits(self, x: Tensor) -> Tensor:
        return self.encoder(x).unflatten(-1, (LATENTS, CATEGORIES))

    def pixels(self, z: Tensor) -> Tensor:
        return self.decoder(z.flatten(-2))

    def latent(self, logits: Tensor) -> Any:
        return dist.OneHotCategorical(logits=logits).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module(f"{self.name}.decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self.latent(self.prior))
            pyro.sample("x", dist.Bernoulli(logits=self.pixels(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module(f"{self.name}.encoder", self.encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("z", self.latent(self.logits(x)))


class PyroVAE(VAE):
    """The same VAE with Pyro's straight-through class in both programs."""

    def latent(self, logits: Tensor) -> Any:
        temperature = torch.tensor(TEMPERATURE, device=logits.device)
        return dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=logits).to_event(1)


def hand_written(x: Tensor, *, hidden: Hidden = LARGE, fused: bool = False) -> Step:
    """Make a step in plain PyTorch: ``F.gumbel_softmax`` and the KL in closed form."""
    vae = VAE(x.device, hidden)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LR, fused=fused)

    def step() -> float:
        optimizer.zero_grad()
        logits = vae.logits(x)
        z = F.gumbel_softmax(logits, TEMPERATURE, hard=True)
        log_q, log_p = logits.log_softmax(-1), vae.prior.log_softmax(-1)
        divergence = (log_q.exp() * (log_q - log_p)).sum()
        pixels = F.binary_cross_entropy_with_logits(vae.pixels(z), x, reduction="sum")
        loss = pixels + divergence
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def hand_written_leave_one_out(x: Tensor, particles: int) -> Step:
    """Make a step in plain PyTorch: the score function with a leave-one-out baseline."""
    vae = VAE(x.device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LR)
    data = x.expand(particles, *x.shape)

    def step() -> float:
        optimizer.zero_grad()
        log_q = vae.logits(x).log_softmax(-1)
        index = torch.distributions.Categorical(logits=log_q.detach()).sample((particles,))
        z = F.one_hot(index, CATEGORIES).to(x.dtype)
        log_prob = (z * log_q).sum((-2, -1))
        prior = (z * vae.prior.log_softmax(-1)).sum((-2, -1))
        fit = F.binary_cross_entropy_with_logits(vae.pixels(z), data, reduction="none").sum(-1)
        cost = (fit - prior + log_prob).detach()
        baseline = (cost.sum(0) - cost) / (particles - 1)
        surrogate = fit.mean(0).sum() + ((cost - baseline) * log_prob).mean(0).sum()
        surrogate.backward()
        optimizer.step()
        return cost.mean(0).sum().item()

    return step


def under_validation(step: Step, validate: bool) -> Step:
    def run() -> Any:
        with pyro.validation_enabled(validate):
            return step()

    return run


def ours(
    x: Tensor,
    *,
    validate: bool,
    hidden: Hidden = LARGE,
    optimizer: str = "torch",
    estimator: Estimator | None = None,
    particles: int = 1,
    captured: bool = False,
    compile: bool = False,
) -> Step:
    """Make a step of Estimator_ELBO with torch's optimiser, or in SVI with Pyro's."""
    vae = VAE(x.device, hidden)
    elbo = Estimator_ELBO(
        particles,
        analytic_kl=estimator is None,
        max_plate_nesting=1,
        vectorize_particles=particles > 1,
    )
    guide = config_gradient(vae.guide, {"z": estimator or GumbelStraightThrough(TEMPERATURE)})
    fused = optimizer.endswith("fused")
    if optimizer.startswith("pyro"):
        optim = pyro.optim.Adam({"lr": LR, "fused": True} if fused else {"lr": LR})
        svi = (
            CapturedSVI(vae.model, guide, optim, elbo, compile=compile)
            if captured
            else SVI(vae.model, guide, optim, loss=elbo)
        )
        return under_validation(lambda: svi.step(x), validate)
    plain = torch.optim.Adam(vae.parameters(), lr=LR, fused=fused)

    def step() -> float:
        plain.zero_grad()
        loss = elbo.differentiable_loss(vae.model, guide, x)
        loss.backward()
        plain.step()
        return loss.item()

    return under_validation(step, validate)


def leave_one_out() -> Estimator:
    return Score(LeaveOneOut())


def pyro_trace_elbo(
    x: Tensor, *, validate: bool, hidden: Hidden = LARGE, optimizer: str = "pyro"
) -> Step:
    """Make a step of Pyro's Trace_ELBO with its straight-through class in both programs."""
    vae = PyroVAE(x.device, hidden)
    loss = Trace_ELBO()
    if optimizer == "pyro":
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LR}), loss=loss)
        return under_validation(lambda: svi.step(x), validate)
    plain = torch.optim.Adam(vae.parameters(), lr=LR)

    def step() -> float:
        plain.zero_grad()
        value = loss.differentiable_loss(vae.model, vae.guide, x)
        value.backward()
        plain.step()
        return value.item()

    return under_validation(step, validate)
