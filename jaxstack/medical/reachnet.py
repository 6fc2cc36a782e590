"""REACHNet (Burke, Engelmann et al., 2024): Choroidalyzer's outputs, robust to scanner, resolution and artefacts.

Three parts: `ReachNet` (attention on a grid of tokens whatever the resolution, fewer and larger steps of resolution),
`reach_augment` (affine maps, shadows of retinal vessels and speckle, as scanners give them), and training on several
resolutions, each step on one. `reachnet` is the learner, `multires_batches` serves loops of one's own. Inputs, outputs
and what is measured in them are those of Choroidalyzer. Not a medical device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core import config as configs
from jaxstack.core.config import require
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.augment import inverse
from jaxstack.data.sources import RandomData
from jaxstack.medical.oct_networks import (
    FOVEA,
    REGION,
    VESSEL,
    ScanConfig,
    Scans,
    Targets,
    channels,
    eval_source,
    fovea_error,
    from_fovea,
    load_weights,
    loss,
    mask_dice,
    model_of,
    own_resolutions,
    parts,
    phantom_scans,
    predict,
    preprocess,
    warped,
)
from jaxstack.medical.segmentation import dice
from jaxstack.nn.supervised import Optimiser, supervised
from jaxstack.nn.vision.reachnet import ReachNet
from jaxstack.nn.vision.unet import require_channels

__all__ = [
    "Config",
    "Hypers",
    "Ranges",
    "ReachNet",
    "Scans",
    "Targets",
    "View",
    "affine",
    "at_size",
    "fovea_disc",
    "intensity",
    "load_weights",
    "multires_batches",
    "of_one_size",
    "phantom_scans",
    "predict",
    "preprocess",
    "reach_augment",
    "reachnet",
    "shadow",
    "source",
    "speckle",
]

FOVEA_RADIUS = 0.025
"""Of the disc that the fovea's channel learns, over the scan's width. The paper's is not known, and its Dice of the
fovea depends on it."""
MOST_SHADOWS = 6


class View(NamedTuple):
    """A scan with what is to be found in it, and the size of its pixels."""

    image: Any
    """[H, W] float in 0..1; of several scans [B, H, W]."""
    masks: Any
    """[H, W] integers: 1 where region, 2 where vessel, 3 where both."""
    fovea: Any
    """[2]: column and row."""
    scale: Any
    """[2]: micrometres per pixel across and down."""


class Ranges(NamedTuple):
    """What augmentations are drawn from, uniformly; ours, as the paper's are not public."""

    chance: float = 0.5
    """Of each: a flip, an affine map, shadows, speckle."""
    turn: float = 15.0
    """Degrees to both sides."""
    shear: float = 10.0
    """Degrees to both sides."""
    across: tuple[float, float] = (0.8, 1.3)
    """Stretch of the columns: scanners differ in micrometres per pixel."""
    down: tuple[float, float] = (0.7, 1.2)
    shift: float = 0.05
    """Of height and width, to both sides."""
    shadows: tuple[int, int] = (1, MOST_SHADOWS)
    """How many, fewest and most; at most 6."""
    shadow_width: tuple[float, float] = (4 / 768, 25 / 768)
    """Over the scan's width."""
    shadow_gamma: tuple[float, float] = (1.2, 3.0)
    """The exponent inside."""
    shadow_top: tuple[float, float] = (0.05, 0.25)
    """How far above the choroid a shadow begins, over the scan's height: within the retina."""
    speckle: tuple[float, float] = (0.05, 0.35)
    """Deviation of the factor."""
    gain: tuple[float, float] = (0.75, 1.25)
    contrast: tuple[float, float] = (0.75, 1.25)
    gamma: tuple[float, float] = (0.75, 1.33)


