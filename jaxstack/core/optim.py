"""Gradient transformations beside optax's."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


def clip_by_global_norm(max_norm: Array | float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, to rounding, as a product with one scalar.

    optax divides every entry, and XLA computes a division once and stores it: one pass more over all gradients. The
    product joins the optimiser's own loops.
    """

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        scale = max_norm / jnp.maximum(optax.global_norm(updates), max_norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
