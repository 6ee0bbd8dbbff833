"""Report training runs: a table, figures and the history."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import xarray as xr

import history
import plots
from evaluation import held_out_bounds
from image_data import Images


def report(
    args: argparse.Namespace,
    images: Images,
    trained: dict[str, dict[int, Any]],
    runs: dict[str, dict[int, history.Epochs]],
) -> None:
    """Write the history, print the table and plot the figures.

    ``trained`` and ``runs`` hold the VAE and the epochs by estimator and seed.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    epochs = history.to_dataset(runs, images=images.name, binarize=args.binarize, lr=args.lr)
    history.save(epochs, args.out / "history.nc")
    table(args, images, trained, epochs.seconds.sum("draw").mean("chain"))
    first = next(iter(next(iter(trained.values())).values()))
    written = pictures(first, images, epochs, args.out)
    print("\nwritten:", *written, args.out / "history.nc", sep="\n  ")


def table(
    args: argparse.Namespace,
    images: Images,
    trained: dict[str, dict[int, Any]],
    seconds: xr.DataArray,
) -> None:
    """Print one row per estimator, with bounds from :mod:`evaluation`."""
    print(
        f"\n{images.name} (--binarize {args.binarize}), {args.latents} {args.latent} latents, "
        f"{args.epochs} epochs, {len(images.test)} held-out images.\n"
        f"Nats per image from {args.num_samples} hard draws, lower is better; "
        f"mean of {args.seeds} seed(s) and half their range.\n"
    )
    print(f"{'gradient':26}{'held-out -ELBO':>18}{'importance-weighted':>22}{'seconds':>10}")
    for gradient, vaes in trained.items():
        bounds = [
            held_out_bounds(vae.model, vae.guide, images.test, args.num_samples)
            for vae in vaes.values()
        ]
        elbo = _spread([-bound.elbo for bound in bounds])
        weighted = _spread([-bound.importance_weighted for bound in bounds])
        took = float(seconds.sel(gradient=gradient))
        print(f"{gradient:26}{elbo:>18}{weighted:>22}{took:>10.1f}")


def _spread(values: list[float]) -> str:
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.2f} +- {half:.2f}" if len(values) > 1 else f"{mean:.2f}"


def pictures(vae: Any, images: Images, runs: xr.Dataset, folder: Path) -> list[Path]:
    """Plot reconstructions and samples of one VAE, and the training curves of all."""
    rows = {"image": images.test[:12], "decoded": vae.reconstruct(images.test[:12])}
    return [
        plots.image_grid(rows, images.shape, folder / "reconstructions.png"),
        plots.sample_grid(vae.new_images(64), images.shape, folder / "samples.png"),
        plots.training_curves(runs, folder / "training.png"),
    ]
