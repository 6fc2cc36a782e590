"""The U-Net family of Choroidalyzer (Engelmann, Burke et al., 2024) after Ronneberger et al. (2015).

A block is twice conv3x3, BatchNorm, ReLU. Going down, 2x2 maxima come before the block; going up, a 1x1 convolution
halves the channels, bilinear interpolation doubles the pixels, the skip is joined, and a block follows. Depth 7 with
channels 8, 16, 32, 64, ..., 64, one input and three outputs is the released network: 788,283 parameters. Other factors
than 2 and residual connections are those of REACHNet (nn/vision/reachnet.py).
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv, max_pool, torch_bias, torch_uniform

RELEASED = (8, 16, 32, 64, 64, 64, 64, 64)
"""Channels of the released Choroidalyzer, from full resolution down."""
Upsampling = Literal["conv_then_interpolate", "interpolate"]


def enlarged(x: Float[Array, "n h w c"], factor: int = 2) -> Float[Array, "n hh ww c"]:
    """Bilinear interpolation to `factor` times the rows and columns, as PyTorch's with align_corners=False.

    The middle of new pixel j of the f within an old one lies (j + 1/2) / f - 1/2 old pixels from its middle: with
    f = 2, 3/4 a + 1/4 b and 1/4 a + 3/4 b lie between two pixels a and b. The first and last pixel are repeated.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        pick = lambda start, end, axis=axis, x=x: jax.lax.slice_in_dim(x, start, end, axis=axis)
        before = jnp.concatenate([pick(0, 1), pick(0, n - 1)], axis)
        after = jnp.concatenate([pick(1, n), pick(n - 1, n)], axis)
        parts = []
        for j in range(factor):
            away = (j + 0.5) / factor - 0.5
            parts.append(-away * before + (1.0 + away) * x if away < 0 else (1.0 - away) * x + away * after)
        x = jnp.stack(parts, axis + 1).reshape(*x.shape[:axis], factor * n, *x.shape[axis + 1 :])
    return x


