"""Captured steps give the losses, parameters and states of eager ones."""

from __future__ import annotations

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import DATA, batches, one_hot_programs, replayed, steps_of
from pyro.infer import SVI

from pyro_gumbel.estimators import (
    ARMS,
    DisARM,
    DoubleControlVariate,
    Exponential,
    GumbelRao,
    GumbelSoftmax,
    GumbelStraightThrough,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    NeuralBaseline,
    Rebar,
    ReinMax,
    ReinMaxRao,
    Score,
    StraightThrough,
)
from pyro_gumbel.infer import (
    CapturedSVI,
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    config_gradient,
)


def bit_programs(dtype=torch.float64):
    """The same with bits."""
    pyro.set_rng_seed(3)
    encoder = torch.nn.Linear(4, 3, dtype=dtype)
    decoder = torch.nn.Linear(3, 4, dtype=dtype)
    prior = torch.tensor([0.2, 0.3, 0.6], dtype=dtype)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return model, guide, [*encoder.parameters(), *decoder.parameters()]


def train(svi_class, programs, estimator, steps=100, dtype=torch.float64, lr=None, **options):
    """Losses, parameters and estimator after some steps from the same seed."""
    pyro.clear_param_store()
    elbo_class = options.pop("elbo", Estimator_ELBO)
    captured = options.pop("captured", {}) if svi_class is CapturedSVI else {}
    options.pop("captured", None)
    model, guide, parameters = programs(dtype)
    num_particles = options.pop("num_particles", 1)
    elbo = elbo_class(num_particles, max_plate_nesting=1, **options)
    optim = pyro.optim.Adam({"lr": 0.01}) if lr is None else lr()
    svi = svi_class(model, config_gradient(guide, {"z": estimator}), optim, elbo, **captured)
    pyro.set_rng_seed(11)
    with replayed() if svi_class is CapturedSVI else nullcontext():
        losses = [svi.step(batch) for batch in batches(steps, dtype)]
    return torch.tensor(losses), [p.detach().clone() for p in parameters], svi


ESTIMATORS = {
    "straight_through": lambda: StraightThrough(),
    "scheduled": lambda: GumbelStraightThrough(Exponential(1.0, 0.3, 0.02)),
    "relaxed": lambda: GumbelSoftmax(Exponential(1.0, 0.5, 0.02)),
    "reinmax": lambda: ReinMax(Exponential(2.0, 1.0, 0.02)),
    "gumbel_rao": lambda: GumbelRao(Exponential(1.0, 0.5, 0.02), num_samples=4),
    "reinmax_rao": lambda: ReinMaxRao(0.7, num_samples=4),
    "moving_average": lambda: Score(MovingAverage(0.8)),
    "neural_baseline": lambda: Score(
        NeuralBaseline(torch.nn.Linear(4, 1, dtype=torch.float64), "x")
    ),
    "muprop": lambda: MuProp(),
    "rebar": lambda: Rebar(0.5),
    "double_control_variate": lambda: DoubleControlVariate(2),
}


def assert_same(one, other, rtol=1e-6):
    # The fused optimiser rounds otherwise, and a hundred steps add up: float64 leaves 1e-8.
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=1e-7)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_same_parameters_as_eager_after_100_steps(make):
    torch.manual_seed(0)
    eager = train(SVI, one_hot_programs, make())
    torch.manual_seed(0)
    captured = train(CapturedSVI, one_hot_programs, make())
    assert_same(eager, captured)
    assert (eager[1][0] - one_hot_programs()[2][0]).abs().max() > 0.05  # training went somewhere


@pytest.mark.parametrize("make", [DisARM, lambda: ARMS(3)], ids=["disarm", "arms"])
def test_coupled_estimators_of_bits(make):
    assert_same(
        train(SVI, bit_programs, make(), steps=30), train(CapturedSVI, bit_programs, make(), 30)
    )


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles(vectorize):
    options = {"num_particles": 3, "vectorize_particles": vectorize}
    runs = [
        train(svi, one_hot_programs, Score(LeaveOneOut()), steps=40, **options)
        for svi in (SVI, CapturedSVI)
    ]
    assert_same(*runs)


