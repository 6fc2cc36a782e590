"""Replay buffers as part of a learner's state, through flashbax: items, stretches of trajectories, prioritised items.

A buffer is a `Replay` of pure functions over a state of arrays, which lives in the learner's state: checkpoints contain
it, seeds vmap over it, and an add inside a donated step writes in place. What is stored is any pytree; `Transition`
keeps the true next observation, so that what comes after an episode's end never stands for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flashbax
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError


class Transition(NamedTuple):
    """One step: `next_obs` is what the environment showed after `action`, also where the episode ended."""

    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any
    truncated: Any


class Sample(NamedTuple):
    """A batch from a buffer."""

    items: Any
    """[B, ...], of a trajectory buffer [B, L, ...]."""
    indices: Array | None = None
    """[B] places of prioritised items, for `set_priorities`."""
    probability: Array | None = None
    """[B] with which each prioritised item was drawn."""


class Replay(NamedTuple):
    """Pure functions of a buffer."""

    init: Callable[[Any], Any]
    """An item (its values do not matter) -> the empty buffer."""
    add: Callable[[Any, Any], Any]
    """(buffer, items [N, ...], of a trajectory buffer [N, T, ...]) -> buffer; the oldest make room."""
    sample: Callable[[Any, Array], Sample]
    """(buffer, key) -> a batch, with replacement. Before `ready` it is filler."""
    ready: Callable[[Any], Array]
    """buffer -> whether it holds as many items as sampling asks for."""
    set_priorities: Callable[[Any, Array, Array], Any] | None = None
    """(buffer, indices [B], priorities [B] >= 0) -> buffer."""


def items(capacity: int, batch_size: int, minimum: int = 1) -> Replay:
    """A buffer of single items, drawn uniformly.

    Args:
        capacity: items that it holds.
        batch_size: items of a sample.
        minimum: items from which on it is ready.

    Raises:
        UserError: for sizes that do not fit each other.
    """
    _check(capacity, batch_size, minimum)
    inner = flashbax.make_item_buffer(
        max_length=capacity, min_length=minimum, sample_batch_size=batch_size, add_batches=True
    )
    return Replay(
        init=inner.init,
        add=lambda buffer, batch: inner.add(buffer, _fits(batch, 0, capacity, "items")),
        sample=lambda buffer, key: Sample(inner.sample(buffer, key).experience),
        ready=inner.can_sample,
    )


def prioritised(capacity: int, batch_size: int, minimum: int = 1, exponent: float = 0.6) -> Replay:
    """A buffer of single items, drawn with probability proportional to priority ** exponent (Schaul et al., 2016,
    eq. 1, proportional variant); new items get the largest priority there was.

    Args:
        capacity: items that it holds.
        batch_size: items of a sample.
        minimum: items from which on it is ready.
        exponent: in [0, 1]; 0 draws uniformly.

    Raises:
        UserError: for sizes that do not fit each other, or an exponent outside [0, 1].
    """
    _check(capacity, batch_size, minimum)
    if not 0 <= exponent <= 1:
        raise UserError(f"exponent={exponent!r}: expected a number in [0, 1]")
    inner = flashbax.make_prioritised_item_buffer(
        max_length=capacity,
        min_length=minimum,
        sample_batch_size=batch_size,
        add_batches=True,
        priority_exponent=exponent,
        device=jax.default_backend(),
    )

    def sample(buffer: Any, key: Array) -> Sample:
        found = inner.sample(buffer, key)
        return Sample(found.experience, found.indices, found.probabilities)

    return Replay(
        init=inner.init,
        add=lambda buffer, batch: inner.add(buffer, _fits(batch, 0, capacity, "items")),
        sample=sample,
        ready=inner.can_sample,
        set_priorities=inner.set_priorities,
    )


def trajectories(
    num_envs: int, capacity: int, batch_size: int, length: int, *, period: int = 1, minimum: int = 1
) -> Replay:
    """A buffer of the steps of `num_envs` environments in order, from which stretches of `length` steps are drawn
    uniformly. A stretch may run over an episode's end: `one_episode` tells which of its steps count.

    Args:
        num_envs: environments, the leading axis of what is added, [num_envs, T, ...].
        capacity: steps of each environment that it holds.
        batch_size: stretches of a sample.
        length: steps of a stretch.
        period: steps between the possible starts of a stretch.
        minimum: steps of each environment from which on it is ready, at least `length`.

    Raises:
        UserError: for sizes that do not fit each other.
    """
    for name, value in (("num_envs", num_envs), ("batch_size", batch_size), ("length", length), ("period", period)):
        if value < 1:
            raise UserError(f"{name}={value!r}: expected at least 1")
    if not length <= capacity:
        raise UserError(f"length={length}: expected at most capacity={capacity}")
    if period > length:
        raise UserError(f"period={period}: expected at most length={length}, else steps are never drawn")
    if minimum > capacity:
        raise UserError(f"minimum={minimum}: expected at most capacity={capacity}")
    inner = flashbax.make_trajectory_buffer(
        add_batch_size=num_envs,
        sample_batch_size=batch_size,
        sample_sequence_length=length,
        period=period,
        min_length_time_axis=max(minimum, length),
        max_length_time_axis=capacity,
    )
    return Replay(
        init=inner.init,
        add=lambda buffer, batch: inner.add(buffer, _fits(batch, 1, capacity, "steps")),
        sample=lambda buffer, key: Sample(inner.sample(buffer, key).experience),
        ready=inner.can_sample,
    )


def one_episode(ended: Array) -> Array:
    """Which steps of stretches belong to the episode of their first step.

    Args:
        ended: [B, L] bool, terminated or truncated.

    Returns:
        [B, L] bool: True up to and including the first end.
    """
    before = jnp.cumsum(ended.astype(jnp.int32), axis=1) - ended
    return before == 0


def importance(probability: Array, size: Array | int, beta: Array | float) -> Array:
    """Weights (size * P) ** -beta over their largest (Schaul et al., 2016, section 3.4).

    Args:
        probability: [B] of a prioritised sample.
        size: items in the buffer, see `held`.
        beta: in [0, 1]; 1 undoes the priorities in expectation.
    """
    weights = (size * jnp.maximum(probability, jnp.finfo(probability.dtype).tiny)) ** -beta
    return weights / weights.max()


def held(buffer: Any) -> Array:
    """Items (steps of each environment) that a buffer holds."""
    capacity = jax.tree.leaves(buffer.experience)[0].shape[1]
    return jnp.where(buffer.is_full, capacity, buffer.current_index)


def _check(capacity: int, batch_size: int, minimum: int) -> None:
    if capacity < 1:
        raise UserError(f"capacity={capacity!r}: expected at least 1")
    for name, value in (("batch_size", batch_size), ("minimum", minimum)):
        if not 1 <= value <= capacity:
            raise UserError(f"{name}={value!r}: expected 1 to capacity={capacity}")


def _fits(batch: Any, axis: int, capacity: int, what: str) -> Any:
    count = jax.tree.leaves(batch)[0].shape[axis]
    if count > capacity:
        raise UserError(f"replay: {count} {what} added at once, expected at most capacity={capacity}")
    return batch
