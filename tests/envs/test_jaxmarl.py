"""JaxMARL adapter: parity with the library's transition and one test for each place where ours differs."""

import contextlib
import io
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import envs
from jaxstack.core.errors import UnknownName, UserError
from jaxstack.envs.base import action_limits, sample_action
from jaxstack.envs.jaxmarl import adapter


def walk(env, steps: int, key=None):
    """TimeSteps [steps] of random legal play, and the last state."""
    key = jax.random.key(0) if key is None else key
    step = jax.jit(env.step)
    state, ts = jax.jit(env.reset)(key)
    out = [ts]
    for t in range(steps):
        k_act, k = jax.random.split(jax.random.fold_in(key, t))
        state, ts = step(k, state, sample_action(env.spec, k_act, ts))
        out.append(ts)
    return state, out


def test_ids_cover_the_library_that_runs_offline():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from jaxmarl.environments.overcooked import overcooked_layouts
        from jaxmarl.environments.overcooked_v2.layouts import overcooked_v2_layouts
        from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO
        from jaxmarl.registration import registered_envs
    ids = adapter.IDS
    assert {i.split("/")[1] for i in ids if i.startswith("smax/")} == set(MAP_NAME_TO_SCENARIO)
    assert {i.split("/")[1] for i in ids if i.startswith("overcooked/")} == set(overcooked_layouts)
    assert {i.split("/")[1] for i in ids if i.startswith("overcooked_v2/")} == set(overcooked_v2_layouts)
    plain = {i for i in registered_envs if not i.startswith("JaxRobotarium")}
    grouped = {"SMAX", "HeuristicEnemySMAX", "LearnedPolicyEnemySMAX", "overcooked", "overcooked_v2"}
    assert {i for i in ids if i.count("/") == 0} == plain - grouped


@pytest.mark.parametrize("name", ["MPE_simple_spread_v3", "MPE_simple_speaker_listener_v4", "overcooked/cramped_room"])
def test_equal_to_the_librarys_transition(name: str):
    env = envs.make(f"jaxmarl/{name}")
    lib, spec = env.lib, env.spec  # pyright: ignore
    key = jax.random.key(3)
    obs, want = lib.reset(key)
    state, ts = jax.jit(env.reset)(key)
    step = jax.jit(env.step)
    for t in range(8):
        k_act, k = jax.random.split(jax.random.fold_in(key, t))
        action = sample_action(spec, k_act, ts)
        state, ts = step(k, state, action)
        obs, want, rewards, _, _ = lib.step_env(k, want, {a: action[i] for i, a in enumerate(lib.agents)})
        for i, agent in enumerate(lib.agents):
            mine = ts.obs[i].reshape(-1)[: obs[agent].size]
            np.testing.assert_allclose(mine, obs[agent].reshape(-1), atol=1e-5)
            np.testing.assert_allclose(ts.reward[i], rewards[agent], rtol=1e-5, atol=1e-5)


def test_mpe_has_25_steps_where_the_library_has_26_and_the_limit_truncates():
    env = envs.make("jaxmarl/MPE_simple_spread_v3")
    _, steps = walk(env, 25)
    assert env.spec.horizon == 25
    assert not env.spec.can_terminate
    assert [bool(ts.truncated) for ts in steps] == [False] * 25 + [True]
    lib = env.lib  # pyright: ignore
    _, state = lib.reset(jax.random.key(0))
    for t in range(26):
        _, state, _, dones, _ = lib.step_env(jax.random.key(t), state, dict.fromkeys(lib.agents, 0))
        assert bool(dones["__all__"]) == (t == 25)


def test_unequal_agents_are_padded_and_masked():
    env = envs.make("jaxmarl/MPE_simple_speaker_listener_v4")
    spec = env.spec
    assert spec.agents == ("speaker_0", "listener_0")
    assert spec.obs_sizes == (3, 11)
    assert spec.action_sizes == (3, 5)
    assert spec.has_action_mask
    _, steps = walk(env, 3)
    for ts in steps:
        np.testing.assert_array_equal(ts.action_mask, action_limits(spec))
        assert not np.any(ts.obs[0, 3:])


def test_integer_rewards_become_float():
    _, steps = walk(envs.make("jaxmarl/MPE_simple_tag_v3"), 2)
    assert steps[-1].reward.dtype == jnp.float32


def test_overcooked_shape_dtype_and_shaped_reward():
    env = envs.make("jaxmarl/overcooked/cramped_room", max_steps=6)
    shaped = envs.make("jaxmarl/overcooked/cramped_room", max_steps=6, shaped_reward=0.5)
    assert env.spec.obs_shape == (4, 5, 26)
    assert env.lib.observation_space("agent_0").shape == (5, 4, 26)  # pyright: ignore
    assert env.spec.shared_reward
    assert not shaped.spec.shared_reward
    _, a = walk(env, 6)
    _, b = walk(shaped, 6)
    assert a[-1].obs.dtype == jnp.uint8
    assert bool(a[-1].truncated)
    for x, y in zip(a[1:], b[1:], strict=True):
        np.testing.assert_allclose(y.reward, x.reward + 0.5 * x.info["shaped_reward"])


