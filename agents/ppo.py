"""PPO for one agent (Schulman et al., 2017), feed-forward or recurrent.

Clipped surrogate, clipped value loss, generalised advantages that bootstrap at time limits. An agent axis of length one
is kept, so every environment family and wrapper serves.
"""

from dataclasses import dataclass

from jaxstack.agents import team_ppo
from jaxstack.agents.team_ppo import Hypers, PPOConfig
from jaxstack.core.config import require
from jaxstack.core.learner import Learner
from jaxstack.nn import team


@dataclass(frozen=True)
class Config(PPOConfig):
    """PPO on a single-agent environment; the defaults solve CartPole in 500,000 steps."""

    env: str = "gymnax/CartPole-v1"
    total_steps: int = 500_000
    num_envs: int = 4
    hypers: Hypers = Hypers(lr=2.5e-4)


def ppo(config: Config = Config()) -> Learner:
    """Raises `UserError` when the environment has more than one agent."""
    env = team_ppo.make_env(config)
    require(config, "env", env.spec.num_agents == 1, f"one agent, found {env.spec.num_agents}; use ippo or mappo")
    shape = team_ppo.team_shape(env, config, central=False)
    task = team_ppo.make_task(config, env, shape, team.shared(shape, config.arch, with_id=False))
    return team_ppo.make_learner("ppo", task)
