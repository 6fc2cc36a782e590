"""Hidden corner: two agents must meet in a corner that nobody shows them, with moves that may be turned by 90 degrees.

Written for this project as the smallest test of task embeddings (`mate`); no library has it. Neither the corner, nor
the turn, nor the reward is in the observations: only a policy that remembers what its moves did and what was paid can
know the task.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require_at_least
from jaxstack.envs.base import Discrete, Kind, Spec, TimeStep, agent_kinds, first_step
from jaxstack.envs.tasks import TaskEnvironment

CORNERS = ("nw", "ne", "sw", "se")
TEST = ("ne-turned", "sw")
"""Held out; each corner and each turn occurs in training, in other combinations."""
# stay, N, S, W, E as (row, column)
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))


class Theta(NamedTuple):
    """Number of the task, corner [2] as 0 or 1 per axis (row, column), whether moves are turned."""

    task: Any
    corner: Any
    turned: Any


class State(NamedTuple):
    """Cells (row, column) of the agents [2, 2], task, step."""

    pos: Array
    theta: Theta
    t: Array


@dataclass(frozen=True)
class HiddenCorner(Config, TaskEnvironment):
    """Actions: stay, N, S, W, E, turned clockwise (N moves E) where the task says so. When both agents are on the
    hidden corner, each earns 1 and both are put on random cells; agents may share cells. The time limit truncates.

    An agent sees its own cell and its partner's (row, column), as shares of the field.
    """

    task_set: str = "train"
    """`train` (6 tasks), `test` (2), `all`, or names of tasks such as `nw` or `se-turned`, joined by commas."""
    size: int = 5
    horizon: int = 20

    def validate(self) -> None:
        require_at_least(self, 2, "size")
        require_at_least(self, 1, "horizon")
        self.tasks(self.task_set)

    @property
    def spec(self) -> Spec:
        return Spec(
            id="hidden_corner",
            agents=("agent_0", "agent_1"),
            obs_shape=(4,),
            action_space=Discrete(5),
            horizon=self.horizon,
            can_terminate=False,
            truncates_at_horizon=True,
            shared_reward=True,
            notes=("an environment of this project", "neither task nor reward is observed", "agents may share cells"),
        )

    def catalogue(self) -> dict[str, Theta]:
        every = {f"{c}{turn}": (i, turn) for turn in ("", "-turned") for i, c in enumerate(CORNERS)}
        names = [n for n in every if n not in TEST] + list(TEST)
        out = {}
        for number, name in enumerate(names):
            corner, turn = every[name]
            out[name] = Theta(np.int32(number), np.array(divmod(corner, 2), np.int32), np.bool_(turn))
        return out

    def sets(self) -> dict[str, tuple[str, ...]]:
        return {"train": tuple(n for n in self.catalogue() if n not in TEST), "test": TEST}

    def begin(self, key: jax.Array, theta: Theta) -> tuple[State, TimeStep]:
        state = State(self._cells(key), theta, jnp.int32(0))
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        pos = moved(state.pos, state.theta.turned, action, self.size)
        met = (pos == state.theta.corner * (self.size - 1)).all()
        state = State(jnp.where(met, self._cells(key), pos), state.theta, state.t + 1)
        reward = jnp.broadcast_to(met.astype(jnp.float32), (2,))
        return state, self._see(state)._replace(reward=reward, truncated=state.t >= self.horizon)

    def _cells(self, key: jax.Array) -> Array:
        return (jax.random.uniform(key, (2, 2), jnp.float32) * self.size).astype(jnp.int32)

    def _see(self, state: State) -> TimeStep:
        share = state.pos.astype(jnp.float32) / (self.size - 1)
        return first_step(self.spec, jnp.concatenate([share, share[::-1]], -1))

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        corner = np.asarray(state.theta.corner) * (self.size - 1)
        agents = [(*p, str(i), i) for i, p in enumerate(state.pos.tolist())]
        return render2d.board(self.size, self.size, agents, marks=[(*corner.tolist(), "", 2)])

    def legend(self) -> tuple[Kind, ...]:
        return *agent_kinds(self.spec), Kind("hidden corner", 2, "ring")


def moved(pos: Array, turned: Array, action: Array, size: int) -> Array:
    """Cells [..., 2] after actions [...], on a field of `size` cells a side; borders stop a move."""
    step = jnp.asarray(MOVES, jnp.int32)[action]
    clockwise = jnp.stack([step[..., 1], -step[..., 0]], -1)
    return jnp.clip(pos + jnp.where(turned, clockwise, step), 0, size - 1)


def optimum(theta: Theta, env: HiddenCorner = HiddenCorner()) -> float:
    """Compute the expected return per agent of the best team that knows the task, from a random start.

    A breadth-first search gives every cell's distance D to the corner. Both agents walk the shortest way, so a reward
    comes after the larger of two independent distances, at least one step, and then everything starts anew:
    W(h) = sum_d P(D = d) [d <= h] (1 + W(h - d)), the return is W(T).

    Args:
        theta: A task of `env`, without a leading axis.
        env: Gives size and horizon.

    Returns:
        The expected undiscounted return of each agent per episode.
    """
    size = env.size
    cells = jnp.asarray(np.argwhere(np.ones((size, size))), jnp.int32)
    ahead = [moved(cells, jnp.asarray(theta.turned), jnp.full(len(cells), a), size) for a in range(len(MOVES))]
    after = np.stack([np.asarray(x) @ [size, 1] for x in ahead], -1)  # [cells, actions]
    goal = int(np.asarray(theta.corner) @ [size, 1]) * (size - 1)
    distance = np.where(np.arange(len(cells)) == goal, 0, len(cells))
    while (closer := np.minimum(distance, distance[after].min(1) + 1)).sum() < distance.sum():
        distance = closer
    longest = np.maximum(np.maximum(distance[:, None], distance[None]), 1)
    share = np.bincount(longest.ravel(), minlength=env.horizon + 1) / longest.size
    worth = np.zeros(env.horizon + 1)
    for left in range(1, env.horizon + 1):
        worth[left] = sum(share[d] * (1 + worth[left - d]) for d in range(1, left + 1))
    return float(worth[-1])
