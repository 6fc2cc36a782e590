"""LeNet-5 with ReLUs and max pooling (LeCun et al., 1998): 62,006 parameters for 32x32 images of three channels."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.conv import Conv
from jaxstack.nn.vision.layers import max_pool, torch_bias, torch_uniform


class LeNet(nn.Module):
    """Two 5x5 convolutions with 6 and 16 channels, each with ReLU and 2x2 max pooling, then layers of 120 and 84.

    Images are flattened with the channels first, as PyTorch does, so that its weights need no other order.
    """

    classes: int = 10
    image: int = 32
    """Pixels on a side of what the first convolution sees: smaller images get zeros around."""

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in a state dict: conv1, conv2, fc1, fc2, fc3."""
        return ".".join(modules)

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, (conv1, conv2)) after the ReLUs."""
        if self.image < 16:
            raise UserError(f"image={self.image}: expected at least 16 pixels, which two 5x5 convolutions leave one of")
        if max(x.shape[1:3]) > self.image:
            raise UserError(f"x: found images of {x.shape[1]}x{x.shape[2]}, expected at most image={self.image}")
        lack = [self.image - side for side in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in lack), (0, 0)))
        found = []
        for i, features in enumerate((6, 16), 1):
            bias = torch_bias(25 * x.shape[-1])
            layer = Conv(features, (5, 5), padding=0, kernel_init=torch_uniform, bias_init=bias, name=f"conv{i}")
            found.append(jax.nn.relu(layer(x)))
            x = max_pool(found[-1])
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(len(x), -1)
        for i, features in enumerate((120, 84, self.classes), 1):
            bias = torch_bias(x.shape[-1])
            x = nn.Dense(features, kernel_init=torch_uniform, bias_init=bias, name=f"fc{i}")(x)
            x = x if i == 3 else jax.nn.relu(x)
        return (x, tuple(found)) if taps else x
