"""DenseNet-121 (Huang et al., 2017), as torchvision's and timm's: 6,953,856 parameters without the classifier."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.nn.conv import Conv
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv, torch_uniform

BLOCKS, GROWTH, STEM = (6, 12, 24, 16), 32, 64


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 to four times the growth, BN, ReLU, 3x3: its output stands behind the input, [old, new]."""

    growth: int = GROWTH
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[N, H, W, C] -> [N, H, W, C + growth]."""
        y = jax.nn.relu(BatchNorm(self.variance, name="norm1")(x, train))
        y = conv(4 * self.growth, 1, name="conv1")(y)
        y = jax.nn.relu(BatchNorm(self.variance, name="norm2")(y, train))
        return jnp.concatenate([x, conv(self.growth, 3, name="conv2")(y)], -1)


class DenseNet121(nn.Module):
    """`classes` 0 gives the 1,024 pooled features, which are never negative, instead of logits."""

    classes: int = 1000
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Images [N, H, W, 3] -> logits [N, classes], or features [N, 1024]."""
        norm = lambda name: BatchNorm(self.variance, name=name)
        x = Conv(STEM, (7, 7), 2, 3, use_bias=False, name="conv0")(x)
        x = jax.nn.relu(norm("norm0")(x, train))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        x = nn.max_pool(padded, (3, 3), (2, 2))
        for b, count in enumerate(BLOCKS, 1):
            for i in range(1, count + 1):
                x = DenseLayer(GROWTH, self.variance, name=f"denseblock{b}_denselayer{i}")(x, train)
            if b < len(BLOCKS):
                x = jax.nn.relu(norm(f"transition{b}_norm")(x, train))
                x = conv(x.shape[-1] // 2, 1, name=f"transition{b}_conv")(x)
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = jax.nn.relu(norm("norm5")(x, train)).mean((1, 2))
        return nn.Dense(self.classes, kernel_init=torch_uniform, name="classifier")(x) if self.classes else x


def torch_name(modules: tuple[str, ...]) -> str:
    """The name of a module in torchvision's state dict, without its last part."""
    path = ".".join(m.replace("_", ".") for m in modules)
    return path if path == "classifier" else f"features.{path}"