def test_riddle_terminates_by_telling_and_truncates_at_the_limit():
    env = envs.make("jaxmarl/switch_riddle")
    tell = env.lib.game_actions["TELL"]  # pyright: ignore
    state, _ = env.reset(jax.random.key(0))
    state, ts = env.step(jax.random.key(1), state, jnp.zeros(3, jnp.int32))
    assert not ts.terminated
    _, ts = env.step(jax.random.key(2), state, jnp.full(3, tell))
    assert bool(ts.terminated)
    state, _ = env.reset(jax.random.key(0))
    flags = []
    for t in range(env.spec.horizon or 0):
        state, ts = env.step(jax.random.key(t), state, jnp.zeros(3, jnp.int32))
        flags.append((bool(ts.terminated), bool(ts.truncated)))
    assert flags == [(False, False)] * (len(flags) - 1) + [(False, True)]


@pytest.mark.parametrize("name", ["MPE_simple_spread_v3", "overcooked/cramped_room"])
def test_frame_follows_the_state(name: str):
    env = envs.make(f"jaxmarl/{name}")
    step = jax.jit(env.step)
    state, ts = jax.jit(env.reset)(jax.random.key(0))
    pictures = [env.frame(state)]
    for t in range(6):
        key = jax.random.key(t)
        state, ts = step(key, state, sample_action(env.spec, key, ts))
        pictures.append(env.frame(state))
    assert {(p.dtype, p.shape) for p in pictures} == {(np.dtype(np.uint8), (320, 320, 3))}
    assert len({p.tobytes() for p in pictures}) > 1


@pytest.mark.slow
def test_smax_masks_death_and_the_end():
    """Against a random team: a lost battle terminates with won 0; dead agents leave agent_mask."""
    env = envs.make("jaxmarl/smax/3m")
    _, steps = walk(env, 60, jax.random.key(5))
    assert env.spec.horizon == 100
    ends = [t for t, ts in enumerate(steps) if ts.terminated]
    assert ends, "the battle was not decided"
    last = steps[ends[0]]
    assert not last.truncated
    assert bool(last.agent_mask.any()) == bool(last.info["won"])
    for ts in steps[: ends[0]]:
        assert ts.agent_mask.any()
        assert not ts.info["won"]


@pytest.mark.slow
def test_hanabi_masks_are_the_legal_moves():
    env = envs.make("jaxmarl/hanabi")
    state, steps = walk(env, 5)
    assert env.spec.obs_shape == (658,)
    legal = env.lib.get_legal_moves(state.lib)  # pyright: ignore
    np.testing.assert_array_equal(steps[-1].action_mask, np.stack([legal[a] for a in env.spec.agents]).astype(bool))


@pytest.mark.slow
def test_halfcheetah_keeps_the_root_position_that_its_index_table_assumes():
    env = envs.make("jaxmarl/halfcheetah_6x1")
    lib = env.lib  # pyright: ignore
    largest = max(int(np.max(v)) for v in lib.agent_obs_mapping.values())
    assert env.spec.state_shape == (18,)
    assert largest == 17


def test_bad_names_and_options():
    with pytest.raises(UnknownName, match="MPE_simple_spread_v3"):
        envs.make("jaxmarl/MPE_simple_sprad_v3")
    with pytest.raises(UserError, match="only overcooked"):
        envs.make("jaxmarl/switch_riddle", shaped_reward=1.0)
    # which the library would ignore, or fail on in its own words
    with pytest.raises(UnknownName, match="'max_setps': did you mean 'max_steps'"):
        envs.make("jaxmarl/MPE_simple_spread_v3", max_setps=5)
    with pytest.raises(UserError, match="local_ratio='x': expected a finite number"):
        envs.make("jaxmarl/MPE_simple_spread_v3", local_ratio="x")
    with pytest.raises(UnknownName, match="'num_agents': did you mean 'num_allies'"):
        envs.make("jaxmarl/smax/3m", num_agents=3)
    with pytest.raises(UserError, match="observation_type='x'"):
        envs.make("jaxmarl/overcooked_v2/cramped_room", observation_type="x")
    # passed on to another class, and read by name alone
    assert envs.make("jaxmarl/smax/3m", max_steps=5e1).spec.horizon == 50
    envs.make("jaxmarl/MPE_simple_spread_v3", damping=0.5)


def test_making_the_first_environment_prints_nothing_and_keeps_the_streams():
    code = (
        "import contextlib, io, sys\n"
        "from jaxstack import envs\n"
        "out, err = io.StringIO(), io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "    envs.make('jaxmarl/MPE_simple_spread_v3')\n"
        "    assert sys.stdout is out and sys.stderr is err\n"
        "assert out.getvalue() == '', out.getvalue()\n"
        "assert sys.__stdout__ is sys.stdout\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
