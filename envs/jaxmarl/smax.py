"""SMAX battles against the built-in enemy: `jaxmarl/smax/<scenario>`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.envs.base import Kind
from jaxstack.envs.jaxmarl import smax_fast
from jaxstack.envs.jaxmarl.family import Family, registered

IDS = (
    "smax/3m",
    "smax/2s3z",
    "smax/25m",
    "smax/3s5z",
    "smax/8m",
    "smax/5m_vs_6m",
    "smax/10m_vs_11m",
    "smax/27m_vs_30m",
    "smax/3s5z_vs_3s6z",
    "smax/3s_vs_5z",
    "smax/6h_vs_8z",
    "smax/smacv2_5_units",
    "smax/smacv2_10_units",
    "smax/smacv2_20_units",
)
DEFAULTS = dict(see_enemy_actions=True, walls_cause_death=True, attack_mode="closest")


def _make(name: str, options: dict[str, Any]) -> Any:
    from jaxmarl.environments.smax import map_name_to_scenario

    scenario = map_name_to_scenario(name.split("/")[1])
    return registered("HeuristicEnemySMAX", dict(scenario=scenario) | DEFAULTS | options)


def _sides(lib: Any, state: Any) -> tuple[Array, Array]:
    """Which allies and which enemies live."""
    units = state.state.unit_alive
    return units[: lib.num_allies], units[lib.num_allies :]


def _over(lib: Any, before: Any, actions: Array, state: Any, done: Array) -> Array:
    allies, enemies = _sides(lib, state)
    return ~allies.any() | ~enemies.any()


def _won(lib: Any, state: Any, info: dict) -> dict[str, Array]:
    allies, enemies = _sides(lib, state)
    return {"won": (allies.any() & ~enemies.any()).astype(jnp.float32)}


def _frame(lib: Any, state: Any, agents: int) -> np.ndarray:
    from jaxstack.envs import render2d

    s, game = state.state, lib._env
    health = np.asarray(s.unit_health) / np.asarray(game.unit_type_health)[np.asarray(s.unit_types)]
    return render2d.battle(np.asarray(s.unit_positions), health, lib.num_allies, (game.map_width, game.map_height))


FAMILY = Family(
    ids=IDS,
    horizon=lambda lib, options: int(lib._env.max_steps),
    terminal=_over,
    make=_make,
    mask=lambda lib, state: lib.get_avail_actions(state),
    state=lambda lib, state: lib.get_world_state(state),
    alive=lambda lib, state: _sides(lib, state)[0],
    info=_won,
    fast=smax_fast.faster,
    frame=_frame,
    legend=lambda spec: (Kind("ally", 0), Kind("enemy", 1), Kind("health", 2, "box")),
    shared_reward=True,
    notes=("a decided battle terminates, the time limit truncates", "dead agents leave agent_mask"),
)
