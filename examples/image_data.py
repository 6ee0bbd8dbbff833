"""Images for the examples: scikit-learn's digits, or a folder of IDX files such as MNIST's."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TRAIN_FILE = "train-images-idx3-ubyte"
TEST_FILE = "t10k-images-idx3-ubyte"
BINARIZE = ("threshold", "stochastic", "none")


@dataclass(frozen=True)
class Images:
    """Training and held-out images in [0, 1], each of shape ``(N, height * width)``."""

    name: str
    shape: tuple[int, int]
    train: torch.Tensor
    test: torch.Tensor
    binarize: str = "none"

    @property
    def num_pixels(self) -> int:
        return math.prod(self.shape)

    def to(self, device: torch.device) -> Images:
        return self._replace(self.train.to(device), self.test.to(device))

    def head(self, num_train: int, num_test: int) -> Images:
        return self._replace(self.train[:num_train], self.test[:num_test])

    def _replace(self, train: torch.Tensor, test: torch.Tensor) -> Images:
        return Images(self.name, self.shape, train, test, self.binarize)

    def batches(self, size: int) -> list[torch.Tensor]:
        """One epoch of training images in a new order; the last batch may be smaller."""
        order = torch.randperm(len(self.train)).to(self.train.device)
        images = (self.train[index] for index in order.split(size))
        if self.binarize == "stochastic":
            return [torch.bernoulli(batch) for batch in images]
        return list(images)


def load_images(folder: str | None, binarize: str) -> Images:
    """Load the images of an IDX folder, or scikit-learn's digits where no folder is named.

    ``binarize`` is ``"threshold"`` (a pixel is on from one half), ``"stochastic"`` (training
    pixels are drawn anew each epoch with the grey value as their probability, held-out pixels
    once) or ``"none"`` (grey values). Results under different settings are not comparable.
    """
    if binarize not in BINARIZE:
        raise ValueError(f"binarize is one of {', '.join(BINARIZE)}; got {binarize!r}")
    images = load_digits() if folder is None else load_idx_folder(Path(folder))
    train, test = images.train, images.test
    if binarize == "threshold":
        train, test = (train >= 0.5).float(), (test >= 0.5).float()
    elif binarize == "stochastic":
        # The held-out images are the same for every seed of a comparison.
        test = torch.bernoulli(test, generator=torch.Generator().manual_seed(0))
    return Images(images.name, images.shape, train, test, binarize)


def load_digits() -> Images:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels, the last 297 in a fixed order held out."""
    try:
        from sklearn import datasets
    except ImportError as error:
        error.add_note("the default images are scikit-learn's: pip install scikit-learn")
        raise
    pixels = torch.tensor(datasets.load_digits().data, dtype=torch.float32) / 16
    # The file is sorted by writer: shuffle, the same way always.
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    return Images("digits", (8, 8), pixels[:1500], pixels[1500:])


def load_idx_folder(folder: Path) -> Images:
    """Load the training and test images of a folder laid out as MNIST's, plain or gzipped."""
    train, test = read_idx(find(folder, TRAIN_FILE)), read_idx(find(folder, TEST_FILE))
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"{folder} has training images of {train.shape[1:]} pixels and test images of "
            f"{test.shape[1:]}: both have to be of one data set"
        )
    height, width = train.shape[1:]
    flat = [torch.from_numpy(a.reshape(len(a), -1)).float() / 255 for a in (train, test)]
    return Images(folder.resolve().name, (height, width), *flat)


def find(folder: Path, name: str) -> Path:
    """Find one of the four standard files, gzipped or not, under either of its two spellings."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: --data names a folder of IDX files")
    spellings = (name, name.replace("-idx", ".idx"))
    for candidate in (folder / (spelling + end) for spelling in spellings for end in ("", ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} holds no {name} (or {name}.gz): --data names the folder with MNIST's four "
        f"files, or those of a data set in the same format"
    )


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, the type 8, the rank, the sizes, then the values."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}): fetch it again") from error
    if len(raw) < 16 or raw[:4] != b"\x00\x00\x08\x03":
        raise ValueError(
            f"{path} is no IDX file of images: it starts with {raw[:4]!r}, "
            rf"expected b'\x00\x00\x08\x03'"
        )
    shape = struct.unpack(">3I", raw[4:16])
    if len(raw) - 16 != math.prod(shape) or 0 in shape:
        raise ValueError(
            f"{path} announces {shape[0]} images of {shape[1]} x {shape[2]} pixels, which is "
            f"{math.prod(shape)} bytes, but holds {len(raw) - 16}: fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=16).reshape(shape).copy()
