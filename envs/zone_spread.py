"""Zone spread and penalty spread (Schaefer et al., 2023): simple spread of MPE with far landmarks and dear collisions.

Agents must cover all landmarks together. Tasks differ only in what a collision costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require_at_least
from jaxstack.envs.base import Discrete, Kind, Spec, TimeStep, agent_kinds, first_step
from jaxstack.envs.particles import contact_force, distances, moves
from jaxstack.envs.tasks import VariantTasks

RADIUS = 0.15
TASKS = {"zone": 1.0, "penalty-5": 5.0, "penalty-50": 50.0}


class Theta(NamedTuple):
    """Number of the task, cost of a collision."""

    task: Any
    penalty: Any


class State(NamedTuple):
    """Positions and velocities [N, 2], landmarks [N, 2], task, step."""

    pos: Array
    vel: Array
    landmarks: Array
    theta: Theta
    t: Array


@dataclass(frozen=True)
class ZoneSpread(Config, VariantTasks):
    """Reward of an agent: half of minus `penalty` times its collisions with others, and half of minus the distances
    from each landmark to the nearest agent, summed. Agents start in [-1, 1]^2, landmarks lie in [-2, 2]^2. Actions:
    none, -x, +x, -y, +y. The time limit truncates.

    An agent sees its velocity, its position, and the landmarks and other agents relative to it.
    """

    task_set: str = ""
    """Empty: `penalty` is the task. Otherwise `train` (zone), `test` (penalty-5 and penalty-50), `all`, or names of
    tasks, joined by commas; they replace `penalty`."""
    num_agents: int = 3
    penalty: float = 1.0
    horizon: int = 25

    def validate(self) -> None:
        require_at_least(self, 2, "num_agents")
        require_at_least(self, 1, "horizon")
        require_at_least(self, 0, "penalty")
        if self.task_set:
            self.tasks(self.task_set)

    @property
    def spec(self) -> Spec:
        return Spec(
            id="zone_spread",
            agents=tuple(f"agent_{i}" for i in range(self.num_agents)),
            obs_shape=(4 + 2 * self.num_agents + 2 * (self.num_agents - 1),),
            action_space=Discrete(5),
            horizon=self.horizon,
            can_terminate=False,
            truncates_at_horizon=True,
            notes=(
                "the published environment counts a collision of each agent with itself, a constant of -penalty / 2 "
                "per agent and step (-37.5 x penalty in the sum over 3 agents and 25 steps); here it does not",
                "episodes have exactly `horizon` steps",
            ),
        )

    def variants(self) -> Mapping[str, Any]:
        return {name: replace(self, task_set="", penalty=penalty) for name, penalty in TASKS.items()}

    def theta(self, number: int, room: tuple[int, ...]) -> Theta:
        return Theta(np.int32(number), np.float32(self.penalty))

    def begin(self, key: jax.Array, theta: Theta) -> tuple[State, TimeStep]:
        places = jax.random.uniform(key, (2, self.num_agents, 2), jnp.float32, minval=-1.0, maxval=1.0)
        state = State(places[0], jnp.zeros_like(places[0]), 2.0 * places[1], theta, jnp.int32(0))
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        # as in MPE: the position moves with the old velocity
        pos = state.pos + 0.1 * state.vel
        force = 5.0 * moves(action) + contact_force(state.pos, 2 * RADIUS, cut_off=False)
        state = state._replace(pos=pos, vel=0.75 * state.vel + 0.1 * force, t=state.t + 1)
        others = ~np.eye(self.num_agents, dtype=bool)
        hits = ((distances(pos, pos) < 2 * RADIUS) & others).sum(-1, dtype=jnp.float32)
        apart = distances(pos, state.landmarks).min(0).sum()
        reward = -0.5 * state.theta.penalty * hits - 0.5 * apart
        return state, self._see(state)._replace(reward=reward, truncated=state.t >= self.horizon)

    def _see(self, state: State) -> TimeStep:
        count = self.num_agents
        landmarks = (state.landmarks[None] - state.pos[:, None]).reshape(count, -1)
        others = np.array([[j for j in range(count) if j != i] for i in range(count)])
        others = (state.pos[others] - state.pos[:, None]).reshape(count, -1)
        return first_step(self.spec, jnp.concatenate([state.vel, state.pos, landmarks, others], -1))

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        return render2d.particles(np.asarray(state.pos), RADIUS, np.asarray(state.landmarks), 0.05, extent=2.3)

    def legend(self) -> tuple[Kind, ...]:
        return *agent_kinds(self.spec), Kind("landmark", shape="ring")
