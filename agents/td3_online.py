"""TD3 (Fujimoto et al., 2018) for one agent with real actions, see off_policy.py for its play and td3.py for targets.

Critics learn from the smaller of two averaged critics at the averaged actor's action with clipped noise; actor and
averages follow every second update. Play adds normal noise to the actor's actions.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.agents import off_policy, offline
from jaxstack.agents import td3 as updates
from jaxstack.agents.off_policy import OffPolicyConfig, State, Task
from jaxstack.agents.offline import Batch
from jaxstack.core.config import require_at_least
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.nn.distributions import Bounded
from jaxstack.nn.ensembles import Critics, Net


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 1e-3
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""
    exploration: float = 0.1
    """Deviation of the noise that play adds, in units of half the action's range."""
    policy_noise: float = 0.2
    """Deviation of the noise in a target's action, likewise."""
    noise_clip: float = 0.5


@dataclass(frozen=True)
class Config(OffPolicyConfig):
    """TD3 with small networks."""

    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 0, "hypers.exploration", "hypers.policy_noise", "hypers.noise_clip")


def nets_of(cfg: Config) -> updates.Nets:
    """Networks. Raises `UserError` where config and environment do not fit."""
    task = offline.make_task(cfg)
    critic = Net(cfg.critic_hidden, 1, "before" if cfg.layer_norm else "none")
    return updates.Nets(task, Net(cfg.actor_hidden, task.action_size), Critics(critic, updates.CRITICS))


def explored(nets: updates.Nets, params: Any, exploration: Array, obs: Array) -> Bounded:
    """The actor's actions with the noise of play."""
    mean = nets.actor(params, obs)
    return Bounded(mean, exploration * jnp.ones_like(mean))


def task_of(nets: updates.Nets) -> Task:
    """How it explores and learns."""

    def explore(s: State, obs: Array, normal: Array) -> Array:
        return explored(nets, s.params["actor"], s.hypers.exploration, obs).sample_from(normal)[0]

    def improve(s: State, batch: Batch, number: Array, key: Key) -> tuple[State, Metrics]:
        return learn(nets, s, batch, number, updates.draw(nets, key, nets.task.cfg.batch_size))

    return off_policy.make_task(nets.task, explore, improve)


def td3(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions in finite bounds."""
    nets = nets_of(config)
    act = lambda p, obs: explored(nets, p["net"], p["exploration"], obs)
    policy = offline.policy_of(nets.task, act)._replace(
        params=lambda s: offline.acting(s) | {"actor": {"net": s.params["actor"], "exploration": s.hypers.exploration}}
    )
    begin = lambda key, hypers: updates.init(nets, key, hypers)
    return off_policy.make_learner("td3", task_of(nets), begin, nets.actor, policy)


def learn(nets: updates.Nets, s: Any, batch: Batch, number: Array, noise: Array) -> tuple[Any, Metrics]:
    """One update of the critics and, every second one, of the actor on -mean Q_1(s, pi(s)) and the averages."""
    improve = lambda actor, critic: -updates.first_critic(nets, critic, batch.obs, nets.actor(actor, batch.obs)).mean()
    s, metrics = updates.update(nets, s, batch, number, noise, policy_loss=improve)
    return s, metrics | {"loss/total": metrics["loss/critic"]}
