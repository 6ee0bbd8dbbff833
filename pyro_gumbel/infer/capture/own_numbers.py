"""Numbers that a program changes itself, as by counting its runs: a replay does not run it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any, NamedTuple

from torch import Tensor, nn

from pyro_gumbel.infer.capture.comparison import difference_told
from pyro_gumbel.infer.capture.modules import code_names, is_users, own_attributes, reachable
from pyro_gumbel.infer.not_recordable import NotRecordable

__all__ = ["own_numbers_kept"]

_PLAIN = (bool, int, float, str)
_LATER = (1, 100, 10_000, 1_000_000)  # runs from now, for schedules by steps, epochs and stairs

Again = Callable[[], tuple[Tensor, list[Tensor | None]]]


@contextmanager
def own_numbers_kept(programs: tuple[Any, ...], again: Again) -> Iterator[None]:
    """Refuse a run of programs that depend on what they count, and put back what it changed.

    A number that the run changed is either noted (the size of a batch) or counted: another run
    from there changes the latter once more. To count is harmless where later counts give the same
    step. What a program keeps otherwise, as in an iterator, is out of sight.

    Args:
        programs: Model and guide.
        again: Runs them once more, on the same arguments and random numbers, for the loss and the
            gradients.
    """
    before = list(_numbers(programs))
    try:
        yield
        changed = [number for number in before if number.has_changed()]
        if changed:
            _check_another_run(changed, again)
    except BaseException:
        for number in before:
            if number.has_changed():
                number.put_back()
        raise


def _check_another_run(changed: list[_Number], again: Again) -> None:
    after = [number._replace(value=number.read()) for number in changed]
    outcome = again()
    counters = [number for number in after if number.has_changed()]
    later = [number.read() for number in counters]
    if counters and not _is_idle(counters, later, outcome, again):
        names = " and ".join(number.name for number in counters)
        raise NotRecordable(
            f"the program itself changes {names}, here from {counters[0].value!r} to "
            f"{later[0]!r}, and computes something else then; a replay does not run it. Count "
            "outside, and pass what comes of it as an argument, as a tensor: "
            "svi.step(x, torch.tensor(beta))."
        )
    for number in after:
        number.put_back()


def _is_idle(
    counters: list[_Number], later: list[Any], outcome: tuple[Tensor, Any], again: Again
) -> bool:
    """Tell whether runs with higher counts, and with the words that follow, give the same step."""
    for times in _LATER:
        for number, value in zip(counters, later, strict=True):
            number._replace(value=_ahead(number.value, value, times)).put_back()
        try:
            if difference_told(*again(), *outcome, compiled=False) is not None:
                return False
        except Exception:  # a count that cannot go so far: the runs before have told
            return True
    return True


def _ahead(now: Any, then: Any, times: int) -> Any:
    both_count = type(now) in (int, float) and type(then) in (int, float)
    return now + times * (then - now) if both_count else then


class _Number(NamedTuple):
    """A number, or a word, and where it is."""

    name: str
    where: Any
    key: Any
    value: Any

    def read(self) -> Any:
        try:
            if isinstance(self.where, CellType):
                return self.where.cell_contents
            return self.where[self.key]
        except (ValueError, KeyError):
            return None

    def has_changed(self) -> bool:
        now = self.read()
        # By words, in which one NaN is like another.
        return type(now) is not type(self.value) or repr(now) != repr(self.value)

    def put_back(self) -> None:
        if isinstance(self.where, CellType):
            self.where.cell_contents = self.value
        else:
            self.where[self.key] = self.value


def _numbers(programs: tuple[Any, ...]) -> Iterator[_Number]:
    """Those in variables of functions and in attributes that the programs can reach."""
    for value in reachable(*programs):
        if inspect.isfunction(value):
            yield from _in_variables(value)
        elif isinstance(value, nn.Module):
            for module in value.modules():
                yield from _in_attributes(module)
        else:
            yield from _in_attributes(value)


def _in_variables(function: Any) -> Iterator[_Number]:
    if not is_users(function.__globals__.get("__name__")):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        number = _Number(f"the variable {name!r}", cell, None, None)
        if type(number.read()) in _PLAIN:
            yield number._replace(value=number.read())
    names = code_names(function.__code__)
    yield from _plain(function.__globals__, names, "the variable {!r}")


def _in_attributes(value: Any) -> Iterator[_Number]:
    attributes = own_attributes(value)
    if attributes and is_users(type(value).__module__):
        yield from _plain(
            attributes, attributes, f"the attribute {{!r}} of {type(value).__name__}"
        )


def _plain(where: Any, keys: Any, name: str) -> Iterator[_Number]:
    for key in keys:
        value = _Number("", where, key, None).read()
        if type(value) in _PLAIN:
            yield _Number(name.format(key), where, key, value)
