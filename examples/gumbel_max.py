"""Check the Gumbel-max trick: the arg max of logits plus Gumbel noise is a softmax draw.

    python examples/gumbel_max.py
    python examples/gumbel_max.py --draws 100000 --words 50000

There are three softmaxes: six logits, a linear classifier's x'theta for three inputs, and a
vocabulary of word vectors u'v. A second figure shows the Concrete density, the density of the
relaxed draw, on the triangle.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import style
from arguments import at_least, count, make_folder, natural, new_parser
from pyro_gumbel.distributions import ExpRelaxedOneHot, Gumbel, RelaxedOneHot, gumbel_noise

TEMPERATURES = (0.2, 0.5, 1.0, 2.0, 10.0)
TRIANGLE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])  # corners


def count_draws(logits: Tensor, draws: int, label: str) -> Tensor:
    """Count values of arg max (logits + G) over independent noise; shape as ``logits``."""
    counts = torch.zeros_like(logits)
    chunk = max(1, 20_000_000 // logits.numel())
    for start in tqdm(range(0, draws, chunk), desc=label, mininterval=0.5):
        size = min(chunk, draws - start)
        noise = gumbel_noise((size, *logits.shape), logits.dtype, logits.device)
        index = (logits + noise).argmax(-1)  # (size, ...)
        counts.scatter_add_(
            -1, index.movedim(0, -1), torch.ones_like(index.movedim(0, -1), dtype=counts.dtype)
        )
    return counts


def chi_square(counts: Tensor, probs: Tensor, num_bins: int = 40) -> tuple[float, int]:
    """Return Pearson's statistic and its degrees of freedom; rare categories share bins."""
    order = probs.argsort(descending=True)
    total = counts.sum()
    if len(probs) > num_bins:
        position = (probs[order].cumsum(0) - probs[order] / 2) * num_bins
        bins = position.long().clamp(max=num_bins - 1)
    else:
        bins = torch.arange(len(probs))
    expected = torch.zeros(num_bins, dtype=torch.float64).index_add_(
        0, bins, (probs[order] * total).double()
    )
    found = torch.zeros_like(expected).index_add_(0, bins, counts[order].double())
    used = expected > 0
    statistic = ((found - expected)[used] ** 2 / expected[used]).sum().item()
    return statistic, int(used.sum()) - 1


def report(label: str, counts: Tensor, logits: Tensor) -> None:
    statistic, freedom = chi_square(counts, logits.softmax(-1))
    z = (statistic - freedom) / math.sqrt(2 * freedom)
    print(
        f"{label:26}{int(counts.sum()):>10,} draws   chi-square {statistic:6.1f} on {freedom:2}"
        f"   z = {z:+.2f}"
    )


def draw_frequencies(args: argparse.Namespace) -> Path:
    """Plot frequencies of draws from the three softmaxes with their probabilities."""
    six = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0, -2.0])
    inputs, theta = torch.randn(3, 4), torch.randn(4, 5)
    classes = inputs @ theta
    vectors, context = torch.randn(args.words, 50) * 0.35, torch.randn(50)
    words = vectors @ context

    counted = {
        "six logits": (six, count_draws(six, args.draws, "six logits")),
        "classes, x'theta": (classes, count_draws(classes, args.draws, "classes")),
        "words, u'v": (words, count_draws(words, args.word_draws, "words")),
    }
    figure, axes = style.panels(1, 4, (3.4, 3.2))
    axis = axes[0, 0]
    noise = Gumbel(0.0).sample((args.draws,)).numpy()
    grid = torch.linspace(-3, 8, 200)
    axis.hist(noise, bins=80, range=(-3, 8), density=True, color=style.COLORS[4], label="draws")
    axis.plot(grid, Gumbel(0.0).log_prob(grid).exp(), color="black", label="probability")
    axis.set(title="Gumbel(0, 1)", xlabel="value", ylabel="density")
    for axis, (title, (logits, counts)) in zip(
        axes[0, 1:3], list(counted.items())[:2], strict=True
    ):
        _bars(axis, counts / counts.sum(-1, keepdim=True), logits.softmax(-1))
        axis.set(title=title, xlabel="category", ylabel="frequency")
    logits, counts = counted["words, u'v"]
    _rank_plot(axes[0, 3], counts, logits.softmax(-1))
    axes[0, 3].set(
        title=f"{args.words:,} words, u'v",
        xlabel="expected draws of a word",
        ylabel="mean count of such words",
    )
    for title, (logits, counts) in counted.items():
        for row, (one, found) in enumerate(
            zip(
                logits.reshape(-1, logits.shape[-1]),
                counts.reshape(-1, logits.shape[-1]),
                strict=True,
            )
        ):
            report(f"{title}, input {row}" if logits.dim() > 1 else title, found, one)
    style.legend_outside(figure, axes[0])
    return style.write(figure, args.out / "gumbel_max.png")


