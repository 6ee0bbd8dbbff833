"""Particles in a loop and vectorised."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[False, True], ids=["looped", "vectorised"])
def vectorize(request: pytest.FixtureRequest) -> bool:
    """Return whether particles are vectorised."""
    return request.param
