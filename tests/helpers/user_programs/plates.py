"""Plates in plates, after plates, subsampled, ragged; what leaves a plate."""

from __future__ import annotations

import pyro
import torch
from pyro import poutine

from helpers.user_programs.program import (
    NOT_RECORDED,
    bit,
    category,
    copies,
    normal,
    one_hot,
    param,
    program,
    table,
)


@program(reference="enum")
def plate_in_plate(n):
    data = table([0.4, -0.9], [1.3, 0.2], [-0.5, 2.0]).unsqueeze(-1)

    def model():
        rate = param("rate", 0.3)
        with copies(n), pyro.plate("group", 2, dim=-2):
            g = bit("g", -0.5)
            with pyro.plate("item", 3, dim=-3):
                h = category("h", torch.stack([g, 0.4 - g, rate * g], -1))
                x = table(0.3, -1.0, 1.4)[h] + g
                normal("x", x, 0.8, obs=data.expand(3, 2, n))

    def guide():
        with copies(n), pyro.plate("group", 2, dim=-2):
            g = bit("g", param("g", 0.2))
            with pyro.plate("item", 3, dim=-3):
                push = g.unsqueeze(-1) * param("w", 0.5, 0.0, -1.0)
                category("h", param("h", 0.3, -0.2, 0.1) + push)

    return model, guide


@program(reference="enum")
def sequential_plates(n):
    """Two plates one after the other, joined by a global one-hot."""

    def model():
        with copies(n, dim=-2):
            a = one_hot("a", table(0.1, 0.7, -0.4))
            push = (a * table(0.5, -1.0, 0.2)).sum(-1)
            with pyro.plate("first", 2, dim=-1):
                b = bit("b", push)
                normal("x", 2 * b - push, 1.0, obs=table(0.3, 1.5).expand(n, 2))
            with pyro.plate("second", 3, dim=-1):
                c = bit("c", -push)
                normal("y", c * push, 0.7, obs=table(0.1, -0.6, 1.0).expand(n, 3))

    def guide():
        with copies(n, dim=-2):
            a = one_hot("a", param("a", 0.2, -0.1, 0.3))
            push = (a * param("push", 0.3, -0.4, 0.1)).sum(-1)
            with pyro.plate("first", 2, dim=-1):
                bit("b", push + param("b", 0.5))
            with pyro.plate("second", 3, dim=-1):
                bit("c", push + param("c", -0.5))

    return model, guide


@program(reference="enum")
def subsampled_plate(n):
    """The minibatch is drawn first, so that other losses can have the same."""
    data = table(-1.0, 0.2, 0.9, 1.5, 2.2)

    def minibatch():
        return pyro.plate("data", 5, subsample_size=2, dim=-1)

    def model():
        batch = minibatch()
        with copies(n, dim=-2):
            w = bit("w", -0.3)
            with batch as index:
                z = one_hot("z", table(0.0, 0.5, -0.5))
                loc = (z * table(-1.0, 0.5, 2.0)).sum(-1) + w
                normal("x", loc, 0.9, obs=data[index].expand(n, 2))

    def guide():
        batch = minibatch()
        with copies(n, dim=-2):
            w = bit("w", param("w", 0.3))
            with batch as index:
                read = data[index].unsqueeze(-1) * param("x", 0.3, 0.0, 0.5)
                logits = param("z", 0.2, 0.1, -0.4) + read
                one_hot("z", logits + 0.3 * w.unsqueeze(-1) * table(1.0, 0.0, -1.0))

    return model, guide


# These move all elements of a plate at once.
WHOLE_PLATES = ("LocalExpectation*", "SumAndSample*", "UnorderedSet*")


@program(reference="trace", refused=(*WHOLE_PLATES, "Enumerate*"))
def gathered_outside(n):
    """A plate's bits meet in a sum outside of it."""

    def model():
        with copies(n, dim=-2):
            with pyro.plate("part", 4, dim=-1):
                z = bit("z", table(-0.5, 0.0, 0.5, 1.0))
            normal("x", z.sum(-1, keepdim=True) ** 2 / 4, 1.0, obs=torch.full((n, 1), 1.7))

    def guide():
        with copies(n, dim=-2), pyro.plate("part", 4, dim=-1):
            bit("z", param("z", 0.1, 0.4, -0.3, 0.2))

    return model, guide


