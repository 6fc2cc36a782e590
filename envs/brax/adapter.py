"""brax 0.14 environments (Freeman et al., 2021) behind our protocol: `brax/<id>`, one agent, actions in [-1, 1].

Only the physics environments are used, without brax's wrappers: its auto-reset returns to one stored start state.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import check_options, options_of
from jaxstack.core.errors import UserError, unknown
from jaxstack.envs.base import Box, Environment, Spec, TimeStep, cached, first_step, like, runs
from jaxstack.envs.brax import fast
from jaxstack.envs.libraries import importing

IDS: tuple[str, ...] = (
    "ant",
    "halfcheetah",
    "hopper",
    "humanoid",
    "humanoidstandup",
    "inverted_pendulum",
    "inverted_double_pendulum",
    "pusher",
    "reacher",
    "walker2d",
)
"""All of brax but `swimmer`, which fails with this jax."""

BACKENDS = ("spring", "positional", "generalized", "mjx")
ENDLESS = ("halfcheetah", "humanoidstandup", "pusher", "reacher")


class State(NamedTuple):
    """The library's state and our own step counter."""

    lib: Any
    t: Array


@dataclass(frozen=True)
class Brax(Environment):
    """One brax environment. The time limit `episode_length` truncates; falling terminates."""

    name: str
    backend: str = "spring"
    episode_length: int = 1000
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def lib(self) -> Any:
        return _library(self.name, self.backend, self.options)

    @property
    def spec(self) -> Spec:
        return _spec(self)

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        lib_state = self.lib.reset(key)
        return State(lib_state, jnp.int32(0)), first_step(self.spec, lib_state.obs[None].astype(jnp.float32))

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        # a copy: some tasks write into the metrics of the state that they are given
        lib_state = self.lib.step(jax.tree.map(lambda x: x, state.lib), jnp.clip(action[0], -1.0, 1.0))
        lib_state = like(lib_state, state.lib)
        t = state.t + 1
        done = lib_state.done.astype(bool)
        ts = first_step(
            self.spec, lib_state.obs[None].astype(jnp.float32), reward=lib_state.reward[None].astype(jnp.float32)
        )
        return State(lib_state, t), ts._replace(terminated=done, truncated=(t >= self.episode_length) & ~done)

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        return render2d.side_view(np.asarray(state.lib.pipeline_state.x.pos))


def make(rest: str, backend: str = "spring", episode_length: int = 1000, **options: Any) -> Brax:
    """`brax/<rest>`; raises `UserError` for an unknown backend. Other options go to brax."""
    if rest not in IDS:
        raise unknown("environment", f"brax/{rest}", [f"brax/{i}" for i in IDS])
    with importing(f"brax/{rest}"):
        from brax import envs as brax_envs

    owner = f"environment 'brax/{rest}'"
    known = options_of(brax_envs._envs[rest]) | {"backend": Literal[BACKENDS], "episode_length": int}
    known.pop("sys", None)  # made by the task
    checked = check_options({"backend": backend, "episode_length": episode_length} | options, known, owner)
    backend, episode_length = checked.pop("backend"), checked.pop("episode_length")
    if episode_length < 1:
        raise UserError(f"{owner}: episode_length={episode_length}: expected at least 1")
    env = Brax(rest, backend, episode_length, tuple(sorted(checked.items())))
    return runs(env)


@cached(16)
def _library(name: str, backend: str, options: tuple[tuple[str, Any], ...]) -> Any:
    with warnings.catch_warnings(), jax.ensure_compile_time_eval():
        warnings.simplefilter("ignore")
        with importing(f"brax/{name}"):
            from brax import envs as brax_envs

        return fast.faster(brax_envs.get_environment(name, backend=backend, **dict(options)))


@cached(16)
def _spec(env: Brax) -> Spec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Spec(
            id=f"brax/{env.name}",
            agents=("agent_0",),
            obs_shape=(int(env.lib.observation_size),),
            action_space=Box((int(env.lib.action_size),), -1.0, 1.0),
            horizon=env.episode_length,
            truncates_at_horizon=True,
            can_terminate=env.name not in ENDLESS,
            shared_reward=True,
            notes=("brax's episode and auto-reset wrappers are not used", "actions are clipped to [-1, 1]"),
        )
