"""Captured steps give the losses, parameters and states of eager ones, or are refused."""

from __future__ import annotations

import copy
import linecache
import random
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.captured import (
    DATA,
    Plain,
    X,
    batches,
    make,
    observe,
    one_hot_programs,
    replayed,
    same,
    steps_of,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import nn

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
from pyro_gumbel.guides import AutoDiscrete
from pyro_gumbel.infer import (
    CapturedSVI,
    Estimator_ELBO,
    ImportanceWeighted_ELBO,
    captured_svi,
    config_gradient,
)
from pyro_gumbel.infer._recording import CudaGraph, record
from pyro_gumbel.infer.captured_svi import step_jointly

ONES = torch.ones(3)


def bits_programs(dtype=torch.float64):
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


def train(svi_class, programs, estimator, steps=30, dtype=torch.float64, **options):
    """Losses, parameters and estimator after some steps from the same seed."""
    pyro.clear_param_store()
    elbo_class = options.pop("elbo", Estimator_ELBO)
    captured = options.pop("captured", {}) if svi_class is CapturedSVI else {}
    options.pop("captured", None)
    model, guide, parameters = programs(dtype)
    num_particles = options.pop("num_particles", 1)
    elbo = elbo_class(num_particles, max_plate_nesting=1, **options)
    optim = pyro.optim.Adam({"lr": 0.03})
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
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=1e-7)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
def test_same_parameters_as_eager_after_thirty_steps(make):
    torch.manual_seed(0)
    eager = train(SVI, one_hot_programs, make())
    torch.manual_seed(0)
    captured = train(CapturedSVI, one_hot_programs, make())
    assert_same(eager, captured)
    assert (eager[1][0] - one_hot_programs()[2][0]).abs().max() > 0.05  # training went somewhere


@pytest.mark.parametrize("make", [DisARM, lambda: ARMS(3)], ids=["disarm", "arms"])
def test_coupled_estimators_of_bits(make):
    assert_same(train(SVI, bits_programs, make()), train(CapturedSVI, bits_programs, make()))


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


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles(vectorize):
    options = {"num_particles": 3, "vectorize_particles": vectorize}
    runs = [
        train(svi, one_hot_programs, Score(LeaveOneOut()), steps=10, **options)
        for svi in (SVI, CapturedSVI)
    ]
    assert_same(*runs)


@pytest.mark.parametrize(
    "options",
    [{"analytic_kl": True}, {"elbo": ImportanceWeighted_ELBO, "num_particles": 3}],
    ids=["analytic_kl", "importance_weighted"],
)
def test_other_objectives(options):
    runs = [train(svi, one_hot_programs, ReinMax(), 10, **options) for svi in (SVI, CapturedSVI)]
    assert_same(*runs)


def test_float32():
    runs = [
        train(svi, one_hot_programs, ReinMax(), 30, dtype=torch.float32)
        for svi in (SVI, CapturedSVI)
    ]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_compiled_recording():
    options = {"captured": {"compile": True}, "steps": 30}
    captured = train(CapturedSVI, one_hot_programs, ReinMax(), **options)
    assert_same(train(SVI, one_hot_programs, ReinMax(), 30), captured, rtol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("capturable", [False, True])
def test_graphs_on_the_gpu(capturable, monkeypatch):
    made = []  # of steps of the optimiser
    counted = lambda *args: made.append(args) or CudaGraph(*args)  # noqa: E731
    monkeypatch.setattr(captured_svi, "CudaGraph", counted)
    monkeypatch.setattr(captured_svi, "_SETTLED", 1)
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
    assert len(made) == capturable
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


# Programs


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


def bit_programs(runs=None):
    def model(x):
        if runs is not None:
            runs.append(dist.is_validation_enabled())
        z = pyro.sample("z", dist.Bernoulli(0.3))
        observe(z.unsqueeze(-1).expand(z.shape + (5,)), x)

    def guide(x):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))

    return model, guide


