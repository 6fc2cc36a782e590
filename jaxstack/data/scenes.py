"""Scenes of simple shapes on textured ground, with exact boxes: a detector's data without a download.

A scene is drawn by inequalities on the pixel grid, so that `make_scene` vmaps and jits. What is seen of an object
decides its box: from the first to the last pixel that no later object covers.
"""

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError

CLASSES = ("disc", "square", "triangle", "cross")
GRID = 8
"""Sides of the field of normal numbers that is the ground's texture."""
CANDIDATES = 8
"""Colours that are drawn for an object; the first with enough contrast is taken, else the one with the most."""
AT_ONCE = 50
"""Scenes that one call of the program draws."""
uniform = partial(jax.random.uniform, dtype=jnp.float32)
normal = partial(jax.random.normal, dtype=jnp.float32)


class Scenery(NamedTuple):
    """What makes scenes easy or hard."""

    fewest: int = 1
    """Objects that are drawn at least; 0 gives scenes without one."""
    most: int = 4
    """Objects at most, G."""
    half: tuple[float, float] = (4.0, 14.0)
    """Half the size of objects in pixels; its logarithm is uniform."""
    noise: float = 0.05
    """Deviation of each pixel, of 0..1."""
    texture: float = 0.15
    """Deviation of the ground's texture."""
    contrast: float = 0.25
    """Least root mean squared difference of an object's colour from the ground below it."""
    covered: float = 0.5
    """An object of which a larger share is covered is left out."""
    distractors: int = 0
    """Ellipses on the ground, which are no objects."""


class Scene(NamedTuple):
    """One image, or a leading axis of them."""

    image: Any
    """[size, size, 3] uint8."""
    boxes: Any
    """[G, 4] float32: x1, y1, x2, y2 in pixels; the first pixel is 0 to 1. Zeros where there is no object."""
    labels: Any
    """[G] int32 into `CLASSES`."""
    valid: Any
    """[G] bool: objects come first, padding after them."""


def _rgb(hsv: Array) -> Array:
    """Hue, saturation, value [..., 3] in 0..1 as red, green, blue."""
    h, s, v = hsv[..., :1], hsv[..., 1:2], hsv[..., 2:]
    k = (jnp.array([5.0, 3.0, 1.0], jnp.float32) + 6.0 * h) % 6.0
    return v - v * s * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def _inside(kind: Array, u: Array, v: Array) -> Array:
    """Whether points are inside a shape whose farthest point is at distance 1 or a little more."""
    sides = [math.cos(a * math.pi) * u + math.sin(a * math.pi) * v for a in (1 / 2, 7 / 6, 11 / 6)]
    arm = lambda a, b: (jnp.abs(a) < 1.0) & (jnp.abs(b) < 0.35)
    shapes = (
        u**2 + v**2 < 1.0,
        jnp.maximum(jnp.abs(u), jnp.abs(v)) < 0.8,
        jnp.maximum(jnp.maximum(sides[0], sides[1]), sides[2]) < 0.5,
        arm(u, v) | arm(v, u),
    )
    return jnp.stack(shapes)[kind]


def _local(key: Array, size: int, half: tuple[float, float]) -> tuple[Array, Array]:
    """The pixels' coordinates over the half size of an object at a random place, turned by a random angle."""
    k_half, k_at, k_turn = jax.random.split(key, 3)
    r = jnp.exp(uniform(k_half, (), minval=math.log(half[0]), maxval=math.log(half[1])))
    x, y = r + uniform(k_at, (2,)) * (size - 2.0 * r)
    angle = uniform(k_turn, (), maxval=2.0 * math.pi)
    grid = jnp.arange(size, dtype=jnp.float32) + 0.5
    dx, dy = (grid - x)[None, :] / r, (grid - y)[:, None] / r
    c, s = jnp.cos(angle), jnp.sin(angle)
    return c * dx + s * dy, c * dy - s * dx


def _color(key: Array, mask: Array, ground: Array, contrast: float) -> Array:
    """A colour that stands out from the ground under a mask."""
    weight = mask[..., None] / jnp.maximum(mask.sum(), 1)
    draws = uniform(key, (CANDIDATES, 3))
    colors = _rgb(draws.at[:, 1:].set(0.2 + 0.8 * draws[:, 1:]))
    apart = jnp.sqrt(jnp.square(colors - (ground * weight).sum((0, 1))).mean(-1))
    best = jnp.where((apart >= contrast).any(), (apart >= contrast).argmax(), apart.argmax())
    return colors[best]


