"""MobileNetV3-large (Howard et al., 2019): 5,483,032 parameters with 1,000 classes.

The form "tf" pads as TensorFlow's SAME and has BatchNorm's epsilon 1e-3, as timm's tf_mobilenetv3_large_100; "torch"
pads all sides alike and has 1e-5, as its mobilenetv3_large_100. Names of state dicts are timm's.
"""

import re
from typing import Any, Literal

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.conv import Conv
from jaxstack.nn.vision.layers import BatchNorm, Variance, fan_out_normal, head

Form = Literal["tf", "torch"]
STEM, LAST, HEAD = 16, 960, 1280
STAGES = (
    ((3, 1, 1.0, 16),),
    ((3, 2, 4.0, 24), (3, 1, 3.0, 24)),
    ((5, 2, 3.0, 40), (5, 1, 3.0, 40), (5, 1, 3.0, 40)),
    ((3, 2, 6.0, 80), (3, 1, 2.5, 80), (3, 1, 2.3, 80), (3, 1, 2.3, 80)),
    ((3, 1, 6.0, 112), (3, 1, 6.0, 112)),
    ((5, 2, 6.0, 160), (5, 1, 6.0, 160), (5, 1, 6.0, 160)),
)
"""Blocks (kernel, stride, expansion, channels) of the stages before the last 1x1 convolution."""
SQUEEZED = (2, 4, 5)
"""Stages with squeeze-and-excitation."""
HARD_SWISH = (3, 4, 5)
"""Stages with hard swish; the others have ReLU."""
TAPS = (0, 1, 2, 4)
"""Stages whose outputs are the last at their resolution: 1/2, 1/4, 1/8, 1/16; the last convolution's is at 1/32."""
_depthwise_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def divisible(channels: float) -> int:
    """The multiple of eight that is nearest, at least 8 and not below nine tenths of `channels`."""
    found = max(8, int(channels + 4) // 8 * 8)
    return found + 8 if found < 0.9 * channels else found


def hard_sigmoid(x: Array) -> Array:
    """min(max(x + 3, 0), 6) / 6."""
    return jax.lax.clamp(0.0, x + 3.0, 6.0) / 6.0


def hard_swish(x: Array) -> Array:
    """x min(max(x + 3, 0), 6) / 6."""
    return x * hard_sigmoid(x)


def _norm(form: Form, variance: Variance, name: str) -> BatchNorm:
    return BatchNorm(variance, 0.9, 1e-3 if form == "tf" else 1e-5, name=name)


def plain_conv(form: Form, features: int, size: int = 1, stride: int = 1, groups: int = 1, name: str = "") -> Conv:
    """A convolution without bias, padded as its form says: "tf" as TensorFlow's SAME, "torch" alike on all sides."""
    padding = "SAME" if form == "tf" else size // 2
    start = _depthwise_normal if groups > 1 else fan_out_normal
    return Conv(features, (size, size), stride, padding, groups=groups, use_bias=False, kernel_init=start, name=name)


def timm_name(modules: tuple[str, ...]) -> str:
    """The name of a layer of `MobileNetV3` in timm's state dict."""
    names = {"Dense_0": "classifier", "conv_project": "conv_pw", "last": "blocks.6.0.conv", "last_bn": "blocks.6.0.bn1"}
    rename = lambda m: names.get(m) or re.sub(r"^block(\d)_(\d)$", r"blocks.\1.\2", m).replace("se_conv", "se.conv")
    return ".".join(map(rename, modules))


class Block(nn.Module):
    """1x1 expansion (none where `expansion` is 1), depthwise convolution, squeeze-and-excitation, 1x1 projection; the
    input is added where shapes agree."""

    features: int
    kernel: int
    stride: int
    expansion: float
    squeezed: bool
    swish: bool
    form: Form = "tf"
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[N, H, W, C] -> [N, H / stride, W / stride, features]."""
        act = hard_swish if self.swish else jax.nn.relu
        norms = iter(("bn1", "bn2", "bn3"))
        norm = lambda y: _norm(self.form, self.variance, next(norms))(y, train)
        wide, y = divisible(x.shape[-1] * self.expansion), x
        if self.expansion > 1:
            y = act(norm(plain_conv(self.form, wide, name="conv_pw")(y)))
        else:
            wide = x.shape[-1]
        y = act(norm(plain_conv(self.form, wide, self.kernel, self.stride, wide, name="conv_dw")(y)))
        if self.squeezed:
            gate = jax.nn.relu(
                Conv(divisible(wide * 0.25), (1, 1), name="se_conv_reduce")(y.mean((1, 2), keepdims=True))
            )
            y = y * hard_sigmoid(Conv(wide, (1, 1), name="se_conv_expand")(gate))
        y = norm(plain_conv(self.form, self.features, name="conv_pwl" if self.expansion > 1 else "conv_project")(y))
        return x + y if x.shape == y.shape else y


class MobileNetV3(nn.Module):
    """`classes` 0 ends after the last convolution over pixels and gives what it gives."""

    classes: int = 1000
    variance: Variance = "torch"
    width: float = 1.0
    """Times the channels of all layers but the head, each rounded to a multiple of eight."""
    form: Form = "tf"
    most_blocks: int | None = None
    """At most so many blocks of each stage, the first ones; None: all."""

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in timm's state dict."""
        return timm_name(modules)

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Classify images.

        Args:
            x: [N, H, W, C], normalised.
            train: use and update the batch's statistics.
            taps: also give the last outputs at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution.

        Returns:
            Logits [N, classes], or the last convolution's output [N, H / 32, W / 32, 960 width].

        Raises:
            UserError: for a width that is not positive, or an unknown form.
        """
        if self.width <= 0 or self.form not in ("tf", "torch"):
            raise UserError(f"width={self.width}, form={self.form!r}: expected a positive width, and 'tf' or 'torch'")
        channels = lambda c: divisible(c * self.width)
        x = plain_conv(self.form, channels(STEM), 3, 2, name="conv_stem")(x)
        x = hard_swish(_norm(self.form, self.variance, "bn1")(x, train))
        found = []
        for s, stage in enumerate(STAGES):
            for i, (kernel, stride, expansion, features) in enumerate(stage[: self.most_blocks]):
                shape = (channels(features), kernel, stride, expansion, s in SQUEEZED, s in HARD_SWISH)
                x = Block(*shape, self.form, self.variance, name=f"block{s}_{i}")(x, train)
            if s in TAPS:
                found.append(x)
        x = plain_conv(self.form, channels(LAST), name="last")(x)
        x = hard_swish(_norm(self.form, self.variance, "last_bn")(x, train))
        found.append(x)
        if self.classes:
            x = hard_swish(Conv(HEAD, (1, 1), name="conv_head")(x.mean((1, 2), keepdims=True)))
            x = head(self.classes)(x[:, 0, 0])
        return (x, tuple(found)) if taps else x
