"""Load images for the examples: scikit-learn's digits, or IDX files such as MNIST's."""

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
        """Return an epoch of training images in a new order; the last batch may be smaller."""
        order = torch.randperm(len(self.train)).to(self.train.device)
        images = (self.train[index] for index in order.split(size))
        if self.binarize == "stochastic":
            return [torch.bernoulli(batch) for batch in images]
        return list(images)


def load_images(folder: str | None, binarize: str) -> Images:
    """Load images from a folder of IDX files, or scikit-learn's digits if ``folder`` is None.

    With ``binarize="threshold"`` a pixel is on if its grey value is at least one half. With
    ``"stochastic"`` pixels are Bernoulli draws with the grey value as probability: training
    pixels are drawn again in each epoch, held-out pixels once. ``"none"`` keeps grey values.
    Results under different settings are not comparable.
    """
    if binarize not in BINARIZE:
        raise ValueError(f"binarize must be one of {', '.join(BINARIZE)}; got {binarize!r}")
    images = load_digits() if folder is None else load_idx_folder(Path(folder))
    train, test = images.train, images.test
    if binarize == "threshold":
        train, test = (train >= 0.5).float(), (test >= 0.5).float()
    elif binarize == "stochastic":
        # A fixed seed, so that all runs of a comparison have the same held-out images.
        test = torch.bernoulli(test, generator=torch.Generator().manual_seed(0))
    return Images(images.name, images.shape, train, test, binarize)


def load_digits() -> Images:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels; 297 of them are held out."""
    try:
        from sklearn import datasets
    except ImportError as error:
        error.add_note("the default images need scikit-learn: pip install scikit-learn")
        raise
    pixels = torch.tensor(datasets.load_digits().data, dtype=torch.float32) / 16
    # The file is sorted by writer, so shuffle it in a fixed order.
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    return Images("digits", (8, 8), pixels[:1500], pixels[1500:])


def load_idx_folder(folder: Path) -> Images:
    """Load training and test images from a folder with MNIST's file names, gzipped or not."""
    train, test = read_idx(find(folder, TRAIN_FILE)), read_idx(find(folder, TEST_FILE))
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"{folder} has training images of {train.shape[1:]} pixels and test images of "
            f"{test.shape[1:]}; expected images of one size"
        )
    height, width = train.shape[1:]
    flat = [torch.from_numpy(a.reshape(len(a), -1)).float() / 255 for a in (train, test)]
    return Images(folder.resolve().name, (height, width), *flat)


def find(folder: Path, name: str) -> Path:
    """Find one of MNIST's files, gzipped or not, under either of its two spellings."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--data expects a folder of IDX files; {folder} is not a folder")
    spellings = (name, name.replace("-idx", ".idx"))
    for candidate in (folder / (spelling + end) for spelling in spellings for end in ("", ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"the folder {folder} lacks {name} (or {name}.gz); --data expects MNIST's files, or files "
        "of the same names and format"
    )


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, the type 8, the rank, the sizes, the values."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is not a complete gzip file ({error}); download it again"
            ) from error
    if len(raw) < 16 or raw[:4] != b"\x00\x00\x08\x03":
        raise ValueError(
            f"{path} is not an IDX file of images: expected the first bytes "
            rf"b'\x00\x00\x08\x03', got {raw[:4]!r}"
        )
    shape = struct.unpack(">3I", raw[4:16])
    if len(raw) - 16 != math.prod(shape) or 0 in shape:
        raise ValueError(
            f"{path} has a header of {shape[0]} images of {shape[1]} x {shape[2]} pixels: "
            f"expected {math.prod(shape)} bytes of pixels, got {len(raw) - 16}; download it again"
        )
    return np.frombuffer(raw, np.uint8, offset=16).reshape(shape).copy()
