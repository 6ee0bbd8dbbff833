"""How many evaluations of the model a gradient takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import nn

from pyro_gumbel.infer._layout import PARTICLE_PLATE

__all__ = ["EvaluationCounter"]


class EvaluationCounter(Messenger):
    """Counts evaluations of a model, whether they are runs of their own or rows of one.

    A run counts with the number of rows, left of the model's own plates, of the site that has the
    most: particles and enumerated values are such rows.

    Attributes:
        total: Evaluations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._rows = 1

    def __enter__(self) -> EvaluationCounter:
        self._rows = 1
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        self.total += self._rows
        return super().__exit__(*exc_info)

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        fn: Any = msg["fn"]
        batch = list(fn.batch_shape)
        for frame in msg["cond_indep_stack"]:
            own = frame.vectorized and frame.name != PARTICLE_PLATE
            if own and frame.dim is not None and len(batch) >= -frame.dim:
                batch[frame.dim] = 1
        self._rows = max(self._rows, math.prod(batch))

    @contextmanager
    def watch(self, model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
        """Give a model to be run in place of ``model``, whose runs are counted."""
        if not isinstance(model, nn.Module):
            yield functools.wraps(model)(lambda *args, **kwargs: self._run(model, args, kwargs))
            return
        # A module has to stay what it is: estimators look at its signature and parameters.
        before = model.register_forward_pre_hook(lambda *_: self._enter())
        after = model.register_forward_hook(
            lambda *_: self.__exit__(None, None, None), always_call=True
        )
        try:
            yield model
        finally:
            before.remove()
            after.remove()

    def _enter(self) -> None:
        self.__enter__()

    def _run(self, model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self:
            return model(*args, **kwargs)
