"""Updates of learners with a deterministic actor: TD3 (Fujimoto et al., 2018), TD3+BC (Fujimoto and Gu, 2021) and
ReBRAC (Tarasov et al., 2023).

Pure functions of a state, a batch and noise, for td3, td3_bc, rebrac and imitate-then-improve. Targets bootstrap from
the smaller of two averaged critics at the averaged actor's action with clipped noise; actor and averages follow every
second update of the critics.
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
from jaxstack.core.metrics import Mean
from jaxstack.nn.ensembles import Critics, Net, forward

CRITICS = 2
TINY = 1e-8
"""Added to what a loss is divided by."""


class Nets(NamedTuple):
    """Static: the networks and which algorithm improves them."""

    task: Task
    actor_net: Net
    critics: Critics
    regularised: bool = False
    """ReBRAC's penalties, else TD3+BC's."""
    policy_every: int = 2

    def actor(self, params: Any, obs: Array) -> Array:
        """Actions [B, A] in [-1, 1]."""
        return jnp.tanh(forward(self.actor_net, params, obs))


def init(nets: Nets, key: Key, hypers: Any) -> State:
    """Fresh networks, their averages equal to them, Adam's states."""
    k_actor, k_critic, key = jax.random.split(key, 3)
    task = nets.task
    actor = nets.actor_net.init(k_actor, jnp.zeros((1, task.obs_size), jnp.float32))["params"]
    params = {"actor": actor, "critic": nets.critics.init(k_critic, task.obs_size + task.action_size)}
    return offline.fresh(task, hypers, params, params, offline.adam_states(params), key)


def draw(nets: Nets, key: Key, count: int) -> Array:
    """Standard normal numbers [B, A] of the target's actions."""
    return jax.random.normal(key, (count, nets.task.action_size), jnp.float32)


def target_values(nets: Nets, s: State, batch: Batch, noise: Array) -> Array:
    """y = r + gamma (1 - last) (min_i Q'_i(s', a') - beta2 |a' - a_next|^2), a' = clip(pi'(s') + clipped noise).

    The penalty is ReBRAC's, and 0 where the episode has no next action.
    """
    h = s.hypers
    jitter = jnp.clip(h.policy_noise * noise, -h.noise_clip, h.noise_clip)
    action = jnp.clip(nets.actor(s.target["actor"], batch.next_obs) + jitter, -1.0, 1.0)
    value = nets.critics(s.target["critic"], batch.next_obs, action).min(0)
    if nets.regularised:
        value = value - h.beta2 * batch.next_known * jnp.square(action - batch.next_action).sum(-1)
    return batch.reward + h.gamma * (1.0 - batch.last) * value


def regression(nets: Nets, params: Any, batch: Batch, goal: Array) -> Array:
    """Sum over critics of the mean squared difference between Q_i(s, a) and `goal` [B]."""
    return jnp.square(nets.critics(params, batch.obs, batch.action) - goal).mean(-1).sum()


def actor_loss(nets: Nets, actor: Any, critic: Any, batch: Batch, hypers: Any) -> Array:
    """TD3+BC: -alpha mean Q_1 / sg(mean |Q_1|) + mean (pi - a)^2. ReBRAC: -mean min_i Q_i / sg(mean |min_i Q_i|) +
    beta1 mean |pi - a|^2, summed over the action."""
    action = nets.actor(actor, batch.obs)
    error = jnp.square(action - batch.action)
    if nets.regularised:
        value = nets.critics(critic, batch.obs, action).min(0)
        return hypers.beta1 * error.sum(-1).mean() - scaled(value)
    return error.mean() - hypers.alpha * scaled(first_critic(nets, critic, batch.obs, action))


def first_critic(nets: Nets, critic: Any, obs: Array, action: Array) -> Array:
    """Q_1 [B]."""
    first = jax.tree.map(lambda x: x[:1], critic)
    return nets.critics._replace(size=1)(first, obs, action)[0]


def scaled(value: Array) -> Array:
    """mean x / sg(mean |x|)."""
    return value.mean() / jax.lax.stop_gradient(jnp.abs(value).mean() + TINY)


def update(
    nets: Nets,
    s: State,
    batch: Batch,
    number: Array,
    noise: Array,
    critic_loss: Callable[[Any, Array], Array] | None = None,
    policy_loss: Callable[[Any, Any], Array] | None = None,
) -> tuple[State, Metrics]:
    """One update of the critics and, every second one, of actor and averages.

    Args:
        nets: the networks.
        s: state.
        batch: transitions.
        number: of the step, from 0; without an axis of seeds, so that vmapped seeds skip what is not due.
        noise: standard normal numbers [B, A].
        critic_loss: (critics' parameters, targets [B]) -> loss; default: `regression`.
        policy_loss: (actor's parameters, critics') -> loss; default: `actor_loss`.
    """
    goal = jax.lax.stop_gradient(target_values(nets, s, batch, noise))
    loss = critic_loss or (lambda critic, goal: regression(nets, critic, batch, goal))
    value, grads = jax.value_and_grad(loss)(s.params["critic"], goal)
    params, opt_state = offline.descend(s.params, s.opt_state, "critic", grads, s.hypers.lr)

    def improve(params: Any, opt_state: Any, target: Any) -> tuple:
        own = policy_loss or (lambda actor, critic: actor_loss(nets, actor, critic, batch, s.hypers))
        value, grads = jax.value_and_grad(own)(params["actor"], params["critic"])
        params, opt_state = offline.descend(params, opt_state, "actor", grads, s.hypers.lr)
        return params, opt_state, optax.incremental_update(params, target, s.hypers.tau), Mean(value, jnp.float32(1.0))

    def wait(params: Any, opt_state: Any, target: Any) -> tuple:
        return params, opt_state, target, Mean(jnp.float32(0.0), jnp.float32(0.0))

    due = (number + 1) % nets.policy_every == 0
    params, opt_state, target, policy = jax.lax.cond(due, improve, wait, params, opt_state, s.target)
    metrics = {"loss/critic": value, "train/actor": policy, "train/target": goal.mean()}
    return s._replace(params=params, opt_state=opt_state, target=target), metrics
