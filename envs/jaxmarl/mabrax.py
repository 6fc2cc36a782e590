"""MABrax, brax's robots with their joints shared out among agents."""

from typing import Any

from jaxstack.envs.brax import fast
from jaxstack.envs.jaxmarl.family import Family, registered

IDS = (
    "ant_4x2",
    "halfcheetah_6x1",
    "hopper_3x1",
    "humanoid_9|8",
    "walker2d_2x3",
)


def _make(name: str, options: dict[str, Any]) -> Any:
    options = {k: v for k, v in options.items() if k != "episode_length"}
    if name == "halfcheetah_6x1":
        options.setdefault("exclude_current_positions_from_observation", False)
    return registered(name, dict(episode_length=None, auto_reset=False) | options)


def _fast(lib: Any, **_: Any) -> Any:
    fast.faster(lib.env)
    return lib


FAMILY = Family(
    ids=IDS,
    horizon=lambda lib, options: int(options.get("episode_length", 1000)),
    terminal=lambda lib, before, actions, state, done: done,
    make=_make,
    state=lambda lib, state: state.obs,
    fast=_fast,
    shared_reward=True,
    notes=(
        "brax's own auto-reset is off: the library resets a second time and pays for physics in every step",
        "falling terminates, the time limit truncates",
        "the global state is brax's observation",
        "halfcheetah_6x1: root position is kept in the observation, as the index table assumes",
    ),
)
