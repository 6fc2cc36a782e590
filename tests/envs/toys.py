"""A toy environment whose every start is a number of its own, so that its history can be recounted by hand."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.envs.base import Discrete, Environment, Spec, TimeStep, first_step

LONGEST = 6


class State(NamedTuple):
    start: Array
    length: Array
    t: Array


@dataclass(frozen=True)
class Clock(Environment):
    """Two agents; the start is uniform in [0, 1) and the length uniform in 2..6, of which `lengths` cuts the choice.

    Episodes of even length terminate, those of odd length are truncated. obs [A, 2] = (start, t), reward = (t, action)
    with t counted after the step. Agent 1 leaves at t = 2, and then only action 0 is legal for it.
    """

    lengths: tuple[int, ...] = (2, 3, 4, 5, LONGEST)

    @property
    def spec(self) -> Spec:
        return Spec(
            id="clock",
            agents=("a", "b"),
            obs_shape=(2,),
            action_space=Discrete(3),
            horizon=max(self.lengths),
            # even lengths terminate, so that only the longest can be a cut
            truncates_at_horizon=all(n % 2 == 0 or n == max(self.lengths) for n in self.lengths),
            has_action_mask=True,
        )

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        k_start, k_length = jax.random.split(key)
        state = State(jax.random.uniform(k_start), jax.random.choice(k_length, jnp.array(self.lengths)), jnp.int32(0))
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        state = state._replace(t=state.t + 1)
        done, even = state.t >= state.length, state.length % 2 == 0
        reward = jnp.stack([state.t, action[1]]).astype(jnp.float32)
        return state, self._see(state)._replace(reward=reward, terminated=done & even, truncated=done & ~even)

    def _see(self, state: State) -> TimeStep:
        obs = jnp.broadcast_to(jnp.stack([state.start, state.t.astype(jnp.float32)]), (2, 2))
        there = jnp.array([True, False]) | (state.t < 2)
        legal = jnp.ones((2, 3), bool) & (there[:, None] | (jnp.arange(3) == 0))
        info = {"age": state.t.astype(jnp.float32)}
        return first_step(self.spec, obs, agent_mask=there, action_mask=legal, info=info)


@dataclass(frozen=True)
class Image(Environment):
    """One agent, no end; obs [1, 2, 2, 1] filled with t."""

    @property
    def spec(self) -> Spec:
        return Spec(
            id="image",
            agents=("a",),
            obs_shape=(2, 2, 1),
            action_space=Discrete(1),
            can_terminate=False,
            can_truncate=False,
        )

    def reset(self, key: jax.Array) -> tuple[Array, TimeStep]:
        return jnp.float32(1.0), first_step(self.spec, jnp.ones((1, 2, 2, 1)))

    def step(self, key: jax.Array, state: Array, action: Array) -> tuple[Array, TimeStep]:
        return state + 1, first_step(self.spec, jnp.full((1, 2, 2, 1), state + 1), reward=jnp.full(1, state))
