"""Draw the guide's values on the paths of one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_gumbel.distributions.families import (
    base_noise,
    event_dims,
    has_logits,
    on_own_logits,
    one_hot_logits,
    sample_detached,
    unwrap,
)
from pyro_gumbel.estimators import Estimator, Pathwise, Route, Score
from pyro_gumbel.infer._checks import check_guide_site
from pyro_gumbel.infer._dependence import Dependence
from pyro_gumbel.infer._dimensions import Dimensions, GuideDims, in_chain
from pyro_gumbel.infer._operations import version
from pyro_gumbel.infer._state import meet_site

__all__ = [
    "Layout",
    "MAIN",
    "Memory",
    "NestingNeeded",
    "Path",
    "Sampler",
    "SharedSubsample",
    "left_filled",
]


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

    Each repetition (``num_particles`` of them) has a main path, and ``K - 1`` branches for each
    *coupled* site, which draws ``K`` values::

        site order        z1 (K=3)        z2 (K=1)          z3 (K=2)
        main path         z1[0]           z2                z3[0]
        branch 1 of z1    z1[1]           its own           its own
        branch 2 of z1    z1[2]           its own           its own
        branch 1 of z3    as main         as main           z3[1]

    These are ``1 + sum(K - 1)`` evaluations, not the product of the ``K``. Vectorised, the first
    pass has its paths as rows of one plate: row ``p * R + r`` is path ``p`` of repetition ``r``.
    Branches without gradient come in further passes. Looped, each path is a pass of its own.

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
        return (self.plate_nesting or 0) + (self.particle_dim is not None)

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


class NestingNeeded(Exception):
    """An enumerated site needs a dimension left of all plates; their number is not known."""


@dataclass
class Memory:
    """Values and noise of a repetition's main path, kept for its branches.

    Attributes:
        values: The coupled values of each site.
        noise: The noise of each draw that a branch may repeat, with the family it is of.
        logits: The logits that coupled values were drawn from.
    """

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    noise: dict[str, tuple[type, Tensor]] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)


class Sampler(Dimensions):
    """Draws the value of each latent site of the guide by its estimator.

    Args:
        layout: The paths of this pass.
        choose: Finds the estimator of a site.
        memory: Filled by the pass that has the main path, read by the others.
        exact: Draw without coupling or relaxation: nothing will be differentiated.
        enumerate: Give sites that are summed all their values; else one draw.
        values: Values to give to sites instead.
        dependence: Follows the values through the programs.
        verify: Check that branches reach their owner's distribution as the main path did.
        drawing: Returns a context in which to draw the value of a site.

    Attributes:
        estimators: After a pass, the estimator of each latent site, in program order.
        sizes: The number of coupled values of each latent site.
        enumerated: The dimension of each enumerated site.
        recycles: Whether enumerated sites along a chain may share dimensions.
        guide_dims: After a pass, the symbols of the guide's dimensions, if any are shared.
        summed: The dimension of each summed site of the model.
        logits: The logits that values were drawn from, of sites whose estimator asks for them.
    """

    def __init__(
        self,
        layout: Layout,
        choose: Callable[[Message], Estimator],
        memory: Memory,
        *,
        exact: bool = False,
        enumerate: bool = True,
        values: Mapping[str, Tensor] | None = None,
        dependence: Dependence | None = None,
        verify: bool = False,
        drawing: Callable[[Message], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(layout.total_nesting)
        self.layout = layout
        self.exact = exact
        self.enumerate = enumerate
        self.dependence = dependence
        self.verify = verify
        self._values = values or {}
        self.estimators: dict[str, Estimator] = {}
        self.sizes: dict[str, int] = {}
        self.enumerated: dict[str, int] = {}
        self.recycles = True
        self.guide_dims = GuideDims()
        self.summed: dict[str, int] = {}
        self.logits: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._choose = choose
        self._memory = memory
        self._drawing = drawing

    @property
    def adds_dimensions(self) -> bool:
        """Return whether values have dimensions left of the programs' own plates."""
        return self.layout.particle_dim is not None or bool(self.enumerated or self.summed)

    @property
    def own_nesting(self) -> int | None:
        """The number of dimensions of the programs' plates, if there are others left of them."""
        return self.layout.plate_nesting if self.adds_dimensions else None

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        name = cast(str, msg["name"])
        estimator = None if msg["is_observed"] else self._choose(msg)
        if self.enumerated or _enumerates(estimator) or in_chain(msg):
            self.note(msg)
        if estimator is None:
            check_guide_site(msg)
            return
        if not self.exact:  # a loss changes no estimator
            meet_site(name, estimator, unwrap(msg["fn"]))
        self.sizes[name] = estimator.block_size(unwrap(msg["fn"]), event_dims(msg["fn"]))
        if self.verify and self.sizes[name] > 1:
            self._verify_owner(name, estimator, msg["fn"])
        with self._drawing(msg):
            value = self._value(msg, estimator) if msg["value"] is None else _given(msg, estimator)
        value = self.dependence.follow(name, value) if self.dependence else value
        msg["value"] = value
        self._versions[name] = version(value)
        self.estimators[name] = estimator

    def check_unchanged(self, name: str, value: Tensor) -> None:
        """Check that the programs left a site's value as it was drawn.

        A changed value can be scored only where it moves with the distribution's parameters.
        """
        if (
            version(value) != self._versions[name]
            and self.estimators[name].route is not Route.PATHWISE
        ):
            raise ValueError(
                f"The value of site {name!r} was changed in place after it was drawn. Write an "
                "operation that makes a new tensor, such as z * 2 for z.mul_(2), or "
                "z.masked_fill(mask, 0) for z[mask] = 0."
            )

    def _value(self, msg: Message, estimator: Estimator) -> Tensor:
        name, fn = cast(str, msg["name"]), cast(Any, msg["fn"])
        if self.enumerate and _enumerates(estimator):
            return self._support(msg, estimator)
        if name in self._values:
            return self._values[name]
        plain = self.exact and (estimator.relaxed or self.sizes[name] > 1)
        if plain or _enumerates(estimator):
            return sample_detached(unwrap(fn))
        if all(self._shares_main(path, name) for path in self.layout.paths):
            blocks = []  # nothing to draw: the main path has been there
        else:
            block = self._draw(name, estimator, fn)
            blocks = list(block.unbind(0)) if self.sizes[name] > 1 else [block]
        return self._compose(name, blocks, fn.event_dim)

    def _draw(self, name: str, estimator: Estimator, fn: Any) -> Tensor:
        bare, joined = unwrap(fn), event_dims(fn)
        if estimator.draws_from_logits:
            bare, self.logits[name] = on_own_logits(bare)
        noise = self._common_noise(name, bare, joined) if estimator.shares_noise(bare) else None
        if noise is None:
            return estimator.draw_block(bare, joined)
        return estimator.draw_from_noise(bare, noise)

    def _common_noise(self, name: str, fn: Any, joined: int) -> Tensor | None:
        """Noise that branches share with the main path, so that their costs differ less.

        It is shared as a tensor, by draws of the same family and shape.
        """
        paths = self.layout.paths
        if self.layout.vectorized:
            noise = base_noise(fn) if len(paths) > 1 else None
            if noise is None:
                return None
            dim = cast(int, self.layout.particle_dim) - joined
            dim -= noise.dim() - len(fn.batch_shape)  # the categories' dimension
            first = noise.narrow(dim, 0, noise.shape[dim] // len(paths))
            return torch.cat([first] * len(paths), dim)
        if MAIN not in paths:
            family, noise = self._memory.noise.get(name, (None, None))
            own = base_noise(fn)
            if own is None or noise is None or family is not type(fn):
                return own
            return noise if (own.shape, own.dtype) == (noise.shape, noise.dtype) else own
        if max(self.sizes.values()) == 1:  # no site before this one has branches
            return None
        noise = base_noise(fn)
        if noise is not None:
            self._memory.noise[name] = type(fn), noise
        return noise

    def _support(self, msg: Message, estimator: Estimator) -> Tensor:
        if self.layout.plate_nesting is None:
            raise NestingNeeded
        name, fn = cast(str, msg["name"]), cast(Any, msg["fn"])
        support = estimator.draw(unwrap(fn))  # (K,) + ones + event
        dim = self.enumerated[name] = self.allocate(msg, len(support), recycles=self.recycles)
        return support.reshape(support.shape[:1] + (1,) * (-dim - 1) + fn.event_shape)

    def _compose(self, name: str, blocks: list[Tensor], event_dim: int) -> Tensor:
        """Put the paths' values together: drawn here, or remembered from the main path."""
        paths, particle_dim = self.layout.paths, self.layout.particle_dim
        if len(paths) == 1:  # the very tensors: a flow may know its value by identity
            rows = [[block] for block in blocks]
        else:
            dim = cast(int, particle_dim) - event_dim
            rows = [list(block.chunk(len(paths), dim)) for block in blocks]
        if MAIN in paths:
            self._memory.values[name] = [block[paths.index(MAIN)] for block in rows]
        shared = [self._shares_main(path, name) for path in paths]
        if not any(shared) and len(blocks) == 1:
            return blocks[0]
        values = [
            self._remember(path, name) if from_main else rows[0][index]
            for index, (path, from_main) in enumerate(zip(paths, shared, strict=True))
        ]
        if len(values) == 1:
            return values[0]
        # A value remembered from a single row has no dimension of rows.
        return torch.cat([left_filled(value, -dim) for value in values], dim)

    def _verify_owner(self, name: str, estimator: Estimator, fn: Any) -> None:
        """Check that a site's distribution is the same on its branches as on the main path."""
        bare, paths = unwrap(fn), self.layout.paths
        if not has_logits(bare):
            return
        logits = one_hot_logits(bare).detach()
        if len(paths) == 1:
            rows: Sequence[Tensor] = [logits]
        else:
            dim = cast(int, self.layout.particle_dim) - event_dims(fn) - 1
            rows = logits.chunk(len(paths), dim)
        if MAIN in paths:
            self._memory.logits[name] = rows[paths.index(MAIN)]
        branches = (own for path, own in zip(paths, rows, strict=True) if path.owner == name)
        for own in branches:
            main = self._memory.logits[name]
            if not torch.allclose(own, main, 1e-4, 1e-5, equal_nan=True):
                raise ValueError(
                    f"At site {name!r}, {estimator!r} evaluates several values that come from one "
                    "distribution, and this distribution differs between the evaluations: the "
                    "guide draws random numbers outside of sample sites before it (dropout, "
                    "torch.rand), or changes from run to run. Draw them by pyro.sample, or use an "
                    "estimator that draws one value, such as Score() or ReinMax()."
                )

    def _shares_main(self, path: Path, name: str) -> bool:
        """Return whether a branch's value at ``name`` is decided on the main path."""
        return path.owner is not None and path.owner not in self.estimators

    def _remember(self, path: Path, name: str) -> Tensor:
        values = self._memory.values.get(name)
        if values is None:
            raise ValueError(
                f"Site {name!r} is met by a branch of {path.owner!r} and was not met by the main "
                f"path, though both have the same values before {path.owner!r}: the guide's "
                "structure depends on random numbers drawn outside of sample sites. Draw them by "
                "pyro.sample, or use estimators that draw one value, such as Score()."
            )
        own = name == path.owner and path.value < len(values)
        return values[path.value if own else 0]


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


def _enumerates(estimator: Estimator | None) -> bool:
    return estimator is not None and estimator.route is Route.ENUMERATE


def _given(msg: Message, estimator: Estimator) -> Tensor:
    """Return a value that a handler of the guide gave to a latent site, as a draw of the site."""
    if isinstance(estimator, (Pathwise, Score)):
        return cast(Tensor, msg["value"])
    raise ValueError(
        f"At site {msg['name']!r}, {estimator!r} must draw the value, and a handler of the guide, "
        "such as poutine.replay, gave it. Remove the handler, or use Score() or Pathwise()."
    )


def _plate_key(msg: Message) -> tuple[Any, ...]:
    fn = cast(Any, msg["fn"])
    return msg["name"], fn.size, fn.subsample_size
