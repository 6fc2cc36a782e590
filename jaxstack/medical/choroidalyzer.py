"""Choroidalyzer (Engelmann, Burke et al., 2024): region, vessels and fovea of the choroid in OCT by one network.

`preprocess` and `UNet` give three logits for each pixel; `fovea_from_prob` finds the fovea, `measure` the thickness,
area and vascularity index in a window around it. `choroidalyzer` is the learner: weighted binary cross entropy with
soft Dice on phantoms or on a folder of B-scans with masks. Not a medical device.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxstack.core import config as configs
from jaxstack.core.config import require
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.sources import ArrayData
from jaxstack.medical import choroid, oct_networks
from jaxstack.medical.oct_networks import (
    FILTERS,
    FOVEA,
    REGION,
    THRESHOLDS,
    VESSEL,
    Fovea,
    ScanConfig,
    Scans,
    Targets,
    eval_source,
    fovea_error,
    fovea_filter,
    fovea_from_prob,
    from_fovea,
    load_weights,
    mask_dice,
    model_of,
    parts,
    phantom_scans,
    predict,
    preprocess,
    read_folder,
    warped,
)
from jaxstack.medical.segmentation import AnyArray
from jaxstack.nn.supervised import Optimiser, supervised
from jaxstack.nn.vision.unet import UNet, require_channels

__all__ = [
    "FILTERS",
    "FOVEA",
    "REGION",
    "SCALE",
    "THRESHOLDS",
    "VESSEL",
    "Config",
    "Fovea",
    "Hypers",
    "Measures",
    "Scans",
    "Targets",
    "augment",
    "augmented",
    "channels",
    "choroidalyzer",
    "fovea_error",
    "fovea_filter",
    "fovea_from_prob",
    "load_weights",
    "loss",
    "measure",
    "measured",
    "parts",
    "phantom_scans",
    "predict",
    "preprocess",
    "read_folder",
    "source",
]

SCALE = (11.49, 3.87)
"""Micrometres per pixel across and down of the common scanner that the paper measures with."""


EXAMPLES = (
    ((174, 263, 112), 1.356311, 0.46774, 0.634401),
    ((116, 155, 43), 0.771846, 0.45472, None),
    ((313, 317, 298), 2.023217, 0.49248, None),
)
"""What the released weights measure in the release's three example scans: thickness, area, index, vessels' area."""


class Measures(NamedTuple):
    """What is measured in the window around the fovea; all zero, and `ok` False, where it does not fit."""

    thickness_um: Array
    """[3]: at -R, at the fovea, at +R, from left to right in the image."""
    area_mm2: Array
    cvi: Array
    """Vascularity index: pixels of vessels over pixels of the choroid."""
    vessel_area_mm2: Array
    ok: Array
    roi: Array
    """[H, W] bool: the pixels that area and index count."""
    upper: Array
    """[3, 2]: (x, y) where the thickness is measured, on the upper boundary."""
    lower: Array
    """[3, 2]: on the lower boundary."""


def measure(
    region: Bool[AnyArray, "h w"],
    vessel: Bool[AnyArray, "h w"],
    fovea_xy: Any = None,
    scale: Any = SCALE,
    macula_um: Any = 3000.0,
    *,
    axis: choroid.Axis = "image",
    perpendicular: choroid.Perpendicular = "vertical",
    cvi_row_offset: int = 0,
    released: bool = False,
) -> Measures:
    """Thickness, area and vascularity index of the choroid within `macula_um` of the fovea.

    Args:
        region: [H, W], one component (`choroid.largest_component`).
        vessel: [H, W].
        fovea_xy: (x, y) in pixels; None or NaN: the middle of the region.
        scale: (x, y) micrometres per pixel.
        macula_um: R, half the width of the window.
        axis: see `choroid.choroid_metrics`.
        perpendicular: likewise.
        cvi_row_offset: rows above a pixel of the window at which its vessel is looked up. 1 is the release, which reads
            outside of the region there.
        released: rounding, differences of rows and the lost last column as in the released code.
    """
    region, vessel = jnp.asarray(region, bool), jnp.asarray(vessel, bool)
    height = region.shape[0]
    found = choroid.choroid_metrics(
        *choroid.smart_crop(choroid.boundaries(region), released=released),
        fovea_xy,
        scale,
        height=height,
        macula_um=macula_um,
        axis=axis,
        perpendicular=perpendicular,
        released=released,
    )
    above = jnp.pad(vessel, ((cvi_row_offset, 0), (0, 0)))[:height]
    pixel = jnp.prod(jnp.asarray(scale, jnp.float32)) * 1e-6
    hits, count = (above & found.roi).sum(), found.roi.sum()
    index, area = hits / jnp.maximum(count, 1), hits * pixel
    if released:
        index, area = jnp.round(index, 5), jnp.round(area, 6)
    index = index.astype(jnp.float32)
    return Measures(found.thickness_um, found.area_mm2, index, area, found.ok, found.roi, found.upper, found.lower)


@jax.jit
def measured(region: Any, vessel: Any, fovea_xy: Any, scale: Any, macula_um: Any) -> Measures:
    """`measure` with its defaults, compiled once for each shape; a fovea of NaN is the middle of the region."""
    return measure(region, vessel, fovea_xy, scale, macula_um)


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 4e-3
    min_lr: float = 0.0
    weight_decay: float = 1e-2
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0
    region_weight: float = 1.0
    """Of the region's cross entropy and Dice in the loss."""
    vessel_weight: float = 1.0
    fovea_weight: float = 3.0
    """The blob is one pixel in a hundred: with 1 it is not learned before the schedule ends."""
    dice_weight: float = 1.0
    """Of soft Dice against cross entropy; 0 is cross entropy alone."""


