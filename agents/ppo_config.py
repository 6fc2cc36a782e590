"""Options of the PPO update that ippo, mappo, ppo and hypermarl share, see team_ppo.py."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxstack.agents.configs import RolloutConfig
from jaxstack.core.config import require, require_at_least, require_positive, require_unit
from jaxstack.nn.team import Arch


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 5e-4
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.2
    vf_coef: float = 0.5
    ent_coef: float = 0.01
    max_grad_norm: float = 0.5
    adam_eps: float = 1e-5
    """Adam's epsilon, that of the PPO baselines."""


@dataclass(frozen=True)
class PPOConfig(RolloutConfig):
    """What every PPO of a team can set."""

    env: str = "jaxmarl/MPE_simple_spread_v3"
    """Environment id, see `jaxstack list envs`."""
    num_epochs: int = 4
    num_minibatches: int = 4
    """Feed-forward: splits of num_steps * num_envs; recurrent: splits of num_envs."""
    network: str = "mlp"
    """What reads observations before the layers of `hidden`: mlp (nothing), cnn (on [H, W, C]; sizes as in
    `cnn={channels: [16, 32], sizes: [8, 4], strides: [4, 2]}`), or `module:attribute` of one's own flax module, with
    options likewise. It gets a batch of observations and returns a batch of features."""
    cnn: bool = False
    """Short for `network=cnn`."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: dense layers multiply in bfloat16 and add in float32. Parameters, the recurrence, convolutions, losses,
    statistics and the optimiser stay float32."""
    clip_value: bool = True
    normalise_advantage: bool = True
    advantage_norm: Literal["group", "agent"] = "group"
    """Whose samples in a minibatch standardise an advantage. group: those of all agents that share parameters with the
    agent, as in the released code of HyperMARL and of its baselines; agent: its own, so that agents with large rewards
    do not drown the others. The same where no parameters are shared."""
    normalise_value: bool = False
    """The critic predicts standardised returns (running statistics)."""
    normalise_obs: bool = False
    normalise_reward: bool = False
    """Divide rewards by the running deviation of the discounted return."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "num_epochs", "num_minibatches")
        require_at_least(self, 0, "hypers.lr", "hypers.ent_coef", "hypers.vf_coef", "hypers.adam_eps")
        require_unit(self, "hypers.gamma", "hypers.lam")
        require_positive(self, "hypers.clip", "hypers.max_grad_norm")
        samples, what = (
            (self.num_envs, "num_envs") if self.gru else (self.num_envs * self.num_steps, "num_envs*num_steps")
        )
        require(self, "network", not self.cnn or self.network in ("mlp", "cnn"), "mlp or cnn beside cnn=True")
        require(self, "num_minibatches", samples % self.num_minibatches == 0, f"a divisor of {what}={samples}")

    @property
    def arch(self) -> Arch:
        return Arch(self.hidden, self.activation, self.gru, self.reader, self.precision)

    @property
    def reader(self) -> str:
        """`network`, or what `cnn` is short for; empty for mlp."""
        return "cnn" if self.cnn else "" if self.network == "mlp" else self.network
