"""Soft actor-critic (Haarnoja et al., 2018) for one agent with real actions, see off_policy.py for its play."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array

from jaxstack.agents import off_policy, offline, soft
from jaxstack.agents.off_policy import OffPolicyConfig, State, Task
from jaxstack.agents.offline import Batch
from jaxstack.core.config import require_at_least
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.nn.ensembles import Critics, Net

LOG_STD = (-20.0, 2.0)
"""Bounds of the actor's log standard deviation."""


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 1e-3
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""


@dataclass(frozen=True)
class Config(OffPolicyConfig):
    """Soft actor-critic; the defaults solve Pendulum."""

    num_critics: int = 2
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "num_critics")


def nets_of(cfg: Config) -> soft.Nets:
    """Networks. Raises `UserError` where config and environment do not fit."""
    task = offline.make_task(cfg)
    critic = Net(cfg.critic_hidden, 1, "before" if cfg.layer_norm else "none")
    actor = Net(cfg.actor_hidden, 2 * task.action_size)
    return soft.Nets(task, actor, Critics(critic, cfg.num_critics), LOG_STD)


def task_of(nets: soft.Nets) -> Task:
    """How it explores and learns."""

    def explore(s: State, obs: Array, normal: Array) -> Array:
        return nets.actor(s.params["actor"], obs).sample_from(normal)[0]

    def improve(s: State, batch: Batch, number: Array, key: Key) -> tuple[State, Metrics]:
        return learn(nets, s, batch, soft.draw(nets, key, nets.task.cfg.batch_size))

    return off_policy.make_task(nets.task, explore, improve)


def sac(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions in finite bounds."""
    nets = nets_of(config)
    policy = offline.policy_of(nets.task, nets.actor, density=True)
    begin = lambda key, hypers: soft.init(nets, key, hypers)
    return off_policy.make_learner("sac", task_of(nets), begin, nets.actor, policy)


def learn(nets: soft.Nets, s: Any, batch: Batch, noise: soft.Noise) -> tuple[Any, Metrics]:
    """One update of temperature, actor, critics and averages, from temporal differences alone."""
    regression = lambda critic, goal: soft.regression(nets, critic, batch, goal)
    s, metrics = soft.update(nets, s, batch, noise, critic_loss=regression)
    return s, metrics | {"loss/total": metrics["loss/critic"] + metrics["loss/actor"]}
