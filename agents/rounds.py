"""What learners share whose training step is several rounds of play and of updates from a replay buffer."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.guard import CHECK
from jaxstack.core.learner import Key, Metrics
from jaxstack.core.metrics import Mean

S = TypeVar("S")


def rounds(
    one: Callable[[S, Key, Array], tuple[S, Metrics]], s: S, key: Key, count: int, step: Array
) -> tuple[S, Metrics]:
    """A training step.

    Args:
        one: (state, key, number of the round in the run, from 0) -> state, sums as metrics.
        s: the state.
        key: of the step.
        count: rounds of a step.
        step: its number, from 0.

    Returns:
        The state behind all rounds, and their metrics together: sums, and whether checks hold in all of them.
    """
    keys = jax.random.split(key, count)
    numbers = step * count + jnp.arange(count, dtype=jnp.int32)
    s, metrics = jax.lax.scan(lambda s, x: one(s, *x), s, (keys, numbers))
    return s, {
        name: jnp.all(jnp.asarray(x)) if name.startswith(CHECK) else jax.tree.map(lambda v: v.sum(0), x)
        for name, x in metrics.items()
    }


def updates(
    one: Callable[[S, Key, Array], tuple[S, Metrics]], s: S, key: Key, count: int, number: Array | int, ready: Array
) -> tuple[S, Metrics]:
    """The updates of a round.

    Args:
        one: (state, key, number of the update in the run, from 0) -> state, metrics.
        s: the state, without what updates leave as it is.
        key: of the round.
        count: updates of a round.
        number: of the round in the run, from 0.
        ready: whether any are made.

    Returns:
        The state behind them, and the means of their metrics, over nothing where none were made.
    """
    numbers = number * count + jnp.arange(count, dtype=jnp.int32)
    run = lambda s: jax.lax.scan(lambda s, x: one(s, *x), s, (jax.random.split(key, count), numbers))
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, s)[1])
    s, found = jax.lax.cond(ready, run, lambda s: (s, blank), s)
    made = ready.astype(jnp.float32) * count
    mean: Any = lambda x: Mean(x.total.sum(), x.count.sum()) if isinstance(x, Mean) else Mean(x.sum(), made)
    return s, {name: mean(x) for name, x in found.items()}
