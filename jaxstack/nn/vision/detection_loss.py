"""What dense detectors learn: targets of FCOS (Tian et al., 2019) and ATSS (Zhang et al., 2020), and their losses."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxstack.core.errors import UserError
from jaxstack.nn.vision.boxes import Pair, area, giou, iou, level_counts, to_distances

Kind = Literal["fcos", "atss"]
BACKGROUND = -1


class Targets(NamedTuple):
    """What the locations of an image are for; a leading axis of images may be there."""

    labels: Array
    """[A] int32, `BACKGROUND` where a location belongs to no object."""
    boxes: Array
    """[A, 4] the box of a location's object."""
    centre: Array
    """[A] centre-ness of the location in its box, 0 to 1; 0 for background."""


def centreness(xy: Float[Array, "*#n 2"], boxes: Float[Array, "*#n 4"]) -> Float[Array, "*n"]:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of locations in boxes, 0 outside (FCOS, eq. 3)."""
    sides = to_distances(xy, boxes)
    ratio = jnp.minimum(sides[..., :2], sides[..., 2:]) / jnp.maximum(jnp.maximum(sides[..., :2], sides[..., 2:]), 1e-6)
    product = jnp.where((ratio > 0.0).all(-1), ratio[..., 0] * ratio[..., 1], 0.0)
    return jnp.sqrt(product)


def fcos_ranges(image_hw: Pair, strides: Sequence[int], scale: float = 8.0) -> Float[Array, "a 2"]:
    """Distances in pixels (low, high) of the farthest side that each location's level is for: up to `scale` strides on
    all levels but the last, which has no end; with strides 8 to 128 those of the paper."""
    ends = [scale * s for s in strides[:-1]]
    pairs = np.array(list(zip([0.0, *ends], [*ends, np.inf])), np.float32)
    return jnp.asarray(np.repeat(pairs, level_counts(image_hw, strides), 0))


def fcos_targets(
    xy: Float[Array, "a 2"],
    strides: Float[Array, " a"],
    ranges: Float[Array, "a 2"],
    boxes: Float[Array, "g 4"],
    labels: Int[Array, " g"],
    valid: Bool[Array, " g"],
    radius: float | None = 1.5,
) -> Targets:
    """Objects of FCOS's locations: those whose box a location is in, with its farthest side in the level's range; of
    several the smallest.

    Args:
        xy, strides, ranges: of the locations, see `locations`, `location_strides`, `fcos_ranges`.
        boxes, labels, valid: of the objects; where `valid` is False there is none.
        radius: a location must also be nearer to the box's centre than so many strides, along both axes (centre
            sampling); None: anywhere in the box.
    """
    xy, strides, ranges, boxes, labels, valid = map(jnp.asarray, (xy, strides, ranges, boxes, labels, valid))
    sides = to_distances(xy[:, None], boxes)
    inside = sides.min(-1) > 0.0
    if radius is not None:
        middle = 0.5 * (boxes[:, :2] + boxes[:, 2:])
        inside &= (jnp.abs(xy[:, None] - middle) < radius * strides[:, None, None]).all(-1)
    reach = sides.max(-1)
    inside &= (reach >= ranges[:, :1]) & (reach <= ranges[:, 1:]) & valid
    size = jnp.where(inside, area(boxes), jnp.inf)
    own = size.argmin(-1)
    return _of_objects(xy, boxes, labels, own, inside.any(-1))


def atss_targets(
    anchors: Float[Array, "a 4"],
    counts: Sequence[int],
    boxes: Float[Array, "g 4"],
    labels: Int[Array, " g"],
    valid: Bool[Array, " g"],
    topk: int = 9,
) -> Targets:
    """Objects of anchors by adaptive training sample selection.

    The `topk` anchors of each level whose centres are nearest to the object's are candidates. Those are its samples
    whose IoU is at least the candidates' mean plus their standard deviation and whose centre is in the box. An anchor
    of several objects goes to the one that it overlaps most.

    Args:
        anchors: see `square_anchors`.
        counts: anchors of each level.
        boxes, labels, valid: of the objects; where `valid` is False there is none.
        topk: candidates of each level, or all where it has fewer.
    """
    if sum(counts) != len(anchors):
        raise UserError(f"counts={list(counts)}: found {len(anchors)} anchors, expected their sum")
    anchors, boxes, labels, valid = map(jnp.asarray, (anchors, boxes, labels, valid))
    xy = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    middle = 0.5 * (boxes[:, :2] + boxes[:, 2:])
    apart = jnp.square(middle[:, None] - xy).sum(-1)
    overlap = iou(boxes[:, None], anchors)
    found, start = [], 0
    for count in counts:
        found.append(start + jax.lax.top_k(-apart[:, start : start + count], min(topk, count))[1])
        start += count
    near = jnp.concatenate(found, 1)
    near_iou = jnp.take_along_axis(overlap, near, 1)
    least = near_iou.mean(1, keepdims=True) + jnp.std(near_iou, axis=1, keepdims=True, ddof=min(1, near.shape[1] - 1))
    inside = to_distances(xy[near], boxes[:, None]).min(-1) > 0.01
    good = (near_iou >= least) & inside & valid[:, None]
    rows = jnp.arange(len(boxes))[:, None]
    claims = jnp.full(overlap.shape, -1.0, jnp.float32).at[rows, near].set(jnp.where(good, near_iou, -1.0))
    return _of_objects(xy, boxes, labels, claims.argmax(0), claims.max(0) >= 0.0)


def _of_objects(xy: Array, boxes: Array, labels: Array, own: Array, positive: Array) -> Targets:
    label = jnp.where(positive, labels[own], BACKGROUND).astype(jnp.int32)
    box = boxes[own]
    return Targets(label, box, jnp.where(positive, centreness(xy, box), 0.0))


def focal_loss(logits: Float[Array, "*n c"], labels: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Sigmoid focal loss with gamma 2 and alpha .25 (Lin et al., 2017), over classes; `BACKGROUND` is none."""
    wanted = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.losses.sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0).sum(-1)


