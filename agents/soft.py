"""Updates of learners with a tanh-normal actor and an ensemble of critics: SAC (Haarnoja et al.,
2018), SAC-N and EDAC (An et al., 2021).

Pure functions of a state, a batch and noise, for sac, edac, cql and imitate-then-improve. Order of an update:
temperature, actor, critics, averages; targets bootstrap from the smallest of all N critics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.agents import offline
from jaxstack.agents.offline import Batch, State, Task
from jaxstack.core.learner import Key, Metrics
from jaxstack.nn.distributions import TanhNormal
from jaxstack.nn.ensembles import Critics, Net, action_gradients, diversity, forward

LOG_STD = (-5.0, 2.0)
"""Bounds of the actor's log standard deviation, where it learns from data."""


class Nets(NamedTuple):
    """Static: the networks."""

    task: Task
    actor_net: Net
    """Observations -> means and log standard deviations [B, 2A]."""
    critics: Critics
    log_std: tuple[float, float] = LOG_STD

    def actor(self, params: Any, obs: Array) -> TanhNormal:
        """Distributions of actions [B, A]."""
        mean, log_std = jnp.split(forward(self.actor_net, params, obs), 2, axis=-1)
        return TanhNormal(mean, jnp.clip(log_std, *self.log_std))

    @property
    def target_entropy(self) -> float:
        """-A nats."""
        return -float(self.task.action_size)


class Noise(NamedTuple):
    """Standard normal numbers [B, A] of the three samples of an update."""

    temperature: Array
    actor: Array
    target: Array


def init(nets: Nets, key: Key, hypers: Any) -> State:
    """Fresh networks, temperature 1, averages of the critics, Adam's states."""
    k_actor, k_critic, key = jax.random.split(key, 3)
    task = nets.task
    actor = nets.actor_net.init(k_actor, jnp.zeros((1, task.obs_size), jnp.float32))["params"]
    critic = nets.critics.init(k_critic, task.obs_size + task.action_size)
    params = {"actor": actor, "critic": critic, "log_alpha": jnp.float32(0.0)}
    return offline.fresh(task, hypers, params, {"critic": critic}, offline.adam_states(params), key)


def draw(nets: Nets, key: Key, count: int) -> Noise:
    """The noise of one update."""
    return Noise(*jax.random.normal(key, (3, count, nets.task.action_size), jnp.float32))


def temper(nets: Nets, s: State, batch: Batch, noise: Array) -> State:
    """One step of the temperature on -log alpha (log pi + target entropy)."""
    loss = lambda log_alpha: temperature_loss(nets, log_alpha, s.params["actor"], batch, noise)
    grads = jax.grad(loss)(s.params["log_alpha"])
    params, opt_state = offline.descend(s.params, s.opt_state, "log_alpha", grads, s.hypers.lr)
    return s._replace(params=params, opt_state=opt_state)


def temperature_loss(nets: Nets, log_alpha: Array, actor: Any, batch: Batch, noise: Array) -> Array:
    """mean[-log alpha (log pi(a~|s) + target entropy)]."""
    logp = nets.actor(actor, batch.obs).sample_from(noise)[1]
    return -(log_alpha * jax.lax.stop_gradient(logp + nets.target_entropy)).mean()


def actor_loss(nets: Nets, actor: Any, critic: Any, alpha: Array, batch: Batch, noise: Array) -> Array:
    """mean(alpha log pi(a~|s) - min_i Q_i(s, a~))."""
    action, logp = nets.actor(actor, batch.obs).sample_from(noise)
    return (alpha * logp - nets.critics(critic, batch.obs, action).min(0)).mean()


def target_values(nets: Nets, s: State, batch: Batch, noise: Array) -> Array:
    """y = r + gamma (1 - last) (min_i Q'_i(s', a') - alpha log pi(a'|s'))."""
    action, logp = nets.actor(s.params["actor"], batch.next_obs).sample_from(noise)
    value = nets.critics(s.target["critic"], batch.next_obs, action).min(0)
    soft = value - jnp.exp(s.params["log_alpha"]) * logp
    return batch.reward + s.hypers.gamma * (1.0 - batch.last) * soft


def regression(nets: Nets, critic: Any, batch: Batch, goal: Array) -> Array:
    """Sum over critics of the mean squared difference between Q_i(s, a) and `goal` [B]."""
    return jnp.square(nets.critics(critic, batch.obs, batch.action) - goal).mean(-1).sum()


def penalty(nets: Nets, critic: Any, batch: Batch) -> Array:
    """Agreement of the critics' action gradients, which EDAC lowers; 0 for a single critic."""
    if nets.critics.size < 2:
        return jnp.float32(0.0)
    return diversity(action_gradients(nets.critics, critic, batch.obs, batch.action))


def update(
    nets: Nets,
    s: State,
    batch: Batch,
    noise: Noise,
    policy_loss: Callable[[Any, Any, Array], Array] | None = None,
    critic_loss: Callable[[Any, Array], Array] | None = None,
) -> tuple[State, Metrics]:
    """One update of temperature, actor, critics and averages.

    Args:
        nets: the networks.
        s: state.
        batch: transitions.
        noise: of the three samples.
        policy_loss: (actor's parameters, critics', alpha) -> loss; default: `actor_loss`.
        critic_loss: (critics' parameters, targets [B]) -> loss; default: `regression` and EDAC's penalty.
    """
    s = temper(nets, s, batch, noise.temperature)
    alpha, critic = jnp.exp(s.params["log_alpha"]), s.params["critic"]
    own = policy_loss or (lambda actor, critic, alpha: actor_loss(nets, actor, critic, alpha, batch, noise.actor))
    policy, grads = jax.value_and_grad(own)(s.params["actor"], critic, alpha)
    params, opt_state = offline.descend(s.params, s.opt_state, "actor", grads, s.hypers.lr)
    s = s._replace(params=params, opt_state=opt_state)
    goal = jax.lax.stop_gradient(target_values(nets, s, batch, noise.target))
    edac = lambda critic, goal: regression(nets, critic, batch, goal) + s.hypers.eta * penalty(nets, critic, batch)
    value, grads = jax.value_and_grad(critic_loss or edac)(critic, goal)
    params, opt_state = offline.descend(s.params, s.opt_state, "critic", grads, s.hypers.lr)
    target = optax.incremental_update({"critic": params["critic"]}, s.target, s.hypers.tau)
    metrics = {
        "loss/critic": value,
        "loss/actor": policy,
        "train/target": goal.mean(),
        "train/alpha": alpha,
    }
    return s._replace(params=params, opt_state=opt_state, target=target), metrics


def nets_of(task: Task, actor_hidden: tuple[int, ...], critic_hidden: tuple[int, ...], count: int, norm: Any) -> Nets:
    """Networks with the initialisation of EDAC: hidden biases 0.1, small last layers."""
    actor = Net(actor_hidden, 2 * task.action_size, norm, bias=0.1, last=1e-3)
    return Nets(task, actor, Critics(Net(critic_hidden, 1, norm, bias=0.1, last=3e-3), count))