def affine(view: View, forward: Float[Array, "2 2"], shift: Any = (0.0, 0.0)) -> View:
    """A scan under the map p -> c + `shift` + `forward` (p - c) of its points, c its middle: all of it moves alike.

    Masks take the nearest pixel and stay masks. The scale follows: a new pixel is as wide as what it shows, so a scan
    stretched by 1.3 has pixels of 1 / 1.3 the width.

    Args:
        view: one scan.
        forward: in pixels, (x, y).
        shift: in pixels, (x, y).
    """
    forward = jnp.asarray(forward, jnp.float32)
    image, masks, fovea = warped(view.image, view.masks, view.fovea, forward, jnp.asarray(shift, jnp.float32))
    # what a step to the next pixel, right or down, is in the old scan, in micrometres
    steps = inverse(forward) * jnp.asarray(view.scale)[:, None]
    return View(image, masks, fovea, jnp.sqrt(jnp.square(steps).sum(0)))


def shadow(
    image: Float[Array, "h w"],
    top: Float[Array, " w"],
    middle: Float[Array, " n"],
    width: Float[Array, " n"],
    gamma: Float[Array, " n"],
    above: Float[Array, " n"],
) -> Float[Array, "h w"]:
    """Darken columns as vessels of the retina above do: x^gamma inside, with soft edges; where several meet, the
    darkest counts.

    Args:
        image: in 0..1.
        top: row of the choroid's upper boundary in each column.
        middle: columns of the shadows.
        width: in columns.
        gamma: exponent inside, at least 1.
        above: rows above the choroid at which each begins.
    """
    height, columns = image.shape
    x, y = jnp.arange(columns, dtype=jnp.float32), jnp.arange(height, dtype=jnp.float32)[:, None]
    far = jnp.abs(x - middle[:, None])
    across = jax.nn.sigmoid((width[:, None] / 2 - far) / (0.15 * width[:, None] + 0.1))
    below = jax.nn.sigmoid(y - (top - above[:, None, None]))
    exponent = 1.0 + ((gamma - 1.0)[:, None, None] * across[:, None] * below).max(0)
    return jnp.clip(image, 0.0, 1.0) ** exponent


def speckle(key: Key, image: Float[Array, "h w"], sigma: Any) -> Float[Array, "h w"]:
    """x (1 + sigma n), n of the standard normal distribution for each pixel."""
    return image * (1.0 + sigma * jax.random.normal(key, image.shape))


def intensity(key: Key, image: Float[Array, "h w"], ranges: Ranges = Ranges()) -> Float[Array, "h w"]:
    """Another contrast, brightness and gamma; in 0..1."""
    k = jax.random.split(key, 3)
    gain, contrast, gamma = (
        jax.random.uniform(each, (), minval=low, maxval=high)
        for each, (low, high) in zip(k, (ranges.gain, ranges.contrast, ranges.gamma))
    )
    level = image.mean()
    return jnp.clip((level + (image - level) * contrast) * gain, 1e-4, 1.0) ** gamma


