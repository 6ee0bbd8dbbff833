"""The evidence and the decoded states of the hidden Markov example are those of all paths."""

from __future__ import annotations

import itertools
from argparse import Namespace

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

import hmm

STYLES, STATES, COLUMNS = 2, 3, 3


@pytest.fixture
def model() -> hmm.StyleHMM:
    pyro.set_rng_seed(0)
    return hmm.StyleHMM(STYLES, STATES, 4, 5)


@pytest.fixture
def x() -> Tensor:
    return torch.bernoulli(torch.full((6, COLUMNS, 4), 0.5))


def log_joint(model: hmm.StyleHMM, x: Tensor) -> Tensor:
    """Return the log-probability of each image with each style and path, without a sum."""
    rows = []
    for k, *path in itertools.product(range(STYLES), *[range(STATES)] * COLUMNS):
        style = torch.eye(STYLES)[k].expand(len(x), -1)
        states = {f"z_{t}": torch.full((len(x),), z) for t, z in enumerate(path)}
        values = {"style": style, **states}
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(x)
        trace.compute_log_prob()
        sites = [node for node in trace.nodes.values() if node["type"] == "sample"]
        rows.append(sum(node["log_prob"] for node in sites if node["name"] != "images"))
    return torch.stack(rows, -1).detach().unflatten(-1, (STYLES, STATES**COLUMNS))


def test_the_evidence_is_the_sum_over_all_styles_and_paths(model, x: Tensor) -> None:
    expected = log_joint(model, x).logsumexp((-2, -1)).mean()
    assert hmm.bound(model, hmm.no_guide, x) == pytest.approx(expected.item(), rel=1e-5)


def test_the_bound_lacks_the_divergence_of_the_guide(model, x: Tensor) -> None:
    guide = hmm.make_guide(STYLES, COLUMNS * 4, 5)
    style = poutine.trace(guide).get_trace(x).nodes["style"]["fn"]
    posterior = log_joint(model, x).logsumexp(-1).log_softmax(-1)
    divergence = (style.probs * (style.logits.log_softmax(-1) - posterior)).sum(-1).mean()
    evidence = hmm.bound(model, hmm.no_guide, x)
    assert hmm.bound(model, guide, x) == pytest.approx((evidence - divergence).item(), rel=1e-5)


def test_the_most_probable_style_and_states_are_found(model, x: Tensor) -> None:
    styles, z = hmm.decode(model, x)
    joint = log_joint(model, x)
    assert torch.equal(styles, joint.logsumexp(-1).argmax(-1))
    path = joint[torch.arange(len(x)), styles].argmax(-1)
    places = torch.tensor([STATES**t for t in reversed(range(COLUMNS))])
    assert torch.equal(z, path.unsqueeze(-1) // places % STATES)


def test_images_are_read_by_columns() -> None:
    (x, digits), (test_x, test_digits) = hmm.load()
    assert x.shape == (1500, 8, 8)
    assert test_x.shape == (297, 8, 8)
    assert set(digits.tolist()) == set(test_digits.tolist()) == set(range(10))
    # The outermost columns of the digits are mostly blank.
    assert x[:, 0].mean() < 0.02 < 0.3 < x[:, 3].mean()


@pytest.mark.slow
def test_fits_find_styles_of_digits() -> None:
    data, test = hmm.load()
    args = Namespace(styles=20, states=8, hidden=32, epochs=10, batch_size=100, lr=0.03)
    fits = {name: hmm.train(name, 0, data, test, args) for name in (hmm.SUMMED, "score:4")}
    assert fits[hmm.SUMMED]["purity"] > 0.5
    for fit in fits.values():
        assert fit["purity"] > 0.25  # a tenth by chance
        assert fit["bound"] <= fit["evidence"] + 1e-6
        assert fit["evidence"] > -24
