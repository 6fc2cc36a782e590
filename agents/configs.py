"""Options that agents share: of every agent, of those that play, of PPO's family and MATE."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxstack import envs
from jaxstack.core.config import Config, require, require_at_least
from jaxstack.core.registry import own
from jaxstack.envs.base import Environment
from jaxstack.nn.networks import Activation


@dataclass(frozen=True)
class EnvConfig(Config):
    """The environment, and evaluation in it."""

    env: str = "dispersion"
    """Environment id, see `jaxstack list envs`; in Python also an environment object or class, which is then stored by
    its name, options and wrappers."""
    env_args: tuple[str, ...] = ()
    """Options of the environment, each `name=value`; in Python also a mapping."""
    wrap: tuple[str, ...] = ()
    """Wrappers around it, the innermost first: `time_limit=200 frame_stack=4`, or `module:attribute=value` of yours."""
    eval_episodes: int = 32
    eval_steps: int = 1000
    """Longest evaluation episode where the environment sets no horizon."""
    agent_returns: bool = False
    """Each agent's return is a metric, too; returns of teams (`adversary_0` and `adversary_1` are one) always are."""

    def __post_init__(self) -> None:
        for name, value in _as_text(self.env, self.env_args, self.wrap).items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    def validate(self) -> None:
        require_at_least(self, 1, "eval_episodes", "eval_steps")

    def make_env(self) -> Environment:
        """Make the environment; one's own is checked. Raises `UserError` for unknown ids or options, or a fault."""
        env = envs.wrap(envs.make(self.env, **envs.parse_options(self.env_args)), *self.wrap)
        if own(self.env) or any(own(entry.partition("=")[0]) for entry in self.wrap):
            envs.check_env(env)
        return env


def _as_text(env: Any, env_args: Any, wrap: Any) -> dict[str, Any]:
    """Fields that hold Python objects, as the text that rebuilds them. Raises `UserError` where none does."""
    changed: dict[str, Any] = {}
    if isinstance(env_args, Mapping):
        changed["env_args"] = env_args = envs.entries(env_args)
    if isinstance(env, (Environment, type)):
        found = envs.described(env)
        options = {entry.partition("=")[0]: entry for entry in (*found.env_args, *env_args)}
        changed = {"env": found.env, "env_args": tuple(options.values()), "wrap": (*found.wrap, *wrap)}
    return changed


@dataclass(frozen=True)
class PlayConfig(EnvConfig):
    """How much is played, in how many environments."""

    total_steps: int = 1_000_000
    """Environment steps over all parallel environments."""
    num_envs: int = 16
    auto_reset: Literal["pool", "exact"] = "pool"
    pool_size: int | None = None

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "total_steps", "num_envs")


@dataclass(frozen=True)
class RolloutConfig(PlayConfig):
    """On-policy learners of teams: one update per rollout."""

    num_steps: int = 128
    """Rollout length T of one update."""
    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    gru: int = 0
    """Width of the recurrent state; 0 is feed-forward."""
    anneal_lr: bool = True
    """Learning rate to 0 linearly over the steps of the run: those that the runner is asked for, else total_steps."""
    eval_greedy: bool = True

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "num_steps")
        require_at_least(self, 0, "gru")
        require(self, "hidden", all(h >= 1 for h in self.hidden), "layer widths >= 1")
        size = self.num_envs * self.num_steps
        require(self, "total_steps", self.total_steps >= size, f"at least one update, num_envs*num_steps={size}")

    @property
    def num_updates(self) -> int:
        return self.total_steps // (self.num_envs * self.num_steps)
