"""The network of REACHNet (Burke, Engelmann et al., 2024): Choroidalyzer's U-Net with other factors and attention.

A level reduces the resolution by 2 or 4. The smallest maps, of whatever size, are resized to S x S pixels, pass one
transformer block as S^2 tokens, and are resized back, so that one set of parameters takes scans of any resolution. With
S = 768 / (product of the factors) scans of 768 x 768 pixels are not resized at all.
"""

from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import torch_bias, torch_uniform
from jaxstack.nn.vision.unet import UNet

RESOLUTION = 768
"""Rows and columns at which the grid of tokens is that of the smallest maps."""
STRATEGIES = "N_same, N_double, N_doublemax-M, N_quadruple, N_quadruplemax-M, or numbers with commas"


def channels_of(strategy: str, depth: int) -> tuple[int, ...]:
    """Channels of each resolution, from full resolution down.

    Args:
        strategy: "16_quadruplemax-128" is 16, four times as many at each level, at most 128; likewise N_same, N_double,
            N_doublemax-M and N_quadruple; or a list, "16,64,128".
        depth: levels, one fewer than channels.

    Raises:
        UserError: for another text, or a list of another length.
    """
    if "_" not in strategy:
        found = [int(n) for n in strategy.split(",") if n.strip().isdecimal()]
        if len(found) != depth + 1 or len(found) != strategy.count(",") + 1:
            raise UserError(f"channels={strategy!r}: expected {depth + 1} numbers, or one of {STRATEGIES}")
        return tuple(found)
    first, kind = strategy.split("_", 1)
    kind, *most = kind.split("-")
    times = {"same": 1, "double": 2, "doublemax": 2, "quadruple": 4, "quadruplemax": 4}.get(kind)
    limited = kind.endswith("max")
    good = first.isdecimal() and times is not None and len(most) == limited and all(m.isdecimal() for m in most)
    if not good or times is None:
        raise UserError(f"channels={strategy!r}: expected {STRATEGIES}")
    limit = int(most[0]) if limited else None
    grown = [int(first) * times**i for i in range(depth + 1)]
    return tuple(grown if limit is None else [min(c, limit) for c in grown])


@lru_cache(64)
def corner_matrix(old: int, new: int) -> np.ndarray:
    """Bilinear interpolation of `old` pixels at `new`, the first and last of which are those of the old: [new, old].

    PyTorch's align_corners=True: new pixel i lies at i (old - 1) / (new - 1). Equal sizes give the identity.
    """
    at = np.arange(new) * (old - 1) / max(new - 1, 1)
    low = np.minimum(at.astype(int), max(old - 2, 0))
    matrix = np.zeros((new, old))
    matrix[np.arange(new), low] = 1.0 - (at - low)
    matrix[np.arange(new), np.minimum(low + 1, old - 1)] += at - low
    return matrix.astype(np.float32)


def resized_corners(x: Float[Array, "n h w c"], size: tuple[int, int]) -> Float[Array, "n hh ww c"]:
    """Maps in other rows and columns, bilinear with align_corners=True; of the same size as they are."""
    for axis, new in zip((1, 2), size):
        if x.shape[axis] != new:
            product = jnp.tensordot(x, corner_matrix(x.shape[axis], new), ((axis,), (1,)), precision="highest")
            x = jnp.moveaxis(product, -1, axis)
    return x


def _dense(features: int, inputs: int, name: str, bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, kernel_init=torch_uniform, bias_init=torch_bias(inputs), name=name)


class Attention(nn.Module):
    """Self-attention of tokens [N, T, C], queries, keys and values from one product without bias."""

    heads: int = 8

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, tokens, channels = x.shape
        if channels % self.heads:
            raise UserError(f"heads={self.heads}: expected a divisor of the {channels} channels of the smallest maps")
        qkv = _dense(3 * channels, channels, "qkv", bias=False)(x)
        q, k, v = jnp.moveaxis(qkv.reshape(n, tokens, 3, self.heads, channels // self.heads), 2, 0)
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) * (channels // self.heads) ** -0.5
        out = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
        return _dense(channels, channels, "proj")(out.reshape(n, tokens, channels))


class MLP(nn.Module):
    """Two layers with an exact GELU between them."""

    ratio: float = 4.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        hidden = int(channels * self.ratio)
        h = jax.nn.gelu(_dense(hidden, channels, "fc1")(x), approximate=False)
        return _dense(channels, hidden, "fc2")(h)


class TransformerBlock(nn.Module):
    """t + Attention(LayerNorm(t)), then t + MLP(LayerNorm(t)): [N, T, C] -> [N, T, C]."""

    heads: int = 8
    mlp_ratio: float = 4.0

    @nn.compact
    def __call__(self, t: Array) -> Array:
        norm = lambda name: nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)
        t = t + Attention(self.heads, name="attn")(norm("norm1")(t))
        return t + MLP(self.mlp_ratio, name="mlp")(norm("norm2")(t))


class ResolutionAgnosticAttention(nn.Module):
    """A transformer block on maps of any size: [N, h, w, C] -> [N, h, w, C].

    The maps are resized to `side` x `side` tokens, to which a learned embedding of their position is added, and back.
    Maps that are not square change their aspect ratio inside, as in the released code.
    """

    side: int
    heads: int = 8
    mlp_ratio: float = 4.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        shape = (1, self.side**2, c)
        embedding = self.param("pos_embed", nn.initializers.normal(0.02), shape)
        t = resized_corners(x, (self.side, self.side)).reshape(n, self.side**2, c) + embedding
        t = TransformerBlock(self.heads, self.mlp_ratio, name="attention")(t)
        return resized_corners(t.reshape(n, self.side, self.side, c), (h, w))


class ReachNet(UNet):
    """Choroidalyzer's U-Net with factors of its own and attention on its smallest maps.

    The released configuration is not known. The default is one whose grid has the 12 x 12 tokens of the released code:
    1,224,403 parameters.
    """

    channels: Any = "16_quadruplemax-128"
    """Numbers of each resolution, or a strategy of `channels_of`."""
    factors: tuple[int, ...] = (4, 4, 4)
    attend: bool = True
    """Whether there is attention."""
    cap: int | None = None
    """The most rows and columns of tokens, where the grid would be larger than the maps of the scans that are used."""
    heads: int = 8
    mlp_ratio: float = 4.0
    resolution: int = RESOLUTION

    @property
    def widths(self) -> tuple[int, ...]:
        given = self.channels
        return channels_of(given, len(self.factors)) if isinstance(given, str) else tuple(given)

    @property
    def side(self) -> int:
        """S, rows and columns of tokens."""
        whole = max(self.resolution // self.multiple, 1)
        return whole if self.cap is None else min(whole, self.cap)

    def bottom(self, x: Array) -> Array:
        """Attention, where there is any."""
        if not self.attend:
            return x
        return ResolutionAgnosticAttention(self.side, self.heads, self.mlp_ratio, name="attention")(x)
