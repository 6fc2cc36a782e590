"""How differently a team behaves: distances between agents' action distributions on the SAME observations.

System neural diversity (SND, Bettini et al., 2023) is the mean distance over pairs of agents and over a fixed set of
observations. Take the observations from a mixture of policies, not from the team that is judged: agents that merely
visit different states are not diverse.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def jensen_shannon(logits: Float[Array, "B A n"]) -> Float[Array, "B A A"]:
    """Square root of the Jensen-Shannon divergence (natural log, at most sqrt(ln 2)) between all pairs of agents."""
    logp = jax.nn.log_softmax(logits, -1)
    p = jnp.exp(logp)
    left, right = logp[:, :, None], logp[:, None]
    middle = jnp.logaddexp(left, right) - jnp.log(2.0)
    entropy = lambda lp, l: jnp.sum(lp * jnp.where(lp > 0, l - middle, 0.0), -1)
    divergence = 0.5 * (entropy(p[:, :, None], left) + entropy(p[:, None], right))
    return jnp.sqrt(jnp.maximum(divergence, 0.0))


def total_variation(logits: Float[Array, "B A n"]) -> Float[Array, "B A A"]:
    """Half the L1 distance of the probabilities, in [0, 1]."""
    p = jax.nn.softmax(logits, -1)
    return 0.5 * jnp.abs(p[:, :, None] - p[:, None]).sum(-1)


def wasserstein(mean: Float[Array, "B A k"], std: Float[Array, "B A k"]) -> Float[Array, "B A A"]:
    """2-Wasserstein distance of diagonal normals: sqrt(|mean - mean'|^2 + |std - std'|^2)."""
    square = lambda x: jnp.square(x[:, :, None] - x[:, None]).sum(-1)
    return jnp.sqrt(square(mean) + square(std))


def snd(distances: Float[Array, "B A A"]) -> Float[Array, ""]:
    """Mean over observations and over the A (A - 1) / 2 pairs; 0 for a single agent."""
    count = distances.shape[-1]
    if count < 2:
        return jnp.float32(0.0)
    upper = jnp.triu(jnp.ones((count, count)), 1)
    return (distances * upper).sum((-1, -2)).mean() / upper.sum()
