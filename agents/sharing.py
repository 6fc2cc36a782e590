"""The parameter-sharing options of ippo and mappo."""

from dataclasses import dataclass
from typing import Literal

from jaxstack.agents.team_ppo import PPOConfig
from jaxstack.core.config import require
from jaxstack.nn import team
from jaxstack.nn.team import Shape, TeamNet


@dataclass(frozen=True)
class SharingConfig(PPOConfig):
    """PPO of a team with a choice of parameter sharing."""

    sharing: Literal["full", "full+id", "id", "none", "partial"] = "full"
    """full: one network; full+id: one network that sees a one-hot agent id; id: one network that sees only the id;
    none: a network for each agent; partial: a network for each group."""
    groups: tuple[int, ...] = ()
    """Partial sharing: the group of each agent, 0 first, e.g. `0 0 1`; `jaxstack.measures.seps` finds them."""

    def validate(self) -> None:
        super().validate()
        require(self, "groups", bool(self.groups) == (self.sharing == "partial"), "given exactly with sharing=partial")
        used = sorted(set(self.groups))
        require(self, "groups", used == list(range(len(used))), "groups numbered 0, 1, ... without gaps")
        require(self, "cnn", not (self.cnn and self.sharing in ("full+id", "id")), "off with ids in the input")


def team_network(config: SharingConfig, shape: Shape) -> TeamNet:
    """Raises `UserError` when `groups` does not name every agent."""
    if config.sharing == "none":
        return team.separate(shape, config.arch)
    if config.sharing == "partial":
        count = shape.num_agents
        require(config, "groups", len(config.groups) == count, f"one entry for each of {count} agents")
        return team.separate(shape, config.arch, config.groups)
    return team.shared(shape, config.arch, with_id=config.sharing != "full", with_obs=config.sharing != "id")
