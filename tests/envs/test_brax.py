"""brax adapter: parity with the physics environment, time limit, clipping, ids. The pendulum compiles fastest."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import envs
from jaxstack.core.errors import UnknownName, UserError
from jaxstack.envs.brax import adapter


def test_ids_are_those_of_the_library_without_swimmer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brax.envs import _envs
    assert set(_envs) - set(adapter.IDS) == {"swimmer", "fast"}
    assert set(adapter.IDS) <= set(_envs)


def test_equal_to_the_library_and_the_time_limit_truncates():
    env = envs.make("brax/inverted_pendulum", episode_length=4)
    assert env.spec.horizon == 4
    lib = env.lib  # pyright: ignore
    key = jax.random.key(0)
    want = jax.jit(lib.reset)(key)
    state, ts = jax.jit(env.reset)(key)
    np.testing.assert_array_equal(ts.obs[0], want.obs)
    step, lib_step = jax.jit(env.step), jax.jit(lib.step)
    for t in range(4):
        action = jnp.full((1, *env.spec.action_space.shape), 0.05)
        state, ts = step(key, state, action)
        want = lib_step(want, action[0])
        np.testing.assert_allclose(ts.obs[0], want.obs, atol=1e-5)
        np.testing.assert_allclose(ts.reward[0], want.reward, atol=1e-5)
        assert not ts.terminated
        assert bool(ts.truncated) == (t == 3)
    before = state
    _, far = step(key, before, jnp.full((1, 1), 9.0))
    _, bound = step(key, before, jnp.ones((1, 1)))
    np.testing.assert_array_equal(far.obs, bound.obs)
    picture = env.frame(before)
    assert picture.dtype == np.uint8
    assert picture.std() > 0


def test_bad_names_and_options():
    with pytest.raises(UnknownName, match="hopper"):
        envs.make("brax/hoper")
    with pytest.raises(UserError, match="backend='slow'"):
        envs.make("brax/hopper", backend="slow")
    with pytest.raises(UserError, match="episode_length=0"):
        envs.make("brax/hopper", episode_length=0)
    with pytest.raises(UserError, match="'brax/ant': ctrl_cost_weight='x': expected a finite number"):
        envs.make("brax/ant", ctrl_cost_weight="x")
    with pytest.raises(UnknownName, match="'ctrl_cost': did you mean 'ctrl_cost_weight'"):
        envs.make("brax/ant", ctrl_cost=1.0)