@program(reference="enum")
def ragged_by_mask(n):
    lengths = table(1, 3, 2)
    data = table([0.2, 1.0, -0.7], [1.4, -0.2, 0.6], [0.3, 0.9, 0.0])
    seen = torch.arange(3).unsqueeze(-1) < lengths

    def model():
        w = param("w", 0.8)
        with copies(n, dim=-3), pyro.plate("row", 3, dim=-1):
            a = bit("a", 0.2)
            with pyro.plate("step", 3, dim=-2), poutine.mask(mask=seen):
                z = one_hot("z", a.unsqueeze(-1) * table(0.4, 0.0, -0.4))
                loc = w * (z * table(-1.0, 0.0, 1.5)).sum(-1) + a
                normal("x", loc, 0.8, obs=data.expand(n, 3, 3))

    def guide():
        with copies(n, dim=-3), pyro.plate("row", 3, dim=-1):
            a = bit("a", param("a", -0.2))
            with pyro.plate("step", 3, dim=-2), poutine.mask(mask=seen):
                one_hot("z", param("z", 0.1, 0.3, -0.4) + a.unsqueeze(-1) * table(0.3, 0.0, 0.0))

    return model, guide


@program(reference="enum")
def markov_chain(n):
    """A hidden Markov model whose guide is a chain, too."""
    data = table(0.3, 1.2, -0.8)

    def model():
        jump = param("jump", 0.7)
        with copies(n):
            z = torch.zeros(n, dtype=torch.long)
            for t in pyro.markov(range(3)):
                z = category(f"z_{t}", torch.stack([0.0 * z, jump * z, 0.3 - 0.2 * z], -1))
                normal(f"x_{t}", table(-1.0, 0.3, 1.6)[z], 0.8, obs=data[t].expand(n))

    def guide():
        with copies(n):
            z = torch.zeros(n, dtype=torch.long)
            for t in pyro.markov(range(3)):
                push = 0.3 * z.unsqueeze(-1) * table(1.0, 0.0, -1.0)
                z = category(f"z_{t}", param(f"z_{t}", 0.2, -0.1, 0.4) + push)

    return model, guide


@program(reference="enum", refused=NOT_RECORDED)
def plate_as_a_loop(n):
    """``for i in pyro.plate``: a site for each element."""
    data = table(0.3, 1.4, -0.2)

    def model():
        with copies(n):
            a = bit("a", 0.2)
            for i in pyro.plate("items", 3):
                z = bit(f"z_{i}", a - 0.4)
                normal(f"x_{i}", 2 * z - a, 0.9, obs=data[i].expand(n))

    def guide():
        with copies(n):
            a = bit("a", param("a", -0.3))
            for i in pyro.plate("items", 3):
                bit(f"z_{i}", param("z", 0.3, -0.2, 0.5)[i] + 0.4 * a)

    return model, guide


@program(
    reference="enum",
    importance=False,
    refused=NOT_RECORDED,
    only=("looped", "vectorized", "analytic_kl*", "default_score", "captured*"),
)
def subsampled_loop(n):
    """A loop over a minibatch: names differ from step to step, and each site is scaled."""
    data = table(0.3, 1.4, -0.2, 0.8)

    def model():
        items = pyro.plate("items", 4, subsample_size=2)
        with copies(n):
            for i in items:
                z = bit(f"z_{int(i)}", -0.4)
                normal(f"x_{int(i)}", 2 * z, 0.9, obs=data[i].expand(n))

    def guide():
        items = pyro.plate("items", 4, subsample_size=2)
        logits = param("z", 0.3, -0.2, 0.5, 0.1)
        with copies(n):
            for i in items:
                bit(f"z_{int(i)}", logits[i])

    return model, guide


@program(reference="enum")
def plates_with_gaps(n):
    """Plates at the first and the third dimension, one of them of size one."""

    def model():
        with copies(n, dim=-4), pyro.plate("one", 1, dim=-1):
            a = bit("a", 0.2)
            with pyro.plate("far", 3, dim=-3):
                z = one_hot("z", a.unsqueeze(-1) * table(0.5, 0.0, -0.5))
                loc = (z * table(-1.0, 0.3, 1.2)).sum(-1)
                normal("x", loc, 0.8, obs=torch.full((n, 3, 1, 1), 0.7))

    def guide():
        with copies(n, dim=-4), pyro.plate("one", 1, dim=-1):
            a = bit("a", param("a", -0.3))
            with pyro.plate("far", 3, dim=-3):
                one_hot("z", param("z", 0.2, -0.1, 0.3) + a.unsqueeze(-1) * table(0.3, 0.0, -0.3))

    return model, guide
