import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare
from toy_learners import assert_same, regression

from jaxstack.core import replay
from jaxstack.core.errors import UserError
from jaxstack.core.replay import Transition
from jaxstack.core.runner import resume, train

KEY = jax.random.key(0)


def steps(start, count, ends=()):
    """Transitions start..start+count-1 of one environment that counts: obs t, next_obs t + 1, reset to 100 t after an
    end."""
    t = jnp.arange(start, start + count, dtype=jnp.float32)
    ended = jnp.isin(t, jnp.asarray(ends, jnp.float32)) if ends else jnp.zeros(count, bool)
    return Transition(t, t.astype(jnp.int32), 2.0 * t, t + 0.5, ended, jnp.zeros(count, bool))


ITEM = jax.tree.map(lambda x: x[0], steps(0, 1))


def test_items_are_drawn_uniformly_from_what_is_held_with_their_own_next_observation():
    buffer = replay.items(capacity=8, batch_size=8, minimum=4)
    state = buffer.init(ITEM)
    state = buffer.add(state, steps(0, 3))
    assert not buffer.ready(state)
    assert replay.held(state) == 3
    state = buffer.add(state, steps(3, 3))
    assert buffer.ready(state)
    draw = jax.jit(jax.vmap(lambda key: buffer.sample(state, key).items))
    found = draw(jax.random.split(KEY, 200))
    counts = np.bincount(np.asarray(found.action).ravel(), minlength=8)
    assert (counts[6:] == 0).all()  # never the empty places
    assert chisquare(counts[:6]).pvalue > 1e-3
    state = buffer.add(state, steps(6, 5))
    assert replay.held(state) == 8
    found = jax.jit(buffer.sample)(state, KEY).items
    assert set(np.asarray(found.obs)) <= set(range(3, 11))  # the oldest made room
    assert (found.next_obs == found.obs + 0.5).all()
    assert (found.reward == 2 * found.action).all()


def test_stretches_follow_each_other_and_stop_counting_at_an_episodes_end():
    buffer = replay.trajectories(num_envs=2, capacity=6, batch_size=64, length=3)
    state = buffer.init(ITEM)
    both = lambda start, count: jax.tree.map(
        lambda a, b: jnp.stack([a, b]), steps(start, count, (4,)), steps(start + 100, count, (106,))
    )
    state = buffer.add(state, both(0, 2))
    assert not buffer.ready(state)
    state = buffer.add(state, both(2, 6))  # 2..7 remain, written around the end
    found = jax.jit(buffer.sample)(state, KEY).items
    assert found.obs.shape == (64, 3)
    assert (np.diff(found.obs, axis=1) == 1).all()
    assert set(np.asarray(found.obs[:, 0])) == {2, 3, 4, 5, 102, 103, 104, 105}
    counted = np.asarray(replay.one_episode(found.terminated | found.truncated))
    ends = {4.0, 106.0}
    for row, mask in zip(np.asarray(found.obs), counted):
        expected = [not any(x in ends for x in row[:i]) for i in range(3)]
        assert mask.tolist() == expected
    assert (found.next_obs[counted] == found.obs[counted] + 0.5).all()


def test_prioritised_items_are_drawn_by_priority_and_weighted_back():
    buffer = replay.prioritised(capacity=8, batch_size=8, exponent=0.5)
    state = buffer.add(buffer.init(ITEM), steps(0, 4))
    everything = buffer.sample(state, KEY)
    np.testing.assert_allclose(everything.probability, 0.25, rtol=1e-6)
    priorities = jnp.array([0.0, 1.0, 4.0, 9.0])
    state = jax.jit(buffer.set_priorities)(state, jnp.arange(4), priorities)
    found = jax.jit(jax.vmap(lambda key: buffer.sample(state, key)))(jax.random.split(KEY, 500))
    action = np.asarray(found.items.action)
    share = np.bincount(action.ravel(), minlength=4) / action.size
    np.testing.assert_allclose(share, [0, 1 / 6, 2 / 6, 3 / 6], atol=0.02)
    np.testing.assert_allclose(found.probability, np.array([0, 1, 2, 3])[action] / 6, rtol=1e-5)
    weights = replay.importance(found.probability[0], replay.held(state), 1.0)
    np.testing.assert_allclose(weights * found.probability[0], (weights * found.probability[0])[0], rtol=1e-5)
    assert weights.max() == 1.0
    fresh = buffer.add(state, steps(4, 1))
    drawn = jax.vmap(lambda key: buffer.sample(fresh, key).items.action)(jax.random.split(KEY, 100))
    assert (np.asarray(drawn) == 4).mean() > 0.2  # new items come with the largest priority


@pytest.mark.parametrize("make", [replay.items, replay.prioritised])
def test_an_add_of_a_donated_buffer_writes_in_place(make):
    buffer = make(capacity=10_000, batch_size=4)
    state = jax.jit(buffer.init)(Transition(*[jnp.zeros(16)] * 4, *[jnp.zeros((), bool)] * 2))
    batch = Transition(*[jnp.ones((4, 16))] * 4, *[jnp.zeros(4, bool)] * 2)
    program = jax.jit(buffer.add, donate_argnums=0).lower(state, batch).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4
    new = program(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.experience))
    assert replay.held(new) == 4


def replaying(buffer):
    """A learner that stores a random number a step and learns the mean of what it draws."""

    def init(key, hypers):
        s = regression().init(key, hypers)
        return s._replace(params={"w": jnp.zeros(())}, opt_state=buffer.init(jnp.zeros(())))

    def step(s):
        key, k_new, k_draw = jax.random.split(s.key, 3)
        stored = buffer.add(s.opt_state, jax.random.normal(k_new, (2,)))
        drawn = buffer.sample(stored, k_draw).items
        params = {"w": 0.9 * s.params["w"] + 0.1 * drawn.mean()}
        return s._replace(params=params, opt_state=stored, key=key, step=s.step + 1), {"loss/total": params["w"]}

    return regression()._replace(init=init, step=step, evaluate=None)


@pytest.mark.parametrize("make", [replay.items, replay.prioritised])
def test_contents_are_part_of_checkpoints(make, tmp_path):
    learner = replaying(make(capacity=6, batch_size=4))
    whole = train(learner, 7, 2, progress=False)
    train(learner, 4, 2, run_dir=tmp_path / "r", progress=False)
    got = resume(learner, tmp_path / "r", 7, progress=False)
    assert_same(got.state, whole.state)
    assert got.metrics.equals(whole.metrics)
    assert whole.state.opt_state.experience.shape == (2, 1, 6)  # one buffer per seed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replay.items(4, 5), "batch_size=5: expected 1 to capacity=4"),
        (lambda: replay.items(0, 1), "capacity=0: expected at least 1"),
        (lambda: replay.prioritised(4, 2, exponent=2.0), r"exponent=2.0: expected a number in \[0, 1\]"),
        (lambda: replay.trajectories(1, 4, 2, 5), "length=5: expected at most capacity=4"),
        (lambda: replay.trajectories(1, 8, 2, 3, period=4), "period=4: expected at most length=3"),
        (lambda: _overfull(replay.items(4, 2)), "replay: 5 items added at once, expected at most capacity=4"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def _overfull(buffer):
    buffer.add(buffer.init(ITEM), steps(0, 5))
