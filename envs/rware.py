"""Robotic warehouse (Christianos, Papoudakis & Albrecht, 2020; Papoudakis et al., 2021): robots bring requested shelves
to goals.

A robot drives forward, turns, and lifts or puts down the shelf in its cell; with a shelf it cannot pass under others.
Layouts are data: a map gives each shelf cell the number of its shelf and 0 to highways, so one program serves all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.envs.base import Discrete, Kind, Spec, TimeStep, first_step
from jaxstack.envs.tasks import VariantTasks

FORWARD, LEFT, RIGHT, TOGGLE = 1, 2, 3, 4
# directions up, down, left, right: the cell ahead, the cell to the right, the direction after a turn to either side
AHEAD = ((-1, 0), (1, 0), (0, -1), (0, 1))
SIDE = ((0, 1), (0, -1), (-1, 0), (1, 0))
TURNED = ((0, 1, 2, 3), (0, 1, 2, 3), (2, 3, 1, 0), (3, 2, 0, 1), (0, 1, 2, 3))
"""By action and direction."""
HEIGHTS = range(3, 11)


class Theta(NamedTuple):
    """Number of the task, size of the map [2], the number of the shelf that starts in each cell (from 1 on, 0: highway)
    [H, W], how many shelves there are, cells of the goals [G, 2] (-1: absent)."""

    task: Any
    size: Any
    shelves: Any
    count: Any
    goals: Any


class State(NamedTuple):
    """Cells (row, column) [N, 2], directions [N] and carried shelves [N] (0: none) of the robots, standing shelves
    [H, W] (0: none), requested shelves [Q], task, step."""

    pos: Array
    direction: Array
    load: Array
    standing: Array
    requests: Array
    theta: Theta
    t: Array


@dataclass(frozen=True)
class Rware(Config, VariantTasks):
    """Actions: none, forward, left, right, load or unload. A requested shelf on a goal pays 1 to the robot under it,
    and another shelf is requested at random. Shelves are put down anywhere but on highways. The time limit truncates.

    An agent sees the (2 sight + 1)^2 cells around it, turned so that it faces up, in five layers: shelves, requested
    shelves, robots, goals, whether a robot could stand there; then its direction (one-hot), whether it is on a highway
    and whether it carries a shelf.
    """

    task_set: str = ""
    """Empty: the options below are the task. MATE's sets: `tiny`, `small`, `corridor`, `wide`, `wide-sides`, `train`
    (tiny), `test` (small and corridor), `all`, or names of tasks such as `tiny-8h-2ag`, joined by commas; they replace
    rows, columns, column_height and layout."""
    num_agents: int = 2
    rows: int = 1
    """Rows of shelf blocks."""
    columns: int = 3
    """Columns of shelf blocks, odd; the middle one is left out in the last row, before the goals."""
    column_height: int = 8
    """Shelves one above the other in a block; a block is two wide."""
    layout: str = ""
    """A map instead of rows and columns: `x` shelf, `.` highway, `g` goal; lines end with a newline or `/`."""
    requests: int = 0
    """Shelves requested at a time; 0: as many as agents."""
    sight: int = 2
    horizon: int = 500

    def validate(self) -> None:
        require_at_least(self, 1, "num_agents", "rows", "columns", "column_height", "sight", "horizon")
        require_at_least(self, 0, "requests")
        require(self, "columns", self.columns % 2 == 1, "an odd number")
        shelves, goals = self.plan()
        if not len(goals):
            raise UserError("layout: found no goal (g), expected at least 1")
        field = f"on {shelves.shape[0]}x{shelves.shape[1]} cells"
        require(self, "num_agents", self.num_agents <= shelves.size, f"at most {shelves.size} {field}")
        if self.queue >= shelves.max():
            raise UserError(f"requests: found {self.queue} of {shelves.max()} shelves, expected a shelf that is not")
        if self.task_set:
            self.tasks(self.task_set)

    @property
    def queue(self) -> int:
        return self.requests or self.num_agents

    @property
    def spec(self) -> Spec:
        return Spec(
            id="rware",
            agents=tuple(f"agent_{i}" for i in range(self.num_agents)),
            obs_shape=(5 * (2 * self.sight + 1) ** 2 + 6,),
            action_space=Discrete(5),
            horizon=self.horizon,
            can_terminate=False,
            truncates_at_horizon=True,
            notes=(
                "of robots that want one cell, one on a ring of three or more moves, otherwise that of the lowest "
                "index; in rware the longest queue moves",
                "the time limit truncates; rware terminates",
                "the observation leaves out the feature that rware never writes",
            ),
        )

    def plan(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the shelves [H, W], 0 on highways, and cells of the goals [G, 2]."""
        if self.layout:
            cells = _cells_of(self.layout)
            shelf, goals = cells == "x", np.argwhere(cells == "g")
        else:
            height, width = (self.column_height + 1) * self.rows + 2, 3 * self.columns + 1
            row, column = np.indices((height, width))
            middle = (column == width // 2 - 1) | (column == width // 2)
            shelf = (column % 3 != 0) & (row % (self.column_height + 1) != 0) & (row != height - 1)
            shelf &= ~(middle & (row > height - self.column_height - 3))
            goals = np.array([[height - 1, width // 2 - 1], [height - 1, width // 2]])
        return np.where(shelf, np.cumsum(shelf).reshape(shelf.shape), 0), goals

    def variants(self) -> Mapping[str, Any]:
        out = {}
        for agents in sorted({2, 4, self.num_agents}):
            mine = {"task_set": "", "num_agents": agents, "rows": 1, "columns": 3, "column_height": 8, "layout": ""}
            make = lambda mine=mine, **options: replace(self, **mine | options)
            for name, rows in (("tiny", 1), ("small", 2)):
                out |= {f"{name}-{h}h-{agents}ag": make(rows=rows, column_height=h) for h in HEIGHTS}
            for name, layout in LAYOUTS.items():
                out |= {f"{name}-{h}h-{agents}ag": make(layout=layout(h)) for h in HEIGHTS}
        return out

    def sets(self) -> dict[str, tuple[str, ...]]:
        if not self.task_set:
            return {}
        of = lambda *starts: tuple(n for start in starts for n in self.members if n.rsplit("-", 2)[0] == start)
        named = {name: of(name) for name in ("tiny", "small", "corridor", "wide")}
        sides = {"wide-sides": of("wide-left", "wide-right")}
        return {"train": of("tiny"), "test": of("small", "corridor"), **named, **sides}

    @property
    def needs(self) -> tuple[int, ...]:
        shelves, goals = self.plan()
        return *shelves.shape, len(goals)

    def theta(self, number: int, room: tuple[int, ...]) -> Theta:
        shelves, goals = self.plan()
        height, width, most = room
        padded = np.pad(shelves, ((0, height - shelves.shape[0]), (0, width - shelves.shape[1])))
        goals = np.pad(goals, ((0, most - len(goals)), (0, 0)), constant_values=-1)
        size, count = np.array(shelves.shape, np.int32), np.int32(shelves.max())
        return Theta(np.int32(number), size, padded.astype(np.int32), count, goals.astype(np.int32))

    def begin(self, key: jax.Array, theta: Theta) -> tuple[State, TimeStep]:
        count = self.num_agents
        cells, towards, shelves = jnp.split(
            jax.random.uniform(key, (2 * count + self.queue,), jnp.float32), [count, 2 * count]
        )
        cells = distinct(cells, theta.size[0] * theta.size[1])
        state = State(
            pos=jnp.stack([cells // theta.size[1], cells % theta.size[1]], -1),
            direction=(towards * 4).astype(jnp.int32),
            load=jnp.zeros(count, jnp.int32),
            standing=theta.shelves,
            requests=1 + distinct(shelves, theta.count),
            theta=theta,
            t=jnp.int32(0),
        )
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        theta = state.theta
        want = state.pos + jnp.asarray(AHEAD, jnp.int32)[state.direction] * (action == FORWARD)[:, None]
        want = jnp.clip(want, 0, theta.size - 1)
        # with a shelf there is no way into a cell of another one; those that robots carry may be on their way out
        shut = (state.load > 0) & (_at(state.standing, want) > 0) & (want != state.pos).any(-1)
        pos = drive(state.pos, jnp.where(shut[:, None], state.pos, want))
        direction = jnp.asarray(TURNED, jnp.int32)[action, state.direction]

        here, highway = _at(state.standing, pos), _at(theta.shelves, pos) == 0
        toggle = action == TOGGLE
        lift, drop = toggle & (state.load == 0) & (here > 0), toggle & (state.load > 0) & ~highway
        row, column = (jnp.arange(n, dtype=jnp.int32) for n in state.standing.shape)
        standing = state.standing
        for i in range(self.num_agents):
            new = jnp.where(lift[i], 0, state.load[i])
            mine = (row == pos[i, 0])[:, None] & (column == pos[i, 1]) & (lift | drop)[i]
            standing = jnp.where(mine, new, standing)
        load = jnp.where(lift, here, jnp.where(drop, 0, state.load))

        requests, reward = state.requests, jnp.zeros(self.num_agents, jnp.float32)
        goals = theta.goals.shape[0]
        noise = jax.random.uniform(key, (goals,), jnp.float32)
        for g in range(goals):
            under = (pos == theta.goals[g]).all(-1) & (load > 0)
            brought = under[:, None] & (load[:, None] == requests)  # [N, Q]
            reward += brought.any(-1)
            other = 1 + free(noise[g], requests - 1, theta.count)
            requests = jnp.where(brought.any(0), other, requests)
        state = State(pos, direction, load, standing, requests, theta, state.t + 1)
        return state, self._see(state)._replace(reward=reward, truncated=state.t >= self.horizon)

    def _see(self, state: State) -> TimeStep:
        theta = state.theta
        down, right = (np.indices((2 * self.sight + 1,) * 2).reshape(2, -1, 1) - self.sight)[:, None]
        views = right * np.asarray(SIDE)[:, None] - down * np.asarray(AHEAD)[:, None]  # [direction, K, 2]
        cell = state.pos[:, None] + jnp.asarray(views, jnp.int32)[state.direction]  # [N, K, 2]
        inside = ((cell >= 0) & (cell < theta.size)).all(-1)
        standing = jnp.where(inside, _at(state.standing, jnp.clip(cell, 0, theta.size - 1)), 0)
        robots = (cell[:, :, None] == state.pos).all(-1)  # [N, K, N]
        shelf = standing + (robots * state.load).sum(-1)
        requested = (shelf[..., None] == state.requests).any(-1)
        robot = robots.any(-1)
        goal = (cell[:, :, None] == theta.goals).all(-1).any(-1) & inside
        direction = jax.nn.one_hot(state.direction, 4, dtype=bool)
        own = jnp.stack([_at(theta.shelves, state.pos) == 0, state.load > 0], -1)
        layers = [shelf > 0, requested, robot, goal, inside & ~robot, direction, own]
        return first_step(self.spec, jnp.concatenate(layers, -1).astype(jnp.float32))

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        height, width = state.theta.size.tolist()
        asked, standing = set(state.requests.tolist()), np.asarray(state.standing)
        boxes = [(r, c, "", 1 if standing[r, c] in asked else 5) for r, c in np.argwhere(standing).tolist()]
        carried = [(*p, "", 1 if n in asked else 5) for p, n in zip(state.pos.tolist(), state.load.tolist()) if n]
        robots = [(*p, "^v<>"[d], 0) for p, d in zip(state.pos.tolist(), state.direction.tolist())]
        goals = [(*g, "", 2) for g in state.theta.goals.tolist() if g[0] >= 0]
        return render2d.board(height, width, robots, boxes + carried, goals)

    def legend(self) -> tuple[Kind, ...]:
        shelves = Kind("shelf asked for", 1, "box"), Kind("other shelf", 5, "box")
        return Kind("robot", 0), *shelves, Kind("goal", 2, "ring")


def drive(pos: Array, want: Array) -> Array:
    """Cells [N, 2] of robots that want to go from `pos` to `want`.

    A robot moves if its cell is empty or left in the same step, so queues and rings move together; two robots cannot
    change places. Of several that want one cell, one on a ring moves, otherwise that of the lowest index.
    """
    count = pos.shape[0]
    goes = (want != pos).any(-1)
    # who stands where I want to go, once for each robot at most
    next_is = (want[:, None] == pos).all(-1) & goes[:, None]
    path, ring = next_is, jnp.zeros(count, bool)
    for length in range(2, count + 1):
        path = (path[:, :, None] & next_is).any(1)
        closed = jnp.diagonal(path)
        if length == 2:
            goes &= ~closed
        else:
            # a ring of two closes again after four steps, but it stays
            ring |= closed & goes
    rank = jnp.where(ring, -1, jnp.arange(count, dtype=jnp.int32))
    rivals = (want[:, None] == want).all(-1) & goes
    goes &= ~(rivals & (rank < rank[:, None])).any(-1)
    for _ in range(count):
        goes &= ~(next_is & ~goes).any(-1)
    return jnp.where(goes[:, None], want, pos)


def free(uniform: Array, used: Array, count: Array) -> Array:
    """A number in 0..count-1 that is not among `used` [Q] (all different), each as likely; from `uniform` in [0, 1)."""
    skip = (uniform * (count - used.shape[0])).astype(jnp.int32)
    value = skip
    for _ in range(used.shape[0]):
        value = skip + (used <= value).sum(dtype=jnp.int32)
    return value


def distinct(uniform: Array, count: Array) -> Array:
    """Different numbers in 0..count-1, one for each of `uniform` [Q] in [0, 1), drawn one after another."""
    drawn = jnp.zeros(0, jnp.int32)
    for i in range(uniform.shape[0]):
        drawn = jnp.append(drawn, free(uniform[i], drawn, count))
    return drawn


def _at(grid: Array, cells: Array) -> Array:
    return grid.reshape(-1)[cells[..., 0] * grid.shape[1] + cells[..., 1]]


def _cells_of(layout: str) -> np.ndarray:
    """[H, W] letters of a map. Raises `UserError` for unequal lines and unknown letters."""
    lines = [line.strip().lower() for line in layout.strip().replace("/", "\n").split("\n")]
    lengths = sorted({len(line) for line in lines})
    if len(lengths) > 1:
        raise UserError(f"layout: found lines of {lengths[0]} and {lengths[-1]} cells, expected equal lengths")
    wrong = sorted(set("".join(lines)) - set("x.g"))
    if wrong:
        raise UserError(f"layout: found {wrong[0]!r}, expected x (shelf), . (highway) and g (goal)")
    return np.array([list(line) for line in lines])


def _wide(block: str, h: int) -> str:
    return "/".join(["." * 20, *[block] * h, "." * 20, "." * 9 + "gg" + "." * 9])


LAYOUTS = {
    "corridor": lambda h: "/".join([".....", "xx.xx", *["x...x"] * (h - 2), "xx.xx", ".....", "..g.."]),
    "wide": lambda h: _wide(".xx" + "." * 14 + "xx.", h),
    "wide-left": lambda h: _wide(".xx" + "." * 17, h),
    "wide-right": lambda h: _wide("." * 17 + "xx.", h),
}
"""MATE's maps by the height of their blocks."""
