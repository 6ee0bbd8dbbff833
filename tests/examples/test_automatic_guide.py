"""AutoAmortized on digits, beside the guide written by hand in examples/vae.py."""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

import vae
from evaluation import held_out_bounds
from image_data import Images, load_images
from pyro_gumbel.guides import AutoAmortized
from pyro_gumbel.infer import Estimator_ELBO
from vae_options import make_parser

PRIORS = {
    "onehot": dist.OneHotCategorical(torch.ones(10)).expand([10]).to_event(1),
    "bernoulli": dist.Bernoulli(torch.tensor(0.5)).expand([40]).to_event(1),
    "normal": dist.Normal(torch.zeros(10), 1.0).to_event(1),
}


def options(kind: str) -> argparse.Namespace:
    latents = str(PRIORS[kind].event_shape[0])
    return make_parser("").parse_args(["--latent", kind, "--latents", latents, "--epochs", "60"])


def fit_automatic(kind: str, images: Images) -> float:
    args = options(kind)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    prior = PRIORS[kind]
    decoder = vae.mlp(prior.event_shape.numel(), 256, images.num_pixels)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", prior)
            logits = decoder(z.flatten(-prior.event_dim))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    encoder = nn.Sequential(vae.mlp(images.num_pixels, 256, 256), nn.ReLU())
    gradient = "pathwise" if kind == "normal" else "reinmax"
    guide = AutoAmortized(model, encoder, gradient=gradient)
    elbo = Estimator_ELBO(vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": args.lr}), elbo)
    for _ in range(args.epochs):
        for batch in images.batches(args.batch_size):
            svi.step(batch)
    return -held_out_bounds(model, guide, images.test).elbo


def fit_by_hand(kind: str, images: Images) -> float:
    gradient = "pathwise" if kind == "normal" else "reinmax"
    fitted, _ = vae.train(options(kind), gradient, 0, images)
    return -held_out_bounds(fitted.model, fitted.guide, images.test).elbo


@pytest.mark.slow
@pytest.mark.parametrize("kind", PRIORS)
def test_automatic_guide_is_as_good_as_the_one_by_hand(kind: str) -> None:
    images = load_images(None, "threshold")
    by_hand, automatic = fit_by_hand(kind, images), fit_automatic(kind, images)
    print(f"{kind}: {by_hand:.2f} nats by hand, {automatic:.2f} automatic")
    assert automatic < by_hand + 1
