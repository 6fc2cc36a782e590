import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core import running


def batches(count=4, shape=(7, 5, 3, 2)):
    rng = np.random.default_rng(0)
    return [rng.normal(3 * i, 1 + i, shape) for i in range(count)], [rng.random(shape[:-1]) < 0.6 for _ in range(count)]


def close(a, b, rtol=1e-4):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_moments_over_batches_are_those_of_all_data(masked):
    data, masks = batches()
    stats = running.init((2,))
    update = jax.jit(running.update)
    for x, m in zip(data, masks):
        stats = update(stats, jnp.asarray(x), jnp.asarray(m)) if masked else update(stats, jnp.asarray(x))
    kept = np.concatenate([x[m] if masked else x.reshape(-1, 2) for x, m in zip(data, masks)])
    close(stats.mean, kept.mean(0))
    close(stats.var, kept.var(0))
    close(stats.count, len(kept))


def test_an_empty_mask_changes_nothing():
    stats = running.update(running.init((2,)), jnp.asarray(batches()[0][0]))
    after = running.update(stats, jnp.full((4, 2), 1e6), jnp.zeros(4, bool))
    jax.tree.map(np.testing.assert_array_equal, stats, after)
    fresh = running.update(running.init(()), jnp.ones(3), jnp.zeros(3))
    close(running.apply(fresh, jnp.float32(0.5)), 0.5)


def test_full_weights_are_no_weights():
    x = jnp.asarray(batches()[0][1])
    one, two = running.update(running.init((2,)), x), running.update(running.init((2,)), x, jnp.ones(3))
    jax.tree.map(close, one, two)


def test_large_offsets_keep_their_variance():
    x = 300.0 + jax.random.normal(jax.random.key(0), (4000, 1))
    stats = running.init((1,))
    for part in jnp.split(x, 8):
        stats = running.update(stats, part, jnp.ones(500))
    close(stats.var, np.asarray(x, np.float64).var(0), rtol=0.005)


def test_apply_clips_and_unapply_inverts():
    stats = running.Running(jnp.float32(2.0), jnp.float32(4.0), jnp.float32(10))
    x = jnp.array([2.0, 6.0, 100.0])
    close(running.apply(stats, x), [0.0, 2.0, 10.0])
    close(running.unapply(stats, running.apply(stats, x[:2])), x[:2])
    assert running.apply((), x) is x
    assert running.unapply((), x) is x


def test_reward_scale_follows_the_running_return():
    """Each environment's discounted return, cut at its episode ends and carried from one rollout to the next."""
    rng = np.random.default_rng(1)
    scale, ret, seen = running.init_reward(3, 2), np.zeros((3, 2)), []
    for _ in range(3):
        reward, done = rng.normal(1, 2, (6, 3, 2)), rng.random((6, 3)) < 0.3
        for r, d in zip(reward, done):
            ret = 0.9 * ret + r
            seen.append(ret.copy())
            ret[d] = 0.0
        scale, scaled = running.scale_reward(
            scale, jnp.asarray(reward, jnp.float32), jnp.asarray(done), jnp.float32(0.9)
        )
        close(scale.ret, ret)
        close(scaled, np.clip(reward / np.std(seen), -10, 10), rtol=1e-3)
