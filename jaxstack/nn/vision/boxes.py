"""Boxes of dense detectors: locations, overlaps, suppression, and what the outputs of a network detect.

Boxes are (x1, y1, x2, y2) in pixels. All A locations of all levels are concatenated, the finest level first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxstack.core.errors import UserError

Pair = tuple[int, int]


class Detections(NamedTuple):
    """What is detected in an image, the highest score first; a leading axis of images may be there."""

    boxes: Array
    """[D, 4] pixels."""
    scores: Array
    """[D], 0 for padding."""
    labels: Array
    """[D] int32."""
    valid: Array
    """[D] bool: False for padding."""


def level_sizes(image_hw: Pair, strides: Sequence[int]) -> tuple[Pair, ...]:
    """Rows and columns of each level of an image of so many rows and columns."""
    return tuple((-(-image_hw[0] // s), -(-image_hw[1] // s)) for s in strides)


def level_counts(image_hw: Pair, strides: Sequence[int]) -> tuple[int, ...]:
    """Locations of each level."""
    return tuple(h * w for h, w in level_sizes(image_hw, strides))


def locations(image_hw: Pair, strides: Sequence[int]) -> Float[Array, "a 2"]:
    """Centres (x, y) in pixels of all locations: ((column + 1/2) s, (row + 1/2) s), row by row, level by level."""
    found = []
    for (rows, columns), s in zip(level_sizes(image_hw, strides), strides):
        y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        found.append((np.stack([x, y], -1).reshape(-1, 2) + 0.5) * s)
    return jnp.asarray(np.concatenate(found), jnp.float32)


def location_strides(image_hw: Pair, strides: Sequence[int]) -> Float[Array, " a"]:
    """The stride of each location's level."""
    return jnp.asarray(np.repeat(strides, level_counts(image_hw, strides)), jnp.float32)


def square_anchors(image_hw: Pair, strides: Sequence[int], scale: float) -> Float[Array, "a 4"]:
    """A square for each location, `scale` strides long and wide."""
    xy, half = locations(image_hw, strides), 0.5 * scale * location_strides(image_hw, strides)[:, None]
    return jnp.concatenate([xy - half, xy + half], -1)


def area(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Square pixels, 0 for boxes that end before they begin."""
    return jnp.maximum(boxes[..., 2] - boxes[..., 0], 0.0) * jnp.maximum(boxes[..., 3] - boxes[..., 1], 0.0)


def _overlap(a: Array, b: Array) -> tuple[Array, Array]:
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    sides = jnp.maximum(high - low, 0.0)
    common = sides[..., 0] * sides[..., 1]
    return common, area(a) + area(b) - common


def iou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "*n"]:
    """Intersection over union of boxes; leading axes broadcast, so `iou(a[:, None], b)` compares all pairs. 0 for two
    empty boxes."""
    common, union = _overlap(a, b)
    return common / jnp.maximum(union, 1e-6)


def giou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "*n"]:
    """IoU less the share of the smallest box around both that neither covers, -1 to 1 (Rezatofighi et al., 2019)."""
    common, union = _overlap(a, b)
    sides = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
    around = sides[..., 0] * sides[..., 1]
    return common / jnp.maximum(union, 1e-6) - (around - union) / jnp.maximum(around, 1e-6)


def from_distances(xy: Float[Array, "*n 2"], sides: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """Boxes from distances in pixels (left, top, right, bottom) of locations."""
    return jnp.concatenate([xy - sides[..., :2], xy + sides[..., 2:]], -1)


def to_distances(xy: Float[Array, "*#n 2"], boxes: Float[Array, "*#n 4"]) -> Float[Array, "*n 4"]:
    """Distances in pixels from locations to the sides of boxes, negative where a location is outside."""
    return jnp.concatenate([xy - boxes[..., :2], boxes[..., 2:] - xy], -1)


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    labels: Int[Array, " n"],
    valid: Bool[Array, " n"],
    threshold: float = 0.5,
    most: int = 100,
) -> tuple[Int[Array, " d"], Bool[Array, " d"]]:
    """Greedy non-maximum suppression within each class, of fixed size.

    The box of the highest score is kept (the first of equal ones), all of its class that overlap it are dropped, and so
    on with what is left.

    Args:
        boxes, scores, labels, valid: N candidates.
        threshold: IoU above which a box is dropped.
        most: boxes that are kept at most, D.

    Returns:
        Rows of the boxes that are kept, the highest score first, and which of the D entries hold one.
    """

    boxes, scores, labels, valid = map(jnp.asarray, (boxes, scores, labels, valid))

    def keep(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        best = left.argmax().astype(jnp.int32)
        same = (labels == labels[best]) & (iou(boxes, boxes[best]) > threshold)
        gone = same | (jnp.arange(len(left)) == best)
        return jnp.where(gone, -jnp.inf, left), (best, left[best] > -jnp.inf)

    start = jnp.where(valid, scores, -jnp.inf)
    return jax.lax.scan(keep, start, None, length=most)[1]


def postprocess(
    logits: Float[Array, "a c"],
    quality: Float[Array, " a"],
    boxes: Float[Array, "a 4"],
    counts: Sequence[int],
    image_hw: Pair,
    *,
    score_threshold: float = 0.05,
    nms_iou: float = 0.5,
    top_n: int = 1000,
    most: int = 100,
) -> Detections:
    """What a detector's outputs for an image detect.

    A score is the probability of a class times that of the quality branch (centre-ness or IoU).

    Args:
        logits: of the classes.
        quality: logits of the quality branch.
        boxes: in pixels; what is outside of the image is cut off.
        counts: locations of each level.
        image_hw: rows and columns of the image.
        score_threshold: least probability of a class.
        nms_iou: see `nms`.
        top_n: locations of each level that are candidates, and candidates of all classes in all.
        most: detections, D.
    """
    if sum(counts) != len(logits):
        raise UserError(f"counts={list(counts)}: found {len(logits)} locations, expected their sum")
    boxes = jnp.asarray(boxes)
    p, weight = jax.nn.sigmoid(logits), jax.nn.sigmoid(quality)[:, None]
    rows, start = [], 0
    for count in counts:
        best = (p * weight)[start : start + count].max(-1)
        rows.append(start + jax.lax.top_k(best, min(top_n, count))[1])
        start += count
    at = jnp.concatenate(rows)
    scores = jnp.where(p[at] > score_threshold, (p * weight)[at], -jnp.inf).reshape(-1)
    scores, flat = jax.lax.top_k(scores, min(top_n, scores.size))
    classes = logits.shape[1]
    h, w = image_hw
    found = jnp.clip(boxes[at[flat // classes]], 0.0, jnp.array([w, h, w, h], jnp.float32))
    labels = (flat % classes).astype(jnp.int32)
    kept, valid = nms(found, scores, labels, scores > -jnp.inf, nms_iou, most)
    hide = lambda x: jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    return Detections(hide(found[kept]), hide(scores[kept]), hide(labels[kept]), valid)