@pytest.mark.parametrize(
    "options",
    [{"analytic_kl": True}, {"elbo": ImportanceWeighted_ELBO, "num_particles": 3}],
    ids=["analytic_kl", "importance_weighted"],
)
def test_other_objectives(options):
    runs = [train(svi, one_hot_programs, ReinMax(), 40, **options) for svi in (SVI, CapturedSVI)]
    assert_same(*runs)


def test_float32():
    runs = [
        train(svi, one_hot_programs, ReinMax(), 60, dtype=torch.float32)
        for svi in (SVI, CapturedSVI)
    ]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-3, atol=1e-3)


def test_state_of_estimators_goes_on():
    estimator = Score(MovingAverage(0.8))
    schedule = Exponential(1.0, 0.3, 0.02)
    eager = Score(MovingAverage(0.8))
    train(SVI, one_hot_programs, eager, 25)
    train(CapturedSVI, one_hot_programs, estimator, 25)
    torch.testing.assert_close(
        estimator.baseline.get_extra_state(), eager.baseline.get_extra_state()
    )
    train(CapturedSVI, one_hot_programs, GumbelStraightThrough(schedule), 25)
    assert schedule.step_count == 25
    assert schedule.stand_in is None


def test_state_that_is_loaded_is_used():
    """A baseline put in from outside must not be passed over by the recording."""
    runs = []
    for svi_class in (SVI, CapturedSVI):
        estimator = Score(MovingAverage(0.8))
        _, _, svi = train(svi_class, one_hot_programs, estimator, 10)
        state = {"sums": {"z": torch.tensor(50.0).double()}, "weights": {"z": torch.ones(())}}
        estimator.baseline.set_extra_state(state)
        pyro.set_rng_seed(2)
        svi.step(batches(1)[0])
        runs.append(estimator.baseline.get_extra_state()["sums"]["z"])
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0] > 30


@pytest.mark.parametrize(
    "lr",
    [
        lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.01}),
        lambda: pyro.optim.RAdam({"lr": 0.01}),
        lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.5}),
        lambda: pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
        ),
    ],
    ids=["sgd", "clipped_adam", "radam", "clip_norm", "scheduler"],
)
def test_optimizers(lr):
    runs = [train(svi, one_hot_programs, ReinMax(), 40, lr=lr) for svi in (SVI, CapturedSVI)]
    assert_same(*runs)


@replayed()
def test_learning_rate_schedule_moves_on():
    runs = []
    for svi_class in (SVI, CapturedSVI):
        pyro.clear_param_store()
        model, guide, parameters = one_hot_programs()
        schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}
        optim = pyro.optim.ExponentialLR(schedule)
        svi = svi_class(model, config_gradient(guide, ReinMax()), optim, Estimator_ELBO())
        pyro.set_rng_seed(1)
        for batch in batches(30):
            svi.step(batch)
            optim.step()
        runs.append([p.detach().clone() for p in parameters])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_one_recording_for_each_shape():
    pyro.clear_param_store()
    model, guide, _ = one_hot_programs()
    svi = CapturedSVI(
        model, config_gradient(guide, ReinMax()), pyro.optim.Adam({"lr": 0.01}), Estimator_ELBO()
    )
    for _ in range(3):
        svi.step(batches(1)[0])
        svi.step(batches(1, size=3)[0])
    assert len(steps_of(svi)) == 2
    assert all(step.recording is not None for step in steps_of(svi))


@replayed()
def test_subsampling_draws_anew():
    seen = []
    data = torch.arange(20.0)

    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", 20, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=data[index])

    def guide():
        pass

    optim = pyro.optim.SGD({"lr": 0.0})
    svi = CapturedSVI(model, guide, optim, Estimator_ELBO(max_plate_nesting=1))
    seen = {svi.step() for _ in range(12)}
    assert len(seen) > 6


@replayed()
def test_buffers_that_the_program_changes():
    """Batch norm's running mean: moved once a step, by comparisons with eager steps too."""
    runs = []
    for svi_class in (SVI, CapturedSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        norm = torch.nn.BatchNorm1d(4)
        loc = torch.tensor([0.5, 0.1, 0.2, 0.9])

        def model(x, norm=norm, loc=loc):
            pyro.module("norm", norm)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=norm(x))

        svi = svi_class(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), Estimator_ELBO())
        for batch in batches(8, torch.float32):
            svi.step(batch)
        runs.append(norm)
    torch.testing.assert_close(runs[0].running_mean, runs[1].running_mean)
    assert runs[0].num_batches_tracked == runs[1].num_batches_tracked == 8


