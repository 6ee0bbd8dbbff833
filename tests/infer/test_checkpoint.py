"""A resumed run ends as an uninterrupted one, and bad files are refused."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import nn
from torch.distributions import constraints

from pyro_gumbel.estimators import (
    Exponential,
    GumbelStraightThrough,
    MovingAverage,
    NeuralBaseline,
    Rebar,
    Relax,
    Score,
)
from pyro_gumbel.infer import (
    CapturedSVI,
    Estimator_ELBO,
    config_gradient,
    load_checkpoint,
    save_checkpoint,
)

X = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)).round()
PRIOR = torch.tensor([0.2, 0.3, 0.5])


# Programs. Each call makes them anew, as another process would.


def store_programs():
    """Parameters with constraints, of which one appears late."""
    steps = []

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(weights))
            mean = (z * torch.arange(3.0)).sum(-1)
            if len(steps) > 3:
                mean = mean + pyro.param("late", lambda: torch.randn(()))
            pyro.sample("x", dist.Normal(mean, scale), obs=x.sum(-1))

    def guide(x):
        steps.append(None)
        bound = constraints.independent(constraints.interval(-2.0, torch.tensor(2.0)), 1)
        logits = pyro.param("logits", torch.full((3,), 0.3), constraint=bound)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=logits))

    return model, guide, steps


class Coder(nn.Module):
    """A VAE as Pyro's tutorials write it, with a buffer that changes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(PRIOR))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=self.encoder(x)))


def method_programs():
    coder = Coder()
    return coder.model, coder.guide, coder


def closure_programs():
    """Modules in closures, one in a function that the program calls."""
    coder = Coder()
    encoder, decoder = coder.encoder, coder.decoder

    def decode(z):
        pyro.module("decoder", decoder)
        return decoder(z)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(PRIOR))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategorical(logits=encoder(x)))

    return model, guide, coder


class PyroGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.temperature = PyroParam(torch.tensor(0.8), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            logits = self.encoder(x) / self.temperature
            pyro.sample("z", dist.OneHotCategorical(logits=logits))


def module_programs():
    guide = PyroGuide()
    return Coder().model, guide, guide


PROGRAMS = {
    "store": store_programs,
    "methods": method_programs,
    "closures": closure_programs,
    "modules": module_programs,
}
ESTIMATORS = {
    "score": lambda: "score",
    "rebar": lambda: {"z": "rebar"},
    "relax": lambda: {"z": Relax(nn.Linear(3, 1))},
    "schedule": lambda: {"z": GumbelStraightThrough(Exponential(1.0, 0.3, 0.1))},
    "moving average": lambda: lambda msg: AVERAGE,
    "network": lambda: {"z": Score(NeuralBaseline(nn.Linear(4, 1), "x"))},
}
AVERAGE = Score(MovingAverage())


def adam():
    return pyro.optim.Adam({"lr": 0.05})


def scheduled():
    optimizer = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.7}
    return PyroLRScheduler(torch.optim.lr_scheduler.ExponentialLR, optimizer)


def plateau():
    optimizer = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01, "momentum": 0.9}}
    return PyroLRScheduler(
        torch.optim.lr_scheduler.ReduceLROnPlateau, {**optimizer, "patience": 0}
    )


OPTIMIZERS = {
    "adam": adam,
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9}),
    "scheduled": scheduled,
    "plateau": plateau,
    "by name": lambda: pyro.optim.RAdam(lambda name: {"lr": 0.1 if "scale" in name else 0.02}),
}


def start(programs, config, optimizer=adam, svi_class=SVI, elbo=None):
    pyro.clear_param_store()
    AVERAGE.baseline.set_extra_state({"sums": {}, "weights": {}})
    model, guide, kept = programs()
    elbo = elbo or Estimator_ELBO(max_plate_nesting=1)
    return svi_class(model, config_gradient(guide, config), optimizer(), elbo), kept


def steps(svi, kept, number, first=0):
    losses = []
    for step in range(first, first + number):
        if isinstance(kept, list):
            kept[:] = [None] * step
        losses.append(svi.step(X[np.random.permutation(8)][:, random.sample(range(4), 4)]))
        if isinstance(svi.optim, PyroLRScheduler) and step % 2:
            plateaus = "Plateau" in svi.optim.pt_scheduler_constructor.__name__
            svi.optim.step(*([losses[-1]] if plateaus else []))
    return losses


