"""Environments of one agent given by deterministic tables, with actions that slip.

With probability eps the action is replaced by one drawn uniformly from all of them, which is action randomisation
(Qian et al., 2026, Algorithm 1): p_eps(.|s, a) = (1 - eps) p(.|s, a) + eps mean_a' p(.|s, a').
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.envs.base import Discrete, Environment, Spec, TimeStep, first_step


class Tables(NamedTuple):
    """What each action does in each state, if it is carried out."""

    next_state: Int[np.ndarray, "S A"]
    reward: Float[np.ndarray, "S A"]
    done: Bool[np.ndarray, "S A"]
    """Whether the episode ends."""
    start: Float[np.ndarray, " S"]
    """Law of the first state."""


class State(NamedTuple):
    """State id, step and this episode's probability of a slip."""

    place: Array
    t: Array
    eps: Array


@dataclass(frozen=True)
class TableEnv(Config, Environment):
    """One agent that observes the state's id. The time limit truncates."""

    eps: float = 0.0
    """Probability with which an action is replaced by a uniform one."""
    eps_spread: float = 0.0
    """Domain randomisation: each episode draws its own probability, uniform on eps +- eps_spread; the mean is eps."""
    horizon: int = 200

    def validate(self) -> None:
        require_at_least(self, 1, "horizon")
        require(self, "eps", 0.0 <= self.eps <= 1.0, "a number in [0, 1]")
        room = min(self.eps, 1.0 - self.eps)
        require(
            self, "eps_spread", 0.0 <= self.eps_spread <= room + 1e-9, f"0 to {room:g}, so that eps stays in [0, 1]"
        )

    @property
    def id(self) -> str:
        raise UserError(f"{type(self).__name__} declares no id")

    @property
    def tables(self) -> Tables:
        raise UserError(f"{type(self).__name__} declares no tables")

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    @property
    def spec(self) -> Spec:
        states, actions = self.tables.next_state.shape
        return Spec(
            id=self.id,
            agents=("agent_0",),
            obs_shape=(),
            obs_space=Discrete(states),
            action_space=Discrete(actions),
            horizon=self.horizon,
            notes=self.notes,
        )

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        k_place, k_eps = jax.random.split(key)
        starts = np.flatnonzero(self.tables.start)
        place = jnp.int32(starts[0])
        if len(starts) > 1:
            # the laws of all tables are uniform over their starts
            place = jnp.asarray(starts, jnp.int32)[jax.random.randint(k_place, (), 0, len(starts), jnp.int32)]
        eps = jnp.float32(self.eps)
        if self.eps_spread:
            eps = eps + self.eps_spread * jax.random.uniform(k_eps, (), jnp.float32, -1.0, 1.0)
        state = State(place, jnp.int32(0), eps)
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        tables = self.tables
        chosen = action[0].astype(jnp.int32)
        if self.eps:
            count = tables.next_state.shape[1]
            # one number decides both: below eps it names the action as well
            u = jax.random.uniform(key, (), jnp.float32)
            other = jnp.minimum((u / jnp.maximum(state.eps, 1e-9) * count).astype(jnp.int32), count - 1)
            chosen = jnp.where(u < state.eps, other, chosen)
        index = (state.place, chosen)
        done = jnp.asarray(tables.done)[index]
        state = State(jnp.asarray(tables.next_state, jnp.int32)[index], state.t + 1, state.eps)
        reward = jnp.asarray(tables.reward, jnp.float32)[index]
        ts = self._see(state)._replace(
            reward=reward[None], terminated=done, truncated=(state.t >= self.horizon) & ~done
        )
        return state, ts

    def _see(self, state: State) -> TimeStep:
        return first_step(self.spec, state.place[None])
