"""Correlations, rank tests and bootstraps over groups of units. `jaxstack.report.stats` exports all of it.

What SciPy computes is SciPy's; here are its intervals for rank correlations, an exact signed-rank test that allows ties
and zeros, Nemenyi's comparison after Friedman's test, and a bootstrap that resamples whole groups.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError


class Estimate(NamedTuple):
    """A point estimate and its interval; the ends are NaN where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3f} (no interval)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Association(NamedTuple):
    """A correlation with its interval and the two-sided p-value of no association."""

    value: float
    low: float
    high: float
    p: float

    __str__ = Estimate.__str__


class Test(NamedTuple):
    """A test statistic and its p-value."""

    __test__ = False  # no test of pytest

    statistic: float
    p: float


def pearson(x: Any, y: Any, confidence: float = 0.95) -> Association:
    """Return the linear correlation of `x` [N] and `y` [N] with Fisher's interval, tanh(arctanh r +- z / sqrt(N - 3)).

    Raises:
        UserError: other shapes, values that are not finite, fewer than 4 pairs, or one constant.
    """
    from scipy.stats import pearsonr

    x, y = _pairs(x, y, 4)
    out: Any = pearsonr(x, y)
    return _fisher(out.statistic, out.pvalue, 1.0 / math.sqrt(len(x) - 3), confidence)


def spearman(x: Any, y: Any, confidence: float = 0.95) -> Association:
    """Return the rank correlation of `x` [N] and `y` [N]; ties get mean ranks.

    The interval is Fisher's with the standard error sqrt((1 + r^2 / 2) / (N - 3)) of Bonett and Wright (2000,
    "Sample size requirements for estimating Pearson, Kendall and Spearman correlations").

    Raises:
        UserError: as `pearson`.
    """
    from scipy.stats import spearmanr

    x, y = _pairs(x, y, 4)
    out: Any = spearmanr(x, y)
    return _fisher(out.statistic, out.pvalue, math.sqrt((1 + out.statistic**2 / 2) / (len(x) - 3)), confidence)


def kendall(x: Any, y: Any, confidence: float = 0.95) -> Association:
    """Return Kendall's tau-b of `x` [N] and `y` [N].

    The interval is Fisher's with the standard error sqrt(.437 / (N - 4)) of Bonett and Wright (2000), made for data
    without ties.

    Raises:
        UserError: as `pearson`, for fewer than 5 pairs.
    """
    from scipy.stats import kendalltau

    x, y = _pairs(x, y, 5)
    out: Any = kendalltau(x, y)
    return _fisher(out.statistic, out.pvalue, math.sqrt(0.437 / (len(x) - 4)), confidence)


def wilcoxon(
    x: Any, y: Any = 0.0, alternative: Literal["two-sided", "greater", "less"] = "two-sided", decimals: int = 12
) -> Test:
    """Return Wilcoxon's signed-rank test of the differences `x` - `y` [N], exact also with ties.

    The null distribution is that of the sum of positive ranks when each difference has either sign with probability
    1/2, given the ranks; zero differences are left out. With all of them zero the p-value is 1.

    Args:
        x: scores.
        y: scores of the same units, or a number.
        alternative: "greater" asks whether x is the larger.
        decimals: significant digits to which differences must agree to be tied.

    Returns:
        The sum of positive ranks and the p-value.

    Raises:
        UserError: other shapes, values that are not finite, or an unknown alternative.
    """
    from scipy.stats import rankdata

    if alternative not in ("two-sided", "greater", "less"):
        raise UserError(f"alternative={alternative!r}: expected 'two-sided', 'greater' or 'less'")
    x = _vector(x, "x")
    y = np.full_like(x, y) if np.ndim(y) == 0 else _vector(y, "y")
    if x.shape != y.shape or not np.isfinite(y).all():
        raise UserError(f"x, y: found {len(x)} and {len(y)} scores, expected as many finite numbers in both")
    d = x - y
    scale = max(np.abs(x).max(initial=0.0), np.abs(y).max(initial=0.0))
    d = d[np.abs(d) > scale * 10.0**-decimals]  # what rounding leaves of equal scores is no difference
    if not len(d):
        return Test(0.0, 1.0)
    size = np.abs(d)
    step = size.max() * 10.0**-decimals
    ranks = np.round(2 * rankdata(np.round(size / step))).astype(int)  # doubled: mean ranks are then whole
    ways = np.ones(1)
    for r in ranks:  # ways[s]: probability that the positive ranks sum to s / 2
        ways = (np.pad(ways, (0, r)) + np.pad(ways, (r, 0))) / 2.0
    total = int(ranks[d > 0].sum())
    greater, less = float(ways[total:].sum()), float(ways[: total + 1].sum())
    p = {"greater": greater, "less": less, "two-sided": min(1.0, 2 * min(greater, less))}[alternative]
    return Test(total / 2, min(1.0, p))


