"""Specialisation and synchronisation matrix games (Tessera et al., 2025): N agents, A actions, T repetitions.

k_i is the number of agents that chose agent i's action. Specialisation pays 1 / k_i, synchronisation k_i / N. The best
joint play earns 1 a step in both; identical stochastic policies earn at most 1 - (1 - 1/N)^N in specialisation (A = N).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require_at_least
from jaxstack.envs.base import Discrete, Environment, Kind, Spec, TimeStep, first_step


class State(NamedTuple):
    """Previous joint action [N] (-1 at the start) and step."""

    last: Array
    t: Array


@dataclass(frozen=True)
class MatrixGame(Config, Environment):
    """`temporal`: agents see the previous joint action (one-hot, zeros at first); otherwise a constant 1.

    After `horizon` repetitions the game is over (terminated): the sum of T payoffs is the whole return.
    """

    kind: Literal["specialisation", "synchronisation"] = "specialisation"
    num_agents: int = 4
    num_actions: int = 0
    """0: as many as agents."""
    horizon: int = 10
    temporal: bool = True

    def validate(self) -> None:
        require_at_least(self, 1, "num_agents", "horizon")
        require_at_least(self, 0, "num_actions")

    @property
    def actions(self) -> int:
        return self.num_actions or self.num_agents

    @property
    def spec(self) -> Spec:
        return Spec(
            id="matrix_game",
            agents=tuple(f"agent_{i}" for i in range(self.num_agents)),
            obs_shape=(self.num_agents * self.actions if self.temporal else 1,),
            action_space=Discrete(self.actions),
            state_shape=(self.num_agents * self.actions if self.temporal else 1,),
            horizon=self.horizon,
            can_truncate=False,
            shared_reward=False,
        )

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        state = State(jnp.full(self.num_agents, -1, jnp.int32), jnp.int32(0))
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        same = (action[:, None] == action[None]).sum(-1, dtype=jnp.float32)
        reward = 1.0 / same if self.kind == "specialisation" else same / self.num_agents
        state = State(action.astype(jnp.int32), state.t + 1)
        ts = self._see(state)
        return state, ts._replace(reward=reward.astype(jnp.float32), terminated=state.t >= self.horizon)

    def _see(self, state: State) -> TimeStep:
        one_hot = jax.nn.one_hot(state.last, self.actions, dtype=jnp.float32).reshape(-1)
        seen = one_hot if self.temporal else jnp.ones(1, jnp.float32)
        obs = jnp.broadcast_to(seen, (self.num_agents, seen.size))
        return first_step(self.spec, obs, state=seen)

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        return render2d.choices(np.asarray(state.last), self.actions)

    def legend(self) -> tuple[Kind, ...]:
        return (Kind("rows: agents, columns: their last actions", shape="note"),)
