"""Tasks inside the state, and hidden_corner, the smallest environment that has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from playing import play
from scipy import stats

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs import rollout, vector
from jaxstack.envs.hidden_corner import TEST, HiddenCorner, optimum
from jaxstack.envs.wrappers import AgentId, FrameStack, TimeLimit


@pytest.mark.parametrize("options", [{"task_set": "all"}, {"size": 3, "horizon": 7}], ids=str)
def test_hidden_corner_follows_the_reference(options):
    env = HiddenCorner(**options)
    before, action, after, ts, alive = play(env)
    assert alive.all()
    met = 0
    for t in range(env.horizon):
        theta = before.theta
        pos, reward = ref.hidden_corner(before.pos[t], theta.corner[t], theta.turned[t], action[t], env.size)
        np.testing.assert_array_equal(ts.reward[t], np.repeat(reward[:, None], 2, 1))
        np.testing.assert_array_equal(after.pos[t][reward == 0], pos[reward == 0])
        cells = after.pos[t].reshape(-1, 4)
        np.testing.assert_allclose(ts.obs[t, :, 0], cells / (env.size - 1), atol=1e-6)
        np.testing.assert_allclose(ts.obs[t, :, 1], cells[:, [2, 3, 0, 1]] / (env.size - 1), atol=1e-6)
        met += reward.sum()
    assert met >= 2
    assert after.pos.min() == 0
    assert after.pos.max() == env.size - 1
    np.testing.assert_array_equal(ts.truncated, np.arange(env.horizon)[:, None] == env.horizon - np.ones(200))


def test_hidden_corner_places_agents_uniformly():
    env = HiddenCorner()
    starts = jax.jit(jax.vmap(lambda k: env.reset(k)[0]))(jax.random.split(jax.random.key(0), 10_000))
    joint = starts.pos.reshape(-1, 4) @ np.array([125, 25, 5, 1])
    assert stats.chisquare(np.bincount(joint, minlength=625)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(starts.theta.task)).pvalue > 1e-3
    # both stand in their corner and stay: met, and put on random cells
    corner = jnp.repeat(starts.theta.corner[:, None] * 4, 2, 1)
    keys = jax.random.split(jax.random.key(1), 10_000)
    still = jnp.zeros((10_000, 2), jnp.int32)
    state, ts = jax.jit(jax.vmap(env.step))(keys, starts._replace(pos=corner), still)
    assert np.all(ts.reward == 1)
    joint = state.pos.reshape(-1, 4) @ np.array([125, 25, 5, 1])
    assert stats.chisquare(np.bincount(joint, minlength=625)).pvalue > 1e-3


@pytest.mark.parametrize("size", [3, 5])
def test_the_optimum_is_the_value_of_the_joint_game(size):
    """Value iteration over joint cells and joint actions, which assumes nothing about the way to play."""
    env = HiddenCorner(size=size)
    for name in ("nw", "sw", "se-turned"):
        theta = jax.tree.map(lambda x: x[0], env.tasks(name))
        pos = np.argwhere(np.ones((size,) * 4)).reshape(-1, 2, 2)
        values = np.zeros(len(pos))
        plays = np.argwhere(np.ones((5, 5)))
        results = [
            ref.hidden_corner(
                pos, np.tile(theta.corner, (len(pos), 1)), [theta.turned] * len(pos), np.tile(a, (len(pos), 1)), size
            )
            for a in plays
        ]
        after = np.stack([p.reshape(-1, 4) @ size ** np.arange(3, -1, -1) for p, _ in results])
        reward = np.stack([r for _, r in results])
        for _ in range(env.horizon):
            values = np.where(reward > 0, 1 + values.mean(), values[after]).max(0)
        assert optimum(theta, env) == pytest.approx(values.mean())


def test_sets_of_hidden_corner():
    env = HiddenCorner()
    every, train = env.tasks("all"), env.tasks("train")
    assert env.num_tasks == len(every.task) == 8
    np.testing.assert_array_equal(every.task, np.arange(8))
    np.testing.assert_array_equal(train.task, np.arange(6))
    np.testing.assert_array_equal(env.tasks("test,nw,test").task, [6, 7, 0])
    rows = {(*c.tolist(), bool(t)) for c, t in zip(every.corner, every.turned)}
    assert len(rows) == 8
    assert set((train.corner @ [2, 1]).tolist()) == {0, 1, 2, 3}
    assert set(train.turned.tolist()) == {False, True}
    assert {n for n in env.catalogue() if n not in env.sets()["train"]} == set(TEST)
    assert len({optimum(jax.tree.map(lambda x, i=i: x[i], every)) for i in range(8)}) == 1


def test_a_given_task_and_a_drawn_one_are_the_same_start():
    env = HiddenCorner(task_set="all")
    reset = jax.jit(env.reset)
    for seed in range(5):
        state, ts = reset(jax.random.key(seed))
        given = env.reset(jax.random.key(seed), state.theta)
        jax.tree.map(np.testing.assert_array_equal, (state, ts), given)


def test_one_program_serves_tasks_side_by_side():
    """Also of sets that the environment's own option does not name."""
    env, every = HiddenCorner(task_set="train"), HiddenCorner().tasks("all")
    action = jnp.asarray([[1, 2], [3, 4], [0, 1]])

    @jax.jit
    def run(key, theta):
        state, _ = env.reset(key, theta)
        return jax.lax.scan(lambda s, a: env.step(key, s, a), state, action)

    keys = jax.random.split(jax.random.key(0), 8)
    together = jax.jit(jax.vmap(run))(keys, every)
    for i in range(8):
        alone = run(keys[i], jax.tree.map(lambda x, i=i: x[i], every))
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda x, i=i: x[i], together))
    assert run._cache_size() == 1
    np.testing.assert_array_equal(env.task_of(together[0]), np.arange(8))


