"""Metrics between the device and the host.

A metric is a scalar or a `Mean`: a sum, and how many values are in it. Means of several batches, minibatches or devices
are put together by adding (or averaging) their fields, e.g. `jax.tree.map(jnp.add, a, b)`. They are divided on the host
alone, where a mean over nothing is NaN. So no array of a healthy run is NaN, and `jax_debug_nans` finds those that
should not be.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Mean(NamedTuple):
    """The mean `total / count`, NaN where `count` is 0; both fields are float32 and of one shape."""

    total: Array
    count: Array


Metric = Array | Mean


def mean(x: Array, where: Array | bool | None = None) -> Mean:
    """The mean of all entries of x, or of those for which `where` (broadcast to x) holds."""
    x = x.astype(jnp.float32)
    if where is None:
        return Mean(x.sum(), jnp.float32(x.size))
    where = jnp.broadcast_to(where, x.shape)
    return Mean(jnp.where(where, x, 0.0).sum(), where.sum().astype(jnp.float32))


def on_host(metrics: Any) -> Any:
    """Each metric of a tree as a numpy array of values; a `Mean` over nothing is NaN."""
    return jax.tree.map(_value, metrics, is_leaf=lambda m: isinstance(m, Mean))


def _value(metric: Metric) -> np.ndarray:
    if not isinstance(metric, Mean):
        return np.asarray(metric)
    total, count = np.asarray(metric.total), np.asarray(metric.count)
    # times the reciprocal, as XLA divides by a constant: bitwise identical to a division on the device
    return np.where(count > 0, total * (np.float32(1.0) / np.maximum(count, np.float32(1.0))), np.float32(np.nan))