def benjamini_hochberg(p: Any) -> np.ndarray:
    """Return adjusted p-values [N]: those below q are found at a false discovery rate of q (Benjamini, Hochberg, 1995).

    Raises:
        UserError: p-values outside [0, 1].
    """
    from scipy.stats import false_discovery_control

    p = _vector(p, "p")
    if len(p) == 0 or p.min() < 0 or p.max() > 1:
        raise UserError(f"p: found {p.tolist()}, expected p-values in [0, 1]")
    return np.asarray(false_discovery_control(p, method="bh"))


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """Return the share of successes with Wilson's score interval (Wilson, 1927), right for small numbers and ends.

    Raises:
        UserError: `successes` outside [0, trials] or no trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise UserError(f"successes={successes}, trials={trials}: expected 0 <= successes <= trials, trials >= 1")
    from scipy.stats import binomtest

    interval = binomtest(int(successes), int(trials)).proportion_ci(confidence, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


class Friedman(NamedTuple):
    """Friedman's test over blocks and Nemenyi's comparison of all pairs of treatments (Demsar, 2006)."""

    statistic: float
    p: float
    ranks: np.ndarray
    """[K] mean rank of each treatment; 1 is the best."""
    critical_difference: float
    """Treatments whose mean ranks differ by more differ at the level that was asked for."""
    pairs: np.ndarray
    """[K, K] p-value of each pair."""


def friedman(scores: Any, largest: bool = True, confidence: float = 0.95) -> Friedman:
    """Compare K treatments over N blocks (data sets, environments) by ranks within each block.

    Args:
        scores: [N, K], one mean score per block and treatment.
        largest: whether the largest score has rank 1.
        confidence: of the critical difference.

    Returns:
        The chi-squared statistic (K - 1 degrees of freedom, corrected for ties), mean ranks, Nemenyi's comparison.

    Raises:
        UserError: another shape, fewer than 2 blocks or 3 treatments, or values that are not finite.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 3 or not np.isfinite(table).all():
        raise UserError(f"scores: found shape {table.shape}, expected finite [blocks >= 2, treatments >= 3]")
    blocks, treatments = table.shape
    ranks = rankdata(-table if largest else table, axis=1).mean(0)
    if (table == table[:, :1]).all():  # nothing to tell apart
        statistic, p = 0.0, 1.0
    else:
        statistic, p = (float(v) for v in friedmanchisquare(*table.T))
    error = math.sqrt(treatments * (treatments + 1) / (6.0 * blocks))
    critical = float(studentized_range.ppf(confidence, treatments, np.inf)) / math.sqrt(2) * error
    gaps = np.abs(ranks[:, None] - ranks[None]) / error * math.sqrt(2)
    pairs = np.clip(studentized_range.sf(gaps, treatments, np.inf), 0.0, 1.0)
    return Friedman(statistic, p, ranks, critical, np.where(gaps == 0, 1.0, pairs))


def cluster_bootstrap(
    statistic: Callable[..., Any],
    groups: Sequence[Any],
    *arrays: Any,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Return `statistic(*arrays)` with a percentile interval over resampled groups.

    Units of one group (images of a patient, windows of a series) depend on each other: whole groups are drawn with
    replacement, with all of their units. Intervals that draw units are too short there.

    Args:
        statistic: a function of NumPy arrays that returns a number; NaN where a resample cannot be evaluated (one class
            alone), which is left out.
        groups: [N] the group of each unit.
        arrays: [N, ...] each, resampled together along their first axis.
        resamples: number of resamples.
        seed: of the resamples.
        confidence: of the interval.

    Raises:
        UserError: arrays of other lengths, fewer than 2 groups, or more than half of the resamples not finite.
    """
    data = [np.asarray(a) for a in arrays]
    labels = np.asarray(groups)
    if not data or any(len(a) != len(labels) for a in data):
        raise UserError(
            f"groups: found {len(labels)} units, expected as many as in the arrays: {[len(a) for a in data]}"
        )
    names, code = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise UserError(f"groups: found {len(names)}, expected at least 2")
    if resamples < 1 or not 0 < confidence < 1:
        raise UserError(f"resamples={resamples}, confidence={confidence}: expected >= 1 and a number between 0 and 1")
    order = np.argsort(code, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(code))[:-1])
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        index = np.concatenate([members[g] for g in rng.integers(0, len(names), len(names))])
        draws[i] = statistic(*(a[index] for a in data))
    good = draws[np.isfinite(draws)]
    if 2 * len(good) < resamples:
        raise UserError(f"groups: found {resamples - len(good)} of {resamples} resamples not finite, expected few")
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(good, [tail, 1.0 - tail])
    return Estimate(float(statistic(*data)), float(low), float(high))


def _fisher(r: float, p: float, error: float, confidence: float) -> Association:
    from scipy.stats import norm

    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence}: expected a number between 0 and 1")
    reach = float(norm.ppf(0.5 + confidence / 2)) * error
    centre = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    return Association(float(r), math.tanh(centre - reach), math.tanh(centre + reach), float(p))


def _pairs(x: Any, y: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _vector(x, "x"), _vector(y, "y")
    if len(x) != len(y) or len(x) < least:
        raise UserError(f"x, y: found {len(x)} and {len(y)} numbers, expected at least {least} pairs")
    for name, v in (("x", x), ("y", y)):
        if np.ptp(v) == 0:
            raise UserError(f"{name}: found {len(v)} equal numbers, expected different ones: no correlation is defined")
    return x, y


def _vector(x: Any, name: str) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise UserError(f"{name}: found shape {x.shape}, expected a vector of finite numbers")
    return x
