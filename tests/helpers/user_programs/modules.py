"""Modules: auto-encoders, Bayesian networks, recurrent guides, PyroModules."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from helpers.user_programs.program import bit, copies, normal, one_hot, param, program, table

DATA = table([0.3, -1.0, 0.7], [1.2, 0.4, -0.5], [-0.8, 0.9, 0.1])


@program(reference="enum")
def discrete_auto_encoder(n):
    """The plain VAE by ``pyro.module``, its code a one-hot and a bit."""
    torch.manual_seed(5)
    encoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    x = DATA.repeat(n // 3, 1)

    def model():
        pyro.module("decoder", decoder)
        with copies(len(x)):
            z = one_hot("z", table(0.2, 0.0, -0.3))
            b = bit("b", 0.4)
            loc = decoder(z * b.unsqueeze(-1)) + decoder(z.roll(1, -1))
            pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

    def guide():
        pyro.module("encoder", encoder)
        with copies(len(x)):
            out = encoder(x)
            one_hot("z", out[..., :3])
            bit("b", out[..., 3])

    return model, guide


@program(reference="enum")
def mixed_auto_encoder(n):
    """A class and a style: the continuous code depends on the discrete one."""
    torch.manual_seed(6)
    encoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    style, tilt = nn.Linear(3, 4), nn.Linear(3, 4)
    decoder, shift = nn.Linear(3, 3), nn.Linear(2, 3)
    x = DATA.repeat(n // 3, 1)

    def model():
        pyro.module("decoder", decoder)
        pyro.module("shift", shift)
        with copies(len(x)):
            z = one_hot("z", table(0.2, 0.0, -0.3))
            s = pyro.sample("s", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = decoder(z) + shift(s)
            pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

    def guide():
        pyro.module("encoder", encoder)
        pyro.module("style", style)
        pyro.module("tilt", tilt)
        with copies(len(x)):
            z = one_hot("z", encoder(x))
            out = style(x) + tilt(z)
            pyro.sample("s", dist.Normal(out[..., :2], (out[..., 2:] / 4).exp()).to_event(1))

    return model, guide


@program(reference="enum")
def semi_supervised(n):
    """Half of the labels are known: they are observed in the guide's and the model's half."""
    x = DATA.repeat(n // 3, 1)
    labels = torch.eye(3)[torch.arange(len(x)) % 3]
    net = nn.Linear(3, 3)

    def model():
        with pyro.plate("known", len(x), dim=-1):
            y = pyro.sample(
                "y_known", dist.OneHotCategorical(logits=table(0.1, 0.2, -0.3)), obs=labels
            )
            normal("x_known", (y * param("loc", -0.5, 0.3, 1.0)).sum(-1), 1.0, obs=x[:, 0])
        with pyro.plate("unknown", len(x), dim=-1):
            y = one_hot("y", table(0.1, 0.2, -0.3))
            normal("x", (y * param("loc", -0.5, 0.3, 1.0)).sum(-1), 1.0, obs=x[:, 0])

    def guide():
        pyro.module("net", net)
        with pyro.plate("unknown", len(x), dim=-1):
            one_hot("y", net(x))

    return model, guide


@program(reference="trace", copies=30, importance=False, vectorized=False)
def bayesian_regression(n):
    """A PyroModule whose weights are sites, one with a parameter, and a mixture of noise."""

    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            self.scale = PyroParam(torch.tensor(0.7), constraints.positive)

        def forward(self):
            x = DATA.repeat(n, 1)
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x), dim=-1):
                outlier = bit("outlier", -1.5)
                normal("y", mean, self.scale * (1 + 2 * outlier), obs=x.sum(-1) / 2)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(table([0.3, 0.2, 0.6]))
            self.odds = nn.Parameter(table(-1.0))

        def forward(self):
            pyro.sample("linear.weight", dist.Normal(self.loc, 0.2).to_event(2))
            pyro.sample("linear.bias", dist.Normal(self.odds.new_zeros(1), 0.3).to_event(1))
            with pyro.plate("data", 3 * n, dim=-1):
                bit("outlier", self.odds)

    return Regression(), Guide()


@program(reference="enum")
def recurrent_guide(n):
    """A deep Markov model: a GRU reads the data, the guide's states follow one another."""
    torch.manual_seed(7)
    gru, head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)
    state = nn.Linear(3, 3)
    x = DATA.repeat(n // 3, 1)

    def model():
        trans = param("trans", 0.5, -0.2, 0.1)
        with copies(len(x)):
            z = torch.zeros(len(x), 3)
            for t in pyro.markov(range(3)):
                z = one_hot(f"z_{t}", z * trans + z.roll(1, -1))
                normal(f"x_{t}", (z * table(-1.0, 0.2, 1.1)).sum(-1), 0.8, obs=x[:, t])

    def guide():
        pyro.module("gru", gru)
        pyro.module("head", head)
        pyro.module("state", state)
        hidden = gru(x.unsqueeze(-1))[0]
        with copies(len(x)):
            z = torch.zeros(len(x), 3)
            for t in pyro.markov(range(3)):
                z = one_hot(f"z_{t}", head(hidden[:, t]) + state(z))

    return model, guide
