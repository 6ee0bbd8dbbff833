"""The exact gradient against brute force by plain Pyro, and against closed forms."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import problems
from helpers.toys import PROBLEMS, chain
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_gumbel.diagnostics import exact_gradient, gradient_draws


def flat(problem, dataset) -> np.ndarray:
    return np.concatenate([dataset[name].values.ravel() for name in problem.params])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_brute_force(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]()
    elbo, gradient = problems.exact_gradient(problem)
    problem.reset(dtype)
    exact = exact_gradient(problem.model, problem.guide, *problem.args)
    tolerance = 1e-10 if dtype is torch.float64 else 2e-5
    np.testing.assert_allclose(flat(problem, exact), gradient, rtol=tolerance, atol=tolerance)
    assert exact.attrs["loss"] == pytest.approx(-elbo, rel=tolerance)
    assert exact["w"].dtype == np.dtype(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("chain", 3 * 3 * 2),  # the plate's elements one by one
        ("bits", 2**2),
        ("summed_plate", 2**3),  # jointly
        ("nested_plates", 2**2),  # the inner plate jointly, the outer one not
        ("looped", 2**2),
    ],
)
def test_number_of_states(name: str, states: int) -> None:
    problem = PROBLEMS[name]()
    problem.reset(torch.float64)
    assert exact_gradient(problem.model, problem.guide).attrs["states"] == states


PRIOR = torch.tensor([0.2, 0.6, 0.7, 0.4, 0.5], dtype=torch.float64)
TERMS = {  # hard functions of all elements, which seldom or by chance tell one state from another
    "and": lambda z: 5 * z.prod(-1),
    "and, rows kept": lambda z: 5 * z.prod(-1, keepdim=True),
    "and, rows mixed": lambda z: 5 * z.prod(),
    "largest, rows mixed": lambda z: z.max(),
    "none": lambda z: 5 * (1 - z).prod(-1, keepdim=True),
    "parity, rows kept": lambda z: 3 * (z.sum(-1, keepdim=True) % 2),
    "majority": lambda z: 3.0 * (z.sum(-1) > 2.5).to(z.dtype),
    "written in place": lambda z: torch.zeros(1, dtype=z.dtype).add_(5 * z.prod(-1)),
    "by Python": lambda z: torch.tensor(5.0 if all(z.reshape(-1).tolist()) else 0.0),
}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("name", TERMS)
def test_hard_terms_of_many_elements(name: str, inside: bool) -> None:
    """Outside of the plate, or inside it, where an element sees the others."""

    def model() -> None:
        plate = pyro.plate("d", 5)
        with plate:
            z = pyro.sample("z", dist.Bernoulli(PRIOR))
        term = TERMS[name](z)
        if inside:
            with plate:
                pyro.factor("f", term.expand(z.shape) / 5)
        else:
            pyro.factor("f", term)

    def guide() -> None:
        with pyro.plate("d", 5):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("l")))

    def brute_force() -> np.ndarray:
        logits = pyro.param("l").unconstrained()
        states = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 5)
        log_q = dist.Bernoulli(logits=logits).log_prob(states).sum(-1)
        log_p = dist.Bernoulli(PRIOR).log_prob(states).sum(-1)
        reward = log_p + torch.stack([TERMS[name](state).sum() for state in states]) - log_q
        (gradient,) = torch.autograd.grad(-(log_q.exp() * reward).sum(), logits)
        return gradient.numpy()

    for seed in range(8):
        pyro.clear_param_store()
        pyro.param("l", torch.linspace(-0.5, 0.9, 5, dtype=torch.float64))
        exact = exact_gradient(model, guide, seed=seed)
        np.testing.assert_allclose(exact["l"].values, brute_force(), rtol=1e-9, atol=1e-9)


def test_a_function_that_is_constant_but_at_the_extreme() -> None:
    """Of random values none shows that an element sees the others."""

    def model() -> None:
        with pyro.plate("d", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.full((7,), 0.5)).to_event(1))
            both = z.prod(-1).prod(-1, keepdim=True)
            pyro.factor("f", (5 * both).expand(z.shape[:-1]))

    def guide() -> None:
        logits = pyro.param("l", torch.full((2, 7), 1.0))
        with pyro.plate("d", 2):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    assert exact_gradient(model, guide).attrs["states"] == 2**14


def test_many_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = chain()
    problem.reset(torch.float64)
    whole = exact_gradient(problem.model, problem.guide)
    monkeypatch.setattr("pyro_gumbel.diagnostics._programs._ELEMENTS", 10)
    parts = exact_gradient(problem.model, problem.guide)
    np.testing.assert_allclose(flat(problem, parts), flat(problem, whole), rtol=1e-12)


def test_agrees_with_pyro_in_a_large_plate() -> None:
    x = torch.linspace(-1.0, 3.0, 60)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0, 3.0])[z], 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        slope = pyro.param("slope", torch.tensor([0.4, -0.2, 0.1]))
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Categorical(logits=x[:, None] * slope))

    pyro.param("slope", torch.tensor([0.4, -0.2, 0.1]))
    exact = exact_gradient(model, guide, x)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, config_enumerate(guide), x)
    expected = pyro.get_param_store()._params["slope"].grad
    np.testing.assert_allclose(exact["slope"], expected, rtol=1e-4)
    assert exact.attrs["loss"] == pytest.approx(loss, rel=1e-5)
    assert exact.attrs["states"] == 3


def test_sites_that_are_not_always_met() -> None:
    def model() -> None:
        if pyro.sample("a", dist.Bernoulli(0.3)) > 0:
            b = pyro.sample("b", dist.Bernoulli(0.6))
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.3))

    def guide() -> None:
        q_b = pyro.param("q_b", torch.tensor(0.4))
        if pyro.sample("a", dist.Bernoulli(logits=pyro.param("q_a", torch.tensor(0.1)))) > 0:
            pyro.sample("b", dist.Bernoulli(logits=q_b))

    q_a, q_b = (torch.tensor(value, requires_grad=True) for value in (0.1, 0.4))
    a, b = q_a.sigmoid(), q_b.sigmoid()
    normal = dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(0.3))
    inner = (1 - b) * (0.4 / (1 - b)).log() + b * (0.6 / b).log()
    inner = inner + (1 - b) * normal[0] + b * normal[1]
    elbo = (1 - a) * (0.7 / (1 - a)).log() + a * ((0.3 / a).log() + inner)
    (-elbo).backward()

    exact = exact_gradient(model, guide)
    assert exact.attrs["loss"] == pytest.approx(-elbo.item(), rel=1e-5)
    assert float(exact["q_a"]) == pytest.approx(q_a.grad.item(), rel=1e-4)
    assert float(exact["q_b"]) == pytest.approx(q_b.grad.item(), rel=1e-4)
    assert exact.attrs["states"] == 3


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_minibatches_average_to_all_data(batch: int) -> None:
    data = torch.tensor([0.1, 1.4, -0.7, 2.2])

    def programs(size: int | None):
        def model() -> None:
            with pyro.plate("n", len(data), subsample_size=size) as index:
                z = pyro.sample("z", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

        def guide() -> None:
            logit = pyro.param("l", torch.tensor(0.2))
            with pyro.plate("n", len(data), subsample_size=size) as index:
                pyro.sample("z", dist.Bernoulli(logits=logit * data[index]))

        return model, guide

    whole, part = exact_gradient(*programs(None)), exact_gradient(*programs(batch))
    assert float(part["l"]) == pytest.approx(float(whole["l"]), rel=1e-5)
    assert part.attrs["loss"] == pytest.approx(whole.attrs["loss"], rel=1e-5)


def test_zero_probability_is_no_nan() -> None:
    def model() -> None:
        pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.5, 0.5, 0.0])))

    def guide() -> None:
        offset = torch.tensor([0.0, 0.0, -torch.inf])
        logits = pyro.param("l", torch.tensor([0.3, 0.1, 0.0])) + offset
        pyro.sample("z", dist.OneHotCategorical(logits=logits))

    exact = exact_gradient(model, guide)
    assert np.isfinite(exact["l"]).all()
    assert np.isfinite(exact.attrs["loss"])


def test_parameters_of_modules_and_constraints() -> None:
    linear = torch.nn.Linear(1, 1)

    def model(x: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("net", linear)
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=linear(x[:, None]).squeeze(-1)))

    x = torch.tensor([0.3, 1.2])
    exact = exact_gradient(model, guide, x)
    assert set(exact) == {"net$$$weight", "net$$$bias", "scale"}
    only = exact_gradient(model, guide, x, params="net*")
    assert set(only) == {"net$$$weight", "net$$$bias"}
    # By the unconstrained value, log(scale): a parameter at twice the scale is log(2) away.
    moved = exact_gradient(model, guide, x, params={"scale": torch.tensor(2.0)})
    assert float(moved["scale"]) == float(exact["scale"])
    step = 1e-2
    near = [
        exact_gradient(model, guide, x, params={"scale": 2 * np.exp(sign * step)}).attrs["loss"]
        for sign in (-1, 1)
    ]
    assert (near[1] - near[0]) / (2 * step) == pytest.approx(float(exact["scale"]), abs=1e-3)


def test_named_dimensions() -> None:
    problem = chain()
    problem.reset(torch.float64)
    exact = exact_gradient(
        problem.model,
        problem.guide,
        dims={"b_logits": ["row", "category"]},
        coords={"category": ["x", "y", "z"]},
    )
    assert exact["b_logits"].dims == ("row", "category")
    assert exact["b_logits"].sel(category="y").shape == (2,)


def continuous_guide() -> None:
    pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))


def continuous_model() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def bit_guide() -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))


def two_sites() -> None:
    pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("extra", dist.Bernoulli(0.5))


def many() -> None:
    logits = pyro.param("l", torch.zeros(20))
    pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def many_python() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))
    pyro.factor("f", torch.tensor(1.0 if z[0] > 0 else 0.0))


def nothing() -> None:
    pyro.sample("z", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("model", "guide", "options", "match"),
    [
        (continuous_model, continuous_guide, {}, r"Site 'z' \(Normal\) cannot be enumerated"),
        (two_sites, bit_guide, {}, "latent site 'extra' is missing from the guide"),
        (many, many, {}, r"1,048,576 joint states of the sites \['z'\]"),
        (many_python, many, {}, r"1,048,576 joint states"),
        (nothing, nothing, {}, "Neither the guide nor the model has a parameter"),
        (
            nothing,
            bit_guide,
            {"params": ["ll"]},
            r"no parameter is called 'll'; there are \['l'\]",
        ),
        (nothing, bit_guide, {"params": []}, "params is empty"),
        (nothing, bit_guide, {"params": {"l": torch.zeros(2)}}, r"'l' has shape \(2,\)"),
        (nothing, bit_guide, {"dims": {"l": ["a"]}}, "'l' has 0 dimensions"),
    ],
)
def test_errors(model, guide, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        exact_gradient(model, guide, **options)


def test_names_must_be_strings() -> None:
    for params in ([3], 3):
        with pytest.raises(TypeError, match=r"params must be names.*got \[?3"):
            exact_gradient(nothing, bit_guide, params=params)
    with pytest.raises(TypeError, match="value for 'l' must be a tensor or number; got 'x'"):
        exact_gradient(nothing, bit_guide, params={"l": "x"})


def test_values_keep_to_the_constraint() -> None:
    def guide() -> None:
        p = pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        pyro.sample("z", dist.Bernoulli(p))

    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"value for 'p' must satisfy Interval\(.*got 1.5"):
        exact_gradient(nothing, guide, params={"p": 1.5})


def test_no_parameter_shares_the_name_of_the_whole() -> None:
    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("all", torch.tensor(0.0))))

    with pytest.raises(ValueError, match="Parameter 'all' has the name of"):
        gradient_draws(nothing, guide, estimators={"s": "score"}, num_draws=5, progress=False)


def test_too_many_states_while_walking() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        if z > 0:
            pyro.sample("y", dist.Bernoulli(torch.full((5,), 0.5)).to_event(1))

    def guide() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(-30.0))))
        if z > 0:
            pyro.sample("y", dist.Bernoulli(torch.full((5,), 0.5)).to_event(1))

    with pytest.raises(ValueError, match="more than 10 joint states, visited one by one"):
        exact_gradient(model, guide, max_states=10)
