"""What constructors of estimators are given."""

from __future__ import annotations

from pyro_gumbel._integers import is_integer

__all__ = ["check_num_samples"]


def check_num_samples(
    owner: str, num_samples: int, least: int, *, argument: str = "num_samples"
) -> int:
    """Make a number of samples Python's own; refuse what is no integer or too small.

    Raises:
        ValueError: If it is.
    """
    if not is_integer(num_samples) or num_samples < least:
        raise ValueError(
            f"{owner}: {argument} must be an integer of at least {least}; got {num_samples!r}."
        )
    return int(num_samples)
