"""What networks for region, vessels and fovea of OCT B-scans share: scans, targets, losses, metrics, weights.

`Scans` come from phantoms or from a folder with masks, `preprocess` makes them what a network is given, `loss` and the
metrics compare its three logits for each pixel with `Targets`, and `fovea_from_prob` finds the fovea. `load_weights`
reads state dicts of Choroidalyzer and of REACHNet alike.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.source import Source
from jaxstack.data import augment
from jaxstack.data.sources import SplitData
from jaxstack.medical import io
from jaxstack.medical.phantoms_oct import DEVICES, oct_set
from jaxstack.medical.segmentation import AnyArray, dice, soft_dice_loss, weighted_bce
from jaxstack.nn.supervised import Model, linen
from jaxstack.nn.torch_weights import from_torch, read_weights
from jaxstack.nn.vision.reachnet import ReachNet
from jaxstack.nn.vision.unet import UNet

REGION, VESSEL, FOVEA = range(3)
"""Channels of the network."""
THRESHOLDS = (0.5, 0.5, 0.1)
"""Probabilities from which a pixel is region or vessel, and which the fovea's largest must reach to be found."""
FILTERS = (21, 51)
"""Columns and rows over which the release smooths the fovea's signals, at 768 x 768 pixels."""


def preprocess(image: AnyArray, multiple: int = 128) -> Float[Array, "*b h w 1"]:
    """Grey images as the network is given them: (x - 0.5) / 0.5, then zeros on the right and below.

    Args:
        image: [..., H, W] uint8, or float in 0..1.
        multiple: of rows and columns, 2^depth.

    Returns:
        [..., H', W', 1] float32 with H', W' the next multiples; `[..., :H, :W, :]` is the image.
    """
    x = jnp.asarray(image)
    x = x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x.astype(jnp.float32)
    below, right = (-n % multiple for n in x.shape[-2:])
    x = jnp.pad((x - 0.5) / 0.5, [(0, 0)] * (x.ndim - 2) + [(0, below), (0, right)])
    return x[..., None]


def predict(network: UNet, variables: Any, images: AnyArray) -> Float[Array, "b h w k"]:
    """Probabilities [B, H, W, 3] of region, vessel and fovea, for images [B, H, W] uint8 or float in 0..1."""
    logits: Any = network.apply(variables, preprocess(images, network.multiple))
    return jax.nn.sigmoid(logits)[:, : images.shape[1], : images.shape[2]]


def load_weights(path: str | Path) -> tuple[UNet, Any]:
    """The network and the variables of a state dict with the released names, of Choroidalyzer or of REACHNet.

    Args:
        path: .pth, .safetensors or .npz; names may begin with `model.` or `module.`. Shapes tell channels, factors and
            the grid of tokens; attention has eight heads.

    Raises:
        UserError: for a missing or broken file, or the weights of another network.
    """
    weights = read_weights(path)
    for prefix in ("model.", "module."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): x for name, x in weights.items()}
    network = network_of(weights, str(path))
    example = jnp.zeros((1, network.multiple, network.multiple, 1))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), example))
    return network, from_torch(network, weights, shapes, str(path))


