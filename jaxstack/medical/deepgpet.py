"""DeepGPET: a U-Net that outlines the choroid in OCT B-scans, learned from a slow tracer (Burke et al., 2023).

`gpet.trace_choroid` makes masks from two pairs of end points; a U-Net with a MobileNetV3 encoder learns them, needs no
end points and is much faster. Pixels x in 0..1 are normalised to (x - 0.1) / 0.2; the mask is where the probability is
above one half. `choroid.choroid_metrics` measures what is outlined.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.augment import blurred
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.medical import choroid, gpet, io
from jaxstack.medical.phantoms_oct import oct_set
from jaxstack.medical.segmentation import boundary_error, dice, iou, weighted_bce
from jaxstack.nn.supervised import Optimiser, State, linen, supervised, variables
from jaxstack.nn.torch_weights import from_torch, read_weights
from jaxstack.nn.vision.unet_mobilenet import DECODER, UNetMobileNetV3, fresh

MEAN, DEVIATION = 0.1, 0.2
"""Of pixels: x becomes (x - 0.1) / 0.2."""
MULTIPLE = 32
"""What rows and columns of the network's input are multiples of."""
PadMode = Literal["zero", "reflect"]


def normalised(x: Any) -> Any:
    """(x - 0.1) / 0.2."""
    return (x - MEAN) / DEVIATION


def as_input(images: Float[Array, "b h w"]) -> Float[Array, "b h w 1"]:
    """What the network is given, of images in 0..1."""
    return normalised(images)[..., None]


def padded(image: np.ndarray, pad_mode: PadMode = "zero", extra_cols: int = 0) -> tuple[np.ndarray, int]:
    """A normalised image with rows below and columns to the right up to multiples of 32.

    Args:
        image: [H, W], normalised: a zero is an intensity of 0.1, not black.
        pad_mode: what fills: zeros, or the image mirrored at its edges.
        extra_cols: columns added on both sides before, rounded down to a multiple of 32; the release's variant for
            scans around the optic nerve adds 256, mirrored.

    Returns:
        The padded image, and how many columns lie to the left of the image in it.

    Raises:
        UserError: for an unknown mode, or an image too small to be mirrored so far.
    """
    if pad_mode not in ("zero", "reflect"):
        raise UserError(f"pad_mode={pad_mode!r}: expected 'zero' or 'reflect'")
    if extra_cols < 0:
        raise UserError(f"extra_cols={extra_cols}: expected at least 0")
    side = extra_cols // MULTIPLE * MULTIPLE
    height, width = image.shape
    below, right = -height % MULTIPLE, -width % MULTIPLE
    if pad_mode == "reflect" and (below >= height or max(side, side + right) >= width):
        raise UserError(
            f"image of {height}x{width} pixels: too small to be mirrored by {below} rows, {side + right} columns"
        )
    how = {"zero": "constant", "reflect": "reflect"}[pad_mode]
    return np.pad(image, ((0, below), (side, side + right)), how), side  # pyright: ignore[reportCallIssue, reportArgumentType]


@partial(jax.jit, static_argnums=0)
def _probabilities(net: Any, given: Any, x: Array) -> Array:
    """jitted once for each network and padded shape."""
    return jax.nn.sigmoid(net.apply(given, x[None, :, :, None])[0, :, :, 0])


def segment(
    net: UNetMobileNetV3, given: Any, image: np.ndarray, pad_mode: PadMode = "zero", extra_cols: int = 0
) -> Float[np.ndarray, "h w"]:
    """The probability of each pixel to belong to the choroid.

    Args:
        net: the network.
        given: its variables.
        image: [H, W] uint8, or float in 0..1.
        pad_mode, extra_cols: see `padded`.

    Raises:
        UserError: for another type or shape, and as `padded`.
    """
    whole = image.dtype == np.uint8
    if not (whole or image.dtype.kind == "f") or image.ndim != 2 or not image.size:
        raise UserError(f"image: found {image.dtype} {list(image.shape)}, expected uint8 or float [H, W]")
    grey = image.astype(np.float32) / (255.0 if whole else 1.0)
    x, left = padded(normalised(grey), pad_mode, extra_cols)
    found = _probabilities(net, given, jnp.asarray(x))
    return np.asarray(found)[: image.shape[0], left : left + image.shape[1]]


