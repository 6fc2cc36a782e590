"""Diffusion: schedules and the steps of DDPM (Ho et al., 2020) and DDIM (Song et al., 2021), as pure functions.

With a_t = the product of 1 - beta up to t: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps. A network `eps_fn(x, t)` tells eps
of images x [B, ...] at times t [B] int32 of the full schedule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxstack.core.errors import UserError
from jaxstack.nn.conv import Conv
from jaxstack.nn.vision.layers import GroupNorm

EpsFn = Callable[[Array, Array], Array]
Range = tuple[float, float]


class Schedule(NamedTuple):
    """Noise levels by index."""

    betas: Float[Array, " t"]
    ab: Float[Array, " t"]
    """Share of the image's variance that is left, alpha bar."""
    times: Int[Array, " t"]
    """What the network is told, the index in the full schedule."""


def make_schedule(num_times: int = 1000, beta0: float = 1e-4, beta1: float = 0.02) -> Schedule:
    """Linear betas from `beta0` to `beta1`. Raises `UserError` for fewer than 2 times or betas outside 0..1."""
    if num_times < 2 or not 0 < beta0 <= beta1 < 1:
        raise UserError(
            f"num_times={num_times}, beta0={beta0}, beta1={beta1}: expected at least 2, and 0 < beta0 <= beta1 < 1"
        )
    betas = jnp.linspace(beta0, beta1, num_times)
    return Schedule(betas, jnp.cumprod(1.0 - betas), jnp.arange(num_times))


def respaced(schedule: Schedule, stride: int) -> Schedule:
    """Every `stride`-th level from the first; each beta then spans the levels in between (Nichol & Dhariwal, 2021)."""
    if stride < 1:
        raise UserError(f"stride={stride}: expected at least 1")
    ab = schedule.ab[::stride]
    before = jnp.concatenate([jnp.ones(1), ab[:-1]])
    return Schedule(1.0 - ab / before, ab, schedule.times[::stride])


def _at(values: Array, t: Array, like: Array) -> Array:
    """values[t], t a number or [B], with the axes that multiply `like` [B, ...]."""
    found = values[t]
    return found.reshape(found.shape + (1,) * (like.ndim - found.ndim)) if found.ndim else found


def noised(schedule: Schedule, clean: Array, t: Array, noise: Array) -> Array:
    """q(x_t | x_0): sqrt(a_t) x_0 + sqrt(1 - a_t) noise, for an index t or one per image [B]."""
    a = _at(schedule.ab, t, clean)
    return jnp.sqrt(a) * clean + jnp.sqrt(1.0 - a) * noise


def clean_and_noise(schedule: Schedule, eps_fn: EpsFn, x: Array, t: Array, clip: Range | None) -> tuple[Array, Array]:
    """What the network takes x_t for: the clean image, clipped, and the noise that is left beside the clipped one."""
    a = schedule.ab[t]
    eps = eps_fn(x, jnp.full(len(x), schedule.times[t], jnp.int32))
    clean = (x - jnp.sqrt(1.0 - a) * eps) / jnp.sqrt(a)
    if clip is not None:
        clean = jnp.clip(clean, *clip)
        eps = (x - jnp.sqrt(a) * clean) / jnp.sqrt(1.0 - a)
    return clean, eps


def ddim_to(clean: Array, eps: Array, ab: Array) -> Array:
    """The deterministic step to another level, up or down: sqrt(a) x_0 + sqrt(1 - a) eps."""
    return jnp.sqrt(ab) * clean + jnp.sqrt(1.0 - ab) * eps


def ddpm_to(schedule: Schedule, clean: Array, x: Array, t: Array, noise: Array) -> Array:
    """The ancestral step from index t to t - 1 (to the clean image from 0): posterior mean + sqrt(variance) noise.

    The variance is beta_t ("fixed large"); at the first index that of the posterior at the second.
    """
    ab, beta = schedule.ab[t], schedule.betas[t]
    before = jnp.where(t > 0, schedule.ab[jnp.maximum(t - 1, 0)], 1.0)
    mean = jnp.sqrt(before) * beta / (1.0 - ab) * clean + jnp.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - ab) * x
    second = schedule.betas[1] * (1.0 - schedule.ab[0]) / (1.0 - schedule.ab[1])
    return mean + jnp.sqrt(jnp.where(t > 0, beta, second)) * noise


def ddim_invert(schedule: Schedule, eps_fn: EpsFn, x: Array, indices: Array, clip: Range | None) -> Array:
    """Noise images deterministically: at each of `indices`, ascending, a step to the level above it."""
    above = jnp.concatenate([schedule.ab[1:], jnp.zeros(1)])

    def step(x: Array, t: Array) -> tuple[Array, None]:
        return ddim_to(*clean_and_noise(schedule, eps_fn, x, t, clip), above[t]), None

    return jax.lax.scan(step, x, indices)[0]


