"""Dependence of a program's results on its latent values, smooth or through jumps."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdRef

from pyro_gumbel.estimators import Branches, Estimator
from pyro_gumbel.infer._operations import (
    Operation,
    Undo,
    calling_module,
    detached,
    hide_from_compiler,
    is_library,
    reads_shape_alone,
    storage_of,
    tensors,
)

__all__ = ["Dependence", "GradientWarning", "Mark", "Marks", "ReachedTerm", "check_costs"]


class Mark(enum.IntEnum):
    """The kind of path from a value to a result. Of several paths the largest mark counts.

    Attributes:
        CASE: Without a gradient, but only in the code of distributions: by a check of the support,
            the pieces of a continuous function, or a shift that cancels.
        SMOOTH: By operations that have a gradient.
        JUMP: By an operation that is discontinuous or drops the gradient: an index, a comparison,
            a number read into Python, ``detach``.
    """

    CASE = 0
    SMOOTH = 1
    JUMP = 2


Marks = Mapping[str, Mark]


@dataclass
class _Memory:
    """The marks of a piece of memory, and where it was made.

    Attributes:
        stretch: Number of the stretch of operations without gradient mode; ``None`` if made with
            gradient mode on.
    """

    marks: Marks
    stretch: int | None


class Dependence(TorchFunctionMode):
    """Follows latent values through the operations of a program.

    A result gets the marks of the values that it was computed from. Marks belong to memory: a
    view has the marks of its base, and a write marks every view. Shapes and dtypes are not
    followed. A value that is read into Python (``item``, ``if``, ``numpy``) marks every later
    result with a jump; reads by the code of distributions, such as their validation, do not
    count. Gradient mode must be on to find smooth paths. No tensor is kept alive.

    Args:
        restore: Whether the run is for following alone. Then tensors that existed before are
            restored on exit, as by :class:`Undo`, and values without a gradient get one for the
            time. Otherwise a value without a gradient counts as reaching all through a jump.

    Attributes:
        reads_values: Whether the program read a number, on which its control flow may depend.

    Example:
        >>> with Dependence() as dependence:
        ...     z = dependence.follow("z", torch.tensor([0.0, 1.0]))
        ...     mean = z @ torch.tensor([2.0, 3.0])
        ...     scale = torch.tensor([1.0, 4.0])[z.argmax()]
        ...     dependence.marks(mean), dependence.marks(scale)
        ({'z': <Mark.SMOOTH: 1>}, {'z': <Mark.JUMP: 2>})
    """

    def __init__(self, *, restore: bool = True) -> None:
        super().__init__()
        hide_from_compiler(self)
        self.reads_values = False
        self._memories: dict[Any, _Memory] = {}
        self._views: dict[WeakIdRef, Marks] = {}  # what reached a view besides its memory
        self._read: Marks = {}
        self._stretch = 0  # counts stretches of operations without gradient mode
        self._followed: list[Tensor] = []
        self._undo = Undo(restore=restore)
        self._restore = restore

    def __enter__(self) -> Dependence:
        self._undo.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.__exit__(*error)
        for value in self._followed:
            value.detach_()
        self._followed.clear()

    def follow(self, name: str, value: Tensor) -> Tensor:
        """Mark a tensor as the value of the latent site ``name``.

        A value without a gradient loses its earlier marks: the score of its distribution
        accounts for them. It is made to require a gradient, so that lost gradients are seen. A
        value with a gradient keeps the sites that it was computed from. Integers start as jumps.

        Returns:
            The tensor itself, or a copy if it is a view.
        """
        # Private, here and below: torch has no public way to turn modes off, and this mode must
        # not follow its own bookkeeping.
        with torch._C.DisableTorchFunction():
            carried = dict.fromkeys(self._marks(value), Mark.SMOOTH) if value.requires_grad else {}
            if self._restore and not value.requires_grad:
                value = self._with_gradient(value)
            own = Mark.SMOOTH if _is_continuous(value) else Mark.JUMP
            self._memories[_key(value)] = _Memory({**carried, name: own}, None)
        return value

    def _with_gradient(self, value: Tensor) -> Tensor:
        if value._base is not None or value.is_inference():
            value = value.clone()
        if _is_continuous(value):
            value = _Root.apply(value, value.new_zeros((), requires_grad=True))
            self._followed.append(value)
        return value

    def marks(self, tensor: Tensor) -> Marks:
        """Return how each value reached ``tensor``, by the name of its site."""
        with torch._C.DisableTorchFunction():
            (bare,) = tensors(tensor)
            return self._marks(bare)

    def forget(self, tensor: Tensor, names: Collection[str]) -> None:
        """Remove the marks of some values from a tensor."""
        with torch._C.DisableTorchFunction():
            memory, view = self._memories.get(_key(tensor)), WeakIdRef(tensor)
            if memory is not None:
                memory.marks = _without(memory.marks, names)
            self._views[view] = _without(self._views.get(view, {}), names)

    @property
    def marks_of_numbers(self) -> Marks:
        """The values that were read into Python: every later result has their marks."""
        return self._read

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if reads_shape_alone(func):
            self._stretch += torch.is_grad_enabled()
            return func(*args, **(kwargs or {}))
        operation = Operation(func, args, kwargs or {})
        if torch.is_grad_enabled() or (operation.name == "set_grad_enabled" and args[0]):
            self._stretch += 1
        lost = self._mark_of_lost(operation)
        reached = {id(source): self._marks(source, lost) for source in operation.sources}
        result, complete = _call(operation, any(reached.values()))
        if not complete:
            reached = {source: _cut(marks, Mark.JUMP) for source, marks in reached.items()}
        self._note_read(operation.read_into_python(result))

        written = {_key(tensor): tensor for tensor in operation.written()}
        for key, target in written.items():
            # Its own gradient survives, as in x.detach().clamp_() by torch's Gamma.
            others = (x for x in operation.sources if operation.jumps or _key(x) != key)
            marks = _join(reached[id(source)] for source in others)
            memory = self._memories.setdefault(key, _Memory({}, None))
            self._spread(operation, marks, memory, target, lost)
        inputs = {_key(tensor): tensor for tensor in operation.inputs}
        stretch = None if torch.is_grad_enabled() else self._stretch
        for target in tensors(result):
            key = _key(target)
            if key not in inputs:
                memory = self._memories.setdefault(key, _Memory({}, stretch))
                marks = _join(reached[id(source)] for source in operation.sources_of(target))
                self._spread(operation, marks, memory, target, lost)
            elif key not in written:
                self._note_view(operation, target, inputs[key])
        return result

    def _mark_of_lost(self, operation: Operation) -> Mark:
        """Return the mark of a value whose gradient this operation drops."""
        memories = (self._memories.get(_key(source)) for source in operation.sources)
        marked = any(memory and memory.marks for memory in memories)
        chosen = operation.compares or torch.is_grad_enabled()  # a sampler drops it in no_grad
        return Mark.CASE if marked and chosen and is_library(calling_module()) else Mark.JUMP

    def _marks(self, tensor: Tensor, lost: Mark = Mark.JUMP) -> Marks:
        own = self._views.get(WeakIdRef(tensor), {})
        memory = self._memories.get(_key(tensor))
        if memory is None:
            return own
        kept = self._keeps_gradient(tensor, memory)
        return _join([own, memory.marks if kept else _cut(memory.marks, lost)])

    def _keeps_gradient(self, tensor: Tensor, memory: _Memory) -> bool:
        if tensor.requires_grad:
            return not tensor.is_leaf  # as one made by detach().requires_grad_() is
        # The forward pass of a custom function runs without gradient mode; its result may get a
        # gradient later.
        return not torch.is_grad_enabled() and memory.stretch == self._stretch

    def _spread(
        self, operation: Operation, marks: Marks, memory: _Memory, target: Tensor, lost: Mark
    ) -> None:
        """Add marks to the memory of a tensor that an operation made or wrote to."""
        if operation.compares:
            marks = _cut(marks, lost)
        elif operation.jumps or not _is_continuous(target):
            marks = _cut(marks, Mark.JUMP)
        elif not (self._keeps_gradient(target, memory) or operation.below_autograd):
            marks = _cut(marks, lost)
        memory.marks = _join([memory.marks, marks, self._read])

    def _note_view(self, operation: Operation, view: Tensor, source: Tensor) -> None:
        """Mark a view with what its memory does not show: its index, its tangent, a new leaf."""
        marks = [self._read, self._views.get(WeakIdRef(source), {})]
        marks += [_cut(self._marks(index), Mark.JUMP) for index in operation.selectors]
        marks += [self._marks(tangent) for tangent in operation.tangents]
        if source.requires_grad and source.is_leaf:
            marks.append(self._marks(source))
        if any(marks):
            self._views[WeakIdRef(view)] = _join(marks)

    def _note_read(self, read: list[Tensor]) -> None:
        module = calling_module() if read else ""
        if not read or is_library(module):
            return
        self.reads_values |= not module.startswith(("pyro.", "torch."))
        reached = _join(self._marks(tensor) for tensor in read)
        self._read = _join([self._read, dict.fromkeys(reached, Mark.JUMP)])


class _Root(torch.autograd.Function):
    """Makes a tensor require a gradient. It remains the same object and may be written to."""

    @staticmethod
    def forward(value: Tensor, root: Tensor) -> Tensor:
        return value

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _call(operation: Operation, reached: bool) -> tuple[Any, bool]:
    """Return the result, and whether it may depend on the inputs by a gradient."""
    func, args, kwargs = operation.func, operation.args, operation.kwargs
    if reached and operation.converts:
        return func(*detached(args), **detached(kwargs)), True
    try:
        return func(*args, **kwargs), True
    except Exception as error:
        # Some operations refuse tensors that require a gradient, as only followed values do.
        if not reached or isinstance(error, Warning):
            raise
        try:
            return func(*detached(args), **detached(kwargs)), False
        except Exception:
            raise error from None


def _key(tensor: Tensor) -> Any:
    """Return a key of the tensor's memory, or of the tensor, that is never used again."""
    storage = storage_of(tensor)
    return WeakIdRef(tensor) if storage is None else StorageWeakRef(storage)


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _cut(marks: Marks, mark: Mark) -> Marks:
    """Replace the smooth marks."""
    return {site: mark if old is Mark.SMOOTH else old for site, old in marks.items()}


