"""Running statistics as pure state: () stands for "off" and passes data through. Agents in several groups (see
groups.py) have statistics of each group, leaves [G, ...]; one group has no such axis."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.groups import Groups, members, number

LARGEST = 1e9
"""Larger magnitudes enter statistics as this one. The square of 1.9e19 already overflows float32; this leaves room for
the squares of 1e18 pairs of entries, more than any run has. Data beyond it has no place in a network."""


class Running(NamedTuple):
    """Mean and variance over everything seen so far; `count` is float32."""

    mean: Array
    var: Array
    count: Array


class RewardScale(NamedTuple):
    """Discounted return of each running episode [N, A] and its statistics."""

    ret: Array
    stats: Running


def init(shape: tuple[int, ...]) -> Running:
    """Mean 0, variance 1, count 0: the first batch decides alone."""
    return Running(jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32), jnp.float32(0.0))


def init_groups(shape: tuple[int, ...], groups: Groups) -> Running:
    """`init` of each group."""
    count = number(groups)
    return init(shape) if count == 1 else jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), init(shape))


def update_groups(stats: Running, x: Array, weight: Array, groups: Groups) -> Running:
    """`update` with x [..., A, *shape] and weight [..., A] bool, each group from its own agents alone."""
    if number(groups) == 1:
        return update(stats, x, weight)
    axis = weight.ndim - 1
    index, real = members(groups)
    own = lambda x: jnp.moveaxis(jnp.take(x, index, axis), axis, 0)  # [G, ..., M, ...]
    counts = own(weight) & real.reshape(len(real), *[1] * axis, -1)
    return jax.vmap(update)(stats, own(x), counts)


def of_agents(stats: Running | tuple, groups: Groups) -> Running | tuple:
    """The statistics of each agent's group [A, ...], for `apply` and `unapply` on [..., A, *shape]; those of one group
    as they are."""
    return stats if number(groups) == 1 else jax.tree.map(lambda x: x[np.asarray(groups)], stats)


def update(stats: Running, x: Array, weight: Array | None = None) -> Running:
    """Fold in x [..., *shape] by the parallel formula of Chan et al. (1979).

    `weight` [...] (broadcast) counts each entry; zeros leave out absent agents, and weights of zero alone change
    nothing. Entries in which a number is not finite never count; magnitudes are cut to `LARGEST`.
    """
    axes = tuple(range(x.ndim - stats.mean.ndim))
    inner = tuple(range(len(axes), x.ndim))
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(x).all(inner)
    spread = lambda y: y.reshape(*y.shape, *[1] * len(inner))
    x = jnp.where(spread(finite), jnp.clip(x, -LARGEST, LARGEST), 0.0)
    if weight is None:
        size = x.size // max(stats.mean.size, 1)
        count = finite.sum().astype(jnp.float32)
        grow = size / jnp.maximum(count, 1.0)  # 1 where all are finite
        mean = x.mean(axes) * grow
        var = jnp.square(jnp.where(spread(finite), x - mean, 0.0)).mean(axes) * grow
    else:
        weight = jnp.where(finite, jnp.broadcast_to(weight, finite.shape), 0.0).astype(jnp.float32)
        count = weight.sum()
        share = spread(weight / jnp.maximum(count, 1e-8))
        mean = (share * x).sum(axes)
        var = (share * jnp.square(x - mean)).sum(axes)
    total = jnp.where(count > 0, stats.count + count, 1.0)
    delta = mean - stats.mean
    m2 = stats.var * stats.count + var * count + jnp.square(delta) * stats.count * count / total
    new = Running(stats.mean + delta * count / total, m2 / total, total)
    return jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), new, stats)


def apply(stats: Running | tuple, x: Array, clip: float = 10.0) -> Array:
    """(x - mean) / std, clipped to +-`clip` deviations; x itself when the statistics are off."""
    if not isinstance(stats, Running):
        return x
    return jnp.clip((x - stats.mean) * jax.lax.rsqrt(stats.var + 1e-8), -clip, clip)


def unapply(stats: Running | tuple, x: Array) -> Array:
    """Inverse of `apply` inside the clip range."""
    if not isinstance(stats, Running):
        return x
    return x * jnp.sqrt(stats.var + 1e-8) + stats.mean


def init_reward(num_envs: int, num_agents: int, groups: Groups = ()) -> RewardScale:
    return RewardScale(jnp.zeros((num_envs, num_agents), jnp.float32), init_groups((), groups))


def scale_reward(
    scale: RewardScale, reward: Array, done: Array, gamma: Array, weight: Array | None = None, groups: Groups = ()
) -> tuple[RewardScale, Array]:
    """Divide rewards by the deviation of the running discounted return (Engstrom et al., 2020, code-level
    optimisation 2). A reward that is not finite enters neither the return nor its statistics; returns are cut to
    `LARGEST`.

    Args:
        scale: The state so far.
        reward: [T, N, A]
        done: Where a return ends, [T, N] or [T, N, A].
        gamma: Discount.
        weight: [T, N, A] bool, which returns count; None: all.
        groups: The group of each agent.

    Returns:
        The new state and the scaled rewards [T, N, A], clipped to +-10.
    """
    weight = jnp.ones(reward.shape, bool) if weight is None and number(groups) > 1 else weight

    def body(ret: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        r, d = inputs
        ok = jnp.isfinite(r)
        ret = jnp.clip(ret * gamma + jnp.where(ok, r, 0.0), -LARGEST, LARGEST)
        return jnp.where(d, 0.0, ret), jnp.where(ok, ret, jnp.nan)

    ret, history = jax.lax.scan(body, scale.ret, (reward, done.reshape(*reward.shape[:2], -1)))
    stats = update(scale.stats, history) if weight is None else update_groups(scale.stats, history, weight, groups)
    var = of_agents(stats, groups).var  # pyright: ignore[reportAttributeAccessIssue]
    return RewardScale(ret, stats), jnp.clip(reward * jax.lax.rsqrt(var + 1e-8), -10.0, 10.0)