def ddim_guided(
    schedule: Schedule,
    eps_fn: EpsFn,
    log_prob: Callable[[Array], Array],
    x: Array,
    indices: Array,
    scale: Any,
    clip: Range | None,
) -> Array:
    """Denoise images deterministically while a classifier's probability grows (Dhariwal & Nichol, 2021, algorithm 2).

    At each of `indices`, descending to 1, eps <- eps_fn(x, t) - scale sqrt(1 - a) grad log_prob(x), then the step to
    the level below; the first level (index 0) is what is given back.

    Args:
        schedule: the levels.
        eps_fn: of the model.
        log_prob: images [B, ...] at any level -> log probability of the class that is wanted, [B].
        x: images at the level of the first index.
        indices: descending.
        scale: of the gradient; 0 is DDIM. May be traced.
        clip: range of clean images; None: not clipped.
    """
    before = jnp.concatenate([jnp.ones(1), schedule.ab[:-1]])

    def step(x: Array, t: Array) -> tuple[Array, None]:
        a = schedule.ab[t]
        slope = jax.grad(lambda x: log_prob(x).sum())(x)
        guided = lambda x, times: eps_fn(x, times) - scale * jnp.sqrt(1.0 - a) * slope
        return ddim_to(*clean_and_noise(schedule, guided, x, t, clip), before[t]), None

    return jax.lax.scan(step, x, indices)[0]


def embedded(times: Int[Array, " b"], features: int) -> Float[Array, "b f"]:
    """Sines and cosines of times at frequencies from 1 to 1e-4, as in transformers."""
    rates = jnp.exp(-jnp.log(1e4) * jnp.arange(features // 2) / (features // 2))
    angles = times[:, None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)


def _norm(x: Array) -> Array:
    return GroupNorm(min(32, max(x.shape[-1] // 4, 1)))(x)


def _half(x: Array) -> Array:
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _double(x: Array) -> Array:
    return x.repeat(2, 1).repeat(2, 2)


class Block(nn.Module):
    """Residual block of guided diffusion (Dhariwal & Nichol, 2021): the time scales and shifts the second norm."""

    features: int
    resize: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, time: Array) -> Array:
        """[B, H, W, C], embedding [B, F] -> [B, H', W', features]."""
        h = jax.nn.silu(_norm(x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = Conv(self.features)(h)
        scale, shift = jnp.split(nn.Dense(2 * self.features)(jax.nn.silu(time))[:, None, None], 2, -1)
        h = jax.nn.silu(_norm(h) * (1.0 + scale) + shift)
        h = Conv(self.features, kernel_init=nn.initializers.zeros_init())(h)
        return h + (x if x.shape[-1] == self.features else Conv(self.features, (1, 1))(x))


class Attention(nn.Module):
    """Residual self-attention over pixels, one head."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> the same shape."""
        b, h, w, c = x.shape
        q, k, v = jnp.split(nn.Dense(3 * c)(_norm(x)).reshape(b, h * w, 3 * c), 3, -1)
        weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) / jnp.sqrt(c))
        mixed = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
        return x + nn.Dense(c, kernel_init=nn.initializers.zeros_init())(mixed)


class DenoisingUNet(nn.Module):
    """The U-Net of guided diffusion: noise from a noisy image and its time.

    Each level has `num_blocks` residual blocks on the way down and one more on the way up, which read what the way down
    left; levels are joined by residual blocks that halve or double the image.
    """

    features: int = 128
    """Channels of the first level."""
    multiples: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    """Channels of each level over those of the first."""
    num_blocks: int = 2
    attention: tuple[int, ...] = (32, 16, 8)
    """Sides of the images that have attention."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], times: Int[Array, " b"]) -> Float[Array, "b h w c"]:
        """Noisy images and times -> noise. H and W must be multiples of 2^(levels - 1)."""
        time = nn.Dense(4 * self.features)(embedded(times, self.features))
        time = nn.Dense(4 * self.features)(jax.nn.silu(time))
        seen = lambda h: Attention()(h) if h.shape[1] in self.attention else h
        h = Conv(self.features)(x)
        kept = [h]
        last = len(self.multiples) - 1
        for level, multiple in enumerate(self.multiples):
            for _ in range(self.num_blocks):
                h = seen(Block(self.features * multiple)(h, time))
                kept.append(h)
            if level < last:
                h = Block(self.features * multiple, _half)(h, time)
                kept.append(h)
        h = Block(h.shape[-1])(h, time)
        h = Attention()(h) if self.attention else h
        h = Block(h.shape[-1])(h, time)
        for level in range(last, -1, -1):
            width = self.features * self.multiples[level]
            for _ in range(self.num_blocks + 1):
                h = seen(Block(width)(jnp.concatenate([h, kept.pop()], -1), time))
            if level:
                h = Block(width, _double)(h, time)
        return Conv(x.shape[-1], kernel_init=nn.initializers.zeros_init())(jax.nn.silu(_norm(h)))


def denoising_error(schedule: Schedule, eps_fn: EpsFn, clean: Array, t: Array, noise: Array) -> Float[Array, " b"]:
    """|noise - eps_fn(x_t, t)|^2, averaged over each image [B]: the loss of DDPM at indices t [B]."""
    found: Any = eps_fn(noised(schedule, clean, t, noise), schedule.times[t])
    return jnp.square(found - noise).reshape(len(clean), -1).mean(-1)
