"""Running statistics as pure state: () stands for "off" and passes data through."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


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
    return Running(jnp.zeros(shape), jnp.ones(shape), jnp.float32(0.0))


def update(stats: Running, x: Array, weight: Array | None = None) -> Running:
    """Fold in x [..., *shape] by the parallel formula of Chan et al. (1979).

    `weight` [...] (broadcast) counts each entry; zeros leave out absent agents, and weights of zero alone change
    nothing.
    """
    axes = tuple(range(x.ndim - stats.mean.ndim))
    x = x.astype(jnp.float32)
    if weight is None:
        count = jnp.float32(x.size / max(stats.mean.size, 1))
        mean, var = x.mean(axes), x.var(axes)
    else:
        weight = jnp.broadcast_to(weight, x.shape[: len(axes)]).astype(jnp.float32)
        count = weight.sum()
        share = (weight / jnp.maximum(count, 1e-8)).reshape(*weight.shape, *[1] * stats.mean.ndim)
        mean = (share * x).sum(axes)
        var = (share * jnp.square(x - mean)).sum(axes)
    total = stats.count + count
    delta = mean - stats.mean
    m2 = stats.var * stats.count + var * count + jnp.square(delta) * stats.count * count / total
    return Running(stats.mean + delta * count / total, m2 / total, total)


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


def init_reward(num_envs: int, num_agents: int) -> RewardScale:
    return RewardScale(jnp.zeros((num_envs, num_agents)), init(()))


def scale_reward(scale: RewardScale, reward: Array, done: Array, gamma: Array) -> tuple[RewardScale, Array]:
    """Divide rewards [T, N, A] by the deviation of the running discounted return (Engstrom et al., 2020, code-level
    optimisation 2); done [T, N] ends a return."""

    def body(ret: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        r, d = inputs
        ret = ret * gamma + r
        return jnp.where(d[:, None], 0.0, ret), ret

    ret, history = jax.lax.scan(body, scale.ret, (reward, done))
    stats = update(scale.stats, history)
    return RewardScale(ret, stats), jnp.clip(reward * jax.lax.rsqrt(stats.var + 1e-8), -10.0, 10.0)