@pytest.mark.parametrize("estimator", [ReinMax, DisARM, lambda: GumbelStraightThrough(0.5)])
@pytest.mark.parametrize("vectorize", [False, True])
def test_four_steps_run_the_programs_eight_times_at_most(estimator, vectorize):
    runs: list[bool] = []
    model, guide = bit_programs(runs)
    elbo = Estimator_ELBO(vectorize_particles=True) if vectorize else Estimator_ELBO()
    svi = make(CapturedSVI, model, config_gradient(guide, estimator()), elbo=elbo)
    for x in X[:4]:
        svi.step(x)
    assert len(runs) <= 8
    more = len(runs)
    for x in X[4:30]:
        svi.step(x)
    assert len(runs) == more
    (step,) = steps_of(svi)
    assert step.replays == 28


@pytest.mark.parametrize("enabled", [False, True])
def test_validation_is_what_the_user_set_in_every_run(enabled):
    runs: list[bool] = []
    model, guide = bit_programs(runs)
    with pyro.validation_enabled(enabled):
        svi = make(CapturedSVI, model, config_gradient(guide, ReinMax()), check_every=2)
        for x in X[:8]:
            svi.step(x)
    assert set(runs) == {enabled}


def test_a_number_that_the_program_counts_is_left_to_it():
    counts = {}
    for svi_class in (SVI, CapturedSVI):
        seen: list[int] = []

        def model(x, seen=seen):
            seen.append(len(seen))
            observe(pyro.param("a", torch.zeros(5)), x)

        svi = make(svi_class, model)
        for x in X[:20]:
            svi.step(x)
        assert seen == list(range(len(seen)))  # no invented counts
        counts[svi_class] = len(seen)
    assert counts[CapturedSVI] < counts[SVI]


def test_probabilities_that_become_extreme():
    """Whether torch has clamped the logits decides which parameter is read."""
    usual, extreme = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1e-9, 0.4, 0.6])
    runs = []

    def model(x, probs):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(z @ pyro.param("a", torch.ones(3)), 1.0), obs=x)

    def guide(x, probs):
        runs.append(probs)
        with pyro.plate("data", 5):
            pyro.sample("z", dist.OneHotCategorical(probs * pyro.param("b", torch.ones(3))))

    def scenario(svi_class):
        runs.clear()
        svi = make(svi_class, model, config_gradient(guide, ReinMax()))
        return [svi.step(x, usual if n < 5 or n % 2 else extreme) for n, x in enumerate(X[:30])]

    with pyro.validation_enabled(True):
        same(scenario)
    assert len(runs) < 10


def test_two_programs_whose_structure_is_found_by_trials():
    def scenario(svi_class):
        elbo = Estimator_ELBO(2, vectorize_particles=True)

        def programs(name):
            def model(x):
                with pyro.plate("data", 5):
                    z = pyro.sample(name, dist.Bernoulli(0.3))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

            def guide(x):
                logits = pyro.param(f"l{name}", torch.zeros(5))
                with pyro.plate("data", 5):
                    pyro.sample(name, dist.Bernoulli(logits=logits))

            return model, config_gradient(guide, ReinMax())

        both = [make(svi_class, *programs(name), elbo=elbo) for name in "zy"]
        return [svi.step(x) for x in X[:8] for svi in both]

    same(scenario)


def test_guides_that_read_the_plates_of_the_model():
    def scenario(svi_class):
        def model(x):
            group = pyro.sample("group", dist.OneHotCategorical(torch.tensor([0.3, 0.7])))
            with pyro.plate("data", 5):
                z = pyro.sample("z", dist.Bernoulli(0.4))
                pyro.sample("x", dist.Normal(z + group[..., 0], 1.0), obs=x)

        guide = AutoDiscrete(model, gradient=ReinMax())
        svi = make(svi_class, model, guide)
        return [svi.step(x) for x in X[:8]]

    same(scenario)


# Optimisers