def outlined(probability: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """The mask [H, W]: the largest component of the pixels whose probability is above the threshold."""
    return choroid.largest_component(np.asarray(probability) > threshold)


def load_weights(path: str | Path) -> tuple[UNetMobileNetV3, Any]:
    """The released network (one input, one output) with the weights of a file.

    Args:
        path: a state dict of segmentation-models-pytorch's U-Net on tf_mobilenetv3_large_100; names may begin with
            `model.` or `module.`. The release is a pickled module, which scripts/torch_to_safetensors.py converts.

    Raises:
        UserError: naming the file and what is missing, unknown or of another shape.
    """
    net = UNetMobileNetV3()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, MULTIPLE, MULTIPLE, 1)))
    weights = read_weights(path)
    for prefix in ("model.", "module."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): x for name, x in weights.items()}
    return net, jax.tree.map(jnp.asarray, from_torch(net, weights, shapes, str(path)))


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 1e-3
    min_lr: float = 0.0
    weight_decay: float = 1e-2
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0
    ema_decay: float = 0.98


@dataclass(frozen=True)
class Config(configs.Config):
    """What training can set."""

    data: str = "phantom"
    """`phantom` (B-scans drawn here), or a folder of B-scans with masks of the same names in its folder region/."""
    labels: Literal["given", "gpet"] = "given"
    """Masks to learn: those given (of phantoms the exact ones), or GPET's between their end points."""
    size: tuple[int, int] = (128, 192)
    """Rows and columns, multiples of 32. Smaller scans are filled up below and to the right."""
    num_train: int = 400
    """Of phantoms."""
    num_valid: int = 60
    """Of phantoms; of a folder every tenth scan."""
    width: float = 0.25
    """Times the channels of the encoder; the release has 1."""
    decoder: tuple[int, ...] = (32, 24, 16, 16, 8)
    """Channels of the decoder's five blocks; the release has 256, 128, 64, 32, 16."""
    most_blocks: int | None = None
    """At most so many blocks of each of the encoder's six stages; the release has all, 1 to 4."""
    speckle: bool = True
    """Add noise and multiply by noise, in half of the training images."""
    augment: bool = True
    """Brightness, contrast, flips, blur and affine maps of training images; the paper's kinds, ranges are ours."""
    schedule: Literal["cosine", "constant"] = "constant"
    ema_from: float = 0.5
    """Share of the updates after which averages of the weights are kept, which are the final model."""
    batch_size: int = 16
    num_updates: int = 1500
    """The paper: 60 epochs."""
    data_seed: int = 0
    """Of the phantoms, or of the order of a folder's scans."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "num_train", "num_valid", "batch_size", "num_updates")
        require_at_least(self, 0, "data_seed", "hypers.lr", "hypers.min_lr", "hypers.weight_decay", "hypers.ema_decay")
        fits = len(self.size) == 2 and min(self.size) >= MULTIPLE and not any(n % MULTIPLE for n in self.size)
        require(self, "size", fits, "two multiples of 32")
        require(self, "width", self.width > 0, "a positive number")
        require(self, "most_blocks", self.most_blocks is None or self.most_blocks >= 1, "at least 1, or none")
        require(self, "decoder", len(self.decoder) == 5 and min(self.decoder) >= 1, "five numbers of channels")
        require(self, "ema_from", 0 <= self.ema_from < 1, "0 to less than 1")
        require(self, "hypers.ema_decay", self.hypers.ema_decay < 1, "less than 1")
        fewest = self.data != "phantom" or self.batch_size <= self.num_train
        require(self, "batch_size", fewest, f"at most num_train={self.num_train}")


RELEASED = dict(size=(512, 768), width=1.0, decoder=DECODER)
"""Of `Config`: the released network, and its common size of scans in multiples of 32."""


class Scans(NamedTuple):
    """B-scans and the choroid's masks."""

    images: np.ndarray
    """[M, H, W] uint8."""
    masks: np.ndarray
    """[M, H, W] bool."""


def gpet_masks(scans: Scans, settings: gpet.Settings = gpet.Settings(), seed: int = 0) -> np.ndarray:
    """GPET's masks [M, H, W] between the end points of the masks that are given; about 0.1 s for each scan.

    Raises:
        UserError: for a mask that is empty or has less than five columns.
    """
    found = []
    for i, (image, mask) in enumerate(zip(scans.images, scans.masks)):
        columns = np.flatnonzero(mask.any(0))
        if len(columns) < 5:
            raise UserError(f"mask {i}: found {len(columns)} columns with a choroid, expected at least 5")
        x0, x1 = int(columns[0]), int(columns[-1])
        rows = [np.flatnonzero(mask[:, x]) for x in (x0, x1)]
        upper, lower = (((x0, float(rows[0][k])), (x1, float(rows[1][k]))) for k in (0, -1))
        rng = np.random.default_rng((seed, i))
        found.append(gpet.trace_choroid(rng, image.astype(np.float64) / 255.0, upper, lower, settings))
    return np.stack(found)


