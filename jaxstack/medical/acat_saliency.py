"""Saliency maps of scans that ACAT compares, and the region of the brain that they point at.

Scans and maps are [slices, rows, columns], scans in 0..1. The counterfactuals are those of `latent_counterfactuals`,
with the latents of all slices of a scan moved together, as the classifier sees them together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxstack.core.errors import UserError
from jaxstack.medical.latent_counterfactuals import Autoencoder, Sides, scaled, sides
from jaxstack.nn.vision.acat import AcatNet

REGIONS = ("front left", "front right", "middle left", "middle right", "back left", "back right")
LOOK = 32
"""Scans that are looked at at once, in explaining and in validation."""


def six_regions(inside: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "6 h w"]:
    """The brain in six: thirds from front to back of its bounding box, each in a left and a right half, see `REGIONS`.

    Raises `UserError` for an empty mask.
    """
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        raise UserError("inside: found an empty mask, expected that of a brain")
    third = np.digitize(np.arange(inside.shape[0]), rows[0] + (rows[-1] + 1 - rows[0]) * np.array([1 / 3, 2 / 3]))
    half = np.arange(inside.shape[1]) >= (columns[0] + columns[-1] + 1) / 2
    number = 2 * third[:, None] + half
    return np.stack([inside & (number == i) for i in range(6)])


def region_means(saliency: Float[Array, "*b s h w"], atlas: Bool[Any, "r h w"]) -> Float[Array, "*b r"]:
    """Mean saliency of each region over its pixels in all slices."""
    atlas = jnp.asarray(atlas, jnp.float32)
    total = jnp.einsum("...shw,rhw->...r", saliency, atlas)
    return total / (saliency.shape[-3] * jnp.maximum(atlas.sum((1, 2)), 1.0))


def localise(saliency: Float[Array, "*b s h w"], atlas: Bool[Any, "r h w"]) -> Int[Array, "*b"]:
    """Index of the region with the highest mean saliency; -1 for a map that is zero everywhere.

    Args:
        saliency: of scans, [..., S, H, W], not negative.
        atlas: masks of the regions, the same in all slices.
    """
    means = region_means(jnp.asarray(saliency), atlas)
    return jnp.where(means.max(-1) > 0, means.argmax(-1), -1)


def lesion_regions(lesion: Bool[np.ndarray, "m s h w"], atlas: Bool[np.ndarray, "r h w"]) -> Int[np.ndarray, " m"]:
    """The region that holds most of each scan's lesion; -1 without one."""
    counts = np.einsum("mshw,rhw->mr", lesion.astype(np.float32), atlas.astype(np.float32))
    return np.where(counts.max(1) > 0, counts.argmax(1), -1)


def resampled(maps: Float[np.ndarray, "m s h w"], slices: np.ndarray, size: int) -> Float[np.ndarray, "m t n n"]:
    """Saliency maps of scans at other slices and another size: those that a classifier sees.

    Args:
        maps: at S slices.
        slices: positions [T] of the wanted slices on the axis of S, from 0; between two they are interpolated.
        size: pixels of a side, N.

    Raises:
        UserError: for positions outside the scan.
    """
    slices = np.asarray(slices, np.float32)
    if slices.ndim != 1 or not len(slices) or slices.min() < 0 or slices.max() > maps.shape[1] - 1:
        raise UserError(f"slices={slices.tolist()}: expected positions from 0 to {maps.shape[1] - 1}")
    low = np.minimum(slices.astype(int), max(maps.shape[1] - 2, 0))
    part = (slices - low)[None, :, None, None]
    between = (1 - part) * maps[:, low] + part * maps[:, np.minimum(low + 1, maps.shape[1] - 1)]
    if between.shape[2:] == (size, size):
        return between.astype(np.float32)
    return np.asarray(jax.image.resize(between, (*between.shape[:2], size, size), "bilinear"), np.float32)


class Explainer(NamedTuple):
    """A trained plain classifier and autoencoder, without their weights."""

    net: AcatNet
    autoencoder: Autoencoder
    steps: int = 20


def _folded(f: Callable[[Array], Array], x: Array) -> Array:
    """`f` of slices, for scans [B, S, ...]."""
    out = f(x.reshape(-1, *x.shape[2:]))
    return out.reshape(*x.shape[:2], *out.shape[1:])


@partial(jax.jit, static_argnums=0)
def both_sides(
    explainer: Explainer, plain: Any, autoencoder: Any, images: Float[Array, "b s n n"], alpha: Any, beta: Any
) -> Sides:
    """Scans as decoded from their latents, and from latents moved towards healthy and towards lesion, [B, S, N, N].

    Args:
        explainer: the networks and the number of steps.
        plain: variables of the classifier.
        autoencoder: variables of the autoencoder.
        images: scans.
        alpha: weight of the mean distance of a scan's latents; of one of n it is alpha / n.
        beta: step size.
    """
    net: Any = explainer.net
    auto: Any = explainer.autoencoder
    encode = lambda x: _folded(lambda v: auto.apply(autoencoder, v, method="encode"), x[..., None])
    decode = lambda z: _folded(lambda v: auto.apply(autoencoder, v, method="decode"), z)[..., 0]
    return sides(lambda x: net.apply(plain, x[..., None]), encode, decode, images, alpha, beta, explainer.steps)


@partial(jax.jit, static_argnums=(0, 3))
def gradient_saliency(net: AcatNet, variables: Any, images: Float[Array, "b s n n"], target: int = 1) -> Array:
    """|d logit / d pixel| of one class, in 0..1 of each scan [B, S, N, N]."""
    apply: Any = net.apply
    logit = lambda x: apply(variables, x[..., None])[:, target].sum()
    return scaled(jnp.abs(jax.grad(logit)(images)))


def in_parts(f: Callable[..., Any], images: np.ndarray, most: int = LOOK) -> Any:
    """`f` of scans [M, ...], `most` at a time, as trees of arrays [M, ...] on the host. The last part is filled up, so
    that one program is compiled."""
    found = []
    for start in range(0, len(images), most):
        part = images[start : start + most]
        filled = np.concatenate([part, np.repeat(part[:1], most - len(part), 0)])
        found.append(jax.tree.map(lambda x, count=len(part): np.asarray(x)[:count], f(jnp.asarray(filled))))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *found)
