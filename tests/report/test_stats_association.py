"""Correlations, rank tests and clustered bootstraps, against SciPy and published tables."""

import math

import numpy as np
import pytest
import scipy.stats as sp

from jaxstack.core.errors import UserError
from jaxstack.report import stats

RNG = np.random.default_rng(0)
X = RNG.normal(size=30)
Y = 0.6 * X + RNG.normal(size=30)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(stats.pearson, sp.pearsonr), (stats.spearman, sp.spearmanr), (stats.kendall, sp.kendalltau)]
)
def test_correlations_are_those_of_scipy_with_an_interval(ours, theirs):
    for y in (Y, np.round(Y)):  # with ties too
        a, b = ours(X, y), theirs(X, y)
        assert a.value == pytest.approx(b.statistic, abs=1e-12)
        assert a.p == pytest.approx(b.pvalue, abs=1e-12)
        assert -1 < a.low < a.value < a.high < 1
    mirrored = ours(X, -Y)
    assert (mirrored.low, mirrored.high) == pytest.approx((-ours(X, Y).high, -ours(X, Y).low))
    assert ours(X, Y, confidence=0.5).low > ours(X, Y).low
    assert ours(X, X)[:3] == pytest.approx((1.0, 1.0, 1.0))
    assert str(ours(X, Y)).count("[") == 1


def test_pearsons_interval_is_scipys_and_rank_intervals_cover_as_often_as_they_say():
    ci = sp.pearsonr(X, Y).confidence_interval(0.95)
    assert stats.pearson(X, Y)[1:3] == pytest.approx((ci.low, ci.high))
    rho = 0.5
    truth = {stats.spearman: 6 / math.pi * math.asin(rho / 2), stats.kendall: 2 / math.pi * math.asin(rho)}
    rng = np.random.default_rng(1)
    hits = dict.fromkeys(truth, 0)
    for _ in range(300):
        x = rng.normal(size=40)
        y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=40)
        for f, value in truth.items():
            e = f(x, y)
            hits[f] += e.low <= value <= e.high
    assert all(0.91 <= h / 300 <= 0.99 for h in hits.values()), hits


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_the_signed_rank_test_is_exact_also_with_ties_and_zeros(alternative):
    d = np.asarray([0.3, -0.7, 1.2, 2.0, -0.1, 0.9, 1.7, 0.5])
    a, b = stats.wilcoxon(d, alternative=alternative), sp.wilcoxon(d, alternative=alternative, method="exact")
    assert a.p == pytest.approx(b.pvalue, rel=1e-12)
    tied = np.asarray([1.0, 1.0, -1.0, 2.0, 2.0, 3.0, -3.0, 4.0])
    every = np.asarray(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T  # all signs
    ranks = sp.rankdata(np.abs(tied))
    null, own = ((every > 0) * ranks).sum(1), (ranks * (tied > 0)).sum()
    greater, less = (null >= own).mean(), (null <= own).mean()
    p = {"greater": greater, "less": less, "two-sided": min(1, 2 * min(greater, less))}[alternative]
    assert stats.wilcoxon(tied, alternative=alternative) == pytest.approx((own, p))
    assert stats.wilcoxon(np.append(tied, [0.0, 0.0]), alternative=alternative).p == pytest.approx(p)
    assert stats.wilcoxon(tied + 7.1, np.full(8, 7.1), alternative=alternative).p == pytest.approx(p)


def test_the_signed_rank_test_by_hand():
    assert stats.wilcoxon(np.arange(1.0, 11), alternative="greater").p == 1 / 1024
    assert stats.wilcoxon(np.arange(1.0, 6), alternative="greater").p == 1 / 32
    assert stats.wilcoxon([0.1 + 0.2, 1.0], [0.3, 1.0]) == (0.0, 1.0)  # rounding is no difference
    big = np.random.default_rng(2).normal(0.1, 1.0, 400)
    assert stats.wilcoxon(big).p == pytest.approx(sp.wilcoxon(big, method="asymptotic").pvalue, rel=0.02)


def test_benjamini_hochberg_by_hand():
    np.testing.assert_allclose(stats.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]), [0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_wilsons_interval_by_hand():
    e = stats.wilson(8, 10)
    z = sp.norm.ppf(0.975)
    centre, reach = (0.8 + z**2 / 20) / (1 + z**2 / 10), z * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400) / (1 + z**2 / 10)
    assert e == pytest.approx((0.8, centre - reach, centre + reach))
    assert stats.wilson(0, 5).low == 0
    assert stats.wilson(0, 5).high > 0.4
    assert stats.wilson(5, 5).high == 1