def _without(marks: Marks, names: Collection[str]) -> Marks:
    return {site: mark for site, mark in marks.items() if site not in names}


def _join(several: Iterable[Marks]) -> Marks:
    joined: dict[str, Mark] = {}
    for marks in several:
        for site, mark in marks.items():
            joined[site] = max(mark, joined.get(site, Mark.CASE))
    return joined


Frames = frozenset[CondIndepStackFrame]


class GradientWarning(UserWarning):
    """An estimator ignores part of the cost's dependence on its site's value."""


@dataclass(frozen=True)
class ReachedTerm:
    """A term of the bound.

    Attributes:
        site: The site that it scores, in the guide or in the model.
        marks: How each latent value reached the score.
        frames: The vectorised plates of the site.
    """

    site: str
    marks: Marks
    frames: Frames


def check_costs(
    estimators: Mapping[str, Estimator],
    frames: Mapping[str, Frames],
    terms: Iterable[ReachedTerm],
) -> None:
    """Check the dependence of every term on every site whose estimator restricts it.

    Relaxed and straight-through values need a cost with a gradient in the value
    (``needs_linked_value``). Control variates that use the gradient do not: they have mean zero
    for any vector in its place. Values that are not draws of the guide in all elements of a plate
    at once must not reach terms outside the plate (``moves_plates``).

    Args:
        estimators: The estimator of each latent site of the guide.
        frames: The vectorised plates of each of these sites.
        terms: The terms of both programs, scored at values followed by
            :class:`~pyro_gumbel.infer._dependence.Dependence`.

    Raises:
        ValueError: If the estimate would be biased and the estimator claims that it is not, or
            if it would be unusable. A biased estimator that ignores a term gives a
            :class:`GradientWarning`.
    """
    terms = list(terms)
    for name, estimator in estimators.items():
        reached = [term for term in terms if name in term.marks]
        if estimator.needs_smooth_cost:
            _check_smooth(name, estimator, reached)
        if estimator.branches is Branches.COUNTERFACTUAL:
            _check_inside(name, estimator, frames[name], reached)


