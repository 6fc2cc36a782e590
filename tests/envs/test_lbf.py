"""Level-based foraging against a slow reference, its invariants and its tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from playing import play
from scipy import stats

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs.lbf import Lbf, stop_collisions


@pytest.mark.parametrize(
    "options",
    [
        {"task_set": "all", "num_agents": 4, "sight": 1},
        {"height": 5, "width": 6, "num_food": 2, "penalty": 0.3},
        {"height": 4, "width": 4, "num_agents": 3, "num_food": 1, "max_player_level": 3, "penalty": 0.1},
    ],
    ids=str,
)
def test_lbf_follows_the_reference(options):
    env = Lbf(**options)
    before, action, after, ts, alive = play(env)
    played = np.argwhere(alive)
    expected = [
        ref.lbf(
            *(x[t, e] for x in (before.pos, before.level, before.food, before.food_level)),
            before.spawned[t, e],
            before.size[t, e],
            action[t, e],
            before.theta.penalty[t, e],
            env.sight,
        )
        for t, e in played
    ]
    pos, food_level, reward, obs = (np.stack(x) for x in zip(*expected))
    np.testing.assert_array_equal(after.pos[alive], pos)
    np.testing.assert_array_equal(after.food_level[alive], food_level)
    np.testing.assert_allclose(ts.reward[alive], reward, atol=1e-6)
    np.testing.assert_array_equal(ts.obs[alive], obs)
    np.testing.assert_array_equal(ts.terminated[alive], (food_level == 0).all(-1))
    fined = (reward < 0).any()
    assert (reward > 0).any(-1).sum() > 20
    assert fined == (before.theta.penalty.max() > 0)
    steps = pos - before.pos[alive]
    assert min((steps == d).all(-1).sum() for d in ((-1, 0), (1, 0), (0, -1), (0, 1))) > 100
    # the sum of all rewards of an episode is the share of levels taken, less what failures cost
    returns = np.where(alive[..., None], np.maximum(ts.reward, 0), 0).sum((0, 2))
    left = np.where(alive, after.food_level.sum(-1), np.inf).min(0)
    if not fined:
        np.testing.assert_allclose(returns, 1 - left / before.spawned[0], atol=1e-5)
    cells = after.pos[..., 0] * 100 + after.pos[..., 1]
    assert all(len(set(c)) == env.num_agents for c in cells[alive]), "two agents in a cell"
    size = before.size[..., None, :]
    assert ((after.pos >= 0) & (after.pos < size)).all()
    np.testing.assert_array_equal(ts.truncated[-1][alive[-1]], ~ts.terminated[-1][alive[-1]])


def test_starts_of_lbf():
    """Uniform agents; foods inside the border, apart from each other and from agents; levels in their range."""
    env = Lbf(height=6, width=7, num_agents=3, num_food=3, max_player_level=3)
    starts = jax.jit(jax.vmap(lambda k: env.reset(k)[0]))(jax.random.split(jax.random.key(0), 10_000))
    pos, food, level = map(np.asarray, (starts.pos, starts.food, starts.food_level))
    cell = pos[..., 0] * 7 + pos[..., 1]
    assert stats.chisquare(np.bincount(cell[:, 0], minlength=42)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(cell[:, 2], minlength=42)).pvalue > 1e-3
    assert all(len(set(c)) == 3 for c in cell)
    there = level > 0
    assert there[:, :2].all()
    assert there.mean() < 1, "a field can be too full for the last food"
    assert food[there].min() == 1
    assert (food[there] <= [4, 5]).all()
    gaps = np.abs(food[:, :, None] - food[:, None]).sum(-1)
    pairs = there[:, :, None] & there[:, None] & ~np.eye(3, dtype=bool)
    assert gaps[pairs].min() == 3, "no cell is next to two foods"
    apart = np.abs(pos[:, :, None] - food[:, None]).sum(-1)
    assert apart[np.repeat(there[:, None], 3, 1)].min() == 1
    most = starts.level.sum(-1)
    assert set(np.unique(starts.level)) == {1, 2, 3}
    assert (level <= most[:, None]).all()
    full = np.asarray(most) == 5
    assert stats.chisquare(np.bincount(level[full, 0], minlength=6)[1:]).pvalue > 1e-3
    np.testing.assert_array_equal(starts.spawned, level.sum(-1))
    coop = jax.jit(jax.vmap(lambda k: Lbf(num_agents=4, coop=True).reset(k)[0]))(
        jax.random.split(jax.random.key(1), 99)
    )
    np.testing.assert_array_equal(coop.food_level, np.sort(coop.level)[:, :3].sum(-1, keepdims=True).repeat(2, 1))


def test_collisions():
    def stop(*pairs):
        pos, want = (jnp.asarray([p[k] for p in pairs]) for k in (0, 1))
        return [tuple(p) for p in stop_collisions(pos, want).tolist()]

    assert stop(((0, 0), (0, 1)), ((0, 1), (0, 0))) == [(0, 1), (0, 0)], "two change places"
    assert stop(((0, 0), (0, 1)), ((0, 2), (0, 1))) == [(0, 0), (0, 2)]
    ring = [((0, 0), (0, 1)), ((0, 1), (1, 1)), ((1, 1), (1, 0)), ((1, 0), (0, 0))]
    assert stop(*ring) == [b for _, b in ring]
    # the head of a queue is stopped, so all are
    queue = [((0, 0), (0, 1)), ((0, 1), (0, 2)), ((0, 2), (0, 3)), ((0, 4), (0, 3))]
    assert stop(*queue) == [a for a, _ in queue]


def test_agents_of_lbf_are_exchangeable():
    env, order = Lbf(num_agents=4, num_food=4, penalty=0.1), np.array([2, 0, 3, 1])
    before, action, *_ = play(env, episodes=32, steps=40)
    states, actions = jax.tree.map(lambda x: x[20:].reshape(-1, *x.shape[2:]), (before, action))
    renamed = states._replace(pos=states.pos[:, order], level=states.level[:, order])
    keys = jax.random.split(jax.random.key(0), len(actions))
    step = jax.jit(jax.vmap(env.step))
    one, two = step(keys, states, actions)[1], step(keys, renamed, actions[:, order])[1]
    np.testing.assert_array_equal(two.obs, one.obs[:, order])
    np.testing.assert_allclose(two.reward, one.reward[:, order], atol=1e-6)
    assert np.any(one.reward)


def test_tasks_of_lbf_share_a_program():
    env = Lbf(task_set="all")
    tasks = env.tasks("all")
    assert [n for n, _ in env.catalogue().items()] == [
        "8x8-2p-2f",
        "10x10-2p-2f-coop",
        "15x15-2p-4f",
        "15x15-2p-2f-pen",
    ]
    np.testing.assert_array_equal(env.tasks("train").task, [0])
    np.testing.assert_array_equal(env.tasks("test").task, [1, 2, 3])
    np.testing.assert_allclose(tasks.penalty, [0, 0, 0, 0.1])

    @jax.jit
    def run(key, theta):
        state, ts = env.reset(key, theta)
        actions = jax.random.randint(key, (60, 2), 0, 6)
        return state, ts, jax.lax.scan(lambda s, a: env.step(key, s, a), state, actions)

    keys = jax.random.split(jax.random.key(3), 4)
    together = jax.jit(jax.vmap(run))(keys, tasks)
    for i in range(4):
        alone = run(keys[i], jax.tree.map(lambda x, i=i: x[i], tasks))
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda x, i=i: x[i], together))
    assert run._cache_size() == 1
    np.testing.assert_array_equal(together[0].size, [[8, 8], [10, 10], [15, 15], [15, 15]])
    np.testing.assert_array_equal((together[0].food_level > 0).sum(-1), [2, 2, 4, 2])
    # the same field with and without padding
    small, _ = Lbf().reset(keys[0])
    assert small.food.shape == (2, 2)
    assert Lbf(num_agents=4, task_set="train").tasks("all").foods.shape == (4, 6)
    frame = env.frame(jax.tree.map(lambda x: x[2], together[0]))
    assert frame.shape == (320, 320, 3)
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 4


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_food": 9, "height": 5, "width": 5}, r"num_food=9: expected at most 2 on a 5x5 field"),
        ({"height": 2}, "height=2"),
        ({"num_agents": 9, "height": 5, "width": 5, "num_food": 1}, "num_agents=9: expected less than 9"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"task_set": "8x8-2p-2f,8x8-4p-4f"}, "task '8x8-4p-4f': found 4 agents, expected 2"),
        ({"task_set": "train", "num_agents": 3}, r"task_set='train': found num_agents=3, expected one of \[2, 4\]"),
        ({"task_set": "9x9"}, "'9x9'"),
    ],
    ids=str,
)
def test_wrong_options_of_lbf_are_named(options, found):
    with pytest.raises(UserError, match=found):
        envs.make("lbf", **options)


def test_tasks_of_another_environment_do_not_fit():
    theta = jax.tree.map(lambda x: x[0], Lbf(task_set="test").tasks("test"))
    with pytest.raises(UserError, match=r"theta.rows: found shape \(15,\), expected \(8,\)"):
        Lbf().reset(jax.random.key(0), theta)
