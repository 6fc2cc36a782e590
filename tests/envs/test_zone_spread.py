"""Zone and penalty spread against a slow reference, and their tasks."""

import jax
import numpy as np
import pytest
import references as ref
from playing import play
from scipy import stats

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs.zone_spread import ZoneSpread


@pytest.mark.parametrize("options", [{"task_set": "all"}, {"num_agents": 5, "penalty": 3.0, "horizon": 12}], ids=str)
def test_zone_spread_follows_the_reference(options):
    """From each state by itself: contacts are stiff, so trajectories in other precisions part."""
    env = ZoneSpread(**options)
    before, action, after, ts, alive = play(env)
    assert alive.all()
    wide = lambda x: x.astype(np.float64)
    hits = 0
    for t in range(env.horizon):
        pos, vel, reward, obs = ref.zone_spread(
            *(wide(x[t]) for x in (before.pos, before.vel, before.landmarks)),
            action[t],
            wide(before.theta.penalty[t]),
        )
        np.testing.assert_allclose(after.pos[t], pos, atol=1e-5)
        np.testing.assert_allclose(after.vel[t], vel, atol=1e-4)  # a hundred times a distance
        np.testing.assert_allclose(ts.obs[t], obs, atol=1e-4)
        edge = np.abs(np.linalg.norm(pos[:, :, None] - pos[:, None], axis=-1) - 0.3).min((1, 2)) < 1e-5
        np.testing.assert_allclose(ts.reward[t][~edge], reward[~edge], atol=1e-5)
        assert edge.mean() < 0.02
        hits += (np.ptp(reward, axis=1) > 0.4).sum()
    assert hits > 50
    np.testing.assert_array_equal(ts.truncated, np.arange(env.horizon)[:, None] == env.horizon - np.ones(200))


def test_starts_and_tasks_of_zone_spread():
    env = ZoneSpread(task_set="all")
    keys = jax.random.split(jax.random.key(0), 10_000)
    state, ts = jax.jit(jax.vmap(env.reset))(keys)
    for x, extent in ((state.pos, 1), (state.landmarks, 2)):
        counts = np.histogram(np.asarray(x).ravel(), bins=20, range=(-extent, extent))[0]
        assert counts.sum() == x.size
        assert stats.chisquare(counts).pvalue > 1e-3
    assert ts.obs.shape == (10_000, 3, 14)
    assert not np.any(state.vel)
    assert stats.chisquare(np.bincount(state.theta.task)).pvalue > 1e-3
    assert list(env.catalogue()) == ["zone", "penalty-5", "penalty-50"]
    np.testing.assert_array_equal(env.tasks("train").penalty, [1])
    np.testing.assert_array_equal(env.tasks("test").penalty, [5, 50])
    # one start in three tasks: rewards differ by what collisions cost
    step = jax.jit(
        jax.vmap(lambda theta, s, k: env.step(k, s._replace(theta=theta), np.zeros(3, int)), (0, None, None))
    )
    close = jax.tree.map(lambda x: x[0], state)._replace(pos=np.float32([[0, 0], [0.2, 0], [0.9, 0.9]]))
    reward = step(env.tasks("all"), close, keys[0])[1].reward
    np.testing.assert_allclose(reward[:, :2] - reward[:, 2:], [[-0.5] * 2, [-2.5] * 2, [-25] * 2], atol=1e-4)
    assert step._cache_size() == 1
    assert env.frame(close).shape == (320, 320, 3)


def test_agents_of_zone_spread_are_exchangeable():
    env, order = ZoneSpread(num_agents=4, penalty=2.0), np.array([2, 0, 3, 1])
    before, action, *_ = play(env, episodes=16, steps=8)
    states, actions = jax.tree.map(lambda x: x[-1], (before, action))
    renamed = states._replace(pos=states.pos[:, order], vel=states.vel[:, order])
    keys = jax.random.split(jax.random.key(0), 16)
    step = jax.jit(jax.vmap(env.step))
    one, two = step(keys, states, actions)[1], step(keys, renamed, actions[:, order])[1]
    np.testing.assert_allclose(two.reward, one.reward[:, order], atol=1e-5)
    np.testing.assert_allclose(two.obs[..., :12], one.obs[:, order, :12], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_agents": 1}, "num_agents=1"),
        ({"penalty": -5.0}, "penalty=-5.0"),
        ({"task_set": "penalty"}, "'penalty'"),
    ],
)
def test_wrong_options_of_zone_spread_are_named(options, found):
    with pytest.raises(UserError, match=found):
        envs.make("zone_spread", **options)
