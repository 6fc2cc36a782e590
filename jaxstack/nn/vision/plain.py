"""Networks for small images without a choice of depth: VGG-16 with BatchNorm, MobileNetV1 and V2.

In the versions for 32x32 images that are common for CIFAR-10: one linear layer, fewer strides than for ImageNet. With
10 classes they have 14,728,266, 3,217,226 and 2,296,922 parameters.
"""

import re
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv, head, max_pool

VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""(channels, stride)."""
V2 = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels, blocks, stride of the first)."""


_ENDS = {
    "stem": "conv1",
    "stem_bn": "bn1",
    "last": "conv2",
    "last_bn": "bn2",
    "Dense_0": "linear",
}


def _split(name: str, pattern: str) -> tuple[str, ...]:
    """The groups of a layer's name, empty where one is missing. Raises `KeyError` for another name."""
    if not (match := re.fullmatch(pattern, name)):
        raise KeyError(name)
    return tuple(part or "" for part in match.groups())


class VGG16(nn.Module):
    """VGG-16 with BatchNorm (Simonyan and Zisserman, 2015): images of at least 32x32 pixels."""

    classes: int = 10
    variance: Variance = "torch"

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in a state dict of torchvision's form: features.N, classifier."""
        if modules == ("Dense_0",):
            return "classifier"
        kind, stage, i = _split(modules[0], r"(conv|bn)(\d+)_(\d+)")
        # a convolution, BatchNorm and ReLU for each width, a pooling for each stage
        before = sum(3 * len(widths) + 1 for widths in VGG[: int(stage)])
        return f"features.{before + 3 * int(i) + (kind == 'bn')}"

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, outputs of the five stages before pooling)."""
        if min(x.shape[1:3]) < 32:
            raise UserError(f"vgg-16: found images of {x.shape[1]}x{x.shape[2]}, expected at least 32x32")
        found = []
        for stage, widths in enumerate(VGG):
            for i, features in enumerate(widths):
                x = conv(features, use_bias=True, name=f"conv{stage}_{i}")(x)
                x = jax.nn.relu(BatchNorm(self.variance, name=f"bn{stage}_{i}")(x, train))
            found.append(x)
            x = max_pool(x)
        logits = head(self.classes)(x.mean((1, 2)))
        return (logits, tuple(found)) if taps else logits


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., 2017): depthwise 3x3 and pointwise convolutions, each with BatchNorm and ReLU."""

    classes: int = 10
    variance: Variance = "torch"

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in the state dicts of the common networks for CIFAR-10: conv1, layers.N.conv1, linear."""
        if modules[0] in _ENDS:
            return _ENDS[modules[0]]
        part, number, norm = _split(modules[0], r"(depthwise|pointwise)(\d+)(_bn)?")
        return f"layers.{number}.{'bn' if norm else 'conv'}{1 if part == 'depthwise' else 2}"

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, what is there before each stride 2 and at the
        end)."""
        unit = lambda layer, name, x: jax.nn.relu(BatchNorm(self.variance, name=name)(layer(x), train))
        x, found = unit(conv(32, name="stem"), "stem_bn", x), []
        for i, (features, stride) in enumerate(V1):
            if stride == 2:
                found.append(x)
            c = x.shape[-1]
            x = unit(conv(c, 3, stride, groups=c, name=f"depthwise{i}"), f"depthwise{i}_bn", x)
            x = unit(conv(features, 1, name=f"pointwise{i}"), f"pointwise{i}_bn", x)
        logits = head(self.classes)(x.mean((1, 2)))
        return (logits, (*found, x)) if taps else logits


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., 2018) with ReLU: inverted residuals whose shortcut has a convolution where channels
    change at stride 1."""

    classes: int = 10
    variance: Variance = "torch"

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in the state dicts of the common networks for CIFAR-10: conv1, layers.N.conv1, linear."""
        if modules[0] in _ENDS:
            return _ENDS[modules[0]]
        stage, i, part, norm = _split(modules[0], r"block(\d+)_(\d+)_([a-z]+)(_bn)?")
        number = sum(count for _, _, count, _ in V2[: int(stage)]) + int(i)
        if part == "shortcut":
            return f"layers.{number}.shortcut.{1 if norm else 0}"
        return f"layers.{number}.{'bn' if norm else 'conv'}{('expand', 'depthwise', 'project').index(part) + 1}"

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, outputs of the seven stages)."""
        norm = lambda layer, name, x: BatchNorm(self.variance, name=f"{name}_bn")(layer(x), train)
        x, found = jax.nn.relu(norm(conv(32, name="stem"), "stem", x)), []
        for stage, (expansion, features, count, first) in enumerate(V2):
            for i in range(count):
                stride, name, c = first if not i else 1, f"block{stage}_{i}", x.shape[-1]
                h = jax.nn.relu(norm(conv(expansion * c, 1, name=f"{name}_expand"), f"{name}_expand", x))
                depthwise = conv(expansion * c, 3, stride, groups=expansion * c, name=f"{name}_depthwise")
                h = jax.nn.relu(norm(depthwise, f"{name}_depthwise", h))
                h = norm(conv(features, 1, name=f"{name}_project"), f"{name}_project", h)
                if stride == 1 and c != features:
                    x = norm(conv(features, 1, name=f"{name}_shortcut"), f"{name}_shortcut", x)
                x = h + x if stride == 1 else h
            found.append(x)
        x = jax.nn.relu(norm(conv(1280, 1, name="last"), "last", x))
        logits = head(self.classes)(x.mean((1, 2)))
        return (logits, tuple(found)) if taps else logits