def everything(kept):
    store = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    state = kept.state_dict() if isinstance(kept, nn.Module) else {}
    return store | {f"module {name}": value.clone() for name, value in state.items()}


def assert_resumes(path, make, number=4):
    pyro.set_rng_seed(1)
    svi, kept = make()
    expected = steps(svi, kept, 2 * number)
    whole = everything(kept)
    pyro.set_rng_seed(1)
    svi, kept = make()
    found = steps(svi, kept, number)
    save_checkpoint(path, svi, step=number)
    pyro.set_rng_seed(2)
    svi, kept = make()
    assert load_checkpoint(path, svi) == {"step": number}
    found += steps(svi, kept, number, number)
    assert found == expected
    resumed = everything(kept)
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    return svi


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.pt"


# Resuming


@pytest.mark.parametrize("config", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("programs", PROGRAMS.values(), ids=PROGRAMS)
def test_a_resumed_run_is_the_uninterrupted_one(path, programs, config):
    assert_resumes(path, lambda: start(programs, config()))


@pytest.mark.parametrize(
    ("programs", "config"),
    [
        ("methods", "relax"),
        *(pytest.param(p, c, marks=pytest.mark.slow) for p in PROGRAMS for c in ESTIMATORS),
    ],
)
def test_a_captured_run_resumes(path, programs, config):
    """Its third steps and later ones are replays, the resumed ones among them."""
    make = method_programs if programs == "store" else PROGRAMS[programs]  # no late parameter
    assert_resumes(path, lambda: start(make, ESTIMATORS[config](), svi_class=CapturedSVI))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("programs", [store_programs, method_programs])
def test_optimisers_resume(path, programs, optimizer):
    assert_resumes(path, lambda: start(programs, "reinmax", optimizer))


@pytest.mark.parametrize("local", [False, True])
def test_an_autoguide_that_was_called_once_resumes(path, local):
    def programs():
        def model(x):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Poisson(rate), obs=x.sum(-1))

        guide = AutoNormal(model)
        guide(X)
        return model, guide, guide

    def make():
        pyro.clear_param_store()
        model, guide, kept = programs()
        return SVI(model, guide, adam(), Trace_ELBO()), kept

    with pyro.settings.context(module_local_params=local):
        assert_resumes(path, make)
        pyro.clear_param_store()
        svi = SVI(programs()[0], AutoNormal(programs()[0]), adam(), Trace_ELBO())
        with pytest.raises(ValueError, match=r"run\.pt does not fit guide.*must be called once"):
            load_checkpoint(path, svi)


def test_float64_estimators_resume(path):
    def programs():
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.OneHotCategorical(PRIOR.double()))
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x.sum(-1).double())

        def guide(x):
            logits = pyro.param("logits", torch.zeros(3, dtype=torch.float64))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.OneHotCategorical(logits=logits))

        return model, guide, None

    svi = assert_resumes(path, lambda: start(programs, Rebar()))
    assert svi.guide.gradient_messenger.config.scale.dtype == torch.float64


def test_a_gradient_that_is_left_at_zero_moves_a_parameter_as_before(path):
    """Adam moves a parameter that got zeros, and not one without a gradient."""

    def programs():
        def model(x):
            a, b = pyro.param("a", torch.zeros(())), pyro.param("b", torch.zeros(()))
            pyro.sample("x", dist.Normal(a if len(kept) > 2 else a + b, 1.0), obs=x.sum())

        kept = []
        return model, lambda x: kept.append(None), kept

    def make():
        pyro.clear_param_store()
        model, guide, kept = programs()
        return SVI(model, guide, adam(), Trace_ELBO()), kept

    assert_resumes(path, make)


def test_a_run_goes_back_to_where_it_was_saved(path):
    """In one process, with the tensors that it has."""
    svi, kept = start(method_programs, {"z": "rebar"}, svi_class=CapturedSVI)
    steps(svi, kept, 4)
    save_checkpoint(path, svi)
    expected = steps(svi, kept, 4, 4), everything(kept)
    load_checkpoint(path, svi)
    losses, found = steps(svi, kept, 4, 4), everything(kept)
    assert losses == expected[0]
    assert found.keys() == expected[1].keys()
    assert all(torch.equal(found[name], value) for name, value in expected[1].items())


