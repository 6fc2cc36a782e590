"""The warehouse against a slow reference, its invariants, its maps and its tasks."""

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
from jaxstack.envs.rware import Rware, distinct, drive

CROWDED = {"layout": "gx./x.x/.x.", "num_agents": 4, "requests": 3, "sight": 1}


@pytest.mark.parametrize(
    ("options", "steps"),
    [(CROWDED, 30), ({"task_set": "tiny-3h-2ag,small-4h-2ag,corridor"}, 20)],
    ids=["crowded", "tasks"],
)
def test_rware_follows_the_reference(options, steps):
    env = Rware(**options)
    before, action, after, ts, alive = play(env, steps=steps)
    assert alive.all()
    expected = []
    for t, e in np.ndindex(alive.shape):
        theta = jax.tree.map(lambda x, t=t, e=e: x[t, e], before.theta)
        state = [x[t, e] for x in before[:5]]
        *new, drawn, reward, look = ref.rware(*state, theta.shelves, theta.size, theta.goals, action[t, e], env.sight)
        old, now = state[4], after.requests[t, e]
        kept = np.ones(len(old), bool)
        kept[drawn] = False
        assert (now[kept] == old[kept]).all()
        assert len(drawn) < 2
        assert not set(now[~kept]) & set(old), "a shelf that was not requested"
        expected.append((*new, reward, look(now)))
    pos, direction, load, standing, reward, obs = (
        np.stack(x).reshape(*alive.shape, *x[0].shape) for x in zip(*expected)
    )
    for ours, theirs in (
        (after.pos, pos),
        (after.direction, direction),
        (after.load, load),
        (after.standing, standing),
        (ts.reward, reward),
        (ts.obs, obs),
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert (pos != before.pos).any(-1).sum() > 1000
    assert (load != before.load).any(-1).sum() > 50
    if options is CROWDED:
        assert reward.sum() > 20
    # every shelf is somewhere, once
    for t in (0, steps - 1):
        count = after.theta.count[t]
        for e in range(len(count)):
            here = np.concatenate([after.standing[t, e].ravel(), after.load[t, e]])
            np.testing.assert_array_equal(np.sort(here[here > 0]), 1 + np.arange(count[e]))
            assert len(set(after.requests[t, e])) == env.queue
    cells = after.pos[..., 0] * 100 + after.pos[..., 1]
    assert all(len(set(c)) == env.num_agents for c in cells.reshape(-1, env.num_agents)), "two robots in a cell"
    assert ((after.pos >= 0) & (after.pos < after.theta.size[..., None, :])).all()


def test_robots_drive():
    """All ways in which four robots on a 2 x 3 floor want to go one step."""
    floor = list(itertools.product(range(2), range(3)))
    places = np.array(list(itertools.permutations(floor, 4)))
    rng = np.random.default_rng(0)
    pos = places[rng.integers(len(places), size=3000)]
    step = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])[rng.integers(5, size=(3000, 4))]
    want = np.clip(pos + step, 0, [1, 2])
    ours = np.asarray(jax.jit(jax.vmap(drive))(pos, want))
    rings = 0
    for p, w, o in zip(pos, want, ours):
        goes = ref.rware_moves([tuple(x) for x in p.tolist()], [tuple(x) for x in w.tolist()])
        np.testing.assert_array_equal(o, np.where(np.array(goes)[:, None], w, p))
        rings += all(goes) and {tuple(x) for x in p.tolist()} == {tuple(x) for x in w.tolist()}
    assert rings > 0
    lines = lambda *pairs: [tuple(x) for x in drive(*(jnp.array([p[k] for p in pairs]) for k in (0, 1))).tolist()]
    assert lines(((0, 0), (0, 1)), ((0, 1), (0, 0))) == [(0, 0), (0, 1)], "two cannot change places"
    queue = [((0, 0), (0, 1)), ((0, 1), (0, 2)), ((0, 2), (0, 3))]
    assert lines(*queue) == [b for _, b in queue]
    assert lines(((0, 0), (0, 1)), ((0, 2), (0, 1))) == [(0, 1), (0, 2)], "the lowest index goes first"
    ring = [((0, 2), (0, 1)), ((0, 1), (1, 1)), ((1, 1), (1, 0)), ((1, 0), (0, 0)), ((0, 0), (0, 1))]
    assert lines(*ring) == [(0, 2), (1, 1), (1, 0), (0, 0), (0, 1)], "a ring goes before all"


