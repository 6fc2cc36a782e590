"""Explanations of data sets whose images are aligned: maps of many images put together, pixels ranked by them.

Aggregation streams: batches of maps update means, squared deviations and, for the median and the trimmed mean, a
histogram of each pixel; no map is stored.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxstack.core.errors import UserError
from jaxstack.medical.explain import Explain

Mode = Literal["mean", "median", "trimmed", "contrast"]
MODES: tuple[Mode, ...] = ("mean", "median", "trimmed", "contrast")
SMALLEST = 1e-6
"""An image whose largest raw value is below this has no map: it is skipped and counted."""


class Stream(NamedTuple):
    """What is known after some batches."""

    n: Array
    """[L] maps of each label."""
    skipped: Array
    """[L] maps that were left out as they are zero."""
    mean: Array
    """[L, H, W]."""
    squares: Array
    """[L, H, W] sum of squared deviations from the mean."""
    counts: Array
    """[L, K, H, W] histograms over 0..1; K = 0 where they are not kept."""


class GlobalExplanation(NamedTuple):
    """Maps of a data set, in units of an image's largest value; not normalised further."""

    label_maps: np.ndarray
    """[L, H, W] over the images that carry the label; zeros for a label without maps."""
    overall: np.ndarray
    """[H, W]."""
    sem: np.ndarray
    """[L, H, W] standard error of the mean; NaN for fewer than two maps."""
    n: np.ndarray
    """[L] maps that were put together."""
    skipped: np.ndarray
    """[L] maps that were zero."""


def start(labels: int, size: tuple[int, int], bins: int = 0) -> Stream:
    """Nothing seen yet.

    Args:
        labels: L.
        size: rows and columns of the maps.
        bins: K, for the median and the trimmed mean, whose resolution is 1/K.
    """
    zeros = jnp.zeros((labels, *size))
    count = jnp.zeros(labels, jnp.int32)
    return Stream(count, count, zeros, zeros, jnp.zeros((labels, bins, *size), jnp.int32))


def add(stream: Stream, maps: Float[Array, "b l h w"], carried: Bool[Array, "b l"]) -> Stream:
    """The stream after a batch of raw maps, each divided by its largest value (Chan et al., 1979, for the moments).

    Args:
        stream: so far.
        maps: at least 0.
        carried: whether the image counts for the label.
    """
    largest = maps.max((2, 3))
    carried = jnp.asarray(carried, bool)
    used = carried & (largest >= SMALLEST)
    scaled = maps / jnp.maximum(largest, SMALLEST)[..., None, None]
    weight = used[..., None, None].astype(jnp.float32)
    own = used.sum(0)
    both = stream.n + own
    wide = lambda count: count[:, None, None].astype(jnp.float32)
    mean = (scaled * weight).sum(0) / jnp.maximum(wide(own), 1.0)
    squares = (jnp.square(scaled - mean) * weight).sum(0)
    gap = mean - stream.mean
    share = wide(own) / jnp.maximum(wide(both), 1.0)
    counts, bins = stream.counts, stream.counts.shape[1]
    if bins:
        place = jnp.clip(jnp.floor(scaled * bins), 0, bins - 1)
        one = lambda k: ((place == k) & used[..., None, None]).sum(0)
        counts = counts + jnp.stack([one(k) for k in range(bins)], 1)
    return Stream(
        both,
        stream.skipped + (carried & ~used).sum(0),
        stream.mean + gap * share,
        stream.squares + squares + jnp.square(gap) * share * wide(stream.n),
        counts,
    )


def _quantile_mean(counts: np.ndarray, n: np.ndarray, low: float, high: float) -> np.ndarray:
    """Mean of the values of each pixel between two shares of their order, by histogram [L, K, H, W]."""
    bins = counts.shape[1]
    upper = np.cumsum(counts, 1)
    total = n[:, None, None, None].astype(np.float64)
    a, b = low * total, high * total
    inside = np.clip(upper, a, b) - np.clip(upper - counts, a, b)
    middle = ((np.arange(bins) + 0.5) / bins)[None, :, None, None]
    return (inside * middle).sum(1) / np.maximum(inside.sum(1), 1e-9)


