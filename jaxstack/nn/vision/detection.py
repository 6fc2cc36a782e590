"""Dense one-stage detectors: FCOS (Tian et al., 2019), and ATSS (Zhang et al., 2020) with a branch for the IoU.

A backbone's last three stages, a feature pyramid of three to five levels (Lin et al., 2017) and one head for all
levels: two towers of convolutions with GroupNorm and ReLU. What the towers' first convolutions give is returned too, as
it is what prediction-guided distillation imitates. Parameters are in three subtrees: backbone, neck, head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.conv import Conv
from jaxstack.nn.conv_forms import largest_divisor
from jaxstack.nn.vision.boxes import (
    Pair,
    from_distances,
    level_counts,
    location_strides,
    locations,
    square_anchors,
)
from jaxstack.nn.vision.detection_loss import Kind, Targets, atss_targets, fcos_ranges, fcos_targets
from jaxstack.nn.vision.layers import BatchNorm, GroupNorm, Variance, conv
from jaxstack.nn.vision.mobilenet_v3 import MobileNetV3
from jaxstack.nn.vision.resnet import ResNet

RARE = -float(np.log((1.0 - 0.01) / 0.01))
"""First bias of class logits: all probabilities begin at 0.01."""
DELTA_STD = (0.1, 0.1, 0.2, 0.2)
"""Deviations by which ATSS's changes of anchors are divided."""
small_normal = nn.initializers.normal(0.01)


class Outputs(NamedTuple):
    """What a detector gives for images [B, H, W, 3]; A locations, the finest level first."""

    logits: Array
    """[B, A, C] of the classes."""
    boxes: Array
    """[B, A, 4] in pixels, not cut off at the image."""
    quality: Array
    """[B, A] logits of centre-ness (FCOS) or of the box's IoU (ATSS)."""
    class_features: tuple[Array, ...]
    """For each level [B, H_l, W_l, channels]: the first convolution of the tower for classes, after norm and ReLU."""
    box_features: tuple[Array, ...]
    """The same of the tower for boxes."""


class SmallBackbone(nn.Module):
    """Four stages for images of 64 pixels: a convolution with stride 2, then three pairs of 3x3 convolutions with a
    shortcut, the first with stride 2. Stages have width, width, 2 width and 4 width channels."""

    width: int = 8
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = True) -> Any:
        """Images [N, H, W, C] -> (output of the last stage, outputs of all four at strides 2, 4, 8, 16)."""
        norm = lambda name: BatchNorm(self.variance, name=name)
        x = jax.nn.relu(norm("bn")(conv(self.width, 3, 2, name="conv")(x), train))
        found = [x]
        for i, features in enumerate((self.width, 2 * self.width, 4 * self.width), 1):
            h = jax.nn.relu(norm(f"bn{i}_1")(conv(features, 3, 2, name=f"conv{i}_1")(x), train))
            x = jax.nn.relu(h + norm(f"bn{i}_2")(conv(features, name=f"conv{i}_2")(h), train))
            found.append(x)
        return (x, tuple(found)) if taps else x


BACKBONES = "small, resnet-18, resnet-34, resnet-50 or mobilenet-v3-large"


def backbone(name: str, width: int = 8, variance: Variance = "torch") -> tuple[Any, tuple[int, ...]]:
    """A network whose last three taps are a pyramid's first levels, and their strides.

    Args:
        name: "small" (strides 4, 8, 16), "resnet-18", "resnet-34", "resnet-50" or "mobilenet-v3-large" (8, 16, 32).
        width: channels of the small one.
        variance: see `BatchNorm`.

    Raises:
        UserError: for another name.
    """
    if name == "small":
        return SmallBackbone(width, variance), (4, 8, 16)
    if name == "mobilenet-v3-large":
        return MobileNetV3(0, variance, form="torch"), (8, 16, 32)
    if name in ("resnet-18", "resnet-34", "resnet-50"):
        return ResNet(int(name.removeprefix("resnet-")), 0, "imagenet", variance), (8, 16, 32)
    raise UserError(f"backbone={name!r}: expected {BACKBONES}")


