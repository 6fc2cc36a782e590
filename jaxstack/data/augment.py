"""Changes to images in training: pure functions of a key and images [N, H, W, C], each image with its own draw."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

Edge = Literal["zeros", "reflect"]


def shift(key: Array, images: Array, most: int, edge: Edge = "zeros") -> Array:
    """Images moved by -most..most pixels along both axes: padded, then cut.

    Args:
        key: a random key.
        images: [N, H, W, C] of any type.
        most: pixels.
        edge: what comes in: zeros, or the image reflected at its edge.
    """
    pad = ((0, 0), (most, most), (most, most), (0, 0))
    padded = jnp.pad(images, pad) if edge == "zeros" else jnp.pad(images, pad, mode="reflect")
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:])
    return jax.vmap(cut)(padded, starts)


def flip_boxes(key: Array, images: Array, boxes: Array) -> tuple[Array, Array]:
    """Images of which every other one, at random, is mirrored left to right with its boxes.

    Args:
        key: a random key.
        images: [N, H, W, C] of any type.
        boxes: [N, G, 4] x1, y1, x2, y2 in pixels.
    """
    turn, width = jax.random.bernoulli(key, 0.5, (len(images),)), images.shape[2]
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    mirrored = jnp.stack([width - x2, y1, width - x1, y2], -1)
    return (
        jnp.where(turn[:, None, None, None], images[:, :, ::-1], images),
        jnp.where(turn[:, None, None], mirrored, boxes),
    )


def flip(key: Array, images: Array) -> Array:
    """Images of which every other one, at random, is mirrored left to right."""
    turn = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(turn, images[:, :, ::-1], images)