def reach_augment(
    key: Key,
    image: Float[Array, "h w"],
    masks: Array,
    fovea: Any = (-1.0, -1.0),
    scale: Any = (1.0, 1.0),
    ranges: Ranges = Ranges(),
    domain: bool = True,
) -> View:
    """A scan as another eye, scanner or light would have given it: flip, affine map, shadows, speckle, intensity.

    Each but the last happens with the chance of `ranges`. Flip and affine map move masks, fovea and scale, the others
    leave them as they are.

    Args:
        key: of what happens.
        image: in 0..1.
        masks: integers, bit 1 the region.
        fovea: (x, y); one that is not known is moved as a point too.
        scale: (x, y) micrometres per pixel.
        ranges: what is drawn from.
        domain: False leaves out affine map, shadows and speckle: the generic augmentation that the paper compares with.
    """
    height, width = image.shape
    k = iter(jax.random.split(key, 20))
    chance = lambda: jax.random.bernoulli(next(k), ranges.chance).astype(jnp.float32)
    uniform = lambda limits, shape=(): jax.random.uniform(next(k), shape, minval=limits[0], maxval=limits[1])
    both = lambda limit: (-limit, limit)
    flip = chance()
    turned = lambda x: jnp.where(flip > 0, x[:, ::-1], x)
    fovea = jnp.asarray(fovea, jnp.float32)
    fovea = jnp.stack([jnp.where(flip > 0, width - 1 - fovea[0], fovea[0]), fovea[1]])
    view = View(turned(image), turned(masks), fovea, jnp.asarray(scale, jnp.float32))
    if domain:
        moved = chance()
        turn, lean = (moved * jnp.deg2rad(uniform(both(limit))) for limit in (ranges.turn, ranges.shear))
        across, down = (1.0 + moved * (uniform(limits) - 1.0) for limits in (ranges.across, ranges.down))
        shift = moved * ranges.shift * uniform((-1.0, 1.0), (2,)) * jnp.array([width, height])
        spin = jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]])
        view = affine(view, spin @ jnp.array([[across, across * jnp.tan(lean)], [0.0, down]]), shift)
        n = (MOST_SHADOWS,)
        many = jax.random.randint(next(k), (), ranges.shadows[0], ranges.shadows[1] + 1)
        on = chance() * (jnp.arange(MOST_SHADOWS) < many)
        dark = shadow(
            view.image,
            upper(view.masks),
            uniform((0.0, width - 1.0), n),
            uniform(ranges.shadow_width, n) * width,
            1.0 + on * (uniform(ranges.shadow_gamma, n) - 1.0),
            uniform(ranges.shadow_top, n) * height,
        )
        grain = chance() * uniform(ranges.speckle)
        view = view._replace(image=speckle(next(k), dark, grain))
    return view._replace(image=intensity(next(k), view.image, ranges))


def upper(masks: Array) -> Float[Array, " w"]:
    """The region's first row in each column; elsewhere the mean over the columns that have one, or the middle row."""
    region = (masks & 1) > 0
    has, first = region.any(0), region.argmax(0).astype(jnp.float32)
    count = has.sum()
    mean = jnp.where(count > 0, jnp.where(has, first, 0.0).sum() / jnp.maximum(count, 1), masks.shape[0] / 2)
    return jnp.where(has, first, mean)


def at_size(view: View, size: tuple[int, int]) -> View:
    """Scans [B, H, W] in other rows and columns: images bilinear, averaged where they shrink; masks by the nearest
    pixel, so that they stay masks of the same physical area; fovea and scale follow."""
    count, height, width = view.image.shape
    if (height, width) == tuple(size):
        return view
    shape = (count, *size)
    image = jax.image.resize(view.image, shape, "linear")
    masks = jax.image.resize(view.masks, shape, "nearest")
    ratio = jnp.array([size[1] / width, size[0] / height], jnp.float32)
    return View(image, masks, (view.fovea + 0.5) * ratio - 0.5, view.scale / ratio)


_at_size = jax.jit(at_size, static_argnums=1)


