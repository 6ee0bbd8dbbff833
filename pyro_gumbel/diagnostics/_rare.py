"""Whether a bias may be that of the draws, and not the estimator's: few of them met an event."""

from __future__ import annotations

from pyro_gumbel.diagnostics._tables import Block

__all__ = ["doubt", "doubt_in"]

# Draws that met an event. From ten on a bias_z above 5 without bias is rarer than 1 in 4000,
# however rare the event; with none it is nearly sure for an event that is rare enough.
_FEWEST = 10
_SHORT = "short of rare events"


def doubt(block: Block) -> str:
    """Say so where few draws carry the variance that a bias is held against; else nothing."""
    spread = block.spread
    assert spread is not None
    if spread.carriers >= _FEWEST:
        return ""
    return (
        f"{_SHORT}: about {spread.carriers:.0f} of {spread.count:,} draws carry the "
        "variance, so see whether the bias stays with many more"
    )


def doubt_in(warning: str) -> str:
    """Find the doubt among the notes of a row's warning; else nothing."""
    _, found, rest = warning.partition(_SHORT)
    return (found + rest).split("; ")[0]