def test_parameter_store_that_is_cleared_is_noticed():
    _, _, svi = train(CapturedSVI, one_hot_programs, ReinMax(), 5)
    old = dict(pyro.get_param_store()._params)
    pyro.clear_param_store()
    for batch in batches(4):
        svi.step(batch)
    new = pyro.get_param_store()._params
    assert set(new) == set(old)
    (step,) = steps_of(svi)
    assert {id(param) for param in step.leaves} == {id(param) for param in new.values()}


PRIOR = dist.Normal(0.0, 1.0).expand([3]).to_event(1)  # checks its values, whoever turns that off


@replayed()
def test_prior_that_was_made_before():
    def model(x):
        z = pyro.sample("z", PRIOR)
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(3)), 1.0).to_event(1))

    optim = pyro.optim.Adam({"lr": 0.01})
    svi = CapturedSVI(model, guide, optim, Estimator_ELBO())
    losses = [svi.step(torch.tensor(1.0)) for _ in range(5)]
    assert len(set(losses)) == 5
    assert PRIOR.base_dist._validate_args


def category_programs(dtype=torch.float64):
    """One variable for each datum, since some estimators take no joined ones."""
    logits = torch.zeros(DATA, 3, dtype=dtype, requires_grad=True)
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=dtype)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(prior))
            mean = (z * torch.arange(3, dtype=dtype)).sum(-1)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x.sum(-1))

    def guide(x):
        with pyro.plate("data", len(x)):
            given = pyro.param("logits", logits, event_dim=1)
            pyro.sample("z", dist.OneHotCategorical(logits=given))

    return model, guide, [logits]


@pytest.mark.parametrize(
    "name", ["disarm_tree", "local_expectation", "sum_and_sample", "unordered_set"]
)
def test_coupled_estimators_of_categories(name):
    assert_same(
        *(
            train(kind, category_programs, name, steps=20, vectorize_particles=True)
            for kind in (SVI, CapturedSVI)
        )
    )


@pytest.mark.slow
def test_compiled_recording():
    options = {"captured": {"compile": True}, "steps": 30}
    captured = train(CapturedSVI, one_hot_programs, ReinMax(), **options)
    assert_same(train(SVI, one_hot_programs, ReinMax(), 30), captured, rtol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("capturable", [False, True])
def test_graphs_on_the_gpu(capturable):
    runs = []
    for svi_class in (SVI, CapturedSVI):
        pyro.clear_param_store()
        with torch.device("cuda"):
            model, guide, parameters = one_hot_programs()
        optim = pyro.optim.Adam({"lr": 0.01, "capturable": capturable})
        elbo = Estimator_ELBO(max_plate_nesting=1)
        svi = svi_class(model, config_gradient(guide, ReinMax()), optim, elbo)
        pyro.set_rng_seed(11)
        losses = [svi.step(batch) for batch in batches(40).cuda()]
        with pytest.raises(ValueError, match="'x'"):
            svi.step(2 + batches(1)[0].cuda())
        runs.append((torch.tensor(losses), [p.detach().clone() for p in parameters]))
    (step,) = steps_of(svi)
    assert step.graph is not None
    assert (step.update is not None) == capturable
    assert_same(*runs, rtol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_on_the_gpu(make):
    runs = []
    for svi_class in (SVI, CapturedSVI):
        pyro.clear_param_store()
        torch.manual_seed(0)
        estimator = make().cuda()
        with torch.device("cuda"):
            model, guide, parameters = one_hot_programs()
        svi = svi_class(
            model,
            config_gradient(guide, estimator),
            pyro.optim.Adam({"lr": 0.01}),
            Estimator_ELBO(max_plate_nesting=1),
        )
        pyro.set_rng_seed(11)
        losses = [svi.step(batch) for batch in batches(100).cuda()]
        runs.append((torch.tensor(losses), [p.detach().clone() for p in parameters]))
    assert_same(*runs, rtol=1e-6)
