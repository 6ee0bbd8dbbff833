"""What every test starts from: checks on, an empty parameter store, a known seed, one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch
from pyro.util import get_rng_state, set_rng_state


def pytest_configure(config: pytest.Config) -> None:
    """Draw pictures without a display."""
    import matplotlib

    matplotlib.use("Agg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Run a test as if it were the only one, and give back the state it found."""
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    generators = get_rng_state()  # Python's, numpy's and torch's
    torch.set_num_threads(1)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        pyro.set_rng_seed(0)
        yield
    pyro.clear_param_store()
    set_rng_state(generators)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture
def in_float64(isolated: None) -> None:
    """Compute in double precision, which the other fixture ends."""
    torch.set_default_dtype(torch.float64)
