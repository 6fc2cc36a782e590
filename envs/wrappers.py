"""Environments around environments; all are frozen dataclasses, so `vectorise` and jit take them like any other.

    env = FrameStack(TimeLimit(envs.make("dispersion"), 50), 4)

Statistics of observations and rewards are no wrappers: learners hold them in their state (`jaxstack.core.running`), so
that they are saved, exported with the policy and the same for all environments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.envs.base import Box, Discrete, Environment, Image, Kind, MultiDiscrete, ObsSpace, Spec, TimeStep


@dataclass(frozen=True)
class Wrapper(Config, Environment):
    """Passes everything on; subclasses change what they are about."""

    env: Environment

    @property
    def spec(self) -> Spec:
        return self.env.spec

    @property
    def parameters(self) -> Any:
        return self.env.parameters

    @property
    def num_tasks(self) -> int:
        return self.env.num_tasks

    def tasks(self, name: str) -> Any:
        return self.env.tasks(name)

    def task_of(self, state: Any) -> Array:
        return self.env.task_of(state)

    def reset(self, key: jax.Array, *theta: Any) -> tuple[Any, TimeStep]:
        return self.env.reset(key, *theta)

    def step(self, key: jax.Array, state: Any, action: Array) -> tuple[Any, TimeStep]:
        return self.env.step(key, state, action)

    def frame(self, state: Any) -> np.ndarray:
        return self.env.frame(state)

    def legend(self) -> Sequence[Kind]:
        return self.env.legend()


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
        # an inner environment that truncates where it likes still does so before the limit
        exact = not inner.can_truncate or inner.truncates_at_horizon
        return replace(inner, horizon=horizon, can_truncate=True, truncates_at_horizon=exact)

    def task_of(self, state: Timed) -> Array:
        return self.env.task_of(state.env)

    def reset(self, key: jax.Array, *theta: Any) -> tuple[Timed, TimeStep]:
        state, ts = self.env.reset(key, *theta)
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
    """Append the agent's index to its observation.

    Real vectors [D] become [D + A] with a one-hot index, after the padding of smaller observations. Discrete
    observations become MultiDiscrete, with the index as one more entry. Raises `UserError` for images.
    """

    def validate(self) -> None:
        spec = self.env.spec
        if len(spec.obs_shape) != 1 and not isinstance(spec.observation, Discrete):
            raise UserError(f"AgentId: env {spec.id!r} has observations {spec.obs_shape}: expected vectors")

    @property
    def spec(self) -> Spec:
        inner, count = self.env.spec, self.env.spec.num_agents
        space = inner.observation
        if isinstance(space, (Discrete, MultiDiscrete)):
            return _with_obs(inner, MultiDiscrete((*_sizes(space), count)))
        width = inner.obs_shape[0]
        bounds = zip((space.low, space.high), (0.0, 1.0)) if isinstance(space, Box) else ()
        low, high = (_vector(b, width) + (ids,) * count for b, ids in bounds)
        return _with_obs(inner, Box((width + count,), low, high, space.dtype))

    def reset(self, key: jax.Array, *theta: Any) -> tuple[Any, TimeStep]:
        state, ts = self.env.reset(key, *theta)
        return state, self._named(ts)

    def step(self, key: jax.Array, state: Any, action: Array) -> tuple[Any, TimeStep]:
        state, ts = self.env.step(key, state, action)
        return state, self._named(ts)

    def _named(self, ts: TimeStep) -> TimeStep:
        count = ts.obs.shape[0]
        if isinstance(self.env.spec.observation, (Discrete, MultiDiscrete)):
            ids = jnp.arange(count, dtype=ts.obs.dtype)[:, None]
        else:
            ids = jnp.eye(count, dtype=ts.obs.dtype)
        return ts._replace(obs=jnp.concatenate([ts.obs.reshape(count, -1), ids], -1))


@dataclass(frozen=True)
class TaskId(Wrapper):
    """Append the number of the task, as a one-hot vector, to each agent's observation: an oracle for methods that must
    infer the task.

    Real vectors [D] become [D + num_tasks], after the padding of smaller observations. Raises `UserError` for others,
    and for environments whose tasks have no names.
    """

    def validate(self) -> None:
        spec = self.env.spec
        if len(spec.obs_shape) != 1 or not isinstance(spec.observation, Box):
            raise UserError(f"TaskId: env {spec.id!r} has observations {spec.observation}: expected real vectors")
        _ = self.num_tasks

    @property
    def spec(self) -> Spec:
        inner, count = self.env.spec, self.num_tasks
        space = inner.observation
        assert isinstance(space, Box)
        low, high = (_vector(b, inner.obs_dim) + (at,) * count for b, at in ((space.low, 0.0), (space.high, 1.0)))
        return _with_obs(inner, Box((inner.obs_dim + count,), low, high, space.dtype))

    def reset(self, key: jax.Array, *theta: Any) -> tuple[Any, TimeStep]:
        state, ts = self.env.reset(key, *theta)
        return state, self._shown(state, ts)

    def step(self, key: jax.Array, state: Any, action: Array) -> tuple[Any, TimeStep]:
        state, ts = self.env.step(key, state, action)
        return state, self._shown(state, ts)

    def _shown(self, state: Any, ts: TimeStep) -> TimeStep:
        task = jax.nn.one_hot(self.env.task_of(state), self.num_tasks, dtype=ts.obs.dtype)
        return ts._replace(obs=jnp.concatenate([ts.obs, jnp.broadcast_to(task, (len(ts.obs), self.num_tasks))], -1))


class Stacked(NamedTuple):
    """The inner state and the last frames side by side, oldest first."""

    env: Any
    frames: Array


@dataclass(frozen=True)
class FrameStack(Wrapper):
    """The last `frames` observations joined along the last axis, oldest first: [..., C] -> [..., frames * C].

    Discrete observations [] become MultiDiscrete [frames]. A reset repeats the first observation. The global state is
    passed on unstacked.
    """

    frames: int = 4

    def validate(self) -> None:
        require_at_least(self, 1, "frames")
        require(self, "env", self._scalar or len(self.env.spec.obs_shape) > 0, "observations with at least one axis")

    @property
    def _scalar(self) -> bool:
        return isinstance(self.env.spec.observation, Discrete)

    @property
    def spec(self) -> Spec:
        inner = self.env.spec
        space, frames = inner.observation, self.frames
        if isinstance(space, (Discrete, MultiDiscrete)):
            return _with_obs(inner, MultiDiscrete(_sizes(space) * frames))
        *lead, channels = inner.obs_shape
        shape = (*lead, channels * frames)
        if isinstance(space, Image):
            return _with_obs(inner, Image(shape))
        low, high = (_tiled(b, frames) for b in (space.low, space.high))
        return _with_obs(inner, Box(shape, low, high, space.dtype))

    def task_of(self, state: Stacked) -> Array:
        return self.env.task_of(state.env)

    def reset(self, key: jax.Array, *theta: Any) -> tuple[Stacked, TimeStep]:
        state, ts = self.env.reset(key, *theta)
        frames = jnp.concatenate([self._last_axis(ts.obs)] * self.frames, -1)
        return Stacked(state, frames), ts._replace(obs=frames)

    def step(self, key: jax.Array, state: Stacked, action: Array) -> tuple[Stacked, TimeStep]:
        inner, ts = self.env.step(key, state.env, action)
        obs = self._last_axis(ts.obs)
        frames = jnp.concatenate([state.frames[..., obs.shape[-1] :], obs], -1)
        return Stacked(inner, frames), ts._replace(obs=frames)

    def _last_axis(self, obs: Array) -> Array:
        return obs[..., None] if self._scalar else obs

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


def _with_obs(spec: Spec, space: ObsSpace) -> Spec:
    return replace(spec, obs_shape=space.shape, obs_space=space, obs_sizes=())


def _sizes(space: Discrete | MultiDiscrete) -> tuple[int, ...]:
    return (space.n,) if isinstance(space, Discrete) else space.nvec


def _vector(bound: float | tuple, width: int) -> tuple:
    return bound if isinstance(bound, tuple) else (bound,) * width


def _tiled(bound: float | tuple, times: int) -> float | tuple:
    """The bound of `times` observations joined along their last axis."""
    if not isinstance(bound, tuple):
        return bound
    return tuple(_tiled(b, times) for b in bound) if isinstance(bound[0], tuple) else bound * times


@dataclass(frozen=True)
class TaskWeights(Wrapper):
    """Draws the task of each episode from a set with weights that are `parameters`: a curriculum over tasks.

    `among` names the set, as for `Environment.tasks`; the weights [K] begin equal. Raises `UserError` for an
    environment without sets of tasks.
    """

    among: str = "train"

    def validate(self) -> None:
        self.env.tasks(self.among)

    @property
    def parameters(self) -> Array:
        count = len(jax.tree.leaves(self.env.tasks(self.among))[0])
        return jnp.full(count, 1.0 / count, jnp.float32)

    def reset(self, key: jax.Array, *weights: Any) -> tuple[Any, TimeStep]:
        k_task, key = jax.random.split(key)
        row = jax.random.categorical(k_task, jnp.log(weights[0] if weights else self.parameters))
        return self.env.reset(key, jax.tree.map(lambda x: jnp.asarray(x)[row], self.env.tasks(self.among)))
