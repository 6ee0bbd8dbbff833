r"""How the particles of one step are laid out.

Every repetition (``num_particles`` of them) has a main path, and for each *coupled* site, one that
draws ``K`` values, ``K - 1`` branches which that site owns::

    site order        z1 (K=3)        z2 (K=1)          z3 (K=2)
    main path         z1[0]           z2                z3[0]
    branch 1 of z1    z1[1]           its own           its own
    branch 2 of z1    z1[2]           its own           its own
    branch 1 of z3    as main         as main           z3[1]

A branch shares the main path's values upstream of its owner, takes the owner's coupled value, and
draws its own values downstream. The programs are evaluated on ``1 + sum(K - 1)`` paths, however
many sites are coupled, instead of on the product of their ``K``.

A *pass* evaluates the programs once. Vectorised, the first pass has all paths of all repetitions
as rows of one plate, path by path: row ``p * R + r`` is path ``p`` of repetition ``r``. Looped,
each path of each repetition is a pass of its own. Branches of which the cost's number alone is
needed come in further passes, some at a time, without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

__all__ = ["MAIN", "PARTICLE_PLATE", "Layout", "Path", "left_filled"]

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's own losses give it


@dataclass(frozen=True)
class Path:
    """One path: the site that owns it and which of its values it takes.

    The main path has no owner.
    """

    owner: str | None = None
    value: int = 0


MAIN = Path()


@dataclass(frozen=True)
class Layout:
    """The paths of one pass.

    Attributes:
        plate_nesting: Number of dimensions that the programs' own plates take; ``None`` where it
            is not known, and not needed.
        paths: The paths that the pass evaluates.
        repetitions: How often it does, ``R``: all particles where they are rows, else one.
        vectorized: Whether paths are rows of a plate.
    """

    plate_nesting: int | None = None
    paths: tuple[Path, ...] = (MAIN,)
    repetitions: int = 1
    vectorized: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the particle plate."""
        return len(self.paths) * self.repetitions

    @property
    def particle_dim(self) -> int | None:
        """The particle plate's dimension from the right of the batch shape, or ``None``."""
        if not self.vectorized or self.num_rows == 1:
            return None
        return -(cast(int, self.plate_nesting) + 1)

    @property
    def total_nesting(self) -> int:
        """Number of dimensions of all plates, the particle plate included."""
        return cast(int, self.plate_nesting) + (self.particle_dim is not None)

    def split(self, tensor: Tensor, event_dim: int = 0) -> Tensor:
        """Bring particles to the front: ``(paths, repetitions, ...)`` of ``(..., rows, ...)``."""
        if not self.vectorized:
            return tensor.reshape(1, 1, *tensor.shape)
        # A single row has no plate; further passes of the same particle may have one.
        dim = -(cast(int, self.plate_nesting) + 1) - event_dim
        rows = left_filled(tensor, -dim).movedim(dim, 0)
        if rows.shape[0] == 1:
            rows = rows.expand(self.num_rows, *rows.shape[1:])
        return rows.unflatten(0, (len(self.paths), self.repetitions))


def left_filled(tensor: Tensor, dims: int) -> Tensor:
    """Give a tensor at least ``dims`` dimensions, by ones on the left."""
    return tensor.reshape((1,) * (dims - tensor.dim()) + tensor.shape)
