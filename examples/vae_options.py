"""The command line of vae.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import parallel
from arguments import count, natural, new_parser, positive
from gradients import FORM, HELP, one, several
from image_data import BINARIZE, Images

# What may differ between a checkpoint and its continuation.
NOT_PART_OF_A_RUN = {
    "checkpoint",
    "compare",
    "data",
    "device",
    "epochs",
    "num_samples",
    "out",
    "seeds",
    "smoke",
}


def settings_of(
    args: argparse.Namespace, gradient: str, seed: int, images: Images
) -> dict[str, Any]:
    """List what a run depends on, so that a checkpoint can tell whether it is of the same run."""
    settings = {k: v for k, v in vars(args).items() if k not in NOT_PART_OF_A_RUN}
    data = f"{images.name}, {len(images.train)} images of {images.num_pixels} pixels"
    settings |= {"gradient": gradient, "seed": seed, "images": data}
    return settings | {"processes": parallel.world_size()}  # each draws from a stream of its own


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = new_parser(description)
    add = parser.add_argument
    add("--data", metavar="DIR", help="IDX files such as MNIST's (default: scikit-learn's digits)")
    add("--binarize", choices=BINARIZE, default="threshold", help="how grey pixels become targets")
    add(
        "--latent",
        choices=("onehot", "bernoulli", "normal"),
        default="onehot",
        help="law of a latent",
    )
    add("--latents", type=count, default=10, help="number of latents")
    add("--categories", type=count, default=10, help="of each one-hot latent")
    add("--hidden", type=sizes, default="256", help="encoder's layers, the decoder's mirrored")
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    add_one_of("--gradient", type=one, default="reinmax", metavar=FORM, help=HELP)
    add_one_of("--compare", type=several, metavar=f"{FORM},...", help="train each of several")
    add("--temperature", type=float, help="where the estimator has one and no @T is given")
    add("--num-particles", type=count, default=1, help="where no :K is given")
    add("--analytic-kl", action="store_true", help="integrate the KL term, where it can be")
    add("--seeds", type=count, default=1, help="number of seeds, from --seed on")
    add("--seed", type=natural, default=0, help="of the first run")
    add("--epochs", type=count, default=100, help="passes over the training images")
    add("--batch-size", type=count, default=100, help="images a step")
    add("--lr", type=positive, default=3e-3, help="step size of the optimiser")
    add("--optimizer", choices=("adam", "radam"), default="adam", help="Adam or RAdam")
    add("--num-samples", type=count, default=100, help="hard draws of the final bounds")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, if any")
    add("--checkpoint", type=Path, metavar="FILE", help="save each epoch there, and go on from it")
    add("--out", type=Path, default=Path("out/vae"), metavar="DIR", help="pictures and history")
    add("--smoke", action="store_true", help="a few images, two epochs: does it run at all?")
    return parser


def sizes(text: str) -> list[int]:
    return [count(size) for size in text.split(",")]
