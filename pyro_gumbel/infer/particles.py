r"""How one step's particles are laid out, and how values are drawn on them.

Every repetition (``num_particles`` of them) has a main path, and for each *coupled* site, one that
draws ``K`` values, ``K - 1`` branches which that site owns::

    site order        z1 (K=3)        z2 (K=1)          z3 (K=2)
    main path         z1[0]           z2                z3[0]
    branch 1 of z1    z1[1]           its own           its own
    branch 2 of z1    z1[2]           its own           its own
    branch 1 of z3    as main         as main           z3[1]

A branch shares the main path's values upstream of its owner, takes the owner's coupled value, and
draws its own downstream. The program is so evaluated on ``1 + sum(K - 1)`` paths, however many
sites are coupled, instead of on the product of their ``K``.

Vectorised, the paths of all repetitions are rows of one plate, path by path: row ``p * R + r`` is
path ``p`` of repetition ``r``. Looped, each is a run of its own, and the main path's values wait
in a memory for the branches' turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_gumbel.estimators import Estimator
from pyro_gumbel.estimators.families import exact_draw, unwrap
from pyro_gumbel.infer.config import Auto, Choice, resolve

__all__ = ["DrawMessenger", "Layout", "PlateNestingNeeded", "SharedSubsample"]


class PlateNestingNeeded(Exception):
    """An enumerated site needs a dimension left of all plates; their number is not known."""


@dataclass(frozen=True)
class Layout:
    """Which path each row or run belongs to.

    Attributes:
        repetitions: Number of particles ``R`` that the user asked for.
        branches: Coupled sites in program order, each with its number of branches.
        plate_nesting: Number of dimensions that the programs' own plates take, or ``None`` where
            it is not known.
        vectorized: Whether particles are rows of a plate.
    """

    repetitions: int
    branches: tuple[tuple[str, int], ...] = ()
    plate_nesting: int | None = None
    vectorized: bool = False

    @property
    def owners(self) -> list[str | None]:
        """The owner of each path; the main path has none."""
        return [None, *(name for name, count in self.branches for _ in range(count))]

    @property
    def num_rows(self) -> int:
        """Rows of the particle plate: one where particles are looped."""
        return len(self.owners) * self.repetitions if self.vectorized else 1

    @property
    def particle_dim(self) -> int | None:
        """The particle plate's dimension from the right of the batch shape, or ``None``."""
        return -(cast(int, self.plate_nesting) + 1) if self.num_rows > 1 else None

    @property
    def total_nesting(self) -> float:
        """Number of dimensions of all plates, the particle plate included."""
        if self.plate_nesting is None:
            return float("inf")
        return self.plate_nesting + (self.particle_dim is not None)

    def paths_of(self, name: str) -> list[int]:
        """The paths on which ``name`` takes its coupled values, the main path first."""
        return [0, *(path for path, owner in enumerate(self.owners) if owner == name)]

    def split(self, tensor: Tensor, event_dim: int = 0) -> Tensor:
        """Bring particles to the front: ``(paths, repetitions, ...)`` of ``(..., rows, ...)``."""
        if self.particle_dim is None:
            return tensor[None, None]
        dim = self.particle_dim - event_dim
        if tensor.dim() < -dim:
            tensor = tensor.reshape((1,) * (-dim - tensor.dim()) + tensor.shape)
        rows = tensor.movedim(dim, 0)
        if rows.shape[0] == 1:
            rows = rows.expand(self.num_rows, *rows.shape[1:])
        return rows.unflatten(0, (len(self.owners), self.repetitions))


