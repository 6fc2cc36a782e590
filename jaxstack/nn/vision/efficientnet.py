"""EfficientNet-B0 (Tan and Le, 2019): 5,288,548 parameters with 1,000 classes.

The form "torch" pads all sides alike and has BatchNorm's epsilon 1e-5, as timm's efficientnet_b0; "tf" pads as
TensorFlow's SAME and has 1e-3, as its tf_efficientnet_b0. Names of state dicts are timm's. Nothing is dropped at random
in training.
"""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.conv import Conv
from jaxstack.nn.vision.efficientnet_lite import HEAD, STAGES, STEM
from jaxstack.nn.vision.layers import BatchNorm, Variance, head
from jaxstack.nn.vision.mobilenet_v3 import Form, plain_conv, timm_name

SQUEEZE = 0.25
"""Channels between the two layers of squeeze-and-excitation, over those that the block reads."""


class Block(nn.Module):
    """1x1 expansion (none where `expansion` is 1), depthwise convolution, squeeze-and-excitation, 1x1 projection; the
    input is added where shapes agree."""

    features: int
    kernel: int
    stride: int
    expansion: int
    form: Form = "torch"
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[N, H, W, C] -> [N, H / stride, W / stride, features]."""
        norms = iter(("bn1", "bn2", "bn3"))
        norm = lambda y: _norm(self.form, self.variance, next(norms))(y, train)
        narrow, wide, y = x.shape[-1], x.shape[-1] * self.expansion, x
        if self.expansion > 1:
            y = jax.nn.silu(norm(plain_conv(self.form, wide, name="conv_pw")(y)))
        y = jax.nn.silu(norm(plain_conv(self.form, wide, self.kernel, self.stride, wide, name="conv_dw")(y)))
        squeezed = Conv(max(1, round(SQUEEZE * narrow)), (1, 1), name="se_conv_reduce")
        gate = Conv(wide, (1, 1), name="se_conv_expand")(jax.nn.silu(squeezed(y.mean((1, 2), keepdims=True))))
        name = "conv_pwl" if self.expansion > 1 else "conv_project"
        y = norm(plain_conv(self.form, self.features, name=name)(y * jax.nn.sigmoid(gate)))
        return x + y if x.shape == y.shape else y


def _norm(form: Form, variance: Variance, name: str) -> BatchNorm:
    return BatchNorm(variance, 0.9, 1e-3 if form == "tf" else 1e-5, name=name)


class EfficientNetB0(nn.Module):
    """`classes` 0 gives the 1,280 pooled features instead of logits."""

    classes: int = 1000
    variance: Variance = "torch"
    form: Form = "torch"

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in timm's state dict."""
        return timm_name(modules)

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Classify images.

        Args:
            x: [N, H, W, C], normalised.
            train: use and update the batch's statistics.
            taps: also give what each of the seven stages gives.

        Returns:
            Logits [N, classes], or features [N, 1280].

        Raises:
            UserError: for an unknown form.
        """
        if self.form not in ("tf", "torch"):
            raise UserError(f"form={self.form!r}: expected 'tf' or 'torch'")
        x = plain_conv(self.form, STEM, 3, 2, name="conv_stem")(x)
        x, found = jax.nn.silu(_norm(self.form, self.variance, "bn1")(x, train)), []
        for s, (kernel, stride, expansion, features, count) in enumerate(STAGES):
            for i in range(count):
                shape = (features, kernel, 1 if i else stride, expansion)
                x = Block(*shape, self.form, self.variance, name=f"block{s}_{i}")(x, train)
            found.append(x)
        x = plain_conv(self.form, HEAD, name="conv_head")(x)
        x = jax.nn.silu(_norm(self.form, self.variance, "bn2")(x, train)).mean((1, 2))
        x = head(self.classes)(x) if self.classes else x
        return (x, tuple(found)) if taps else x
