"""Small networks in which every width is free: VGG-small, ResNet-8 to -20, MobileNet-small.

They say which channels are there together or not at all (`spaces`), so that whole channels can be removed: those of a
residual stream have several producers, and depthwise convolutions follow theirs. All have a convolution, BatchNorm and
ReLU in this order, so that BatchNorm can be folded. With images of one channel and 10 classes they have 288,170, 77,754
(ResNet-8) and 43,194 parameters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv, head, max_pool

HEAD = "Dense_0"
VGG = (32, 32, 64, 64, 128, 128)
STAGES = (16, 32, 64)
"""Channels of the stages of a small ResNet."""
DEPTHS = (8, 14, 20)
MOBILE = ((16, 1), (24, 2), (24, 1), (40, 2), (40, 1))
"""(channels, stride) of the inverted residuals of MobileNet-small."""
EXPANSION, LAST = 4, 160


class Space(NamedTuple):
    """Channels that are there together or not at all, by the names of layers."""

    producers: tuple[str, ...]
    """Convolutions that give them."""
    followers: tuple[str, ...]
    """Norms and depthwise convolutions, which keep them."""
    consumers: tuple[str, ...]
    """Layers that read them."""


def chosen_widths(widths: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """The channels of each space. Raises `UserError` for another number of them, or a space without any."""
    if widths is None:
        return tuple(default)
    if len(widths) != len(default) or min(widths) < 1:
        raise UserError(f"mid_features: found {tuple(widths)}, expected {len(default)} numbers of 1 or more")
    return tuple(widths)


def _large_enough(x: Array, name: str) -> None:
    if min(x.shape[1:3]) < 4:
        raise UserError(f"{name}: found images of {x.shape[1]}x{x.shape[2]}, expected at least 4x4")


class VGGSmall(nn.Module):
    """Six 3x3 convolutions, 2x2 maxima after the second and the fourth, the mean over pixels."""

    classes: int = 10
    widths: tuple[int, ...] | None = None
    """Channels of each convolution."""
    variance: Variance = "torch"

    def middle(self) -> tuple[int, ...]:
        """Channels of each space. Raises `UserError`."""
        return chosen_widths(self.widths, VGG)

    def spaces(self) -> tuple[Space, ...]:
        """One for each convolution."""
        readers = [*(f"conv{i}" for i in range(1, len(VGG))), HEAD]
        return tuple(Space((f"conv{i}",), (f"bn{i}",), (reader,)) for i, reader in enumerate(readers))

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, outputs of the three stages)."""
        _large_enough(x, "vgg-small")
        found = []
        for i, features in enumerate(self.middle()):
            x = jax.nn.relu(BatchNorm(self.variance, name=f"bn{i}")(conv(features, name=f"conv{i}")(x), train))
            if i % 2:
                found.append(x)
                x = max_pool(x) if i < len(VGG) - 1 else x
        logits = head(self.classes)(x.mean((1, 2)))
        return (logits, tuple(found)) if taps else logits