def network_of(weights: Mapping[str, np.ndarray], source: str) -> UNet:
    """The network of a state dict, by its names and shapes. Raises `UserError` naming `source`."""
    names = ["in_conv.conv.weight"]
    while (name := f"down_blocks.{len(names) - 1}.conv1.conv.weight") in weights:
        names.append(name)
    if names[0] not in weights or len(names) == 1:
        first = ", ".join(list(weights)[:3]) or "none"
        raise UserError(f"{source}: found tensors {first}, expected in_conv.conv.weight, down_blocks.0.conv1.conv...")
    channels = tuple(int(weights[name].shape[0]) for name in names)
    depth, before = len(names) - 1, "up_blocks.0.upsample.0.weight" in weights
    ups = [f"up_blocks.{i}.upsample.{0 if before else 1}.weight" for i in reversed(range(depth))]
    factors = tuple(int(w.shape[1] // w.shape[0]) for w in (weights[n] for n in ups if n in weights) if w.ndim == 4)
    if len(factors) != depth or min(factors) < 2:
        raise UserError(
            f"{source}: found no {ups[-1]} by which a level's resolution grows, expected one for each level"
        )
    more: dict[str, Any] = dict(residual="down_blocks.0.resid_connection.weight" in weights)
    more |= dict(up_mode="conv_then_interpolate" if before else "interpolate")
    more |= dict(extra_out_conv="out_conv.weight" not in weights)
    tokens = weights.get("attention.pos_embed")
    if tokens is None and set(factors) == {2}:
        return UNet(channels, **more)
    if tokens is None:
        return ReachNet(channels, factors=factors, attend=False, **more)
    side = math.isqrt(tokens.size // channels[-1])
    return ReachNet(channels, factors=factors, resolution=side * math.prod(factors), **more)


class Fovea(NamedTuple):
    """Where the fovea is."""

    x: Array
    """Column, int32."""
    y: Array
    """Row, int32."""
    score: Array
    """Largest probability of the channel; below 0.1 the release calls the fovea not found."""


def fovea_filter(size: int) -> np.ndarray:
    """The release's weights [size]: from 0.1 up to 1, 1, and down again, over their sum; three ones in the middle.

    Raises:
        UserError: for an even size, or one below 3.
    """
    if size < 3 or size % 2 == 0:
        raise UserError(f"fovea_filter: found a size of {size}, expected an odd number >= 3")
    rising = np.linspace(0.1, 1.0, size // 2)
    weights = np.concatenate([rising, [1.0], rising[::-1]])
    return (weights / weights.sum()).astype(np.float32)


@lru_cache(16)
def _smoothing(length: int, size: int) -> np.ndarray:
    """The filter as a matrix [length, length], with the signal reflected at its ends."""
    reach = size // 2
    if reach >= length:
        raise UserError(f"fovea_filter: found a size of {size} for {length} pixels, expected less than twice that")
    at = np.pad(np.arange(length), reach, mode="reflect")
    matrix = np.zeros((length, length), np.float32)
    for i, weight in enumerate(fovea_filter(size)):
        np.add.at(matrix, (np.arange(length), at[i : i + length]), weight)
    return matrix


def _smoothed(signal: Float[Array, " n"], size: int) -> Float[Array, " n"]:
    return jnp.matmul(_smoothing(len(signal), size), signal, precision="highest")


def _peak(signal: Float[Array, " n"]) -> Array:
    """Where a signal is largest; of three equal neighbours the middle one, as the filter has three equal weights."""
    first = signal.argmax()
    third = jnp.minimum(first + 2, len(signal) - 1)
    return first + ((signal[third] == signal[first]) & (third == first + 2))


def fovea_from_prob(p: Float[AnyArray, "h w"], kx: int = FILTERS[0], ky: int = FILTERS[1], joint: bool = True) -> Fovea:
    """The fovea from its probabilities: the largest smoothed sum over rows, then over columns.

    Args:
        p: [H, W] probabilities.
        kx: odd columns over which the column's signal is smoothed.
        ky: odd rows over which the row's signal is smoothed.
        joint: sum rows over the columns near the one that was found. False is the release: two maxima that know nothing
            of each other, so a faint wide band elsewhere may win the row, and the first of equal ones.

    Raises:
        UserError: for a filter that is even or too long for the image.
    """
    p = jnp.asarray(p)
    peak = _peak if joint else jnp.argmax
    x = peak(_smoothed(p.sum(0), kx))
    near = jnp.abs(jnp.arange(p.shape[1]) - x) <= kx // 2
    y = peak(_smoothed((jnp.where(near, p, 0.0) if joint else p).sum(1), ky))
    return Fovea(x.astype(jnp.int32), y.astype(jnp.int32), p.max())


@dataclass(frozen=True)
class ScanConfig(configs.Config):
    """What training on B-scans can set, whatever the network."""

    data: str = "phantom"
    """`phantom` (B-scans drawn here), or a folder of them with region/ and vessels/, masks of the same names, and
    scales.csv, whose columns are file, um_x, um_y, fovea_x, fovea_y and, where there are several of one, patient."""
    size: tuple[int, int] = (128, 192)
    """Rows and columns that scans are resized to; the releases take 768 768."""
    scanners: tuple[str, ...] = ("A", "B")
    """Scanners of the phantoms, of A, B and C; each draws as many."""
    num_train: int = 500
    """Of phantoms."""
    num_valid: int = 80
    """Of phantoms; of a folder every tenth patient, or scan where patients are not told."""
    fovea_filter: tuple[int, int] = (5, 9)
    """Columns and rows over which the fovea's signals are smoothed; the release takes 21 51 at 768 x 768."""
    schedule: Literal["cosine", "constant"] = "cosine"
    batch_size: int = 8
    num_updates: int = 300
    data_seed: int = 0
    """Of the phantoms, or of the order of a folder's scans."""

    def validate(self) -> None:
        require_at_least(self, 1, "num_train", "num_valid", "batch_size", "num_updates")
        weights = ("region_weight", "vessel_weight", "fovea_weight", "dice_weight")
        names = ("lr", "min_lr", "weight_decay", *weights)
        require_at_least(self, 0, "data_seed", *(f"hypers.{name}" for name in names))
        require(self, "size", min(self.size) >= 32, "at least 32 rows and 32 columns")
        odd = all(k % 2 and 3 <= k < 2 * n for k, n in zip(self.fovea_filter, self.size[::-1]))
        require(self, "fovea_filter", odd, "two odd numbers >= 3, less than twice the columns and rows")
        known = len(self.scanners) > 0 and set(self.scanners) <= set(DEVICES)
        require(self, "scanners", known, f"some of {', '.join(DEVICES)}")
        fewest = self.data != "phantom" or self.batch_size <= self.num_train
        require(self, "batch_size", fewest, f"at most num_train={self.num_train}")


class Scans(NamedTuple):
    """B-scans with what is to be found in them."""

    images: np.ndarray
    """[M, H, W] uint8."""
    masks: np.ndarray
    """[M, H, W] uint8: 1 where region, 2 where vessel, 3 where both."""
    fovea: np.ndarray
    """[M, 2] float32: column and row; (-1, -1) where it is not known."""


@lru_cache(8)
def phantom_scans(seed: int, count: int, size: tuple[int, int], scanners: tuple[str, ...]) -> Scans:
    """Phantoms of several scanners in turn, `count` in all."""
    parts = []
    for i, name in enumerate(scanners):
        own = len(range(i, count, len(scanners)))
        if own:
            found = oct_set(seed * len(DEVICES) + list(DEVICES).index(name), own, DEVICES[name]._replace(size=size))
            masks = found.region.astype(np.uint8) + 2 * found.vessels.astype(np.uint8)
            parts.append(Scans(np.round(found.image * 255.0).astype(np.uint8), masks, found.fovea.astype(np.float32)))
    order = np.argsort(np.concatenate([np.arange(len(p.fovea)) for p in parts]), kind="stable")
    return Scans(*(np.concatenate(each)[order] for each in zip(*parts)))


class Folder(NamedTuple):
    """Scans of a folder and what its table says about each."""

    scans: Scans
    patients: np.ndarray
    """[M] text."""
    resolutions: np.ndarray
    """[M] float32: of the scan as it was taken, over the size that it is resized to; infinite where nothing is said."""


def read_folder(folder: str | Path, size: tuple[int, int]) -> tuple[Scans, np.ndarray]:
    """`read_table_of`: the scans, and the patient of each [M]. Raises `UserError`."""
    found = read_table_of(folder, size)
    return found.scans, found.patients


def read_table_of(folder: str | Path, size: tuple[int, int]) -> Folder:
    """Scans of a folder, resized, with their masks and foveas, patients and resolutions.

    Args:
        folder: with scales.csv (`io.read_scales`), and masks in region/ and vessels/ under the names of the scans.
        size: rows and columns.

    Raises:
        UserError: for a missing or broken table, scan or mask; the message names it.
    """
    folder = Path(folder)
    images, masks, foveas, patients, shares = [], [], [], [], []
    for name, row in io.read_scales(folder / "scales.csv").items():
        image = io.read_scan(folder / name).image
        found = [io.read_mask(folder / part / name) for part in ("region", "vessels")]
        for part, mask in zip(("region", "vessels"), found):
            if mask.shape != image.shape:
                raise UserError(
                    f"{folder / part / name}: found {mask.shape[0]}x{mask.shape[1]} pixels, expected the scan's "
                    f"{image.shape[0]}x{image.shape[1]}"
                )
        fovea = (-1.0, -1.0)
        if row.fovea is not None:
            fovea = tuple(
                (at + 0.5) * new / old - 0.5 for at, new, old in zip(row.fovea, size[::-1], image.shape[::-1])
            )
        images.append(np.round(io.resized(image, size) * 255.0).astype(np.uint8))
        region, vessel = (io.resized_mask(mask, size).astype(np.uint8) for mask in found)
        masks.append(region + 2 * vessel)
        foveas.append(fovea)
        patients.append(row.patient or name)
        shares.append(np.inf if row.resolution is None else row.resolution)
    scans = Scans(np.stack(images), np.stack(masks), np.asarray(foveas, np.float32))
    return Folder(scans, np.asarray(patients), np.asarray(shares, np.float32))


@lru_cache(4)
def _parts(
    data: str, size: tuple[int, int], scanners: tuple[str, ...], num_train: int, num_valid: int, seed: int
) -> tuple[Scans, Scans, np.ndarray]:
    if data == "phantom":
        whole = phantom_scans(seed, num_train + num_valid, size, scanners)
        valid = np.arange(num_train + num_valid) >= num_train
        shares = np.full(len(valid), np.inf, np.float32)
    else:
        whole, patients, shares = read_table_of(data, size)
        names, code = np.unique(patients, return_inverse=True)
        if len(names) < 2:
            raise UserError(f"{data}: found {len(names)} patient, expected at least 2, as some are kept for validation")
        held = np.random.default_rng(seed).permutation(len(names)) % 10 == 0
        valid = held[code]
    part = lambda rows: Scans(*(x[rows] for x in whole))
    return part(~valid), part(valid), shares[~valid]


def parts(config: ScanConfig) -> tuple[Scans, Scans]:
    """Scans for training and for validation, no patient in both. Raises `UserError`."""
    c = config
    return _parts(c.data, c.size, c.scanners, c.num_train, c.num_valid, c.data_seed)[:2]


def own_resolutions(config: ScanConfig) -> np.ndarray:
    """Of the scans for training, see `Folder`. Raises `UserError`."""
    c = config
    return _parts(c.data, c.size, c.scanners, c.num_train, c.num_valid, c.data_seed)[2]


def warped(
    image: Float[Array, "h w"], masks: Array, fovea: Float[Array, " 2"], forward: Float[Array, "2 2"], shift: Array
) -> tuple[Array, Array, Array]:
    """A scan, its masks and its fovea under the map p -> c + `shift` + `forward` (p - c), c the middle of the scan.

    Images are interpolated bilinearly, masks [H, W] of integers take the nearest pixel and stay masks; what comes from
    outside of the scan is 0.
    """
    moved = augment.warped(augment.Sample(image, masks), forward, shift)
    middle = jnp.array([(image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2])
    return moved.image, jnp.asarray(moved.masks), middle + shift + forward @ (fovea - middle)


class Targets(NamedTuple):
    """What the loss compares with."""

    masks: Any
    """[B, H, W] uint8, as `Scans`."""
    fovea: Any
    """[B, 2]."""
    known: Any
    """[B] bool: scans whose fovea is known."""
    width: Any = ()
    """[B] columns of the whole scan, of which this is a part; empty where it is whole."""


def eval_source(config: ScanConfig) -> Source:
    """The validation part as it is."""
    images, masks, fovea = parts(config)[1]
    return SplitData((images, Targets(masks, fovea, fovea[:, 0] >= 0)), 40)


def channels(targets: Targets, blob: Float[Array, "b h w"]) -> Float[Array, "b h w 3"]:
    """What the three channels should be: region, vessels, and what the fovea's learns."""
    bit = lambda value: ((targets.masks & value) > 0).astype(jnp.float32)
    return jnp.stack([bit(1), bit(2), blob], -1)


def from_fovea(targets: Targets) -> tuple[Array, Array]:
    """Columns [B, 1, W] and rows [B, H, 1] of each pixel, counted from the fovea."""
    height, width = targets.masks.shape[1:]
    x = jnp.arange(width) - targets.fovea[:, :1]
    y = jnp.arange(height) - targets.fovea[:, 1:]
    return x[:, None, :], y[:, :, None]


def loss(wanted: Callable[[Targets], Array]) -> Any:
    """Weighted binary cross entropy and soft Dice of the three channels, for each scan; a fovea that is not known
    counts nothing.

    Args:
        wanted: `Targets` -> what the channels should be, [B, H, W, 3] (`channels`).
    """

    def of_batch(logits: Array, targets: Targets, hypers: Any) -> Array:
        aim = wanted(targets)
        weights = jnp.stack([hypers.region_weight, hypers.vessel_weight, hypers.fovea_weight])
        weights = weights * jnp.stack([jnp.ones_like(targets.known), jnp.ones_like(targets.known), targets.known], -1)
        first = lambda x: jnp.moveaxis(x, -1, 1)
        overlap = soft_dice_loss(first(jax.nn.sigmoid(logits)), first(aim))
        return weighted_bce(logits, aim, weights) + hypers.dice_weight * (weights * overlap).sum(-1)

    return of_batch


def fovea_error(sizes: Sequence[int]) -> Any:
    """Columns between the fovea found and the true one, for each scan; 0 for a scan whose fovea is not known."""

    def of_batch(logits: Array, targets: Targets, hypers: Any) -> Array:
        p = jax.nn.sigmoid(logits[..., FOVEA])
        found = jax.vmap(lambda one: fovea_from_prob(one, sizes[0], sizes[1]).x)(p)
        return jnp.where(targets.known, jnp.abs(found - targets.fovea[:, 0]), 0.0)

    return of_batch


def mask_dice(channel: int) -> Any:
    """Dice of a channel's mask, region or vessels, for each scan."""
    logit = float(np.log(THRESHOLDS[channel] / (1.0 - THRESHOLDS[channel])))

    def of_batch(logits: Array, targets: Targets, hypers: Any) -> Array:
        return dice(logits[..., channel] >= logit, (targets.masks & (1 << channel)) > 0)

    return of_batch


def model_of(network: UNet) -> Model:
    """The network for images [B, H, W] of any size: padded inside, its output cut to theirs."""
    prepare = lambda x: preprocess(x, network.multiple)
    inner = linen(network, np.zeros((1, network.multiple, network.multiple), np.float32), prepare=prepare)
    cut = lambda out, x: out[:, : x.shape[1], : x.shape[2]]

    def train(variables: Any, x: Any, key: Any) -> tuple[Any, Any]:
        out, changed = inner.train(variables, x, key)
        return cut(out, x), changed

    return Model(inner.init, train, lambda variables, x: cut(inner.apply(variables, x), x))
