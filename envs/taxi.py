"""Taxi (Dietterich, 2000) with the rules of gymnasium's Taxi-v4: fetch a passenger and take it to its destination.

5 x 5 cells with walls and four stations; 500 states ((row * 5 + column) * 5 + passenger) * 4 + destination, where
passenger 4 is in the taxi. A step costs 1, a wrong pick-up or drop-off 10; the right drop-off pays 20 and ends the
episode. A drop-off at a wrong station puts the passenger down there.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from jaxstack.envs.base import Kind
from jaxstack.envs.tabular import State, TableEnv, Tables

SIZE, STATIONS = 5, ((0, 0), (0, 4), (4, 0), (4, 3))  # red, green, yellow, blue
WALLS = ((0, 1), (1, 1), (3, 0), (4, 0), (3, 2), (4, 2))
"""Cells with a wall at their right side."""
SOUTH, NORTH, EAST, WEST, PICKUP, DROPOFF = range(6)
ABOARD = len(STATIONS)


def encode(row: int, col: int, passenger: int, destination: int) -> int:
    """Return the state's id."""
    return ((row * SIZE + col) * (ABOARD + 1) + passenger) * ABOARD + destination


def decode(place: int) -> tuple[int, int, int, int]:
    """Return (row, column, passenger, destination) of a state's id."""
    place, destination = divmod(place, ABOARD)
    cell, passenger = divmod(place, ABOARD + 1)
    return (*divmod(cell, SIZE), passenger, destination)


def _act(row: int, col: int, passenger: int, destination: int, action: int) -> tuple[int, float, bool]:
    """(next state, reward, whether the episode ends)."""
    reward, done, cell = -1.0, False, (row, col)
    if action == SOUTH:
        row = min(row + 1, SIZE - 1)
    elif action == NORTH:
        row = max(row - 1, 0)
    elif action == EAST and cell not in WALLS:
        col = min(col + 1, SIZE - 1)
    elif action == WEST and (row, col - 1) not in WALLS:
        col = max(col - 1, 0)
    elif action == PICKUP:
        if passenger < ABOARD and cell == STATIONS[passenger]:
            passenger = ABOARD
        else:
            reward = -10.0
    elif action == DROPOFF:
        if passenger == ABOARD and cell == STATIONS[destination]:
            passenger, reward, done = destination, 20.0, True
        elif passenger == ABOARD and cell in STATIONS:
            passenger = STATIONS.index(cell)
        else:
            reward = -10.0
    return encode(row, col, passenger, destination), reward, done


@cache
def _tables() -> Tables:
    count = SIZE * SIZE * (ABOARD + 1) * ABOARD
    found = [[_act(*decode(s), a) for a in range(6)] for s in range(count)]
    target, reward, done = (np.array([[x[i] for x in row] for row in found]) for i in range(3))
    waiting = np.array([p < ABOARD and p != d for _, _, p, d in map(decode, range(count))], np.float64)
    return Tables(target.astype(np.int32), reward.astype(np.float32), done, waiting / waiting.sum())


@dataclass(frozen=True)
class Taxi(TableEnv):
    """Observation: the state's id. Actions: south, north, east, west, pick up, drop off."""

    @property
    def id(self) -> str:
        return "taxi"

    @property
    def tables(self) -> Tables:
        return _tables()

    @property
    def notes(self) -> tuple[str, ...]:
        return ("tables of gymnasium's Taxi-v4; its is_rainy moves sideways, eps here draws any action",)

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        row, col, passenger, destination = decode(int(state.place))
        layers = np.zeros((SIZE, SIZE, 4), bool)
        for station in STATIONS:
            layers[station][0] = True
        layers[STATIONS[destination]][1] = True
        layers[row, col, 2] = True
        layers[(row, col) if passenger == ABOARD else STATIONS[passenger]][3] = True
        return render2d.grid(layers, WALLS)

    def legend(self) -> tuple[Kind, ...]:
        kinds = ("station", "destination", "taxi", "passenger")
        return tuple(Kind(name, i, "box") for i, name in enumerate(kinds))