class SmallResNet(nn.Module):
    """ResNet-8, -14 or -20 for small images (He et al., 2016): three stages of (depth - 2) / 6 blocks, post-activation,
    a 1x1 convolution in the shortcut where the channels change."""

    depth: int = 8
    classes: int = 10
    widths: tuple[int, ...] | None = None
    """Channels of the three stages' streams, then those in the middle of each block."""
    variance: Variance = "torch"

    def blocks(self) -> list[tuple[int, int]]:
        """(stage, stride) of each block. Raises `UserError` for another depth."""
        if self.depth not in DEPTHS:
            raise UserError(f"depth={self.depth}: expected one of {', '.join(map(str, DEPTHS))}")
        each = (self.depth - 2) // 6
        return [(stage, 2 if stage and not i else 1) for stage in range(3) for i in range(each)]

    def middle(self) -> tuple[int, ...]:
        """Channels of each space. Raises `UserError`."""
        return chosen_widths(self.widths, (*STAGES, *(STAGES[stage] for stage, _ in self.blocks())))

    def spaces(self) -> tuple[Space, ...]:
        """Three streams, then the middle of each block."""
        blocks = self.blocks()
        streams = []
        for stage in range(3):
            own = [i for i, (s, _) in enumerate(blocks) if s == stage]
            start = ("stem",) if not stage else (f"block{own[0]}_shortcut",)
            start_bn = ("stem_bn",) if not stage else (f"block{own[0]}_shortcut_bn",)
            inside = own if not stage else own[1:]
            after = (HEAD,) if stage == 2 else (f"block{own[-1] + 1}_conv1", f"block{own[-1] + 1}_shortcut")
            streams.append(
                Space(
                    (*start, *(f"block{i}_conv2" for i in own)),
                    (*start_bn, *(f"block{i}_bn2" for i in own)),
                    (*(f"block{i}_conv1" for i in inside), *after),
                )
            )
        middles = [Space((f"block{i}_conv1",), (f"block{i}_bn1",), (f"block{i}_conv2",)) for i in range(len(blocks))]
        return (*streams, *middles)

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, outputs of the three stages)."""
        _large_enough(x, f"resnet-{self.depth}")
        widths, blocks = self.middle(), self.blocks()
        norm = lambda name, h: BatchNorm(self.variance, name=name)(h, train)
        x, found = jax.nn.relu(norm("stem_bn", conv(widths[0], name="stem")(x))), []
        for i, (stage, stride) in enumerate(blocks):
            h = conv(widths[3 + i], 3, stride, name=f"block{i}_conv1")(x)
            h = conv(widths[stage], name=f"block{i}_conv2")(jax.nn.relu(norm(f"block{i}_bn1", h)))
            if stride > 1:
                x = norm(f"block{i}_shortcut_bn", conv(widths[stage], 1, stride, name=f"block{i}_shortcut")(x))
            x = jax.nn.relu(norm(f"block{i}_bn2", h) + x)
            if i + 1 == len(blocks) or blocks[i + 1][0] != stage:
                found.append(x)
        logits = head(self.classes)(x.mean((1, 2)))
        return (logits, tuple(found)) if taps else logits


class MobileNetSmall(nn.Module):
    """Five inverted residuals with depthwise convolutions (Sandler et al., 2018) and ReLU, for small images."""

    classes: int = 10
    widths: tuple[int, ...] | None = None
    """Channels of the three streams, of each block's expansion, and of the last convolution."""
    variance: Variance = "torch"

    def streams(self) -> list[tuple[int, int]]:
        """(stream before, stream after) of each block; they are equal where the block has a shortcut."""
        found, stream = [], 0
        for _, stride in MOBILE:
            found.append((stream, stream + (stride > 1)))
            stream = found[-1][1]
        return found

    def middle(self) -> tuple[int, ...]:
        """Channels of each space. Raises `UserError`."""
        channels = list(dict.fromkeys(features for features, _ in MOBILE))
        inner = [EXPANSION * channels[before] for before, _ in self.streams()]
        return chosen_widths(self.widths, (*channels, *inner, LAST))

    def spaces(self) -> tuple[Space, ...]:
        """Three streams, the expansion of each block, and the last convolution."""
        streams = self.streams()
        found = []
        for stream in range(3):
            into = [f"block{i}_project" for i, (_, after) in enumerate(streams) if after == stream]
            out = [f"block{i}_expand" for i, (before, _) in enumerate(streams) if before == stream]
            into = ["stem", *into] if not stream else into
            out = [*out, "last"] if stream == 2 else out
            found.append(Space(tuple(into), tuple(f"{name}_bn" for name in into), tuple(out)))
        for i in range(len(MOBILE)):
            follow = (f"block{i}_expand_bn", f"block{i}_depthwise", f"block{i}_depthwise_bn")
            found.append(Space((f"block{i}_expand",), follow, (f"block{i}_project",)))
        return (*found, Space(("last",), ("last_bn",), (HEAD,)))

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, outputs of the three streams)."""
        _large_enough(x, "mobilenet-small")
        widths, streams = self.middle(), self.streams()
        norm = lambda layer, name, h: BatchNorm(self.variance, name=f"{name}_bn")(layer(h), train)
        x, found = jax.nn.relu(norm(conv(widths[0], name="stem"), "stem", x)), []
        for i, ((before, after), (_, stride)) in enumerate(zip(streams, MOBILE)):
            if before != after:
                found.append(x)
            name, inner = f"block{i}", widths[3 + i]
            h = jax.nn.relu(norm(conv(inner, 1, name=f"{name}_expand"), f"{name}_expand", x))
            depthwise = conv(inner, 3, stride, groups=inner, name=f"{name}_depthwise")
            h = jax.nn.relu(norm(depthwise, f"{name}_depthwise", h))
            h = norm(conv(widths[after], 1, name=f"{name}_project"), f"{name}_project", h)
            x = x + h if before == after else h
        found.append(x)
        x = jax.nn.relu(norm(conv(widths[-1], 1, name="last"), "last", x))
        logits = head(self.classes)(x.mean((1, 2)))
        return (logits, tuple(found)) if taps else logits
