"""STORM's games in a grid: `jaxmarl/storm`, `storm_2p`, `storm_np`."""

from jaxstack.envs.jaxmarl import storm_fast
from jaxstack.envs.jaxmarl.family import Family

FAMILY = Family(
    ids=("storm", "storm_2p", "storm_np"),
    horizon=lambda lib, options: int(lib.num_inner_steps * lib.num_outer_steps),
    terminal=None,
    fast=storm_fast.faster,
    writes_integers=True,  # its own step does, where options rule out the faster form
    notes=(
        "the time limit truncates",
        "the view and the inventory of an agent are flattened and joined",
        "the library's last step of an inner episode shows the next one's start and pays no reward",
    ),
)
