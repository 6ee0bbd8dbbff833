"""All passes of one step, read site by site: particles first, whether they were rows or runs."""

# mypy: disable-error-code="override"
# The tensors of a site are computed at their first use.

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_gumbel.distributions.families import event_dims, has_score_parts, one_hot_logits, unwrap
from pyro_gumbel.estimators import Branches, Call, Estimator, Route, Site
from pyro_gumbel.infer._run import Run
from pyro_gumbel.infer._sampling import MAIN, Path

__all__ = ["Passes", "SiteView"]


class Passes:
    """The passes of a step, in groups that each have one pass with the main path first.

    Vectorised particles are one group; looped ones a group each. Structure may differ between
    groups: a site is gathered from those that have it.

    Attributes:
        groups: The passes.
        estimators: The estimator of each latent site, in program order.
        training: Whether the step may change the state of estimators.
    """

    training = True

    def __init__(self, groups: list[list[Run]]) -> None:
        self.groups = groups
        self.estimators: dict[str, Estimator] = {}
        for main, *_ in groups:
            self.estimators.update(main.estimators)

    def elbo(self) -> Tensor:
        """Average the ELBO over repetitions and over their paths that are draws of the guide."""
        means = [
            self._rows_mean(group) if group[0].layout.vectorized else self._runs_mean(group)
            for group in self.groups
        ]
        return means[0] if len(means) == 1 else torch.stack(means).mean()

    def _rows_mean(self, group: list[Run]) -> Tensor:
        """Average paths that are the same in every step."""
        draws = [rows for run in group for rows in self._draws(run)]
        return (draws[0] if len(draws) == 1 else torch.cat(draws)).mean()

    def _runs_mean(self, group: list[Run]) -> Tensor:
        """Average paths of which there may be more or fewer, as the values drawn decide.

        The weight of a path must not depend on what comes after the values at which it branches
        off: from the last owner to the first, its branches are averaged with what is behind it.
        """
        main, *branches = group
        mean = main.totals.mean()
        owned: dict[str, list[Tensor]] = {}
        for run in branches:
            (path,) = run.layout.paths
            if path.owner is not None and self._averages(path.owner):
                owned.setdefault(path.owner, []).append(run.totals.mean())
        for totals in reversed(owned.values()):
            mean = torch.stack([mean, *totals]).mean()
        return mean

    def _draws(self, run: Run) -> list[Tensor]:
        """The totals of a pass's paths that are draws of the guide, ``(paths, repetitions)``."""
        drawn = [self._is_draw(run, path) for path in run.layout.paths]
        if all(drawn):
            return [run.totals]
        return [run.totals[i : i + 1] for i, is_draw in enumerate(drawn) if is_draw]

    def _is_draw(self, run: Run, path: Path) -> bool:
        if path.owner is None:
            return True
        return run.has(path) and self._averages(path.owner)

    def _averages(self, owner: str) -> bool:
        """Return whether the ELBO is averaged over the branches of a site."""
        return self.estimators[owner].branches is Branches.SAMPLES

    def gather(self, name: str, read: Callable[[Run], Tensor], event_dim: int = 0) -> Tensor:
        """Read a tensor of a site off its main path and its own branches: ``(K, R, ...)``."""
        groups = [self._gather_group(group, name, read, event_dim) for group in self.having(name)]
        shapes = {tuple(group.shape[:1] + group.shape[2:]) for group in groups}
        if len(shapes) > 1:
            raise ValueError(
                f"At site {name!r}, shapes differ between particles: {sorted(shapes)}. Draw the "
                "same shapes in every run, or use num_particles=1."
            )
        return groups[0] if len(groups) == 1 else torch.cat(groups, 1)

    def having(self, name: str) -> list[list[Run]]:
        """The groups whose main path has the site."""
        return [group for group in self.groups if name in group[0].estimators]

    def _gather_group(
        self, group: list[Run], name: str, read: Callable[[Run], Tensor], event_dim: int
    ) -> Tensor:
        blocks: list[Tensor] = []
        for run in group:
            paths = run.layout.paths
            own = [i for i, path in enumerate(paths) if _belongs(path, name) and run.has(path)]
            if own:
                split = run.layout.split(read(run), event_dim)
                if len(own) < len(paths):
                    split = torch.stack([split[i] for i in own])  # a GPU would wait for a list
                blocks.append(split)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def weigh(self, name: str, surrogate: Tensor) -> Tensor:
        """Weigh a site's surrogate by this process's share of it."""
        return surrogate

    def site(self, name: str, call: Call) -> Site:
        """Put together what the estimator of ``name`` sees."""
        return SiteView(self, name, call)


def _belongs(path: Path, name: str) -> bool:
    """Return whether a path is the main one or a branch of the site."""
    return path.owner in (None, name)


