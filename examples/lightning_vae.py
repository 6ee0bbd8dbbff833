"""Train the auto-encoder of torch_loop.py by Lightning, on one or several devices.

    pip install pyro_gumbel[lightning]
    python examples/lightning_vae.py
    python examples/lightning_vae.py --devices 2 --gradient rebar

The loss is a submodule, so Lightning's checkpoints hold the state of the estimators, and its
strategies average the gradients of their parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from arguments import count, natural, new_parser, positive
from image_data import load_images
from torch_loop import make_loss


class LightningVAE(lightning.LightningModule):
    """An auto-encoder with its loss and optimiser."""

    def __init__(self, gradient: str, particles: int = 1, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.loss, self.lr = make_loss(gradient, particles), lr

    def on_train_start(self) -> None:
        torch.manual_seed(torch.initial_seed() + self.global_rank)  # each device has its own noise

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch) / len(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        # Evaluation changes no estimator.
        loss = self.loss(batch) / len(batch)
        self.log("held_out", loss, sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def make_trainer(folder: Path, *, devices: int = 1, **options: Any) -> lightning.Trainer:
    """Return a trainer that keeps the last checkpoint; several devices talk by DDP."""
    return lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def main(argv: list[str] | None = None) -> None:
    """Train, and print the held-out loss and the place of the checkpoint."""
    parser = new_parser(__doc__)
    parser.add_argument("--gradient", default="reinmax", help="name of the latents' estimator")
    parser.add_argument("--particles", type=count, default=1, help="number of particles")
    parser.add_argument("--devices", type=count, default=1, help="number of devices")
    parser.add_argument("--epochs", type=count, default=50, help="passes over the images")
    parser.add_argument("--batch-size", type=count, default=100, help="images per device and step")
    parser.add_argument("--lr", type=positive, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/lightning"), metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="two epochs of 200 images")
    args = parser.parse_args(argv)
    lightning.seed_everything(args.seed, verbose=False)
    images = load_images(None, "threshold")
    if args.smoke:
        args.epochs, images = 2, images.head(200, 50)
    vae = LightningVAE(args.gradient, args.particles, args.lr)
    trainer = make_trainer(args.out, devices=args.devices, max_epochs=args.epochs)
    train = DataLoader(images.train, batch_size=args.batch_size, shuffle=True)
    trainer.fit(vae, train, DataLoader(images.test, batch_size=args.batch_size))
    if trainer.is_global_zero:
        held_out = trainer.callback_metrics["held_out"]
        print(f"{args.gradient}: held-out loss {held_out:.2f} nats an image")
        print(f"checkpoint: {args.out / 'last.ckpt'}")


if __name__ == "__main__":
    main()