@dataclass(frozen=True)
class Config(ScanConfig):
    """What training can set."""

    channels: tuple[int, ...] = (8, 16, 32, 32, 32)
    """Of each resolution; the release has 8 16 32 64 64 64 64 64."""
    augment: bool = True
    """Flip, turn, shear, stretch and shift training scans, and change their light and noise."""
    fovea_sigma: float = 6.0
    """Deviation in pixels of the blob around the fovea that the network learns."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require(self, "fovea_sigma", self.fovea_sigma > 0, "a number of pixels > 0")
        require_channels(self.channels)

    @property
    def network(self) -> UNet:
        """What is trained."""
        return UNet(self.channels)


def augmented(
    key: Key, image: Float[Array, "h w"], masks: Array, fovea: Float[Array, " 2"]
) -> tuple[Array, Array, Array]:
    """A scan as another eye or another light would have given it, its masks and its fovea moved alike.

    Half of the scans are flipped; half are turned (up to 8 degrees), sheared, stretched and shifted; brightness,
    contrast, gamma and speckle vary. Masks take the nearest pixel and stay masks.

    Args:
        key: of what happens.
        image: in 0..1.
        masks: [H, W] integers.
        fovea: (x, y); one that is not known, (-1, -1), is moved as a point too.
    """
    height, width = image.shape
    k = iter(jax.random.split(key, 14))
    chance = lambda: jax.random.bernoulli(next(k)).astype(jnp.float32)
    uniform = lambda low, high: jax.random.uniform(next(k), (), minval=low, maxval=high)
    mirror, moved = 1.0 - 2.0 * chance(), chance()
    turn, shear = moved * uniform(-0.14, 0.14), moved * uniform(-0.1, 0.1)
    stretch = [1.0 + moved * uniform(-0.1, 0.1) for _ in range(2)]
    shift = moved * jnp.stack([uniform(-0.05, 0.05) * width, uniform(-0.05, 0.05) * height])
    spin = jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]])
    forward = spin @ jnp.array([[stretch[0] * mirror, shear], [0.0, stretch[1]]])
    out, masks, fovea = warped(image, masks, fovea, forward, shift)
    gain, level = uniform(0.75, 1.25), out.mean()
    out = level + (out - level) * uniform(0.75, 1.25)
    out = jnp.clip(out * gain, 1e-4, 1.0) ** uniform(0.75, 1.33)
    out *= 1.0 + uniform(0.0, 0.15) * jax.random.normal(next(k), out.shape)
    return jnp.clip(out, 0.0, 1.0), masks, fovea


def augment(config: Config) -> Any:
    """(key, `Scans` of a batch) -> (images [B, H, W] in 0..1, `Targets`)."""

    def of_batch(key: Key, batch: Any) -> tuple[Array, Targets]:
        images, masks, fovea = batch
        x, known = images.astype(jnp.float32) / 255.0, fovea[:, 0] >= 0
        if config.augment:
            x, masks, fovea = jax.vmap(augmented)(jax.random.split(key, len(x)), x, masks, fovea)
        return x, Targets(masks, fovea, known)

    return of_batch


def source(config: Config) -> Source:
    """The training part, changed anew in each step."""
    return ArrayData(parts(config)[0], config.batch_size, per_seed=True, augment=augment(config))


def channels(targets: Targets, sigma: float) -> Float[Array, "b h w 3"]:
    """What the three channels should be: region, vessels, and exp(-r^2 / 2 sigma^2) around the fovea."""
    bump = lambda d: jnp.exp(-0.5 * jnp.square(d / sigma))
    x, y = from_fovea(targets)
    return oct_networks.channels(targets, bump(y) * bump(x))


def loss(sigma: float) -> Any:
    """`oct_networks.loss` with these channels."""
    return oct_networks.loss(lambda targets: channels(targets, sigma))


def choroidalyzer(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`.

    `predict(state, images [B, H, W])` gives probabilities [B, H, W, 3] of region, vessel and fovea.
    """
    config = configs.replace(config, **changes) if changes else config
    metrics = {
        "region_dice": mask_dice(REGION),
        "vessel_dice": mask_dice(VESSEL),
        "fovea": fovea_error(config.fovea_filter),
    }
    learner = supervised(
        model_of(config.network),
        loss(config.fovea_sigma),
        metrics,
        Optimiser("adamw", config.schedule, warmup=0.05, clip=True),
        num_steps=config.num_updates,
        hypers=config.hypers,
        config=config,
        name="choroidalyzer",
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/loss", "min"),
    )
    logits: Any = learner.predict
    return learner._replace(predict=lambda state, images: jax.nn.sigmoid(logits(state, images)))
