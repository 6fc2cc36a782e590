"""COCO's mean average precision of detections (Lin et al., 2014).

For each class and each threshold of the IoU, detections of all images are matched to objects greedily by score, and
precision, made non-increasing in recall, is averaged over 101 recalls. `mean_average_precision` is NumPy on lists,
`average_precision` the same measure of padded arrays inside a program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.boxes import Detections, iou

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0.0, 1.0, 101)
"""As pycocotools has them: some, such as 0.57, are a rounding above what i / 100 is."""


class MeanPrecision(NamedTuple):
    """NaN where there is no object."""

    mean: float
    """Mean over classes that have objects, and over thresholds."""
    ap50: float
    """At an IoU of 0.5."""
    classes: np.ndarray
    """[C, T]: of each class at each threshold."""


def mean_average_precision(
    detections: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    truths: Sequence[tuple[np.ndarray, np.ndarray]],
    classes: int,
    thresholds: Sequence[float] = THRESHOLDS,
    most: int = 100,
) -> MeanPrecision:
    """Mean average precision over images.

    Args:
        detections: boxes [D, 4], scores [D] and labels [D] of each image.
        truths: boxes [G, 4] and labels [G] of each image.
        classes: C.
        thresholds: of the IoU; the first is that of `ap50`.
        most: detections of a class in an image that count, those of the highest scores.

    Raises:
        UserError: for lists of unequal lengths, scores that are not finite, or labels outside of 0..C-1.
    """
    if len(detections) != len(truths):
        raise UserError(f"detections: found {len(detections)} images, expected {len(truths)} as of the truths")
    for name, labels in (("detections", [d[2] for d in detections]), ("truths", [t[1] for t in truths])):
        whole = np.concatenate([np.zeros(0, int), *map(np.asarray, labels)])
        if len(whole) and not 0 <= whole.min() <= whole.max() < classes:
            raise UserError(f"{name}: found labels {whole.min()} to {whole.max()}, expected 0 to {classes - 1}")
    if not all(np.isfinite(d[1]).all() for d in detections):
        raise UserError("detections: found scores that are not finite")
    found = np.full((classes, len(thresholds)), np.nan)
    for c in range(classes):
        scores, hits, objects = [], [], 0
        for (boxes, score, labels), (true, true_labels) in zip(detections, truths):
            own = np.flatnonzero(np.asarray(labels) == c)
            own = own[np.argsort(-np.asarray(score)[own], kind="stable")][:most]
            real = np.asarray(true)[np.asarray(true_labels) == c]
            objects += len(real)
            scores.append(np.asarray(score)[own])
            hits.append(_matched(np.asarray(boxes)[own], real, thresholds))
        if objects:
            order = np.argsort(-np.concatenate(scores), kind="stable")
            found[c] = [_area(row[order], objects) for row in np.concatenate(hits, 1)]
    if np.isnan(found).all():
        return MeanPrecision(np.nan, np.nan, found)
    return MeanPrecision(float(np.nanmean(found)), float(np.nanmean(found[:, 0])), found)


def _matched(boxes: np.ndarray, real: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """[T, D]: whether each detection, by descending score, is the first of an object: of those that are left, the one
    it overlaps most."""
    hits = np.zeros((len(thresholds), len(boxes)), bool)
    if not len(real):
        return hits
    low, high = np.maximum(boxes[:, None, :2], real[:, :2]), np.minimum(boxes[:, None, 2:], real[:, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    size = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    overlap = common / np.maximum(size(boxes)[:, None] + size(real) - common, 1e-6)
    for t, least in enumerate(thresholds):
        left = np.ones(len(real), bool)
        for d, row in enumerate(overlap):
            best = int(np.where(left, row, -1.0).argmax())
            if left[best] and row[best] >= least:
                hits[t, d], left[best] = True, False
    return hits


def _area(hits: np.ndarray, objects: int) -> float:
    """Average precision of hits by descending score."""
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(right / objects, RECALLS, side="left")
    return float(np.append(precision, 0.0)[np.minimum(at, len(hits))].mean())


def average_precision(
    found: Detections,
    boxes: Float[Array, "n g 4"],
    labels: Array,
    valid: Bool[Array, "n g"],
    classes: int,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[Float[Array, "c t"], Bool[Array, " c"]]:
    """Average precision of each class at each threshold, inside a program.

    Args:
        found: detections of N images, each by descending score.
        boxes, labels, valid: objects of the images.
        classes: C.
        thresholds: T values of the IoU.

    Returns:
        Precisions, 0 for a class without objects, and which classes have objects.
    """
    least = jnp.asarray(thresholds, jnp.float32)

    def of_image(own: Detections, true: Array, kinds: Array, there: Array) -> Array:
        overlap = jnp.where((own.labels[:, None] == kinds) & there, iou(own.boxes[:, None], true), -1.0)

        def match(left: Array, row: Array) -> tuple[Array, Array]:
            free = jnp.where(left, row, -1.0)  # [T, G]
            best = free.argmax(1)
            hit = free.max(1) >= least
            return left & ~(hit[:, None] & (jnp.arange(len(row)) == best[:, None])), hit

        left = jnp.ones((len(least), len(true)), bool)
        return jax.lax.scan(match, left, overlap)[1] & own.valid[:, None]  # [D, T]

    hits = jax.vmap(of_image)(found, boxes, labels, valid).reshape(-1, len(least))
    scores = jnp.where(found.valid, found.scores, -jnp.inf).reshape(-1)
    kinds = jnp.where(found.valid, found.labels, -1).reshape(-1)
    order = jnp.argsort(-scores, stable=True)
    hits, kinds = hits[order], kinds[order]
    hundredths = np.arange(101)
    above = jnp.asarray(hundredths / 100 < RECALLS)

    def of_class(c: Array) -> tuple[Array, Array]:
        objects = (valid & (labels == c)).sum()
        mine = kinds == c
        right = jnp.cumsum(hits & mine[:, None], 0, dtype=jnp.int32)
        rank = jnp.cumsum(mine, dtype=jnp.int32)
        precision = right / jnp.maximum(rank, 1)[:, None]
        precision = jax.lax.cummax(jnp.where(mine[:, None], precision, 0.0), 0, reverse=True)
        # the fewest hits k with k / objects >= RECALLS in float64, in whole numbers
        share = hundredths * objects
        wanted = (share + 99) // 100 + (above & (share % 100 == 0))
        at = jax.vmap(lambda r: jnp.searchsorted(r, wanted, side="left"), 1, 1)(right)
        padded = jnp.concatenate([precision, jnp.zeros((1, len(least)), precision.dtype)])
        return jnp.take_along_axis(padded, at, 0).mean(0), objects > 0

    return jax.lax.map(of_class, jnp.arange(classes))
