"""DenseNet-BC (Huang et al., 2017) with a middle width for each layer: 769,162 parameters at depth 100, growth 12.

Three stages of (depth - 4) / 6 layers; a layer is BN-ReLU-conv1x1 to its middle width (4 k), BN-ReLU-mask, conv3x3 to k
channels, which are joined to its input. Between stages BN-ReLU-conv1x1 halves the channels and 2x2 means the pixels.
Layers are named block0, block1, ..., and their parts as those of `WRN`, so what prunes one prunes the other.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.layers import BatchNorm, Variance, conv, head, masked, max_pool, mean_pool, of_blocks

BOTTLENECK = 4
"""Middle channels of a layer over its growth."""


class Layer(nn.Module):
    """What a dense layer adds to its input: [N, H, W, C] -> [N, H, W, growth]; zeros without middle channels."""

    growth: int
    mid: int
    variance: Variance = "torch"

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        if not self.mid:
            return jnp.zeros((*x.shape[:3], self.growth), x.dtype)
        h = conv(self.mid, 1, name="conv1")(jax.nn.relu(BatchNorm(self.variance, name="bn1")(x, train)))
        h = masked(jax.nn.relu(BatchNorm(self.variance, name="bn2")(h, train)), mask)
        return conv(self.growth, name="conv2")(h)


class DenseNet(nn.Module):
    """DenseNet-BC for small images."""

    depth: int = 100
    growth: int = 12
    classes: int = 10
    mid_features: tuple[int, ...] | None = None
    """Middle channels of each layer, 0 or more; default: four times the growth."""
    variance: Variance = "torch"

    def middle(self) -> tuple[int, ...]:
        """Middle channels of each layer. Raises `UserError` for a depth that is not 6 n + 4, no growth, or middle
        widths that are negative or not one for each layer."""
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UserError(f"depth={self.depth}: expected 6 n + 4 with n >= 1, as 40 or 100")
        if self.growth < 1:
            raise UserError(f"growth={self.growth}: expected at least 1")
        count = (self.depth - 4) // 2
        default = [BOTTLENECK * self.growth] * count
        mids = default if self.mid_features is None else list(of_blocks(self.mid_features, count, "mid_features"))
        if min(mids) < 0:
            raise UserError(f"mid_features: found {min(mids)}, expected 0 or more channels for each layer")
        return tuple(mids)

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in the state dicts of the common DenseNet-BC for CIFAR-10, as BayesWatch's: conv1,
        dense1.0.bn1, trans1.conv1, bn1, fc."""
        block, *part = modules
        if part:
            stage, i = divmod(int(block.removeprefix("block")), (self.depth - 4) // 6)
            return f"dense{stage + 1}.{i}.{part[0]}"
        if block.startswith("transition"):
            number, kind = block.removeprefix("transition").split("_")
            return f"trans{number}.{kind}1"
        return {"stem": "conv1", "bn": "bn1", "Dense_0": "fc"}[block]

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, *, masks: Sequence[Array | None] | None = None, taps: bool = False
    ) -> Any:
        """Classify images; arguments as of `WRN`, taps are the outputs of the three stages."""
        mids, found = self.middle(), []
        each = of_blocks(masks, len(mids), "masks")
        x = conv(2 * self.growth, name="stem")(x)
        last = len(mids) // 3
        for i, (mid, mask) in enumerate(zip(mids, each)):
            layer = Layer(self.growth, mid, self.variance, name=f"block{i}")
            x = jnp.concatenate([x, layer(x, train, mask)], -1)
            if i % last < last - 1:
                continue
            found.append(x)
            if len(found) < 3:
                active = jax.nn.relu(BatchNorm(self.variance, name=f"transition{len(found)}_bn")(x, train))
                x = mean_pool(conv(x.shape[-1] // 2, 1, name=f"transition{len(found)}_conv")(active))
        x = jax.nn.relu(BatchNorm(self.variance, name="bn")(x, train))
        logits = head(self.classes)(x.mean((1, 2)))
        return (logits, tuple(found)) if taps else logits


class DenseNet121(nn.Module):
    """DenseNet-121 for photographs, as torchvision's and timm's: 6,953,856 parameters without the classifier.

    `classes` 0 gives the 1,024 pooled features, which are never negative, instead of logits.
    """

    classes: int = 1000
    variance: Variance = "torch"

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in torchvision's and timm's state dicts."""
        if modules == ("Dense_0",):
            return "classifier"
        return ".".join(("features", *(m.replace("_", ".").replace("bn", "norm") for m in modules)))

    @nn.compact
    def __call__(self, x: Array, train: bool = False, *, taps: bool = False) -> Any:
        """Images [N, H, W, C] float -> logits [N, classes], or (logits, outputs of the four stages)."""
        norm = lambda name: BatchNorm(self.variance, name=name)
        growth, stages = 32, []
        x = jax.nn.relu(norm("bn0")(conv(64, 7, 2, name="conv0")(x), train))
        x = max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf), 3, 2)
        for stage, count in enumerate((6, 12, 24, 16), 1):
            for i in range(1, count + 1):
                name = f"denseblock{stage}_denselayer{i}"
                x = jnp.concatenate([x, Layer(growth, BOTTLENECK * growth, self.variance, name=name)(x, train)], -1)
            stages.append(x)
            if stage < 4:
                x = jax.nn.relu(norm(f"transition{stage}_bn")(x, train))
                x = mean_pool(conv(x.shape[-1] // 2, 1, name=f"transition{stage}_conv")(x))
        x = jax.nn.relu(norm("bn5")(x, train)).mean((1, 2))
        x = head(self.classes)(x) if self.classes else x
        return (x, tuple(stages)) if taps else x
