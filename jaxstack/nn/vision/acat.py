"""A residual network for scans of several slices, steered by saliency maps (ACAT: Fontanella et al., ICML 2023).

Slices go through a residual network one by one. With fusion "acat" a second one sees the saliency map of each slice:
after stage l = 1, 2, 3 the maximum over its channels, a 3x3 convolution, BatchNorm and a sigmoid give a mask a_l, and
the image's features become F_l + F_l a_l. Stage 4 has the mask a_4 that a 1x1 convolution makes of a_1 to a_3, pooled
to its size. A weighted mean over slices and a linear layer end it.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError
from jaxstack.nn.torch_weights import from_torch, to_torch
from jaxstack.nn.vision.layers import BatchNorm, conv, head, max_pool, torch_bias, torch_uniform
from jaxstack.nn.vision.resnet import EXPANSION, Block

Fusion = Literal["none", "acat", "image", "smic", "hsm", "concat"]
FUSIONS = ("none", "acat", "image", "smic", "hsm", "concat")
SlicePool = Literal["attention", "mean"]
Stem = Literal["small", "strided", "imagenet"]
STEMS = ("small", "strided", "imagenet")


def adaptive_mean(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b p q c"]:
    """Means over windows that cover the image, as PyTorch's adaptive average pooling: window i of n goes from
    floor(i H / n) to ceil((i + 1) H / n).

    Args:
        x: images.
        size: rows and columns of the result.
    """

    def windows(length: int, count: int) -> np.ndarray:
        at = np.arange(count)[:, None]
        inside = (np.arange(length) >= at * length // count) & (np.arange(length) < -(-(at + 1) * length // count))
        return (inside / inside.sum(1, keepdims=True)).astype(np.float32)

    if x.shape[1:3] == size:
        return x
    return jnp.einsum("ph,bhwc,qw->bpqc", windows(x.shape[1], size[0]), x, windows(x.shape[2], size[1]))


class Trunk(nn.Module):
    """A residual network without a head, whose stem and stages are called one by one."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Of each stage; fewer than four where later stages are not used."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = True
    stem: Stem = "imagenet"
    """small: a 3x3 convolution; strided: with stride 2; imagenet: 7x7 with stride 2 and 3x3 max pooling with stride
    2."""
    stem_width: int = 0
    """Channels of the stem; 0: those of the first stage."""

    def setup(self) -> None:
        large, stride = self.stem == "imagenet", 1 if self.stem == "small" else 2
        self.conv1 = conv(self.stem_width or self.widths[0], 7 if large else 3, stride)
        self.bn1 = BatchNorm()
        for i, (count, width) in enumerate(zip(self.blocks, self.widths)):
            strides = [2 if i else 1] + [1] * (count - 1)
            setattr(self, f"layer{i + 1}", [Block(width, s, self.bottleneck) for s in strides])

    def begin(self, x: Array, train: bool = False) -> Array:
        """The stem: images [N, H, W, C] -> features."""
        x = jax.nn.relu(self.bn1(self.conv1(x), train))
        if self.stem == "imagenet":
            x = max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf), 3, 2)
        return x

    def stage(self, number: int, x: Array, train: bool = False) -> Array:
        """Stage 1 to 4."""
        for block in getattr(self, f"layer{number}"):
            x = block(x, train)
        return x


class SpatialMask(nn.Module):
    """A mask in (0, 1) of features: maximum over channels, 3x3 convolution, BatchNorm, sigmoid."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h w 1"]:
        # the gradient of `max` is NaN where XLA computes x twice and rounds differently; it goes to one channel here
        largest = jax.nn.one_hot(jax.lax.stop_gradient(x).argmax(-1), x.shape[-1], dtype=x.dtype)
        x = conv(1, 3, name="conv")((x * largest).sum(-1, keepdims=True))
        return jax.nn.sigmoid(BatchNorm(name="bn")(x, train))


class SliceAttention(nn.Module):
    """Slices [B, S, C] -> their weighted mean [B, C]; sigmoid weights of all slices' features beside each other."""

    hidden: int = 64
    dropout: float = 0.1
    summed: bool = False
    """As released: the weighted sum, whose scale grows with S."""

    @nn.compact
    def __call__(self, x: Float[Array, "b s c"], train: bool = False) -> Float[Array, "b c"]:
        dense = lambda width, fan_in, name: nn.Dense(
            width, kernel_init=torch_uniform, bias_init=torch_bias(fan_in), name=name
        )
        flat = x.reshape(len(x), -1)
        h = jax.nn.leaky_relu(dense(self.hidden, flat.shape[1], "fcc_0")(flat), 0.01)
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        weights = jax.nn.sigmoid(dense(x.shape[1], self.hidden, "attention_layer")(h))
        out = jnp.einsum("bsc,bs->bc", x, weights)
        return out if self.summed else out / jnp.maximum(weights.sum(1, keepdims=True), 1e-6)


