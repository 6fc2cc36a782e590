"""Environments around environments; all are frozen dataclasses, so `vectorise` and jit take them like any other.

    env = FrameStack(TimeLimit(envs.make("dispersion"), 50), 4)

Statistics of observations and rewards are no wrappers: learners hold them in their state (`jaxstack.core.running`), so
that they are saved, exported with the policy and the same for all environments.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.envs.base import Environment, Spec, TimeStep


@dataclass(frozen=True)
class Wrapper(Config, Environment):
    """Passes everything on; subclasses change what they are about."""

    env: Environment

    @property
    def spec(self) -> Spec:
        return self.env.spec

    def reset(self, key: jax.Array) -> tuple[Any, TimeStep]:
        return self.env.reset(key)

    def step(self, key: jax.Array, state: Any, action: Array) -> tuple[Any, TimeStep]:
        return self.env.step(key, state, action)

    def frame(self, state: Any) -> np.ndarray:
        return self.env.frame(state)


class Timed(NamedTuple):
    """The inner state and the steps since the reset."""

    env: Any
    t: Array


@dataclass(frozen=True)
class TimeLimit(Wrapper):
    """Truncates after `steps` steps, unless the task ends in the same step."""

    steps: int = 100

    def validate(self) -> None:
        require_at_least(self, 1, "steps")

    @property
    def spec(self) -> Spec:
        inner = self.env.spec
        horizon = self.steps if inner.horizon is None else min(self.steps, inner.horizon)
        return replace(inner, horizon=horizon, can_truncate=True)

    def reset(self, key: jax.Array) -> tuple[Timed, TimeStep]:
        state, ts = self.env.reset(key)
        return Timed(state, jnp.int32(0)), ts

    def step(self, key: jax.Array, state: Timed, action: Array) -> tuple[Timed, TimeStep]:
        inner, ts = self.env.step(key, state.env, action)
        state = Timed(inner, state.t + 1)
        over = (state.t >= self.steps) & ~ts.terminated
        return state, ts._replace(truncated=ts.truncated | over)

    def frame(self, state: Timed) -> np.ndarray:
        return self.env.frame(state.env)


@dataclass(frozen=True)
class AgentId(Wrapper):
    """Appends the agent's one-hot index to its observation vector [D] -> [D + A].

    The index stands after the padding of smaller observations. Raises `UserError` for images.
    """

    def validate(self) -> None:
        shape = self.env.spec.obs_shape
        if len(shape) != 1:
            raise UserError(f"AgentId: env {self.env.spec.id!r} has observations {shape}: expected vectors")

    @property
    def spec(self) -> Spec:
        inner = self.env.spec
        return replace(inner, obs_shape=(inner.obs_shape[0] + inner.num_agents,), obs_sizes=())

    def reset(self, key: jax.Array) -> tuple[Any, TimeStep]:
        state, ts = self.env.reset(key)
        return state, self._named(ts)

    def step(self, key: jax.Array, state: Any, action: Array) -> tuple[Any, TimeStep]:
        state, ts = self.env.step(key, state, action)
        return state, self._named(ts)

    def _named(self, ts: TimeStep) -> TimeStep:
        ids = jnp.eye(ts.obs.shape[0], dtype=ts.obs.dtype)
        return ts._replace(obs=jnp.concatenate([ts.obs, ids], -1))


class Stacked(NamedTuple):
    """The inner state and the last frames side by side, oldest first."""

    env: Any
    frames: Array


@dataclass(frozen=True)
class FrameStack(Wrapper):
    """The last `frames` observations joined along the last axis, oldest first: [..., C] -> [..., frames * C].

    A reset repeats the first observation. The global state is passed on unstacked.
    """

    frames: int = 4

    def validate(self) -> None:
        require_at_least(self, 1, "frames")
        require(self, "env", len(self.env.spec.obs_shape) > 0, "observations with at least one axis")

    @property
    def spec(self) -> Spec:
        inner = self.env.spec
        *lead, channels = inner.obs_shape
        return replace(inner, obs_shape=(*lead, channels * self.frames), obs_sizes=())

    def reset(self, key: jax.Array) -> tuple[Stacked, TimeStep]:
        state, ts = self.env.reset(key)
        frames = jnp.concatenate([ts.obs] * self.frames, -1)
        return Stacked(state, frames), ts._replace(obs=frames)

    def step(self, key: jax.Array, state: Stacked, action: Array) -> tuple[Stacked, TimeStep]:
        inner, ts = self.env.step(key, state.env, action)
        frames = jnp.concatenate([state.frames[..., ts.obs.shape[-1] :], ts.obs], -1)
        return Stacked(inner, frames), ts._replace(obs=frames)

    def frame(self, state: Stacked) -> np.ndarray:
        return self.env.frame(state.env)


@dataclass(frozen=True)
class RewardScale(Wrapper):
    """reward * scale + shift. A shift changes what long episodes are worth."""

    scale: float = 1.0
    shift: float = 0.0

    def step(self, key: jax.Array, state: Any, action: Array) -> tuple[Any, TimeStep]:
        state, ts = self.env.step(key, state, action)
        return state, ts._replace(reward=ts.reward * self.scale + self.shift)


@dataclass(frozen=True)
class RewardClip(Wrapper):
    """Rewards clipped to [low, high]."""

    low: float = -1.0
    high: float = 1.0

    def validate(self) -> None:
        require(self, "low", self.low < self.high, f"less than high={self.high}")

    def step(self, key: jax.Array, state: Any, action: Array) -> tuple[Any, TimeStep]:
        state, ts = self.env.step(key, state, action)
        return state, ts._replace(reward=jnp.clip(ts.reward, self.low, self.high))
