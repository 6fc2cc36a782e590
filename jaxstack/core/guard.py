"""Freeze a seed whose numbers go non-finite; the others go on.

A frozen seed keeps the state before the bad step, but for replay buffers and the like (leaves of LARGE elements or more
that are not shaped as a parameter, which spares optimiser moments): choosing between old and new would copy them on
every step, so they run on, unused.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.metrics import Metric

LARGE = 2**16


class Alive(NamedTuple):
    """Whether a seed still trains, and the step (1-based) whose result was refused, 0 if none."""

    ok: Array
    failed_step: Array


def start(num_seeds: int) -> Alive:
    """All seeds alive."""
    return Alive(jnp.ones(num_seeds, bool), jnp.zeros(num_seeds, jnp.int32))


def finite(state: Any, metrics: Mapping[str, Metric]) -> Array:
    """True if every parameter and every metric named `loss/...` is finite."""
    leaves = [x for x in jax.tree.leaves(getattr(state, "params", ())) if jnp.issubdtype(x.dtype, jnp.inexact)]
    leaves += jax.tree.leaves([v for k, v in metrics.items() if k.startswith("loss/")])
    checks = [jnp.isfinite(x).all() for x in leaves]
    return jnp.stack(checks).all() if checks else jnp.bool_(True)


def guarded(
    step: Callable[..., tuple[Any, Mapping[str, Metric]]],
) -> Callable[..., tuple[Any, Alive, Mapping[str, Metric]]]:
    """(state, alive, number of this step, *batch) -> (state, alive, metrics); a dead or failing seed stays as it is."""

    def run(state: Any, alive: Alive, number: Array, *batch: Any) -> tuple[Any, Alive, Mapping[str, Metric]]:
        new, metrics = step(state, *batch)
        ok = alive.ok & finite(new, metrics)
        failed = jnp.where(alive.ok & ~ok, number, alive.failed_step)
        shapes = {jnp.shape(x) for x in jax.tree.leaves(getattr(new, "params", ()))}
        keep = lambda x: x.size >= LARGE and x.shape not in shapes
        state = jax.tree.map(lambda n, o: n if n is o or keep(n) else _where(ok, n, o), new, state)
        return state, Alive(ok, failed), metrics

    return run


def unguarded(
    step: Callable[..., tuple[Any, Mapping[str, Metric]]],
) -> Callable[..., tuple[Any, Alive, Mapping[str, Metric]]]:
    """The same signature without the check."""

    def run(state: Any, alive: Alive, number: Array, *batch: Any) -> tuple[Any, Alive, Mapping[str, Metric]]:
        new, metrics = step(state, *batch)
        return new, alive, metrics

    return run


def _where(ok: Array, new: Array, old: Array) -> Array:
    if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
        data = jnp.where(ok, jax.random.key_data(new), jax.random.key_data(old))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(new))
    return jnp.where(ok, new, old)
