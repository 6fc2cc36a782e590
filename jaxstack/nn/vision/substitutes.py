"""Cheap substitutes for the convolutions of a residual block: 23 types, their layers and their closed-form sizes.

Of BlockSwap (Turner et al., 2020) and Moonshine (Crowley et al., 2018). With C channels in and K out:

    Conv         3x3
    DConv        depthwise 3x3, BN, ReLU, 1x1; DConvAx: in x groups, DConvGx: in groups of x channels
    ConvBb       bottleneck: 1x1 to K / b, BN, ReLU, 3x3, BN, ReLU, 1x1; AxBb and GxBb: in groups, as above

The first two kinds take the place of each of a block's two convolutions, a bottleneck that of both.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxstack.core.errors import UserError, unknown
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv


class Form(NamedTuple):
    """What a type's name says."""

    bottleneck: int = 0
    """What it divides the output's channels by in the middle; 0: it is none."""
    groups: int = 0
    """Of its 3x3 convolution; 0: given by `per_group`, or a plain convolution."""
    per_group: int = 0
    """Channels of a group."""


FORMS = {
    "Conv": Form(),
    "DConv": Form(per_group=1),
    **{f"DConvA{x}": Form(groups=x) for x in (2, 4, 8, 16)},
    **{f"DConvG{x}": Form(per_group=x) for x in (2, 4, 8, 16)},
    "ConvB2": Form(2, groups=1),
    "ConvB4": Form(4, groups=1),
    **{f"A{x}B2": Form(2, groups=x) for x in (2, 4, 8, 16)},
    **{f"G{x}B2": Form(2, per_group=x) for x in (2, 4, 8, 16)},
    **{f"G{x}B4": Form(4, per_group=x) for x in (2, 4, 8)},
}
KINDS = tuple(FORMS)
"""The 23 types."""


def form_of(kind: str) -> Form:
    """What a name says. Raises `UserError` for an unknown one."""
    if kind not in FORMS:
        raise unknown("block type", kind, KINDS)
    return FORMS[kind]


def units_of(kind: str) -> int:
    """How many of a type take a block's place: 2, or 1 for a bottleneck."""
    return 1 if form_of(kind).bottleneck else 2


def middle_of(kind: str, c_in: int, c_out: int) -> tuple[int, int]:
    """(channels, groups) of a type's 3x3 convolution. Raises `UserError` where the groups do not divide."""
    form = form_of(kind)
    channels = c_out // form.bottleneck if form.bottleneck else c_in
    if form == Form():
        return channels, 1
    groups = form.groups or channels // form.per_group
    if not groups or channels % groups or (form.per_group and channels % form.per_group):
        what = f"a multiple of {form.groups or form.per_group}"
        raise UserError(f"{kind}: found {channels} channels at its 3x3 convolution, expected {what}")
    return channels, groups


def fits(kind: str, c_in: int, c_out: int) -> bool:
    """Whether a type has a block of so many channels in and out."""
    form_of(kind)
    try:
        for channels in (c_in, c_out)[: units_of(kind)]:
            middle_of(kind, channels, c_out)
    except UserError:
        return False
    return True


def unit_params(kind: str, c_in: int, c_out: int) -> int:
    """Trained numbers of one substitute of a convolution, or of one bottleneck. Raises `UserError`."""
    form, (middle, groups) = form_of(kind), middle_of(kind, c_in, c_out)
    if form == Form():
        return 9 * c_in * c_out
    spatial = 9 * middle * middle // groups
    if form.bottleneck:
        return c_in * middle + 2 * middle + spatial + 2 * middle + middle * c_out
    return spatial + 2 * c_in + c_in * c_out


def block_params(kind: str, c_in: int, c_out: int, stride: int = 1, units: int | None = None) -> int:
    """Trained numbers of a whole block, with its BatchNorms and, where channels or size change, its shortcut.

    Args:
        kind: one of `KINDS`.
        c_in, c_out: channels.
        stride: of the block.
        units: substitutes one after the other; default: what the type has.

    Raises:
        UserError: for an unknown type, or groups that do not divide.
    """
    total = 2 * c_in + unit_params(kind, c_in, c_out)
    total += c_in * c_out * (c_in != c_out or stride != 1)
    if (units_of(kind) if units is None else units) == 2:
        total += 2 * c_out + unit_params(kind, c_out, c_out)
    return total


class Unit(nn.Module):
    """A substitute that is no plain convolution."""

    kind: str
    features: int
    stride: int = 1
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[N, H, W, C] -> [N, H / stride, W / stride, features]."""
        middle, groups = middle_of(self.kind, x.shape[-1], self.features)
        active = lambda h, name: jax.nn.relu(BatchNorm(self.variance, name=name)(h, train))
        if FORMS[self.kind].bottleneck:
            x = active(conv(middle, 1, name="conv1x1_down")(x), "bn1")
            x = active(conv(middle, 3, self.stride, groups=groups, name="conv")(x), "bn2")
            return conv(self.features, 1, name="conv1x1_up")(x)
        x = active(conv(middle, 3, self.stride, groups=groups, name="convdw")(x), "bn")
        return conv(self.features, 1, name="conv1x1")(x)
