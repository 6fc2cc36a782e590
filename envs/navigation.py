"""Navigation (Bettini et al., 2022): agents go to goals of their own, of a group, or shared by all."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.envs.base import Box, Environment, Kind, Spec, TimeStep, first_step
from jaxstack.envs.particles import contact_force, distances

AGENT_RADIUS, GOAL_RADIUS = 0.1, 0.05
MIN_SPAWN_DISTANCE = 0.25
RAYS, LIDAR_RANGE = 12, 0.35
MAX_AGENTS = 20  # rejection sampling of starts and goals in [-1, 1]^2 needs room


class State(NamedTuple):
    """Positions and velocities [N, 2], goal of each agent [N, 2], step."""

    pos: Array
    vel: Array
    goal: Array
    t: Array


@dataclass(frozen=True)
class Navigation(Config, Environment):
    """Reward: progress towards the goal (summed over agents if `shared_reward`), 0.01 when all are at their goals
    and -1 for each partner in contact. Ends when all are within a body's radius of their goals; the limit truncates.

    Contacts are judged in each environment by itself; VMAS gives the penalty whenever any environment of the batch has
    an overlap.
    """

    num_agents: int = 4
    agents_with_same_goal: int = 1
    """Agents 0..k-1 share one goal."""
    split_goals: bool = False
    """Agents in blocks of `agents_with_same_goal` share a goal."""
    shared_reward: bool = True
    collisions: bool = True
    observe_all_goals: bool = False
    """Positions relative to the goals of all agents, in order of agents, instead of to the own goal alone."""
    horizon: int = 100

    def validate(self) -> None:
        require_at_least(self, 1, "num_agents", "horizon", "agents_with_same_goal")
        require(self, "num_agents", self.num_agents <= MAX_AGENTS, f"at most {MAX_AGENTS}: no room for more")
        require(self, "agents_with_same_goal", self.agents_with_same_goal <= self.num_agents, "at most num_agents")
        alone = self.agents_with_same_goal == 1
        require(self, "collisions", alone or not self.collisions, "off when agents share a goal")

    @property
    def goal_of(self) -> np.ndarray:
        """[N] index of each agent's goal."""
        i = np.arange(self.num_agents)
        if self.split_goals:
            return i // self.agents_with_same_goal
        return np.where(i < self.agents_with_same_goal, 0, i)

    @property
    def spec(self) -> Spec:
        goals = 2 * self.num_agents if self.observe_all_goals else 2
        return Spec(
            id="navigation",
            agents=tuple(f"agent_{i}" for i in range(self.num_agents)),
            obs_shape=(4 + goals + (RAYS if self.collisions else 0),),
            action_space=Box((2,), -1.0, 1.0),
            horizon=self.horizon,
            truncates_at_horizon=True,
            # the penalty of a contact is paid by those who touch
            shared_reward=self.shared_reward and not self.collisions,
        )

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        count = self.num_agents
        places = _spawn(key, 2 * count)
        pos, goals = places[:count], places[count:]
        state = State(pos, jnp.zeros((count, 2), jnp.float32), goals[self.goal_of], jnp.int32(0))
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        force = jnp.clip(action, -1.0, 1.0)
        pos, vel = state.pos, 0.75 * state.vel
        for _ in range(2):  # two sub-steps of 0.05; drag acts in the first
            push = force + contact_force(pos, 2 * AGENT_RADIUS) if self.collisions else force
            vel = vel + 0.05 * push
            pos = pos + 0.05 * vel
        before = jnp.linalg.norm(state.pos - state.goal, axis=-1)
        now = jnp.linalg.norm(pos - state.goal, axis=-1)
        progress = before - now
        reward = jnp.broadcast_to(progress.sum(), progress.shape) if self.shared_reward else progress
        reward = reward + jnp.where((now < GOAL_RADIUS).all(), 0.01, 0.0)
        if self.collisions:
            near = distances(pos, pos) - 2 * AGENT_RADIUS <= 0.005
            reward = reward - (near.sum(-1, dtype=jnp.float32) - 1.0)
        done = (now < AGENT_RADIUS).all()
        state = State(pos, vel, state.goal, state.t + 1)
        ts = self._see(state)
        return state, ts._replace(reward=reward, terminated=done, truncated=(state.t >= self.horizon) & ~done)

    def _see(self, state: State) -> TimeStep:
        if self.observe_all_goals:
            rel = (state.pos[:, None] - state.goal[None]).reshape(self.num_agents, -1)
        else:
            rel = state.pos - state.goal
        parts = [state.pos, state.vel, rel]
        if self.collisions:
            parts.append(LIDAR_RANGE - lidar(state.pos))
        near = jnp.linalg.norm(state.pos - state.goal, axis=-1) < AGENT_RADIUS
        return first_step(self.spec, jnp.concatenate(parts, -1), info={"at_goal": near.mean(dtype=jnp.float32)})

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        return render2d.particles(
            np.asarray(state.pos),
            AGENT_RADIUS,
            np.asarray(state.goal),
            GOAL_RADIUS,
            extent=1.5,
            groups=self.goal_of,
            landmark_groups=self.goal_of,
        )

    def legend(self) -> tuple[Kind, ...]:
        return Kind("agents, coloured by goal", 0), Kind("their goals", 0, "ring")


def lidar(pos: Array) -> Array:
    """[N, 2] -> [N, RAYS] distance along each ray to the nearest other agent's circle, at most LIDAR_RANGE."""
    angle = 2 * np.pi * np.arange(RAYS) / RAYS
    ray = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], -1), jnp.float32)
    delta = pos[None] - pos[:, None]  # [from, to, 2]
    along = jnp.einsum("ijd,rd->irj", delta, ray)
    off = jnp.sum(jnp.square(delta), -1)[:, None] - jnp.square(along)
    inside = jnp.square(AGENT_RADIUS) - off
    hit = along - jnp.sqrt(jnp.maximum(inside, 0.0))
    own = jnp.eye(pos.shape[0], dtype=bool)[:, None]
    good = (inside >= 0) & (along >= 0) & ~own
    return jnp.min(jnp.where(good, jnp.clip(hit, 0.0, LIDAR_RANGE), LIDAR_RANGE), axis=-1)


def _spawn(key: jax.Array, count: int) -> Array:
    """[count, 2] points in [-1, 1]^2, each at least MIN_SPAWN_DISTANCE from those before it, by rejection."""

    def place(places: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        i, key = inputs

        def blocked(c: tuple[Array, Array]) -> Array:
            near = jnp.linalg.norm(places - c[1], axis=-1) < MIN_SPAWN_DISTANCE
            return (near & (jnp.arange(count, dtype=jnp.int32) < i)).any()

        def again(c: tuple[Array, Array]) -> tuple[Array, Array]:
            key, sub = jax.random.split(c[0])
            return key, jax.random.uniform(sub, (2,), jnp.float32, minval=-1.0, maxval=1.0)

        _, point = jax.lax.while_loop(blocked, again, again((key, jnp.zeros(2, jnp.float32))))
        return places.at[i].set(point), None

    keys = jax.random.split(key, count)
    return jax.lax.scan(place, jnp.zeros((count, 2), jnp.float32), (jnp.arange(count, dtype=jnp.int32), keys))[0]
