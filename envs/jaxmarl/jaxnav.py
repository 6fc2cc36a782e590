"""Navigation of robots with a lidar: `jaxmarl/jaxnav`."""

from jaxstack.envs.jaxmarl.family import Family

FAMILY = Family(
    ids=("jaxnav",),
    horizon=lambda lib, options: int(lib.max_steps),
    terminal=lambda lib, before, actions, state, done: (state.goal_reached | state.move_term).all(),
    alive=lambda lib, state: ~state.done & ~state.move_term,
    writes_integers=True,  # its lidar does
    notes=("an episode terminates when every agent reached its goal or crashed; the time limit truncates",),
)
