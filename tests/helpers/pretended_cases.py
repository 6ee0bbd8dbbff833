"""Cases of distributions, bounds, guides and handlers on the pretended device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.distributions import AffineTransform, kl_divergence

from helpers.pretended_device import DEVICE, Case, no_waiting, take_steps
from helpers.pretended_estimators import CATEGORIES, FAMILIES, FEATURES, N, Programs, bound
from pyro_gumbel import distributions as ours
from pyro_gumbel.estimators import Pathwise
from pyro_gumbel.guides import AutoAmortized, AutoDiscrete
from pyro_gumbel.infer import Estimator_ELBO, ImportanceWeighted_ELBO, RelaxReparam

DTYPES = (torch.bfloat16, torch.float32, torch.float64)

LAWS: dict[str, Callable[[Tensor], Any]] = {
    "ExpRelaxedOneHot": lambda logits: ours.ExpRelaxedOneHot(0.5, logits=logits),
    "Gumbel": lambda logits: ours.Gumbel(logits, 0.7),
    "OneHot": lambda logits: ours.OneHot(logits=logits),
    "OneHot_probs": lambda logits: ours.OneHot(probs=logits.softmax(-1)),
    "RelaxedBernoulli": lambda logits: ours.RelaxedBernoulli(0.5, logits=logits),
    "RelaxedBernoulli_hard": lambda logits: ours.RelaxedBernoulli(
        0.5, probs=logits.sigmoid(), straight_through=True
    ),
    "RelaxedOneHot": lambda logits: ours.RelaxedOneHot(0.5, logits=logits),
    "RelaxedOneHot_hard": lambda logits: ours.RelaxedOneHot(
        0.5, probs=logits.softmax(-1), straight_through=True
    ),
    "TruncatedGumbel": lambda logits: ours.TruncatedGumbel(logits, 1.0, 0.7),
}
READINGS = ("mean", "variance", "mode", "entropy", "enumerate_support", "cdf")


def laws() -> dict[str, Case]:
    """Draws, densities and moments of every distribution, in three dtypes."""

    def case(name: str, dtype: torch.dtype) -> None:
        with no_waiting():
            parameter = torch.zeros(N, CATEGORIES, device=DEVICE, dtype=dtype, requires_grad=True)
            fn = LAWS[name](parameter)
            fn = fn.expand((2, *fn.batch_shape))
            value = fn.rsample() if fn.has_rsample else fn.sample()
            total = fn.log_prob(value).sum() + value.sum()
            for reading in READINGS:
                try:
                    found = getattr(fn, reading)
                    found = found(value) if reading == "cdf" else found
                    found = found() if callable(found) else found
                except NotImplementedError:
                    continue
                total = total + found.sum()
            total.backward()
        if parameter.grad.dtype != dtype:
            raise AssertionError(f"the gradient is {parameter.grad.dtype}")

    return {f"{name}/{dtype}": partial(case, name, dtype) for name in LAWS for dtype in DTYPES}


def divergences() -> dict[str, Case]:
    """Closed-form KL divergences between distributions of the same support."""
    made = {
        "one_hot": ("OneHot", lambda logits: dist.OneHotCategorical(logits=logits)),
        "gumbel": ("Gumbel", LAWS["Gumbel"]),
        "bernoulli": ("RelaxedBernoulli_hard", lambda logits: dist.Bernoulli(logits=logits)),
    }

    def case(name: str) -> None:
        with no_waiting():
            parameter = torch.zeros(N, CATEGORIES, device=DEVICE, requires_grad=True)
            first, second = made[name]
            kl_divergence(LAWS[first](parameter), second(parameter + 1)).sum().backward()

    return {name: partial(case, name) for name in made}


BOUNDS: dict[str, Callable[[], ELBO]] = {
    "Estimator_ELBO": lambda: Estimator_ELBO(2),
    "Estimator_ELBO/analytic_kl": lambda: bound(2, analytic_kl=True),
    "ImportanceWeighted_ELBO": lambda: ImportanceWeighted_ELBO(2),
    "ImportanceWeighted_ELBO/vectorised": lambda: bound(2, ImportanceWeighted_ELBO),
    "ImportanceWeighted_ELBO/doubly": lambda: bound(
        2, ImportanceWeighted_ELBO, doubly_reparameterized=True
    ),
}


def bounds() -> dict[str, Case]:
    """Every bound, with the score function, and with a pathwise site."""

    def case(name: str, family: str) -> None:
        Programs(family, "auto", chained=True).take_steps(BOUNDS[name]())

    return {
        f"{name}/{family}": partial(case, name, family)
        for name in BOUNDS
        for family in ("one_hot", "normal")
    }


def guides() -> dict[str, Case]:
    """Automatic guides of every family, with an upstream global latent where they take one."""
    families = set(FAMILIES)

    def case(kind: Any, family: str) -> None:
        made = {"device": DEVICE}
        prior, x = torch.zeros(CATEGORIES, **made), torch.randn(N, FEATURES, **made)
        scale, decoder = torch.ones(FEATURES, **made), nn.Linear(1, FEATURES, **made)
        programs = Programs(family, "auto")

        def model(x: Tensor) -> None:
            shift = scale.sum()
            if kind is AutoAmortized:
                shift = pyro.sample("global", dist.Normal(shift, shift)).unsqueeze(-1)
            with pyro.plate("data", N):
                z = programs.read(pyro.sample("z", FAMILIES[family](prior)))
                pyro.sample("x", dist.Normal(decoder(z) + shift, scale).to_event(1), obs=x)

        encoder = nn.Linear(FEATURES, 4, **made)
        guide = AutoDiscrete(model) if kind is AutoDiscrete else AutoAmortized(model, encoder)
        elbo = bound(2)
        take_steps(partial(elbo.differentiable_loss, model, guide, x), lambda: [decoder, guide])

    return {
        f"{kind.__name__}/{family}": partial(case, kind, family)
        for kind in (AutoDiscrete, AutoAmortized)
        for family in sorted(families - ({"normal"} if kind is AutoDiscrete else set()))
    }


def handlers() -> dict[str, Case]:
    """Sums in the model, minibatches, scales, masks, and relaxed models."""
    made = {"device": DEVICE}
    x = torch.randn(10 * N, **made)
    mask = torch.ones(N, **made) > 0
    one = torch.ones((), **made)
    weights = nn.Linear(1, CATEGORIES, **made)

    def logits() -> Tensor:
        return weights(one.unsqueeze(-1))

    def mixture(infer: dict[str, Any]) -> None:
        plate = pyro.plate("data", 10 * N, subsample_size=N, device=DEVICE)
        with plate as index, poutine.mask(mask=mask), poutine.scale(scale=0.7):
            z = pyro.sample("z", dist.OneHotCategorical(logits=logits()), infer=infer)
            pyro.sample("x", dist.Normal((z * logits()).sum(-1), one), obs=x[index])

    def sampled() -> None:
        plate = pyro.plate("data", 10 * N, subsample_size=N, device=DEVICE)
        with plate, poutine.mask(mask=mask), poutine.scale(scale=0.7):
            pyro.sample("z", dist.OneHotCategorical(logits=logits()))

    def chain() -> None:
        state = pyro.sample("z_0", dist.Categorical(logits=logits()))
        for step in pyro.markov(range(1, 4)):
            rows = torch.stack([logits(), -logits(), 2 * logits()])
            infer = {"enumerate": "parallel"}
            state = pyro.sample(f"z_{step}", dist.Categorical(logits=rows[state]), infer=infer)
            pyro.sample(f"x_{step}", dist.Normal(logits()[state], one), obs=one)

    def empty() -> None:
        """A guide without sites."""

    def steps(elbo: ELBO, model: Callable[..., None], guide: Callable[..., None]) -> Case:
        step = partial(elbo.differentiable_loss, model, guide)
        return lambda: take_steps(step, lambda: [weights])

    summed = partial(mixture, {"enumerate": "parallel"})
    programs = Programs("one_hot", "auto")
    relaxed = poutine.reparam(programs.model, {"z": RelaxReparam(0.5)})

    def shifted(bounded: bool) -> None:
        rate = pyro.param("rate", lambda: torch.ones(N, **made))
        base = dist.Exponential(rate) if bounded else dist.Normal(rate, one)
        transform = AffineTransform(pyro.param("loc", lambda: torch.ones(N, **made)), one)
        with pyro.plate("data", N):
            pyro.sample("z", dist.TransformedDistribution(base, [transform]), infer=landing)

    def normal() -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(one, one))
            pyro.sample("x", dist.Normal(z * logits().sum(), one), obs=x[:N])

    landing = {"gradient": Pathwise(sticking_the_landing=True)}
    return {
        "subsample": steps(bound(2), partial(mixture, {}), sampled),
        "mixture_summed": steps(bound(2), summed, empty),
        "chain_summed": steps(bound(), poutine.infer_config(chain, every_state), empty),
        "relaxed": lambda: take_steps(
            lambda: poutine.trace(relaxed).get_trace().log_prob_sum(), lambda: [programs.decoder]
        ),
        "flow": steps(bound(2), normal, partial(shifted, False)),
        "flow_with_a_bound": steps(bound(), normal, partial(shifted, True)),
    }


def every_state(site: Any) -> dict[str, Any]:
    return {"enumerate": "parallel"} if site["name"].startswith("z") else {}


UNDRAWN: dict[str, Callable[[Tensor], Any]] = {
    "Beta": lambda one: dist.Beta(one, one),
    "BetaBinomial": lambda one: dist.BetaBinomial(one, one, one),
    "Binomial": lambda one: dist.Binomial(one, one / 2),
    "Dirichlet": lambda one: dist.Dirichlet(one),
    "HalfNormal": lambda one: dist.HalfNormal(one),
    "Multinomial": lambda one: dist.Multinomial(2, one),
    "StudentT": lambda one: dist.StudentT(one),
    "VonMises": lambda one: dist.VonMises(one, one),
}
"""Families that torch itself cannot draw on the device, so no case has them."""


def undrawn() -> dict[str, Case]:
    return {
        name: lambda law=law: law(torch.ones(3, device=DEVICE)).sample()
        for name, law in UNDRAWN.items()
    }
