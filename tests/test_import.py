"""Importing the package costs little more than importing Pyro; the rest loads when it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pyro_gumbel

HEAVY = {"arviz", "matplotlib", "pandas", "scipy", "torch._inductor", "triton", "xarray"}


def loaded(program: str) -> set[str]:
    """The modules that a process of its own has loaded after a program."""
    end = "; import json, sys; print(json.dumps(list(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program + end], capture_output=True, check=True)
    return set(json.loads(found.stdout))


def test_nothing_heavy_is_imported() -> None:
    own = loaded("import pyro_gumbel") - loaded("import pyro")
    assert not own & HEAVY
    assert {"pyro_gumbel.distributions", "pyro_gumbel.estimators", "pyro_gumbel.infer"} <= own
    assert not own & {"pyro_gumbel.diagnostics", "pyro_gumbel.guides"}


@pytest.mark.parametrize(
    "program",
    [
        "import pyro_gumbel; pyro_gumbel.diagnostics.train; pyro_gumbel.guides.AutoDiscrete",
        "from pyro_gumbel import diagnostics, guides",
        "import pyro_gumbel.diagnostics; from pyro_gumbel.guides import AutoDiscrete",
        "from pyro_gumbel import *; diagnostics.train; guides.AutoDiscrete",
    ],
)
def test_the_rest_is_imported_when_it_is_used(program: str) -> None:
    assert {"pyro_gumbel.diagnostics", "pyro_gumbel.guides"} <= loaded(program)


def test_names() -> None:
    assert set(pyro_gumbel.__all__) <= set(dir(pyro_gumbel))
    with pytest.raises(AttributeError, match="'pyro_gumbel' has no attribute 'diagnostic'"):
        pyro_gumbel.diagnostic  # noqa: B018
