"""Our forms of MPE's methods against the library's own: equal numbers for equal keys and actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import envs
from jaxstack.envs.base import action_from, action_noise
from jaxstack.envs.jaxmarl import adapter, mpe_fast

TASKS = ("spread_v3", "speaker_listener_v4", "tag_v3", "world_comm_v3", "push_v3", "facmac_3a_v1")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in TASKS),
        ("spread_v3", dict(num_agents=5, num_landmarks=2, local_ratio=0.3)),
        ("spread_v3", dict(num_agents=1, num_landmarks=1)),
        ("spread_v3", dict(action_type="Continuous")),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())),
)
def test_equal_to_the_librarys_methods(name, options):
    """Played side by side, so that a difference would grow; contacts happen, as agents start within reach."""
    env = envs.make(f"jaxmarl/MPE_simple_{name}", **options)
    lib, _ = adapter.library(env.name, env.options)  # pyright: ignore
    count, steps = 20, 25
    noise = action_noise(env.spec, jax.random.key(1), (count, steps))

    def play(key, noise):
        k_reset, k_step = jax.random.split(key)
        obs, theirs = lib.reset(k_reset)
        ours, ts = env.reset(k_reset)

        def body(c, x):
            (ours, theirs), key = c, x[0]
            action = action_from(env.spec, x[1])
            ours, ts = env.step(key, ours, action)
            obs, theirs, reward, _, _ = lib.step_env(key, theirs, env._actions(action))  # pyright: ignore
            return (ours, theirs), (ts.obs, env._obs(obs), ts.reward, adapter._rewards(env.spec, reward))  # pyright: ignore

        start = ts.obs, env._obs(obs)  # pyright: ignore
        return start, jax.lax.scan(body, (ours, theirs), (jax.random.split(k_step, steps), noise))[1]

    start, (obs, want_obs, reward, want_reward) = jax.jit(jax.vmap(play))(
        jax.random.split(jax.random.key(0), count), noise
    )
    np.testing.assert_array_equal(*start)
    # sums are taken in another order, and contacts drive apart what was rounded otherwise
    tolerance = 1e-4
    np.testing.assert_allclose(obs, want_obs, atol=tolerance, rtol=0)
    np.testing.assert_allclose(reward, want_reward, atol=tolerance, rtol=1e-5)
    assert float(jnp.ptp(obs)) > 0.5


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("MPE_simple_spread_v3", dict(u_noise=(0.5, 0.5, 0.5)), "_apply_action_force"),
        ("MPE_simple_tag_v3", {}, "_integrate_state"),
        ("MPE_simple_tag_v3", {}, "rewards"),
    ],
)
def test_the_librarys_methods_stay_where_ours_would_differ(name, options, kept):
    """Noise that is wanted, speed limits, and other tasks than simple_spread."""
    lib, _ = adapter.library(name, tuple((k, np.asarray(v)) for k, v in options.items()))
    assert kept not in vars(mpe_fast.faster(lib))
    assert "_apply_environment_force" in vars(lib)