def read_folder(folder: str | Path, size: tuple[int, int]) -> Scans:
    """B-scans of a folder, and the masks of the same names (any ending) in its folder region/.

    Args:
        folder: images; tables and folders in it are passed over.
        size: rows and columns; smaller scans are filled up below and to the right as the network's input is.

    Raises:
        UserError: for a missing folder, fewer than 10 scans, scans without a mask or a mask without a scan, a broken
            file, a scan that is larger than `size`, or a mask of another size.
    """
    root = Path(folder)
    if not (root / "region").is_dir():
        raise UserError(f"{root / 'region'}: not found, expected a folder of masks")
    images, masks = ({p.stem: p for p in io.image_files([at])} for at in (root, root / "region"))
    if alone := sorted(images.keys() ^ masks.keys()):
        raise UserError(
            f"{folder}: {alone[0]}: found a scan or a mask alone, expected both (and {len(alone) - 1} more)"
        )
    if len(images) < 10:
        raise UserError(f"{folder}: found {len(images)} scans, expected at least 10")
    fill = round(MEAN * 255)
    shape = (len(images), *size)
    out = Scans(np.full(shape, fill, np.uint8), np.zeros(shape, bool))
    for i, (name, path) in enumerate(images.items()):
        image, mask = np.round(io.read_scan(path).image * 255.0), io.read_mask(masks[name])
        h, w = image.shape
        if mask.shape != image.shape:
            raise UserError(f"{masks[name]}: found {mask.shape[0]}x{mask.shape[1]} pixels, expected the scan's {h}x{w}")
        if h > size[0] or w > size[1]:
            raise UserError(f"{path}: found {h}x{w} pixels, expected at most size={size[0]}x{size[1]}")
        out.images[i, :h, :w], out.masks[i, :h, :w] = image, mask
    return out


def phantom_scans(seed: int, count: int, size: tuple[int, int] = (128, 192)) -> Scans:
    """Phantoms with their exact masks."""
    from jaxstack.medical.phantoms_oct import DEVICES

    found = oct_set(seed, count, DEVICES["A"]._replace(size=size))
    return Scans(np.round(found.image * 255.0).astype(np.uint8), found.region)


@lru_cache(4)
def _parts(
    data: str, labels: str, size: tuple[int, int], num_train: int, num_valid: int, seed: int
) -> tuple[Scans, Scans]:
    if data == "phantom":
        whole = phantom_scans(seed, num_train + num_valid, size)
        valid = np.arange(num_train + num_valid) >= num_train
    else:
        whole = read_folder(data, size)
        valid = np.random.default_rng(seed).permutation(len(whole.images)) % 10 == 0
    if labels == "gpet":
        whole = whole._replace(masks=gpet_masks(whole, seed=seed))
    part = lambda rows: Scans(whole.images[rows], whole.masks[rows])
    return part(~valid), part(valid)


def parts(config: Config) -> tuple[Scans, Scans]:
    """Scans for training and for validation. Raises `UserError`."""
    return _parts(config.data, config.labels, config.size, config.num_train, config.num_valid, config.data_seed)


def moved(key: Key, image: Array, mask: Array) -> tuple[Array, Array]:
    """An affine map of a scan and its mask: turned by up to 8 degrees, scaled by 0.9 to 1.1, shifted by up to a
    twentieth of a side. The mask stays hard; what comes in from outside repeats the edge."""
    h, w = image.shape
    k_turn, k_scale, k_shift = jax.random.split(key, 3)
    angle = jax.random.uniform(k_turn, (), minval=-8.0, maxval=8.0) * np.pi / 180.0
    scale = jax.random.uniform(k_scale, (), minval=0.9, maxval=1.1)
    shift = jax.random.uniform(k_shift, (2,), minval=-0.05, maxval=0.05) * jnp.array([h, w])
    y, x = jnp.meshgrid(jnp.arange(h) - (h - 1) / 2.0, jnp.arange(w) - (w - 1) / 2.0, indexing="ij")
    c, s = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    at = [c * y - s * x + shift[0] + (h - 1) / 2.0, s * y + c * x + shift[1] + (w - 1) / 2.0]
    take = lambda a, order: jax.scipy.ndimage.map_coordinates(a, at, order, mode="nearest")
    return take(image, 1), take(mask.astype(jnp.float32), 0) > 0.5