class AcatNet(nn.Module):
    """Scans and their saliency maps [B, S, H, W, 2] -> logits [B, 2]. The defaults are the paper's ResNet-50."""

    fusion: Fusion = "acat"
    """acat: masks of the saliency; image: masks of the image's own features; smic: F_2 + F_2 sigmoid(s_2); hsm:
    F_4 + F_4 relu(s_4), s_l features of the saliency; concat: the saliency beside the image; none: the saliency is not
    looked at."""
    slice_pool: SlicePool | None = None
    """None: attention with acat and image, else mean."""
    mask_stages: tuple[int, ...] = (1, 2, 3)
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    bottleneck: bool = True
    stem: Stem = "imagenet"
    copies: int = 1
    """Of image and of saliency as input channels, 3 as released."""
    hidden: int = 64
    """Units of the slice attention."""
    dropout: float = 0.1
    """Of the slice attention."""
    summed: bool = False
    """See `SliceAttention`."""
    reference_stem: bool = False
    """As released, the saliency's stem is as wide as the image's last stage (a counter of channels that was not set
    back). For weights alone."""

    @property
    def pooling(self) -> SlicePool:
        """How slices are pooled."""
        return self.slice_pool or ("attention" if self.fusion in ("acat", "image") else "mean")

    def setup(self) -> None:
        if self.fusion not in FUSIONS:
            raise UserError(f"fusion={self.fusion!r}: expected one of {', '.join(FUSIONS)}")
        if self.pooling not in ("attention", "mean"):
            raise UserError(f"slice_pool={self.slice_pool!r}: expected 'attention' or 'mean'")
        if not self.mask_stages or list(self.mask_stages) != sorted({*self.mask_stages} & {1, 2, 3}):
            raise UserError(f"mask_stages={self.mask_stages}: expected one or more of 1, 2, 3, in this order")
        self.trunk = Trunk(self.blocks, self.widths, self.bottleneck, self.stem)
        used = {"acat": self.mask_stages[-1], "smic": 2, "hsm": 4}.get(self.fusion, 0)
        if used:
            last = self.widths[-1] * (EXPANSION if self.bottleneck else 1)
            wide = last if self.reference_stem else 0
            self.saliency = Trunk(self.blocks[:used], self.widths[:used], self.bottleneck, self.stem, wide)
        self.used = used
        if self.fusion in ("acat", "image"):
            for i in self.mask_stages:
                setattr(self, f"mask{i}", SpatialMask())
            self.fuse = conv(1, 1)
        if self.pooling == "attention":
            self.slices = SliceAttention(self.hidden, self.dropout, self.summed)
        self.head = head(2)

    def look(self, inputs: Float[Array, "b s h w 2"], train: bool = False) -> tuple[Array, list[Array]]:
        """The last features [B, S, h, w, C], and the masks [B S, h_l, w_l, 1] in the order of the stages."""
        many, count = inputs.shape[:2]
        x = inputs.reshape(many * count, *inputs.shape[2:])
        image, maps = x[..., :1].repeat(self.copies, -1), x[..., 1:].repeat(self.copies, -1)
        if self.fusion == "concat":
            image = jnp.concatenate([image, maps], -1)
        h, s, masks = self.trunk.begin(image, train), None, []
        if self.used:
            s = self.saliency.begin(maps, train)
        for i in range(1, 5):
            h = self.trunk.stage(i, h, train)
            if s is not None and i <= self.used:
                s = self.saliency.stage(i, s, train)
            if self.fusion in ("acat", "image") and i in self.mask_stages:
                masks.append(getattr(self, f"mask{i}")(h if s is None else s, train))
                h = h + h * masks[-1]
            elif self.fusion == "smic" and i == 2 and s is not None:
                h = h + h * jax.nn.sigmoid(s)
            elif self.fusion == "hsm" and i == 4 and s is not None:
                h = h + h * jax.nn.relu(s)
        if masks:
            size = (h.shape[1], h.shape[2])
            h = h + h * self.fuse(jnp.concatenate([adaptive_mean(m, size) for m in masks], -1))
        return h.reshape(many, count, *h.shape[1:]), masks

    def features(self, inputs: Float[Array, "b s h w 2"], train: bool = False) -> Float[Array, "b s p q c"]:
        """The last features of each slice."""
        return self.look(inputs, train)[0]

    def until(self, inputs: Float[Array, "b s h w c"], stage: int) -> Float[Array, "b s p q k"]:
        """Of a plain network the features after a stage, in inference."""
        many, count = inputs.shape[:2]
        h = self.trunk.begin(inputs[..., :1].reshape(many * count, *inputs.shape[2:4], 1).repeat(self.copies, -1))
        for i in range(1, stage + 1):
            h = self.trunk.stage(i, h)
        return h.reshape(many, count, *h.shape[1:])

    def after(self, features: Float[Array, "b s p q k"], stage: int) -> Float[Array, "b 2"]:
        """Logits of a plain network from the features after a stage, in inference."""
        many, count = features.shape[:2]
        h = features.reshape(many * count, *features.shape[2:])
        for i in range(stage + 1, 5):
            h = self.trunk.stage(i, h)
        return self.classify(h.reshape(many, count, *h.shape[1:]))

    def classify(self, features: Float[Array, "b s p q c"], train: bool = False) -> Float[Array, "b 2"]:
        """Features -> logits."""
        x = features.mean((2, 3))
        return self.head(self.slices(x, train) if self.pooling == "attention" else x.mean(1))

    def __call__(self, inputs: Float[Array, "b s h w 2"], train: bool = False) -> Float[Array, "b 2"]:
        """Scans with their saliency maps -> logits."""
        return self.classify(self.features(inputs, train), train)

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """The name of a layer in the released code's state dicts."""
        first, rest = modules[0], modules[1:]
        if first in ("trunk", "saliency"):
            parts = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
            top, _, block = rest[0].partition("_")
            tail = "".join(f".{x}" for x in (block, *(parts.get(m, m) for m in rest[1:])) if x)
            return top + ("_s" if first == "saliency" else "") + tail
        if first.startswith("mask"):
            return f"att_{first[-1]}.att_conv.{rest[0]}"
        names = {"slices": "slice_attention.layer_dict", "fuse": "fusion", "head": "fc"}
        return ".".join((names[first], *rest))


