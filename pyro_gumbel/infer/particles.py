r"""How one step's particles are laid out, and how values are drawn on them.

Every repetition (``num_particles`` of them) has a main path, and for each *coupled* site, one that
draws ``K`` values, ``K - 1`` branches which that site owns::

    site order        z1 (K=3)        z2 (K=1)          z3 (K=2)
    main path         z1[0]           z2                z3[0]
    branch 1 of z1    z1[1]           its own           its own
    branch 2 of z1    z1[2]           its own           its own
    branch 1 of z3    as main         as main           z3[1]

A branch shares the main path's values upstream of its owner, takes the owner's coupled value, and
draws its own downstream, from the main path's noise where the draw is plain (of rows) or the
generator can be set back (of runs): its law stays, the variance of differences falls. The
program is so evaluated on ``1 + sum(K - 1)`` paths, however many sites are coupled, instead of on
the product of their ``K``.

A *pass* evaluates the programs once. Vectorised, the first pass has all paths of all repetitions
as rows of one plate, path by path: row ``p * R + r`` is path ``p`` of repetition ``r``. Looped,
each path of each repetition is a pass of its own. Branches whose costs alone are wanted come in
further passes, some at a time, without gradient. The main path's values wait in a memory for the
branches' turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_gumbel.distributions.families import event_dims, exact_draw, on_own_logits, unwrap
from pyro_gumbel.estimators import Estimator
from pyro_gumbel.estimators.registry import Choice, DefaultEstimators
from pyro_gumbel.infer._site_options import check_guide_site
from pyro_gumbel.infer.config import resolve
from pyro_gumbel.infer.learnable import meet_site
from pyro_gumbel.infer.not_recordable import NotRecordable

__all__ = [
    "MAIN",
    "PARTICLE_PLATE",
    "DrawMessenger",
    "Layout",
    "Path",
    "PlateNestingNeeded",
    "SharedSubsample",
]

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's own losses give it


class PlateNestingNeeded(Exception):
    """An enumerated site needs a dimension left of all plates; their number is not known."""


@dataclass(frozen=True)
class Path:
    """One path: the site that owns it and which of its values it takes; the main path has none."""

    owner: str | None = None
    value: int = 0


MAIN = Path()


@dataclass(frozen=True)
class Layout:
    """The paths of one pass.

    Attributes:
        paths: The paths that the pass evaluates.
        repetitions: How often it does, ``R``: all particles where they are rows, else one.
        plate_nesting: Number of dimensions that the programs' own plates take, or ``None`` where
            it is not known.
        vectorized: Whether paths are rows of a plate.
    """

    paths: tuple[Path, ...] = (MAIN,)
    repetitions: int = 1
    plate_nesting: int | None = None
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
    def total_nesting(self) -> float:
        """Number of dimensions of all plates, the particle plate included."""
        if self.plate_nesting is None:
            return float("inf")
        return self.plate_nesting + (self.particle_dim is not None)

    def split(self, tensor: Tensor, event_dim: int = 0) -> Tensor:
        """Bring particles to the front: ``(paths, repetitions, ...)`` of ``(..., rows, ...)``."""
        if not self.vectorized:
            return tensor.reshape(1, 1, *tensor.shape)
        # A single row has no plate; further passes of the same particle may have one.
        dim = -(cast(int, self.plate_nesting) + 1) - event_dim
        rows = _left_filled(tensor, -dim).movedim(dim, 0)
        if rows.shape[0] == 1:
            rows = rows.expand(self.num_rows, *rows.shape[1:])
        return rows.unflatten(0, (len(self.paths), self.repetitions))


@dataclass
class DrawMessenger(Messenger):
    """Draws the value of each latent site of the guide by its estimator.

    Attributes:
        layout: The paths of this pass.
        num_particles: The number of particles in all.
        auto: Chooses estimators where ``"auto"`` stands.
        default: The choice at sites that have none.
        evaluate: Draw exactly, without coupling or relaxation: nothing will be differentiated.
        memory: For each site its coupled values on the main path, filled by the pass that has it.
        noise: For looped runs, the generator's state before each of the main path's draws.
        estimators: After a pass, the estimator of each latent site.
        sizes: After a pass, the number of coupled values of each latent site.
        enumerated: After a pass, the dimension of each enumerated site.
        logits: After a pass, the logits that values were drawn from, of sites that want them.
    """

    layout: Layout
    num_particles: int
    auto: DefaultEstimators
    default: Choice
    evaluate: bool = False
    memory: dict[str, list[Tensor]] = field(default_factory=dict)
    noise: dict[str, Tensor] = field(default_factory=dict)
    estimators: dict[str, Estimator] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    enumerated: dict[str, int] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"]:
            check_guide_site(msg)
        if msg["value"] is not None:
            return
        name = cast(str, msg["name"])
        estimator = resolve(msg, self.auto, self.default, self.num_particles)
        if not self.evaluate:  # a loss changes no estimator
            meet_site(name, estimator, unwrap(msg["fn"]))
        self.sizes[name] = estimator.block_size(unwrap(msg["fn"]), event_dims(msg["fn"]))
        msg["value"] = self._value(name, estimator, msg)
        self.estimators[name] = estimator

    def _value(self, name: str, estimator: Estimator, msg: Message) -> Tensor:
        if estimator.enumerates:
            return self._enumerate(name, estimator, msg)
        fn = unwrap(msg["fn"])
        if self.evaluate and (estimator.relaxed or self.sizes[name] > 1):
            return exact_draw(fn)
        if all(self._shares_main(path, name) for path in self.layout.paths):
            blocks = []  # nothing to draw: the main path has been there
        else:
            with self._common_noise(name, fn):
                if estimator.draws_from_logits:
                    fn, self.logits[name] = on_own_logits(fn)
                block = self._draw_block(estimator, fn, msg["fn"])
            blocks = list(block.unbind(0)) if self.sizes[name] > 1 else [block]
        return self._compose(name, blocks, msg["fn"].event_dim)

    def _draw_block(self, estimator: Estimator, fn: Any, wrapped: Any) -> Tensor:
        """Draw; where rows are branches of one another, by common noise if that can be had."""
        paths, particle_dim = len(self.layout.paths), self.layout.particle_dim
        if paths > 1 and particle_dim is not None:
            value = estimator.draw_shared(fn, particle_dim - event_dims(wrapped), paths)
            if value is not None:
                return value
        return estimator.draw_block(fn, event_dims(wrapped))

    @contextmanager
    def _common_noise(self, name: str, fn: Any) -> Iterator[None]:
        """Let a looped branch draw with the noise that the main path's draw had."""
        if self.layout.vectorized or self.evaluate:
            yield
        elif MAIN in self.layout.paths:
            self.noise[name] = torch.get_rng_state()
            yield
        elif name in self.noise:
            if get_proxy_mode() is not None:
                raise NotRecordable(
                    f"site {name!r} is drawn again with the same random numbers, by setting the "
                    "generator back; write vectorize_particles=True, which has them as rows."
                )
            state = torch.get_rng_state()
            torch.set_rng_state(self.noise[name])
            yield
            torch.set_rng_state(state)
        else:
            yield

    def _enumerate(self, name: str, estimator: Estimator, msg: Message) -> Tensor:
        if self.layout.plate_nesting is None:
            raise PlateNestingNeeded
        dim = -int(self.layout.total_nesting) - 1 - len(self.enumerated)
        self.enumerated[name] = dim
        support = estimator.draw(unwrap(msg["fn"]))  # (K,) + ones + event
        return support.reshape(support.shape[:1] + (1,) * (-dim - 1) + msg["fn"].event_shape)

    def _compose(self, name: str, blocks: list[Tensor], event_dim: int) -> Tensor:
        """Put the paths' values together: drawn here, or remembered from the main path."""
        particle_dim = self.layout.particle_dim
        if particle_dim is None or len(self.layout.paths) == 1:
            # Handed on as it is: a transform knows what it drew by the tensor itself.
            rows = [[block] for block in blocks]
        else:
            dim = particle_dim - event_dim
            rows = [list(block.chunk(len(self.layout.paths), dim)) for block in blocks]
        if MAIN in self.layout.paths:
            main = self.layout.paths.index(MAIN)
            self.memory[name] = [block[main] for block in rows]
        values = [
            self._remember(path, name) if self._shares_main(path, name) else rows[0][index]
            for index, path in enumerate(self.layout.paths)
        ]
        if particle_dim is None or len(values) == 1:
            return values[0]
        dim = particle_dim - event_dim
        # A value remembered from a single row has no dimension of rows.
        return torch.cat([_left_filled(value, -dim) for value in values], dim)

    def _shares_main(self, path: Path, name: str) -> bool:
        """Tell whether a branch's value at ``name`` is decided on the main path."""
        return path.owner is not None and path.owner not in self.estimators

    def _remember(self, path: Path, name: str) -> Tensor:
        return self.memory[name][path.value if name == path.owner else 0]


def _left_filled(tensor: Tensor, dims: int) -> Tensor:
    """Give a tensor at least ``dims`` dimensions, by ones on the left."""
    return tensor.reshape((1,) * (dims - tensor.dim()) + tensor.shape)


class SharedSubsample(Messenger):
    """Lets every run of one step use the minibatch of the first, as rows would."""

    def __init__(self) -> None:
        super().__init__()
        self._indices: dict[tuple[Any, ...], Tensor] = {}

    def known(self) -> dict[tuple[Any, ...], Tensor]:
        """The indices that were drawn so far, by plate."""
        return dict(self._indices)

    def forget(self, *, keep: dict[tuple[Any, ...], Tensor] | None = None) -> None:
        """Let the next run draw a minibatch of its own, but for what is to be kept."""
        self._indices = dict(keep or {})

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            msg["value"] = self._indices.get(_plate_key(msg))

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self._indices[_plate_key(msg)] = cast(Tensor, msg["value"])


def _plate_key(msg: Message) -> tuple[Any, ...]:
    fn = cast(Any, msg["fn"])
    return msg["name"], fn.size, fn.subsample_size