class Neck(nn.Module):
    """A feature pyramid: 1x1 convolutions to one number of channels, each level's sum with the coarser one, twice as
    large, and a 3x3 convolution; levels beyond the third by convolutions with stride 2."""

    channels: int
    levels: int

    @nn.compact
    def __call__(self, taps: Sequence[Array]) -> tuple[Array, ...]:
        """Three maps, each half the size of the one before -> `levels` maps [N, H_l, W_l, channels]."""
        made = lambda size, stride, name: Conv(
            self.channels, (size, size), stride, size // 2, kernel_init=nn.initializers.xavier_uniform(), name=name
        )
        sums = [made(1, 1, f"lateral{i}")(x) for i, x in enumerate(taps)]
        for i in (1, 0):
            sums[i] += sums[i + 1].repeat(2, 1).repeat(2, 2)
        found = [made(3, 1, f"out{i}")(x) for i, x in enumerate(sums)]
        for i in range(3, self.levels):
            found.append(made(3, 2, f"extra{i}")(found[-1] if i == 3 else jax.nn.relu(found[-1])))
        return tuple(found)


class Head(nn.Module):
    """Two towers and the outputs of a level, with one set of weights for all levels but for a scale of each."""

    classes: int
    channels: int
    towers: int

    @nn.compact
    def __call__(self, levels: Sequence[Array]) -> tuple[list[Array], ...]:
        """Maps [N, H_l, W_l, channels] -> for each level class logits, four numbers of the box, quality logits, and
        both towers' first features."""
        made = lambda features, name, **options: Conv(
            features, (3, 3), 1, 1, kernel_init=small_normal, name=name, **options
        )
        groups = largest_divisor(self.channels, min(32, max(1, self.channels // 4)))
        tower = lambda kind: [
            (
                made(self.channels, f"{kind}{i}", use_bias=False),
                GroupNorm(groups, name=f"{kind}_gn{i}"),
            )
            for i in range(self.towers)
        ]
        of_class, of_box = tower("class"), tower("box")
        to_class = made(self.classes, "class_out", bias_init=nn.initializers.constant(RARE))
        # the box's four numbers and the quality, by one convolution
        to_box = made(5, "box_out")
        found: tuple[list[Array], ...] = ([], [], [], [], [])
        for i, x in enumerate(levels):
            seen = []
            for layers in (of_class, of_box):
                h, first = x, None
                for layer, norm in layers:
                    h = jax.nn.relu(norm(layer(h)))
                    first = h if first is None else first
                seen.append((h, first))
            (c, c_first), (b, b_first) = seen
            box = to_box(b)
            scale = self.param(f"scale{i}", nn.initializers.ones, ())
            for out, value in zip(found, (to_class(c), box[..., :4] * scale, box[..., 4], c_first, b_first)):
                out.append(value)
        return found


class Detector(nn.Module):
    """A detector of `classes` kinds of objects."""

    backbone: nn.Module
    classes: int
    strides: tuple[int, ...] = (4, 8, 16)
    """Of the levels, three to five; the first three are the backbone's."""
    kind: Kind = "fcos"
    channels: int = 32
    """Of the pyramid and the towers."""
    towers: int = 2
    """Convolutions of each tower."""
    scale: float = 2.0
    """Side of ATSS's anchors over the stride."""
    frozen_norm: bool = False
    """The backbone's BatchNorm always uses its stored statistics, as those of ImageNet."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Outputs:
        """Images [B, H, W, 3], H and W multiples of the third stride -> `Outputs`. Raises `UserError` for others."""
        hw = (x.shape[1], x.shape[2])
        if hw[0] % self.strides[2] or hw[1] % self.strides[2]:
            raise UserError(f"images of {hw[1]} x {hw[0]} pixels: expected multiples of {self.strides[2]}")
        taps = self.backbone(x, train and not self.frozen_norm, taps=True)[1][-3:]
        levels = Neck(self.channels, len(self.strides), name="neck")(taps)
        logits, raw, quality, c, b = Head(self.classes, self.channels, self.towers, name="head")(levels)
        flat = lambda parts: jnp.concatenate([p.reshape(len(x), -1, *p.shape[3:]) for p in parts], 1)
        boxes = decode(self.kind, flat(raw), hw, self.strides, self.scale)
        return Outputs(flat(logits), boxes, flat(quality), tuple(c), tuple(b))


def decode(kind: Kind, raw: Array, image_hw: Pair, strides: Sequence[int], scale: float = 2.0) -> Array:
    """Boxes [..., A, 4] in pixels of the four numbers that a head gives for each location.

    FCOS: distances to the sides are exp(number) strides. ATSS: the anchor's centre moves by number / 10 of its side,
    and its width and height are multiplied by exp(number / 5). Exponents end at 8.
    """
    if kind == "fcos":
        far = jnp.exp(jnp.minimum(raw, 8.0)) * location_strides(image_hw, strides)[:, None]
        return from_distances(locations(image_hw, strides), far)
    anchors = square_anchors(image_hw, strides, scale)
    side = anchors[:, 2:] - anchors[:, :2]
    change = raw * jnp.asarray(DELTA_STD, jnp.float32)
    middle = 0.5 * (anchors[:, 2:] + anchors[:, :2]) + change[..., :2] * side
    half = 0.5 * side * jnp.exp(jnp.minimum(change[..., 2:], 8.0))
    return jnp.concatenate([middle - half, middle + half], -1)


def targets_of(
    kind: Kind,
    image_hw: Pair,
    strides: Sequence[int],
    boxes: Array,
    labels: Array,
    valid: Array,
    *,
    scale: float = 2.0,
    radius: float | None = 1.5,
    topk: int = 9,
) -> Targets:
    """Targets of images.

    Args:
        kind: "fcos" or "atss".
        image_hw, strides: of the detector.
        boxes, labels, valid: objects of the images, [B, G, 4], [B, G], [B, G].
        scale: pixels over the stride: ends of FCOS's ranges, side of ATSS's anchors.
        radius: of FCOS's centre sampling.
        topk: of ATSS.
    """
    if kind == "fcos":
        where = locations(image_hw, strides), location_strides(image_hw, strides), fcos_ranges(image_hw, strides, scale)
        one = lambda b, l, v: fcos_targets(*where, b, l, v, radius)
    else:
        anchors, counts = square_anchors(image_hw, strides, scale), level_counts(image_hw, strides)
        one = lambda b, l, v: atss_targets(anchors, counts, b, l, v, topk)
    return jax.vmap(one)(boxes, labels, valid)


def inherited(variables: Any, teacher: Any, parts: Sequence[str] = ("neck", "head")) -> Any:
    """Variables of a student whose neck and head are copies of its teacher's, layer by layer where shapes agree.

    Args:
        variables: of the student, {"params": ..., ...}.
        teacher: variables of a detector with as many channels, levels and classes. Where its backbone is wider, the
            neck's 1x1 convolutions stay the student's own.
        parts: subtrees that are copied.

    Raises:
        UserError: for parts of which nothing fits.
    """
    params = dict(variables["params"])
    shapes = lambda layer: [x.shape for x in jax.tree.leaves(layer)]
    for part in parts:
        own, other = params[part], teacher["params"][part]
        fit = {name for name in own if name in other and shapes(own[name]) == shapes(other[name])}
        if not any(np.ndim(x) > 1 for name in fit for x in jax.tree.leaves(own[name])):
            raise UserError(f"teacher: found a {part} of other shapes, expected one with the student's channels")
        params[part] = {k: jax.tree.map(jnp.copy, other[k]) if k in fit else layer for k, layer in own.items()}
    return {**variables, "params": params}