def from_released(net: AcatNet, variables: Any, weights: Mapping[str, np.ndarray], source: str = "weights") -> Any:
    """Variables from a state dict of the released class, which has layers that its forward pass does not use.

    Args:
        net: the network, with `reference_stem` where the saliency has a branch.
        variables: of the network, arrays or their shapes.
        weights: the state dict.
        source: what errors call it.

    Raises:
        UserError: as `from_torch`.
    """
    flat = jax.tree.map(lambda x: np.broadcast_to(np.float32(0.0), x.shape), variables)
    used = {name.split(".")[0] for name in to_torch(net, flat)}
    unused = lambda top: (
        top not in used and (top.endswith("_s") or top in ("att_1", "att_2", "att_3", "fusion", "slice_attention"))
    )
    kept = {k: v for k, v in weights.items() if not unused(k.split(".")[0])}
    return from_torch(net, kept, variables, source)


def started_from(net: Any, plain: Any) -> Any:
    """Variables of a network whose image branch and head are those of a trained one with fusion "none".

    Args:
        net: fresh variables.
        plain: variables of the plain network. Of "concat" the first channels of the stem are its own.
    """

    def leaf(fresh: Array, old: Array) -> Array:
        if fresh.shape == old.shape:
            return old
        return fresh.at[:, :, : old.shape[2]].set(old)

    shared = lambda c: {k: jax.tree.map(leaf, v, plain[c][k]) if k in plain[c] else v for k, v in net[c].items()}
    return {c: shared(c) for c in net}


def grad_cam(
    net: AcatNet, variables: Any, inputs: Float[Array, "b s h w c"], target: int = 1, stage: int = 4
) -> Float[Array, "b s h w"]:
    """Grad-CAM (Selvaraju et al., 2017) of each slice, in 0..1 of each scan.

    It is relu of the features' sum over channels, each weighted by the mean over pixels of the gradient of one class's
    logit; resized bilinearly.

    Args:
        net: a plain network, fusion "none".
        variables: of the network.
        inputs: scans.
        target: the class.
        stage: whose features, 1 to 4.

    Raises:
        UserError: for another fusion or stage.
    """
    if net.fusion != "none" or stage not in (1, 2, 3, 4):
        raise UserError(f"fusion={net.fusion!r}, stage={stage}: expected 'none' and 1 to 4")
    features: Any = net.apply(variables, inputs, stage, method="until")
    logit = lambda f: net.apply(variables, f, stage, method="after")[:, target].sum()  # pyright: ignore
    weights = jax.grad(logit)(features).mean((2, 3), keepdims=True)
    found = jax.nn.relu((weights * features).sum(-1))
    found = jax.image.resize(found, (*found.shape[:2], *inputs.shape[2:4]), "bilinear")
    most = found.max((1, 2, 3), keepdims=True)
    return found / jnp.where(most > 0, most, 1.0)
