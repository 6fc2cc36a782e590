"""DART: deep approximation of a retinal trait (Engelmann, Villaplana-Velasco, Storkey and Bernabeu, 2022).

A trait such as the fractal dimension of the vessels is measured by a pipeline (find vessels, threshold, count boxes)
that fails on poor photographs. DART is one network that regresses the pipeline's value for the *clean* photograph from
degraded copies of it: `degrade` gives the copies, `fractal_dims` the trait, the squared error of the standardised
trait is the loss, `Network` the regressor. Any other trait takes the place of the fractal dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.medical import phantoms
from jaxstack.medical.fundus import IMAGE_MEAN, IMAGE_STD, Blocks, degraded, read_photograph, read_table, turned
from jaxstack.nn.supervised import Optimiser, State, linen, squared_error, supervised, variables
from jaxstack.nn.torch_weights import from_torch, read_weights, to_torch
from jaxstack.nn.vision.resnet import ResNet

RELEASED = (1.485399946403277, 0.0326135335465513)
"""Mean and deviation of the released model's fractal dimensions."""
RELEASED_SIZE = 224
RELEASED_ZEROS = -1.3943004608154297
"""What the released network gives for normalised zeros, before it is a dimension."""
BOXES = (2, 4, 8, 16, 32)


def _exponent(p: Array, q: float) -> Array:
    """log(sum p^q) / (q - 1) over boxes with mass, and sum p log p for q = 1."""
    full = p > 0
    safe = jnp.where(full, p, 1.0)
    if q == 1:
        return (p * jnp.log(safe)).sum()
    return jnp.log(jnp.where(full, safe**q, 0.0).sum()) / (q - 1.0)