@dataclass
class DrawMessenger(Messenger):
    """Draws the value of each latent site of the guide by its estimator.

    Attributes:
        layout: The layout; looped runs need it for the enumeration dimension only.
        auto: Chooses estimators where ``"auto"`` stands.
        default: The choice at sites that have none.
        evaluate: Draw exactly, without coupling or relaxation: nothing will be differentiated.
        owner: For a looped branch, the site that owns it, else ``None``.
        branch: For a looped branch, which of its owner's values it takes (1, 2, ...).
        memory: For looped runs, each site's values on the main path.
        estimators: After a run, the estimator of each latent site.
        enumerated: After a run, the dimension of each enumerated site.
    """

    layout: Layout
    auto: Auto
    default: Choice
    evaluate: bool = False
    owner: str | None = None
    branch: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    estimators: dict[str, Estimator] = field(default_factory=dict)
    enumerated: dict[str, int] = field(default_factory=dict)

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        name = cast(str, msg["name"])
        estimator = resolve(msg, self.auto, self.default, self.layout.repetitions)
        msg["value"] = self._value(name, estimator, msg)
        self.estimators[name] = estimator

    def _value(self, name: str, estimator: Estimator, msg: Message) -> Tensor:
        fn = unwrap(msg["fn"])
        if estimator.enumerates:
            return self._enumerate(name, estimator, msg)
        if self.evaluate and (estimator.relaxed or estimator.num_values > 1):
            return exact_draw(fn)
        if self.layout.vectorized:
            return self._rows(name, estimator, fn, msg["fn"].event_dim)
        return self._run(name, estimator, fn)

    def _enumerate(self, name: str, estimator: Estimator, msg: Message) -> Tensor:
        _check_enumerable(msg)
        if self.layout.plate_nesting is None:
            raise PlateNestingNeeded
        dim = -int(self.layout.total_nesting) - 1 - len(self.enumerated)
        self.enumerated[name] = dim
        fn = unwrap(msg["fn"])
        support = estimator.draw(fn)  # (K,) + ones + event
        return support.reshape(support.shape[:1] + (1,) * (-dim - 1) + fn.event_shape)

    def _rows(self, name: str, estimator: Estimator, fn: Any, event_dim: int) -> Tensor:
        values = estimator.draw(fn)
        if len(self.layout.owners) == 1:
            return values
        blocks = values if estimator.num_values > 1 else values[None]
        # (K, ..., rows, ...) -> K lists of one block of rows for each path
        dim = cast(int, self.layout.particle_dim) - event_dim
        split = [block.chunk(len(self.layout.owners), dim) for block in blocks.unbind(0)]
        return torch.cat([split[k][path] for k, path in self._sources(name)], dim)

    def _sources(self, name: str) -> Iterable[tuple[int, int]]:
        """For each path, which of the site's values it takes and from which path's draw."""
        taken = 0
        for path, owner in enumerate(self.layout.owners):
            if owner == name:
                taken += 1
                yield taken, 0
            elif (
                owner is None or owner in self.estimators
            ):  # the owner is upstream: a draw of its own
                yield 0, path
            else:
                yield 0, 0

    def _run(self, name: str, estimator: Estimator, fn: Any) -> Tensor:
        upstream_of_owner = self.owner is not None and self.owner not in self.estimators
        if upstream_of_owner:
            return self.memory[name][self.branch if name == self.owner else 0]
        values = estimator.draw(fn)
        blocks = values if estimator.num_values > 1 else values[None]
        if self.owner is None:
            self.memory[name] = blocks
        return blocks[0]


class SharedSubsample(Messenger):
    """Lets every run of one step use the minibatch of the first, as rows would."""

    def __init__(self) -> None:
        super().__init__()
        self._indices: dict[tuple[Any, ...], Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            msg["value"] = self._indices.get(_plate_key(msg))

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self._indices[_plate_key(msg)] = cast(Tensor, msg["value"])


def _plate_key(msg: Message) -> tuple[Any, ...]:
    fn = cast(Any, msg["fn"])
    return msg["name"], fn.size, fn.subsample_size


def _check_enumerable(msg: Message) -> None:
    fn = msg["fn"]
    while fn is not unwrap(fn):
        if (
            isinstance(fn, Independent)
            and fn.base_dist.batch_shape[-fn.reinterpreted_batch_ndims :].numel() > 1
        ):
            raise ValueError(
                f"At site {msg['name']!r}, Enumerate() cannot serve a distribution under "
                "to_event: the joint support of "
                f"event shape {tuple(fn.event_shape)} is a product. Put the variables in a "
                "pyro.plate, each in a site of "
                "its own, or use Score() or, for one-hot and Bernoulli sites, ReinMax()."
            )
        fn = fn.base_dist
