"""Networks for images by name: lenet, wrn-D-W."""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import Variance
from jaxstack.nn.vision.lenet import LeNet
from jaxstack.nn.vision.wrn import WRN, block_features

NAMES = "lenet, wrn-D-W (wrn-10-2, wrn-40-1.5)"
_WRN = re.compile(r"wrn-(\d+)-(\d+(?:\.\d+)?)")


def network(
    name: str, classes: int = 10, *, mid_features: Sequence[int] | None = None, variance: Variance = "torch"
) -> Any:
    """An unbound network.

    Args:
        name: lenet, or wrn-D-W with depth and width.
        classes: number of logits.
        mid_features: middle channels of each block, for wrn-D-W.
        variance: of BatchNorm's running variance.

    Returns:
        A flax module, see the package's docstring.

    Raises:
        UserError: for an unknown name, or middle widths that do not fit.
    """
    mid = None if mid_features is None else tuple(mid_features)
    if match := _WRN.fullmatch(name):
        depth, width = int(match[1]), float(match[2])
        block_features(depth, width, mid)
        return WRN(depth, width, classes, mid, variance)
    if mid is not None:
        raise UserError(f"mid_features: {name} has no middle widths, expected a network wrn-D-W")
    if name == "lenet":
        return LeNet(classes)
    raise UserError(f"model={name!r}: expected one of {NAMES}")


def known(name: str) -> bool:
    """Whether `network` makes one of that name."""
    try:
        return isinstance(network(name), nn.Module)
    except UserError:
        return False
