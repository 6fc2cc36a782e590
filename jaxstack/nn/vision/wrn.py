"""Wide residual networks (Zagoruyko and Komodakis, 2016), pre-activation, with a middle width or a type for each block.

WRN-d-w has three stages of n = (d - 4) / 6 blocks with 16 w, 32 w and 64 w channels; a block is BN-ReLU-conv3x3 to its
middle width, BN-ReLU-mask, conv3x3, plus the shortcut. Reduced, bottleneck, pruned and copycat networks differ in
`depth`, `width` and `mid_features` alone; with `kinds` each block has one of the 23 types of `substitutes`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import BatchNorm, Variance, branch_output, conv, head, masked, of_blocks
from jaxstack.nn.vision.separable import SeparableConv, layer_params
from jaxstack.nn.vision.substitutes import Unit, block_params, units_of

STEM = 16


class Block(nn.Module):
    """A pre-activation block: BN, ReLU, 3x3 to `mid` channels, BN, ReLU, mask, 3x3 to `features`, plus the shortcut.

    Where channels or size change, the shortcut is a 1x1 convolution of the activated input, else the raw input. With no
    middle channels the block is its shortcut alone. Of another type than Conv, `mid` is `features`.
    """

    features: int
    mid: int
    stride: int = 1
    variance: Variance = "torch"
    pointwise: str = ""
    """Kind of the map of channels where the 3x3 convolutions are separable ones; "": plain convolutions."""
    size: float | None = None
    reference_compat: bool = False
    kind: str = "Conv"
    """One of `substitutes.KINDS`."""
    units: int = 2
    """Convolutions, or substitutes of one, in the branch."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        """[N, H, W, C] -> [N, H / stride, W / stride, features]; mask [mid] or [N, mid]."""
        separable = (self.pointwise, self.size, self.reference_compat)

        def layer(features: int, stride: int, name: str) -> Any:
            if self.pointwise:
                return SeparableConv(features, (3, 3), stride, *separable, name=name)
            if self.kind != "Conv":
                unit = Unit(self.kind, features, stride, self.variance, name=name)
                return lambda h: unit(h, train)
            return conv(features, 3, stride, name=name)

        changes = x.shape[-1] != self.features or self.stride != 1
        if not self.mid and not changes:
            return x
        active = jax.nn.relu(BatchNorm(self.variance, name="bn1")(x, train))
        shortcut = conv(self.features, 1, self.stride, name="shortcut")(active) if changes else x
        if not self.mid:
            return shortcut
        h = layer(self.mid, self.stride, "conv1")(active)
        if self.units == 2:
            h = masked(jax.nn.relu(BatchNorm(self.variance, name="bn2")(h, train)), mask)
            h = layer(self.features, 1, "conv2")(h)
        return branch_output(self, h) + shortcut


class WRN(nn.Module):
    """A wide residual network. Blocks are named block0, block1, ..."""

    depth: int = 40
    width: float = 2.0
    classes: int = 10
    mid_features: tuple[int, ...] | None = None
    """Middle channels of each block, 0 or more; default: as many as it gives out."""
    variance: Variance = "torch"
    pointwise: str = ""
    """Kind of `structured.KINDS` of the separable convolutions in place of the blocks' 3x3 ones; "": plain ones. Stem
    and shortcuts stay."""
    size: float | None = None
    """Of the structured maps, see `structured.SIZES`; None: the value there."""
    reference_compat: bool = False
    """Of the separable convolutions; with `kinds` every block of a stage has as many units as the type of the stage's
    first one, as BlockSwap's released scores are computed."""
    kinds: tuple[str, ...] | None = None
    """Type of each block, see `substitutes`; not with `mid_features` or `pointwise`."""

    def middle(self) -> tuple[int, ...]:
        """Middle channels of each block. Raises `UserError` for values that do not fit."""
        self.types()
        return tuple(block_features(self.depth, self.width, self.mid_features)[1])

    def types(self) -> list[tuple[str, int]]:
        """(type, units) of each block. Raises `UserError` for types that do not fit."""
        for name, value in (("mid_features", self.mid_features), ("pointwise", self.pointwise or None)):
            if self.kinds is not None and value is not None:
                raise UserError(f"{name}: found {value} for a network of given block types, expected none")
        return block_units(self.depth, self.width, self.kinds, self.reference_compat)

    def conv_shapes(self) -> list[tuple[int, int]]:
        """Channels in and out of each 3x3 convolution of the blocks."""
        before, found = STEM, []
        for out, mid, _ in zip(*block_features(self.depth, self.width, self.mid_features)):
            found += [(before, mid), (mid, out)] if mid else []
            before = out
        return found

    def param_count(self, channels: int = 3) -> int:
        """Trained numbers in closed form, separable convolutions among them, for images of so many channels.

        Raises:
            UserError: for a size that makes no structured map of some convolution's channels.
        """
        own = (self.classes, channels, self.kinds, self.reference_compat)
        total = param_count(self.depth, self.width, self.mid_features, *own)
        if not self.pointwise:
            return total
        for shape in self.conv_shapes():
            own = layer_params(shape, self.pointwise, self.size, reference_compat=self.reference_compat)
            total += own - 9 * shape[0] * shape[1]
        return total

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in the state dicts of BayesWatch's and xternalz's networks, with `kinds` BlockSwap's.

        Raises:
            UserError: for separable convolutions, whose weights have other forms there.
        """
        if self.pointwise:
            raise UserError(f"pointwise={self.pointwise!r}: weights of PyTorch are those of plain convolutions")
        block, *part = modules
        if not part:
            return {"stem": "conv1", "bn": "bn1", "Dense_0": "fc"}[block]
        number = int(block.removeprefix("block"))
        stage, i = divmod(number, (self.depth - 4) // 6)
        if part[0] == "shortcut":
            part = ["convShortcut"]
        elif self.kinds is not None and self.kinds[number] == "Conv" and part[0].startswith("conv"):
            part = [part[0], "conv"]
        list_of = "" if self.kinds is None else ".0"
        return f"block{stage + 1}{list_of}.layer.{i}.{'.'.join(part)}"

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, *, masks: Sequence[Array | None] | None = None, taps: bool = False
    ) -> Any:
        """Classify images.

        Args:
            x: [N, H, W, C] float.
            train: whether BatchNorm takes the batch's statistics and updates the running ones.
            masks: for each block what its middle activations are multiplied by, [mid] or [N, mid].
            taps: also return the outputs of the three stages.

        Returns:
            Logits [N, classes], or (logits, (stage 1, stage 2, stage 3)).
        """
        if self.kinds is not None and masks is not None:
            raise UserError("masks: found some for a network of given block types, expected none")
        types = self.types()
        outs, mids, strides = block_features(self.depth, self.width, self.mid_features)
        found, last = [], len(outs) // 3
        x = conv(STEM, name="stem")(x)
        each = of_blocks(masks, len(outs), "masks")
        for i, (features, mid, stride, kind, mask) in enumerate(zip(outs, mids, strides, types, each)):
            own = (features, mid, stride, self.variance, self.pointwise, self.size, self.reference_compat, *kind)
            x = Block(*own, name=f"block{i}")(x, train, mask)
            if i % last == last - 1:
                found.append(x)
        x = jax.nn.relu(BatchNorm(self.variance, name="bn")(x, train))
        logits = head(self.classes)(x.mean((1, 2)))
        return (logits, tuple(found)) if taps else logits


def block_features(
    depth: int, width: float, mid_features: Sequence[int] | None = None
) -> tuple[list[int], list[int], list[int]]:
    """(channels out, middle channels, stride) of each block. Raises `UserError` for a depth that is not 6 n + 4, a
    width below 1/16, or middle widths that are negative or not one for each block."""
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"depth={depth}: expected 6 n + 4 with n >= 1, as 10, 16, 22, 28, 40")
    if int(STEM * width) < 1:
        raise UserError(f"width={width}: expected at least 1/16")
    each = (depth - 4) // 6
    outs = [int(STEM * width * 2**stage) for stage in range(3) for _ in range(each)]
    strides = [2 if stage and not i else 1 for stage in range(3) for i in range(each)]
    mids = outs if mid_features is None else list(of_blocks(mid_features, len(outs), "mid_features"))
    if min(mids) < 0:
        raise UserError(f"mid_features: found {min(mids)}, expected 0 or more channels for each block")
    return outs, list(mids), strides


def block_units(
    depth: int, width: float, kinds: Sequence[str] | None = None, reference_compat: bool = False
) -> list[tuple[str, int]]:
    """(type, units) of each block. Raises `UserError` for types that are unknown or not one for each block, or groups
    that do not divide a block's channels."""
    outs, _, _ = block_features(depth, width)
    types = ["Conv"] * len(outs) if kinds is None else list(of_blocks(kinds, len(outs), "block types"))
    before = STEM
    for kind, out in zip(types, outs):
        block_params(kind, before, out)
        before = out
    each = len(outs) // 3
    return [(kind, units_of(types[i // each * each] if reference_compat else kind)) for i, kind in enumerate(types)]


def param_count(
    depth: int,
    width: float,
    mid_features: Sequence[int] | None = None,
    classes: int = 10,
    channels: int = 3,
    kinds: Sequence[str] | None = None,
    reference_compat: bool = False,
) -> int:
    """Trained numbers of a WRN, BatchNorm's running statistics not among them, in closed form.

    Args:
        depth, width, mid_features, classes, kinds, reference_compat: as of `WRN`.
        channels: of the images.
    """
    outs, mids, strides = block_features(depth, width, mid_features)
    types = block_units(depth, width, kinds, reference_compat)
    total, before = 9 * channels * STEM, STEM
    for out, mid, stride, (kind, units) in zip(outs, mids, strides, types):
        if kinds is not None:
            total += block_params(kind, before, out, stride, units)
            before = out
            continue
        changes = before != out or stride != 1
        total += before * out * changes
        if mid or changes:
            total += 2 * before
        total += mid * (9 * before + 2 + 9 * out)
        before = out
    return total + 2 * before + (before + 1) * classes
