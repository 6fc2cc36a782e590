"""Weight initialisers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def orthogonal(gain: float = 1.0) -> Callable[..., Array]:
    """`gain` times a random matrix with orthonormal rows or columns (Saxe et al., 2014), uniform over all of them.

    Gram-Schmidt, twice over for accuracy, instead of LAPACK's QR: several QR calls in one program can deadlock XLA's
    CPU backend on machines with few cores, and this form vmaps cheaply.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        cols = shape[-1]
        rows = 1
        for n in shape[:-1]:
            rows *= n
        long, short = max(rows, cols), min(rows, cols)
        normal = jax.random.normal(key, (short, long), dtype)

        def column(basis: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
            i, v = inputs
            for _ in range(2):
                v = v - basis.T @ (basis @ v)
            return basis.at[i].set(v / jnp.linalg.norm(v)), None

        basis, _ = jax.lax.scan(column, jnp.zeros((short, long), dtype), (jnp.arange(short), normal))
        q = basis if rows <= cols else basis.T
        return gain * q.reshape(shape)

    return init
