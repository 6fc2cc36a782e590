"""PEPPR: is a global explanation faithful? (Engelmann, Storkey and Bernabeu, 2021)

Pixels are ranked by a global map and progressively erased from, or restored to, all images of a test set, with the same
mask for every image. Performance must fall fast and rise fast, against random rankings. Only the abstract of the paper
is public; the grid, fills, metrics and controls are ours.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxstack.core.errors import UserError
from jaxstack.data.augment import blurred
from jaxstack.medical import global_maps
from jaxstack.medical.multilabel import aucs

Fill = Literal["mean", "mean-image", "blur", "noise"]
FILLS: tuple[Fill, ...] = ("mean", "mean-image", "blur", "noise")
GRID = tuple(round(0.05 * i, 2) for i in range(21))
"""Fractions q."""
Predict = Callable[[Any, Array], Array]
"""(variables, images [B, H, W, C]) -> logits [B, L], in inference mode."""
Metric = Callable[[np.ndarray, np.ndarray], float]
"""(logits [N, L], labels [N, L]) -> a number, larger is better."""


def label_auc(label: int) -> Metric:
    """AUC of one label, e.g. of "any"."""
    return lambda logits, labels: float(aucs(logits[:, [label]], labels[:, [label]])[0])


def macro_auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean AUC over the labels that have both classes."""
    found = aucs(logits, labels)
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean log-probability in nats of what is true: less the log-loss."""
    sign = np.where(labels, 1.0, -1.0)
    return float(-np.logaddexp(0.0, -sign * np.asarray(logits, np.float64)).mean())


def true_probability(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean probability of the labels that are present."""
    present = np.asarray(labels, bool)
    return float((1.0 / (1.0 + np.exp(-np.asarray(logits, np.float64))))[present].mean())


METRICS: dict[str, Metric] = {
    "macro-auc": macro_auc,
    "log-likelihood": log_likelihood,
    "true-probability": true_probability,
}


def fill_of(kind: Fill, images: Array, training: Array, key: Array, sigma: float = 8.0) -> Array:
    """What erased pixels become, broadcast to images [N, H, W, C].

    Args:
        kind: mean of each channel over the training images; their mean image, which looks most like an image where all
            are aligned; the image itself blurred; noise of the channels' means and deviations.
        images: that are erased.
        training: [M, H, W, C].
        key: of the noise.
        sigma: of the blur, pixels.

    Raises:
        UserError: for an unknown kind.
    """
    if kind == "mean":
        return training.mean((0, 1, 2))
    if kind == "mean-image":
        return training.mean(0)
    if kind == "blur":
        return jax.vmap(lambda image: blurred(image, jnp.float32(sigma)))(images)
    if kind == "noise":
        noise = jax.random.normal(key, images.shape)
        return training.mean((0, 1, 2)) + training.std((0, 1, 2)) * noise
    raise UserError(f"fill={kind!r}: expected one of {', '.join(FILLS)}")


class Logits(NamedTuple):
    """Logits of a test set at every fraction, [Q, N, L]."""

    erase: np.ndarray
    restore: np.ndarray


@partial(jax.jit, static_argnums=(0, 6))
def _at_fractions(
    predict: Predict, variables: Any, images: Array, ranks: Array, qs: Array, fill: Array, batch: int
) -> tuple[Array, Array]:
    fill = jnp.broadcast_to(fill, images.shape)
    per_image = ranks.ndim == 3

    def at(q: Array) -> tuple[Array, Array]:
        mask = global_maps.top(ranks, q)

        def some(item: Any) -> tuple[Array, Array]:
            image, instead, *own = item
            own = own[0] if per_image else mask
            pair = jnp.stack(
                [global_maps.erased(image[None], own, instead)[0], global_maps.restored(image[None], own, instead)[0]]
            )
            found = predict(variables, pair)
            return found[0], found[1]

        items = (images, fill, mask) if per_image else (images, fill)
        return jax.lax.map(some, items, batch_size=min(batch, len(images)))

    return jax.lax.map(at, qs)


