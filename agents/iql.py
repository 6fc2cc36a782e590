"""IQL (Kostrikov et al., 2022): values from the data's actions alone, by expectile regression; the actor by weighted
cloning.

V: mean |tau - 1(u < 0)| u^2 with u = min_i Q'_i(s, a) - V(s); Q: squared distance to r + gamma V(s'); actor:
-exp(min(beta u, log 100)) log pi(a|s). expectile 0.5 is the mean of the behaviour's values.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.agents import offline
from jaxstack.agents.offline import Batch, State, Task
from jaxstack.core.config import require
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.nn import optimisers
from jaxstack.nn.distributions import Bounded
from jaxstack.nn.ensembles import Critics, Net, Norm, forward

LARGEST_WEIGHT = 100.0
"""Of a transition in the actor's loss."""
LOG_STD = (-20.0, 2.0)


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 3e-4
    """The actor's falls to 0 along a cosine."""
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""
    expectile: float = 0.7
    """Of the values over the behaviour's actions; towards 1 their maximum."""
    beta: float = 3.0
    """Inverse temperature of the actor's weights."""


@dataclass(frozen=True)
class Config(offline.OfflineConfig):
    """IQL; the paper takes expectile 0.9 and beta 10 for antmaze."""

    layer_norm: bool = False
    """Normalise layers before each ReLU, without scale and shift."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require(self, "hypers.expectile", 0 < self.hypers.expectile < 1, "a number in (0, 1)")


class Nets(NamedTuple):
    """Static: the networks."""

    task: Task
    actor_net: Net
    critics: Critics
    value_net: Net

    def actor(self, params: Any, obs: Array) -> Bounded:
        """Distributions of actions [B, A], with one deviation for all states."""
        mean = jnp.tanh(forward(self.actor_net, params["mean"], obs))
        return Bounded(mean, jnp.exp(jnp.clip(params["log_std"], *LOG_STD)) * jnp.ones_like(mean))

    def value(self, params: Any, obs: Array) -> Array:
        """V [B]."""
        return forward(self.value_net, params, obs)[:, 0]


def expectile_loss(u: Array, expectile: Array | float) -> Array:
    """mean |tau - 1(u < 0)| u^2 (Newey and Powell, 1987)."""
    return (jnp.abs(expectile - (u < 0).astype(jnp.float32)) * jnp.square(u)).mean()


def init(nets: Nets, key: Key, hypers: Any, num_updates: int) -> State:
    """Fresh networks, averages of the critics, Adam's states; `aux` is the length of the actor's schedule."""
    k_actor, k_critic, k_value, key = jax.random.split(key, 4)
    obs = jnp.zeros((1, nets.task.obs_size), jnp.float32)
    mean = nets.actor_net.init(k_actor, obs)["params"]
    params = {
        "actor": {"mean": mean, "log_std": jnp.zeros(nets.task.action_size, jnp.float32)},
        "critic": nets.critics.init(k_critic, nets.task.obs_size + nets.task.action_size),
        "value": nets.value_net.init(k_value, obs)["params"],
    }
    target = {"critic": params["critic"]}
    s = offline.fresh(nets.task, hypers, params, target, offline.adam_states(params), key)
    return s._replace(aux=jnp.int32(num_updates))


def update(nets: Nets, s: State, batch: Batch) -> tuple[State, Metrics]:
    """One update of V, of the actor by V's advantages before it, and of the critics towards V before it."""
    h = s.hypers
    known = nets.critics(s.target["critic"], batch.obs, batch.action).min(0)
    advantage = known - nets.value(s.params["value"], batch.obs)
    after = nets.value(s.params["value"], batch.next_obs)
    goal = batch.reward + h.gamma * (1.0 - batch.last) * after
    weight = jnp.exp(jnp.minimum(h.beta * advantage, math.log(LARGEST_WEIGHT)))

    def value_loss(value: Any) -> Array:
        return expectile_loss(known - nets.value(value, batch.obs), h.expectile)

    def critic_loss(critic: Any) -> Array:
        return jnp.square(nets.critics(critic, batch.obs, batch.action) - goal).mean(-1).sum()

    def actor_loss(actor: Any) -> Array:
        return -(weight * nets.actor(actor, batch.obs).log_prob(batch.action)).mean()

    rate = optimisers.learning_rate("cosine", s.step, s.aux, h.lr)
    params, opt_state, metrics = s.params, s.opt_state, {"train/advantage": advantage.mean()}
    for name, loss, lr in (("value", value_loss, h.lr), ("critic", critic_loss, h.lr), ("actor", actor_loss, rate)):
        metrics[f"loss/{name}"], grads = jax.value_and_grad(loss)(params[name])
        params, opt_state = offline.descend(params, opt_state, name, grads, lr)
    target = optax.incremental_update({"critic": params["critic"]}, s.target, h.tau)
    return s._replace(params=params, opt_state=opt_state, target=target), metrics


def nets_of(config: Config, task: Task) -> Nets:
    """Networks with the config's widths."""
    norm: Norm = "before" if config.layer_norm else "none"
    critics = Critics(Net(config.critic_hidden, 1, norm), 2)
    return Nets(task, Net(config.actor_hidden, task.action_size, norm), critics, Net(config.critic_hidden, 1, norm))


def iql(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions."""
    task = offline.make_task(config)
    nets = nets_of(config, task)
    begin = lambda key, hypers: init(nets, key, hypers, config.num_updates)
    learner = offline.make_learner("iql", task, begin, lambda s, batch, number, key: update(nets, s, batch), nets.actor)
    return learner._replace(with_length=lambda s, steps: s._replace(aux=jnp.full_like(s.aux, steps)))
