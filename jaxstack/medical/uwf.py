"""Several diseases in ultra-widefield images (Engelmann et al., 2022): one network, eight labels, its training recipe.

A ResNet-34 of two channels (red and green of images aligned as left eyes) with a small head, BCE on smoothed labels,
mixup of a batch with its reverse, a fixed order of augmentations, SGD with warm restarts, and an average of weights and
statistics that is what is used. Not a medical device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_unit
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.augment import blurred, erased, mixup
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.medical.explain import Parts
from jaxstack.medical.phantoms_uwf import LABELS
from jaxstack.medical.uwf_data import Eyes, phantom_eyes, read_folder
from jaxstack.nn.optimisers import Schedule
from jaxstack.nn.supervised import Optimiser, State, linen, supervised, variables
from jaxstack.nn.torch_weights import from_torch, read_weights
from jaxstack.nn.vision.resnet import ResNet

RELEASED_SIZE = (384, 512)
RELEASED_MOMENTS = ((0.22578795, 0.23797078), (0.14651306, 0.11282759))
"""Means and deviations of red and green over the training images."""
RELEASED_LOGITS = (-2.7877, -2.8305, -2.9748, -2.2224, -3.2804, -2.4505, 1.1078, 1.3486)
"""What the released network gives for normalised zeros."""
Moments = tuple[tuple[float, ...], tuple[float, ...]]


class Head(nn.Module):
    """Mean over pixels, Dropout, Linear, PReLU with a slope for each channel, Dropout, Linear."""

    hidden: int = 128
    labels: int = len(LABELS)
    dropout: tuple[float, float] = (0.1, 0.5)

    @nn.compact
    def __call__(self, maps: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b l"]:
        drop = lambda rate, x: nn.Dropout(rate, deterministic=not train)(x)
        x = nn.Dense(self.hidden, name="fc_1")(drop(self.dropout[0], maps.mean((1, 2))))
        x = Slopes(name="fc_2")(x)
        return nn.Dense(self.labels, name="fc_4")(drop(self.dropout[1], x))


class Slopes(nn.Module):
    """PReLU (He et al., 2015) with a slope for each channel, 0.25 at first; slopes decay as other parameters do."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("scale", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x >= 0, x, slope * x)


class Network(nn.Module):
    """ResNet and head. With ResNet-34 and two channels it has 21,348,360 parameters."""

    backbone: ResNet
    hidden: int = 128
    dropout: tuple[float, float] = (0.1, 0.5)
    moments: Callable[[], Moments] = lambda: RELEASED_MOMENTS
    """Means and deviations of the pixels, asked for when variables are made: they are stored with the model."""

    def setup(self) -> None:
        self.top = Head(self.hidden, len(LABELS), self.dropout)
        self.mean = self.variable("pixels", "mean", lambda: jnp.asarray(self.moments()[0], jnp.float32))
        self.std = self.variable("pixels", "std", lambda: jnp.asarray(self.moments()[1], jnp.float32))

    def features(self, x: Float[Array, "b h w 2"], train: bool = False) -> Float[Array, "b i j c"]:
        """Normalised images -> maps of the last stage."""
        return self.backbone(x, train)

    def head(self, maps: Float[Array, "b i j c"], train: bool = False) -> Float[Array, "b 8"]:
        """Maps -> logits."""
        return self.top(maps, train)

    def __call__(self, x: Float[Array, "b h w 2"], train: bool = False) -> Float[Array, "b 8"]:
        """Normalised images -> logits."""
        return self.head(self.features(x, train), train)

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """Names of timm's ResNet whose `fc` is the head."""
        return self.backbone.torch_name(modules[1:])


def resnet_34() -> Network:
    """The paper's network."""
    return Network(ResNet(34, 0, "imagenet"))


@lru_cache(16)
def parts_of(network: Any) -> Parts:
    """The network cut at its last stage, of normalised images, for `medical.explain`."""

    def call(name: str) -> Any:
        return lambda given, x: network.apply(given, x, method=name)

    return Parts(call("features"), call("head"))


