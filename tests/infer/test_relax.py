"""RelaxReparam against closed forms and quadrature, its round trip, its errors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
)
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_gumbel.distributions import OneHot, RelaxedBernoulli, RelaxedOneHot
from pyro_gumbel.estimators import Linear
from pyro_gumbel.infer import RelaxReparam

DTYPES = [torch.float32, torch.float64]
PRIOR = (0.3, 0.7)
LOCS = (-1.0, 1.5)
OBSERVED = 0.4


def mixture(dtype: torch.dtype = torch.float64) -> None:
    z = pyro.sample("z", dist.OneHotCategorical(torch.tensor(PRIOR, dtype=dtype)))
    loc = z @ torch.tensor(LOCS, dtype=dtype)
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(OBSERVED, dtype=dtype))


def switch() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
    pyro.sample(
        "x", dist.Normal(2.5 * z - 1, 1.0), obs=torch.tensor(OBSERVED, dtype=torch.float64)
    )


def relaxed_moments(log_odds: float, locs: tuple[float, float], temperature: float) -> Tensor:
    """Mean and second moment of the first coordinate given the datum, on a grid."""
    grid = torch.linspace(-120, 120, 240_001, dtype=torch.float64)
    noise = temperature * grid - log_odds  # standard logistic
    prior = torch.nn.functional.logsigmoid(noise) + torch.nn.functional.logsigmoid(-noise)
    first = grid.sigmoid()
    loc = first * locs[0] + (1 - first) * locs[1]
    weight = (prior - 0.5 * (OBSERVED - loc) ** 2).softmax(0)
    return torch.stack([(weight * first).sum(), (weight * first**2).sum()])


def z_scores(draws: Tensor, exact: Tensor) -> Tensor:
    """Distance of autocorrelated draws' means from exact ones, in standard errors."""
    moments = torch.stack([draws, draws**2], -1)  # (draws, 2)
    size = effective_sample_size(moments[None], sample_dim=1, chain_dim=0)
    return (moments.mean(0) - exact) / (moments.std(0) / size.sqrt())


@pytest.mark.parametrize("num_draws", [500, pytest.param(6000, marks=pytest.mark.slow)])
def test_nuts_finds_the_relaxed_posterior_of_a_one_hot(num_draws: int) -> None:
    relaxed = poutine.reparam(mixture, {"z": RelaxReparam(0.5)})
    chain = MCMC(NUTS(relaxed), num_draws, 200, disable_progbar=True)
    chain.run()
    log_odds = torch.tensor(PRIOR[0] / PRIOR[1]).log().item()
    exact = relaxed_moments(log_odds, LOCS, 0.5)
    assert (z_scores(chain.get_samples()["z_log"][:, 0].exp(), exact).abs() < 5).all()


