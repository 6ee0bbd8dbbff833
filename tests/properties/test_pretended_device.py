"""Every step stays on its device and waits for nothing, shown on a device without numbers.

A pretended device has a real one's rules: an operation on two devices, or a number read from the
device, is an error. Validation is off, since it reads numbers.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import pretended_cases, pretended_estimators
from pyro.infer import ELBO

from pyro_gumbel import distributions, estimators, infer
from pyro_gumbel.estimators import Baseline, Estimator, Schedule

TESTS = Path(__file__).parents[1]

# Sticking the landing asks whether a learnt bound of a transformed distribution is finite.
READS_A_NUMBER = {"handlers/flow_with_a_bound"}


def outcomes(*groups, device="pretended"):
    """Run groups of cases in a process of their own; return their outcomes."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "helpers.pretended_device", *groups],
        env=os.environ | {"PYTHONPATH": paths, "STEP_DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def failures(found):
    return {
        f"{group}/{name}": error
        for group, cases in found.items()
        for name, error in cases.items()
        if error is not None
    }


def test_estimators_stay_on_the_device():
    found = outcomes("looped", "vectorised", "dtypes")
    assert failures(found) == {}
    assert len(found["dtypes"]) == 2 * len(pretended_estimators.MAKERS)


def test_cases_of_each_precision_run_with_numbers():
    """A device without numbers lets products of two precisions pass."""
    assert failures(outcomes("dtypes", device="cpu")) == {}


def test_all_else_stays_on_the_device_and_planted_faults_are_seen():
    groups = ("laws", "divergences", "bounds", "choices", "guides", "handlers")
    found = outcomes(*groups, "planted", "undrawn")
    planted, undrawn = found.pop("planted"), found.pop("undrawn")
    failed = failures(found)
    assert failed.keys() == READS_A_NUMBER
    assert all("_local_scalar_dense" in error for error in failed.values())

    assert planted["Stubborn"].startswith("FakeTensorDeviceMismatchError at pretended_estimators")
    assert planted["Reading"].startswith("DataDependentOutputException at pretended_estimators")
    assert planted["Copying"].startswith("RuntimeError at pretended_device")
    assert planted["Listing"].startswith("NotImplementedError at pretended_estimators")
    assert undrawn.keys() == pretended_cases.UNDRAWN.keys()
    assert None not in undrawn.values()


def public(module, kind):
    """The names of a module's public subclasses of a class."""
    members = {name: getattr(module, name) for name in module.__all__}
    return {
        name
        for name, member in members.items()
        if inspect.isclass(member) and issubclass(member, kind) and member is not kind
    }


def test_cases_cover_every_public_class():
    made = {type(make()).__name__ for make in pretended_estimators.MAKERS.values()}
    assert public(estimators, Estimator) <= made
    laws = {name.partition("_")[0] for name in pretended_cases.LAWS}
    assert public(distributions, object) <= laws
    assert public(infer, ELBO) <= {name.partition("/")[0] for name in pretended_cases.BOUNDS}
    choices = "".join(pretended_estimators.choices())
    for kind in (Schedule, Baseline):
        assert all(name in choices for name in public(estimators, kind))
