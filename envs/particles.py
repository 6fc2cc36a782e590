"""Point-particle physics shared by the native environments (Lowe et al., 2017; Bettini et al., 2022)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

# discrete moves: none, -x, +x, -y, +y
MOVES = ((0.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))


def moves(action: Array) -> Array:
    """[A] action in 0..4 -> [A, 2] unit force."""
    return jnp.asarray(MOVES, jnp.float32)[action]


def contact_force(
    pos: Array, min_dist: float, stiffness: float = 100.0, margin: float = 1e-3, *, cut_off: bool = True
) -> Array:
    """Soft repulsion between all pairs [A, 2]: 100 d/|d| k log(1 + exp(-(|d| - r) / k)), zero for coinciding points.
    With `cut_off` only for |d| <= r, as in VMAS; MPE has none."""
    delta = pos[:, None] - pos[None]
    square = jnp.sum(jnp.square(delta), -1)
    apart = square > 0
    dist = jnp.sqrt(jnp.where(apart, square, 1.0))
    touching = apart & (dist <= min_dist) if cut_off else apart
    depth = jax.nn.softplus(-(dist - min_dist) / margin) * margin
    size = jnp.where(touching, stiffness * depth / dist, 0.0)
    return jnp.sum(delta * size[..., None], axis=1)


def distances(a: Array, b: Array) -> Array:
    """[A, 2], [B, 2] -> [A, B] Euclidean distances."""
    return jnp.sqrt(jnp.sum(jnp.square(a[:, None] - b[None]), -1))
