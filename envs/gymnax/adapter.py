"""gymnax 1.0 (Lange, 2022) behind our protocol: `gymnax/<id>`, one agent.

Only `step_env` is used: no reset in every step, and the last observation is kept. A time limit truncates.
"""

import typing
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import check_options, options_of
from jaxstack.core.errors import UserError, unknown
from jaxstack.envs.base import (
    Box,
    Discrete,
    Environment,
    Kind,
    Spec,
    TimeStep,
    box_like,
    cached,
    first_step,
    like,
    runs,
)
from jaxstack.envs.libraries import importing

IDS: tuple[str, ...] = (
    "CartPole-v1",
    "Pendulum-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Asterix-MinAtar",
    "Breakout-MinAtar",
    "Freeway-MinAtar",
    "Seaquest-MinAtar",
    "SpaceInvaders-MinAtar",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "MemoryChain-bsuite",
    "UmbrellaChain-bsuite",
    "DiscountingChain-bsuite",
    "SimpleBandit-bsuite",
    "FourRooms-misc",
    "MetaMaze-misc",
    "PointRobot-misc",
    "BernoulliBandit-misc",
    "GaussianBandit-misc",
    "Reacher-misc",
    "Swimmer-misc",
    "Pong-misc",
    "FrozenLake-misc",
)
LAYERS = {
    "Asterix-MinAtar": ("player", "enemy", "trail", "gold"),
    "Breakout-MinAtar": ("paddle", "ball", "where the ball was", "brick"),
    "Freeway-MinAtar": ("chicken", "car"),
    "SpaceInvaders-MinAtar": ("cannon", "alien", "alien, moving left", "alien, moving right", "shot", "alien's shot"),
}
"""What the layers of observations show, in order."""
"""All of gymnax but MNISTBandit-bsuite, which downloads its data when made."""


class State(NamedTuple):
    """The library's state."""

    lib: Any


@dataclass(frozen=True)
class Gymnax(Environment):
    """One gymnax environment; `options` go to its constructor or replace fields of its default parameters."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def spec(self) -> Spec:
        return _spec(self)

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        lib, params = _library(self.name, self.options)
        obs, state = lib.reset_env(key, params)
        return State(state), first_step(self.spec, self._obs(obs))

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        lib, params = _library(self.name, self.options)
        act = action[0]
        if isinstance(self.spec.action_space, Box):
            space = self.spec.action_space
            act = jnp.clip(act, *np.asarray((space.low, space.high), np.float32))
            act = act.reshape(lib.action_space(params).shape)
        obs, new, reward, terminated, _ = lib.step_env(key, state.lib, act, params)
        terminated = jnp.asarray(terminated, bool).reshape(())
        truncated = jnp.asarray(lib.is_truncated(new, params), bool).reshape(()) & ~terminated
        ts = first_step(self.spec, self._obs(obs), terminated=terminated, truncated=truncated)
        return State(like(new, state.lib)), ts._replace(reward=jnp.asarray(reward, jnp.float32).reshape(1))

    def _obs(self, obs: Any) -> Array:
        return jnp.asarray(obs, self.spec.observation.dtype)[None]

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        if self.name.startswith("CartPole"):
            return render2d.cartpole(float(state.lib.x), float(state.lib.theta))
        if self.name.endswith("MinAtar"):
            lib, _ = _library(self.name, self.options)
            return render2d.grid(np.asarray(lib.get_obs(state.lib)))
        return super().frame(state)

    def legend(self) -> tuple[Kind, ...]:
        kinds = tuple(Kind(name, i, "box") for i, name in enumerate(LAYERS.get(self.name, ())))
        return (*kinds, Kind("others: trails, by speed", shape="note")) if self.name.startswith("Freeway") else kinds


def make(rest: str, **options: Any) -> Gymnax:
    """Make `gymnax/<rest>`.

    Args:
        rest: the library's id.
        options: options of the environment's constructor (`map_name="8x8"`) and fields of its parameters
            (`max_steps_in_episode=200`).

    Returns:
        The environment.

    Raises:
        UnknownName: with the nearest ids.
        UserError: for an option that the environment does not take or of another type.
    """
    if rest not in IDS:
        raise unknown("environment", f"gymnax/{rest}", [f"gymnax/{i}" for i in IDS])
    if options:
        constructor, fields = _known(rest)
        options = check_options(options, fields | constructor, f"environment 'gymnax/{rest}'")
    env = Gymnax(rest, tuple(sorted(options.items())))
    return runs(env)  # builds the library's environment now, outside of any trace


@cached(64)
def _known(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of an environment's constructor and the fields of its parameters, with their types."""
    lib, params = _library(name, ())
    return options_of(type(lib)), typing.get_type_hints(type(params))


@cached(64)
def _library(name: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    constructor = _known(name)[0] if options else ()
    with warnings.catch_warnings(), jax.ensure_compile_time_eval():
        warnings.simplefilter("ignore")
        with importing(f"gymnax/{name}"):
            import gymnax

        lib, params = gymnax.make(name, **{k: v for k, v in options if k in constructor})
        return lib, params.replace(**{k: v for k, v in options if k not in constructor})


@cached(64)
def _spec(env: Gymnax) -> Spec:
    lib, params = _library(env.name, env.options)
    obs, _ = jax.eval_shape(lambda k: lib.reset_env(k, params), jax.random.key(0))
    space = lib.action_space(params)
    if hasattr(space, "n"):
        action: Discrete | Box = Discrete(int(space.n))
    else:
        size = int(np.prod(space.shape)) if space.shape else 1
        low, high = (
            np.broadcast_to(np.asarray(b, np.float32), space.shape).reshape(-1) for b in (space.low, space.high)
        )
        action = Box((size,), tuple(map(float, low)), tuple(map(float, high)))
    seen = lib.observation_space(params)
    named = hasattr(seen, "n") and obs.shape == ()
    limit = int(np.ceil(params.max_steps_in_episode))  # one environment counts in fractions
    if limit < 1:
        raise UserError(f"environment 'gymnax/{env.name}': max_steps_in_episode={limit}, expected at least 1")
    return Spec(
        id=f"gymnax/{env.name}",
        agents=("agent_0",),
        obs_shape=tuple(obs.shape),
        action_space=action,
        obs_space=Discrete(int(seen.n)) if named else box_like(tuple(obs.shape), seen, obs.dtype),
        horizon=limit,
        truncates_at_horizon=True,
        shared_reward=True,
        notes=("the time limit truncates and the last observation is kept", "actions are clipped to their bounds"),
    )
