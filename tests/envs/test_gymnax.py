"""gymnax adapter: parity with the library's transition, flags, clipping, ids."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import envs
from jaxstack.core.errors import UnknownName, UserError
from jaxstack.envs.base import Discrete
from jaxstack.envs.gymnax import adapter


def library(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gymnax

        return gymnax.make(name)


def test_ids_are_those_of_the_library_without_the_one_that_downloads():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gymnax.registration import _BUILTIN_ENV_IDS
    assert set(_BUILTIN_ENV_IDS) - set(adapter.IDS) == {"MNISTBandit-bsuite"}
    assert set(adapter.IDS) <= set(_BUILTIN_ENV_IDS)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Catch-bsuite"])
def test_equal_to_the_library_until_the_end_where_the_true_observation_is_kept(name: str):
    """`step` of the library splits its key first; its final_observation is our observation."""
    lib, params = library(name)
    env = envs.make(f"gymnax/{name}")
    key = jax.random.key(0)
    obs, lib_state = lib.reset(key, params)
    state, ts = env.reset(key)
    np.testing.assert_array_equal(ts.obs[0], obs)
    step, lib_step = jax.jit(env.step), jax.jit(lib.step)
    ended = False
    for t in range(40):
        k_act, k = jax.random.split(jax.random.fold_in(key, t))
        action = lib.action_space(params).sample(k_act)
        *_, info = out = lib_step(k, lib_state, action, params)
        state, ts = step(
            jax.random.split(k)[0],
            state,
            jnp.asarray(action).reshape(env.spec.num_agents, -1)[:, 0]
            if hasattr(lib.action_space(params), "n")
            else jnp.asarray(action).reshape(1, -1),
        )
        lib_state = out[1]
        np.testing.assert_allclose(ts.obs[0], info["final_observation"], atol=1e-6)
        np.testing.assert_allclose(ts.reward[0], out[2], rtol=1e-5, atol=1e-6)
        assert bool(ts.terminated) == bool(out[3])
        assert bool(ts.truncated) == bool(out[4])
        if ts.terminated:
            ended = True
            assert not np.array_equal(np.asarray(ts.obs[0]), np.asarray(out[0]))
            break
    assert ended == (name != "Pendulum-v1")


def test_time_limit_truncates_and_pole_fall_terminates():
    env = envs.make("gymnax/CartPole-v1", max_steps_in_episode=3)
    assert env.spec.horizon == 3
    state, _ = env.reset(jax.random.key(0))
    flags = []
    for t in range(3):
        state, ts = env.step(jax.random.key(t), state, jnp.array([t % 2]))
        flags.append((bool(ts.terminated), bool(ts.truncated)))
    assert flags == [(False, False), (False, False), (False, True)]


def test_box_actions_are_clipped():
    env = envs.make("gymnax/Pendulum-v1")
    state, _ = env.reset(jax.random.key(0))
    k = jax.random.key(1)
    _, far = env.step(k, state, jnp.array([[50.0]]))
    _, bound = env.step(k, state, jnp.array([[2.0]]))
    _, half = env.step(k, state, jnp.array([[1.0]]))
    np.testing.assert_array_equal(far.obs, bound.obs)
    assert not np.array_equal(np.asarray(far.obs), np.asarray(half.obs))


@pytest.mark.parametrize("name", ["CartPole-v1", "Breakout-MinAtar"])
def test_frame_changes_with_the_state(name: str):
    env = envs.make(f"gymnax/{name}")
    state, _ = env.reset(jax.random.key(0))
    before = env.frame(state)
    for t in range(8):
        state, _ = env.step(jax.random.key(t), state, jnp.array([1]))
    after = env.frame(state)
    assert before.dtype == np.uint8
    assert before.ndim == 3
    assert before.shape[-1] == 3
    assert not np.array_equal(before, after)


def test_bad_names_and_options():
    with pytest.raises(UnknownName, match="CartPole-v1"):
        envs.make("gymnax/Cartpole-v1")
    with pytest.raises(UserError, match="max_steps_in_episode"):
        envs.make("gymnax/CartPole-v1", max_steps=3)
    with pytest.raises(UserError, match="'gymnax/CartPole-v1': gravity='x': expected a finite number"):
        envs.make("gymnax/CartPole-v1", gravity="x")
    assert envs.make("gymnax/CartPole-v1", max_steps_in_episode=1e1).spec.horizon == 10
    env = envs.make("gymnax/Catch-bsuite")
    state, _ = env.reset(jax.random.key(0))
    with pytest.raises(UserError, match="cannot be drawn"):
        env.frame(state)


def test_options_of_constructors_are_reachable_and_checked():
    lake = envs.make("gymnax/FrozenLake-misc", map_name="8x8", is_slippery=False, max_steps_in_episode=9)
    assert lake.spec.observation == Discrete(64)
    assert lake.spec.horizon == 9
    state, ts = lake.reset(jax.random.key(0))
    _, ts = lake.step(jax.random.key(1), state, jnp.array([2]))
    assert ts.obs.tolist() == [1], "ice that is not slippery leads where one goes"
    assert envs.make("gymnax/DeepSea-bsuite", size=5).spec.obs_shape == (5, 5)
    assert envs.make("gymnax/FrozenLake-misc", desc=["SFG", "FFF"]).spec.observation == Discrete(6)
    with pytest.raises(UserError, match="is_slippery='no': expected true or false"):
        envs.make("gymnax/FrozenLake-misc", is_slippery="no")
    with pytest.raises(UserError, match=r"size=2\.5: expected a whole number"):
        envs.make("gymnax/DeepSea-bsuite", size=2.5)
    with pytest.raises(UserError, match="max_steps_in_episode=0"):
        envs.make("gymnax/CartPole-v1", max_steps_in_episode=0)
    half = envs.make("gymnax/BernoulliBandit-misc", max_steps_in_episode=2.5)  # counts in fractions
    assert half.spec.horizon == 3