def fractal_dims(
    mass: Float[Array, "h w"],
    qs: Sequence[float] = (0.0, 1.0, 2.0),
    boxes: Sequence[int] = BOXES,
    offsets: int = 1,
) -> Float[Array, " q"]:
    """Generalised dimensions D_q of a mask or a measure by box counting.

    With p_i = mass of box i / whole mass, D_q is the slope over log b of log(sum_i p_i^q) / (q - 1), and of
    sum_i p_i log p_i for q = 1: D_0 counts boxes, D_1 is information, D_2 correlation. Least squares over the ladder of
    boxes, which is part of the definition. On a mask whose lines are wider than the smallest boxes D_0 < D_1 < D_2 may
    appear, against the theory.

    Args:
        mass: non-negative, at least one entry positive (else NaN).
        qs: Q orders.
        boxes: sides of the boxes in pixels.
        offsets: grids per axis and box, evenly shifted. D_0 takes the smallest count, other orders the mean.

    Returns:
        [Q].
    """
    mass = jnp.asarray(mass, jnp.float32)
    h, w = mass.shape
    rows = []
    for b in boxes:
        of_grids = []
        for dy in range(offsets):
            for dx in range(offsets):
                top, left = dy * b // offsets, dx * b // offsets
                below, right = -(h + top) % b, -(w + left) % b
                grid = jnp.pad(mass, ((top, below), (left, right)))
                p = grid.reshape((h + top + below) // b, b, (w + left + right) // b, b).sum((1, 3)) / mass.sum()
                of_grids.append(jnp.stack([_exponent(p, q) for q in qs]))
        found = jnp.stack(of_grids)
        # -log N: the smallest count is the largest value
        rows.append(jnp.where(jnp.asarray(qs) == 0, found.max(0), found.mean(0)))
    x = jnp.log(jnp.asarray(boxes, jnp.float32))
    x = x - x.mean()
    return jnp.where(mass.sum() > 0, x @ jnp.stack(rows) / (x @ x), jnp.nan)


def find_vessels(image: np.ndarray, sigmas: Sequence[float] = (1.5, 3.0)) -> np.ndarray:
    """The pipeline's brittle step: Sato's ridge filter on the green channel at twice the resolution, Otsu's threshold.

    Args:
        image: [N, N, 3] uint8, black outside the field of view.
        sigmas: of the ridges, in pixels of the doubled image.

    Returns:
        [2N, 2N] bool.

    Raises:
        UserError: where scikit-image is missing.
    """
    try:
        from skimage import filters, transform
    except ImportError as e:
        raise UserError("find_vessels: scikit-image is missing; pip install 'jaxstack[medical]'") from e
    from scipy import ndimage

    size = (2 * image.shape[0], 2 * image.shape[1])
    seen = np.repeat(np.repeat(image.max(2) > 8, 2, 0), 2, 1)
    green = transform.resize(image[..., 1].astype(np.float32) / 255.0, size, order=1)
    # no ridge along the rim of the field of view
    filled = np.asarray(ndimage.binary_fill_holes(seen), bool)
    inside = np.asarray(ndimage.binary_erosion(filled, iterations=6), bool)
    if not inside.any():
        return np.zeros(size, bool)
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    ridges = filters.sato(green[tuple(np.asarray(nearest))], sigmas=tuple(sigmas), black_ridges=True)  # pyright: ignore[reportArgumentType]
    values = ridges[inside]
    return inside & (ridges > (filters.threshold_otsu(values) if values.max() > values.min() else np.inf))


@jax.jit
def _dimensions(masks: Array) -> Array:
    return jax.lax.map(lambda mask: fractal_dims(mask, (0.0,))[0], masks, batch_size=16)


def dimensions(masks: np.ndarray) -> np.ndarray:
    """D_0 of each mask [M, H, W], NaN for an empty one: [M] float32."""
    return np.asarray(_dimensions(jnp.asarray(masks)))


def pipeline(images: np.ndarray) -> np.ndarray:
    """Fractal dimensions [M] that the pipeline measures on photographs [M, N, N, 3] uint8; NaN where it fails."""
    return dimensions(np.stack([find_vessels(image) for image in images]))


def to_trait(output: Any, mean: Any, std: Any) -> Any:
    """A standardised output in the trait's units: f (s + 1e-9) + m."""
    return output * (std + 1e-9) + mean


def standardised(values: Any, mean: Any, std: Any) -> Any:
    """The inverse of `to_trait`: (y - m) / (s + 1e-9)."""
    return (values - mean) / (std + 1e-9)


class Head(nn.Module):
    """The release's head on pooled features: Linear, LayerNorm, GELU, Linear to one number."""

    hidden: int = 64

    @nn.compact
    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, " b"]:
        x = nn.LayerNorm(epsilon=1e-5)(nn.Dense(self.hidden)(features))
        return nn.Dense(1)(jax.nn.gelu(x, approximate=False))[:, 0]


class Network(nn.Module):
    """Blocks of convolutions and the head."""

    widths: tuple[int, ...] = (16, 32, 64, 96)
    hidden: int = 64
    moments: Callable[[], tuple[float, float]] = lambda: RELEASED
    """Mean and deviation of the trait, asked for when variables are made: they are stored with the model."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n n 3"], train: bool = False) -> Float[Array, " b"]:
        """Images in 0..1 -> the standardised trait."""
        self.variable("trait", "mean", lambda: jnp.float32(self.moments()[0]))
        self.variable("trait", "std", lambda: jnp.float32(self.moments()[1]))
        return Head(self.hidden)(Blocks(self.widths)(x, train))


class ReleasedNetwork(nn.Module):
    """ResNet and head. With ResNet-18, what the paper trains, it has 11,209,537 parameters."""

    backbone: ResNet
    hidden: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """Images normalised by ImageNet's moments -> the standardised trait."""
        return Head(self.hidden, name="head")(self.backbone(x).mean((1, 2)))

    def torch_name(self, modules: tuple[str, ...]) -> str:
        """timm's names of the backbone; those of the head are fc.0 (linear), fc.1 (norm), fc.2 (linear)."""
        if modules[0] == "backbone":
            return self.backbone.torch_name(modules[1:])
        return {"Dense_0": "fc.0", "LayerNorm_0": "fc.1", "Dense_1": "fc.2"}[modules[1]]


