"""Boulder push against a slow reference, its invariants and its tasks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
from playing import play
from scipy import stats

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs.boulder_push import BoulderPush


def plain(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize(
    "options",
    [
        {"task_set": "all"},
        {"height": 4, "width": 4, "penalty": 0.2, "num_agents": 3, "sight": 1, "incentive": 0.3, "horizon": 30},
    ],
    ids=str,
)
def test_boulder_push_follows_the_reference(options):
    """The order in which agents move is random: each step is that of one order."""
    env = BoulderPush(**options)
    before, action, after, ts, alive = play(env)
    orders = list(itertools.permutations(range(env.num_agents)))
    used, expected = set(), []
    for t, e in np.argwhere(alive):
        one = [x[t, e] for x in (before.pos, before.boulder, before.direction, before.side)]
        fines = before.theta.penalty[t, e], env.incentive, env.sight
        results = ((k, ref.boulder_push(*one, action[t, e], order, *fines)) for k, order in enumerate(orders))
        k, result = next((k, r) for k, r in results if (after.pos[t, e] == r[0]).all())
        used.add(k)
        expected.append(result)
    pos, boulder, reward, done, obs = (np.stack(x) for x in zip(*expected))
    np.testing.assert_array_equal(after.pos[alive], pos)
    np.testing.assert_array_equal(after.boulder[alive], boulder)
    np.testing.assert_allclose(ts.reward[alive], reward, atol=1e-6)
    np.testing.assert_array_equal(ts.terminated[alive], done)
    np.testing.assert_array_equal(ts.obs[alive], obs)
    assert used == {*range(len(orders))}, "every order is needed somewhere"
    assert (reward < 0).any()
    cells = after.pos[..., 0] * 100 + after.pos[..., 1]
    assert all(len(set(c)) == env.num_agents for c in cells[alive]), "two agents in a cell"
    assert (after.pos >= 0).all()
    assert (after.pos < before.side[..., None, None]).all()


@pytest.mark.parametrize("direction", ["north", "south", "west", "east"])
def test_pushing_together_solves_the_task(direction):
    """All the way to the edge: the return of each agent is the incentive times the distance, and 1."""
    env = BoulderPush(direction=direction, height=9, width=9, num_agents=3)
    d = ["north", "south", "west", "east"].index(direction)
    ahead = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])[d]

    @jax.jit
    def run(key):
        state, _ = env.reset(key)
        line = jnp.array([[0, 1], [1, 0]])[d // 2]
        behind = state.boulder + jnp.arange(3)[::-1, None] * line - ahead
        start = state._replace(pos=behind)
        return start, jax.lax.scan(lambda s, k: env.step(k, s, jnp.full(3, d)), start, jax.random.split(key, 8))

    start, (_, ts) = plain(jax.vmap(run)(jax.random.split(jax.random.key(d), 64)))
    at = start.boulder[:, d // 2]
    distance = at if d % 2 == 0 else 8 - at
    assert {*distance} == {*range(1, 8)}
    np.testing.assert_array_equal(ts.terminated.argmax(1) + 1, distance)
    alive = np.cumsum(ts.terminated, 1) - ts.terminated == 0
    returns = (ts.reward * alive[..., None]).sum(1)
    np.testing.assert_allclose(returns, np.repeat(0.1 * distance[:, None] + 1, 3, 1), rtol=1e-5)
    np.testing.assert_array_equal(ts.info["solved"], ts.terminated)
    inside = (distance > 1)[:, None] & (np.arange(8) == 0)
    np.testing.assert_allclose(ts.reward[inside], 0.1)


def test_agents_move_in_random_order():
    """Two agents that want one cell: one gets it, each as often."""
    env = BoulderPush()
    state, _ = env.reset(jax.random.key(0))
    state = state._replace(pos=jnp.array([[4, 3], [4, 5]]), boulder=jnp.array([1, 0]), direction=jnp.int32(0))
    step = jax.jit(jax.vmap(lambda k: env.step(k, state, jnp.array([3, 2]))[0].pos))
    pos = np.asarray(step(jax.random.split(jax.random.key(1), 4000)))
    first = (pos == [[4, 4], [4, 5]]).all((1, 2))
    assert (first | (pos == [[4, 3], [4, 4]]).all((1, 2))).all()
    assert stats.binomtest(int(first.sum()), 4000).pvalue > 1e-3


def test_starts_of_boulder_push():
    env = BoulderPush(height=6, width=6)
    state = plain(jax.jit(jax.vmap(lambda k: env.reset(k)[0]))(jax.random.split(jax.random.key(0), 10_000)))
    assert stats.chisquare(np.bincount(state.direction, minlength=4)).pvalue > 1e-3
    upright = state.direction < 2
    across = np.where(upright, state.boulder[:, 0], state.boulder[:, 1])
    along = np.where(upright, state.boulder[:, 1], state.boulder[:, 0])
    joint = np.bincount((across - 1) * 5 + along, minlength=20)
    assert len(joint) == 20
    assert stats.chisquare(joint).pvalue > 1e-3
    line = np.where(upright[:, None], [0, 1], [1, 0])
    stands = np.stack([state.boulder, state.boulder + line, state.pos[:, 0], state.pos[:, 1]], 1) @ [6, 1]
    assert all(len(set(c)) == 4 for c in stands)
    one = (state.direction == 0) & (stands[:, 0] == 7)  # one boulder: agents are uniform on the other cells
    assert (
        stats.chisquare(np.bincount(stands[one][:, 2:].ravel(), minlength=36)[[*range(7), *range(9, 36)]]).pvalue > 1e-3
    )


def test_tasks_of_boulder_push_share_a_program():
    env = BoulderPush(task_set="train")
    assert list(env.catalogue()) == ["small-2ag", "medium-2ag", "large-2ag", "small-pen-2ag", "medium-pen-2ag"]
    tasks = env.tasks("all")
    np.testing.assert_array_equal(env.tasks("test").task, [1, 2, 3, 4])
    np.testing.assert_allclose(tasks.penalty, [0, 0, 0, 0.01, 0.01])

    @jax.jit
    def run(key, theta):
        state, ts = env.reset(key, theta)
        actions = jax.random.randint(key, (40, 2), 0, 4)
        return state, ts, jax.lax.scan(lambda s, a: env.step(key, s, a), state, actions)

    keys = jax.random.split(jax.random.key(3), 5)
    together = jax.jit(jax.vmap(run))(keys, tasks)
    for i in range(5):
        alone = run(keys[i], jax.tree.map(lambda x, i=i: x[i], tasks))
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda x, i=i: x[i], together))
    assert run._cache_size() == 1
    np.testing.assert_array_equal(together[0].side, [8, 12, 20, 8, 12])
    # without padding the same start
    small, _ = BoulderPush().reset(keys[0])
    np.testing.assert_array_equal(small.boulder, together[0].boulder[0])
    frame = env.frame(small)
    assert frame.shape == (320, 320, 3)
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 5


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"width": 9}, "width=9: expected height=8: boulder fields are square"),
        ({"num_agents": 9}, "num_agents=9: expected at most 8"),
        ({"direction": "up"}, "direction='up'"),
        ({"task_set": "small-2ag,large-3ag"}, "task 'large-3ag': found 3 agents, expected 2"),
    ],
    ids=str,
)
def test_wrong_options_of_boulder_push_are_named(options, found):
    with pytest.raises(UserError, match=found):
        envs.make("boulder_push", **options)