@pytest.mark.parametrize(
    "make_optim",
    [
        lambda: pyro.optim.Adam({"lr": 0.05}),
        lambda: pyro.optim.SGD({"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "l" else 0.01}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}),
        lambda: pyro.optim.AdagradRMSProp({}),
        lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
        lambda: pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}
        ),
    ],
)
def test_optimisers_end_in_the_same_state(make_optim):
    def scenario(svi_class):
        optim = make_optim()
        model, guide = bit_programs()
        svi = make(svi_class, model, config_gradient(guide, ReinMax()), optim)
        losses = []
        for x in X[:10]:
            losses.append(svi.step(x))
            if isinstance(optim, PyroLRScheduler):
                optim.step()
        return losses, optim.get_state()

    same(scenario)


def test_an_optimiser_that_needs_a_closure_is_refused_by_name():
    model, guide = bit_programs()
    for optim in (
        pyro.optim.PyroOptim(torch.optim.LBFGS, {"lr": 0.1}),
        pyro.optim.StepLR({"optimizer": torch.optim.LBFGS, "optim_args": {}, "step_size": 1}),
    ):
        with pytest.raises(TypeError, match=r"LBFGS evaluates the loss by a closure.*Adam"):
            make(CapturedSVI, model, guide, optim)


@pytest.mark.parametrize("change", ["rate", "state", "gradient", "clip"])
def test_a_recorded_optimiser_follows_changes(change, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        step_jointly(*args)

    monkeypatch.setattr(captured_svi, "step_jointly", counted)
    monkeypatch.setattr(captured_svi, "_SETTLED", 1)

    def scenario(svi_class):
        optim = pyro.optim.Adam({"lr": 0.05, "weight_decay": 0.1})
        model, guide = bit_programs()
        svi = make(svi_class, model, config_gradient(guide, ReinMax()), optim)
        losses = [svi.step(x) for x in X[:8]]
        state = copy.deepcopy(optim.get_state())
        losses += [svi.step(x) for x in X[8:12]]
        (parameter,) = optim.optim_objs
        if change == "rate":
            optim.optim_objs[parameter].param_groups[0]["lr"] = 0.3
        elif change == "state":
            optim.set_state(state)
            optim.optim_objs[parameter].load_state_dict(state["l"])
        elif change == "gradient":
            parameter.grad.add_(5.0)
        else:
            optim.grad_clip[parameter] = lambda p: torch.nn.utils.clip_grad_value_(p, 1e-3)
        losses += [svi.step(x) for x in X[12:20]]
        assert (parameter.grad == 0).all()
        return losses, optim.get_state()

    same(scenario)
    # Steps 1 to 4, of which the last is recorded, and one to three after the change.
    assert 5 <= len(calls) <= 7


def test_an_optimiser_with_a_late_hook_calls_it(monkeypatch):
    monkeypatch.setattr(captured_svi, "_SETTLED", 1)
    seen = []
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = make(CapturedSVI, *bit_programs(), optim)
    for x in X[:6]:
        svi.step(x)
    (one,) = optim.optim_objs.values()
    one.register_step_post_hook(lambda *args: seen.append(args))
    for x in X[6:10]:
        svi.step(x)
    assert len(seen) == 4


@pytest.mark.parametrize(("every", "number"), [(None, 1), (60, 2), (30, 0), (1, 0)])
def test_an_optimiser_is_recorded_once_its_settings_stay(every, number, monkeypatch):
    """A scheduler that changes the rate often costs no recordings."""
    recorded = []

    def counted(*args):
        recorded.append(args)
        return record(*args)

    monkeypatch.setattr(captured_svi, "record", counted)
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.99}
    optim = pyro.optim.ExponentialLR(schedule)
    svi = make(CapturedSVI, *bit_programs(), optim)
    for count in range(1, 121):
        svi.step(X[0])
        if every is not None and count % every == 0:
            optim.step()
    assert len(recorded) == number


def test_two_that_share_an_optimiser():
    def scenario(svi_class):
        optim = pyro.optim.Adam({"lr": 0.05})

        def other(x):
            observe(pyro.param("l", torch.tensor(0.0)) + pyro.param("m", torch.zeros(5)), x)

        model, guide = bit_programs()
        first = make(svi_class, model, config_gradient(guide, ReinMax()), optim)
        second = make(svi_class, other, optim=optim)
        return [svi.step(x) for x in X[:10] for svi in (first, second)]

    same(scenario)


