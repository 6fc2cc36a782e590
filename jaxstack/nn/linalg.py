"""Linear algebra that compiles, vmaps and runs without LAPACK, several calls of which can hang on few cores."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array


@functools.cache
def _rounds(n: int) -> np.ndarray:
    """A round robin of n players, n even: [n - 1, 2, n / 2], in which each pair meets once."""
    players, found = list(range(n)), []
    for _ in range(n - 1):
        found.append((players[: n // 2], players[: n // 2 - 1 : -1]))
        players = [players[0], players[-1], *players[1:-1]]
    return np.asarray(found, np.int32)


def eigenvectors(matrix: Array, sweeps: int = 8) -> tuple[Array, Array]:
    """Return the eigenvalues, the largest first, and the eigenvectors of a symmetric matrix.

    Jacobi's method with n / 2 rotations at a time (Brent and Luk, 1985), which keeps the vectors orthonormal to
    rounding.

    Args:
        matrix: [n, n] symmetric.
        sweeps: rounds in which each pair of rows is rotated once; 8 are enough in float32 for hundreds of rows.

    Returns:
        Eigenvalues [n] and eigenvectors [n, n], a column each.
    """
    n = matrix.shape[0]
    if n == 1:
        return matrix[0], jnp.ones_like(matrix)
    even = n + n % 2  # a row of zeros is never rotated
    start = jnp.zeros((even, even), matrix.dtype).at[:n, :n].set(matrix)
    pairs = jnp.asarray(_rounds(even))

    def rotated(v: Array, p: Array, q: Array, c: Array, s: Array) -> Array:
        """Rows p and q turned."""
        a, b = v[p], v[q]
        return v.at[p].set(c[:, None] * a - s[:, None] * b).at[q].set(s[:, None] * a + c[:, None] * b)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        m, vectors = carry
        p, q = pairs[i % (even - 1)]
        off = m[p, q]
        tau = (m[q, q] - m[p, p]) / jnp.where(off == 0, 1.0, 2.0 * off)
        t = jnp.where(tau < 0, -1.0, 1.0) / (jnp.abs(tau) + jnp.sqrt(1.0 + tau**2))
        t = jnp.where(off == 0, 0.0, t).astype(m.dtype)
        c = lax.rsqrt(1.0 + t**2)
        s = t * c
        m = rotated(rotated(m, p, q, c, s).T, p, q, c, s)
        return m, rotated(vectors, p, q, c, s)

    m, vectors = lax.fori_loop(0, sweeps * (even - 1), step, (start, jnp.eye(even, dtype=matrix.dtype)))
    values = jnp.diagonal(m)[:n]
    order = jnp.argsort(-values)
    return values[order], vectors[:n, :n][order].T


def leading(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Return the best approximation of a given rank (Eckart and Young, 1936) as a product.

    Args:
        matrix: [m, n].
        rank: r, at most min(m, n).

    Returns:
        Left [m, r] and right [r, n] factor; the columns of the left one are orthonormal, or zero past the matrix's
        rank.
    """
    m, n = matrix.shape
    if m <= n:
        basis = eigenvectors(matrix @ matrix.T)[1][:, :rank]
        return basis, basis.T @ matrix
    basis = eigenvectors(matrix.T @ matrix)[1][:, :rank]
    left = matrix @ basis
    norms = jnp.linalg.norm(left, axis=0)
    return left / jnp.where(norms > 0, norms, 1.0), norms[:, None] * basis.T


def relative_error(found: Array, wanted: Array) -> Array:
    """Frobenius norm of the difference over that of `wanted`."""
    return jnp.linalg.norm(jnp.ravel(found - wanted)) / jnp.linalg.norm(jnp.ravel(wanted))