def logits_at(
    predict: Predict,
    variables: Any,
    images: Float[Array, "n h w c"],
    ranks: Int[Array, "*n h w"],
    qs: Sequence[float] = GRID,
    fill: Any = 0.0,
    batch: int = 32,
) -> Logits:
    """Logits with the top q pixels erased, and with them alone restored, for every q; one program for all q.

    Args:
        predict: the same object in every call, as it is compiled once.
        variables: of the network.
        images: the test set.
        ranks: of `global_maps.pixel_ranks`: one ranking for all images, [H, W], or one for each, [N, H, W].
        qs: fractions.
        fill: of `fill_of`, or a number.
        batch: images at once.

    Raises:
        UserError: for fractions outside 0..1, or rankings of another shape.
    """
    if not len(qs) or min(qs) < 0 or max(qs) > 1:
        raise UserError(f"qs: found {min(qs, default=0)} to {max(qs, default=0)}, expected fractions in 0..1")
    if ranks.shape not in (images.shape[1:3], images.shape[:3]):
        raise UserError(f"ranks: found shape {list(ranks.shape)}, expected that of an image or of all, {images.shape}")
    given = jnp.asarray(images), jnp.asarray(ranks), jnp.asarray(qs, jnp.float32), jnp.asarray(fill)
    erase, restore = _at_fractions(predict, variables, *given, batch)
    return Logits(np.asarray(erase), np.asarray(restore))


class Curves(NamedTuple):
    """Performance over the fractions."""

    qs: np.ndarray
    erase: np.ndarray
    """[Q]: from the full performance at 0 to nothing known at 1."""
    restore: np.ndarray
    """[Q]: the other way."""


def curves_of(logits: Logits, labels: np.ndarray, metric: Metric, qs: Sequence[float] = GRID) -> Curves:
    """Performance at every fraction, on the host. AUCs below 1/2 stay."""
    of = lambda part: np.array([metric(at, labels) for at in part])
    return Curves(np.asarray(qs), of(logits.erase), of(logits.restore))


def peppr_curves(
    predict: Predict,
    variables: Any,
    images: Float[Array, "n h w c"],
    labels: np.ndarray,
    ranks: Int[Array, "*n h w"],
    metric: Metric,
    qs: Sequence[float] = GRID,
    fill: Any = 0.0,
    batch: int = 32,
) -> Curves:
    """Erasing and restoring curves of a ranking; arguments as of `logits_at` and `curves_of`.

    The images must not be those that the ranking was made from.
    """
    return curves_of(logits_at(predict, variables, images, ranks, qs, fill, batch), labels, metric, qs)


def mean_curves(many: Sequence[Curves]) -> Curves:
    """The mean of curves over one grid, e.g. of several random rankings."""
    return Curves(many[0].qs, *(np.mean([getattr(c, side) for c in many], 0) for side in ("erase", "restore")))


class Summary(NamedTuple):
    """Numbers of a pair of curves; the difference to the random control is what can be read."""

    erase_area: float
    """Mean of the erasing curve over q: small where the map is faithful."""
    restore_area: float
    peppr: float
    """restore_area - erase_area; 0 on average for a random ranking."""
    above_random: float
    """peppr less that of the control."""
    enough: float
    """Smallest q at which 95% of the full performance is restored; NaN where none is."""


def peppr_summary(curves: Curves, control: Curves, share: float = 0.95) -> Summary:
    """Summarise curves against those of a control, e.g. `mean_curves` of five or more random rankings."""
    area = lambda y, c: float(np.trapezoid(y, c.qs) / (c.qs[-1] - c.qs[0]))
    score = lambda c: area(c.restore, c) - area(c.erase, c)
    reached = np.flatnonzero(curves.restore >= share * curves.restore[-1])
    enough = float(curves.qs[reached[0]]) if len(reached) else float("nan")
    own = score(curves)
    return Summary(area(curves.erase, curves), area(curves.restore, curves), own, own - score(control), enough)


def random_ranks(size: tuple[int, int], count: int, key: Array) -> list[Array]:
    """`count` random rankings of the pixels."""
    nothing = jnp.zeros(size)
    return [global_maps.pixel_ranks(nothing, k) for k in jax.random.split(key, count)]


def retrained_curve(
    fit: Callable[[Array], Callable[[Array], Any]],
    training: Float[Array, "m h w c"],
    images: Float[Array, "n h w c"],
    labels: np.ndarray,
    ranks: Int[Array, "h w"],
    metric: Metric,
    qs: Sequence[float],
    fill: Any = 0.0,
) -> np.ndarray:
    """Performance of networks that are trained on the top q pixels alone (after ROAR, Hooker et al., 2019), [Q].

    What a region holds is told apart from how a network that saw whole images reacts to holes.

    Args:
        fit: training images with all but the top q pixels filled -> (images -> logits).
        training: images to train on.
        images: test images, filled alike.
        labels: [N, L] of the test images.
        ranks: of all images.
        metric: see `METRICS`.
        qs: fractions, one training each.
        fill: see `fill_of`.
    """
    found = []
    for q in qs:
        mask = global_maps.top(ranks, q)
        predict = fit(global_maps.restored(training, mask, fill))
        found.append(metric(np.asarray(predict(global_maps.restored(images, mask, fill))), labels))
    return np.array(found)