# What is recorded anew


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
def test_other_arguments_than_tensors_are_part_of_the_key():
    def model(scale):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, scale), obs=torch.tensor(1.0))

    svi = make(CapturedSVI, model)
    svi.optim = pyro.optim.SGD({"lr": 0.0})
    losses = {scale: [svi.step(scale) for _ in range(4)] for scale in (1.0, 2.0)}
    for scale, found in losses.items():
        expected = -dist.Normal(0.0, scale).log_prob(torch.tensor(1.0)).item()
        assert found == pytest.approx([expected] * 4, rel=1e-6)


OPTIONS = {
    "num_particles": (Estimator_ELBO, {"num_particles": 2}, 3),
    "vectorize_particles": (Estimator_ELBO, {"num_particles": 2}, True),
    "analytic_kl": (Estimator_ELBO, {}, True),
    "doubly_reparameterized": (ImportanceWeighted_ELBO, {"num_particles": 3}, True),
    "default": (Estimator_ELBO, {"default": "auto"}, "score"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_loss_that_change(option):
    kind, options, value = OPTIONS[option]

    def model(x):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        observe((y + z).unsqueeze(-1).expand((y + z).shape + (5,)), x)

    def guide(x):
        pyro.sample("y", dist.Normal(pyro.param("mu", torch.tensor(0.3)), 1.0))
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.0))))

    def scenario(svi_class):
        elbo = kind(**options, max_plate_nesting=0)
        svi = make(svi_class, model, guide, elbo=elbo)
        losses = [svi.step(x) for x in X[:6]]
        setattr(elbo, option, value)
        return losses + [svi.step(x) for x in X[6:14]]

    same(scenario)


def test_handlers_of_their_own():
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.full((5,), 0.5)), x)

        svi = make(svi_class, model, optim=pyro.optim.SGD({"lr": 0.0}))
        losses = []
        for scale in (0.1, 0.2, 0.3, 0.4):
            with poutine.scale(scale=scale):
                losses += [svi.step(X[0]) for _ in range(4)]
        return losses

    assert len(set(same(scenario))) == 4


def test_handlers_and_methods_made_at_each_step():
    plain = Plain()
    svi = make(CapturedSVI, plain.model)
    for x in X[:40]:
        svi.model = plain.model
        with poutine.scale(scale=0.5):
            svi.step(x)
    (step,) = steps_of(svi)
    assert step.replays == 38


def test_recordings_that_are_never_used_again_are_forgotten():
    svi = make(CapturedSVI, Plain().model)

    def scaled_steps():
        for number in range(100):
            svi.step(X[0])
            with poutine.scale(scale=1.5 + number):
                svi.step(X[0])

    with pytest.warns(UserWarning, match="handlers so far.*make handlers around steps once"):
        scaled_steps()
    assert len(steps_of(svi)) <= 32
    assert max(step.replays for step in steps_of(svi)) == 98  # what comes again is kept


def test_many_kinds_of_arguments_bring_a_warning():
    def model(scale):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, scale), obs=torch.tensor(1.0))

    svi = make(CapturedSVI, model)
    with pytest.warns(UserWarning, match="more than 32 kinds of arguments"):
        [svi.step(1.0 + number) for number in range(34)]


def test_parts_that_are_replaced():
    def scenario(svi_class):
        def model(x):
            observe(pyro.param("a", torch.zeros(5)), x)

        def other(x):
            observe(2 * pyro.param("a", torch.zeros(5)) + 1, x)

        svi = make(svi_class, model)
        losses = [svi.step(x) for x in X[:5]]
        svi.optim = pyro.optim.SGD({"lr": 0.0})
        losses += [svi.step(x) for x in X[:5]]
        svi.model = other
        return losses + [svi.step(x) for x in X[:5]]

    same(scenario)


def test_autocast_is_part_of_what_is_recorded():
    def scenario(svi_class):
        net = torch.nn.Linear(5, 5)

        def model(x):
            pyro.module("net", net)
            observe(net(x).float(), x)

        svi = make(svi_class, model)
        losses = []
        for low in (False, True, False):
            for x in X[:4]:
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    losses.append(svi.step(x))
        return losses

    same(scenario)


