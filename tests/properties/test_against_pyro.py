"""This package's losses against Pyro's on the programs of ``user_programs``."""

from __future__ import annotations

import pytest
from against_pyro import Comparison
from helpers.user_programs import PROGRAMS

QUICK = ("looped", "vectorized")


def failures(comparison, objectives):
    """Rows that differ, raise, or refuse what they are to serve."""
    rows = [comparison.run(objective) for objective in objectives]
    return "\n".join(str(row) for row in rows if row.failed)


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_the_default_loss_is_pyros(name):
    """With few draws; ``against_pyro.py`` looks more closely and at all losses."""
    comparison = Comparison(PROGRAMS[name], draws=0.1)
    quick = [objective for objective in comparison.objectives() if objective.name in QUICK]
    assert quick
    assert failures(comparison, quick) == ""


# Of biased estimators the loss is compared, not the gradient.
@pytest.mark.filterwarnings("ignore:.*not learnt:pyro_gumbel.infer._dependence.GradientWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_loss_is_pyros(name):
    comparison = Comparison(PROGRAMS[name], draws=0.1)
    assert failures(comparison, comparison.objectives()) == ""
