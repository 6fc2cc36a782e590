"""The switch riddle: `jaxmarl/switch_riddle`."""

from jaxstack.envs.jaxmarl.family import Family

FAMILY = Family(
    ids=("switch_riddle",),
    horizon=lambda lib, options: int(lib.max_steps),
    # only the prisoner in the room can end the game, by telling; the library's flag also counts the time limit
    terminal=lambda lib, before, actions, state, done: actions[before.agent_in_room] == lib.game_actions["TELL"],
    shared_reward=True,
    notes=("telling terminates, the time limit truncates",),
)
