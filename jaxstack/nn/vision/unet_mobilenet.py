"""A U-Net on MobileNetV3-large, as segmentation-models-pytorch's: 6,685,537 parameters with one input and one output.

The encoder is timm's tf_mobilenetv3_large_100, padded as TensorFlow and with BatchNorm's epsilon 1e-3; the decoder pads
all sides alike and has 1e-5. A block of the decoder doubles the pixels (nearest), joins the encoder's output of that
resolution, where there is one, and is twice conv3x3, BatchNorm, ReLU.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv, torch_bias
from jaxstack.nn.vision.mobilenet_v3 import Form, MobileNetV3, timm_name

DECODER = (256, 128, 64, 32, 16)
_small = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


class Up(nn.Module):
    """[N, H, W, C] and a skip [N, 2 H, 2 W, D] or None -> [N, 2 H, 2 W, features]."""

    features: int
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, skip: Array | None, train: bool = False) -> Array:
        x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        x = x if skip is None else jnp.concatenate([x, skip], -1)
        for name in ("conv1", "conv2"):
            x = conv(self.features, name=f"{name}_0")(x)
            x = jax.nn.relu(BatchNorm(self.variance, name=f"{name}_1")(x, train))
        return x


class UNetMobileNetV3(nn.Module):
    """Logits for each pixel."""

    outputs: int = 1
    width: float = 1.0
    """Of the encoder, see `MobileNetV3`."""
    decoder: tuple[int, ...] = DECODER
    """Channels of its five blocks."""
    most_blocks: int | None = None
    """Of each stage of the encoder, see `MobileNetV3`."""
    form: Form = "tf"
    """Of the encoder."""
    variance: Variance = "torch"

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in segmentation-models-pytorch's state dict."""
        if modules[0] == "encoder":
            return f"encoder.model.{timm_name(modules[1:])}"
        if modules[0] == "head":
            return "segmentation_head.0"
        block, part = modules
        return f"decoder.blocks.{block[2:]}.{part.replace('_', '.')}"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w k"]:
        """Logits of images.

        Args:
            x: [N, H, W, C], normalised; H and W are multiples of 32.
            train: use and update the batch's statistics.

        Raises:
            UserError: for another number of rows or columns, or of blocks.
        """
        if x.shape[1] % 32 or x.shape[2] % 32:
            raise UserError(f"unet: found images of {x.shape[1]}x{x.shape[2]} pixels, expected multiples of 32")
        if len(self.decoder) != 5 or min(self.decoder) < 1:
            raise UserError(f"decoder={self.decoder}: expected five numbers of channels")
        _, found = MobileNetV3(0, self.variance, self.width, self.form, self.most_blocks, name="encoder")(
            x, train, taps=True
        )
        x, skips = found[-1], (*found[-2::-1], None)
        for i, (features, skip) in enumerate(zip(self.decoder, skips)):
            x = Up(features, self.variance, name=f"up{i}")(x, skip, train)
        bias = torch_bias(9 * x.shape[-1])
        return conv(self.outputs, name="head", use_bias=True, kernel_init=_small, bias_init=bias)(x)


def fresh(net: UNetMobileNetV3, key: Array, channels: int = 1) -> Any:
    """Variables of the network with He's normal kernels, all of them from one draw.

    The same distributions as `net.init` (of the head: normal, not uniform), whose hundred draws take half a minute to
    compile.

    Args:
        net: the network.
        key: of the draw.
        channels: of the images.
    """
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, channels)))
    flat: dict[Any, Any] = flatten_dict(shapes)  # pyright: ignore[reportAssignmentType]
    sizes = {path: math.prod(x.shape) for path, x in flat.items() if path[-1] == "kernel"}
    draws, at, out = jax.random.normal(key, (sum(sizes.values()),)), 0, {}
    for path, x in flat.items():
        if path[-1] == "kernel":
            rows, columns, _, features = x.shape
            fan = rows * columns * (1 if path[-2] == "conv_dw" else features)
            gain = 2.0 / (fan + math.prod(x.shape[:3])) if path[-2] == "head" else 2.0 / fan
            out[path] = gain**0.5 * draws[at : at + sizes[path]].reshape(x.shape)
            at += sizes[path]
        else:
            out[path] = (jnp.ones if path[-1] in ("scale", "var") else jnp.zeros)(x.shape, x.dtype)
    return unflatten_dict(out)