def pooled(x: Float[Array, "n h w c"], factor: int) -> Float[Array, "n hh ww c"]:
    """Maxima over `factor` x `factor` pixels, for powers of two by halves: half of the slices."""
    if factor > 2 and factor % 2 == 0:
        return pooled(max_pool(x), factor // 2)
    return max_pool(x, factor, factor)


def _conv(features: int, size: int, channels: int, name: str) -> nn.Module:
    """A convolution with bias, as PyTorch initialises it."""
    bias = torch_bias(size * size * channels)
    return conv(features, size, use_bias=True, name=name, kernel_init=torch_uniform, bias_init=bias)


class ConvNormAct(nn.Module):
    """conv3x3 with bias, BatchNorm, ReLU: [N, H, W, C] -> [N, H, W, features]."""

    features: int
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = _conv(self.features, 3, x.shape[-1], "conv")(x)
        return jax.nn.relu(BatchNorm(self.variance, name="norm")(x, train))


class Block(nn.Module):
    """Twice conv3x3, BatchNorm, ReLU, with `residual` plus a 1x1 convolution of what goes in."""

    features: int
    variance: Variance = "torch"
    residual: bool = False

    def block(self, x: Array, train: bool) -> Array:
        """[N, H, W, C] -> [N, H, W, features]; for the compact call of a subclass."""
        out = ConvNormAct(self.features, self.variance, name="conv1")(x, train)
        out = ConvNormAct(self.features, self.variance, name="conv2")(out, train)
        return out + _conv(self.features, 1, x.shape[-1], "resid_connection")(x) if self.residual else out


class Down(Block):
    """Maxima over f x f pixels and a block: [N, H, W, C] -> [N, H / f, W / f, features]."""

    factor: int = 2

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.block(pooled(x, self.factor), train)


class Up(Block):
    """An f-th of the channels at f times the resolution, beside the skip, then a block: -> [N, f H, f W, features]."""

    factor: int = 2
    up_mode: Upsampling = "conv_then_interpolate"

    @nn.compact
    def __call__(self, x: Array, skip: Array, train: bool = False) -> Array:
        channels = x.shape[-1]
        if self.up_mode == "conv_then_interpolate":
            x = enlarged(_conv(channels // self.factor, 1, channels, "upsample_0")(x), self.factor)
        else:
            x = _conv(channels // self.factor, 1, channels, "upsample_1")(enlarged(x, self.factor))
        return self.block(jnp.concatenate([x, skip], -1), train)


class UNet(nn.Module):
    """Logits for each pixel. The depth, the number of times that the resolution is reduced, is one less than the number
    of `channels`."""

    channels: Any = RELEASED
    """Of each resolution, from full resolution down."""
    outputs: int = 3
    up_mode: Upsampling = "conv_then_interpolate"
    """Whether the 1x1 convolution comes before the interpolation (a quarter of its cost, the same function) or after:
    the two have other names in state dicts."""
    extra_out_conv: bool = True
    """One more conv3x3, BatchNorm, ReLU before the last 1x1 convolution."""
    variance: Variance = "torch"
    factors: tuple[int, ...] = ()
    """By which each level reduces the resolution, from full resolution down; empty: all by 2."""
    residual: bool = False
    """A 1x1 convolution past each block, on the way up of the joined channels."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each resolution, from full resolution down."""
        return tuple(self.channels)

    @property
    def steps(self) -> tuple[int, ...]:
        """Factor of each level."""
        return tuple(self.factors) or (2,) * (len(self.widths) - 1)

    @property
    def depth(self) -> int:
        """How often the resolution is reduced."""
        return len(self.steps)

    @property
    def multiple(self) -> int:
        """What rows and columns of images must be multiples of: the product of the factors."""
        return math.prod(self.steps)

    def bottom(self, x: Array) -> Array:
        """What happens to the smallest maps [N, h, w, C]: nothing."""
        return x

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in the released state dict."""
        return re.sub(r"_(\d+)(?=\.|$)", r".\1", ".".join(modules))

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w k"]:
        """Logits of images.

        Args:
            x: [N, H, W, C], H and W multiples of `multiple`.
            train: use and update the batch's statistics.

        Returns:
            [N, H, W, outputs].

        Raises:
            UserError: for another number of rows or columns, channels that are no multiples of the factor by which they
                are divided, or an unknown `up_mode`.
        """
        if self.up_mode not in ("conv_then_interpolate", "interpolate"):
            raise UserError(f"up_mode={self.up_mode!r}: expected 'conv_then_interpolate' or 'interpolate'")
        widths, steps = self.widths, self.steps
        require_channels(widths, self.factors)
        if x.shape[1] % self.multiple or x.shape[2] % self.multiple:
            raise UserError(
                f"unet: found images of {x.shape[1]}x{x.shape[2]} pixels, expected multiples of {self.multiple}"
            )
        x = ConvNormAct(widths[0], self.variance, name="in_conv")(x, train)
        options: dict[str, Any] = dict(variance=self.variance, residual=self.residual)
        skips = [x]
        for i, (features, factor) in enumerate(zip(widths[1:], steps)):
            x = Down(features, factor=factor, **options, name=f"down_blocks_{i}")(x, train)
            skips.append(x)
        x = self.bottom(x)
        for i, (features, factor) in enumerate(zip(widths[-2::-1], steps[::-1])):
            up = Up(features, factor=factor, up_mode=self.up_mode, **options, name=f"up_blocks_{i}")
            x = up(x, skips[-2 - i], train)
        if not self.extra_out_conv:
            return _conv(self.outputs, 1, x.shape[-1], "out_conv")(x)
        x = ConvNormAct(widths[0], self.variance, name="out_conv_0")(x, train)
        return _conv(self.outputs, 1, x.shape[-1], "out_conv_1")(x)


def require_channels(channels: Sequence[int], factors: Sequence[int] = ()) -> None:
    """Raise `UserError` unless there are at least two numbers of channels, all but the first multiples of the factors
    (default: all 2), of which there is one fewer."""
    steps = tuple(factors) or (2,) * (len(channels) - 1)
    if len(channels) < 2 or min(channels) < 1 or (not factors and any(c % 2 for c in channels[1:])):
        found = " ".join(map(str, channels))
        raise UserError(f"channels={found}: expected at least two numbers >= 1, all but the first even")
    if min(steps) < 2 or len(steps) != len(channels) - 1 or any(c % f for c, f in zip(channels[1:], steps)):
        found, by = (" ".join(map(str, each)) for each in (channels, steps))
        raise UserError(
            f"channels={found}, factors={by}: expected factors >= 2, one fewer than channels, and channels after the "
            "first that are multiples of them"
        )
