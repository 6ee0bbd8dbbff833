"""The examples read images, split them and turn them into targets."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import image_data
import vae


def idx_bytes(images: np.ndarray) -> bytes:
    return b"\x00\x00\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()


def write_folder(folder: Path, *, packed: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    written = {}
    for name, number in ((image_data.TRAIN_FILE, 25), (image_data.TEST_FILE, 12)):
        written[name] = generator.integers(0, 256, (number, 4, 5), dtype=np.uint8)
        raw = idx_bytes(written[name])
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return written


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_idx_folder(tmp_path: Path, packed: bool) -> None:
    written = write_folder(tmp_path, packed=packed)
    images = image_data.load_images(str(tmp_path), "none")
    assert images.shape == (4, 5)
    expected = torch.tensor(written[image_data.TEST_FILE].reshape(12, 20)) / 255
    torch.testing.assert_close(images.test, expected, rtol=0, atol=0)
    assert images.train.shape == (25, 20)


def test_digits_are_split_without_overlap_or_loss() -> None:
    images = image_data.load_images(None, "none")
    assert (len(images.train), len(images.test), images.shape) == (1500, 297, (8, 8))
    total = (images.train.sum() + images.test.sum()).item() * 16
    assert total == 561718  # the sum of all pixels of the file


def test_threshold_is_one_half() -> None:
    grey = image_data.load_images(None, "none")
    bits = image_data.load_images(None, "threshold")
    assert torch.equal(bits.train, (grey.train * 16 >= 8).float())


def test_stochastic_pixels_are_new_each_epoch_and_the_same_when_held_out() -> None:
    images = image_data.load_images(None, "stochastic")
    first, second = (torch.cat(images.batches(1500)) for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    # Pixels that are surely on or off stay; sorted sums would agree only by accident.
    assert not torch.equal(first.sum(-1).sort().values, second.sum(-1).sort().values)
    assert torch.equal(images.test, image_data.load_images(None, "stochastic").test)


def test_batches_hold_every_image_once() -> None:
    images = image_data.load_images(None, "none").head(250, 10)
    batches = images.batches(100)
    assert [len(batch) for batch in batches] == [100, 100, 50]
    torch.testing.assert_close(torch.cat(batches).sum(0), images.train.sum(0))
    assert not torch.equal(batches[0], images.batches(100)[0])


def empty(folder: Path) -> None:
    pass


def missing_test(folder: Path) -> None:
    write_folder(folder)
    (folder / image_data.TEST_FILE).unlink()


def truncated(folder: Path) -> None:
    write_folder(folder)
    path = folder / image_data.TRAIN_FILE
    path.write_bytes(path.read_bytes()[:-7])


def labels_instead(folder: Path) -> None:
    write_folder(folder)
    (folder / image_data.TRAIN_FILE).write_bytes(b"\x00\x00\x08\x01" + bytes(30))


def broken_gzip(folder: Path) -> None:
    write_folder(folder, packed=True)
    path = folder / f"{image_data.TRAIN_FILE}.gz"
    path.write_bytes(path.read_bytes()[:-20])


def two_sizes(folder: Path) -> None:
    write_folder(folder)
    (folder / image_data.TEST_FILE).write_bytes(idx_bytes(np.zeros((3, 4, 4), np.uint8)))


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (empty, FileNotFoundError, "lacks train-images-idx3-ubyte"),
        (missing_test, FileNotFoundError, "lacks t10k-images-idx3-ubyte"),
        (truncated, ValueError, "expected 500 bytes of pixels, got 493"),
        (labels_instead, ValueError, "is not an IDX file of images"),
        (broken_gzip, ValueError, "is not a complete gzip file"),
        (two_sizes, ValueError, "expected images of one size"),
    ],
)
def test_bad_folder(tmp_path: Path, spoil, error: type[Exception], match: str) -> None:
    spoil(tmp_path)
    with pytest.raises(error, match=match):
        image_data.load_images(str(tmp_path), "none")


def test_no_folder_and_no_such_binarization(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        image_data.load_images(str(tmp_path / "nowhere"), "none")
    with pytest.raises(ValueError, match="binarize must be one of threshold, stochastic, none"):
        image_data.load_images(None, "round")


def test_folder_of_images_from_the_command_line(tmp_path: Path, capsys) -> None:
    write_folder(tmp_path, packed=True)
    tiny = ["--smoke", "--latents", "3", "--hidden", "16", "--num-samples", "5"]
    vae.main([*tiny, "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "12 held-out images" in capsys.readouterr().out