def load_weights(path: str | Path) -> tuple[Network, Any]:
    """ResNet-34 with the weights of a state dict (.pt, .pth, .safetensors, .npz), as timm's with the head as `fc`.

    Raises:
        UserError: for a broken file, or other names or shapes: the first ones that differ are listed.
    """
    weights = read_weights(path)
    for prefix in ("module.", "model."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): x for name, x in weights.items()}
    network = resnet_34()
    shapes = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, 64, 64, 2))), jax.random.key(0))
    pixels = {"mean": jnp.asarray(RELEASED_MOMENTS[0]), "std": jnp.asarray(RELEASED_MOMENTS[1])}
    shapes = {name: tree for name, tree in shapes.items() if name != "pixels"}
    found = from_torch(network, weights, shapes, str(path))
    return network, jax.tree.map(jnp.asarray, dict(found)) | {"pixels": pixels}


def two_channels(kernel: np.ndarray) -> np.ndarray:
    """A first convolution of RGB [R, S, 3, K] for red and green alone: two of the three, times 3/2 (timm's rule)."""
    return kernel[:, :, :2] * 1.5


def normalise(images: Any, moments: Moments) -> Any:
    """Images [..., 2] in 0..1 less the means, over the deviations."""
    return (images - np.asarray(moments[0], np.float32)) / np.asarray(moments[1], np.float32)


# the recipe


def smooth_labels(labels: Any, low: Any = 0.05, high: Any = 0.01) -> Array:
    """Asymmetric smoothing: y (1 - (low + high)) + low, so that 0 becomes low and 1 becomes 1 - high."""
    return jnp.asarray(labels, jnp.float32) * (1.0 - (low + high)) + low


def moved(
    image: Float[Array, "h w c"], angle: Any, scale: Any, shear: Any, mirror: tuple[Any, Any] = (1.0, 1.0)
) -> Float[Array, "h w c"]:
    """An image turned by `angle`, scaled and sheared along the rows (radians) about its middle, then mirrored.

    Bilinear; zeros come in.

    Args:
        image: any.
        angle: radians, clockwise as rows count downwards.
        scale: above 1 enlarges.
        shear: radians.
        mirror: -1 turns rows or columns around.
    """
    height, width, channels = image.shape
    # a product that changes nothing: XLA would compute what precedes a gather anew at each of the neighbours
    image = jnp.matmul(image, jnp.eye(channels), precision="highest")
    middle = jnp.array([(height - 1) / 2, (width - 1) / 2])
    c, s, t = jnp.cos(angle), jnp.sin(angle), jnp.tan(shear)
    # (x, y) -> scale R(angle) [[1, tan], [0, 1]] (x, y); back by the inverse
    y, x = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in (height, width)), indexing="ij")
    dy, dx = mirror[0] * (y - middle[0]) / scale, mirror[1] * (x - middle[1]) / scale
    from_y = c * dy - s * dx
    from_x = c * dx + s * dy - t * from_y
    at = [from_y + middle[0], from_x + middle[1]]
    one = lambda channel: jax.scipy.ndimage.map_coordinates(channel, at, 1)
    return jax.vmap(one, in_axes=-1, out_axes=-1)(image)


def augmented(key: Key, image: Float[Array, "h w c"], mean: Any, std: Any) -> Float[Array, "h w c"]:
    """A training image, normalised, after the released augmentations in their order.

    With chance .9: a box erased (chance .3, before the image is normalised), then a turn of up to 15 degrees, scale .8
    to 1.2, shear up to 10 degrees. Normalised. Flipped left to right (.3) and upside down (.1). With chance .9: blur of
    sigma .1 to 1 pixels of an image of 512 columns, each channel times .75 to 1.25, noise of deviation .1.

    Args:
        key: of what happens.
        image: in 0..1.
        mean: of the pixels, [C].
        std: their deviations.
    """
    k = iter(jax.random.split(key, 14))
    chance = lambda p: jax.random.bernoulli(next(k), p)
    uniform = lambda low, high, shape=(): jax.random.uniform(next(k), shape, minval=low, maxval=high)
    turn, some = np.deg2rad([15.0, 10.0]), chance(0.9)
    x = jnp.where(some & chance(0.3), erased(next(k), image), image)
    angle, scale, shear = uniform(-turn[0], turn[0]), uniform(0.8, 1.2), uniform(-turn[1], turn[1])
    # flips commute with normalising, so that one interpolation does both
    mirror = (1.0 - 2.0 * chance(0.1), 1.0 - 2.0 * chance(0.3))
    x = moved(x, jnp.where(some, angle, 0.0), jnp.where(some, scale, 1.0), jnp.where(some, shear, 0.0), mirror)
    x = (x - mean) / std
    worse = blurred(x, uniform(0.1, 1.0) * image.shape[1] / RELEASED_SIZE[1]) * uniform(0.75, 1.25, x.shape[-1:])
    worse += 0.1 * jax.random.normal(next(k), x.shape)
    return jnp.where(chance(0.9), worse, x)


