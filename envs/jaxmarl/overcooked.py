"""Overcooked: `jaxmarl/overcooked/<layout>`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.envs.jaxmarl.family import Family, registered

IDS = (
    "overcooked/cramped_room",
    "overcooked/asymm_advantages",
    "overcooked/coord_ring",
    "overcooked/forced_coord",
    "overcooked/counter_circuit",
)


def _make(name: str, options: dict[str, Any]) -> Any:
    from jaxmarl.environments.overcooked import overcooked_layouts

    return registered("overcooked", dict(layout=overcooked_layouts[name.split("/")[1]]) | options)


def _shaped(lib: Any, state: Any, info: dict) -> dict[str, Array]:
    values = info["shaped_reward"] if info else dict.fromkeys(lib.agents, 0.0)
    return {"shaped_reward": jnp.stack([jnp.asarray(values[a], jnp.float32) for a in lib.agents])}


def _frame(lib: Any, state: Any, agents: int) -> np.ndarray:
    from jaxstack.envs import render2d

    return render2d.grid(np.asarray(lib.get_obs(state)["agent_0"]))


FAMILY = Family(
    ids=IDS,
    horizon=lambda lib, options: int(lib.max_steps),
    terminal=None,
    make=_make,
    info=_shaped,
    frame=_frame,
    shared_reward=True,
    options={"shaped_reward": float},
    notes=(
        "the declared observation shape is transposed in the library; ours is the array's",
        "the time limit truncates",
    ),
)
