"""The semi-supervised example has Pyro's losses, and sums the digit exactly."""

from __future__ import annotations

from argparse import Namespace

import pyro
import pytest
import torch

import semi_supervised
from semi_supervised import DIGITS, M2, PYRO, SUMMED, Images

ARGS = Namespace(latents=3, hidden=8, weight=20.0, lr=1e-2, epochs=6, batch_size=100)


@pytest.fixture(scope="module")
def images() -> tuple[Images, Images]:
    return semi_supervised.load()


def test_enumeration_in_the_guide_has_pyros_losses(images: tuple[Images, Images]) -> None:
    (x, y), _ = images
    losses = []
    for name in ("enumerate", PYRO):
        _, step = semi_supervised.make_step(name, 0, ARGS)
        losses.append([step(x[:20], (x[20:30], y[20:30])) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_sum_classifies_by_the_posterior_of_the_digit(images: tuple[Images, Images]) -> None:
    x = images[1][0][:7]
    pyro.set_rng_seed(0)
    m2 = M2(3, 8, 20.0, summed=True)
    m2.encoder.rest[1].bias.data[3:] = -20.0  # nearly one style for each image
    loc = m2.encoder(x, x.new_zeros(DIGITS))[:, :3]
    pixels = torch.distributions.Bernoulli(logits=m2.decoder(loc[:, None], torch.eye(DIGITS)))
    expected = pixels.log_prob(x[:, None]).sum(-1).argmax(-1)
    assert torch.equal(m2.classify(x), expected)


@pytest.mark.slow
def test_images_without_labels_help(images: tuple[Images, Images]) -> None:
    args = Namespace(**{**vars(ARGS), "latents": 10, "hidden": 128, "lr": 3e-3})
    runs = {
        name: semi_supervised.fit(name, 100, 0, *images, args)["accuracy"]
        for name in (semi_supervised.ALONE, SUMMED, "enumerate")
    }
    assert min(runs[SUMMED], runs["enumerate"]) > 0.75
    assert runs["enumerate"] > runs[semi_supervised.ALONE]
