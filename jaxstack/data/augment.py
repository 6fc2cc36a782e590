"""Changes to images in training: pure functions of a key and one image, with its masks and boxes, or of a batch.

Functions of one image are meant for `jax.vmap`; `shift`, `flip`, `flip_boxes` and `mixup` take batches [N, H, W, C].
Some by name and strength, as `jaxstack train classifier --augment` has them: `CHANGES`, `changed`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError, unknown

Edge = Literal["zeros", "reflect"]
_PAD: dict[str, Any] = {"zeros": "constant", "reflect": "reflect"}
_MAP = {"zeros": "constant", "reflect": "mirror"}
_GREY = (0.299, 0.587, 0.114)


class Sample(NamedTuple):
    """An image and what is to be found in it; what moves the image moves all of it."""

    image: Array
    """[H, W, C]."""
    masks: Array | None = None
    """[H, W] or [H, W, K], integers or booleans."""
    boxes: Array | None = None
    """[G, 4] x1, y1, x2, y2 in pixels; of a box that leaves the image the sides meet."""


def mirrored(sample: Sample, turn: Any) -> Sample:
    """A sample mirrored left to right where `turn` is true."""
    image, masks, boxes = sample
    if boxes is not None:
        x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
        boxes = jnp.where(turn, jnp.stack([image.shape[1] - x2, y1, image.shape[1] - x1, y2], -1), boxes)
    back = lambda x: None if x is None else jnp.where(turn, x[:, ::-1], x)
    return Sample(jnp.where(turn, image[:, ::-1], image), back(masks), boxes)


def cropped(sample: Sample, at: Any, most: int, edge: Edge = "zeros") -> Sample:
    """A sample padded by `most` pixels on all sides, of which the window of its own size from `at` [2], row and column
    in 0..2 most, is cut; masks and boxes alike."""

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((most, most), (most, most), *((0, 0) for _ in x.shape[2:])), mode=_PAD[edge])
        return jax.lax.dynamic_slice(padded, (at[0], at[1], *(0 for _ in x.shape[2:])), x.shape)

    image, masks, boxes = sample
    if boxes is not None:
        boxes = inside(boxes + (most - jnp.asarray([at[1], at[0]] * 2)), image.shape)
    return Sample(cut(image), None if masks is None else cut(masks), boxes)


def inside(boxes: Array, shape: Sequence[int]) -> Array:
    """Boxes [G, 4] cut at the edges of an image of `shape` (H, W, ...)."""
    return jnp.clip(boxes, 0, jnp.asarray([shape[1], shape[0]] * 2, boxes.dtype))


def inverse(m: Array) -> Array:
    """Of a 2x2 matrix, in closed form."""
    adjoint = jnp.array([[m[1, 1], -m[0, 1]], [-m[1, 0], m[0, 0]]])
    return adjoint / (m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0])


def warped(sample: Sample, forward: Array, offset: Any = (0.0, 0.0), edge: Edge = "zeros") -> Sample:
    """A sample under the map p -> c + `offset` + `forward` (p - c) of its points (x, y), c its middle.

    Images are interpolated bilinearly, masks take the nearest pixel; a box becomes the box around its moved corners,
    cut at the image's edges.

    Args:
        sample: with a float image, [H, W] too.
        forward: [2, 2], invertible.
        offset: in pixels, (x, y).
        edge: what comes in.
    """
    image, masks, boxes = sample
    height, width = image.shape[:2]
    forward, offset = jnp.asarray(forward, jnp.float32), jnp.asarray(offset, jnp.float32)
    back = inverse(forward)
    middle = jnp.array([(width - 1) / 2, (height - 1) / 2])
    y, x = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in (height, width)), indexing="ij")
    far = jnp.stack([x, y], -1) - middle - offset
    at = [middle[i] + back[i, 0] * far[..., 0] + back[i, 1] * far[..., 1] for i in (1, 0)]

    def take(values: Array, order: int) -> Array:
        one = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=at, order=order, mode=_MAP[edge])
        flat = values.reshape(height, width, -1)
        return jax.vmap(one, in_axes=-1, out_axes=-1)(flat).reshape(values.shape)

    if masks is not None:
        masks = jnp.round(take(masks.astype(jnp.float32), 0)).astype(masks.dtype)
    if boxes is not None:
        # pixel i covers i to i + 1: its middle is i + 0.5 in the boxes' numbers
        corners = jnp.stack([boxes[:, [0, 2, 0, 2]], boxes[:, [1, 1, 3, 3]]], -1) - 0.5 - middle
        moved = corners @ forward.T + middle + offset + 0.5
        boxes = inside(jnp.concatenate([moved.min(1), moved.max(1)], -1), image.shape)
    return Sample(take(image, 1), masks, boxes)


def crop(key: Array, sample: Sample, most: int, edge: Edge = "zeros") -> Sample:
    """A sample moved by -most..most pixels along both axes: padded, then cut."""
    return cropped(sample, jax.random.randint(key, (2,), 0, 2 * most + 1), most, edge)


def mirror(key: Array, sample: Sample, chance: Any = 0.5) -> Sample:
    """A sample that is mirrored left to right with a chance."""
    return mirrored(sample, jax.random.bernoulli(key, chance))


def affine(
    key: Array,
    sample: Sample,
    turn: Any = 15.0,
    shear: Any = 7.5,
    scale: tuple[float, float] = (0.9, 1.1),
    offset: Any = 0.0,
    edge: Edge = "zeros",
) -> Sample:
    """A sample turned, sheared along its rows, scaled and moved about its middle, each uniformly drawn.

    Args:
        key: of the draws.
        sample: with a float image.
        turn, shear: degrees to both sides.
        scale: lowest and highest.
        offset: of the sides, to both sides.
        edge: what comes in.
    """
    k = jax.random.split(key, 4)
    both = lambda key, most, shape=(): jax.random.uniform(key, shape, minval=-1.0) * most
    angle, slope = (jnp.deg2rad(both(key, most)) for key, most in ((k[0], turn), (k[1], shear)))
    c, s, t = jnp.cos(angle), jnp.sin(angle), jnp.tan(slope)
    by = jax.random.uniform(k[2], (), minval=scale[0], maxval=scale[1])
    forward = by * jnp.array([[c, c * t - s], [s, s * t + c]])
    height, width = sample.image.shape[:2]
    return warped(sample, forward, both(k[3], offset, (2,)) * jnp.array([width, height]), edge)


def with_square(image: Array, middle: Array, size: int, fill: Any = 0.0) -> Array:
    """An image [H, W, C] with a square of `fill` around the pixel `middle` [2], row and column; cut at the edges."""
    at, low = (jnp.arange(n) for n in image.shape[:2]), middle - size // 2
    rows, columns = ((x >= first) & (x < first + size) for x, first in zip(at, low))
    return jnp.where((rows[:, None] & columns[None])[..., None], jnp.asarray(fill, image.dtype), image)


def cutout(key: Array, image: Array, size: int, fill: Any = 0.0) -> Array:
    """An image [H, W, C] with a square of `fill`, `size` pixels on a side (DeVries and Taylor, 2017).

    Its middle is uniform over the pixels, so it is cut at the image's edges.
    """
    return with_square(image, jax.random.randint(key, (2,), 0, jnp.array(image.shape[:2])), size, fill)


def erased(
    key: Array,
    image: Float[Array, "h w c"],
    area: tuple[float, float] = (0.05, 0.3),
    ratio: tuple[float, float] = (0.3, 3.3),
    noise: tuple[Any, Any] = (0.0, 1.0),
) -> Float[Array, "h w c"]:
    """An image with a random box replaced by Gaussian noise (Zhong et al., 2017).

    Args:
        key: of the draws.
        image: any.
        area: of the box, least and most, as shares of the image.
        ratio: of its sides, least and most; uniform in the logarithm.
        noise: mean and deviation.
    """
    height, width, _ = image.shape
    k = jax.random.split(key, 5)
    pixels = jax.random.uniform(k[0], (), minval=area[0], maxval=area[1]) * height * width
    sides = jnp.exp(jax.random.uniform(k[1], (), minval=np.log(ratio[0]), maxval=np.log(ratio[1])))
    tall, wide = (jnp.minimum(jnp.sqrt(pixels * r), n) for r, n in ((sides, height), (1.0 / sides, width)))
    top, left = (jax.random.uniform(key) * (n - side) for key, n, side in ((k[2], height, tall), (k[3], width, wide)))
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
    within = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
    return jnp.where(within[..., None], noise[0] + noise[1] * jax.random.normal(k[4], image.shape), image)


def blurred(image: Float[Array, "h w c"], sigma: Array) -> Float[Array, "h w c"]:
    """Gaussian blur of `sigma` pixels, which may be traced; 0 changes nothing.

    Products with two band matrices whose rows sum to one, so that edges do not darken.
    """
    width = jnp.maximum(sigma, 1e-3)

    def band(n: int) -> Array:
        far = jnp.arange(n, dtype=jnp.float32)
        kernel = jnp.exp(-0.5 * jnp.square((far[:, None] - far) / width))
        return kernel / kernel.sum(1, keepdims=True)

    return jnp.einsum("ai,ijc,bj->abc", band(image.shape[0]), image, band(image.shape[1]))


def blur(key: Array, image: Float[Array, "h w c"], most: Any = 1.0) -> Float[Array, "h w c"]:
    """Gaussian blur of 0 to `most` pixels."""
    return blurred(image, most * jax.random.uniform(key))


def recoloured(image: Float[Array, "h w c"], light: Any, contrast: Any, saturation: Any) -> Float[Array, "h w c"]:
    """An image in 0..1 times `light`, then its distance from its mean grey times `contrast`, then from each pixel's
    grey times `saturation`; cut to 0..1 after each. 1 changes nothing. Only three channels have a saturation."""
    grey = lambda x: (x @ jnp.asarray(_GREY))[..., None] if x.shape[-1] == 3 else x
    x = jnp.clip(light * image, 0.0, 1.0)
    level = grey(x).mean()
    x = jnp.clip(level + contrast * (x - level), 0.0, 1.0)
    return jnp.clip(grey(x) + saturation * (x - grey(x)), 0.0, 1.0) if x.shape[-1] == 3 else x


def colour(key: Array, image: Float[Array, "h w c"], most: Any = 0.4) -> Float[Array, "h w c"]:
    """Light, contrast and saturation of an image in 0..1 times 1 - most to 1 + most, each with its own draw."""
    return recoloured(image, *(1.0 + most * jax.random.uniform(key, (3,), minval=-1.0)))


def mixed(x: Array, share: Any) -> Array:
    """share x + (1 - share) x[::-1]."""
    return share * x + (1.0 - share) * x[::-1]


def mixup(key: Array, x: Array, y: Array, alpha: Any) -> tuple[Array, Array]:
    """Mix a batch with its reverse: l x + (1 - l) x[::-1], the targets alike, one l ~ Beta(alpha, alpha) (Zhang et al.,
    2018).

    Args:
        key: of l.
        x: [B, ...]; an odd B is left as it is.
        y: targets [B, L], numbers: classes as one-hot rows.
        alpha: may be traced; 0 leaves the batch.
    """
    if len(x) % 2:
        return x, y
    drawn = jax.random.beta(key, jnp.maximum(alpha, 1e-3), jnp.maximum(alpha, 1e-3))
    share = jnp.where(jnp.asarray(alpha) > 0, drawn, 1.0).astype(jnp.float32)
    return mixed(x, share), mixed(y, share)


def shift(key: Array, images: Array, most: int, edge: Edge = "zeros") -> Array:
    """Images moved by -most..most pixels along both axes: padded, then cut.

    Args:
        key: a random key.
        images: [N, H, W, C] of any type.
        most: pixels.
        edge: what comes in: zeros, or the image reflected at its edge.
    """
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    return jax.vmap(lambda image, at: cropped(Sample(image), at, most, edge).image)(images, starts)


def flip_boxes(key: Array, images: Array, boxes: Array) -> tuple[Array, Array]:
    """Images of which every other one, at random, is mirrored left to right with its boxes.

    Args:
        key: a random key.
        images: [N, H, W, C] of any type.
        boxes: [N, G, 4] x1, y1, x2, y2 in pixels.
    """
    turns = jax.random.bernoulli(key, 0.5, (len(images),))
    found = jax.vmap(mirrored)(Sample(images, None, boxes), turns)
    return found.image, jnp.asarray(found.boxes)


def flip(key: Array, images: Array) -> Array:
    """Images of which every other one, at random, is mirrored left to right."""
    return jax.vmap(mirrored)(Sample(images), jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))[:, 0, 0, 0]).image


class Strength(NamedTuple):
    """The number of a change."""

    usual: float | None
    """Where none is given; None: a quarter of the image's side."""
    least: float
    most: float
    what: str


