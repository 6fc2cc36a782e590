"""Loss terms per sample; reduce them with `masked_mean`. `groups` names the group of each agent, see groups.py."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.groups import Groups, number, sums


def ppo_clip(logp: Array, old_logp: Array, advantage: Array, clip: Array | float) -> Array:
    """-min(r A, clip(r, 1 - clip, 1 + clip) A) with r = exp(logp - old_logp) (Schulman et al., 2017, eq. 7)."""
    ratio = jnp.exp(logp - old_logp)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage)


def clipped_value(value: Array, old_value: Array, target: Array, clip: Array | float) -> Array:
    """Half the larger of the squared errors of the value and of the value clipped to old_value +- clip."""
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped - target))


def huber(error: Array, delta: float = 1.0) -> Array:
    """Quadratic within +-delta, linear outside (Huber, 1964)."""
    size = jnp.abs(error)
    inside = jnp.minimum(size, delta)
    return 0.5 * jnp.square(inside) + delta * (size - inside)


def masked_mean(x: Array, weight: Array) -> Array:
    """Weighted mean; 0 when no weight is left."""
    weight = jnp.broadcast_to(weight, x.shape).astype(x.dtype)
    return (x * weight).sum() / jnp.maximum(weight.sum(), 1e-8)


def masked_means(terms: dict[str, Array], weight: Array, groups: Groups = ()) -> dict[str, Array]:
    """`masked_mean` of several terms of one shape, by one sum.

    Args:
        terms: Arrays of one shape; with several groups [..., A].
        weight: What each entry counts, of a shape that broadcasts to theirs.
        groups: The group of each agent.

    Returns:
        Scalars, or with several groups the means [G] over each group's own entries.
    """
    stacked = jnp.stack([*terms.values()])
    weight = jnp.broadcast_to(weight, stacked.shape[1:]).astype(stacked.dtype)
    if number(groups) == 1:
        axes = tuple(range(1, stacked.ndim))
        means = (stacked * weight).sum(axes) / jnp.maximum(weight.sum(), 1e-8)
    else:
        axes = tuple(range(1, stacked.ndim - 1))
        count = sums(weight.sum(tuple(a - 1 for a in axes)), groups)
        means = sums((stacked * weight).sum(axes), groups) / jnp.maximum(count, 1e-8)
    return dict(zip(terms, means, strict=True))


def standardise(x: Array, weight: Array, eps: float = 1e-8, groups: Groups = ()) -> Array:
    """(x - mean) / (std + eps) with weighted moments over all axes; of x [..., A] with several groups each agent with
    those of its own group."""
    mean, var = moments(x, weight, groups)
    return (x - mean) / (jnp.sqrt(var) + eps)


def explained_variance(value: Array, target: Array, weight: Array, groups: Groups = ()) -> Array:
    """1 - Var[target - value] / Var[target] over the entries that count; the agents' mean, each with its own group's
    variances [..., A]."""
    left, whole = (moments(x, weight, groups)[1] for x in (target - value, target))
    return (1.0 - left / jnp.maximum(whole, 1e-8)).mean()


def moments(x: Array, weight: Array, groups: Groups = ()) -> tuple[Array, Array]:
    """Weighted mean and variance over all axes; of x [..., A] with several groups [A], those of each agent's group."""

    def mean(x: Array) -> Array:
        if number(groups) == 1:
            return masked_mean(x, weight)
        return masked_means({"x": x}, weight, groups)["x"][np.asarray(groups)]

    centre = mean(x)
    return centre, mean(jnp.square(x - centre))
