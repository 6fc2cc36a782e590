"""OvercookedV2: `jaxmarl/overcooked_v2/<layout>`."""

from typing import Any

from jaxstack.envs.jaxmarl import overcooked, overcooked_v2_fast
from jaxstack.envs.jaxmarl.family import registered

IDS = (
    "overcooked_v2/cramped_room",
    "overcooked_v2/asymm_advantages",
    "overcooked_v2/coord_ring",
    "overcooked_v2/forced_coord",
    "overcooked_v2/counter_circuit",
    "overcooked_v2/cramped_room_v2",
    "overcooked_v2/asymm_advantages_recipes_center",
    "overcooked_v2/asymm_advantages_recipes_right",
    "overcooked_v2/asymm_advantages_recipes_left",
    "overcooked_v2/two_rooms",
    "overcooked_v2/two_rooms_both",
    "overcooked_v2/long_room",
    "overcooked_v2/fun_coordination",
    "overcooked_v2/more_fun_coordination",
    "overcooked_v2/fun_symmetries",
    "overcooked_v2/fun_symmetries_plates",
    "overcooked_v2/fun_symmetries1",
    "overcooked_v2/grounded_coord_simple",
    "overcooked_v2/grounded_coord_ring",
    "overcooked_v2/test_time_simple",
    "overcooked_v2/test_time_wide",
    "overcooked_v2/demo_cook_simple",
    "overcooked_v2/demo_cook_wide",
)


def _make(name: str, options: dict[str, Any]) -> Any:
    return registered("overcooked_v2", dict(layout=name.split("/")[1]) | options)


FAMILY = overcooked.FAMILY._replace(ids=IDS, make=_make, fast=overcooked_v2_fast.faster, frame=None)
