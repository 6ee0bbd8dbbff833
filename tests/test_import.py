"""Importing the package costs little more than importing Pyro; the rest loads when it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pyro_gumbel

HEAVY = {"arviz", "matplotlib", "pandas", "scipy", "torch._inductor", "triton", "xarray"}


PROGRAMS = [
    "import pyro_gumbel",
    "import pyro_gumbel; pyro_gumbel.diagnostics.train; pyro_gumbel.guides.AutoDiscrete",
    "from pyro_gumbel import diagnostics, guides",
    "import pyro_gumbel.diagnostics; from pyro_gumbel.guides import AutoDiscrete",
    "from pyro_gumbel import *; diagnostics.train; guides.AutoDiscrete",
]
READ = """
import json, sys
import pyro
before, loaded = set(sys.modules), []
for program in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyro_gumbel"]:
        del sys.modules[name]
    exec(program, {})
    loaded.append(sorted(set(sys.modules) - before))
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """The modules beyond Pyro's that a new process has loaded after each program."""
    command = [sys.executable, "-c", READ, json.dumps(PROGRAMS)]
    found = subprocess.run(command, capture_output=True, check=True)
    return [set(names) for names in json.loads(found.stdout)]


def test_nothing_heavy_is_imported(loaded: list[set[str]]) -> None:
    own = loaded[0]
    assert not own & HEAVY
    assert {"pyro_gumbel.distributions", "pyro_gumbel.estimators", "pyro_gumbel.infer"} <= own
    assert not own & {"pyro_gumbel.diagnostics", "pyro_gumbel.guides"}


def test_the_rest_is_imported_when_it_is_used(loaded: list[set[str]]) -> None:
    for program, names in zip(PROGRAMS[1:], loaded[1:], strict=True):
        assert {"pyro_gumbel.diagnostics", "pyro_gumbel.guides"} <= names, program
        assert not names & {"arviz", "arviz_plots", "matplotlib"}, program


def test_names() -> None:
    assert set(pyro_gumbel.__all__) <= set(dir(pyro_gumbel))
    with pytest.raises(AttributeError, match="'pyro_gumbel' has no attribute 'diagnostic'"):
        pyro_gumbel.diagnostic  # noqa: B018
