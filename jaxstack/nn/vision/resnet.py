"""Residual networks (He et al., 2016), post-activation, with the stem for small images or that of ImageNet.

ResNet-18 for small images has 11,173,962 parameters (10 classes); for ImageNet, 1,000 classes, ResNet-18, -34 and -50
have 11,689,512, 21,797,672 and 25,557,032. For smaller ones widths, blocks and strides of the stages can be given.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv, head, max_pool

Stem = Literal["small", "half", "imagenet"]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
EXPANSION = 4
"""Channels that a bottleneck block gives out, over those of its 3x3 convolution."""


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 with a bottleneck; the stride is on the first 3x3."""

    features: int
    stride: int = 1
    bottleneck: bool = False
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[N, H, W, C] -> [N, H / stride, W / stride, features (times 4 with a bottleneck)]."""
        norm = lambda name: BatchNorm(self.variance, name=name)
        out = self.features * (EXPANSION if self.bottleneck else 1)
        sizes = ((1, 1), (3, self.stride), (1, 1)) if self.bottleneck else ((3, self.stride), (3, 1))
        h = x
        for i, (size, stride) in enumerate(sizes, 1):
            features = out if i == len(sizes) else self.features
            h = norm(f"bn{i}")(conv(features, size, stride, name=f"conv{i}")(h), train)
            h = jax.nn.relu(h) if i < len(sizes) else h
        if x.shape[-1] != out or self.stride != 1:
            x = norm("downsample_bn")(conv(out, 1, self.stride, name="downsample_conv")(x), train)
        return jax.nn.relu(h + x)


class ResNet(nn.Module):
    """A residual network with four stages of 64, 128, 256 and 512 channels (times 4 in ResNet-50)."""

    depth: int = 18
    classes: int = 10
    """Number of logits; 0: no head, the output is that of the last stage, [N, H', W', C]."""
    stem: Stem = "small"
    """small: a 3x3 convolution; half: with stride 2; imagenet: 7x7 with stride 2 and 3x3 max pooling with stride 2."""
    variance: Variance = "torch"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of the stages; the stem has those of the first."""
    counts: tuple[int, ...] = ()
    """Blocks of the stages; default: those of `depth`."""
    strides: tuple[int, ...] = (1, 2, 2, 2)
    """Of the stages' first blocks."""

    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage. Raises `UserError` for another depth, or stages that do not fit together."""
        if self.depth not in BLOCKS:
            raise UserError(f"depth={self.depth}: expected 18, 34 or 50")
        counts = self.counts or BLOCKS[self.depth]
        if not len(counts) == len(self.widths) == len(self.strides):
            found = f"{len(self.widths)} widths, {len(counts)} counts, {len(self.strides)} strides"
            raise UserError(f"widths, counts, strides: found {found}, expected one of each for every stage")
        return counts

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in torchvision's and timm's state dicts."""
        parts = {"Dense_0": "fc", "downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
        return ".".join(parts.get(m, m.replace("_", ".")) for m in modules)

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, outputs of the stages)."""
        large, counts = self.stem == "imagenet", self.blocks()
        x = conv(self.widths[0], 7 if large else 3, 1 if self.stem == "small" else 2, name="conv1")(x)
        x = jax.nn.relu(BatchNorm(self.variance, name="bn1")(x, train))
        if large:
            x = max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf), 3, 2)
        found = []
        for stage, (width, count) in enumerate(zip(self.widths, counts)):
            for i in range(count):
                stride = 1 if i else self.strides[stage]
                block = Block(width, stride, self.depth == 50, self.variance, name=f"layer{stage + 1}_{i}")
                x = block(x, train)
            found.append(x)
        logits = head(self.classes)(x.mean((1, 2))) if self.classes else x
        return (logits, tuple(found)) if taps else logits
