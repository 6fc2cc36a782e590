"""The parameter-sharing options of ippo and mappo."""

from dataclasses import dataclass
from typing import Literal

import jax

from jaxstack.agents import seps
from jaxstack.agents.team_ppo import PPOConfig
from jaxstack.core.config import require, require_at_least
from jaxstack.envs.base import Environment
from jaxstack.nn import team
from jaxstack.nn.team import TeamNet, TeamSpec


@dataclass(frozen=True)
class SharingConfig(PPOConfig):
    """PPO of a team with a choice of parameter sharing."""

    sharing: Literal["full", "full+id", "id", "none", "partial"] = "full"
    """full: one network; full+id: one network that sees a one-hot agent id; id: one network that sees only the id;
    none: a network for each agent; partial: a network for each group (SePS)."""
    groups: tuple[int, ...] = ()
    """Partial sharing: the group of each agent, 0 first, e.g. `0 0 1`; empty: SePS finds them by random play."""
    groups_seed: int = 0
    """Seed of that search."""
    common_torso: bool = False
    """One GRU and one set of convolutions for actor and critic, half the work; needs sharing full, full+id or id and
    decentralised critics."""

    def validate(self) -> None:
        super().validate()
        require(self, "groups", not self.groups or self.sharing == "partial", "nothing unless sharing=partial")
        require_at_least(self, 0, "groups_seed")
        one = self.sharing in ("full", "full+id", "id")
        require(self, "common_torso", one or not self.common_torso, "off unless sharing is full, full+id or id")
        torso = self.gru or self.reader
        require(
            self, "common_torso", torso or not self.common_torso, "off without gru or a network, as there is no torso"
        )
        used = sorted(set(self.groups))
        require(self, "groups", used == list(range(len(used))), "groups numbered 0, 1, ... without gaps")
        field, ids = "cnn" if self.cnn else "network", self.sharing in ("full+id", "id")
        require(
            self,
            field,
            not (self.reader and ids),
            "off with ids in the input" if self.cnn else "mlp with ids in the input",
        )


def team_network(config: SharingConfig, shape: TeamSpec, env: Environment) -> TeamNet:
    """Raises `UserError` when `groups` does not name every agent."""
    require(config, "common_torso", not (config.common_torso and shape.central), "off with a central critic")
    if config.sharing == "none":
        return team.separate(shape, config.arch)
    if config.sharing == "partial":
        count = shape.num_agents
        require(config, "groups", len(config.groups) in (0, count), f"one entry for each of {count} agents")
        groups = config.groups or seps.find_groups(env, jax.random.key(config.groups_seed))
        return team.separate(shape, config.arch, groups)
    with_id, with_obs = config.sharing != "full", config.sharing != "id"
    return team.shared(shape, config.arch, with_id, with_obs, config.common_torso)
