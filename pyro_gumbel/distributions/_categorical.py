"""Base class of one-hot distributions and their relaxations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_gumbel.distributions._base import BaseDistribution
from pyro_gumbel.distributions._noise import log_exponential_noise
from pyro_gumbel.distributions._parameters import CategoricalParameters, check_one_given


class CategoricalDistribution(BaseDistribution):
    """A distribution over vectors of ``C`` categories, given by ``probs`` or ``logits``."""

    _parameters: CategoricalParameters

    def _init_categorical(self, probs: Any, logits: Any, validate_args: bool | None) -> None:
        self._parameters = CategoricalParameters(probs, logits)
        shape = self._parameters.given.shape
        self._init_shapes(shape[:-1], shape[-1:], validate_args)
        if self._validate_args:
            self._parameters.check()

    @property
    def probs(self) -> Tensor:
        """Normalised probabilities, ``batch_shape + (C,)``."""
        return self._broadcast(self._parameters.log_probs.exp())

    @property
    def logits(self) -> Tensor:
        """Normalised log-probabilities, ``batch_shape + (C,)``."""
        return self._broadcast(self._parameters.log_probs)

    @property
    def param_shape(self) -> torch.Size:
        """Shape of ``probs`` and of ``logits``."""
        return self.batch_shape + self.event_shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and samples."""
        return self._parameters.dtype

    def _broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).expand(self.batch_shape + self.event_shape)

    def _perturbed_scores(self, sample_shape: Any) -> Tensor:
        """Draw logits plus Gumbel noise, float32 or better; their argmax is an exact draw."""
        scores = self._parameters.scores
        shape = self._extended_shape(sample_shape)
        return scores - log_exponential_noise(shape, scores.dtype, scores.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._parameters.name}: {tuple(self.param_shape)})"


def infer_one_hot_shapes(
    probs: Sequence[int] | None, logits: Sequence[int] | None
) -> tuple[torch.Size, torch.Size]:
    """Infer ``batch_shape`` and ``event_shape`` from the shape of the parameter."""
    check_one_given(probs, logits)
    shape = torch.Size(probs if logits is None else logits)  # type: ignore[arg-type]
    return shape[:-1], shape[-1:]
