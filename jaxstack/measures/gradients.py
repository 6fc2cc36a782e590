"""Interference and noise of policy gradients."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def cosine_matrix(gradients: Float[Array, "A P"]) -> Float[Array, "A A"]:
    """Cosines between agents' gradients of the same parameters; 0 where a gradient vanishes."""
    norm = jnp.linalg.norm(gradients, axis=-1, keepdims=True)
    unit = gradients / jnp.maximum(norm, 1e-12)
    return unit @ unit.T


def interference(gradients: Float[Array, "A P"]) -> Float[Array, ""]:
    """Mean cosine over pairs of different agents: negative where they pull against each other."""
    count = gradients.shape[0]
    cosines = cosine_matrix(gradients)
    return (cosines.sum() - jnp.trace(cosines)) / max(count * (count - 1), 1)


def relative_variance(gradients: Float[Array, "M P"]) -> Float[Array, ""]:
    """Trace of the covariance over M minibatches, divided by the squared norm of the mean gradient.

    Unlike the variance over the entries of one gradient, it does not fall merely because there are more parameters.
    """
    mean = gradients.mean(0)
    trace = jnp.square(gradients - mean).sum(-1).mean() * gradients.shape[0] / max(gradients.shape[0] - 1, 1)
    return trace / jnp.maximum(jnp.square(mean).sum(), 1e-20)


def entry_variance(gradient: Float[Array, "P"]) -> Float[Array, ""]:
    """Variance over the entries of one gradient, as the HyperMARL release reports it; it shrinks like 1 / P."""
    return gradient.var()
