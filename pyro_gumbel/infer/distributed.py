"""Train in several processes, each on its share of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import is_validation_enabled
from pyro.optim import PyroOptim
from pyro.util import warn_if_nan

from pyro_gumbel.estimators import Call
from pyro_gumbel.infer._processes import sum_over_processes
from pyro_gumbel.infer._split import OtherValues, SplitStep
from pyro_gumbel.infer._state import finish_step
from pyro_gumbel.infer.elbo import Estimate, ParticleELBO

__all__ = ["DistributedSVI"]


class DistributedSVI(SVI):
    r"""Pyro's ``SVI`` in several processes, each with its share of the batch.

    The loss and the gradients are those of one process on the union of the shares. Without an
    initialised process group of ``torch.distributed`` (gloo or nccl), or with one process, it is
    ``SVI``.

    One plate is *split*: by default the one that is subsampled, or whose size is the first
    dimension of an argument.

    * Terms in a split plate of the size of the share, ``pyro.plate("data", len(x))``, add up over
      processes. Shares may differ in size; none is empty.
    * In a subsampled plate, ``pyro.plate("data", N, subsample_size=b)``, each process draws
      a minibatch of its own, and the terms are those of all minibatches together.
    * Terms outside of the plate count once. Sites there have one draw, which all processes share,
      and their estimators read the costs of all processes.

    Processes may have the same seed. Within a step each draws from its own stream. The generators
    are left as they were, so ``torch.randperm`` gives the same order in all processes.

    The parameters, buffers and estimators are those of the first process. Gradients are summed,
    and moving averages of costs and the buffers of modules, such as those of batch normalisation,
    are averaged. Every process calls ``step`` and ``evaluate_loss`` equally often, and returns
    the same loss. All must use the same parameters, in the first step or later. A parameter with a
    value for each datum needs a subsampled plate. The first step runs the programs once more, and
    undoes what this run changed.

    Args:
        model: The model.
        guide: The guide, :func:`~pyro_gumbel.infer.config_gradient` included.
        optim: A Pyro optimiser.
        loss: :class:`~pyro_gumbel.infer.Estimator_ELBO`, or
            :class:`~pyro_gumbel.infer.ImportanceWeighted_ELBO` if every site is in the split
            plate.
        plate: The name of the split plate, or names of several that are not nested.

    Raises:
        TypeError: If ``loss`` is another loss.
        ValueError: At a step, if it is not clear which plate is split, a site cannot be split, or
            processes have different parameters or terms outside of the plate.

    Example:
        With ``torchrun --nproc-per-node 2``, after ``torch.distributed.init_process_group()``,
        ``share`` would be ``data[rank::2]``.

        >>> from pyro_gumbel.infer import Estimator_ELBO
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(0.3))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(()))))
        >>> pyro.clear_param_store()
        >>> optim = pyro.optim.Adam({"lr": 0.05})
        >>> svi = DistributedSVI(model, guide, optim, Estimator_ELBO())
        >>> share = torch.randn(6)
        >>> svi.step(share) > 0
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: ParticleELBO,
        *,
        plate: str | Sequence[str] = (),
    ) -> None:
        if not isinstance(loss, ParticleELBO):
            raise TypeError(
                "DistributedSVI: loss must be an Estimator_ELBO or ImportanceWeighted_ELBO; got "
                f"{type(loss).__name__}. The recorded steps of CapturedSVI cannot be split."
            )
        super().__init__(model, guide, optim, self._evaluate, loss_and_grads=self._train)
        self.elbo = loss
        self._split = SplitStep(loss, (plate,) if isinstance(plate, str) else tuple(plate))

    @property
    def streams(self) -> Any:
        """The states of the generators that steps in several processes draw from, if any."""
        return self._split.streams

    @streams.setter
    def streams(self, value: Any) -> None:
        self._split.streams = value

    def _evaluate(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        split, call = self._split, Call(model, guide, args, kwargs)
        if not split.begin(call):
            return self.elbo.loss(model, guide, *args, **kwargs)
        loss = self._run(call, lambda: self.elbo.exact_loss(call, split))
        (total,) = sum_over_processes([loss.double()])
        warn_if_nan(total, "loss")
        return total.item()

    def _train(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        split, call = self._split, Call(model, guide, args, kwargs)
        if not torch.is_grad_enabled():
            return self._evaluate(model, guide, *args, **kwargs)
        if not split.begin(call):
            return self.elbo.loss_and_grads(model, guide, *args, **kwargs)

        def step() -> Estimate:
            estimate = self.elbo.estimate(call, split=split)
            finish_step(estimate.estimators)
            if estimate.surrogate.requires_grad:
                estimate.surrogate.backward(retain_graph=self.elbo.retain_graph)
            return estimate

        estimate = self._run(call, step)
        loss = split.reduce(estimate.loss, estimate.estimators)
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        return loss

    def _run(self, call: Call, compute: Callable[[], Any]) -> Any:
        """Compute by the streams of this step, anew if processes had other parameters."""
        while True:
            try:
                with self._split.step(call), poutine.trace(param_only=True) as self._split.traced:
                    return compute()
            except OtherValues:
                continue