def test_friedman_is_scipys_and_nemenyi_has_the_published_critical_values():
    table = np.random.default_rng(3).normal(size=(12, 4)) + np.asarray([0.0, 0.0, 1.0, 2.0])
    out = stats.friedman(table)
    own = sp.friedmanchisquare(*table.T)
    assert (out.statistic, out.p) == pytest.approx((own.statistic, own.pvalue))
    assert out.ranks.argmin() == 3
    assert out.ranks.sum() == pytest.approx(10)
    np.testing.assert_allclose(stats.friedman(table, largest=False).ranks, 5 - out.ranks)
    gaps = np.abs(out.ranks[:, None] - out.ranks)
    np.testing.assert_array_equal(out.pairs < 0.05, gaps > out.critical_difference)
    np.testing.assert_allclose(np.diag(out.pairs), 1.0)
    # Demsar (2006), table 5: q at .05 for 3, 5 and 10 classifiers
    for k, q in ((3, 2.343), (5, 2.728), (10, 3.164)):
        blank = stats.friedman(np.tile(np.arange(k), (7, 1)))
        assert blank.critical_difference == pytest.approx(q * math.sqrt(k * (k + 1) / 42), rel=5e-4)
    assert stats.friedman(np.ones((4, 3)))[:2] == (0.0, 1.0)


def test_groups_are_resampled_whole():
    rng = np.random.default_rng(4)
    patients = np.repeat(np.arange(20), 10)
    x = np.repeat(rng.normal(size=20), 10) + 0.1 * rng.normal(size=200)  # ten images say little more than one
    clustered = stats.cluster_bootstrap(np.mean, patients, x)
    single = stats.cluster_bootstrap(np.mean, np.arange(200), x)
    assert clustered.value == single.value == pytest.approx(x.mean())
    width = lambda e: e.high - e.low
    assert width(clustered) == pytest.approx(2 * 1.96 * x.reshape(20, 10).mean(1).std() / math.sqrt(20), rel=0.1)
    assert width(clustered) > 2.5 * width(single)
    shuffled = rng.permutation(200)
    again = stats.cluster_bootstrap(np.mean, patients[shuffled], x[shuffled])
    assert again[1:] == pytest.approx(clustered[1:], abs=1e-12)  # the order of units does not matter
    # groups of unequal size, two arrays together, a statistic that some resamples lack
    sizes = np.repeat(["a", "b", "c", "d"], [1, 2, 3, 4])
    labels, scores = np.asarray([1, 0, 1, 0, 1, 1, 0, 1, 0, 1]), np.arange(10.0)
    auc = lambda s, y: (
        np.nan
        if y.min() == y.max()
        else sp.mannwhitneyu(s[y == 1], s[y == 0]).statistic / ((y == 1).sum() * (y == 0).sum())
    )
    e = stats.cluster_bootstrap(auc, sizes, scores, labels, resamples=200)
    assert 0 <= e.low <= e.value <= e.high <= 1


def test_paired_runs_are_resampled_together():
    rng = np.random.default_rng(5)
    base = rng.normal(10.0, 3.0, 8)
    better = base + 1.0 + 0.01 * rng.normal(size=8)
    paired = stats.estimate(stats.Difference(), better, base, paired=True)
    assert paired.high - paired.low < 0.02
    assert stats.difference(better, base).low < 0
    ratio = stats.estimate(stats.Ratio(), 2 * base, base, paired=True)
    assert ratio == pytest.approx((2.0, 2.0, 2.0), abs=1e-5)
    with pytest.raises(UserError, match="expected the same runs"):
        stats.estimate(stats.Difference(), base, base[:5], paired=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.pearson([1, 2, 3], [1, 2, 3]), "at least 4 pairs"),
        (lambda: stats.spearman([1, 2, 3, 4], [1, 1, 1, 1]), "y: found 4 equal"),
        (lambda: stats.kendall([1, 2, 3, 4, math.nan], range(5)), "finite"),
        (lambda: stats.pearson(X, Y, confidence=2), "confidence=2"),
        (lambda: stats.wilcoxon([1.0, 2.0], [1.0]), "found 2 and 1 scores"),
        (lambda: stats.wilcoxon([1.0], alternative="more"), "alternative='more'"),
        (lambda: stats.benjamini_hochberg([0.1, 1.2]), "p-values in"),
        (lambda: stats.wilson(3, 2), "successes=3"),
        (lambda: stats.friedman(np.ones((3, 2))), r"found shape \(3, 2\)"),
        (lambda: stats.cluster_bootstrap(np.mean, [1, 1], [1.0, 2.0]), "found 1, expected at least 2"),
        (lambda: stats.cluster_bootstrap(np.mean, [1, 2, 3], [1.0, 2.0]), "found 3 units"),
        (lambda: stats.cluster_bootstrap(lambda x: math.nan, [1, 2], [1.0, 2.0]), "resamples not finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
