"""Cliff walking and taxi: the tables are gymnasium's, slips are action randomisation, episodes draw their own eps."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs import taxi, vector

NAMES = {"cliff_walking": "CliffWalking-v1", "taxi": "Taxi-v4"}


@pytest.mark.parametrize("id", NAMES)
def test_tables_are_those_of_gymnasium(id):
    tables = envs.make(id).tables
    theirs = gymnasium.make(NAMES[id]).unwrapped
    assert tables.next_state.shape == (len(theirs.P), theirs.action_space.n)
    for s, row in theirs.P.items():
        for a, outcomes in row.items():
            assert outcomes == [(1.0, tables.next_state[s, a], tables.reward[s, a], tables.done[s, a])]
    np.testing.assert_allclose(tables.start, theirs.initial_state_distrib, rtol=1e-12)
    for place in (0, 17, 498):
        assert taxi.encode(*taxi.decode(place)) == place


@pytest.mark.parametrize("id", NAMES)
def test_steps_follow_the_tables_and_slips_are_uniform(id):
    """From every state with every action: without slips the table's row, with eps the mixture of Algorithm 1."""
    env, slippery = envs.make(id), envs.make(id, eps=0.3)
    states, actions = env.tables.next_state.shape
    place, action = (x.ravel() for x in np.indices((states, actions)))
    start = jax.vmap(lambda p: env.reset(jax.random.key(0))[0]._replace(place=p))(jnp.asarray(place, jnp.int32))
    keys = jax.random.split(jax.random.key(1), len(place))
    after, ts = jax.jit(jax.vmap(env.step))(keys, start, jnp.asarray(action)[:, None])
    np.testing.assert_array_equal(after.place, env.tables.next_state.ravel())
    np.testing.assert_array_equal(ts.obs[:, 0], after.place)
    np.testing.assert_array_equal(ts.reward[:, 0], env.tables.reward.ravel())
    np.testing.assert_array_equal(ts.terminated, env.tables.done.ravel())
    assert not ts.truncated.any()
    # one state whose actions all lead elsewhere, or differ in reward
    cell = {"cliff_walking": 17, "taxi": taxi.encode(2, 2, 0, 1)}[id]
    state = jax.tree.map(lambda x: x[0], start)._replace(place=jnp.int32(cell), eps=jnp.float32(0.3))
    keys = jax.random.split(jax.random.key(2), 20_000)
    step = jax.jit(jax.vmap(slippery.step, in_axes=(0, None, None)))
    _, ts = step(keys, state, jnp.array([1]))
    seen = np.asarray(ts.obs[:, 0])
    want = np.bincount(env.tables.next_state[cell], minlength=states) * 0.3 / actions
    want[env.tables.next_state[cell, 1]] += 0.7
    np.testing.assert_allclose(np.bincount(seen, minlength=states) / len(keys), want, atol=0.015)
    np.testing.assert_allclose(
        ts.reward.mean(), 0.7 * env.tables.reward[cell, 1] + 0.3 * env.tables.reward[cell].mean(), atol=0.05
    )


def test_episodes_start_end_and_draw_their_own_eps():
    env = envs.make("taxi", eps=0.2, eps_spread=0.1, horizon=3)
    state, ts = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 30_000))
    counts = np.bincount(state.place, minlength=500)
    assert (counts > 0).sum() == 300
    assert counts[env.tables.start == 0].sum() == 0
    np.testing.assert_allclose((state.eps.min(), state.eps.mean(), state.eps.max()), (0.1, 0.2, 0.3), atol=2e-3)
    assert float(envs.make("cliff_walking", eps=0.2).reset(jax.random.key(0))[0].eps) == np.float32(0.2)
    state, ts = jax.tree.map(lambda x: x[0], (state, ts))
    for t in range(3):
        state, ts = env.step(jax.random.key(t), state, jnp.array([taxi.NORTH]))
        assert bool(ts.truncated) == (t == 2)
    # the goal, reached in the last step, terminates
    cliff = envs.make("cliff_walking", horizon=1)
    state, ts = cliff.reset(jax.random.key(0))
    assert int(ts.obs[0]) == 36
    _, ts = cliff.step(jax.random.key(0), state._replace(place=jnp.int32(35)), jnp.array([2]))
    assert bool(ts.terminated)
    assert not bool(ts.truncated)
    # one start: nothing of it but eps is random
    random = vector.random_parts(envs.make("cliff_walking", eps=0.2, eps_spread=0.1))[0]
    assert random == type(state)(False, False, True)


def test_pictures_show_the_taxi_its_passenger_and_the_walls():
    for id in NAMES:
        env = envs.make(id)
        state, _ = env.reset(jax.random.key(0))
        moved, _ = env.step(jax.random.key(0), state, jnp.array([0]))
        first, second = env.frame(state), env.frame(moved)
        assert first.shape == (320, 320, 3)
        assert (first != second).any()
    distances = envs.make("cliff_walking").distances()
    assert distances[36, 47] == 11
    assert distances[47, 48] == 1
    assert (distances == distances.T).all()


def test_wrong_options_are_named():
    with pytest.raises(UserError, match=r"eps=1\.5: expected a number in \[0, 1\]"):
        envs.make("taxi", eps=1.5)
    with pytest.raises(UserError, match=r"eps_spread=0\.2: expected 0 to 0\.1, so that eps stays in \[0, 1\]"):
        envs.make("cliff_walking", eps=0.1, eps_spread=0.2)
    with pytest.raises(UserError, match="horizon=0"):
        envs.make("taxi", horizon=0)