def load_weights(path: str | Path) -> tuple[ReleasedNetwork, Any]:
    """ResNet-18 and the head with the weights of a state dict (.pt, .pth, .safetensors, .npz).

    The backbone has timm's names, with any prefix. What the release calls its head is not public: the other tensors are
    taken in the order of the file, as weight and bias of a linear layer, of a norm, and of a linear layer.

    Raises:
        UserError: for a broken file, or other names or shapes: the first ones that differ are listed.
    """
    weights = {k: v for k, v in read_weights(path).items() if not k.endswith("num_batches_tracked")}
    network = ReleasedNetwork(ResNet(18, 0, "imagenet"))
    shapes = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, 64, 64, 3))), jax.random.key(0))
    trunk = {c: {"backbone": shapes[c]["backbone"]} for c in shapes}
    names = set(to_torch(network, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), trunk)))
    stem = next((k for k in weights if k.endswith("conv1.weight") and k.count("layer") == 0), "conv1.weight")
    prefix = stem.removesuffix("conv1.weight")
    own = lambda k: k.removeprefix(prefix)
    head = [k for k in weights if own(k) not in names]
    parts = [f"fc.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    renamed = dict(zip(head, parts)) if len(head) == len(parts) else {}
    given = {renamed[k] if k in renamed else own(k): v for k, v in weights.items()}
    return network, jax.tree.map(jnp.asarray, from_torch(network, given, shapes, str(path)))


def predict_fd(network: ReleasedNetwork, variables: Any, images: Float[Any, "b h w 3"]) -> Float[Array, " b"]:
    """Fractal dimensions of photographs in 0..1, of `RELEASED_SIZE` pixels, by released weights."""
    x = (jnp.asarray(images) - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
    found: Any = network.apply(variables, x)
    return to_trait(found, *RELEASED)


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 2e-3
    min_lr: float = 0.0
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Config(configs.Config):
    """What training can set."""

    data: str = "phantom"
    """`phantom` (fundus images drawn here), or a folder of photographs with traits.csv, whose columns are file and
    value."""
    size: int = 96
    """Pixels of a side, a multiple of 16; photographs are cropped and resized. The release takes 224."""
    num_train: int = 1200
    """Of phantoms."""
    num_valid: int = 100
    """Of phantoms; of a folder every tenth photograph."""
    severity: float = 1.0
    """Training images are degraded with severities from 0 to this; 0 trains on clean images alone."""
    turn: bool = True
    """Turn training images by quarters and flip them, which leaves the trait."""
    widths: tuple[int, ...] = (16, 32, 64, 96)
    """Channels of the four blocks."""
    hidden: int = 64
    """Of the head."""
    schedule: Literal["cosine", "constant"] = "cosine"
    batch_size: int = 64
    num_updates: int = 260
    data_seed: int = 0
    """Of the phantoms, or of the order of a folder's photographs."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "num_train", "num_valid", "batch_size", "num_updates", "hidden")
        require_at_least(self, 0, "severity", "data_seed", "hypers.lr", "hypers.min_lr", "hypers.weight_decay")
        require(self, "severity", self.severity <= 1, "0 to 1")
        require(self, "size", self.size >= 32 and self.size % 16 == 0, "a multiple of 16, at least 32")
        require(self, "widths", len(self.widths) == 4 and min(self.widths) >= 1, "four widths >= 1")
        fewest = self.data != "phantom" or self.batch_size <= self.num_train
        require(self, "batch_size", fewest, f"at most num_train={self.num_train}")


class Traits(NamedTuple):
    """Photographs and the trait of each."""

    images: np.ndarray
    """[M, N, N, 3] uint8."""
    values: np.ndarray
    """[M] float32."""


@lru_cache(8)
def phantom_traits(seed: int, count: int, size: int) -> tuple[Traits, np.ndarray]:
    """Phantoms with the fractal dimension of the vessels that were drawn, and their density [M]."""
    images, vessels = phantoms.fundus_set(seed, count, size)
    return Traits(images, dimensions(vessels)), vessels.mean((1, 2))


def read_folder(folder: str | Path, size: int) -> Traits:
    """Photographs of a folder, cropped, square and resized, with the values of its traits.csv.

    Args:
        folder: with traits.csv, columns `file` (relative to the folder) and `value`.
        size: pixels of a side.

    Raises:
        UserError: for a missing or broken table or image; the message names it.
    """
    images, values = [], []
    for line, path, text in read_table(folder, "traits.csv", "value"):
        where = f"{Path(folder) / 'traits.csv'}: line {line}: value: found"
        try:
            values.append(float(text))
        except ValueError:
            raise UserError(f"{where} {text!r}, expected a number") from None
        if not np.isfinite(values[-1]):
            raise UserError(f"{where} {text}, expected a finite number")
        images.append(read_photograph(path, size))
    return Traits(np.stack(images), np.asarray(values, np.float32))


@lru_cache(4)
def _parts(data: str, size: int, num_train: int, num_valid: int, seed: int) -> tuple[Traits, Traits]:
    if data == "phantom":
        whole, _ = phantom_traits(seed, num_train + num_valid, size)
        valid = np.arange(num_train + num_valid) >= num_train
    else:
        whole = read_folder(data, size)
        if len(whole.values) < 10:
            raise UserError(f"{data}: found {len(whole.values)} photographs, expected at least 10")
        valid = np.random.default_rng(seed).permutation(len(whole.values)) % 10 == 0
    part = lambda rows: Traits(whole.images[rows], whole.values[rows])
    return part(~valid), part(valid)


def parts(config: Config) -> tuple[Traits, Traits]:
    """Photographs for training and for validation. Raises `UserError`."""
    return _parts(config.data, config.size, config.num_train, config.num_valid, config.data_seed)


def moments(config: Config) -> tuple[float, float]:
    """Mean and deviation of the trait over the training part. Raises `UserError` where all values are equal."""
    return _moments(parts(config)[0].values, config.data)


def _moments(values: np.ndarray, where: str) -> tuple[float, float]:
    mean, std = float(values.mean()), float(values.std())
    if not std > 0:
        raise UserError(f"{where}: all {len(values)} values are {mean:g}: there is nothing to learn")
    return mean, std


def worsened(config: Config, key: Key, images: Array) -> Array:
    """Degraded images, of severities from 0 to the config's."""
    return degraded(key, images, 0.0, config.severity) if config.severity else images


def augment(config: Config, degrade_fn: Callable[[Key, Array], Array] | None = None) -> Any:
    """(key, (images uint8, values)) -> (images in 0..1, values): the copies that the network learns from, made worse by
    `degrade_fn`, or as `worsened` does."""
    worse = degrade_fn or partial(worsened, config)

    def of_batch(key: Key, batch: tuple[Array, Array]) -> tuple[Array, Array]:
        images, values = batch
        k_turn, k_degrade = jax.random.split(key)
        x = images.astype(jnp.float32) / 255.0
        x = turned(k_turn, x) if config.turn else x
        return worse(k_degrade, x), values

    return of_batch


def source(config: Config) -> Source:
    """Degraded copies of the training part; each step draws new ones."""
    images, values = parts(config)[0]
    targets = standardised(values, *moments(config)).astype(np.float32)
    return ArrayData((images, targets), config.batch_size, per_seed=True, augment=augment(config))


@jax.jit
def copies(key: Key, images: Array, low: Array, high: Array) -> Array:
    """Fixed degraded copies [M, N, N, 3] uint8 of photographs uint8, severities uniform from `low` to `high`."""
    one = lambda item: degraded(item[0], item[1][None].astype(jnp.float32) / 255.0, low, high)[0]
    out = jax.lax.map(one, (jax.random.split(key, len(images)), images), batch_size=32)
    return jnp.round(out * 255.0).astype(jnp.uint8)


def eval_source(config: Config) -> Source:
    """The validation part, clean and in fixed copies of severities .2 to .4 and .4 to .6."""
    _, valid = parts(config)
    poor = [copies(jax.random.key(i), valid.images, low, low + 0.2) for i, low in enumerate((0.2, 0.4))]
    images = np.concatenate([valid.images, *[np.asarray(p) for p in poor]])
    targets = standardised(valid.values, *moments(config)).astype(np.float32)
    return SplitData((images.astype(np.float32) / 255.0, np.tile(targets, 3)), 100)


def absolute_error(outputs: Array, values: Array, hypers: Any) -> Array:
    """Absolute error of the standardised trait, [B]: in deviations of the trait."""
    return jnp.abs(outputs - values)


def _learner(config: Config, moments: Any, source: Any, eval_source: Any, name: str) -> Learner:
    """The learner of a config, the trait's moments () -> (mean, deviation), and config -> batches."""
    network = Network(config.widths, config.hidden, moments)
    model = linen(network, jnp.zeros((1, config.size, config.size, 3)))

    def predict(state: State, images: Array) -> Array:
        """Photographs [B, N, N, 3] in 0..1 -> the trait [B]."""
        trait = state.stats["trait"]
        return to_trait(model.apply(variables(state), images), trait["mean"], trait["std"])

    learner = supervised(
        model,
        squared_error,
        {"mae": absolute_error},
        Optimiser("adamw", config.schedule),
        num_steps=config.num_updates,
        hypers=config.hypers,
        config=config,
        name=name,
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/mae", "min"),
    )
    return learner._replace(predict=predict)


def dart(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    return _learner(config, lambda: moments(config), source, eval_source, "dart")


def approximate_trait(
    trait_fn: Callable[[np.ndarray], Any],
    images: np.ndarray,
    degrade_fn: Callable[[Key, Array], Array] | None = None,
    config: Config = Config(),
    /,
    **changes: Any,
) -> Learner:
    """The learner of any trait, such as density or tortuosity, of photographs at hand.

    Args:
        trait_fn: photographs [M, N, N, 3] uint8 -> the trait of each, [M]; called once, with the clean ones.
        images: photographs [M, N, N, 3] uint8, of which every tenth is for validation.
        degrade_fn: (key, images [B, N, N, 3] in 0..1) -> worse copies of them, pure; default: `degraded` with
            severities from 0 to `config.severity`.
        config: of network and training; its size becomes that of the images.
        changes: field values in place of the config's.

    Returns:
        A learner as `dart`'s, for `jaxstack.train`; it predicts in the units of `trait_fn`.

    Raises:
        UserError: for other images, fewer than 10, or values that are not finite, not one for each, or all equal.
    """
    images = np.asarray(images)
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if not square or images.dtype != np.uint8 or len(images) < 10:
        found = f"{list(images.shape)} {images.dtype}"
        raise UserError(f"images: found {found}, expected [M, N, N, 3] uint8 with M of at least 10")
    values = np.asarray(trait_fn(images), np.float32)
    if values.shape != (len(images),) or not np.isfinite(values).all():
        raise UserError(f"trait_fn: gave {list(values.shape)} values, expected {len(images)} finite ones")
    config = configs.replace(config, size=images.shape[1], **changes)
    held = np.random.default_rng(config.data_seed).permutation(len(values)) % 10 == 0
    mean, std = _moments(values[~held], "trait_fn")
    targets = standardised(values, mean, std).astype(np.float32)
    change, worse = augment(config, degrade_fn), jax.jit(degrade_fn or partial(worsened, config))

    def batches(_: Config) -> Source:
        return ArrayData((images[~held], targets[~held]), config.batch_size, per_seed=True, augment=change)

    def held_out(_: Config) -> Source:
        """Clean, and in fixed worse copies."""
        clean = images[held].astype(np.float32) / 255.0
        poor = np.asarray(worse(jax.random.key(0), jnp.asarray(clean)))
        return SplitData((np.concatenate([clean, poor]), np.tile(targets[held], 2)), 100)

    return _learner(config, lambda: (mean, std), batches, held_out, "approximate-trait")
