"""Local expectations: formulas, exact means and memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.coupled_draws import (
    EXACT,
    BitSite,
    OneHotSite,
    check,
    independent,
    step,
)
from helpers.coupled_laws import categories, dtypes

from pyro_gumbel.estimators import (
    LocalExpectation,
)

DOUBLE = torch.float64


def test_local_expectation_follows_its_formula(vectorize):
    gradient, program, values = step(OneHotSite, LocalExpectation(), vectorize)
    pi = program.phi.detach().softmax(-1)
    costs = program.cost(torch.eye(4, dtype=DOUBLE)[:, None]).T  # (elements, C)
    expected = pi * (costs - (pi * costs).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert len(values) == 4


def test_local_expectation_of_bits_follows_its_formula(vectorize):
    gradient, program, values = step(BitSite, LocalExpectation(chunk_size=2), vectorize)
    theta = program.phi.detach().sigmoid()
    expected = []
    for bit in range(3):
        on, off = values[0].clone(), values[0].clone()
        on[..., bit], off[..., bit] = 1.0, 0.0
        expected.append(program.cost(on) - program.cost(off))
    expected = theta * (1 - theta) * torch.stack(expected, -1)
    torch.testing.assert_close(gradient, expected.mean(0), **EXACT)


def test_local_expectation_of_bits_has_the_exact_mean():
    """Flip each variable, with the others fixed."""
    turned = torch.cat([torch.zeros(1, 3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE)])
    combinations = [((value - turned).abs(), prob) for value, prob in independent(BitSite(1), 1)]
    check(BitSite, LocalExpectation(), combinations)


def test_local_expectation_of_one_variable_needs_no_expectation():
    site = OneHotSite(3)
    gradient, _ = site.gradient(LocalExpectation())
    again, _ = site.gradient(LocalExpectation())
    torch.testing.assert_close(gradient, again, **EXACT)
    torch.testing.assert_close(OneHotSite(1).gradient(LocalExpectation())[0][0], site.exact())


@dtypes
def test_local_expectation_lists_the_other_categories(dtype):
    index = categories(LocalExpectation(), dtype)[:, :1000].argmax(-1)
    assert (index.sort(0).values == torch.arange(4)[:, None]).all()


@pytest.mark.slow
@pytest.mark.parametrize("joined", [True, False], ids=["to_event", "plate"])
def test_local_expectation_of_many_variables_fits_in_memory(joined):
    """64 sites of 8 categories at batch 100: peak memory of a process of its own, below 4 GB."""
    program = f"""
        import resource, torch, pyro, pyro.distributions as dist
        from pyro_gumbel.estimators import LocalExpectation
        from pyro_gumbel.infer import Estimator_ELBO, config_gradient
        torch.set_num_threads(1)
        batch, sites, classes, joined = 100, 64, 8, {joined}
        encoder = torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.ReLU(),
                                      torch.nn.Linear(512, sites * classes))
        decoder = torch.nn.Sequential(torch.nn.Linear(sites * classes, 512), torch.nn.ReLU(),
                                      torch.nn.Linear(512, 784))
        x = (torch.rand(batch, 784) > 0.5).float()
        def law(logits, n):
            fn = dist.OneHotCategorical(logits=logits)
            return fn.to_event(1) if joined else fn
        def program(logits, model):
            with pyro.plate("images", batch, dim=-1):
                if joined:
                    z = pyro.sample("z", law(logits, None))
                else:
                    z = torch.stack([pyro.sample(f"z{{n}}", law(logits[..., n, :], n))
                                     for n in range(sites)], -2)
                if model:
                    pixels = dist.Bernoulli(logits=decoder(z.flatten(-2))).to_event(1)
                    pyro.sample("x", pixels, obs=x)
        def model():
            pyro.module("decoder", decoder)
            program(torch.zeros(batch, sites, classes), True)
        def guide():
            pyro.module("encoder", encoder)
            program(encoder(x).unflatten(-1, (sites, classes)), False)
        elbo = Estimator_ELBO(vectorize_particles=True, max_plate_nesting=1)
        elbo.loss_and_grads(model, config_gradient(guide, LocalExpectation()))
        assert next(encoder.parameters()).grad.abs().sum() > 0
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    kilobytes = int(run.stdout.split()[-1])
    assert kilobytes < 4_000_000, kilobytes
