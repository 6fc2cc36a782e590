"""Dispersion (Bettini et al., 2022): agents start at one point and must each take another food.

All agents see the same at first, so identical policies cannot split up: the task asks for different behaviours.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require_at_least
from jaxstack.envs.base import Box, Discrete, Environment, Kind, Spec, TimeStep, agent_kinds, first_step
from jaxstack.envs.particles import distances

AGENT_RADIUS, FOOD_RADIUS = 0.035, 0.05


class State(NamedTuple):
    """Positions and velocities [N, 2], food [F, 2], eaten [F] bool, step."""

    pos: Array
    vel: Array
    food: Array
    eaten: Array
    t: Array


@dataclass(frozen=True)
class Dispersion(Config, Environment):
    """Agents within reach of an uneaten food share it: reward 1 / (agents on it) each, or with `share_reward` the
    number of foods eaten in this step for everybody. Ends when all is eaten; the time limit truncates."""

    num_agents: int = 4
    num_food: int = 0
    """0: as many as agents."""
    horizon: int = 100
    share_reward: bool = False
    continuous: bool = False
    """Forces in [-1, 1]^2 instead of nine moves (3 * x + y with 0: none, 1: minus, 2: plus)."""
    penalise_by_time: bool = False
    """-0.01 in each step without reward."""

    def validate(self) -> None:
        require_at_least(self, 1, "num_agents", "horizon")
        require_at_least(self, 0, "num_food")

    @property
    def foods(self) -> int:
        return self.num_food or self.num_agents

    @property
    def spec(self) -> Spec:
        return Spec(
            id="dispersion",
            agents=tuple(f"agent_{i}" for i in range(self.num_agents)),
            obs_shape=(4 + 3 * self.foods,),
            action_space=Box((2,), -1.0, 1.0) if self.continuous else Discrete(9),
            horizon=self.horizon,
            truncates_at_horizon=True,
            shared_reward=self.share_reward,
        )

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        food = jax.random.uniform(key, (self.foods, 2), jnp.float32, minval=-1.0, maxval=1.0)
        zeros = jnp.zeros((self.num_agents, 2), jnp.float32)
        state = State(zeros, zeros, food, jnp.zeros(self.foods, bool), jnp.int32(0))
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        if self.continuous:
            force = jnp.clip(action, -1.0, 1.0)
        else:
            force = jnp.asarray([0.0, -1.0, 1.0], jnp.float32)[jnp.stack([action // 3, action % 3], -1)]
        vel = 0.75 * state.vel + 0.1 * force
        pos = jnp.clip(state.pos + 0.1 * vel, -1.0, 1.0)
        on = (distances(pos, state.food) < AGENT_RADIUS + FOOD_RADIUS) & ~state.eaten
        count = on.sum(0, dtype=jnp.float32)
        if self.share_reward:
            reward = jnp.broadcast_to((count > 0).sum().astype(jnp.float32), (self.num_agents,))
        else:
            reward = jnp.where(on, 1.0 / jnp.maximum(count, 1), 0.0).sum(-1)
        if self.penalise_by_time:
            reward = jnp.where(reward == 0, -0.01, reward)
        state = State(pos, vel, state.food, state.eaten | (count > 0), state.t + 1)
        done = state.eaten.all()
        ts = self._see(state)
        return state, ts._replace(reward=reward, terminated=done, truncated=(state.t >= self.horizon) & ~done)

    def _see(self, state: State) -> TimeStep:
        rel = state.food[None] - state.pos[:, None]
        eaten = jnp.broadcast_to(state.eaten[None, :, None], (*rel.shape[:2], 1)).astype(jnp.float32)
        foods = jnp.concatenate([rel, eaten], -1).reshape(self.num_agents, -1)
        obs = jnp.concatenate([state.pos, state.vel, foods], -1)
        return first_step(self.spec, obs, info={"eaten": state.eaten.mean(dtype=jnp.float32)})

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        food = np.asarray(state.food)[~np.asarray(state.eaten)]
        return render2d.particles(np.asarray(state.pos), AGENT_RADIUS, food, FOOD_RADIUS)

    def legend(self) -> tuple[Kind, ...]:
        return *agent_kinds(self.spec), Kind("food", shape="ring")