def augmented(key: Key, image: Float[Array, "h w"], mask: Bool[Array, "h w"], speckle: Any) -> tuple[Array, Array]:
    """A training copy of a scan in 0..1 and its mask.

    Brightness and contrast, horizontal flip and speckle (added, then multiplied Gaussian noise) each with chance 1/2,
    blur and an affine map each with chance 1/4. Noise and light leave the mask as it is.

    Args:
        key: of what happens.
        image, mask: of one scan.
        speckle: whether noise may happen.
    """
    k = iter(jax.random.split(key, 16))
    chance = lambda p: jax.random.bernoulli(next(k), p)
    uniform = lambda low, high: jax.random.uniform(next(k), (), minval=low, maxval=high)
    flip = chance(0.5)
    image, mask = (jnp.where(flip, a[:, ::-1], a) for a in (image, mask))
    affine = chance(0.25)
    image, mask = (jnp.where(affine, a, b) for a, b in zip(moved(next(k), image, mask), (image, mask)))
    lit = (image - image.mean()) * uniform(0.7, 1.3) + image.mean() + uniform(-0.15, 0.15)
    image = jnp.where(chance(0.5), lit, image)
    image = blurred(image[..., None], jnp.where(chance(0.25), uniform(0.5, 1.5), 0.0))[..., 0]
    noise = lambda most: uniform(0.0, most) * jax.random.normal(next(k), image.shape)
    noisy = (image + noise(0.05)) * (1.0 + noise(0.4))
    image = jnp.where(chance(0.5) & speckle, noisy, image)
    return jnp.clip(image, 0.0, 1.0), mask


def augment(config: Config) -> Any:
    """(key, (images uint8, masks)) -> (images in 0..1, masks): the copies that the network learns from."""

    def of_batch(key: Key, batch: tuple[Array, Array]) -> tuple[Array, Array]:
        images, masks = batch[0].astype(jnp.float32) / 255.0, batch[1]
        if not config.augment:
            return images, masks
        keys = jax.random.split(key, len(images))
        return jax.vmap(augmented, in_axes=(0, 0, 0, None))(keys, images, masks, config.speckle)

    return of_batch


def source(config: Config) -> Source:
    """Copies of the training part; each step draws new ones."""
    scans, _ = parts(config)
    return ArrayData(tuple(scans), config.batch_size, per_seed=True, augment=augment(config))


def eval_source(config: Config) -> Source:
    """The validation part."""
    _, valid = parts(config)
    return SplitData((valid.images.astype(np.float32) / 255.0, valid.masks), 20)


def cross_entropy(logits: Array, masks: Array, hypers: Any) -> Array:
    """Binary cross entropy in nats over pixels, [B]."""
    return weighted_bce(logits, masks[..., None].astype(jnp.float32))


def _overlap(measure: Callable[..., Array], logits: Array, masks: Array, hypers: Any) -> Array:
    return measure(logits[..., 0] > 0, masks)


def boundary_errors(found: Any, truth: Any) -> dict[str, np.ndarray]:
    """Signed and absolute errors of both boundaries of masks [M, H, W], in rows, [M] each; NaN for an empty mask."""
    a, b = (jax.vmap(choroid.boundaries)(jnp.asarray(m)) for m in (found, truth))
    out = {}
    for name, x, y in (("top", a.top, b.top), ("bottom", a.bottom, b.bottom)):
        error = boundary_error(x, y, a.valid, b.valid)
        out |= {f"{name} signed": np.asarray(error.signed), f"{name} absolute": np.asarray(error.absolute)}
    return out


def deepgpet(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    network = UNetMobileNetV3(1, config.width, config.decoder, config.most_blocks)
    model = linen(network, jnp.zeros((1, *config.size)), prepare=as_input)._replace(init=partial(fresh, network))

    def predict(state: State, images: Array) -> Array:
        """B-scans [B, H, W] in 0..1 -> probabilities [B, H, W]; H and W are multiples of 32."""
        return jax.nn.sigmoid(model.apply(variables(state), images)[..., 0])

    learner = supervised(
        model,
        cross_entropy,
        {"dice": partial(_overlap, dice), "iou": partial(_overlap, iou)},
        Optimiser("adamw", config.schedule),
        num_steps=config.num_updates,
        hypers=config.hypers,
        ema=True,
        ema_from=config.ema_from,
        config=config,
        name="deepgpet",
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/dice", "max"),
    )
    return learner._replace(predict=predict)
