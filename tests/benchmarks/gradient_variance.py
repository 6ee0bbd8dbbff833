"""Variance of the encoder's gradient and cost of a step, on a VAE of 200 Bernoulli latents.

    python tests/benchmarks/gradient_variance.py [--data DIR] [--smoke]

All estimators are compared at the parameters of one checkpoint, on one minibatch, after training
their own learnable parameters. For two evaluations the literature (Titsias and Shi 2022, arXiv
2111.05300; Shi et al. 2022, arXiv 2202.09497) finds the order Rodeo < Double CV < DisARM ~
leave-one-out; ARMS with four evaluations is below all of them. DisARM reduces the variance of a
latent's factor by ``1 - p``, where ``p`` is the probability of its rarer value: by half if the
posterior is uniform, and not at all if it is deterministic. The order therefore depends on the
mean of ``p``, which is printed. Step times are medians of ratios of steps that run in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _report import Report, make_parser
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DisARMTree,
    DoubleControlVariate,
    Estimator,
    LeaveOneOut,
    MuProp,
    Rebar,
    Rodeo,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import Estimator_ELBO, config_gradient

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from image_data import load_images  # noqa: E402

# Name: (estimator, number of particles, evaluations).
METHODS: dict[str, tuple[Callable[[], Estimator], int, int]] = {
    "leave-one-out, 2": (lambda: Score(LeaveOneOut()), 2, 2),
    "DisARM": (DisARM, 1, 2),
    "Double CV, 2": (lambda: DoubleControlVariate(2), 1, 2),
    "Rodeo, 2": (lambda: Rodeo(2), 1, 2),
    "MuProp": (MuProp, 1, 2),
    "REBAR": (Rebar, 1, 3),
    "leave-one-out, 4": (lambda: Score(LeaveOneOut()), 4, 4),
    "DisARM, 2 pairs": (DisARM, 2, 4),
    "ARMS, 4": (lambda: ARMS(4), 1, 4),
    "Double CV, 4": (lambda: DoubleControlVariate(4), 1, 4),
    "Rodeo, 4": (lambda: Rodeo(4), 1, 4),
}


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(size_in, size_out), nn.LeakyReLU(0.3)]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """A VAE with Bernoulli or one-hot latents, a uniform prior, and Bernoulli pixels."""

    def __init__(
        self, pixels: int, hidden: tuple[int, ...], latents: int, categories: int
    ) -> None:
        super().__init__()
        self.categories = categories
        size = latents * categories
        self.encoder = mlp(pixels, *hidden, size)
        self.decoder = mlp(size, *reversed(hidden), pixels)

    def latent(self, logits: Tensor) -> Any:
        if self.categories == 1:
            return dist.Bernoulli(logits=logits).to_event(1)
        logits = logits.unflatten(-1, (-1, self.categories))
        return dist.OneHotCategorical(logits=logits).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            size = self.decoder[0].in_features
            z = pyro.sample("z", self.latent(x.new_zeros(len(x), size)))
            z = z if self.categories == 1 else z.flatten(-2)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("z", self.latent(self.encoder(x)))


def make_svi(vae: VAE, estimator: Estimator, particles: int, optim: Any) -> SVI:
    elbo = Estimator_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    return SVI(vae.model, config_gradient(vae.guide, estimator), optim, loss=elbo)


def train_checkpoint(vae: VAE, images: Any, steps: int) -> float:
    """Train by leave-one-out; return the mean loss per image of the last steps."""
    svi = make_svi(vae, Score(LeaveOneOut()), 4, pyro.optim.Adam({"lr": 1e-3}))
    losses: list[float] = []
    while len(losses) < steps:
        losses += [svi.step(batch) / len(batch) for batch in images.batches(100)]
    return statistics.mean(losses[-20:])


def train_parts(vae: VAE, estimator: Estimator, images: Any, steps: int) -> None:
    """Train an estimator's parameters; those of the VAE are fixed."""
    if not any(parameter.requires_grad for parameter in estimator.parameters()):
        return
    optim = pyro.optim.Adam(lambda name: {"lr": 3e-3 if name.startswith("gradient$") else 0.0})
    svi = make_svi(vae, estimator, 1, optim)
    done = 0
    while done < steps:
        for batch in images.batches(100):
            svi.step(batch)
            done += 1