def make_scene(key: Array, size: int = 64, scenery: Scenery = Scenery()) -> Scene:
    """Draw a scene: low-frequency ground, then objects one above the other, then noise.

    Args:
        key: the only source of chance.
        size: pixels of a side.
        scenery: how hard it is.
    """
    k_base, k_field, k_count, k_kind, k_noise, k_objects, k_others = jax.random.split(key, 7)
    field = jax.image.resize(normal(k_field, (GRID, GRID, 3)), (size, size, 3), "linear")
    ground = uniform(k_base, (3,), minval=0.25, maxval=0.75) + scenery.texture * field
    ground = jnp.clip(ground, 0.0, 1.0)
    for k in jax.random.split(k_others, scenery.distractors):
        k_place, k_color = jax.random.split(k)
        u, v = _local(k_place, size, scenery.half)
        mask = u**2 + (v / 0.45) ** 2 < 1.0
        ground = jnp.where(mask[..., None], _color(k_color, mask, ground, scenery.contrast), ground)
    most = scenery.most
    kinds = jax.random.randint(k_kind, (most,), 0, len(CLASSES))
    count = jax.random.randint(k_count, (), scenery.fewest, most + 1)
    places, colors = jax.random.split(k_objects, (2, most))
    masks = jax.vmap(lambda kind, k: _inside(kind, *_local(k, size, scenery.half)))(kinds, places)
    masks &= (jnp.arange(most) < count)[:, None, None]

    def seen(taken: Array, mask: Array) -> tuple[Array, Array]:
        kept = mask & ((mask & taken).sum() <= scenery.covered * mask.sum())
        return taken | kept, kept & ~taken

    # from the top: what is left out covers nothing
    _, visible = jax.lax.scan(seen, jnp.zeros((size, size), bool), masks, reverse=True)
    paint = jax.vmap(lambda k, mask: _color(k, mask, ground, scenery.contrast))(colors, masks)
    image = jnp.where(visible.any(0)[..., None], jnp.tensordot(visible.astype(jnp.float32), paint, (0, 0)), ground)
    image = jnp.clip(image + scenery.noise * normal(k_noise, image.shape), 0.0, 1.0)
    valid = visible.any((1, 2))
    edges = []
    for axis in (1, 2):  # rows of the image hide in axis 1: its sum tells columns
        there = visible.any(axis)
        edges.append((there.argmax(-1), size - there[:, ::-1].argmax(-1)))
    (x1, x2), (y1, y2) = edges
    boxes = jnp.stack([x1, y1, x2, y2], -1).astype(jnp.float32) * valid[:, None]
    order = jnp.argsort(~valid, stable=True)
    labels = jnp.where(valid, kinds, 0).astype(jnp.int32)
    return Scene(jnp.round(255.0 * image).astype(jnp.uint8), boxes[order], labels[order], valid[order])


@partial(jax.jit, static_argnums=(2, 3))
def _drawn(seed: Array, numbers: Array, size: int, scenery: Scenery) -> Scene:
    start = jax.random.key(seed)
    return jax.vmap(lambda i: make_scene(jax.random.fold_in(start, i), size, scenery))(numbers)


@lru_cache(8)
def scenes(seed: int, count: int, size: int = 64, scenery: Scenery = Scenery()) -> Scene:
    """Scenes 0..count-1 of a seed, in arrays [count, ...] on the host; the first ones are the same for every count.

    Args:
        seed: another one gives other scenes.
        count: how many.
        size: pixels of a side.
        scenery: how hard they are.

    Raises:
        UserError: for no scene, or a side into which no object fits.
    """
    if count < 1:
        raise UserError(f"count={count}: expected at least 1")
    if size < 2.0 * scenery.half[1]:
        raise UserError(f"size={size}: expected at least {2.0 * scenery.half[1]:g} pixels, the largest object's")
    found = [
        jax.tree.map(np.asarray, _drawn(jnp.uint32(seed), jnp.arange(i, i + AT_ONCE), size, scenery))
        for i in range(0, count, AT_ONCE)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)
