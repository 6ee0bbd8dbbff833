"""scvi-tools trains a discrete latent by our loss as by Pyro's sum."""

from __future__ import annotations

from argparse import Namespace

import pyro
import pytest
from pyro.infer import TraceEnum_ELBO

pytest.importorskip("scvi")

import scvi_mixture
from pyro_gumbel.infer import Estimator_ELBO
from scvi_mixture import MixtureModel

pytestmark = pytest.mark.slow
ARGS = {"epochs": 200, "lr": 0.02, "num_samples": 200, "seed": 0}


def test_the_sum_finds_the_types_and_the_evidence_of_pyros():
    results = scvi_mixture.run(Namespace(gradient=None, **ARGS))
    (ours, ours_right), (theirs, theirs_right) = results.values()
    assert min(ours_right, theirs_right) >= 0.95
    assert ours == pytest.approx(theirs, abs=0.01)


def test_one_loss_is_pyros():
    cells = scvi_mixture.make_cells(0)
    MixtureModel.setup_anndata(cells)
    model = MixtureModel(cells)
    losses = [Estimator_ELBO(), TraceEnum_ELBO(max_plate_nesting=1)]
    model.evidence(losses[0])  # makes the guide
    ours, theirs = (model.evidence(loss) for loss in losses)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("gradient", ["reinmax", "enumerate"])
def test_a_guide_of_the_type_finds_it(gradient):
    args = Namespace(gradient=gradient, **{**ARGS, "epochs": 100, "num_samples": 20})
    ((_, right),) = scvi_mixture.run(args).values()
    assert right >= 0.95
    assert any("label" in name or "encoder" in name for name in pyro.get_param_store())