def _bars(axis: Any, frequencies: Tensor, probs: Tensor) -> None:
    rows, categories = frequencies.reshape(-1, frequencies.shape[-1]).shape
    width = 0.8 / rows
    for row in range(rows):
        at = np.arange(categories) + width * (row - (rows - 1) / 2)
        color = style.COLORS[(1, 2, 3)[row] if rows > 1 else 4]
        axis.bar(
            at,
            frequencies.reshape(rows, -1)[row].numpy(),
            width,
            color=color,
            label="draws" if rows == 1 else f"draws, input {row}",
        )
        axis.plot(at, probs.reshape(rows, -1)[row], "k_", markersize=10, label="probability")


def _rank_plot(axis: Any, counts: Tensor, probs: Tensor, groups: int = 60) -> None:
    """Plot mean counts of words of similar probability; the most probable are single."""
    order = probs.argsort(descending=True)
    edges = np.unique(np.geomspace(1, len(probs), groups).astype(int))
    sizes = np.diff(np.append(0, edges)).tolist()
    found = torch.stack([part.mean() for part in counts[order].split(sizes)])
    expected = torch.stack([part.mean() for part in probs[order].split(sizes)]) * counts.sum()
    error = 2 * (expected / torch.tensor(sizes)).sqrt()
    expected, found, error = expected.numpy(), found.numpy(), error.numpy()
    axis.errorbar(expected, found, error, fmt=".", color=style.COLORS[4], label="draws")
    axis.plot(expected, expected, color="black", label="probability")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(expected.min() / 3, expected.max() * 2)


def draw_triangles(args: argparse.Namespace) -> Path:
    """Plot the Concrete density and samples on the triangle, at several temperatures."""
    logits = torch.tensor([2.0, 0.5, 1.0]).log()
    figure, axes = style.panels(1, len(TEMPERATURES), (2.3, 2.3))
    grid = triangle_grid(args.grid)
    print()
    for axis, temperature in zip(axes[0], TEMPERATURES, strict=True):
        concrete = RelaxedOneHot(temperature, logits=logits, validate_args=False)
        log_density = concrete.log_prob(grid)
        cells = grid @ TRIANGLE
        axis.tripcolor(
            cells[:, 0],
            cells[:, 1],
            log_density.clamp(-4, 4),
            cmap="cividis",
            shading="gouraud",
            vmin=-4,
            vmax=4,
        )
        points = concrete.sample((300,)) @ TRIANGLE
        axis.plot(points[:, 0], points[:, 1], ".", markersize=2, color=style.COLORS[1])
        for corner, prob, up in zip(TRIANGLE.tolist(), logits.softmax(-1), (0, 0, 1), strict=True):
            where = "bottom" if up else "top"
            axis.text(*corner, f"{prob:.2f}", ha="center", va=where, fontsize=8)
        axis.set_title(f"temperature {temperature:g}", pad=14)
        axis.set_aspect("equal")
        axis.set_axis_off()
        mean = concrete.sample((20_000,)).amax(-1).mean()
        print(
            f"temperature {temperature:5g}: density integrates to "
            f"{integrate(temperature, logits):.5f}, mean largest coordinate {mean:.3f}"
        )
    bar = figure.colorbar(axes[0, 0].collections[0], ax=axes, shrink=0.8)
    bar.set_label("log density, nats")
    return style.write(figure, args.out / "concrete.png")


def triangle_grid(size: int) -> Tensor:
    """Return points inside the triangle: cell centres of a grid of barycentric coordinates."""
    first, second = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = first + second < size
    a, b = (first[inside] + 1 / 3) / size, (second[inside] + 1 / 3) / size
    return torch.stack([a, b, 1 - a - b], -1)


def integrate(temperature: float, logits: Tensor, cells: int = 800) -> float:
    """Integrate the density in log ratios, in which its tails are light."""
    concrete = ExpRelaxedOneHot(temperature, logits=logits.double(), validate_args=False)
    half = 25 / min(temperature, 1.0) if temperature < 1 else 25 / temperature + 3
    line = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 * half - half
    first, second = torch.meshgrid(line, line, indexing="ij")
    ratios = torch.stack([first, second, torch.zeros_like(first)], -1)
    area = (2 * half / cells) ** 2
    return (concrete.log_prob(ratios.log_softmax(-1)).exp().sum() * area).item()


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--draws", type=count, default=200_000, help="draws of the two small softmaxes")
    add("--words", type=at_least(2), default=50_000, help="size of the vocabulary")
    add("--word-draws", type=count, default=20_000, help="draws from the vocabulary")
    add("--grid", type=at_least(2), default=90, help="cells along a side of the triangles")
    add("--seed", type=natural, default=0, help="seed of all draws")
    add("--out", type=Path, default=Path("out/gumbel_max"), metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few draws")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if args.smoke:
        args.draws, args.words, args.word_draws, args.grid = 2000, 500, 1000, 20
    written = [draw_frequencies(args), draw_triangles(args)]
    print("\nwritten:", *written, sep="\n  ")


if __name__ == "__main__":
    main()
