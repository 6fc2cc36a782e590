"""The conservative term of CQL (Kumar et al., 2020), and what Cal-QL (Nakamoto et al., 2023) makes of it.

Of each critic: logsumexp_j [Q(s, a_j) - log density of a_j] - Q(s, a) over K uniform actions, K of pi(s) and K of
pi(s'), all valued at s, as in the authors' code.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.agents import soft
from jaxstack.agents.offline import Batch
from jaxstack.core.learner import Key


class Noise(NamedTuple):
    """Numbers behind the actions of the conservative term [K, B, A]."""

    uniform: Array
    """In [-1, 1]"""
    now: Array
    """Standard normal, of pi(s)"""
    then: Array
    """Likewise of pi(s')"""


def draw(nets: soft.Nets, key: Key, count: int, actions: int) -> Noise:
    """The noise of one conservative term."""
    k_uniform, k_normal = jax.random.split(key)
    shape = (actions, count, nets.task.action_size)
    uniform = jax.random.uniform(k_uniform, shape, jnp.float32, -1.0, 1.0)
    return Noise(uniform, *jax.random.normal(k_normal, (2, *shape), jnp.float32))


def candidates(nets: soft.Nets, s: Any, batch: Batch, noise: Noise) -> tuple[Array, Array]:
    """Return the actions a_j [3K, B, A] and the logarithms of their densities [3K, B]; no gradient flows into them."""
    act = jax.vmap(lambda obs, z: nets.actor(s.params["actor"], obs).sample_from(z), (None, 0))
    (now, p_now), (then, p_then) = act(batch.obs, noise.now), act(batch.next_obs, noise.then)
    flat = jnp.full(p_now.shape, -nets.task.action_size * np.log(2.0), jnp.float32)
    found = jnp.concatenate([noise.uniform, now, then]), jnp.concatenate([flat, p_now, p_then])
    return jax.lax.stop_gradient(found)


def gap(values: Array, log_density: Array, own: Array) -> Array:
    """Return logsumexp_j [Q(s, a_j) - log density] - Q(s, a), averaged over the batch and summed over critics.

    Args:
        values: [E, J, B] of the candidates.
        log_density: [J, B].
        own: [E, B] of the data's actions.
    """
    return (jax.nn.logsumexp(values - log_density, axis=1) - own).mean(-1).sum()


def term(
    nets: soft.Nets, critic: Any, batch: Batch, actions: Array, log_density: Array, floor: Array | None = None
) -> Array:
    """The conservative term of the critics.

    Args:
        nets: the networks.
        critic: the critics' parameters.
        batch: transitions.
        actions: of `candidates`.
        log_density: likewise.
        floor: [B] values of a reference policy, such as the data's returns-to-go: the policy's actions count at least
            so much, those drawn uniformly their value (Cal-QL). None: CQL.
    """
    count = len(actions)
    tiled = jnp.tile(batch.obs, (count, 1))
    values = nets.critics(critic, tiled, actions.reshape(-1, actions.shape[-1])).reshape(nets.critics.size, count, -1)
    if floor is not None:
        uniform, own = jnp.split(values, [count // 3], axis=1)
        values = jnp.concatenate([uniform, jnp.maximum(own, floor)], axis=1)
    return gap(values, log_density, nets.critics(critic, batch.obs, batch.action))