class Losses(NamedTuple):
    """Parts of a detector's loss [B]: their means over the batch are sums over its locations, each over what `per`
    says; so they do not change where images are put together otherwise."""

    classes: Array
    boxes: Array
    quality: Array


def detector_losses(
    kind: Kind,
    logits: Float[Array, "b a c"],
    boxes: Float[Array, "b a 4"],
    quality: Float[Array, "b a"],
    targets: Targets,
) -> Losses:
    """The parts of the loss of each image.

    Args:
        kind: "fcos": -log IoU, weighted by centre-ness and over its sum, and centre-ness as the quality; "atss": twice
            1 - GIoU, over the number of positive locations, and the IoU of the boxes as the quality.
        logits, boxes, quality: what the network gives; boxes in pixels.
        targets: of the same images.

    Returns:
        Values [B]. Focal loss and the quality's binary cross entropy go by the number of positive locations of the
        whole batch, at least 1.
    """
    positive = targets.labels != BACKGROUND
    where = lambda x: jnp.where(positive, x, 0.0).sum(1)
    many = len(logits)
    count = jnp.maximum(positive.sum(), 1).astype(logits.dtype)
    if kind == "fcos":
        error = -jnp.log(jnp.maximum(iou(boxes, targets.boxes), 1e-6)) * targets.centre
        weight, wanted = jnp.maximum(targets.centre.sum(), 1e-6), targets.centre
    else:
        error = 2.0 * (1.0 - giou(boxes, targets.boxes))
        weight, wanted = count, jax.lax.stop_gradient(iou(boxes, targets.boxes))
    return Losses(
        many * focal_loss(logits, targets.labels).sum(1) / count,
        many * where(error) / weight,
        many * where(optax.losses.sigmoid_binary_cross_entropy(quality, wanted)) / count,
    )
