"""Two tasks of one size that differ in what the reward needs: `match_now` the present cue, `repeat_last` the last one.

Written for this project (checks of `decpomdp-probes`). Two agents, each with a private uniform cue per step; the team
earns the share of agents that name theirs. Best mean reward per step: 1 for match_now without memory; for repeat_last
(from the second step on) 1/M without memory, 1 with it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require_at_least
from jaxstack.envs.base import Discrete, Environment, Kind, Spec, TimeStep, first_step


class State(NamedTuple):
    """Cues of this step and the one before [2] (-1 at the start), the last actions [2] (-1), step."""

    cue: Array
    last_cue: Array
    last: Array
    t: Array


@dataclass(frozen=True)
class MatchNow(Config, Environment):
    """Reward: the share of agents whose action equals their own cue of this step. The time limit truncates."""

    symbols: int = 2
    """M, the number of cues and actions."""
    horizon: int = 16

    def validate(self) -> None:
        require_at_least(self, 2, "symbols")
        require_at_least(self, 1, "horizon")

    @property
    def id(self) -> str:
        return "match_now"

    @property
    def spec(self) -> Spec:
        return Spec(
            id=self.id,
            agents=("agent_0", "agent_1"),
            obs_shape=(self.symbols,),
            action_space=Discrete(self.symbols),
            horizon=self.horizon,
            can_terminate=False,
            truncates_at_horizon=True,
            shared_reward=True,
            notes=("actions do not influence later cues",),
        )

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        none = jnp.full(2, -1, jnp.int32)
        state = State(jax.random.randint(key, (2,), 0, self.symbols, jnp.int32), none, none, jnp.int32(0))
        return state, self._see(state)

    def wanted(self, state: State) -> Array:
        """[2] the action that earns the reward."""
        return state.cue

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        reward = (action == self.wanted(state)).mean(dtype=jnp.float32)
        cue = jax.random.randint(key, (2,), 0, self.symbols, jnp.int32)
        state = State(cue, state.cue, action.astype(jnp.int32), state.t + 1)
        ts = self._see(state)
        return state, ts._replace(reward=jnp.broadcast_to(reward, (2,)), truncated=state.t >= self.horizon)

    def _see(self, state: State) -> TimeStep:
        return first_step(self.spec, jax.nn.one_hot(state.cue, self.symbols, dtype=jnp.float32))

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        return render2d.choices(np.asarray(state.last), self.symbols)

    def legend(self) -> tuple[Kind, ...]:
        return (Kind("rows: agents, columns: their last actions", shape="note"),)


@dataclass(frozen=True)
class RepeatLast(MatchNow):
    """Reward: the share of agents whose action equals their own cue of the step BEFORE; none in the first step."""

    @property
    def id(self) -> str:
        return "repeat_last"

    def wanted(self, state: State) -> Array:
        return state.last_cue
