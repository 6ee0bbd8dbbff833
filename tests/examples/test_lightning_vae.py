"""Lightning: its checkpoints hold the estimators' state, and two devices do the step of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

import lightning_vae
from image_data import load_images
from lightning_vae import LightningVAE, make_trainer
from pyro_gumbel.estimators import Exponential, GumbelSoftmax

SCRIPT = Path(__file__).parents[1] / "helpers" / "two_devices.py"


def images() -> torch.Tensor:
    return load_images(None, "threshold").train[:60]


def state(vae: LightningVAE) -> dict[str, Any]:
    """The state of the estimators."""
    return {key: value for key, value in vae.state_dict().items() if ".estimators." in key}


def fitted(gradient: Any, folder: Path, epochs: int, **options: Any) -> tuple[LightningVAE, Any]:
    torch.manual_seed(0)
    vae = LightningVAE(gradient)
    trainer = make_trainer(folder, max_epochs=epochs)
    trainer.fit(vae, DataLoader(images(), batch_size=20), **options)
    return vae, trainer


def same(first: Any, second: Any) -> bool:
    """Compare nests of dicts, tensors and numbers."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return torch.equal(torch.as_tensor(first), torch.as_tensor(second))


@pytest.mark.parametrize("gradient", ["rebar", "score"])
def test_a_checkpoint_holds_the_state_of_the_estimators(gradient, tmp_path):
    vae, _ = fitted(gradient, tmp_path, epochs=2)
    start = LightningVAE(gradient)
    assert not same(state(vae), state(start))
    loaded = LightningVAE.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert same(state(loaded), state(vae))


def test_a_resumed_schedule_goes_on(tmp_path):
    def make() -> GumbelSoftmax:
        return GumbelSoftmax(Exponential(1.0, 0.1, 0.05))

    first = make()
    fitted(first, tmp_path, epochs=1)
    second = make()
    fitted(second, tmp_path, epochs=3, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert first.temperature.step_count == 3
    assert second.temperature.step_count == 9


def test_validation_changes_no_estimator(tmp_path):
    vae, trainer = fitted("score", tmp_path, epochs=1)
    before = state(vae)
    assert trainer.validate(vae, DataLoader(images(), batch_size=20))[0]["held_out"] > 0
    assert same(state(vae), before)


def test_two_devices_take_the_step_of_one(tmp_path):
    for devices in (1, 2):
        command = [sys.executable, str(SCRIPT), str(devices), str(tmp_path)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    start, one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("start", "1", "2"))
    weights = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
    moved = [key for key in weights if (one[key] - start[key]).abs().max() > 1e-3]
    assert any("decoder" in key for key in moved)
    for key in weights:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6)


def test_the_example_trains(tmp_path, capsys):
    lightning_vae.main(["--smoke", "--out", str(tmp_path)])
    assert "nats an image" in capsys.readouterr().out
    assert (tmp_path / "last.ckpt").exists()