CHANGES = {
    "affine": Strength(15.0, 0.0, 180.0, "degrees"),
    "blur": Strength(1.0, 0.0, np.inf, "pixels, the largest deviation"),
    "colour": Strength(0.4, 0.0, 1.0, "largest relative change"),
    "cutout": Strength(None, 1.0, np.inf, "pixels of the square's side"),
    "erase": Strength(0.5, 0.0, 1.0, "chance of a box of noise"),
    "mixup": Strength(0.2, 0.0, np.inf, "alpha of Beta(alpha, alpha)"),
}
"""What `--augment` knows."""


def parse(entries: Sequence[str], side: int) -> tuple[tuple[str, float], ...]:
    """Names and strengths of entries NAME or NAME=NUMBER, for images of `side` pixels.

    Raises:
        UserError: for an unknown or repeated name, and a number that is none or does not fit.
    """
    found: dict[str, float] = {}
    for entry in entries:
        name, given, text = entry.partition("=")
        if (elsewhere := {"crop": "--shift PIXELS", "shift": "--shift PIXELS", "flip": "--flip"}.get(name)) is not None:
            raise UserError(f"augment={entry}: expected {elsewhere}, an option of its own")
        if name not in CHANGES:
            raise unknown("augment", name, CHANGES)
        if name in found:
            raise UserError(f"augment={entry}: found {name} twice, expected it once")
        usual, least, most, what = CHANGES[name]
        most = side if name == "cutout" else most
        try:
            value = float(text) if given else max(1, side // 4) if usual is None else usual
        except ValueError:
            value = np.nan
        if not least <= value <= most or not np.isfinite(value) or (name == "cutout" and value != round(value)):
            to = "or more" if np.isinf(most) else f"to {most:g}"
            raise UserError(f"augment={entry}: expected a number, {least:g} {to} ({what})")
        found[name] = float(value)
    return tuple(found.items())


def changed(
    key: Array,
    images: Float[Array, "n h w c"],
    changes: Sequence[tuple[str, float]],
    edge: Edge = "zeros",
    moments: tuple[float, float] = (0.0, 1.0),
) -> Float[Array, "n h w c"]:
    """Images after the changes of `parse`, in their order, each image with draws of its own; all but mixup, which needs
    targets. affine=D turns by up to D degrees, shears by half as many, and scales by 1 - D / 150 to 1 + D / 150.

    Args:
        key: of all draws.
        images: in 0..1.
        changes: names and strengths.
        edge: what comes in where images move.
        moments: mean and deviation of the noise that erased boxes get.
    """

    def one(key: Array, image: Array) -> Array:
        for n, (name, strength) in enumerate(changes):
            own = jax.random.fold_in(key, n)
            if name == "affine":
                by = min(strength, 45.0) / 150.0
                image = affine(own, Sample(image), strength, strength / 2, (1.0 - by, 1.0 + by), edge=edge).image
            elif name == "blur":
                image = blur(own, image, strength)
            elif name == "colour":
                image = colour(own, image, strength)
            elif name == "cutout":
                image = cutout(own, image, int(strength))
            elif name == "erase":
                k_chance, k_box = jax.random.split(own)
                box = erased(k_box, image, (0.02, 0.4), noise=moments)
                image = jnp.where(jax.random.bernoulli(k_chance, strength), box, image)
        return image

    return jax.vmap(one)(jax.random.split(key, len(images)), images)
