"""One step of Lightning on one or two devices, with the same images in all.

python tests/helpers/two_devices.py DEVICES FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from lightning_vae import LightningVAE, make_trainer
from torch_loop import CATEGORIES, PIXELS

IMAGES = 24


class Certain(LightningVAE):
    """A guide that nearly always draws the first category, trained by SGD."""

    def __init__(self) -> None:
        super().__init__("straight_through")
        encoder = self.loss.guide.encoder
        encoder.second.weight.data *= 0.01
        encoder.second.bias.data[::CATEGORIES] = 40.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def main(devices: int, folder: Path) -> None:
    torch.manual_seed(0)
    vae = Certain()
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(IMAGES, PIXELS, generator=generator) < 0.4).float()
    trainer = make_trainer(folder, devices=devices, max_steps=1)
    if trainer.is_global_zero:
        torch.save(vae.state_dict(), folder / "start.pt")
    trainer.fit(vae, DataLoader(images, batch_size=IMAGES // devices))
    if trainer.is_global_zero:
        torch.save(vae.state_dict(), folder / f"{devices}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
