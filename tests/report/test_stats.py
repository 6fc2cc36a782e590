import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import trim_mean

from jaxstack.core.errors import UserError
from jaxstack.report import stats


@pytest.mark.parametrize("shape", [(4, 1), (5, 1), (7, 3), (10, 26), (1, 1)])
def test_iqm_is_the_trimmed_mean(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(stats.iqm(jnp.asarray(x)), trim_mean(x, 0.25, axis=None), rtol=1e-5, atol=1e-6)


def test_point_estimates_by_hand():
    x = jnp.asarray([[0.0, 4.0], [2.0, 8.0]])
    assert float(stats.mean(x)) == 3.5
    assert float(stats.median(x)) == 3.5  # median over tasks of (1, 6)
    np.testing.assert_allclose(stats.optimality_gap(x, 1.0), 0.25)
    np.testing.assert_allclose(stats.profile(x, jnp.asarray([1.0, 5.0])), [0.75, 0.25])


def test_probability_of_improvement_counts_ties_half():
    x, y = jnp.asarray([[1.0], [2.0]]), jnp.asarray([[1.0], [0.0]])
    np.testing.assert_allclose(stats.improvement(x, y), (0.5 + 1 + 1 + 1) / 4)
    np.testing.assert_allclose(stats.improvement(x, x), 0.5)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    data = jnp.asarray(rng.normal(size=(200, 30, 1)), jnp.float32)

    def inside(x, key):
        _, low, high = stats.bootstrap(stats.mean, x, key=key, resamples=500)
        return float(low) <= 0.0 <= float(high)

    hits = [inside(x, jax.random.key(i)) for i, x in enumerate(data[:100])]
    assert 0.86 <= np.mean(hits) <= 0.99


def test_bootstrap_is_stratified_and_reproducible():
    # two tasks of constant but different scores: resampling within tasks cannot move the mean
    x = np.tile([[0.0, 10.0]], (5, 1))
    e = stats.estimate(stats.mean, x)
    assert e == stats.Estimate(5.0, 5.0, 5.0)
    y = np.random.default_rng(2).normal(size=(6, 2))
    assert stats.estimate(stats.iqm, y) == stats.estimate(stats.iqm, y)
    assert stats.estimate(stats.iqm, y) != stats.estimate(stats.iqm, y, key=jax.random.key(5))


def test_difference_and_summary():
    x, y = np.asarray([3.0, 3.0, 3.0]), np.asarray([1.0, 1.0, 1.0])
    assert stats.difference(x, y) == stats.Estimate(2.0, 2.0, 2.0)
    assert set(stats.summary(x)) == {"iqm", "mean", "median", "optimality_gap"}


@pytest.mark.parametrize("bad", [[], [[]], [1.0, float("nan")], [[1.0], [1.0, 2.0]], np.zeros((2, 2, 2)), ["a"]])
def test_bad_tables_are_refused(bad):
    with pytest.raises(UserError, match="scores"):
        stats.table(bad)
