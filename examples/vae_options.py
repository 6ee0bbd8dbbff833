"""Command-line options of vae.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import parallel
from arguments import count, natural, new_parser, positive
from gradients import FORM, HELP, one, several
from image_data import BINARIZE, Images

# Options that may differ between a checkpoint and the resumed run.
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
    """Return the settings that a run depends on, which a checkpoint must share."""
    settings = {k: v for k, v in vars(args).items() if k not in NOT_PART_OF_A_RUN}
    data = f"{images.name}, {len(images.train)} images of {images.num_pixels} pixels"
    settings |= {"gradient": gradient, "seed": seed, "images": data}
    return settings | {"processes": parallel.world_size()}  # each has its own random stream


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = new_parser(description)
    add = parser.add_argument
    add("--data", metavar="DIR", help="IDX files such as MNIST's (default: scikit-learn's digits)")
    add("--binarize", choices=BINARIZE, default="threshold", help="targets from grey pixels")
    add(
        "--latent",
        choices=("onehot", "bernoulli", "normal"),
        default="onehot",
        help="distribution of a latent",
    )
    add("--latents", type=count, default=10, help="number of latents")
    add("--categories", type=count, default=10, help="categories of a one-hot latent")
    add("--hidden", type=sizes, default="256", help="encoder's layers; the decoder mirrors them")
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    add_one_of("--gradient", type=one, default="reinmax", metavar=FORM, help=HELP)
    add_one_of("--compare", type=several, metavar=f"{FORM},...", help="several estimators")
    add("--temperature", type=float, help="temperature of estimators without @T")
    add("--num-particles", type=count, default=1, help="particles of estimators without :K")
    add("--analytic-kl", action="store_true", help="use the KL term's closed form, if known")
    add("--seeds", type=count, default=1, help="number of seeds, starting at --seed")
    add("--seed", type=natural, default=0, help="seed of the first run")
    add("--epochs", type=count, default=100, help="passes over the training images")
    add("--batch-size", type=count, default=100, help="images per step")
    add("--lr", type=positive, default=3e-3, help="learning rate of the optimiser")
    add("--optimizer", choices=("adam", "radam"), default="adam", help="Adam or RAdam")
    add("--num-samples", type=count, default=100, help="hard draws for the final bounds")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, if any")
    add("--checkpoint", type=Path, metavar="FILE", help="save each epoch there; resume from it")
    add("--out", type=Path, default=Path("out/vae"), metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few images and two epochs")
    return parser


def sizes(text: str) -> list[int]:
    return [count(size) for size in text.split(",")]