def _check_smooth(name: str, estimator: Estimator, reached: list[ReachedTerm]) -> None:
    reader = next((term.site for term in reached if term.marks[name] is Mark.JUMP), None)
    if reader is None:
        return
    what = (
        f"At site {name!r}, {estimator!r} needs the cost's gradient in the value, and site "
        f"{reader!r} depends on the value without one, as through an index, a comparison or a "
        "number read into Python"
    )
    advice = (
        "Write the model with products and sums of the value, such as z @ table, or use an "
        "estimator that needs no gradient: DisARM() for bits, DisARMTree() for categories, "
        "Score(LeaveOneOut()) for both."
    )
    if estimator.unbiased:
        raise ValueError(f"{what}: the estimate would be biased. {advice}")
    message = f"{what}: this part of the dependence is not learnt. {advice}"
    warnings.warn(message, GradientWarning, stacklevel=2)


def _check_inside(
    name: str, estimator: Estimator, frames: Frames, reached: list[ReachedTerm]
) -> None:
    plates = {frame for frame in frames if frame.size > 1}
    for term in reached:
        outside = sorted(frame.name for frame in plates - term.frames)
        if outside:
            raise ValueError(
                f"At site {name!r}, {estimator!r} moves all elements of the plate "
                f"{outside[0]!r} at once, and site {term.site!r} outside that plate depends on "
                "them: the estimate would be biased. Use an estimator whose values are all draws "
                "of the guide, such as Score(LeaveOneOut()), DisARM() for bits or DisARMTree() "
                "for categories; or, for LocalExpectation, write .to_event(...) in place of the "
                "plate."
            )