CONSTRAINTS = {
    "positive": constraints.positive,
    "interval": constraints.interval(-1.0, torch.tensor([2.0, 3.0])),
    "independent": constraints.independent(constraints.greater_than(0.5), 1),
    "ordered": dist.constraints.ordered_vector,
    "softplus": dist.constraints.softplus_positive,
    "stack": constraints.stack([constraints.positive, constraints.real], -1),
    "simplex": constraints.simplex,
}


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_constraints_are_kept(path, constraint):
    svi, _ = start(method_programs, "score")
    pyro.param("p", torch.tensor([0.6, 0.4]).sort()[0].abs() + 0.2, constraint=constraint)
    value = pyro.param("p").detach()
    save_checkpoint(path, svi)
    svi, _ = start(method_programs, "score")
    load_checkpoint(path, svi)
    store = pyro.get_param_store()
    assert torch.equal(store["p"], value)
    assert type(store.get_state()["constraints"]["p"]) is type(constraint)


# The file


def test_the_file_is_data(path):
    svi, kept = start(method_programs, {"z": "rebar"}, scheduled)
    steps(svi, kept, 2)
    more = {"step": 2, "losses": [0.5, None], "best": {"z": torch.ones(2)}}
    loader = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    save_checkpoint(path, svi, **more, loader=loader)
    state = torch.load(path, weights_only=True)
    assert (state["format"], state["version"]) == ("pyro_gumbel checkpoint", 1)
    assert load_checkpoint(path).keys() == {*more, "loader"}
    assert load_checkpoint(path)["loader"] == loader.state_dict()
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    "value",
    [Path("x"), np.ones(2), {"a": [lambda: None]}, object()],
    ids=lambda v: type(v).__name__,
)
def test_values_that_are_not_data_are_refused(path, value):
    svi, _ = start(method_programs, "score")
    save_checkpoint(path, svi, step=1)
    with pytest.raises(TypeError, match="save_checkpoint: extra holds an object that is not"):
        save_checkpoint(path, svi, step=2, extra=value)
    assert load_checkpoint(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


class Odd(nn.Module):
    def get_extra_state(self):
        return Path("x")

    def set_extra_state(self, state):
        pass


def test_states_that_are_not_data_are_refused(path):
    svi, coder = start(method_programs, "score")
    coder.odd = Odd()
    with pytest.raises(TypeError, match=r"model\.self holds an object that is not data"):
        save_checkpoint(path, svi)


def test_a_failed_save_keeps_the_old_file(path, monkeypatch):
    svi, _ = start(method_programs, "score")
    save_checkpoint(path, svi, step=1)

    def fail(state, file):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, svi, step=2)
    assert load_checkpoint(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_a_weight(path):
    """torch.load would read it."""
    weight = torch.load(path)["modules"]["model.self"]["encoder.0.weight"]
    content, before = path.read_bytes(), weight.numpy().tobytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, (weight + 1).numpy().tobytes()))
    assert torch.load(path)["format"]


BAD = {
    "cut": (cut, "is not a complete checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "is not a complete checkpoint"),
    "another weight": (change_a_weight, "is not a complete checkpoint"),
    "text": (lambda path: path.write_text("step 3"), "is not a complete checkpoint"),
    "code": (lambda path: torch.save(Path("x"), path), "is not a complete checkpoint"),
    "a pickle": (
        lambda path: path.write_bytes(pickle.dumps({})),
        "is not a complete checkpoint",
    ),
    "a state": (lambda path: torch.save({"a": 1}, path), "was not written by save_checkpoint"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "not written by save_checkpoint"),
}


@pytest.mark.parametrize(("spoil", "match"), BAD.values(), ids=BAD)
def test_torn_and_foreign_files_are_refused_and_kept(path, spoil, match):
    svi, kept = start(method_programs, "score")
    save_checkpoint(path, svi)
    spoil(path)
    content, before = path.read_bytes(), everything(kept)
    with pytest.raises(ValueError, match=f"run.pt.*{match}"):
        load_checkpoint(path, svi)
    assert path.read_bytes() == content
    assert all(torch.equal(everything(kept)[name], value) for name, value in before.items())


def test_a_file_of_a_later_version_is_refused(path):
    svi, _ = start(method_programs, "score")
    save_checkpoint(path, svi)
    torch.save(torch.load(path) | {"version": 2}, path)
    with pytest.raises(ValueError, match=r"run\.pt has version 2 of the format.* reads 1"):
        load_checkpoint(path, svi)


def test_what_is_not_a_file(tmp_path):
    svi, _ = start(method_programs, "score")
    with pytest.raises(ValueError, match=r"is a folder; give a file, such as .*run\.pt"):
        load_checkpoint(tmp_path, svi)
    with pytest.raises(FileNotFoundError, match=r"run\.pt does not exist"):
        load_checkpoint(tmp_path / "run.pt", svi)
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "nowhere" / "run.pt", svi)