class SiteView(Site):
    """Reads one site's tensors off the paths."""

    def __init__(self, passes: Passes, name: str, call: Call) -> None:
        fn = passes.having(name)[0][0].guide[name]["fn"]
        self.name = name
        self.fn = unwrap(fn)
        self.event_dims = event_dims(fn)
        self.call = call
        self.training = passes.training
        self._passes = passes
        self._event_dim = fn.event_dim

    @cached_property
    def values(self) -> Tensor:
        return self._gather(lambda run: run.value(self.name), self._event_dim)

    @cached_property
    def cost(self) -> Tensor:
        return self._gather(lambda run: run.cost(self.name, live=False))

    @cached_property
    def live_cost(self) -> Tensor:
        return self._gather(lambda run: run.cost(self.name, live=True))

    @cached_property
    def totals(self) -> Tensor:
        groups = []
        for group in self._passes.having(self.name):
            own = [run.totals[index] for run, index, _ in self._own_paths(group)]
            groups.append(torch.stack(own))
        return torch.cat(groups, 1)

    @cached_property
    def later_scores(self) -> Tensor:
        own = [path for group in self._passes.having(self.name) for path in self._own_paths(group)]
        size = 1 + max(value for _, _, value in own)
        total = [torch.zeros_like(own[0][0].totals[0, 0]) for _ in range(size)]
        names = list(self._passes.estimators)
        for name in names[names.index(self.name) + 1 :]:
            estimator = self._passes.estimators[name]
            fn = unwrap(self._passes.having(name)[0][0].guide[name]["fn"])
            moves = estimator.route is Route.PATHWISE and not has_score_parts(fn)
            if moves or estimator.route is Route.ENUMERATE:
                continue
            for value in range(size):
                paths = [(run, index) for run, index, other in own if other == value]
                total[value] = total[value] + _score(name, paths)
        return torch.stack(total)

    def _own_paths(self, group: list[Run]) -> list[tuple[Run, int, int]]:
        """The main path and the site's branches: each with its run, its place and its value."""
        return [
            (run, index, path.value)
            for run in group
            for index, path in enumerate(run.layout.paths)
            if _belongs(path, self.name) and run.has(path)
        ]

    @cached_property
    def log_prob(self) -> Tensor:
        return self._gather(lambda run: run.log_prob(self.name))[0]

    @cached_property
    def score_function(self) -> Tensor:
        return self._gather(lambda run: run.draw_score(self.name))[0]

    @cached_property
    def logits(self) -> Tensor:
        return self._gather(lambda run: one_hot_logits(self._fn(run)), self.event_dims + 1)[0]

    def value_gradients(self) -> Tensor:
        # Run by run: looped, a later site's branches are handed the main path's very tensor.
        return self._gather(
            lambda run: _gradients(run.totals.sum(), [run.value(self.name)])[0], self._event_dim
        )

    def logits_gradients(self, output: Tensor, *, create_graph: bool = False) -> Tensor:
        estimator = self._passes.estimators[self.name]
        if not estimator.draws_from_logits:
            raise TypeError(
                f"At site {self.name!r}, {type(estimator).__name__} calls logits_gradients, so "
                "its class needs draws_from_logits = True."
            )
        # Coupled values are drawn on the main path, so its logits alone were used.
        mains = [group[0] for group in self._passes.having(self.name)]
        logits = [run.logits[self.name] for run in mains]
        gradients = _gradients(output, logits, create_graph=create_graph)
        events = self.event_dims + self.fn.event_dim
        blocks = [
            run.layout.split(gradient, events)[run.layout.paths.index(MAIN)]
            for run, gradient in zip(mains, gradients, strict=True)
        ]
        return torch.cat(blocks)

    def _fn(self, run: Run) -> Any:
        return unwrap(run.guide[self.name]["fn"])

    def _gather(self, read: Callable[[Run], Tensor], event_dim: int = 0) -> Tensor:
        return self._passes.gather(self.name, read, event_dim)


def _score(name: str, paths: list[tuple[Run, int]]) -> Tensor:
    """Sum ``cost * log q`` of a site over one path of every particle, leave-one-out."""
    paths = [(run, index) for run, index in paths if name in run.estimators]
    if not paths:
        return torch.zeros(())
    cost, score = (
        torch.cat([run.layout.split(read(run))[index] for run, index in paths])
        for read in (lambda run: run.cost(name), lambda run: run.draw_score(name))
    )
    # Other particles are independent; other paths of this one may have been drawn by its noise.
    count = cost.shape[0]
    if count > 1:
        cost = (cost - cost.mean(0)) * (count / (count - 1))
    return (cost * score).sum()


def _gradients(
    output: Tensor, inputs: list[Tensor], *, create_graph: bool = False
) -> list[Tensor]:
    """Differentiate; an input that the output does not depend on gets zeros."""
    live = [tensor for tensor in inputs if tensor.requires_grad]
    if not live or not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = iter(
        torch.autograd.grad(
            output,
            live,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(found) if x.requires_grad else torch.zeros_like(x) for x in inputs]
