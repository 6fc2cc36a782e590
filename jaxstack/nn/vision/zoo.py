"""Networks for images by name."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxstack.core.config import require
from jaxstack.core.errors import UserError
from jaxstack.data import images
from jaxstack.nn.networks import MLP
from jaxstack.nn.supervised import Model, linen
from jaxstack.nn.vision.densenet import DenseNet, DenseNet121
from jaxstack.nn.vision.efficientnet import EfficientNetB0
from jaxstack.nn.vision.efficientnet_lite import EfficientNetLite0
from jaxstack.nn.vision.layers import Variance
from jaxstack.nn.vision.lenet import LeNet
from jaxstack.nn.vision.mobilenet_v3 import MobileNetV3
from jaxstack.nn.vision.plain import VGG16, MobileNetV1, MobileNetV2
from jaxstack.nn.vision.resnet import ResNet
from jaxstack.nn.vision.small import DEPTHS, MobileNetSmall, SmallResNet, VGGSmall
from jaxstack.nn.vision.wrn import WRN

NAMES = (
    "lenet, wrn-D-W, densenet-bc-D-K, densenet121, resnet-18|34|50[-imagenet], vgg-16, mobilenet-v1, mobilenet-v2, "
    "mobilenet-v3-large, efficientnet-b0, efficientnet-lite0, vgg-small, resnet-8|14|20, mobilenet-small"
)
_WRN = re.compile(r"wrn-(\d+)-(\d+(?:\.\d+)?)")
_DENSE = re.compile(r"densenet-bc-(\d+)-(\d+)")
_RESNET = re.compile(r"resnet-(\d+)(-imagenet)?")
_PLAIN: dict[str, Any] = {
    "vgg-16": VGG16,
    "mobilenet-v1": MobileNetV1,
    "mobilenet-v2": MobileNetV2,
    "mobilenet-v3-large": MobileNetV3,
    "densenet121": DenseNet121,
    "efficientnet-b0": EfficientNetB0,
    "efficientnet-lite0": EfficientNetLite0,
}
_SMALL: dict[str, Any] = {
    "vgg-small": VGGSmall,
    **{f"resnet-{depth}": functools.partial(SmallResNet, depth) for depth in DEPTHS},
    "mobilenet-small": MobileNetSmall,
}
"""Those in which every width is free."""


def network(
    name: str,
    classes: int = 10,
    *,
    mid_features: Sequence[int] | None = None,
    variance: Variance = "torch",
    pointwise: str = "",
    size: float | None = None,
    kinds: Sequence[str] | None = None,
) -> Any:
    """An unbound network.

    Args:
        name: lenet, wrn-D-W with depth and width (wrn-10-2, wrn-40-1.5), densenet-bc-D-K with depth and growth
            (densenet-bc-100-12), resnet-D for small images or resnet-D-imagenet, vgg-16, mobilenet-v1, mobilenet-v2,
            mobilenet-v3-large, densenet121, efficientnet-b0, efficientnet-lite0; vgg-small, resnet-8, -14, -20 or
            mobilenet-small, in which every width is free.
        classes: number of logits.
        mid_features: middle channels of each block, for wrn-D-W and densenet-bc-D-K; of each space of channels, for the
            small networks.
        variance: of BatchNorm's running variance.
        pointwise: kind of the separable convolutions of wrn-D-W, see `WRN`; "": plain convolutions.
        size: of their structured maps.
        kinds: type of each block of wrn-D-W, see `substitutes`; not with `mid_features` or `pointwise`.

    Returns:
        A flax module, see the package's docstring.

    Raises:
        UserError: for an unknown name, a depth or width that there is none of, or middle widths, structured maps or
            block types that do not fit.
    """
    mid = None if mid_features is None else tuple(mid_features)
    if match := _WRN.fullmatch(name):
        types = None if kinds is None else tuple(kinds)
        found = WRN(int(match[1]), float(match[2]), classes, mid, variance, pointwise, size, kinds=types)
        found.middle()
        found.param_count()  # refuses maps that do not fit
        return found
    if kinds is not None:
        raise UserError(f"block types: {name} takes none, expected a network wrn-D-W")
    if pointwise:
        raise UserError(f"pointwise: {name} has no separable convolutions, expected a network wrn-D-W")
    if name in _SMALL:
        found = _SMALL[name](classes, mid, variance)
        found.middle()
        return found
    if match := _DENSE.fullmatch(name):
        found = DenseNet(int(match[1]), int(match[2]), classes, mid, variance)
        found.middle()
        return found
    if mid is not None:
        raise UserError(f"mid_features: {name} has no middle widths, expected a network wrn-D-W or densenet-bc-D-K")
    if name == "lenet":
        return LeNet(classes)
    if match := _RESNET.fullmatch(name):
        found = ResNet(int(match[1]), classes, "imagenet" if match[2] else "small", variance)
        found.blocks()
        return found
    if name in _PLAIN:
        return _PLAIN[name](classes, variance)
    raise UserError(f"model={name!r}: expected one of {NAMES}")


def model_of(data: str, name: str, hidden: Sequence[int] = ()) -> Model:
    """A classifier of a set's images as pure functions of its variables and of uint8 images.

    Args:
        data: of the set, see `data.images.load`.
        name: of a network, or mlp.
        hidden: widths of mlp.

    Raises:
        UserError: for an unknown set or network, and a set without classes.
    """
    facts = images.class_facts(data)
    example = np.zeros((1, *facts.shape), np.uint8)
    if name != "mlp":
        return linen(network(name, facts.classes), example, prepare=facts.scaled)
    net = MLP(tuple(hidden), facts.classes, "relu")
    return linen(net, example, flags=lambda train: {}, prepare=lambda x: facts.scaled(x).reshape(len(x), -1))


def known(name: str) -> bool:
    """Whether `network` makes one of that name."""
    try:
        network(name)
    except UserError:
        return False
    return True


def check_model(config: Any) -> None:
    """Check the fields `model` and `hidden` of a config: mlp or what `network` makes, and mlp's widths. Raises
    `UserError`."""
    require(config, "hidden", all(h >= 1 for h in config.hidden), "layer widths >= 1")
    require(config, "model", config.model == "mlp" or known(config.model), f"one of mlp, {NAMES}")
