"""Schedules of temperatures: start, change and end."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest

from pyro_gumbel.estimators import Exponential, Linear

STARTS = (1e-20, 0.1, 0.7, 1.0, 3.0, 1e20)
COUNTS = (0, 1, 2, 3, 7, 10, 1_000, 10**9)


def at(schedule, step_count):
    schedule.step_count = step_count
    return schedule.value


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("end", [0.5, 1.0, 2.0])
def test_a_rate_of_zero_stays_at_the_start(end, count):
    assert at(Exponential(1.0, end, 0.0), count) == 1.0
    assert at(Exponential(1.0, end, -0.0), count) == 1.0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("value", STARTS)
@pytest.mark.parametrize("rate", [0.0, 0.3, -0.3, 1e300, -1e300])
def test_a_schedule_from_a_value_to_itself_is_constant(value, rate, count):
    assert at(Exponential(value, value, rate), count) == value
    assert at(Linear(value, value, 7), count) == value


@pytest.mark.parametrize(("start", "end"), list(itertools.permutations(STARTS, 2)))
def test_schedules_go_from_start_to_end_and_no_further(start, end):
    rate = math.copysign(0.05, start - end)
    for schedule, last in [(Exponential(start, end, rate), 2000), (Linear(start, end, 10), 10)]:
        values = [at(schedule, count) for count in range(last + 3)]
        assert values[0] == start
        assert values[last:] == [end] * 3
        assert values == sorted(values, reverse=start > end)
        assert len(set(values)) > 3


@pytest.mark.parametrize("rate", [1e-3, 0.1, 5.0])
def test_exponential_grows_as_it_decays(rate):
    for count in range(20):
        down = at(Exponential(1.0, 1e-12, rate), count)
        up = at(Exponential(1.0, 1e12, -rate), count)
        assert down == pytest.approx(max(math.exp(-rate * count), 1e-12), rel=1e-12)
        assert up == pytest.approx(min(math.exp(rate * count), 1e12), rel=1e-12)


def unpickled(schedule):
    return pickle.loads(pickle.dumps(schedule))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, unpickled])
@pytest.mark.parametrize("schedule", [Exponential(1.0, 0.5, 0.1), Linear(1.0, 0.5, 10)], ids=repr)
def test_a_copy_counts_its_own_steps(schedule, make):
    schedule.step_count = 2
    again = make(schedule)
    again.advance()
    assert (schedule.step_count, again.step_count) == (2, 3)
    assert again.value < schedule.value