def test_nuts_finds_the_relaxed_posterior_of_a_bit() -> None:
    relaxed = poutine.reparam(switch, {"z": RelaxReparam(0.5)})
    chain = MCMC(NUTS(relaxed), 500, 200, disable_progbar=True)
    chain.run()
    exact = relaxed_moments(torch.tensor(0.3 / 0.7).log().item(), (1.5, -1.0), 0.5)
    samples = chain.get_samples()
    assert (z_scores(samples["z_logit"].sigmoid(), exact).abs() < 5).all()
    # The relaxed value itself is had from the draws of its coordinates.
    values = Predictive(relaxed, samples, return_sites=["z"])()["z"]
    torch.testing.assert_close(values, samples["z_logit"].sigmoid())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_density_is_that_of_the_relaxed_distribution(
    temperature: float, dtype: torch.dtype
) -> None:
    prior = torch.tensor([0.1, 0.2, 0.7], dtype=dtype)

    def model() -> None:
        with pyro.plate("plate", 4):
            pyro.sample("z", dist.OneHotCategorical(prior).expand([4, 2]).to_event(1))
            pyro.sample("b", dist.Bernoulli(prior[0]))

    reparam = {name: RelaxReparam(temperature) for name in ("z", "b")}
    trace = poutine.trace(poutine.reparam(model, reparam)).get_trace()
    trace.compute_log_prob()
    z_log, b_logit = trace.nodes["z_log"], trace.nodes["b_logit"]
    assert z_log["value"].shape == (4, 2, 3)
    assert z_log["log_prob"].shape == (4,)
    assert z_log["value"].dtype == b_logit["value"].dtype == dtype
    torch.testing.assert_close(trace.nodes["z"]["value"], z_log["value"].exp())
    torch.testing.assert_close(trace.nodes["b"]["value"], b_logit["value"].sigmoid())
    assert trace.nodes["z"]["log_prob"].abs().sum() == 0
    # In float64, at values well inside: the simplex density times the Jacobian of exp.
    inside = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64)
    simplex = dist.RelaxedOneHotCategorical(
        torch.tensor(temperature, dtype=torch.float64), probs=prior.double()
    )
    fn = z_log["fn"].base_dist
    expected = simplex.log_prob(inside) + inside.log().sum(-1)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(
        fn.log_prob(inside.log().to(dtype)).double()[0], expected, **tolerance
    )
    bit = torch.tensor([0.2, 0.5, 0.6, 0.9], dtype=torch.float64)
    unit = dist.RelaxedBernoulli(
        torch.tensor(temperature, dtype=torch.float64), probs=prior[0].double()
    )
    expected = unit.log_prob(bit) + bit.log() + (1 - bit).log()
    actual = b_logit["fn"].log_prob(bit.logit().to(dtype)).double()
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("straight_through", [False, True])
def test_initial_values_round_trip(straight_through: bool, dtype: torch.dtype) -> None:
    values = {
        "z": torch.tensor([[0.7, 0.2, 0.1], [0.999, 1e-3, 1e-12]], dtype=dtype),
        "b": torch.tensor([0.25, 0.999], dtype=dtype),
        "one_hot": torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=dtype),
        "bit": torch.tensor([0.0, 1.0], dtype=dtype),
    }

    def model() -> tuple[Tensor, ...]:
        uniform = dist.OneHotCategorical(logits=torch.zeros(2, 3, dtype=dtype))
        coin = dist.Bernoulli(logits=torch.zeros(2, dtype=dtype))
        with pyro.plate("plate", 2):
            return tuple(
                pyro.sample(name, uniform if value.dim() == 2 else coin)
                for name, value in values.items()
            )

    # Checked on soft values; hard ones are their arg max.
    start = InitMessenger(init_to_value(values=values))
    config = {name: RelaxReparam(0.3, straight_through=straight_through) for name in values}
    with start:
        nodes = poutine.trace(poutine.reparam(model, config)).get_trace().nodes
    coordinates = {
        name: nodes[name]["value"] for name in ("z_log", "b_logit", "one_hot_log", "bit_logit")
    }
    relaxed = {name: RelaxReparam(0.3) for name in values}
    again = poutine.condition(poutine.reparam(model, relaxed), coordinates)()
    for (name, value), came_back in zip(values.items(), again, strict=True):
        torch.testing.assert_close(came_back, value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "strategy", [init_to_feasible, init_to_mean, init_to_median, init_to_sample, init_to_uniform]
)
def test_every_initialisation_strategy_works(strategy) -> None:
    relaxed = poutine.reparam(mixture, {"z": RelaxReparam(0.5)})
    with InitMessenger(strategy()):
        value = poutine.trace(relaxed).get_trace().nodes["z_log"]["value"]
    assert value.isfinite().all()
    torch.testing.assert_close(value.logsumexp(-1), torch.zeros((), dtype=value.dtype))


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_without_relaxation_pyro_still_refuses_discrete_sites(guide) -> None:
    guide(poutine.reparam(mixture, {"z": RelaxReparam(0.5)}))()
    with pytest.raises(ValueError, match="cannot handle discrete sample site 'z'"):
        guide(mixture)()


@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_through_leaves_the_law_as_it_was(dtype: torch.dtype) -> None:
    draws = 40_000
    probs = torch.tensor([0.1, 0.6, 0.3], dtype=dtype)

    def model() -> tuple[Tensor, Tensor]:
        with pyro.plate("draws", draws):
            z = pyro.sample("z", dist.OneHotCategorical(probs))
            return z, pyro.sample("b", dist.Bernoulli(probs[0]))

    config = {name: RelaxReparam(0.7, straight_through=True) for name in ("z", "b")}
    z, b = poutine.reparam(model, config)()
    assert set(z.unique().tolist()) == set(b.unique().tolist()) == {0.0, 1.0}
    error = (probs * (1 - probs) / draws).sqrt()
    assert (((z.mean(0) - probs) / error).abs() < 5).all()
    assert ((b.mean() - probs[0]) / error[0]).abs() < 5


