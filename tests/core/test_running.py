import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core import running

X = np.random.default_rng(0).normal(3.0, 2.0, size=(60, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("cuts", [[60], [1, 59], [7, 20, 33], [1] * 60])
def test_updates_over_chunks_equal_one_pass(cuts):
    stats, update, at = running.init((3,)), jax.jit(running.update), 0
    for n in cuts:
        stats, at = update(stats, jnp.asarray(X[at : at + n])), at + n
    np.testing.assert_allclose(stats.mean, X.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(stats.var, X.var((0, 1)), rtol=1e-4)
    assert float(stats.count) == pytest.approx(240, abs=1e-2)


def test_scalar_statistics_pool_everything():
    stats = running.update(running.init(()), jnp.asarray(X))
    assert float(stats.mean) == pytest.approx(X.mean(), rel=1e-5)
    assert float(stats.var) == pytest.approx(X.var(), rel=1e-5)


def test_a_far_mean_loses_little_precision():
    stats = running.init(())
    for part in np.split(X + 1000.0, 6):
        stats = running.update(stats, jnp.asarray(part))
    assert float(stats.var) == pytest.approx(X.var(), rel=1e-3)


def test_apply_standardises_clips_and_inverts():
    stats = running.update(running.init((3,)), jnp.asarray(X))
    z = running.apply(stats, jnp.asarray(X))
    np.testing.assert_allclose(z.mean((0, 1)), 0.0, atol=1e-3)
    np.testing.assert_allclose(z.std((0, 1)), 1.0, atol=1e-3)
    np.testing.assert_allclose(running.unapply(stats, z), X, atol=1e-4)
    assert float(running.apply(stats, jnp.full(3, 1e6)).max()) == 10.0
    assert float(running.apply(stats, jnp.full(3, 1e6), clip=2.0).max()) == 2.0


def test_constant_data_stays_finite():
    stats = running.init(())
    for _ in range(200):
        stats = running.update(stats, jnp.full(1000, 5.0))
    assert np.isfinite(running.apply(stats, jnp.float32(5.0)))
    assert abs(float(running.apply(stats, jnp.float32(5.0)))) < 0.2


def test_off_passes_through():
    assert running.apply((), X) is X
    assert running.unapply((), X) is X


def test_reward_scaling_equals_a_numpy_loop_over_two_rollouts():
    rng = np.random.default_rng(1)
    rewards, done = rng.normal(size=(2, 10, 3, 2)).astype(np.float32), rng.random((2, 10, 3)) < 0.2
    scale, scaled, ret, history = running.init_reward(3, 2), jax.jit(running.scale_reward), np.zeros((3, 2)), []
    for r, d in zip(rewards, done):
        scale, out = scaled(scale, jnp.asarray(r), jnp.asarray(d), jnp.float32(0.9))
        for t in range(10):
            ret = ret * 0.9 + r[t]
            history.append(ret.copy())
            ret = np.where(d[t][:, None], 0.0, ret)
        np.testing.assert_allclose(out, np.clip(r / np.std(history), -10, 10), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(scale.ret, ret, rtol=1e-4, atol=1e-6)
    assert float(scale.stats.count) == pytest.approx(120, abs=1e-2)


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_enters(shape, weighted, bad):
    """In one feature of an observation: that observation does not count."""
    x = X.copy()
    rows = (slice(5, 9), 2)
    x[(*rows, 1)] = bad
    left = np.delete(X.reshape(-1, 3), np.arange(5, 9) * 4 + 2, 0)
    if shape == ():
        left = np.delete(X.ravel(), (np.arange(5, 9) * 4 + 2) * 3 + 1)
    weight = jnp.ones(x.shape[: 3 - len(shape)]) if weighted else None
    got = jax.jit(running.update)(running.init(shape), jnp.asarray(x), weight)
    want = running.update(running.init(shape), jnp.asarray(left))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_large_magnitude_counts_as_the_largest():
    far = np.float32([1e20, -3e38, 1.0])
    cut = np.clip(far, -running.LARGEST, running.LARGEST)
    start = running.update(running.init(()), jnp.asarray(X))
    for weight in (None, jnp.ones(3)):
        got, want = (running.update(start, jnp.asarray(x), weight) for x in (far, cut))
        assert got == want
        assert np.isfinite(got).all()


@pytest.mark.parametrize("nothing", ["weights", "numbers"])
@pytest.mark.parametrize("begun", [False, True])
def test_an_update_with_nothing_to_count_changes_nothing(nothing, begun):
    stats = running.init((3,))
    stats = running.update(stats, jnp.asarray(X)) if begun else stats
    x, weight = (jnp.asarray(X), jnp.zeros(4)) if nothing == "weights" else (jnp.full_like(X, jnp.nan), None)
    got = jax.jit(running.update)(stats, x, weight)
    for a, b in zip(got, stats):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_bad_rewards_leave_the_running_return_finite(bad):
    rewards = np.ones((6, 2, 1), np.float32)
    rewards[2, 0] = bad
    scale, _ = running.scale_reward(
        running.init_reward(2, 1), jnp.asarray(rewards), jnp.zeros((6, 2), bool), jnp.float32(0.5)
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(scale))
    if not np.isfinite(bad):  # as if it had not been paid; one return fewer counts
        assert float(scale.stats.count) == 11
        np.testing.assert_allclose(scale.ret[:, 0], [2 - 0.5**5 - 0.5**3, 2 - 0.5**5])


def test_returns_are_cut_too():
    scale, _ = running.scale_reward(
        running.init_reward(1, 1), jnp.full((5, 1, 1), running.LARGEST), jnp.zeros((5, 1), bool), jnp.float32(1.0)
    )
    assert float(scale.ret[0, 0]) == np.float32(running.LARGEST)


def test_groups_have_the_statistics_of_their_own_agents():
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(20, 5, 4, 2)).astype(np.float32), rng.random((20, 5, 4)) < 0.7
    groups = (0, 1, 0, 2)
    stats = running.init_groups((2,), groups)
    for part in (slice(0, 8), slice(8, 20)):
        stats = jax.jit(running.update_groups, static_argnums=3)(stats, x[part], weight[part], groups)
    for g in range(3):
        own = x[:, :, np.asarray(groups) == g][weight[:, :, np.asarray(groups) == g]]
        np.testing.assert_allclose(stats.mean[g], own.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(stats.var[g], own.var(0), rtol=1e-4)
        assert float(stats.count[g]) == len(own)
    each = running.of_agents(stats, groups)
    np.testing.assert_array_equal(each.mean, np.asarray(stats.mean)[list(groups)])
    np.testing.assert_allclose(running.unapply(each, running.apply(each, x)), x, atol=1e-4)
    poisoned = running.update_groups(stats, jnp.asarray(x).at[:, :, 1].set(jnp.inf), weight, groups)
    clean = running.update_groups(stats, x, weight, groups)
    for a, b in zip(poisoned, clean, strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])
    assert running.of_agents((), groups) == ()
    one = running.update(running.init((2,)), jnp.asarray(x), jnp.asarray(weight))
    for a, b in zip(running.update_groups(running.init_groups((2,), (0,) * 4), x, weight, (0,) * 4), one, strict=True):
        np.testing.assert_array_equal(a, b)
