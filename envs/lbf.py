"""Level-based foraging (Albrecht & Ramamoorthy, 2013; Papoudakis et al., 2021), as in the library lbforaging.

Agents with levels walk on a grid; those next to a food who load at the same time take it, if their levels together
reach its level. Foods lie so far apart that no cell is next to two of them (the spawn rule keeps |rows| + |columns|
between foods at 3 or more), so the order in which foods are treated cannot matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.envs.base import Discrete, Kind, Spec, TimeStep, agent_kinds, first_step
from jaxstack.envs.tasks import VariantTasks, one_of

LOAD = 5
# none, N, S, W, E, load as (row, column)
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))


class Theta(NamedTuple):
    """Number of the task, which rows [H] and columns [W] are in the field, which foods [F] exist, whether every food
    needs several agents, what a failed attempt costs."""

    task: Any
    rows: Any
    columns: Any
    foods: Any
    coop: Any
    penalty: Any


class State(NamedTuple):
    """Cells (row, column) [N, 2] and levels [N] of the agents, cells [F, 2] and levels [F] (0: taken or absent) of the
    foods, the sum of their levels at the start, size of the field [2], task, step."""

    pos: Array
    level: Array
    food: Array
    food_level: Array
    spawned: Array
    size: Array
    theta: Theta
    t: Array


@dataclass(frozen=True)
class Lbf(Config, VariantTasks):
    """Actions: none, N, S, W, E, load. Agents that take a food earn its level times their share of their levels,
    divided by the sum of all foods' levels: a whole episode pays 1 in sum. Ends when no food is left; the time limit
    truncates.

    An agent sees the (2 sight + 1)^2 cells around it in three layers: levels of agents, levels of foods, whether an
    agent could stand there.
    """

    task_set: str = ""
    """Empty: the options below are the task. MATE's sets for 2 or 4 agents: `train`, `test`, `all`, or names of tasks
    such as `10x10-2p-2f-coop`, joined by commas; they replace height, width, num_food, coop and penalty."""
    num_agents: int = 2
    height: int = 8
    width: int = 8
    num_food: int = 2
    coop: bool = False
    """Every food has the sum of the three smallest levels of agents, instead of a random level up to it."""
    penalty: float = 0.0
    """Subtracted from agents that try to load a food which is too heavy for them."""
    max_player_level: int = 2
    sight: int = 2
    horizon: int = 50

    def validate(self) -> None:
        require_at_least(self, 1, "num_agents", "num_food", "max_player_level", "sight", "horizon")
        require_at_least(self, 3, "height", "width")
        require_at_least(self, 0, "penalty")
        field = f"on a {self.height}x{self.width} field"
        require(self, "num_food", self.num_food <= self.most_food, f"at most {self.most_food} {field}")
        inner = (self.height - 2) * (self.width - 2)
        require(self, "num_agents", self.num_agents < inner, f"less than {inner} {field}")
        if self.task_set:
            self.tasks(self.task_set)

    @property
    def most_food(self) -> int:
        """Foods of a regular pattern that are nowhere closer than 3 in the sum of rows and columns."""
        rows, columns = np.indices((self.height - 2, self.width - 2))
        return int(np.bincount((rows + 2 * columns).ravel() % 5).max())

    @property
    def spec(self) -> Spec:
        return Spec(
            id="lbf",
            agents=tuple(f"agent_{i}" for i in range(self.num_agents)),
            obs_shape=(3 * (2 * self.sight + 1) ** 2,),
            action_space=Discrete(6),
            horizon=self.horizon,
            truncates_at_horizon=True,
            notes=(
                "an agent whose move fails keeps its cell; lbforaging lets a third agent enter it",
                "the time limit truncates; lbforaging terminates",
                "episodes have exactly `horizon` steps unless all food is taken",
            ),
        )

    def variants(self) -> Mapping[str, Any]:
        tasks: dict[str, dict] = {}
        for n, more in ((2, 4), (4, 6)):
            tasks |= {
                f"8x8-{n}p-{n}f": {"num_food": n},
                f"10x10-{n}p-2f-coop": {"num_food": 2, "coop": True},
                f"15x15-{n}p-{more}f": {"num_food": more},
                f"15x15-{n}p-{n}f-pen": {"num_food": n, "penalty": 0.1},
            }
        out = {}
        for name, options in tasks.items():
            size, agents = name.split("-")[:2]
            side = int(size.split("x")[0])
            fixed = {"task_set": "", "coop": False, "penalty": 0.0, "height": side, "width": side}
            out[name] = replace(self, **fixed | options, num_agents=int(agents[:-1]))
        return out

    @property
    def needs(self) -> tuple[int, ...]:
        return self.height, self.width, self.num_food

    def theta(self, number: int, room: tuple[int, ...]) -> Theta:
        rows, columns, foods = (np.arange(most) < count for most, count in zip(room, self.needs))
        return Theta(np.int32(number), rows, columns, foods, np.bool_(self.coop), np.float32(self.penalty))

    def begin(self, key: jax.Array, theta: Theta) -> tuple[State, TimeStep]:
        count, foods = self.num_agents, theta.foods.shape[0]
        cells, levels = jax.random.uniform(key, (2, count + foods), jnp.float32)
        inside = theta.rows[:, None] & theta.columns[None]
        size = jnp.stack([theta.rows.sum(dtype=jnp.int32), theta.columns.sum(dtype=jnp.int32)])
        row, column = (jnp.arange(n, dtype=jnp.int32) for n in inside.shape)
        row, column = row[:, None], column[None]
        level = 1 + (levels[:count] * self.max_player_level).astype(jnp.int32)
        most = jnp.sort(level)[:3].sum(dtype=jnp.int32)
        free, pos, food, food_level = inside, [], [], []
        for i in range(count):
            cell, _ = one_of(free, cells[i])
            free &= (row != cell[0]) | (column != cell[1])
            pos.append(cell)
        free &= (row > 0) & (row < size[0] - 1) & (column > 0) & (column < size[1] - 1)
        for i in range(foods):
            cell, found = one_of(free, cells[count + i])
            exists = found & theta.foods[i]
            drawn = 1 + (levels[count + i] * most).astype(jnp.int32)
            free &= (jnp.abs(row - cell[0]) + jnp.abs(column - cell[1]) > 2) | ~exists
            # where no room is left there is one food less, as in the library after 1000 tries
            food.append(jnp.where(exists, cell, -1))
            food_level.append(jnp.where(exists, jnp.where(theta.coop, most, drawn), 0))
        food_level = jnp.stack(food_level)
        spawned = food_level.sum(dtype=jnp.float32)
        state = State(jnp.stack(pos), level, jnp.stack(food), food_level, spawned, size, theta, jnp.int32(0))
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        there = state.food_level > 0
        want = state.pos + jnp.asarray(MOVES, jnp.int32)[action]
        inside = ((want >= 0) & (want < state.size)).all(-1)
        blocked = ((want[:, None] == state.food).all(-1) & there).any(-1)
        pos = stop_collisions(state.pos, jnp.where((inside & ~blocked)[:, None], want, state.pos))
        near = (jnp.abs(pos[:, None] - state.food).sum(-1) == 1) & there & (action == LOAD)[:, None]
        level, food_level = state.level.astype(jnp.float32), state.food_level.astype(jnp.float32)
        share = near * level[:, None]
        total = share.sum(0)
        tried = near.any(0)
        taken = tried & (total >= food_level)
        pay = jnp.where(taken, food_level / jnp.maximum(total * state.spawned, 1.0), 0.0)
        fine = jnp.where(tried & ~taken, state.theta.penalty, 0.0)
        reward = (share * pay - near * fine).sum(-1)
        state = state._replace(pos=pos, food_level=jnp.where(taken, 0, state.food_level), t=state.t + 1)
        done = (state.food_level == 0).all()
        ts = self._see(state)
        return state, ts._replace(reward=reward, terminated=done, truncated=(state.t >= self.horizon) & ~done)

    def _see(self, state: State) -> TimeStep:
        view = np.indices((2 * self.sight + 1,) * 2).reshape(2, -1).T - self.sight
        cell = state.pos[:, None] + jnp.asarray(view, jnp.int32)  # [N, K, 2]
        level, food_level = state.level.astype(jnp.float32), state.food_level.astype(jnp.float32)
        agents = ((cell[:, :, None] == state.pos).all(-1) * level).sum(-1)
        foods = ((cell[:, :, None] == state.food).all(-1) * food_level).sum(-1)
        inside = ((cell >= 0) & (cell < state.size)).all(-1)
        free = (inside & (agents == 0) & (foods == 0)).astype(jnp.float32)
        left = state.food_level.sum(dtype=jnp.float32) / state.spawned
        return first_step(self.spec, jnp.concatenate([agents, foods, free], -1), info={"food_taken": 1.0 - left})

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        height, width = state.size.tolist()
        foods = [(*p, str(n), 2) for p, n in zip(state.food.tolist(), state.food_level.tolist()) if n]
        agents = [(*p, str(n), i) for i, (p, n) in enumerate(zip(state.pos.tolist(), state.level.tolist()))]
        return render2d.board(height, width, agents, foods)

    def legend(self) -> tuple[Kind, ...]:
        return *agent_kinds(self.spec), Kind("food", 2, "box"), Kind("numbers: levels", shape="note")


def stop_collisions(pos: Array, want: Array) -> Array:
    """Cells [N, 2] after moves from `pos` to `want`: agents that want the same cell stay, and so do those whose cell is
    kept by an agent that stays. Two agents may change places."""
    count = pos.shape[0]
    other = ~jnp.eye(count, dtype=bool)

    def stop(want: Array) -> Array:
        clash = ((want[:, None] == want).all(-1) & other).any(-1)
        return jnp.where(clash[:, None], pos, want)

    # the first pass stops two agents or none, each later one another
    for _ in range(count - 1):
        want = stop(want)
    return want