def test_straight_through_elbo_bounds_the_discrete_evidence() -> None:
    """The bound is reached up to what a Gaussian guide can do, and never passed."""
    log_joint = torch.tensor(PRIOR, dtype=torch.float64).log() + dist.Normal(
        torch.tensor(LOCS, dtype=torch.float64), 1.0
    ).log_prob(torch.tensor(OBSERVED))
    evidence = log_joint.logsumexp(0).item()
    relaxed = poutine.reparam(mixture, {"z": RelaxReparam(0.5, straight_through=True)})
    guide = AutoNormal(relaxed)
    svi = SVI(
        relaxed, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(4, vectorize_particles=True)
    )
    for _ in range(400):
        svi.step()
    with torch.no_grad():
        bounds = torch.tensor([-Trace_ELBO().loss(relaxed, guide) for _ in range(1500)])
    error = (bounds.std() / len(bounds) ** 0.5).item()
    assert evidence - 0.25 < bounds.mean().item() < evidence + 5 * error


def test_gradients_reach_the_parameters() -> None:
    logits = torch.zeros(3, requires_grad=True)

    def model() -> Tensor:
        return pyro.sample("z", dist.OneHotCategorical(logits=logits))

    for straight_through in (False, True):
        reparam = RelaxReparam(0.5, straight_through=straight_through)
        poutine.reparam(model, {"z": reparam})()[0].backward()
        assert logits.grad is not None
        assert logits.grad.abs().sum() > 0
        logits.grad = None


def test_wrappers_are_kept() -> None:
    mask = torch.tensor([True, False, True])

    def model() -> None:
        fn = dist.OneHotCategorical(logits=torch.zeros(3, 2, 4))
        with pyro.plate("plate", 3):
            pyro.sample("z", fn.to_event(1).mask(mask))

    trace = poutine.trace(
        poutine.reparam(model, {"z": RelaxReparam(torch.tensor(0.5))})
    ).get_trace()
    trace.compute_log_prob()
    log_prob = trace.nodes["z_log"]["log_prob"]
    assert log_prob.shape == (3,)
    assert torch.equal(log_prob != 0, mask)


@pytest.mark.parametrize(
    "fn",
    [
        OneHot(logits=torch.zeros(3)),
        dist.OneHotCategoricalStraightThrough(logits=torch.zeros(3)),
        RelaxedOneHot(0.5, logits=torch.zeros(3), straight_through=True),
        RelaxedBernoulli(0.5, logits=torch.zeros(3), straight_through=True),
        dist.Bernoulli(torch.tensor(0.3)).expand([2]).to_event(1),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_every_one_hot_and_bit_family(fn) -> None:
    value = poutine.reparam(lambda: pyro.sample("z", fn), {"z": RelaxReparam(0.5)})()
    assert value.shape == fn.shape()
    assert ((value > 0) & (value < 1)).all()


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (dist.Categorical(torch.ones(3)), r"'z' is a Categorical.*OneHotCategorical\(logits="),
        (
            dist.RelaxedOneHotCategorical(torch.tensor(0.5), torch.ones(3)),
            "'z' is a RelaxedOneHotCategorical: it is already relaxed",
        ),
        (RelaxedOneHot(0.5, torch.ones(3)), "'z' is a RelaxedOneHot: it is already relaxed"),
        (dist.Poisson(3.0), "'z' is a Poisson: RelaxReparam supports OneHotCategorical and B"),
        (dist.Normal(0.0, 1.0), "'z' is a Normal: RelaxReparam supports"),
    ],
)
def test_other_families_are_refused(fn, match: str) -> None:
    model = poutine.reparam(lambda: pyro.sample("z", fn), {"z": RelaxReparam(0.5)})
    with pytest.raises(ValueError, match=match):
        model()


def test_observed_sites_are_refused() -> None:
    def model() -> None:
        pyro.sample("z", dist.OneHotCategorical(torch.ones(2)), obs=torch.tensor([0.0, 1.0]))

    with pytest.raises(ValueError, match="site 'z' is observed, .*Remove 'z'.* or obs="):
        poutine.reparam(model, {"z": RelaxReparam(0.5)})()


@pytest.mark.parametrize(
    ("temperature", "error", "match"),
    [
        (0.0, ValueError, "RelaxReparam: temperature must be positive"),
        (torch.tensor([1.0, -1.0]), ValueError, "RelaxReparam: temperature must be positive"),
        (
            "0.5",
            TypeError,
            "temperature must be a number or a tensor, such as temperature=0.5; got '0.5'",
        ),
        (Linear(1.0, 0.5, 10), TypeError, "a schedule inside a model does not advance"),
    ],
)
def test_bad_temperatures(temperature, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        RelaxReparam(temperature)


def test_repr_rebuilds() -> None:
    rebuilt = eval(repr(RelaxReparam(0.5, straight_through=True)))
    assert (rebuilt.temperature, rebuilt.straight_through) == (0.5, True)
