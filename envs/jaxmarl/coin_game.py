"""The coin game: `jaxmarl/coin_game`."""

from jaxstack.envs.jaxmarl.family import Family

FAMILY = Family(
    ids=("coin_game",),
    horizon=lambda lib, options: int(lib.num_inner_steps * lib.num_outer_steps),
    terminal=None,
    notes=("the time limit truncates", "the library moves the players to new cells after each inner episode"),
)