def finish(
    stream: Stream,
    mode: Mode = "mean",
    overall: int | Literal["prevalence", "equal"] = "prevalence",
    trim: float = 0.1,
) -> GlobalExplanation:
    """The maps of what was seen.

    Args:
        stream: after all batches.
        mode: mean; median and trimmed (a share `trim` cut from both ends), which need histograms; contrast, the mean
            less the mean of all labels' maps, which takes away what they have in common.
        overall: the number of a label, such as "any", whose map it is; or the mean over labels, weighted by their
            numbers of images or equally.
        trim: less than 1/2.

    Raises:
        UserError: for an unknown mode, missing histograms, or a share that leaves nothing.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if not 0 <= trim < 0.5:
        raise UserError(f"trim={trim}: expected 0 to less than 0.5")
    s: Any = jax.device_get(stream)
    if mode in ("median", "trimmed") and not s.counts.shape[1]:
        raise UserError(f"mode={mode!r}: found no histograms, expected a stream with bins")
    seen = s.n > 0
    if mode == "median":
        half = 0.5 - 0.5 / np.maximum(s.n, 1).max()
        maps = _quantile_mean(s.counts, s.n, half, 1.0 - half)
    elif mode == "trimmed":
        maps = _quantile_mean(s.counts, s.n, trim, 1.0 - trim)
    else:
        maps = s.mean.astype(np.float64)
    if mode == "contrast":
        maps = maps - maps[seen].mean(0) if seen.any() else maps
    maps = np.where(seen[:, None, None], maps, 0.0)
    if isinstance(overall, str):
        weights = s.n.astype(np.float64) if overall == "prevalence" else seen.astype(np.float64)
        whole = np.tensordot(weights / max(weights.sum(), 1e-9), maps, 1)
    else:
        whole = maps[overall]
    n = s.n[:, None, None].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        sem = np.where(n > 1, np.sqrt(s.squares / (n - 1) / n), np.nan)
    return GlobalExplanation(maps.astype(np.float32), whole.astype(np.float32), sem.astype(np.float32), s.n, s.skipped)


@partial(jax.jit, static_argnums=0)
def _explained(explain: Explain, variables: Any, stream: Stream, images: Array, carried: Array) -> Stream:
    every = jnp.arange(carried.shape[1])
    one = lambda image: jax.vmap(explain, in_axes=(None, None, 0))(variables, image, every)
    return add(stream, jax.lax.map(one, images, batch_size=min(16, len(images))), carried)


def aggregate(
    explain: Explain,
    variables: Any,
    batches: Iterable[tuple[Any, Any]],
    mode: Mode = "mean",
    overall: int | Literal["prevalence", "equal"] = "prevalence",
    trim: float = 0.1,
    bins: int = 64,
) -> GlobalExplanation:
    """Put explanations of a data set together, batch by batch.

    Args:
        explain: of `medical.explain`, the same object in every call, as it is compiled once.
        variables: of the network.
        batches: (images [B, H, W, C], carried [B, L] bool), the latter whether an image counts for a label: whether it
            has it, and, for true positives alone, was found to. All of one B compile once.
        mode: see `finish`.
        overall: see `finish`.
        trim: see `finish`.
        bins: of the histograms that median and trimmed mean keep.

    Raises:
        UserError: for no batches, and as `finish`.
    """
    stream = None
    for images, carried in batches:
        if stream is None:
            kept = bins if mode in ("median", "trimmed") else 0
            stream = start(np.shape(carried)[1], np.shape(images)[1:3], kept)
        stream = _explained(explain, variables, stream, jnp.asarray(images), jnp.asarray(carried, bool))
    if stream is None:
        raise UserError("batches: found none, expected at least one")
    return finish(stream, mode, overall, trim)


def pixel_ranks(importance: Float[Array, "h w"], key: Array) -> Int[Array, "h w"]:
    """Rank of each pixel, 0 for the most important; equal ones, which nearest upsampling makes many of, by chance."""
    flat = jnp.asarray(importance, jnp.float32).ravel()
    chance = jax.random.permutation(key, flat.size)
    order = jnp.lexsort((chance, -flat))
    return (
        jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32)).reshape(importance.shape)
    )


def top(ranks: Int[Array, "*b h w"], q: Any) -> Bool[Array, "*b h w"]:
    """The ceil(q H W) first pixels; q may be traced."""
    size = ranks.shape[-2] * ranks.shape[-1]
    return ranks < jnp.ceil(jnp.asarray(q, jnp.float32) * size - 0.02)  # q in float32 is a little off


def inverse(ranks: Int[Array, "*b h w"]) -> Int[Array, "*b h w"]:
    """The least important first."""
    return ranks.shape[-2] * ranks.shape[-1] - 1 - ranks


def centre_importance(size: tuple[int, int]) -> np.ndarray:
    """Less the distance from the middle, [H, W]: the ranking that knows nothing but where images are taken."""
    y, x = (np.arange(n) - (n - 1) / 2 for n in size)
    return -np.hypot(y[:, None], x[None]).astype(np.float32)


def erased(images: Array, mask: Array, fill: Array) -> Array:
    """Images [N, H, W, C] with the pixels of `mask` ([H, W] or [N, H, W]) filled."""
    return jnp.where(mask[..., None], fill, images)


def restored(images: Array, mask: Array, fill: Array) -> Array:
    """The filled image with the pixels of `mask` ([H, W] or [N, H, W]) put back."""
    return jnp.where(mask[..., None], images, fill)