# What does not fit


def test_an_object_that_is_not_an_svi(path):
    svi, coder = start(method_programs, "score")
    with pytest.raises(TypeError, match=r"expected an SVI, got Coder\..*state_dict"):
        save_checkpoint(path, coder)
    save_checkpoint(path, svi)
    with pytest.raises(TypeError, match="load_checkpoint: expected an SVI, got Coder"):
        load_checkpoint(path, coder)


def test_other_modules_are_refused(path):
    svi, _ = start(method_programs, {"z": "rebar"})
    save_checkpoint(path, svi)
    svi, _ = start(method_programs, {"z": "reinmax"})
    with pytest.raises(ValueError, match=r"run\.pt does not fit: it has the modules .*rebar"):
        load_checkpoint(path, svi)
    svi, coder = start(method_programs, {"z": "rebar"})
    coder.encoder[0] = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"run\.pt does not fit model\.self: .*size mismatch"):
        load_checkpoint(path, svi)


def test_another_optimiser_is_refused(path):
    svi, kept = start(method_programs, "score")
    steps(svi, kept, 1)
    save_checkpoint(path, svi)
    svi, _ = start(method_programs, "score", OPTIMIZERS["clipped"])
    with pytest.raises(ValueError, match="optimiser Adam of Adam, .* here is ClippedAdam"):
        load_checkpoint(path, svi)


def test_a_module_that_cannot_be_found_is_refused(path):
    hidden = iter(Coder, None)

    def model(x):
        next(hidden).model(x)

    svi = SVI(model, config_gradient(Coder().guide, "score"), adam(), Estimator_ELBO())
    svi.step(X)
    with pytest.raises(ValueError, match=r"'decoder\$\$\$0.bias' belongs to a module that is"):
        save_checkpoint(path, svi)


class Whole(constraints.Constraint):
    """A class that a file cannot name."""


def test_a_constraint_of_a_users_class_is_refused(path):
    svi, _ = start(method_programs, "score")
    pyro.get_param_store().set_state(
        {"params": {"p": torch.ones(1)}, "constraints": {"p": Whole()}}
    )
    with pytest.raises(ValueError, match=r"Whole of the constraint .* is code"):
        save_checkpoint(path, svi)


def test_an_unknown_constraint_is_refused(path):
    """A file cannot have this process import a module."""
    svi, _ = start(method_programs, "score")
    pyro.param("p", torch.ones(1), constraint=constraints.positive)
    save_checkpoint(path, svi)
    state = torch.load(path)
    state["constraints"]["p"] = {"module": "antigravity", "class": "fly", "attributes": {}}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"antigravity\.fly of a checkpoint is unknown"):
        load_checkpoint(path, svi)
    assert "antigravity" not in sys.modules


# Kills


def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path):
    """In a step, and while a file is written; the helper compares the parameters."""
    program = Path(__file__).parents[1] / "helpers" / "killed_run.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["killed", "killed", "same"]


@pytest.mark.cuda
def test_a_run_on_a_gpu_resumes_there_and_on_a_cpu(path, monkeypatch):
    def programs():
        model, guide, coder = method_programs()
        coder.cuda()
        return model, guide, coder

    def step(svi, number):
        return [svi.step(X.cuda()) for _ in range(number)]

    monkeypatch.setattr("infer.test_checkpoint.PRIOR", PRIOR.cuda(), raising=False)
    svi, _ = start(programs, {"z": "rebar"})
    step(svi, 3)
    save_checkpoint(path, svi)
    expected = step(svi, 3)
    svi, _ = start(programs, {"z": "rebar"})
    load_checkpoint(path, svi)
    assert step(svi, 3) == expected
