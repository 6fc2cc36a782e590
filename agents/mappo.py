"""Multi-agent PPO (Yu et al., 2022): actors see their own observation, the critic the global state.

The global state is the environment's own where it has one, else all observations side by side.
"""

from dataclasses import dataclass

from jaxstack.agents import team_ppo
from jaxstack.agents.sharing import SharingConfig, team_network
from jaxstack.core.learner import Learner


@dataclass(frozen=True)
class Config(SharingConfig):
    """PPO with a centralised critic on a multi-agent environment."""


def mappo(config: Config = Config()) -> Learner:
    """Raises `UserError` where config and environment do not fit."""
    env = team_ppo.make_env(config)
    shape = team_ppo.team_shape(env, config, central=True)
    return team_ppo.make_learner("mappo", team_ppo.make_task(config, env, shape, team_network(config, shape, env)))
