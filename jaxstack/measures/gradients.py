"""Interference and noise of policy gradients.

Arguments of other shapes or types raise `AssertionError`, which names the argument.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.core import shapes


def cosine_matrix(gradients: Float[Array, "A P"]) -> Float[Array, "A A"]:
    """Compute the cosines between agents' gradients of the same parameters.

    Args:
        gradients: A gradient of P parameters for each of A agents [A, P].

    Returns:
        Cosines [A, A]; 0 where a gradient vanishes.
    """
    shapes.assert_rank(2, gradients=gradients)
    shapes.assert_float(gradients=gradients)
    norm = jnp.linalg.norm(gradients, axis=-1, keepdims=True)
    unit = gradients / jnp.maximum(norm, 1e-12)
    return unit @ unit.T


def interference(gradients: Float[Array, "A P"]) -> Float[Array, ""]:
    """Compute the mean cosine over pairs of different agents: negative where they pull against each other.

    Args:
        gradients: A gradient of P parameters for each of A agents [A, P].

    Returns:
        The mean over the A (A - 1) pairs; 0 for a single agent.
    """
    shapes.assert_rank(2, gradients=gradients)
    count = gradients.shape[0]
    cosines = cosine_matrix(gradients)
    return (cosines.sum() - jnp.trace(cosines)) / max(count * (count - 1), 1)


def relative_variance(gradients: Float[Array, "M P"]) -> Float[Array, ""]:
    """Compute the trace of the covariance over M minibatches, divided by the squared norm of the mean gradient.

    Unlike the variance over the entries of one gradient, it does not fall merely because there are more parameters.

    Args:
        gradients: A gradient of P parameters for each of M minibatches [M, P].

    Returns:
        The ratio; 0 for a single minibatch.
    """
    shapes.assert_rank(2, gradients=gradients)
    shapes.assert_float(gradients=gradients)
    mean = gradients.mean(0)
    trace = jnp.square(gradients - mean).sum(-1).mean() * gradients.shape[0] / max(gradients.shape[0] - 1, 1)
    return trace / jnp.maximum(jnp.square(mean).sum(), 1e-20)


def entry_variance(gradient: Float[Array, "P"]) -> Float[Array, ""]:
    """Compute the variance over the entries of one gradient, as the HyperMARL release reports it.

    Args:
        gradient: A gradient of P parameters [P].

    Returns:
        The variance; it shrinks like 1 / P.
    """
    shapes.assert_rank(1, gradient=gradient)
    shapes.assert_float(gradient=gradient)
    return gradient.var()
