"""Figures of the examples; each function writes one PNG and returns its path."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr

import style


def image_grid(rows: dict[str, torch.Tensor], shape: tuple[int, int], path: Path) -> Path:
    """Plot labelled rows of images, whose values are in [0, 1], of shape ``(N, pixels)``."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(0.62 * columns + 1.2, 0.66 * len(rows) + 0.1),
        squeeze=False,
        layout="constrained",
    )
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, images.cpu().numpy(), strict=False):
            axis.imshow(image.reshape(shape), cmap="gray_r", vmin=0, vmax=1)
        line[0].text(
            -0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    return style.write(figure, path)


def sample_grid(images: torch.Tensor, shape: tuple[int, int], path: Path) -> Path:
    """Plot images in a square grid, without labels."""
    side = int(np.ceil(np.sqrt(len(images))))
    height, width = shape
    canvas = np.zeros((side * (height + 1) - 1, side * (width + 1) - 1))
    for index, image in enumerate(images.cpu().numpy()):
        top, left = (index // side) * (height + 1), (index % side) * (width + 1)
        canvas[top : top + height, left : left + width] = image.reshape(shape)
    figure, axis = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    axis.imshow(canvas, cmap="gray_r", vmin=0, vmax=1)
    axis.set_axis_off()
    return style.write(figure, path)


def training_curves(history: xr.Dataset, path: Path) -> Path:
    """Plot training and held-out losses by epoch: mean and range over seeds."""
    titles = {"train_loss": "training images", "held_out_loss": "held-out images"}
    colors = style.colors(map(str, history.gradient.values))
    figure, axes = style.panels(1, 2, (4.5, 3.4), sharey=True)
    for axis, (variable, title) in zip(axes[0], titles.items(), strict=True):
        for gradient, color in colors.items():
            curves = history[variable].sel(gradient=gradient)
            axis.plot(history.draw, curves.mean("chain"), color=color, label=gradient)
            low, high = curves.min("chain"), curves.max("chain")
            axis.fill_between(history.draw, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="epoch")
        style.whole_numbers(axis)
    axes[0, 0].set_ylabel("negative ELBO, nats per image")
    axes[0, 0].set_ylim(*_limits(history))
    number = history.sizes["chain"]
    several = f"mean of {number} seeds; bands: their range" if number > 1 else None
    style.legend_outside(figure, axes[0], title=several)
    return style.write(figure, path)


def _limits(history: xr.Dataset) -> tuple[float, float]:
    """Return axis limits without the first, steep epochs."""
    losses = xr.concat([history.train_loss, history.held_out_loss], "split").values
    low = float(np.nanmin(losses))
    high = float(np.nanmax(losses[:, :, losses.shape[2] // 10 :]))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