def multires_batches(
    key: Key,
    ds: Scans,
    sizes: Sequence[tuple[int, int]],
    batch_size: int = 8,
    *,
    scale: Any = (1.0, 1.0),
    constant_pixels: bool = False,
) -> Iterator[View]:
    """Endless batches of scans, each of one of `sizes`, for a training loop whose step is compiled once per size.

    Args:
        key: of what is drawn: rows without replacement within a batch, and the size.
        ds: scans, all of one size, at least `batch_size`.
        sizes: rows and columns.
        batch_size: scans of a batch of the largest size.
        scale: (x, y) micrometres per pixel, [2] or [M, 2].
        constant_pixels: take more scans of a smaller size, so that batches have about as many pixels.

    Raises:
        UserError: for no size, or fewer scans than a batch needs.
    """
    areas = [h * w for h, w in sizes]
    if not areas or min(areas) < 1:
        raise UserError(f"sizes={tuple(sizes)}: expected at least one pair of rows and columns")
    counts = [batch_size * (max(areas) // a if constant_pixels else 1) for a in areas]
    if batch_size < 1 or max(counts) > len(ds.images):
        raise UserError(
            f"batch_size={batch_size}: expected 1 to {len(ds.images)} scans, found {max(counts)} in a batch"
        )
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    scales = np.broadcast_to(np.asarray(scale, np.float32), (len(ds.images), 2))
    while True:
        i = int(rng.integers(len(areas)))
        rows = rng.permutation(len(ds.images))[: counts[i]]
        images = jnp.asarray(ds.images[rows], jnp.float32) / (255.0 if ds.images.dtype == np.uint8 else 1.0)
        view = View(images, jnp.asarray(ds.masks[rows]), jnp.asarray(ds.fovea[rows]), jnp.asarray(scales[rows]))
        yield _at_size(view, tuple(sizes[i]))


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 4e-3
    min_lr: float = 0.0
    weight_decay: float = 1e-2
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0
    ema_decay: float = 0.95
    """Of the averages of weights and statistics, which are the final model."""
    region_weight: float = 1.0
    """Of the region's cross entropy and Dice in the loss."""
    vessel_weight: float = 1.0
    fovea_weight: float = 3.0
    """Larger, as the disc is about one pixel in three hundred."""
    dice_weight: float = 1.0
    """Of soft Dice against cross entropy; 0 is cross entropy alone."""


@dataclass(frozen=True)
class Config(ScanConfig):
    """What training can set."""

    channels: str = "8_quadruplemax-64"
    """Of each resolution: N_same, N_double, N_doublemax-M, N_quadruple, N_quadruplemax-M, or numbers with commas."""
    factors: tuple[int, ...] = (4, 4)
    """By which each level reduces the resolution; at 768 x 768 the product should be 64, as of 4 4 4."""
    attention: bool = True
    """A transformer block on the smallest maps."""
    cap: int | None = 8
    """Most rows and columns of its tokens, of which 768 / (product of factors) would be too many for small scans."""
    residual: bool = False
    """A 1x1 convolution past each block."""
    augmentation: Literal["none", "generic", "domain"] = "domain"
    """generic: flips and light; domain: affine maps, shadows and speckle too."""
    crop: tuple[int, int] | None = None
    """Rows and columns that are cut out of training scans at random places; none: the whole scan."""
    resolutions: tuple[float, ...] = (1.0, 0.75, 0.5)
    """Of training scans, over that of `size`; each step takes one of them."""
    ema_from: float = 0.5
    """Share of the updates after which the averages are kept."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require(self, "factors", len(self.factors) > 0, "at least one")
        require_channels(self.network.widths, self.factors)
        require(self, "cap", self.cap is None or self.cap >= 1, "at least 1, or none")
        if self.attention:
            require(self, "channels", self.network.widths[-1] % 8 == 0, "a last number that eight heads divide")
        if self.crop is not None:
            fits = all(16 <= c <= n for c, n in zip(self.crop, self.size))
            require(self, "crop", fits, f"at least 16, at most the {self.size[0]} rows and {self.size[1]} columns")
        require(self, "resolutions", len(self.resolutions) > 0, "at least one")
        small = all(0 < r <= 4 and min(size) >= 8 for r, size in zip(self.resolutions, self.sizes))
        require(self, "resolutions", small, "numbers > 0, at most 4, that leave at least 8 rows and columns")
        require(self, "ema_from", 0 <= self.ema_from <= 1, "a number in [0, 1]")
        require(self, "hypers.ema_decay", 0 <= self.hypers.ema_decay <= 1, "a number in [0, 1]")

    @property
    def network(self) -> ReachNet:
        """What is trained."""
        return ReachNet(
            self.channels, factors=self.factors, attend=self.attention, cap=self.cap, residual=self.residual
        )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of training scans, one for each resolution."""
        height, width = self.size if self.crop is None else self.crop
        return tuple((round(r * height), round(r * width)) for r in self.resolutions)


class Drawn(NamedTuple):
    """A training batch before it has a resolution."""

    which: Any
    """Number of the resolution, the same for all seeds of a run, so that each step runs one of the programs."""
    key: Any
    scans: Scans


class ResolutionData(RandomData):
    """Scans kept on the device. Each step and seed draws rows; each step draws one of `count` resolutions.

    Args:
        scans: of one size.
        batch_size: rows of a step.
        resolutions: how many.
        seed: of the order of resolutions.
        allowed: [R, M] bool, which scans a step of each resolution may draw; None: all.
    """

    def __init__(self, scans: Scans, batch_size: int, resolutions: int, seed: int = 0, allowed: Any = None):
        super().__init__(scans, batch_size, augment=with_key)
        self.resolutions, self.draws, self.limited = resolutions, seed, allowed is not None
        if allowed is not None:
            # the allowed rows first, in the order of the scans
            order = np.argsort(~np.asarray(allowed), 1, kind="stable").astype(np.int32)
            self.arrays = (self.arrays, order, np.asarray(allowed).sum(1).astype(np.int32))

    def computes_from(self) -> Any:
        return super().computes_from(), self.resolutions, self.limited

    def item(self, seeds: Sequence[int]) -> np.ndarray:
        return np.zeros((), np.int32)

    def items(self, start: int, count: int, seeds: Sequence[int], out: np.ndarray) -> None:
        for i in range(count):
            out[i] = resolution_of(start + i, self.resolutions, self.draws)

    def _rows(self, constants: Any, item: Any, key: Key) -> Any:
        if not self.limited:
            return item, super()._rows(constants, (), key)
        scans, order, counts = constants
        drawn = jax.random.randint(jax.random.fold_in(key, 2 + self.seed), (self.batch_size,), 0, counts[item])
        return item, jax.tree.map(lambda x: x[order[item, drawn]], scans)


def resolution_of(step: int, count: int, seed: int = 0) -> np.int32:
    """Which of `count` resolutions a step trains on: each once in `count` steps, in an order that is drawn."""
    turn, at = divmod(step, count)
    return np.int32(np.random.default_rng((seed, turn)).permutation(count)[at])


def with_key(key: Key, batch: Any) -> Drawn:
    """(number of the resolution, `Scans`) as `Drawn`: the `augment` of a source, whose changes the step makes."""
    which, scans = batch
    return Drawn(which, key, Scans(*scans))


def source(config: Config) -> Source:
    """The training part. A scan whose own resolution is told is not drawn at a higher one, which it has not.

    Raises:
        UserError: for a resolution of training that no scan has.
    """
    own, wanted = own_resolutions(config), np.asarray(config.resolutions)
    allowed = None
    if np.isfinite(own).any():
        # up to rounding: a scan of 576 rows in 768 has .75
        allowed = own[None] >= wanted[:, None] * (1.0 - 1e-3)
        if not allowed.any(1).all():
            missing = float(wanted[~allowed.any(1)].max())
            raise UserError(f"resolutions={missing:g}: expected at most {own.max():g}, the largest in {config.data}")
    return ResolutionData(parts(config)[0], config.batch_size, len(config.resolutions), config.data_seed, allowed)


def cropped(key: Key, view: View, size: tuple[int, int]) -> View:
    """One scan cut to `size` rows and columns at a place that is drawn."""
    height, width = view.image.shape
    k_top, k_left = jax.random.split(key)
    top, left = (jax.random.randint(k, (), 0, n - m + 1) for k, n, m in zip((k_top, k_left), (height, width), size))
    cut = lambda x: jax.lax.dynamic_slice(x, (top, left), size)
    return View(cut(view.image), cut(view.masks), view.fovea - jnp.stack([left, top]), view.scale)


def prepared(config: Config, size: tuple[int, int], batch: Drawn) -> tuple[Array, Targets]:
    """What a step of one resolution is given: scans cut, resized and changed, and their targets."""
    images, masks, fovea = batch.scans
    known = fovea[:, 0] >= 0
    k_crop, k_change = jax.random.split(batch.key)
    count = len(images)
    view = View(images.astype(jnp.float32) / 255.0, masks, fovea, jnp.ones((count, 2)))
    if config.crop is not None:
        cut = partial(cropped, size=config.crop)
        view = jax.vmap(cut)(jax.random.split(k_crop, count), view)
    view = at_size(view, size)
    if config.augmentation != "none":
        change = partial(reach_augment, domain=config.augmentation == "domain")
        view = jax.vmap(change)(jax.random.split(k_change, count), *view)
    whole = size[1] * config.size[1] / (config.size if config.crop is None else config.crop)[1]
    return view.image, Targets(view.masks, view.fovea, known, jnp.full(count, whole))


def fovea_disc(targets: Targets, radius: float = FOVEA_RADIUS) -> Float[Array, "b h w"]:
    """1 within `radius` (over the width of the whole scan, also in a part of it) of the fovea, else 0."""
    x, y = from_fovea(targets)
    width = jnp.asarray(targets.masks.shape[2] if isinstance(targets.width, tuple) else targets.width)
    return (jnp.hypot(x, y) <= radius * width.reshape(-1, 1, 1)).astype(jnp.float32)


def wanted(targets: Targets) -> Float[Array, "b h w 3"]:
    """What the three channels should be."""
    return channels(targets, fovea_disc(targets))


def fovea_dice(logits: Array, targets: Targets, hypers: Any) -> Array:
    """Dice of the fovea's disc, for each scan; 1 for one whose fovea is not known."""
    return jnp.where(targets.known, dice(logits[..., FOVEA] >= 0.0, fovea_disc(targets) > 0), 1.0)


def _in_sight(error: Any) -> Any:
    """The error in columns of foveas that are in the scan: training scans may be cut or moved beside theirs."""

    def of_batch(logits: Array, targets: Targets, hypers: Any) -> Array:
        inside = (targets.fovea >= 0).all(-1) & (targets.fovea < jnp.array(targets.masks.shape[:0:-1])).all(-1)
        return error(logits, targets._replace(known=targets.known & inside), hypers)

    return of_batch


def of_one_size(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner whose step takes a batch (images [B, H, W] in 0..1, `Targets`) of any one size, as
    `multires_batches` gives them: for loops of one's own. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    metrics = {"region_dice": mask_dice(REGION), "vessel_dice": mask_dice(VESSEL), "fovea_dice": fovea_dice}
    metrics |= {"fovea": _in_sight(fovea_error(config.fovea_filter))}
    learner = supervised(
        model_of(config.network),
        loss(wanted),
        metrics,
        Optimiser("adamw", config.schedule, warmup=0.05, clip=True),
        num_steps=config.num_updates,
        hypers=config.hypers,
        ema=True,
        ema_from=config.ema_from,
        config=config,
        name="reachnet",
        batch_size=config.batch_size,
        eval_source=eval_source,
        objective=("eval/loss", "min"),
    )
    logits: Any = learner.predict
    return learner._replace(predict=lambda state, images: jax.nn.sigmoid(logits(state, images)))


def reachnet(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`.

    Its program has a branch for each resolution, and each step runs one of them. `predict(state, images [B, H, W])`
    gives probabilities [B, H, W, 3] of region, vessel and fovea.
    """
    config = configs.replace(config, **changes) if changes else config
    learner = of_one_size(config)
    inner: Any = learner.step

    def step(state: Any, batch: Drawn) -> tuple[Any, Any]:
        branches = [lambda s, b, size=size: inner(s, prepared(config, size, b)) for size in config.sizes]
        return branches[0](state, batch) if len(branches) == 1 else jax.lax.switch(batch.which, branches, state, batch)

    return learner._replace(step=step, source=source)
