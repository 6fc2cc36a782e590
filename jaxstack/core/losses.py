"""Loss terms per sample; reduce them with `masked_mean`."""

import jax.numpy as jnp
from jaxtyping import Array


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


def masked_means(terms: dict[str, Array], weight: Array) -> dict[str, Array]:
    """`masked_mean` of several terms of one shape, by one sum."""
    stacked = jnp.stack([*terms.values()])
    weight = jnp.broadcast_to(weight, stacked.shape[1:]).astype(stacked.dtype)
    axes = tuple(range(1, stacked.ndim))
    means = (stacked * weight).sum(axes) / jnp.maximum(weight.sum(), 1e-8)
    return dict(zip(terms, means, strict=True))


def standardise(x: Array, weight: Array, eps: float = 1e-8) -> Array:
    """(x - mean) / (std + eps) with weighted moments over all axes."""
    mean = masked_mean(x, weight)
    std = jnp.sqrt(masked_mean(jnp.square(x - mean), weight))
    return (x - mean) / (std + eps)