def encoder_variance(
    vae: VAE, estimator: Estimator, particles: int, x: Tensor, draws: int
) -> tuple[float, float, float]:
    """Return the mean variance of a coordinate, its standard error, and seconds per step."""
    elbo = Estimator_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    guide = config_gradient(vae.guide, estimator)
    params = list(vae.encoder.parameters())
    blocks, times = [], []
    for _ in range(10):
        total, square = 0.0, 0.0
        for _ in range(draws // 10):
            vae.zero_grad()
            start = time.perf_counter()
            elbo.loss_and_grads(vae.model, guide, x)
            times.append(time.perf_counter() - start)
            gradient = torch.cat([p.grad.flatten() for p in params]).double() / len(x)
            total, square = total + gradient, square + gradient**2
        count = draws // 10
        variance = (square - total**2 / count) / (count - 1)
        blocks.append(variance.mean().item())
    error = statistics.stdev(blocks) / len(blocks) ** 0.5
    return statistics.mean(blocks), error, statistics.median(times)


def compare_variances(report: Report, args: argparse.Namespace) -> None:
    images = load_images(args.data, "stochastic")
    draws, steps, part_steps = (20, 20, 10) if args.smoke else (args.draws, args.steps, 600)
    pyro.clear_param_store()
    vae = VAE(images.num_pixels, (200, 200), 200, 1)
    loss = train_checkpoint(vae, images, steps)
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    x = images.batches(100)[0]
    theta = vae.encoder(x).detach().sigmoid()
    rarer = torch.minimum(theta, 1 - theta).mean().item()
    rows = []
    for name, (make, particles, evaluations) in METHODS.items():
        pyro.clear_param_store()
        estimator = make()
        train_parts(vae, estimator, images, part_steps)
        changed = [key for key, value in vae.state_dict().items() if not value.equal(state[key])]
        if changed:
            raise RuntimeError(f"{name} is not measured at the checkpoint: {changed} changed")
        variance, error, seconds = encoder_variance(vae, estimator, particles, x, draws)
        first = rows[0] if rows else None
        rows.append(
            {
                "estimator": name,
                "evaluations": evaluations,
                "variance": variance,
                "s.e.": error,
                "ratio": variance / first["variance"] if first else 1.0,
                "ms": seconds * 1e3,
                "variance x s": variance * seconds,
                "ratio x s": variance * seconds / first["variance x s"] if first else 1.0,
            }
        )
    report.table(
        f"{images.name}, 200 Bernoulli latents, -ELBO {loss:.2f} after {steps} steps: variance of "
        f"a coordinate of the encoder's gradient, {draws} draws; mean probability of a latent's "
        f"rarer value {rarer:.3f}",
        rows,
    )


def compare_steps(report: Report, rounds: int) -> None:
    """Compare SVI steps on a VAE of MNIST's size with straight-through steps."""
    x = (torch.rand(100, 784) < 0.3).float()
    rows = []
    for latent, latents, categories, pair in [
        ("200 Bernoulli", 200, 1, ("DisARM", DisARM)),
        ("30 x 10 one-hot", 30, 10, ("DisARM-Tree", DisARMTree)),
    ]:
        candidates: dict[str, Callable[[], Estimator]] = {
            pair[0]: pair[1],
            "REBAR": Rebar,
            "REBAR, learn=False": lambda: Rebar(learn=False),
            "Double CV, 2": lambda: DoubleControlVariate(2),
        }
        for name, make in candidates.items():
            steps = []
            for estimator in (StraightThrough(), make()):
                pyro.clear_param_store()
                vae = VAE(784, (512, 256), latents, categories)
                svi = make_svi(vae, estimator, 1, pyro.optim.Adam({"lr": 1e-3}))
                store = pyro.get_param_store()
                for _ in range(5):
                    svi.step(x)
                steps.append((svi, store.get_state()))
            ratios, seconds = [], []
            for _ in range(rounds):
                taken = []
                for svi, state in steps:
                    pyro.get_param_store().set_state(state)
                    start = time.perf_counter()
                    svi.step(x)
                    taken.append(time.perf_counter() - start)
                ratios.append(taken[1] / taken[0])
                seconds.append(taken[1])
            budget = {"DisARM": 1.8, "REBAR": 3.3}.get(name)
            rows.append(
                {
                    "latents": latent,
                    "estimator": name,
                    "ms": statistics.median(seconds) * 1e3,
                    "x straight-through": statistics.median(ratios),
                    "budget": budget,
                }
            )
    report.table(f"784-512-256, batch 100: SVI steps, medians of {rounds} pairs", rows)


def main() -> None:
    """Compare steps, then variances."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of IDX files (default: scikit-learn's digits)")
    parser.add_argument("--steps", type=int, default=1500, help="steps to the checkpoint")
    parser.add_argument("--draws", type=int, default=400, help="gradients of each estimator")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    report = Report("gradient_variance", args.out)
    compare_steps(report, 2 if args.smoke else 40)
    compare_variances(report, args)
    report.finish()


if __name__ == "__main__":
    main()
