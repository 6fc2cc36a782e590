"""Losses and measures of segmentations, shared by the methods that outline things in images.

Correlations, Wilson's and patient-clustered intervals are those of `jaxstack.report.stats` (`pearson`, `wilson`,
`cluster_bootstrap`).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxstack.core.errors import UserError
from jaxstack.report.classification import auc as auc

AnyArray = Array | np.ndarray


def weighted_bce(
    logits: Float[AnyArray, "*b h w c"], targets: Float[AnyArray, "*b h w c"], weights: Any = 1.0
) -> Float[Array, "*b"]:
    """Binary cross entropy in nats, averaged over pixels, then summed over channels with their weights.

    Args:
        logits: [..., H, W, C].
        targets: in 0..1, likewise.
        weights: of the channels, [C] or a number.

    Returns:
        [...], one value for each image.
    """
    each = optax.sigmoid_binary_cross_entropy(logits, targets).mean((-3, -2))
    return (each * jnp.asarray(weights)).sum(-1)


def soft_dice_loss(
    probabilities: Float[AnyArray, "*b h w"], targets: Float[AnyArray, "*b h w"], smooth: float = 1.0
) -> Float[Array, "*b"]:
    """1 - (2 sum p t + s) / (sum p + sum t + s), for each image (Milletari et al., 2016, without squares).

    Args:
        probabilities: [..., H, W].
        targets: in 0..1, likewise.
        smooth: s, which makes an empty prediction of an empty target right.
    """
    both = (probabilities * targets).sum((-2, -1))
    either = probabilities.sum((-2, -1)) + targets.sum((-2, -1))
    return 1.0 - (2.0 * both + smooth) / (either + smooth)


def _counts(found: Any, truth: Any) -> tuple[Array, Array, Array]:
    found, truth = jnp.asarray(found, bool), jnp.asarray(truth, bool)
    size = lambda mask: mask.sum((-2, -1), dtype=jnp.float32)
    return size(found & truth), size(found), size(truth)


def dice(found: Bool[AnyArray, "*b h w"], truth: Bool[AnyArray, "*b h w"]) -> Float[Array, "*b"]:
    """2 |A and B| / (|A| + |B|) of masks [..., H, W]; 1 where both are empty."""
    both, a, b = _counts(found, truth)
    return jnp.where(a + b > 0, 2.0 * both / jnp.maximum(a + b, 1.0), 1.0)


def iou(found: Bool[AnyArray, "*b h w"], truth: Bool[AnyArray, "*b h w"]) -> Float[Array, "*b"]:
    """|A and B| / |A or B| of masks [..., H, W]; 1 where both are empty."""
    both, a, b = _counts(found, truth)
    union = a + b - both
    return jnp.where(union > 0, both / jnp.maximum(union, 1.0), 1.0)


class BoundaryError(NamedTuple):
    """How far a boundary lies from the true one, in rows."""

    signed: Array
    """[...] mean of found - true: positive where the boundary found lies too low. Dice hides it."""
    absolute: Array
    """[...] mean of |found - true|."""
    columns: Array
    """[...] share of the true boundary's columns that were found; means are over these."""


def boundary_error(
    found: Float[AnyArray, "*b w"],
    truth: Float[AnyArray, "*b w"],
    found_valid: Bool[AnyArray, "*b w"],
    truth_valid: Bool[AnyArray, "*b w"],
) -> BoundaryError:
    """Compare boundaries given as a row for each column.

    Args:
        found: rows [..., W].
        truth: rows [..., W].
        found_valid: columns that have a row.
        truth_valid: likewise.

    Returns:
        Means over the columns of both; NaN where there are none.
    """
    both = found_valid & truth_valid
    count = both.sum(-1)
    gap = jnp.where(both, jnp.asarray(found, jnp.float32) - truth, 0.0)
    mean = lambda x: jnp.where(count > 0, x.sum(-1) / jnp.maximum(count, 1), jnp.nan)
    share = count / jnp.maximum(truth_valid.sum(-1), 1)
    return BoundaryError(mean(gap), mean(jnp.abs(gap)), share)


class Agreement(NamedTuple):
    """Bland and Altman's limits of agreement (1986), with confidence intervals from the t distribution."""

    bias: float
    """Mean of found - true."""
    bias_low: float
    bias_high: float
    lower: float
    """Bias - 1.96 standard deviations of the differences."""
    upper: float
    """Bias + 1.96 standard deviations."""
    limit_reach: float
    """Half of each limit's confidence interval: t sqrt(3 / N) standard deviations."""


def bland_altman(found: Any, truth: Any, confidence: float = 0.95) -> Agreement:
    """Return bias and limits of agreement of `found` [N] with `truth` [N].

    Raises:
        UserError: other shapes, values that are not finite, or fewer than 3 pairs.
    """
    from scipy.stats import t

    x, y = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError(
            f"found, truth: found shapes {x.shape} and {y.shape}, expected at least 3 pairs of finite numbers"
        )
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence}: expected a number between 0 and 1")
    gap = x - y
    bias, deviation, n = float(gap.mean()), float(gap.std(ddof=1)), len(gap)
    factor = float(t.ppf(0.5 + confidence / 2, n - 1))
    reach = factor * deviation / n**0.5
    return Agreement(
        bias,
        bias - reach,
        bias + reach,
        bias - 1.96 * deviation,
        bias + 1.96 * deviation,
        factor * deviation * (3.0 / n) ** 0.5,
    )