def test_another_autocast_type():
    weight = torch.eye(2)

    def model():
        mean = weight @ pyro.param("mean", torch.ones(2))
        seen.append(mean.dtype)
        pyro.sample("x", dist.Normal(mean.float(), 1.0).to_event(1), obs=torch.ones(2))

    pyro.clear_param_store()
    svi = make(CapturedSVI, model, lambda: None)
    for dtype in (torch.bfloat16, torch.float16):
        seen: list[torch.dtype] = []
        with torch.autocast("cpu", dtype):
            svi.step()
        assert set(seen) == {dtype}


@pytest.mark.parametrize("how", ["set", "delete", "clear", "load"])
def test_parameters_that_are_replaced_in_the_store(how, tmp_path):
    def scenario(svi_class):
        def model(x):
            scale = pyro.param("s", torch.ones(()), constraint=dist.constraints.positive)
            observe(pyro.param("a", torch.zeros(5)), x, scale)

        svi = make(svi_class, model)
        store = pyro.get_param_store()
        losses = [svi.step(x) for x in X[:4]]
        store.save(tmp_path / "store")
        losses += [svi.step(x) for x in X[4:8]]
        if how == "set":
            store["s"] = torch.tensor(3.0)
        elif how == "delete":
            del store["s"]
        elif how == "clear":
            pyro.clear_param_store()
        else:
            store.load(tmp_path / "store")
        return losses + [svi.step(x) for x in X[8:16]]

    same(scenario)


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


# Refusals and errors


def test_a_branch_on_a_tensor_is_refused():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        x = pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.randn(()))
        pyro.sample("x", dist.Normal(loc, 1.0 if x > 0 else 2.0), obs=torch.tensor(1.0))

    svi = make(CapturedSVI, model)
    svi.step()
    with pytest.raises(
        RuntimeError, match=r"(?s)turns a tensor into a number.*Use pyro.infer.SVI"
    ):
        svi.step()


def test_a_branch_that_brings_parameters_is_refused():
    def model():
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.randn(()))
        loc = pyro.param("loc" if y > 0 else "other", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    svi = make(CapturedSVI, model)
    svi.step()
    with pytest.raises(RuntimeError, match="turns a tensor into a number"):
        [svi.step() for _ in range(20)]


def test_selection_by_a_mask_is_refused():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", int((x > 0).sum())):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[x > 0])

    svi = make(CapturedSVI, model)
    svi.step(torch.tensor([1.0, -1.0]))
    with pytest.raises(RuntimeError, match="cannot record this step"):
        svi.step(torch.tensor([1.0, -1.0]))


def test_draws_of_pythons_generator_are_refused():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = random.choice([1.0, 2.0])
        pyro.sample("x", dist.Normal(loc, scale), obs=torch.tensor(1.0))

    svi = make(CapturedSVI, model)
    svi.step()
    with pytest.raises(RuntimeError, match="Python's or NumPy's generator"):
        svi.step()


def observing(mean_of):
    def model(x):
        mean = mean_of(pyro.param("mean", torch.zeros(3)))
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model


@torch.jit.script
def scripted(mean):
    if bool(mean.sum() > 5):
        return mean + 1
    return mean - 1


@pytest.mark.filterwarnings("ignore")  # of nested tensors, and of torch.jit
@pytest.mark.parametrize("mean_of", [scripted, lambda mean: mean[mean > -9.0]])
def test_what_cannot_be_recorded_is_refused(mean_of):
    svi = make(CapturedSVI, observing(mean_of))
    svi.step(ONES)
    before = pyro.param("mean").detach().clone()
    with pytest.raises(RuntimeError, match=r"^CapturedSVI cannot record.*pyro\.infer\.SVI") as got:
        svi.step(ONES)
    assert "Trace Shapes" not in str(got.value)
    assert got.value.__cause__ is not None
    torch.testing.assert_close(pyro.param("mean").detach(), before)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, NotImplementedError])
