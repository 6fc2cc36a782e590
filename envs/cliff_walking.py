"""Cliff walking (Sutton & Barto, 2018, example 6.6) with the rules of gymnasium's CliffWalking-v1.

4 x 12 cells; from the bottom left to the bottom right, along a cliff. A step costs 1. Stepping off the cliff costs 100
and leads back to the start WITHOUT ending the episode. The best return is -13.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from jaxstack.envs.base import Kind
from jaxstack.envs.tabular import State, TableEnv, Tables

ROWS, COLS = 4, 12
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left
START, GOAL = (3, 0), (3, 11)


@cache
def _tables() -> Tables:
    shape = (ROWS * COLS, len(MOVES))
    target, reward, done = np.zeros(shape, np.int32), np.full(shape, -1.0, np.float32), np.zeros(shape, bool)
    place = lambda cell: cell[0] * COLS + cell[1]
    for row, col in np.ndindex(ROWS, COLS):
        for action, (down, right) in enumerate(MOVES):
            cell = (min(max(row + down, 0), ROWS - 1), min(max(col + right, 0), COLS - 1))
            index = (place((row, col)), action)
            if cell[0] == ROWS - 1 and 0 < cell[1] < COLS - 1:
                target[index], reward[index] = place(START), -100.0
            else:
                target[index], done[index] = place(cell), cell == GOAL
    start = np.zeros(shape[0])
    start[place(START)] = 1.0
    return Tables(target, reward, done, start)


@dataclass(frozen=True)
class CliffWalking(TableEnv):
    """Observation: the cell, row * 12 + column. Actions: up, right, down, left."""

    @property
    def id(self) -> str:
        return "cliff_walking"

    @property
    def tables(self) -> Tables:
        return _tables()

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "tables of gymnasium's CliffWalking-v1; its is_slippery moves sideways, eps here draws any action",
            "the time limit is this project's: gymnasium has none",
        )

    @staticmethod
    def distances() -> np.ndarray:
        """Manhattan distances between cells [49, 49] float64; the last, an episode's end, is a step behind the goal."""
        cells = np.array([*np.ndindex(ROWS, COLS), (GOAL[0], GOAL[1] + 1)], np.float64)
        return np.abs(cells[:, None] - cells[None]).sum(-1)

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        layers = np.zeros((ROWS, COLS, 3), bool)
        layers[GOAL][0] = layers[ROWS - 1, 1 : COLS - 1, 1] = True
        layers[divmod(int(state.place), COLS)][2] = True
        return render2d.grid(layers)

    def legend(self) -> tuple[Kind, ...]:
        return tuple(Kind(name, i, "box") for i, name in enumerate(("goal", "cliff", "walker")))
