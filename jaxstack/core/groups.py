"""Groups of agents that are kept apart: sums, statistics and gradient norms of each group alone.

`groups[i]` is the group of agent i, numbered from 0. What is not finite in one group never reaches another.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

Groups = tuple[int, ...]


def number(groups: Groups) -> int:
    """How many groups there are; no agents named counts as one."""
    return max(groups, default=0) + 1


def sums(x: Array, groups: Groups) -> Array:
    """Sums over the agents of each group.

    Args:
        x: Values of agents [..., A].
        groups: The group of each agent, A numbers.

    Returns:
        [..., G]
    """
    member = np.asarray(groups)[:, None] == np.arange(number(groups))
    return jnp.where(member, x[..., None], 0).sum(-2)


def members(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """The agents of each group [G, M], M that of the largest, and which of these entries count [G, M]; a smaller group
    repeats its own agents."""
    each = [np.flatnonzero(np.asarray(groups) == g) for g in range(number(groups))]
    size = max(map(len, each))
    real = np.arange(size) < np.asarray([[len(agents)] for agents in each])
    return np.stack([np.resize(agents, size) for agents in each]), real


def norms(tree: Any) -> Array:
    """The norm over all leaves [G, ...] for each index of their first axis [G]."""
    squares = [jnp.square(x).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def clip_by_norms(max_norm: Array | float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` for each group by itself; every leaf of the gradient is [G, ...]."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = norms(updates)

        def clip(x: Array) -> Array:
            n = norm.reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(n < max_norm, x, x / n * max_norm)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
