"""Boulder push (Christianos, Papoudakis & Albrecht, 2022, and MATE): agents push a boulder as wide as they are many.

The boulder moves only if all agents stand behind it and all push in the same step. The environment is that of the
library boulderpush.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.envs.base import Discrete, Kind, Spec, TimeStep, agent_kinds, first_step
from jaxstack.envs.tasks import VariantTasks, one_of

SIZES = {"tiny": 5, "small": 8, "medium": 12, "large": 20}
DIRECTIONS = ("north", "south", "west", "east")
# N, S, W, E as (row, column)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


class Theta(NamedTuple):
    """Number of the task, which rows [H] are in the field (it is square), what walking into the boulder costs."""

    task: Any
    rows: Any
    penalty: Any


class State(NamedTuple):
    """Cells (row, column) of the agents [N, 2] and of the boulder's first cell [2], direction of the push (N, S, W, E),
    rows of the field, task, step."""

    pos: Array
    boulder: Array
    direction: Array
    side: Array
    theta: Theta
    t: Array


@dataclass(frozen=True)
class BoulderPush(Config, VariantTasks):
    """Actions: N, S, W, E. A push pays `incentive` to each agent, and 1 more when the boulder reaches the edge, which
    ends the episode; the time limit truncates. Where no push happens, agents move one after another in random order.

    An agent sees the direction (one-hot) and the (2 sight + 1)^2 cells around it in two layers, agents and boulder.
    """

    task_set: str = ""
    """Empty: the options below are the task. MATE's sets: `train`, `test`, `all`, or names of tasks such as
    `medium-pen-2ag`, joined by commas; they replace height, width and penalty."""
    num_agents: int = 2
    height: int = 8
    width: int = 8
    penalty: float = 0.0
    """Subtracted from an agent that walks into the boulder."""
    incentive: float = 0.1
    direction: Literal["any", "north", "south", "west", "east"] = "any"
    """Of the push; `any` draws one per episode."""
    sight: int = 4
    horizon: int = 50

    def validate(self) -> None:
        require_at_least(self, 1, "num_agents", "horizon", "sight")
        require_at_least(self, 3, "height", "width")
        require_at_least(self, 0, "penalty")
        require(self, "width", self.width == self.height, f"height={self.height}: boulder fields are square")
        require(self, "num_agents", self.num_agents <= self.height, f"at most {self.height}, the width of the field")
        if self.task_set:
            self.tasks(self.task_set)

    @property
    def spec(self) -> Spec:
        return Spec(
            id="boulder_push",
            agents=tuple(f"agent_{i}" for i in range(self.num_agents)),
            obs_shape=(4 + 2 * (2 * self.sight + 1) ** 2,),
            action_space=Discrete(4),
            horizon=self.horizon,
            truncates_at_horizon=True,
            notes=(
                "square fields alone; boulderpush checks columns against its number of rows",
                "episodes are truncated after exactly `horizon` steps; boulderpush has no time limit",
            ),
        )

    def variants(self) -> Mapping[str, Any]:
        tasks = {"small": 0.0, "medium": 0.0, "large": 0.0, "small-pen": 0.01, "medium-pen": 0.01}
        out = {}
        for agents in (1, 2, 3, 4):
            for name, penalty in tasks.items():
                side = SIZES[name.split("-")[0]]
                options: dict[str, Any] = {"height": side, "width": side, "penalty": penalty, "num_agents": agents}
                out[f"{name}-{agents}ag"] = replace(self, task_set="", **options)
        return out

    @property
    def needs(self) -> tuple[int, ...]:
        return (self.height,)

    def theta(self, number: int, room: tuple[int, ...]) -> Theta:
        return Theta(np.int32(number), np.arange(room[0]) < self.height, np.float32(self.penalty))

    def begin(self, key: jax.Array, theta: Theta) -> tuple[State, TimeStep]:
        count = self.num_agents
        towards, along, across, *cells = jax.random.uniform(key, (3 + count,), jnp.float32)
        side = theta.rows.sum(dtype=jnp.int32)
        below = lambda uniform, n: (uniform * n).astype(jnp.int32)
        direction = below(towards, 4) if self.direction == "any" else jnp.int32(DIRECTIONS.index(self.direction))
        first = jnp.stack([1 + below(across, side - 2), below(along, side - count + 1)])
        boulder = jnp.where(direction < 2, first, first[::-1])
        inside = theta.rows[:, None] & theta.rows[None]
        row, column = (jnp.arange(n, dtype=jnp.int32) for n in inside.shape)
        row, column = row[:, None], column[None]
        free, pos = inside & ~_on(jnp.stack(jnp.broadcast_arrays(row, column), -1), boulder, direction, count), []
        for uniform in cells:
            cell, _ = one_of(free, uniform)
            free &= (row != cell[0]) | (column != cell[1])
            pos.append(cell)
        state = State(jnp.stack(pos), boulder, direction, side, theta, jnp.int32(0))
        return state, self._see(state, jnp.bool_(False))

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        count = self.num_agents
        moves = jnp.asarray(MOVES, jnp.int32)
        ahead = moves[state.direction]
        behind = _on(state.pos, state.boulder - ahead, state.direction, count).all()
        push = behind & (action == state.direction).all()
        want = state.pos + moves[action]
        inside = ((want >= 0) & (want < state.side)).all(-1)
        hits = _on(want, state.boulder, state.direction, count)
        order = jnp.argsort(jax.random.uniform(key, (count,), jnp.float32)) if count > 1 else jnp.zeros(1, jnp.int32)
        pos = state.pos
        for k in range(count):
            turn = jnp.arange(count, dtype=jnp.int32) == order[k]
            taken = (want[:, None] == pos).all(-1).any(-1)
            goes = turn & inside & ~taken & ~hits
            pos = jnp.where(goes[:, None], want, pos)
        pos = jnp.where(push, state.pos + ahead, pos)
        boulder = jnp.where(push, state.boulder + ahead, state.boulder)
        # the cell of a boulder holds no agent, so hitting it never depends on the order
        reward = jnp.where(push, self.incentive, -state.theta.penalty * hits)
        edge = jnp.where(state.direction % 2 == 0, 0, state.side - 1)
        done = push & (boulder[state.direction // 2] == edge)
        state = state._replace(pos=pos, boulder=boulder, t=state.t + 1)
        ts = self._see(state, done)
        reward = (reward + done).astype(jnp.float32)
        return state, ts._replace(reward=reward, terminated=done, truncated=(state.t >= self.horizon) & ~done)

    def _see(self, state: State, solved: Array) -> TimeStep:
        view = np.indices((2 * self.sight + 1,) * 2).reshape(2, -1).T - self.sight
        cell = state.pos[:, None] + jnp.asarray(view, jnp.int32)  # [N, K, 2]
        agents = (cell[:, :, None] == state.pos).all(-1).any(-1)
        boulder = _on(cell, state.boulder, state.direction, self.num_agents)
        towards = jnp.broadcast_to(jax.nn.one_hot(state.direction, 4, dtype=jnp.float32), (self.num_agents, 4))
        obs = jnp.concatenate([towards, agents.astype(jnp.float32), boulder.astype(jnp.float32)], -1)
        return first_step(self.spec, obs, info={"solved": solved.astype(jnp.float32)})

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        side, direction = int(state.side), int(state.direction)
        cells = [
            np.asarray(state.boulder) + k * np.eye(2, dtype=int)[1 - direction // 2] for k in range(len(state.pos))
        ]
        edge = 0 if direction % 2 == 0 else side - 1
        goals = [(edge, c) if direction < 2 else (r, edge) for r, c in np.asarray(cells).tolist()]
        return render2d.board(
            side,
            side,
            [(*p, str(i), i) for i, p in enumerate(state.pos.tolist())],
            [(*c, DIRECTIONS[direction][0].upper(), 7) for c in np.asarray(cells).tolist()],
            [(*g, "", 2) for g in goals],
        )

    def legend(self) -> tuple[Kind, ...]:
        return *agent_kinds(self.spec), Kind("boulder, way to push", 7, "box"), Kind("goal", 2, "ring")


def _on(cells: Array, first: Array, direction: Array, count: int) -> Array:
    """Which cells [..., 2] are on the line of `count` cells from `first`, across the direction of the push."""
    apart = cells - first
    rows, columns = apart[..., 0], apart[..., 1]
    across, along = jnp.where(direction < 2, rows, columns), jnp.where(direction < 2, columns, rows)
    return (across == 0) & (along >= 0) & (along < count)
