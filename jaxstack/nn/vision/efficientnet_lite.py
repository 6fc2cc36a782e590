"""EfficientNet-Lite0 (Tan and Le, 2019; no squeeze-and-excitation, ReLU6): 4,652,008 parameters with 1,000 classes.

Padding is TensorFlow's SAME and BatchNorm's epsilon 1e-3, as its public weights need. Images are (x - 0.5) / 0.5.
"""

import flax.linen as nn
from jax import lax
from jaxtyping import Array

from jaxstack.nn.conv import Conv
from jaxstack.nn.vision.layers import BatchNorm, Variance, fan_out_normal, head

STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""(kernel, stride of the first block, expansion, channels, blocks)."""
STEM, HEAD = 32, 1280
NAMES = {
    "stem": "_conv_stem",
    "head": "_conv_head",
    "expand": "_expand_conv",
    "depthwise": "_depthwise_conv",
    "project": "_project_conv",
    "Dense_0": "_fc",
}


def _conv(features: int, size: int, stride: int = 1, groups: int = 1, name: str | None = None) -> Conv:
    return Conv(
        features, (size, size), stride, "SAME", groups=groups, use_bias=False, kernel_init=fan_out_normal, name=name
    )


def _relu6(x: Array) -> Array:
    return lax.clamp(0.0, x, 6.0)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; the input is added where shapes agree."""

    features: int
    kernel: int = 3
    stride: int = 1
    expansion: int = 6
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[N, H, W, C] -> [N, H / stride, W / stride, features]."""
        norm = lambda name: BatchNorm(self.variance, 0.99, 1e-3, name=name)
        wide, y = x.shape[-1] * self.expansion, x
        if self.expansion > 1:
            y = _relu6(norm("bn0")(_conv(wide, 1, name="expand")(y), train))
        y = _relu6(norm("bn1")(_conv(wide, self.kernel, self.stride, wide, name="depthwise")(y), train))
        y = norm("bn2")(_conv(self.features, 1, name="project")(y), train)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """`classes` 0 gives the 1,280 pooled features instead of logits."""

    classes: int = 1000
    variance: Variance = "torch"

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in the public state dict."""
        return ".".join(f"_blocks.{m[5:]}" if m.startswith("block") else NAMES.get(m, f"_{m}") for m in modules)

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Array | tuple[Array, tuple[Array, ...]]:
        """Classify images.

        Args:
            x: [N, H, W, 3], normalised.
            train: use and update the batch's statistics.
            taps: also give what each of the seven stages gives.

        Returns:
            Logits [N, classes], or features [N, 1280].
        """
        norm = lambda name: BatchNorm(self.variance, 0.99, 1e-3, name=name)
        x = _relu6(norm("bn0")(_conv(STEM, 3, 2, name="stem")(x), train))
        stages, number = [], 0
        for kernel, stride, expansion, features, count in STAGES:
            for i in range(count):
                block = InvertedResidual(
                    features, kernel, 1 if i else stride, expansion, self.variance, name=f"block{number}"
                )
                x, number = block(x, train), number + 1
            stages.append(x)
        x = _relu6(norm("bn1")(_conv(HEAD, 1, name="head")(x), train)).mean((1, 2))
        if self.classes:
            x = head(self.classes)(x)
        return (x, tuple(stages)) if taps else x
