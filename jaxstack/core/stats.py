"""Statistics over runs (Agarwal et al., 2021, "Deep RL at the edge of the statistical precipice"), in JAX.

Scores are tables [S, M]: S runs (seeds) of M tasks. Intervals are percentile bootstraps, stratified: runs are resampled
within each task. The same key gives the same interval.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A point estimate and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def table(scores: Any, name: str = "scores") -> Array:
    """[S] or [S, M] -> [S, M] float32; raises `UserError` for empty, ragged or non-finite tables."""
    try:
        out = np.asarray(scores, np.float32)
    except (ValueError, TypeError) as e:
        raise UserError(f"{name}: expected a full table of numbers [runs, tasks]") from e
    out = out[:, None] if out.ndim == 1 else out
    if out.ndim != 2 or 0 in out.shape:
        raise UserError(f"{name}: expected a table [runs, tasks], found shape {out.shape}")
    if not np.isfinite(out).all():
        raise UserError(f"{name}: {int((~np.isfinite(out)).sum())} entries are not finite")
    return jnp.asarray(out)


def mean(x: Array) -> Array:
    """Mean over all runs and tasks."""
    return x.mean()


def median(x: Array) -> Array:
    """Median over tasks of the mean over runs."""
    return jnp.median(x.mean(0))


def iqm(x: Array) -> Array:
    """Interquartile mean: the mean of the middle half of all S * M scores (floor(n / 4) cut from each end)."""
    flat = jnp.sort(x.reshape(-1))
    cut = flat.size // 4
    return flat[cut : flat.size - cut].mean()


def optimality_gap(x: Array, target: float = 1.0) -> Array:
    """Mean shortfall below `target`."""
    return jnp.maximum(target - x, 0.0).mean()


def improvement(x: Array, y: Array) -> Array:
    """Probability that a run of X beats a run of Y on a task (ties count half), averaged over tasks."""
    wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    return wins.astype(jnp.float32).mean()


def profile(x: Array, taus: Array) -> Array:
    """[K] share of runs with a score above each of `taus` [K]."""
    return (x[None] > taus[:, None, None]).astype(jnp.float32).mean((1, 2))


def bootstrap(
    statistic: Callable[..., Array],
    *scores: Any,
    key: Array | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> tuple[Array, Array, Array]:
    """(estimate, low, high) of `statistic(*tables)`, which may return an array; each table is resampled by itself."""
    tables = [table(s) for s in scores]
    key = jax.random.key(0) if key is None else key
    value, draws = _draws(statistic, key, resamples, *tables)
    tail = (1.0 - confidence) / 2.0
    low, high = jnp.quantile(draws, jnp.asarray([tail, 1.0 - tail]), axis=0)
    return value, low, high


def estimate(statistic: Callable[..., Array], *scores: Any, **options: Any) -> Estimate:
    """`bootstrap` of a scalar as plain floats."""
    return Estimate(*(float(v) for v in bootstrap(statistic, *scores, **options)))


def difference(x: Any, y: Any, statistic: Callable[[Array], Array] = mean, **options: Any) -> Estimate:
    """statistic(X) - statistic(Y) with its interval."""
    return estimate(_Difference(statistic), x, y, **options)


def summary(scores: Any, target: float = 1.0, **options: Any) -> dict[str, Estimate]:
    """IQM, mean, median and optimality gap with intervals."""
    gap = _Gap(target)
    return {
        name: estimate(f, scores, **options)
        for name, f in (("iqm", iqm), ("mean", mean), ("median", median), ("optimality_gap", gap))
    }


class _Difference(NamedTuple):  # a hashable closure: one compile for each statistic
    statistic: Callable

    def __call__(self, x: Array, y: Array) -> Array:
        return self.statistic(x) - self.statistic(y)


class _Gap(NamedTuple):
    target: float

    def __call__(self, x: Array) -> Array:
        return optimality_gap(x, self.target)


def _draws(statistic: Callable, key: Array, resamples: int, *tables: Array) -> tuple[Array, Array]:
    def resample(key: Array, x: Array) -> Array:
        index = jax.random.randint(key, x.shape, 0, x.shape[0])
        return jnp.take_along_axis(x, index, axis=0)

    def one(key: Array) -> Array:
        return statistic(*(resample(k, x) for k, x in zip(jax.random.split(key, len(tables)), tables)))

    # in batches: all resamples of a large table at once would not fit
    run = jax.jit(lambda key: (statistic(*tables), jax.lax.map(one, jax.random.split(key, resamples), batch_size=1000)))
    return run(key)