class Recipe(NamedTuple):
    """Numbers of the recipe; all may be traced."""

    alpha: Any = 0.6
    """Of mixup; 0: none."""
    low: Any = 0.05
    """What smoothing makes of an absent label."""
    high: Any = 0.01
    """What smoothing takes from a present one."""


def training_batch(
    key: Key, images: Array, labels: Array, moments: Moments, recipe: Recipe, augment: bool = True
) -> tuple[Array, Array]:
    """What the network learns from: images [B, H, W, 2] in 0..1 and labels [B, 8] -> normalised images and soft
    targets."""
    k_augment, k_mix = jax.random.split(key)
    mean, std = (jnp.asarray(m, jnp.float32) for m in moments)
    if augment:
        keys = jax.random.split(k_augment, len(images))
        x = jax.vmap(augmented, in_axes=(0, 0, None, None))(keys, images, mean, std)
    else:
        x = (images - mean) / std
    return mixup(k_mix, x, smooth_labels(labels, recipe.low, recipe.high), recipe.alpha)


def bce(logits: Array, targets: Array, hypers: Any) -> Array:
    """Binary cross entropy in nats, mean over the labels: [B]."""
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)


def agreement(logits: Array, targets: Array, hypers: Any) -> Array:
    """Share of the labels that are on the right side of 1/2: [B]."""
    return ((logits > 0) == (targets > 0.5)).mean(-1, dtype=jnp.float32)


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 0.1
    min_lr: float = 0.0
    weight_decay: float = 5e-6
    """Of all parameters, in the gradient."""
    momentum: float = 0.9
    ema_decay: float = 0.997
    """Of weights and statistics: a horizon of 3.5 epochs of 94 updates, as the paper's .999 with 285."""


