"""Colour photographs of the back of the eye: what several methods do to them before or while they learn."""

import csv
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key
from jaxstack.data.augment import blurred
from jaxstack.medical.io import read_colour
from jaxstack.nn.conv import Conv
from jaxstack.nn.vision.layers import max_pool

HAZE = (0.85, 0.65, 0.5)
"""Colour that haze blends towards."""
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, per channel."""


def border_box(image: np.ndarray, threshold: float = 20.0, margin: int = 5) -> tuple[slice, slice]:
    """Rows and columns of a photograph without the black around it, square where the image allows.

    The box of pixels whose mean over colours is above `threshold` grows by `margin` on each side; the shorter side is
    then extended by half of the difference on each side, as far as there are pixels.

    Args:
        image: [H, W, 3] uint8.
        threshold: grey level, of 255.
        margin: pixels.

    Raises:
        UserError: where no pixel is brighter than the threshold.
    """
    bright = image.mean(2) > threshold
    if not bright.any():
        raise UserError(
            f"image: no pixel is brighter than {threshold:g} of 255, brightest mean {image.mean(2).max():g}"
        )
    edges = []
    for axis, length in ((1, image.shape[0]), (0, image.shape[1])):
        at = np.flatnonzero(bright.any(axis))
        edges.append([max(at[0] - margin, 0), min(at[-1] + 1 + margin, length)])
    (top, bottom), (left, right) = edges
    more = (bottom - top) - (right - left)
    side, length = (edges[1], image.shape[1]) if more > 0 else (edges[0], image.shape[0])
    side[0], side[1] = max(side[0] - abs(more) // 2, 0), min(side[1] + abs(more) // 2, length)
    return slice(*map(int, edges[0])), slice(*map(int, edges[1]))


def crop_black_borders(image: np.ndarray, threshold: float = 20.0, margin: int = 5) -> np.ndarray:
    """What `border_box` keeps of a photograph [H, W, 3] uint8. Raises `UserError` as it does."""
    return image[border_box(image, threshold, margin)]


def read_pixels(path: str | Path) -> np.ndarray:
    """An image file (PNG, JPEG, TIFF, BMP, DICOM; 8 or 16 bits) as RGB [H, W, 3] uint8.

    Raises:
        UserError: for a file that is no image, is broken, or has several frames; the message names it.
    """
    return read_colour(path)


def photograph(pixels: np.ndarray, size: int) -> np.ndarray:
    """A photograph [H, W, 3] uint8 without its black borders, [size, size, 3] (bilinear). Raises `UserError` where all
    of it is black."""
    cropped = crop_black_borders(pixels)
    return np.asarray(Image.fromarray(cropped).resize((size, size), Image.Resampling.BILINEAR))


def read_photograph(path: str | Path, size: int) -> np.ndarray:
    """`photograph` of a file. Raises `UserError` as `read_pixels`, and where all of it is black."""
    try:
        return photograph(read_pixels(path), size)
    except UserError as e:
        raise UserError(str(e) if str(e).startswith(f"{path}: ") else f"{path}: {e}") from e


def read_table(folder: str | Path, name: str, column: str) -> list[tuple[int, Path, str]]:
    """(line, path of the photograph, text of `column`) of each row of a CSV file with columns file and `column`.

    Raises:
        UserError: for a missing table, or one without these columns or without rows.
    """
    table = Path(folder) / name
    try:
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as e:
        raise UserError(f"{table}: cannot be read ({e.strerror or e}); expected a table of file, {column}") from e
    if not rows or not {"file", column} <= set(rows[0]):
        raise UserError(f"{table}: found columns {', '.join(rows[0]) if rows else 'none'}, expected file, {column}")
    return [(line, Path(folder) / (row["file"] or ""), row[column] or "") for line, row in enumerate(rows, 2)]


def degrade(key: Key, image: Float[Array, "n n 3"], severity: Array) -> Float[Array, "n n 3"]:
    """A worse photograph of the same eye: blur, haze, uneven light, contrast, brightness, gamma, noise of the sensor.

    Nothing moves out of view. The paper does not list its degradations; these and their ranges are ours.

    Args:
        key: of what happens, and how much of it.
        image: in 0..1, black outside the field of view.
        severity: 0 (noise of deviation 0.01 alone) to 1; may be traced.
    """
    n = image.shape[0]
    k = iter(jax.random.split(key, 16))
    chance = lambda p: jax.random.bernoulli(next(k), p).astype(jnp.float32)
    uniform = lambda low=0.0, high=1.0: jax.random.uniform(next(k), (), minval=low, maxval=high)
    seen = (image.max(-1, keepdims=True) > 0).astype(jnp.float32)
    y, x = jnp.meshgrid(*[(jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 0.5] * 2, indexing="ij")
    out = blurred(image, chance(0.8) * severity * uniform(0.2) * 0.022 * n)
    far = jnp.square(y - uniform(-0.5, 0.5)) + jnp.square(x - uniform(-0.5, 0.5))
    veil = jnp.exp(-0.5 * far / jnp.square(uniform(0.2, 0.5))) * chance(0.6) * 0.75 * severity * uniform()
    out += veil[..., None] * (jnp.asarray(HAZE) - out)
    angle = uniform(0.0, 2.0 * np.pi)
    ramp = 0.5 + (jnp.cos(angle) * y + jnp.sin(angle) * x) / np.sqrt(2.0)
    out *= 1.0 - (chance(0.6) * severity * uniform(0.3, 0.9) * ramp)[..., None]
    middle = (out * seen).sum() / jnp.maximum(3.0 * seen.sum(), 1.0)
    out = middle + (out - middle) * (1.0 - 0.75 * severity * uniform())
    out = jnp.clip(out * (1.0 + severity * uniform(-0.6, 0.5)), 1e-6, 1.0)
    out = out ** (1.0 + severity * uniform(-0.4, 0.8))
    out += (0.01 + 0.05 * severity * uniform()) * jax.random.normal(next(k), image.shape)
    return jnp.clip(out, 0.0, 1.0) * seen


def degraded(key: Key, images: Float[Array, "m n n 3"], low: Any, high: Any) -> Float[Array, "m n n 3"]:
    """Each image with a severity of its own, uniform from `low` to `high`."""
    k_severity, k_degrade = jax.random.split(key)
    severity = jax.random.uniform(k_severity, (len(images),), minval=low, maxval=high)
    return jax.vmap(degrade)(jax.random.split(k_degrade, len(images)), images, severity)


def turned(key: Key, images: Float[Array, "m n n 3"]) -> Float[Array, "m n n 3"]:
    """Each image turned by quarters and flipped at random: one of the square's eight symmetries."""

    def one(choice: Array, image: Array) -> Array:
        image = jnp.where(choice & 1, image[::-1], image)
        image = jnp.where(choice & 2, image[:, ::-1], image)
        return jnp.where(choice & 4, image.swapaxes(0, 1), image)

    return jax.vmap(one)(jax.random.randint(key, (len(images),), 0, 8), images)


class Blocks(nn.Module):
    """A small network: four blocks (3x3 convolution, BatchNorm, ReLU, 2x2 maximum) and the mean over pixels."""

    widths: tuple[int, ...] = (16, 32, 64, 96)

    @nn.compact
    def __call__(self, x: Float[Array, "b n n 3"], train: bool = False) -> Float[Array, "b f"]:
        """Images in 0..1 -> features [B, widths[-1]]."""
        x = (x - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
        for width in self.widths:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(Conv(width, use_bias=False)(x))
            x = max_pool(jax.nn.relu(x))
        return x.mean((1, 2))
