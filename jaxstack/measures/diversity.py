"""How differently a team behaves: distances between agents' action distributions on the SAME observations.

System neural diversity (SND, Bettini et al., 2023) is the mean distance over pairs of agents and over a fixed set of
observations. Take the observations from a mixture of policies, not from the team that is judged: agents that merely
visit different states are not diverse.

Arguments of other shapes or types raise `AssertionError`, which names the argument.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.core import shapes


def jensen_shannon(logits: Float[Array, "B A n"]) -> Float[Array, "B A A"]:
    """Compute the square root of the Jensen-Shannon divergence between all pairs of agents.

    Args:
        logits: Of categorical policies [B, A, n] on B observations.

    Returns:
        Distances [B, A, A] with the natural logarithm, at most sqrt(ln 2).

    Example:
        diversity = snd(jensen_shannon(logits))
    """
    shapes.assert_rank(3, logits=logits)
    shapes.assert_float(logits=logits)
    logp = jax.nn.log_softmax(logits, -1)
    p = jnp.exp(logp)
    left, right = logp[:, :, None], logp[:, None]
    middle = jnp.logaddexp(left, right) - jnp.log(2.0)
    entropy = lambda lp, l: jnp.sum(lp * jnp.where(lp > 0, l - middle, 0.0), -1)
    divergence = 0.5 * (entropy(p[:, :, None], left) + entropy(p[:, None], right))
    return jnp.sqrt(jnp.maximum(divergence, 0.0))


def total_variation(logits: Float[Array, "B A n"]) -> Float[Array, "B A A"]:
    """Compute half the L1 distance of the probabilities between all pairs of agents.

    Args:
        logits: Of categorical policies [B, A, n] on B observations.

    Returns:
        Distances [B, A, A] in [0, 1].
    """
    shapes.assert_rank(3, logits=logits)
    shapes.assert_float(logits=logits)
    p = jax.nn.softmax(logits, -1)
    return 0.5 * jnp.abs(p[:, :, None] - p[:, None]).sum(-1)


def wasserstein(mean: Float[Array, "B A k"], std: Float[Array, "B A k"]) -> Float[Array, "B A A"]:
    """Compute the 2-Wasserstein distance between all pairs of agents: sqrt(|mean - mean'|^2 + |std - std'|^2).

    Args:
        mean: Of diagonal normal policies [B, A, k] on B observations.
        std: Their standard deviations [B, A, k].

    Returns:
        Distances [B, A, A].
    """
    shapes.assert_rank(3, mean=mean)
    shapes.assert_same_shape(mean=mean, std=std)
    shapes.assert_float(mean=mean, std=std)
    square = lambda x: jnp.square(x[:, :, None] - x[:, None]).sum(-1)
    return jnp.sqrt(square(mean) + square(std))


def snd(distances: Float[Array, "B A A"]) -> Float[Array, ""]:
    """Compute system neural diversity (Bettini et al., 2023): the mean over observations and pairs of agents.

    Args:
        distances: Between all pairs of A agents on B observations [B, A, A].

    Returns:
        The mean over observations and over the A (A - 1) / 2 pairs; 0 for a single agent.
    """
    shapes.assert_rank(3, distances=distances)
    shapes.assert_float(distances=distances)
    shapes.assert_agent_pairs(distances=distances)
    count = distances.shape[-1]
    if count < 2:
        return jnp.float32(0.0)
    upper = jnp.triu(jnp.ones((count, count)), 1)
    return (distances * upper).sum((-1, -2)).mean() / upper.sum()
