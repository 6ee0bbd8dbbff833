"""Two processes train as one on the union of their shares."""

from __future__ import annotations

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import shares
from pyro.infer import SVI, Trace_ELBO

from pyro_gumbel.infer import CapturedSVI, DistributedSVI, Estimator_ELBO


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict]:
    """The results of each of two processes, which connect once."""
    folder = tmp_path_factory.mktemp("shares")
    command = [sys.executable, "-W", "ignore", shares.__file__, str(folder)]
    options = {"stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), "".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# Without a group of processes


@pytest.mark.parametrize("case", ["rebar", "moving average", "subsample", "importance"])
def test_one_process_is_svi_bit_for_bit(case):
    one, other = (shares.train(case, shares.UNION, kind) for kind in (SVI, DistributedSVI))
    assert one["losses"] == other["losses"]
    for name, value in one["store"].items():
        assert torch.equal(other["store"][name], value)


@pytest.mark.parametrize("loss", [Trace_ELBO(), None], ids=["Trace_ELBO", "CapturedSVI"])
def test_other_losses_are_refused(loss):
    optim = pyro.optim.Adam({})
    loss = loss or CapturedSVI(print, print, optim, Estimator_ELBO())
    with pytest.raises(TypeError, match=f"got {type(loss).__name__}.*CapturedSVI cannot be split"):
        DistributedSVI(print, print, optim, loss)


# Two processes


@pytest.mark.parametrize("case", shares.CASES)
def test_two_processes_train_as_one(of_two, case):
    """Losses, parameters after three steps, and states of estimators, with the same noise."""
    expected = shares.train(case, shares.UNION, SVI)
    for found in of_two:
        torch.testing.assert_close(found[case], expected, rtol=1e-9, atol=1e-10)
    start = shares.CASES[case]()[0].encoder[0].weight
    assert (expected["store"]["encoder$$$0.weight"] - start).abs().max() > 1e-6


def test_sites_outside_of_the_plate_have_one_draw(of_two):
    (outside, inside, after), (other_outside, other_inside, other_after) = (
        found["draws"] for found in of_two
    )
    assert torch.equal(outside, other_outside)
    assert outside.unique().numel() == 2
    assert 0.3 < (inside == other_inside).float().mean() < 0.7
    assert torch.equal(after, other_after)  # the same order of data everywhere


def test_a_parameter_that_one_process_meets_is_trained_by_all(of_two):
    """And one that no process meets rests: Adam would move it by its momentum."""
    expected = shares.sometimes(0, size=7)
    for found in of_two:
        torch.testing.assert_close(found["sometimes"], expected)


def test_each_process_draws_a_minibatch(of_two):
    (rows, losses, loc), (other_rows, other_losses, other_loc) = (
        found["minibatches"] for found in of_two
    )
    assert losses == other_losses
    assert torch.equal(loc, other_loc)
    for both in zip(rows, other_rows, strict=True):
        assert len(set(torch.cat(both).tolist())) > 5
    data = torch.cat([rows[0], other_rows[0]]).double()  # the first step has loc 0
    expected = -10 * dist.Normal(0.0, 1.0).log_prob(data).sum()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_another_subsampled_plate_is_the_same_everywhere(of_two):
    assert torch.equal(*(found["shared_minibatches"] for found in of_two))


def test_parameters_that_start_differently_or_late_agree(of_two):
    one, other = (found["late"] for found in of_two)
    assert one.keys() == other.keys() >= {"late", "means", "encoder.1.running_var"}
    for name, value in one.items():
        assert torch.equal(other[name], value), name


def test_a_step_that_meets_a_parameter_is_taken_at_one_value(of_two):
    one, other = (found["met"] for found in of_two)
    assert one == other
    *losses, value = one
    assert value != 0
    expected = -7 * dist.Normal(value, 1.0).log_prob(torch.tensor(1.0))
    assert losses == pytest.approx([expected.item()] * 2, rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(of_two):
    for found in of_two:
        expected, resumed, more = found["resumed"]
        assert resumed == expected
        assert more == {"step": 3}


REFUSED = {
    "differentiated": r"site 'g', outside .* has Rebar.* differentiates the cost of all data",
    "importance": r"site 'g', outside .* is in the weights of ImportanceWeighted_ELBO",
    "summed": r"site 's', outside .* is summed over all data. Sample it in the guide",
    "two plates": r"plates \['data', 'rows'\] .* Name the one .*plate='data'",
    "sequential": r"cannot split the sequential plate 'data'. Write with pyro.plate",
    "no plate": r"expected a plate to split, got none.* first dimension, \[4\]",
    "another name": r"expected a plate images, got none",
    "other values": r"site 'y', outside .* differs between processes, \[.*, .*\]",
    "of each datum": r"'locs' has a value for each of the 4 data .*plate\('data', N, subsample",
    "other parameters": r"processes 0 and 1 have different parameters .*\['loc0', 'loc1'\]",
}


@pytest.mark.parametrize(("case", "match"), REFUSED.items(), ids=REFUSED)
def test_programs_that_cannot_be_split_are_refused(of_two, case, match):
    for found in of_two:
        with pytest.raises(ValueError, match=match):
            raise ValueError(found["refusals"][case])
