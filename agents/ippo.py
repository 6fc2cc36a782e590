"""Independent PPO (de Witt et al., 2020): each agent learns from its own observation, critic included.

`sharing` says which agents share parameters: `full` (FuPS), `full+id` (FuPS with a one-hot agent id), `none` (NoPS), or
`partial` (one parameter set a group, as SePS finds them).
"""

from dataclasses import dataclass

from jaxstack.agents import team_ppo
from jaxstack.agents.sharing import SharingConfig, team_network
from jaxstack.core.learner import Learner


@dataclass(frozen=True)
class Config(SharingConfig):
    """Independent PPO on a multi-agent environment."""


def ippo(config: Config = Config()) -> Learner:
    """Raises `UserError` where config and environment do not fit."""
    env = team_ppo.make_env(config)
    shape = team_ppo.team_shape(env, config, central=False)
    return team_ppo.make_learner("ippo", team_ppo.make_task(config, env, shape, team_network(config, shape, env)))