def test_maps():
    """Those that rware documents: blocks of two columns, a queue before the two goals."""
    draw = lambda env: ["".join("x" if n else "." for n in row) for row in env.plan()[0]]
    assert draw(Rware(rows=2, column_height=2)) == [
        "..........",
        ".xx.xx.xx.",
        ".xx.xx.xx.",
        "..........",
        ".xx....xx.",
        ".xx....xx.",
        "..........",
        "..........",
    ]
    np.testing.assert_array_equal(Rware(rows=2, column_height=2).plan()[1], [[7, 4], [7, 5]])
    assert Rware().plan()[0].shape == (11, 10)
    assert Rware().plan()[0].max() == 32
    env = Rware(layout=" Xg.\n.xx\n")
    assert draw(env) == ["x..", ".xx"]
    np.testing.assert_array_equal(env.plan()[1], [[0, 1]])
    np.testing.assert_array_equal(env.plan()[0], [[1, 0, 0], [0, 2, 3]])


def test_starts_of_rware():
    env = Rware(layout="xxx./...g", num_agents=2, requests=2)
    state = jax.tree.map(
        np.asarray, jax.jit(jax.vmap(lambda k: env.reset(k)[0]))(jax.random.split(jax.random.key(0), 10_000))
    )
    cells = state.pos @ [4, 1]
    pairs = cells[:, 0] * 8 + cells[:, 1]
    counts = np.bincount(pairs, minlength=64).reshape(8, 8)
    assert not np.diagonal(counts).any()
    assert stats.chisquare(counts[~np.eye(8, dtype=bool)]).pvalue > 1e-3
    assert stats.chisquare(np.bincount(state.direction.ravel(), minlength=4)).pvalue > 1e-3
    asked = np.bincount(state.requests @ [3, 1])[[5, 6, 7, 9, 10, 11]]
    assert asked.sum() == 10_000
    assert stats.chisquare(asked).pvalue > 1e-3
    # a delivery: the shelf that was not requested is
    start = jax.tree.map(lambda x: x[0], state)._replace(
        pos=np.array([[1, 3], [1, 0]]), direction=np.array([3, 0]), load=np.array([2, 0]), requests=np.array([3, 2])
    )
    new, ts = env.step(jax.random.key(0), start, jnp.array([1, 0]))
    np.testing.assert_array_equal(ts.reward, [1, 0])
    np.testing.assert_array_equal(new.requests, [3, 1])
    draws = jax.vmap(lambda u: distinct(u, 5))(jax.random.uniform(jax.random.key(1), (20_000, 3)))
    counts = np.bincount(np.asarray(draws) @ [25, 5, 1])
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3
    assert (counts > 0).sum() == 60


def test_tasks_of_rware_share_a_program():
    env = Rware(task_set="train", horizon=30)
    assert env.num_tasks == 48
    assert list(env.catalogue())[:2] == ["tiny-3h-2ag", "tiny-4h-2ag"]
    for name, tasks in {
        "train": 8,
        "test": 16,
        "tiny": 8,
        "small": 8,
        "corridor": 8,
        "wide": 8,
        "wide-sides": 16,
    }.items():
        assert len(env.tasks(name).task) == tasks
    corridor = env.tasks("corridor")
    np.testing.assert_array_equal(corridor.size, [[h + 3, 5] for h in range(3, 11)])
    np.testing.assert_array_equal(corridor.count, [2 * (h + 2) for h in range(3, 11)])
    tasks = env.tasks("tiny-8h-2ag,small-10h-2ag,corridor-3h-2ag,wide-left-5h-2ag")

    @jax.jit
    def run(key, theta):
        state, ts = env.reset(key, theta)
        actions = jax.random.randint(key, (30, 2), 0, 5)
        return state, ts, jax.lax.scan(lambda s, a: env.step(key, s, a), state, actions)

    keys = jax.random.split(jax.random.key(3), 4)
    together = jax.jit(jax.vmap(run))(keys, tasks)
    for i in range(4):
        alone = run(keys[i], jax.tree.map(lambda x, i=i: x[i], tasks))
        jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda x, i=i: x[i], together))
    assert run._cache_size() == 1
    # padding changes nothing but the shape of the maps
    plain = Rware(horizon=30)
    first, start = plain.reset(keys[0])
    np.testing.assert_array_equal(first.pos, together[0].pos[0])
    np.testing.assert_array_equal(start.obs, together[1].obs[0])
    frame = plain.frame(first)
    assert frame.shape == (320, 320, 3)
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 5


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"layout": "xx./x.g/x."}, "layout: found lines of 2 and 3 cells, expected equal lengths"),
        ({"layout": "xx/x."}, r"layout: found no goal \(g\), expected at least 1"),
        ({"layout": "xq/gx"}, "layout: found 'q', expected x"),
        ({"layout": "x./.g"}, "requests: found 2 of 1 shelves, expected a shelf that is not"),
        ({"columns": 4}, "columns=4: expected an odd number"),
        ({"num_agents": 111, "requests": 1}, "num_agents=111: expected at most 110 on 11x10 cells"),
        ({"task_set": "tiny-8h-2ag,tiny-8h-4ag"}, "task 'tiny-8h-4ag': found 4 agents, expected 2"),
    ],
    ids=str,
)
def test_wrong_options_of_rware_are_named(options, found):
    with pytest.raises(UserError, match=found):
        envs.make("rware", **options)