@pytest.mark.parametrize("mode", ["pool", "exact"])
def test_each_episode_draws_a_task_of_the_set(mode):
    env = FrameStack(AgentId(TimeLimit(HiddenCorner(task_set="test", horizon=9), 3)), 2)
    vec = envs.vectorise(env, 16, mode)
    act, draw = rollout.random_policy(vec)

    def seen(noise, carry, vs):
        return *act(noise, carry, vs)[:2], env.task_of(vs.env)

    vs = vector.init(vec, jax.random.key(0))
    played = jax.jit(lambda key: rollout.collect(vec, seen, key, vs, (), 30, draw))(jax.random.key(1))
    task = np.asarray(played.steps.extras)
    first = np.asarray(played.steps.first)
    assert set(task.ravel().tolist()) == {6, 7}
    np.testing.assert_array_equal(first.argmax(0), 0)
    assert (task[1:] == task[:-1])[~first[1:]].all()
    changed = (task[1:] != task[:-1])[first[1:]].mean()
    assert 0.3 < changed < 0.7, "a new episode draws anew"
    assert env.num_tasks == 8
    np.testing.assert_array_equal(env.tasks("test").task, [6, 7])
    state, _ = env.reset(jax.random.key(0), HiddenCorner().catalogue()["nw"])
    assert int(env.task_of(state)) == 0


def test_the_picture_shows_corner_and_agents():
    env = HiddenCorner(task_set="se")
    state, _ = env.reset(jax.random.key(0))
    frame = env.frame(state._replace(pos=jnp.asarray([[0, 0], [0, 2]])))
    assert frame.shape == (320, 320, 3)
    colours = [tuple(frame[y, x]) for y, x in ((315, 315), (20, 32), (20, 160))]
    assert len({*colours, (255, 255, 255)}) == 4


def test_bad_tasks_are_named():
    theta = HiddenCorner().catalogue()["nw"]
    for make, found in (
        (lambda: envs.make("hidden_corner", task_set="trian"), "'trian'.*train"),
        (lambda: envs.make("hidden_corner", size=1), "size=1"),
        (lambda: HiddenCorner().tasks("nw,north"), "'north'"),
        (lambda: HiddenCorner().reset(jax.random.key(0), HiddenCorner().tasks("train")), "theta.task: found shape"),
        (lambda: HiddenCorner().reset(jax.random.key(0), 3), "theta: found int, expected Theta"),
        (lambda: envs.make("dispersion").tasks("train"), "'dispersion' has no sets of tasks"),
        (lambda: envs.make("dispersion").task_of(theta), "'dispersion' has no sets of tasks"),
        (lambda: envs.make("dispersion").num_tasks, "'dispersion' has no sets of tasks"),
    ):
        with pytest.raises(UserError, match=found):
            make()
