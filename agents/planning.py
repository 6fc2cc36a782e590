"""The planner of PTGOOD (McInroe et al., 2024): trees of the policy's actions in a learned
model, whose first actions are scored by what follows them.

`plan` is a pure function of one state; vmap it over environments and seeds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError

ROOM = 2**31
"""Bytes that the leaves of one plan may take."""
RELEASED_GAMMA = 0.99


class Level(NamedTuple):
    """Random numbers of one level of the tree, n = width^k nodes."""

    policy: Float[Array, "n A"]
    """Standard normal, of the policy's sample"""
    jitter: Float[Array, "n A"]
    """Standard normal, added to actions"""
    elite: Array
    """[] int32, the member that led to this level; the first level has none"""


class Parts(NamedTuple):
    """What a plan asks."""

    act: Callable[[Array, Array], Array]
    """(observations [n, S], standard normal noise [n, A]) -> actions [n, A] in [-1, 1]"""
    advance: Callable[[Array, Array, Array], Array]
    """(number of an elite [], observations [n, S], actions [n, A]) -> mean next observations [n, S]"""
    score: Callable[[Array, Array], Array]
    """(observations [n, S], actions [n, A]) -> [n], such as rates less their mean"""
    ends: Callable[[Array], Array]
    """observations [n, S] -> [n] bool, whether the task has ended there"""


def draw(key: Array, width: int, depth: int, action_size: int, num_elites: int) -> tuple[Level, ...]:
    """The random numbers of one plan."""
    levels = []
    for k, own in enumerate(jax.random.split(key, depth)):
        k_noise, k_elite = jax.random.split(own)
        policy, jitter = jax.random.normal(k_noise, (2, width ** (k + 1), action_size), jnp.float32)
        levels.append(Level(policy, jitter, jax.random.randint(k_elite, (), 0, num_elites)))
    return tuple(levels)


def plan(
    parts: Parts,
    levels: tuple[Level, ...],
    obs: Float[Array, " S"],
    noise: Array | float,
    gamma: Array | float,
    *,
    released: bool = False,
) -> tuple[Float[Array, " A"], Float[Array, " w"]]:
    """Choose an action: the first one of the block of highest score.

    The score of a first action is sum_k gamma^k times the mean of `parts.score` over its w^k nodes of level k; nodes
    at and behind an end count 0. One elite moves all nodes of a level, by its mean.

    Args:
        parts: policy, model, score.
        levels: random numbers, one item for each level; `draw` makes them. Width and depth are theirs.
        obs: [S].
        noise: deviation of what is added to the policy's actions before they are clipped.
        gamma: discount.
        released: as the released code: |score| at the first level, the second level not discounted, the others with
            0.99, and what follows an end counts unless it is an end itself.

    Returns:
        The action [A] and the scores [w] of the first actions.
    """
    width = len(levels[0].policy)

    def choose(obs: Array, level: Level) -> Array:
        return jnp.clip(parts.act(obs, level.policy) + noise * level.jitter, -1.0, 1.0)

    obs = jnp.tile(obs, (width, 1))
    first = action = choose(obs, levels[0])
    here = parts.score(obs, action)
    alive = jnp.ones(width, bool)
    scores = jnp.abs(here) if released else here
    discount = 1.0 if released else gamma
    for level in levels[1:]:
        obs = parts.advance(level.elite, obs, action)
        alive = ~parts.ends(obs) if released else alive & ~parts.ends(obs)
        # children of a node stand together, and so do those of a first action
        obs, alive = jnp.repeat(obs, width, axis=0), jnp.repeat(alive, width)
        action = choose(obs, level)
        here = jnp.where(alive, parts.score(obs, action), 0.0)
        scores = scores + discount * here.reshape(width, -1).mean(1)
        discount = discount * (RELEASED_GAMMA if released else gamma)
    return first[scores.argmax()], scores


def check_size(width: int, depth: int, floats: int, room: int = ROOM) -> None:
    """Raise `UserError` with the largest depth where the width^depth leaves do not fit into memory.

    Args:
        width: of the tree.
        depth: of the tree.
        floats: numbers that one leaf needs, with its network's widest layer.
        room: bytes.
    """
    fits = lambda depth: 4 * floats * width**depth <= room
    if not fits(depth):
        largest = max((d for d in range(depth) if fits(d)), default=0)
        raise UserError(
            f"plan_depth={depth}: expected at most {largest} with plan_width={width}, whose {width}^{depth} leaves "
            f"take {4 * floats * width**depth / 2**30:.3g} GiB, more than {room / 2**30:.3g}"
        )
