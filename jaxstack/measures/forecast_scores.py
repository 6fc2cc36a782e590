"""Scores of probabilistic forecasts from samples: CRPS, threshold-weighted CRPS, energy score, variogram score.

Smaller is better. Samples are [M, L, d] trajectories, an observation is [L, d]; `jax.vmap` over observations scores
many. Estimators are the fair ones: means over pairs of different samples. Stamps where `mask` is False count nowhere.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxstack.core.errors import UserError


def _present(samples: Array, observed: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Return samples and observation with zeros at missing stamps, and 1 or 0 for each of their numbers [L, d]."""
    if len(samples) < 2:
        raise UserError(f"samples: found {len(samples)}, expected at least 2")
    if samples.shape[1:] != observed.shape:
        raise UserError(
            f"samples: found shape {list(samples.shape)}, expected [M, {', '.join(map(str, observed.shape))}]"
        )
    there = jnp.ones(observed.shape, bool) if mask is None else jnp.broadcast_to(mask[:, None], observed.shape)
    return jnp.where(there, samples, 0.0), jnp.where(there, observed, 0.0), there.astype(samples.dtype)


def crps(
    samples: Float[Array, "m l d"],
    observed: Float[Array, "l d"],
    chain: Callable[[Array], Array] = lambda x: x,
    mask: Bool[Array, " l"] | None = None,
) -> Float[Array, ""]:
    """Compute the continuous ranked probability score, the mean over stamps and variables of E|X - y| - E|X - X'| / 2.

    Args:
        samples: At least two.
        observed: One trajectory.
        chain: Chaining function of a threshold-weighted score: `lambda x: jnp.maximum(x, 2.0)` looks above 2 only
            (Gneiting and Ranjan, 2011; Allen, Ginsbourger and Ziegel, 2023).
        mask: True where a stamp is observed.
    """
    samples, observed, there = _present(samples, observed, mask)
    x, y = chain(samples), chain(observed)
    ordered, m = jnp.sort(x, 0), len(x)
    # sum over i < j of x_(j) - x_(i), by ranks
    rank = (2.0 * jnp.arange(1, m + 1) - m - 1.0).astype(x.dtype).reshape(-1, 1, 1)
    spread = 2.0 * (rank * ordered).sum(0) / (m * (m - 1))
    return ((jnp.abs(x - y).mean(0) - spread / 2.0) * there).sum() / there.sum()


def energy_score(
    samples: Float[Array, "m l d"], observed: Float[Array, "l d"], mask: Bool[Array, " l"] | None = None
) -> Float[Array, ""]:
    """Compute E|X - y| - E|X - X'| / 2 with the Euclidean norm of whole trajectories (Gneiting and Raftery, 2007)."""
    samples, observed, _ = _present(samples, observed, mask)
    x, m = (samples - observed).reshape(len(samples), -1), len(samples)
    far = jnp.square(x).sum(1)[:, None] + jnp.square(x).sum(1) - 2.0 * x @ x.T
    far = jnp.sqrt(jnp.maximum(far, 0.0)) * (1.0 - jnp.eye(m, dtype=x.dtype))
    return jnp.linalg.norm(x, axis=1).mean() - far.sum() / (m * (m - 1)) / 2.0


def variogram_score(
    samples: Float[Array, "m l d"],
    observed: Float[Array, "l d"],
    p: float = 0.5,
    mask: Bool[Array, " l"] | None = None,
) -> Float[Array, ""]:
    """Compute the mean over pairs (i, j) of numbers of (|y_i - y_j|^p - E|X_i - X_j|^p)^2 (Scheuerer and Hamill, 2015).

    The expectation is the mean over samples, as usual, which adds its variance to the score.
    """
    samples, observed, there = _present(samples, observed, mask)
    x, y, w = samples.reshape(len(samples), -1), observed.ravel(), there.ravel()
    expected = (jnp.abs(x[:, :, None] - x[:, None]) ** p).mean(0)
    pairs = w[:, None] * w
    return (pairs * jnp.square(jnp.abs(y[:, None] - y) ** p - expected)).sum() / pairs.sum()
