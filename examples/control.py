"""Two control tasks, each with a guide that draws actions and a model that adds rewards.

Guide and model score each value by the same distribution, and the model's copy is detached. The
scores cancel in the ELBO, whose gradient is that of the expected sum of rewards.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_gumbel.distributions import OneHot


class Decisions:
    """A random Markov decision process whose policy is a table of logits."""

    def __init__(self, states: int = 4, actions: int = 3, horizon: int = 5) -> None:
        generator = torch.Generator().manual_seed(3)
        self.start = torch.ones(states) / states
        self.move = (2 * torch.randn(states, actions, states, generator=generator)).softmax(-1)
        self.reward = torch.rand(states, actions, generator=generator)
        self.horizon = horizon
        self.logits = nn.Parameter(torch.zeros(states, actions))

    def first_states(self, episodes: int) -> Tensor:
        return OneHot(self.start).sample((episodes,))

    def trajectory(self, state: Tensor, logits: Tensor) -> Tensor:
        """Draw a_t ~ pi(. | s_t) and s_t+1 ~ p(. | s_t, a_t); return the sum of rewards."""
        total = torch.zeros(len(state))
        for t in range(self.horizon):
            action = pyro.sample(f"a_{t}", OneHot(logits=state @ logits))
            total = total + torch.einsum("...s,sa,...a->...", state, self.reward, action)
            if t + 1 < self.horizon:
                moved = torch.einsum("...s,sat,...a->...t", state, self.move, action)
                state = pyro.sample(f"s_{t + 1}", OneHot(probs=moved))
        return total

    def guide(self, state: Tensor) -> None:
        pyro.param("logits", self.logits)
        with pyro.plate("episodes", len(state)):
            self.trajectory(state, self.logits)

    def model(self, state: Tensor) -> None:
        """Add the rewards; actions and states have the guide's distribution, detached."""
        with pyro.plate("episodes", len(state)):
            pyro.factor("reward", self.trajectory(state, self.logits.detach()))

    def value(self, logits: Tensor) -> Tensor:
        """Compute the expected sum of rewards by summing over states and actions."""
        policy, state, total = logits.softmax(-1), self.start, torch.zeros(())
        for _ in range(self.horizon):
            joint = state[:, None] * policy
            total = total + (joint * self.reward).sum()
            state = torch.einsum("sa,sat->t", joint, self.move)
        return total

    def best_value(self) -> float:
        """Compute the optimal policy's expected sum of rewards by backward induction."""
        to_go = torch.zeros(len(self.start))
        for _ in range(self.horizon):
            to_go = (self.reward + self.move @ to_go).amax(-1)
        return (self.start @ to_go).item()


class CartPole:
    """A cart with a pole, pushed left or right; the reward is one for each upright step."""

    def __init__(self, horizon: int = 60) -> None:
        self.policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
        self.horizon = horizon

    def first_states(self, episodes: int) -> Tensor:
        return 0.1 * torch.rand(episodes, 4) - 0.05

    @staticmethod
    def push(state: Tensor, action: Tensor) -> Tensor:
        """Take an Euler step of 0.02 s: cart of 1 kg, pole of 0.1 kg and 1 m, force of 10 N."""
        x, v, angle, spin = state.unbind(-1)
        sin, cos = angle.sin(), angle.cos()
        thrust = (10.0 * (2 * action - 1) + 0.05 * spin**2 * sin) / 1.1
        turn = (9.8 * sin - cos * thrust) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        change = torch.stack(
            torch.broadcast_tensors(v, thrust - 0.05 * turn * cos / 1.1, spin, turn), -1
        )
        return state + 0.02 * change

    def trajectory(self, state: Tensor, fixed: bool) -> Tensor:
        upright, total = torch.ones(len(state)), torch.zeros(len(state))
        for t in range(self.horizon):
            logits = self.policy(state).squeeze(-1)
            action = pyro.sample(
                f"a_{t}", dist.Bernoulli(logits=logits.detach() if fixed else logits)
            )
            state = self.push(state, action)
            upright = upright * ((state[..., 2].abs() < 0.21) & (state[..., 0].abs() < 2.4))
            total = total + upright
        return total

    def guide(self, state: Tensor) -> None:
        pyro.module("policy", self.policy)
        with pyro.plate("episodes", len(state)):
            self.trajectory(state, fixed=False)

    def model(self, state: Tensor) -> None:
        with pyro.plate("episodes", len(state)):
            pyro.factor("reward", self.trajectory(state, fixed=True))
