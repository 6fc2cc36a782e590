"""Streams of continual learning as index arrays of static shape, and a memory of what has passed.

A stream is N tasks of up to n examples each: rows of the training set, and a mask of those that count. Tasks are parts
of one distribution (chunks) or groups of classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key

# --- streams ----------------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """N tasks, one after another."""

    rows: np.ndarray
    """[N, n] int32 rows of the training set; 0 where the mask is False."""
    mask: np.ndarray
    """[N, n] bool"""


def iid_chunks(rng: np.random.Generator, labels: np.ndarray, chunks: int, stratified: bool = True) -> Stream:
    """Disjoint parts of equal size and one distribution.

    Args:
        rng: of the division and of the order within a chunk.
        labels: [n].
        chunks: N.
        stratified: each chunk has floor(n_c / N) examples of class c; else floor(n / N) random ones. What is left over
            is in no chunk.

    Raises:
        UserError: for chunks without examples.
    """
    kinds = np.unique(labels) if stratified else [None]
    parts = []
    for kind in kinds:
        rows = rng.permutation(np.arange(len(labels)) if kind is None else np.flatnonzero(labels == kind))
        size = len(rows) // max(chunks, 1)
        parts.append(rows[: size * chunks].reshape(chunks, size))
    rows = np.concatenate(parts, axis=1)
    if chunks < 1 or not rows.size:
        raise UserError(f"chunks={chunks}: expected 1 or more, each with at least one of {len(labels)} examples")
    return of_groups([rng.permutation(row) for row in rows])


def balanced(labels: np.ndarray, each: int) -> np.ndarray:
    """Rows of the first `each` examples of every class, in order. Raises `UserError` for a class of fewer."""
    counts = np.bincount(labels)
    if each < 1 or counts.min() < each:
        raise UserError(f"each={each}: expected 1 to {counts.min()}, the examples of class {counts.argmin()}")
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:each] for c in range(len(counts))]))


def class_groups(rng: np.random.Generator, labels: np.ndarray, classes: int, groups: int) -> list[np.ndarray]:
    """Classes 0..classes-1 in random order, cut into `groups` of nearly equal size: the rows of each, shuffled."""
    parts = np.array_split(rng.permutation(classes), groups)
    return [rng.permutation(np.flatnonzero(np.isin(labels, part))) for part in parts]


def of_groups(groups: list[np.ndarray]) -> Stream:
    """Rows of each task, filled up to the longest one."""
    size = max(len(g) for g in groups)
    rows, mask = np.zeros((len(groups), size), np.int32), np.zeros((len(groups), size), bool)
    for i, group in enumerate(groups):
        rows[i, : len(group)], mask[i, : len(group)] = group, True
    return Stream(rows, mask)


def in_pieces(stream: Stream, size: int) -> Stream:
    """Each task cut into chunks of `size` examples: an online stream. What fills no chunk is left out.

    Raises:
        UserError: for tasks of fewer examples.
    """
    tasks, count = stream.rows.shape
    if not 1 <= size <= count:
        raise UserError(f"pieces of {size}: expected 1 to {count}, the examples of a task")
    cut = lambda a: a[:, : count // size * size].reshape(tasks * (count // size), size)
    rows, mask = cut(stream.rows), cut(stream.mask)
    return Stream(rows[mask.any(1)], mask[mask.any(1)])


# --- the memory -------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """M stored examples, of which the first min(count, M) are there."""

    x: Array
    """[M, ...]"""
    y: Array
    """[M] int32"""
    logits: Array
    """[M, C] those of the network that saw them."""
    score: Array
    """[M] how much an example's gradient is like others', of GSS."""
    count: Array
    """Examples offered so far."""


class Replay(NamedTuple):
    """Examples drawn from a memory."""

    x: Array
    y: Array
    logits: Array
    mask: Array
    """[R] bool"""


def empty(size: int, example: Any, classes: int) -> Memory:
    """A memory of `size` places for examples like `example` [...]."""
    x = jnp.zeros((size, *jnp.shape(example)), jnp.asarray(example).dtype)
    return Memory(x, jnp.zeros(size, jnp.int32), jnp.zeros((size, classes)), jnp.zeros(size), jnp.int32(0))


def reservoir(memory: Memory, key: Key, x: Array, y: Array, logits: Array, mask: Array) -> Memory:
    """Offer examples one after another; all of those so far are stored with equal probability (Vitter, 1985). The i-th
    fills place i while there is one, then replaces place j, uniform in 0..i, if j < M.

    Args:
        memory: the memory.
        key: of the draw.
        x: [B, ...].
        y: [B].
        logits: [B, C].
        mask: [B] those that are offered.
    """
    size = len(memory.y)
    index = memory.count + jnp.cumsum(mask) - mask
    drawn = jnp.floor(jax.random.uniform(key, y.shape) * (index + 1)).astype(jnp.int32)
    place = jnp.where(index < size, index, drawn)
    place = jnp.where(mask & (place < size), place, size)
    # of two for one place the later one stays
    order = jnp.arange(len(y))
    replaced = ((place[None] == place[:, None]) & (order[None] > order[:, None])).any(1)
    place = jnp.where(replaced, size, place)
    put = lambda a, v: a.at[place].set(v.astype(a.dtype), mode="drop")
    return memory._replace(
        x=put(memory.x, x), y=put(memory.y, y), logits=put(memory.logits, logits), count=memory.count + mask.sum()
    )


def greedy_diverse(memory: Memory, key: Key, x: Array, y: Array, score: Array, mask: Array) -> Memory:
    """Offer examples to a memory of diverse gradients (GSS-Greedy, Aljundi et al., 2019).

    While there is a place they are stored. Then an example of score c < 1 may replace the stored example i, drawn with
    probability in proportion to its score c_i, and does so with probability c_i / (c_i + c).

    Args:
        memory: the memory.
        key: of the draws.
        x: [B, ...].
        y: [B].
        score: [B] largest cosine of an example's gradient with those of stored ones, plus one.
        mask: [B] those that are offered.
    """
    size = len(memory.y)

    def one(m: Memory, given: Any) -> tuple[Memory, None]:
        x, y, c, offered, key = given
        k_which, k_swap = jax.random.split(key)
        which = jax.random.categorical(k_which, jnp.log(jnp.maximum(m.score, 1e-12)))
        swap = (c < 1.0) & (jax.random.uniform(k_swap) * (m.score[which] + c) < m.score[which])
        place = jnp.where(m.count < size, m.count, jnp.where(swap, which, size))
        place = jnp.where(offered, place, size)
        put = lambda a, v: a.at[place].set(v.astype(a.dtype), mode="drop")
        return m._replace(x=put(m.x, x), y=put(m.y, y), score=put(m.score, c), count=m.count + offered), None

    return jax.lax.scan(one, memory, (x, y, score, mask, jax.random.split(key, len(y))))[0]


def draw(memory: Memory, key: Key, size: int) -> Replay:
    """`size` stored examples without replacement; fewer while there are not so many."""
    stored = jnp.minimum(memory.count, len(memory.y))
    order = jnp.where(jnp.arange(len(memory.y)) < stored, jax.random.uniform(key, memory.y.shape), 2.0)
    rows = jax.lax.top_k(-order, size)[1]
    return Replay(memory.x[rows], memory.y[rows], memory.logits[rows], rows < stored)
