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