def test_errors_of_the_program_are_raised_as_they_are(error):
    fails = []

    def mean_of(mean):
        if fails:
            raise error("of the user's")
        return mean

    svi = make(CapturedSVI, observing(mean_of))
    svi.step(ONES)
    fails.append(True)
    with pytest.raises(error, match="^of the user's"):
        svi.step(ONES)
    fails.clear()
    for _ in range(4):
        svi.step(ONES)


def test_a_wrong_shape_raises_what_an_eager_step_does():
    wrong = []
    svi = make(CapturedSVI, observing(lambda mean: mean @ torch.ones(2) if wrong else mean))
    svi.step(ONES)
    wrong.append(True)
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch"):
        svi.step(ONES)


@pytest.mark.filterwarnings("ignore")
def test_a_failed_recording_leaves_buffers_alone():
    norm = nn.BatchNorm1d(3)

    def mean_of(mean):
        return scripted(norm(mean + torch.arange(2.0)[:, None]).sum(0))

    svi = make(CapturedSVI, observing(mean_of))
    svi.step(ONES)
    before = norm.running_mean.clone(), norm.num_batches_tracked.clone()
    with pytest.raises(RuntimeError, match="cannot record"):
        svi.step(ONES)
    torch.testing.assert_close((norm.running_mean, norm.num_batches_tracked), before)


def test_refusals_name_the_users_line():
    def mean_of(mean):
        return mean * mean.sum().item()  # here

    svi = make(CapturedSVI, observing(mean_of))
    svi.step(ONES)
    line = mean_of.__code__.co_firstlineno + 1
    assert "# here" in linecache.getline(__file__, line)
    with pytest.raises(RuntimeError, match=rf"Line {line} of .*test_captured_svi\.py: return"):
        svi.step(ONES)


@replayed()
def test_nan_parameters_are_reported():
    model, guide, parameters = one_hot_programs()
    svi = make(CapturedSVI, model, config_gradient(guide, ReinMax()))
    for batch in batches(4):
        svi.step(batch)
    with torch.no_grad():
        parameters[0].fill_(float("nan"))
    with pytest.raises(ValueError, match="logits"):
        svi.step(batches(1)[0])


def test_validation_of_the_step_that_is_recorded():
    def model(x):
        observe(pyro.param("a", torch.zeros(5)), x)

    svi = make(CapturedSVI, model)
    svi.step(X[0])
    before = pyro.param("a").detach().clone()
    with pytest.raises(ValueError, match="within the support"):
        svi.step(X[1] * float("nan"))
    assert torch.equal(pyro.param("a"), before)
    svi.step(X[1])
    (step,) = steps_of(svi)
    assert step.recording is not None


def test_a_loss_that_is_nan_warns_at_every_step():
    """A step is not recorded with it, for a replay would take that for what is expected."""

    def model(x):
        observe(pyro.param("a", torch.zeros(5)), X[0])
        pyro.sample("y", dist.Normal(0.0, 1.0, validate_args=False), obs=x)

    svi = make(CapturedSVI, model)
    for number in range(10):
        is_nan = number in (1, 2, 3, 6)
        warns = pytest.warns(UserWarning, match="Encountered NaN: loss")
        with warns if is_nan else nullcontext():
            svi.step(torch.tensor(float("nan") if is_nan else 0.5))
    (step,) = steps_of(svi)
    assert step.replays >= 3


def test_errors():
    def model(x):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    adam = pyro.optim.Adam({"lr": 0.01})
    with pytest.raises(TypeError, match="loss must be an Estimator_ELBO"):
        CapturedSVI(model, lambda x: None, adam, Trace_ELBO())
    with pytest.raises(ValueError, match="check_every must be at least 1"):
        CapturedSVI(model, lambda x: None, adam, Estimator_ELBO(), check_every=0)
    svi = make(CapturedSVI, lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)))
    with pytest.raises(ValueError, match="neither model nor guide has a parameter"):
        svi.step()
    with pytest.raises(TypeError, match="every argument must be a tensor or hashable"):
        make(CapturedSVI, lambda x: None).step({1, 2})
