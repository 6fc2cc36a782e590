"""The U-Net family of Choroidalyzer (Engelmann, Burke et al., 2024) after Ronneberger et al. (2015).

A block is twice conv3x3, BatchNorm, ReLU. Going down, 2x2 maxima come before the block; going up, a 1x1 convolution
halves the channels, bilinear interpolation doubles the pixels, the skip is joined, and a block follows. Depth 7 with
channels 8, 16, 32, 64, ..., 64, one input and three outputs is the released network: 788,283 parameters.
"""

import re
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv, max_pool, torch_bias, torch_uniform

RELEASED = (8, 16, 32, 64, 64, 64, 64, 64)
"""Channels of the released Choroidalyzer, from full resolution down."""
Upsampling = Literal["conv_then_interpolate", "interpolate"]


def twice(x: Float[Array, "n h w c"]) -> Float[Array, "n hh ww c"]:
    """Bilinear interpolation to twice the rows and columns, as PyTorch's with align_corners=False.

    Between two pixels a and b lie 3/4 a + 1/4 b and 1/4 a + 3/4 b; the first and last pixel are repeated.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        pick = lambda start, end, axis=axis, x=x: jax.lax.slice_in_dim(x, start, end, axis=axis)
        before = jnp.concatenate([pick(0, 1), pick(0, n - 1)], axis)
        after = jnp.concatenate([pick(1, n), pick(n - 1, n)], axis)
        both = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        x = both.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


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


class Down(nn.Module):
    """2x2 maxima and a block: [N, H, W, C] -> [N, H / 2, W / 2, features]."""

    features: int
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = ConvNormAct(self.features, self.variance, name="conv1")(max_pool(x), train)
        return ConvNormAct(self.features, self.variance, name="conv2")(x, train)


class Up(nn.Module):
    """Half the channels at twice the resolution, beside the skip, then a block: -> [N, 2 H, 2 W, features]."""

    features: int
    up_mode: Upsampling = "conv_then_interpolate"
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, skip: Array, train: bool = False) -> Array:
        channels = x.shape[-1]
        if self.up_mode == "conv_then_interpolate":
            x = twice(_conv(channels // 2, 1, channels, "upsample_0")(x))
        else:
            x = _conv(channels // 2, 1, channels, "upsample_1")(twice(x))
        x = jnp.concatenate([x, skip], -1)
        x = ConvNormAct(self.features, self.variance, name="conv1")(x, train)
        return ConvNormAct(self.features, self.variance, name="conv2")(x, train)


class UNet(nn.Module):
    """Logits for each pixel. The depth, the number of times that the resolution is halved, is one less than the number
    of `channels`."""

    channels: tuple[int, ...] = RELEASED
    """Of each resolution, from full resolution down."""
    outputs: int = 3
    up_mode: Upsampling = "conv_then_interpolate"
    """Whether the 1x1 convolution comes before the interpolation (a quarter of its cost, the same function) or after:
    the two have other names in state dicts."""
    extra_out_conv: bool = True
    """One more conv3x3, BatchNorm, ReLU before the last 1x1 convolution."""
    variance: Variance = "torch"

    @property
    def depth(self) -> int:
        """How often the resolution is halved."""
        return len(self.channels) - 1

    @property
    def multiple(self) -> int:
        """What rows and columns of images must be multiples of: 2^depth."""
        return 2**self.depth

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in the released state dict."""
        return re.sub(r"_(\d+)(?=\.|$)", r".\1", ".".join(modules))

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w k"]:
        """Logits of images.

        Args:
            x: [N, H, W, C], H and W multiples of 2^depth.
            train: use and update the batch's statistics.

        Returns:
            [N, H, W, outputs].

        Raises:
            UserError: for another number of rows or columns, channels that are odd where they are halved, or an unknown
                `up_mode`.
        """
        if self.up_mode not in ("conv_then_interpolate", "interpolate"):
            raise UserError(f"up_mode={self.up_mode!r}: expected 'conv_then_interpolate' or 'interpolate'")
        require_channels(self.channels)
        if x.shape[1] % self.multiple or x.shape[2] % self.multiple:
            raise UserError(
                f"unet: found images of {x.shape[1]}x{x.shape[2]} pixels, expected multiples of {self.multiple}"
            )
        x = ConvNormAct(self.channels[0], self.variance, name="in_conv")(x, train)
        skips = [x]
        for i, features in enumerate(self.channels[1:]):
            x = Down(features, self.variance, name=f"down_blocks_{i}")(x, train)
            skips.append(x)
        for i, features in enumerate(self.channels[-2::-1]):
            x = Up(features, self.up_mode, self.variance, name=f"up_blocks_{i}")(x, skips[-2 - i], train)
        if not self.extra_out_conv:
            return _conv(self.outputs, 1, x.shape[-1], "out_conv")(x)
        x = ConvNormAct(self.channels[0], self.variance, name="out_conv_0")(x, train)
        return _conv(self.outputs, 1, x.shape[-1], "out_conv_1")(x)


def require_channels(channels: Sequence[int]) -> None:
    """Raise `UserError` unless there are at least two numbers of channels, even but for the first."""
    if len(channels) < 2 or min(channels) < 1 or any(c % 2 for c in channels[1:]):
        found = " ".join(map(str, channels))
        raise UserError(f"channels={found}: expected at least two numbers >= 1, all but the first even")