@dataclass(frozen=True)
class Config(configs.Config):
    """What training can set. The defaults are a small network for phantoms; the paper's values are named."""

    data: str = "phantom"
    """`phantom` (drawn here), or a folder of images with labels.csv: file, patient, laterality and the eight labels,
    optionally split (train, valid, test)."""
    size: tuple[int, int] = (64, 80)
    """Rows and columns. Paper: 384 512."""
    model: Literal["small", "resnet-34"] = "small"
    """small: a block for each stage, the last maps have an eighth of the image's sides. Paper: resnet-34."""
    widths: tuple[int, ...] = (8, 16, 32, 48)
    """Channels of the small network's four stages."""
    hidden: int = 128
    """Of the head."""
    dropout: tuple[float, float] = (0.1, 0.5)
    """Before both layers of the head."""
    num_train: int = 1500
    """Of phantoms."""
    num_valid: int = 300
    """Of phantoms; of a folder 15% of the patients are for validation, 15% are kept for testing."""
    augment: bool = True
    alpha: float = 0.6
    """Of mixup; 0: none."""
    smooth_low: float = 0.05
    """What an absent label becomes."""
    smooth_high: float = 0.01
    """What a present label loses."""
    schedule: Schedule = "restarts"
    cycles: int = 4
    """Of the cosine with warm restarts."""
    ema: bool = True
    """Evaluate averages of weights and statistics."""
    batch_size: int = 16
    """Paper: 32."""
    num_updates: int = 2400
    """26 epochs of the phantoms. Paper: 40 epochs of 285 updates."""
    data_seed: int = 42
    """Of the phantoms, or of a folder's split."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "num_train", "num_valid", "batch_size", "num_updates", "hidden", "cycles")
        require_at_least(self, 0, "data_seed", "alpha", "hypers.lr", "hypers.min_lr", "hypers.weight_decay")
        require_unit(self, "smooth_low", "smooth_high", "hypers.momentum", "hypers.ema_decay")
        require(self, "smooth_low", self.smooth_low + self.smooth_high < 1, f"less than 1 - {self.smooth_high}")
        require(self, "size", min(self.size) >= 32, "at least 32 rows and columns")
        require(self, "widths", len(self.widths) == 4 and min(self.widths) >= 1, "four widths >= 1")
        require(self, "dropout", min(self.dropout) >= 0 and max(self.dropout) < 1, "two shares below 1")
        fewest = self.data != "phantom" or self.batch_size <= self.num_train
        require(self, "batch_size", fewest, f"at most num_train={self.num_train}")


@lru_cache(4)
def _phantoms(seed: int, train: int, valid: int, size: tuple[int, int]) -> dict[str, Eyes]:
    own = train + train % 2  # no patient in both parts
    eyes = phantom_eyes(seed, own + valid, size)
    cut = lambda rows: Eyes(*(x[rows] for x in eyes))
    return {"train": cut(slice(train)), "valid": cut(slice(own, None))}


def parts(config: Config) -> dict[str, Eyes]:
    """Images for training and validation and, of a folder, for testing. Raises `UserError`."""
    return _parts(config.data, config.data_seed, config.num_train, config.num_valid, config.size)


def _parts(data: str, seed: int, train: int, valid: int, size: tuple[int, int]) -> dict[str, Eyes]:
    return _phantoms(seed, train, valid, size) if data == "phantom" else read_folder(data, size, seed)


def pixel_moments(images: np.ndarray) -> Moments:
    """Means and deviations of the channels of images uint8 [M, H, W, 2], in 0..1."""
    x = images.reshape(-1, images.shape[-1]).astype(np.float32) / 255.0
    std = np.maximum(x.std(0), 1e-3)
    return tuple(map(float, x.mean(0))), tuple(map(float, std))


def moments(config: Config) -> Moments:
    """Of the training part."""
    return _moments(config.data, config.data_seed, config.num_train, config.num_valid, config.size)


@lru_cache(8)
def _moments(*chosen: Any) -> Moments:
    return pixel_moments(_parts(*chosen)["train"].images)


def source(config: Config) -> Source:
    """Augmented, mixed batches of the training part."""
    eyes, pixels = parts(config)["train"], moments(config)
    recipe = Recipe(config.alpha, config.smooth_low, config.smooth_high)
    in_unit = lambda x: x.astype(jnp.float32) / 255.0
    augment = lambda key, batch: training_batch(key, in_unit(batch[0]), batch[1], pixels, recipe, config.augment)
    return ArrayData((eyes.images, eyes.labels), config.batch_size, per_seed=True, augment=augment)


def eval_source(config: Config) -> Source:
    """The validation part as it is, its labels smoothed as in training."""
    eyes = parts(config)["valid"]
    images = normalise(eyes.images.astype(np.float32) / 255.0, moments(config))
    targets = np.asarray(smooth_labels(eyes.labels, config.smooth_low, config.smooth_high))
    return SplitData((images, targets), 100)


def network_of(config: Config) -> Network:
    """The unbound network."""
    small = ResNet(18, 0, "half", widths=config.widths, counts=(1, 1, 1, 1), strides=(2, 2, 1, 1))
    backbone = small if config.model == "small" else ResNet(34, 0, "imagenet")
    return Network(backbone, config.hidden, config.dropout, lambda: moments(config))


def probabilities(network: Network, given: Any, images: Float[Array, "b h w 2"]) -> Float[Array, "b 8"]:
    """Aligned images in 0..1 -> probabilities of the labels, in inference mode."""
    pixels = given["pixels"]
    logits: Any = network.apply(given, (images - pixels["mean"]) / pixels["std"])
    return jax.nn.sigmoid(logits)


def uwf_diseases(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    network = network_of(config)
    model = linen(network, jnp.zeros((1, *config.size, 2)))

    def predict(state: State, images: Array) -> Array:
        """Aligned images [B, H, W, 2] in 0..1 -> probabilities [B, 8]."""
        return probabilities(network, variables(state), images)

    learner = supervised(
        model,
        bce,
        {"agreement": agreement},
        Optimiser("sgd", config.schedule, decay=None, cycles=config.cycles),
        num_steps=config.num_updates,
        hypers=config.hypers,
        ema=config.ema,
        config=config,
        name="uwf-diseases",
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/loss", "min"),
    )
    return learner._replace(predict=predict)


def inconsistent(p: Float[np.ndarray, "b 8"], points: Sequence[float] | np.ndarray) -> np.ndarray:
    """Where "any" is below its threshold and a disease is not: labels are separate, so both are reported. [B] bool."""
    above = p >= np.asarray(points)
    return ~above[:, -1] & above[:, :-1].any(1)
