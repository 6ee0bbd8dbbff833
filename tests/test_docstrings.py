"""Every example in a docstring runs and prints the output beside it."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_gumbel

MODULES = [
    "pyro_gumbel",
    *(found.name for found in pkgutil.walk_packages(pyro_gumbel.__path__, "pyro_gumbel.")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    if name.endswith("._triton"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    names = {"dist": dist, "pyro": pyro, "torch": torch, **vars(module)}
    outcome = doctest.testmod(
        module, globs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert outcome.failed == 0
