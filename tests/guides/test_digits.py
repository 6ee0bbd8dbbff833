"""AutoAmortized on digits, beside the guide written by hand in examples/vae.py."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
import vae
from evaluation import held_out_bounds
from image_data import Images, load_images
from pyro.infer import SVI
from torch import Tensor, nn
from vae_options import make_parser

from pyro_gumbel.guides import AutoAmortized
from pyro_gumbel.infer import Estimator_ELBO

PRIORS = {
    "onehot": dist.OneHotCategorical(torch.ones(10)).expand([10]).to_event(1),
    "bernoulli": dist.Bernoulli(torch.tensor(0.5)).expand([40]).to_event(1),
    "normal": dist.Normal(torch.zeros(10), 1.0).to_event(1),
}
EPOCHS = 60


def fit_automatic(kind: str, images: Images) -> float:
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
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    for _ in range(EPOCHS):
        for batch in images.batches(100):
            svi.step(batch)
    return -held_out_bounds(model, guide, images.test).elbo


def fit_by_hand(kind: str, images: Images) -> float:
    latents = str(PRIORS[kind].event_shape[0])
    gradient = "pathwise" if kind == "normal" else "reinmax"
    flags = ["--latent", kind, "--latents", latents, "--epochs", str(EPOCHS)]
    args = make_parser("").parse_args(flags)
    fitted, _ = vae.train(args, gradient, 0, images)
    return -held_out_bounds(fitted.model, fitted.guide, images.test).elbo


@pytest.mark.slow
@pytest.mark.parametrize("kind", PRIORS)
def test_automatic_guide_is_as_good_as_the_one_by_hand(kind: str) -> None:
    images = load_images(None, "threshold")
    by_hand, automatic = fit_by_hand(kind, images), fit_automatic(kind, images)
    print(f"{kind}: {by_hand:.2f} nats by hand, {automatic:.2f} automatic")
    assert automatic < by_hand + 1
