"""Multi-particle environments: `jaxmarl/MPE_<name>`."""

from typing import Any

import numpy as np

from jaxstack.envs.base import Kind, agent_kinds
from jaxstack.envs.jaxmarl import mpe_fast
from jaxstack.envs.jaxmarl.family import Family

IDS = (
    "MPE_simple_v3",
    "MPE_simple_tag_v3",
    "MPE_simple_world_comm_v3",
    "MPE_simple_spread_v3",
    "MPE_simple_crypto_v3",
    "MPE_simple_speaker_listener_v4",
    "MPE_simple_push_v3",
    "MPE_simple_adversary_v3",
    "MPE_simple_reference_v3",
    "MPE_simple_facmac_v1",
    "MPE_simple_facmac_3a_v1",
    "MPE_simple_facmac_6a_v1",
    "MPE_simple_facmac_9a_v1",
)
PHYSICS = (
    "rad moveable silent collide mass accel max_speed u_noise c_noise damping contact_force contact_margin".split()
)
"""What the environments take beside the parameters in their signatures, an array over entities each."""


def _frame(lib: Any, state: Any, agents: int) -> np.ndarray:
    from jaxstack.envs import render2d

    rad, pos = np.asarray(lib.rad), np.asarray(state.p_pos)
    return render2d.particles(pos[:agents], rad[:agents], pos[agents:], rad[agents:])


FAMILY = Family(
    ids=IDS,
    horizon=lambda lib, options: int(lib.max_steps),
    terminal=None,
    fast=mpe_fast.faster,
    frame=_frame,
    legend=lambda spec: (*agent_kinds(spec), Kind("landmark", shape="ring")),
    options=dict.fromkeys(PHYSICS, Any),
    notes=(
        "episodes have max_steps steps; the library tests its counter late and runs one more",
        "the time limit truncates",
    ),
)
