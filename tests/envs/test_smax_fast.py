"""Our form of SMAX against the library's own methods: equal numbers for equal keys, states and actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import agree

from jaxstack.envs.jaxmarl import adapter, smax_fast


def make(name: str, **options):
    return adapter.library(f"smax/{name}", tuple(options.items()))[0]


def test_written_out_generator_is_the_library_of_jax():
    key = jax.random.key(3)
    words = tuple(x[None] for x in jax.random.key_data(key))
    first, second = smax_fast.split(words, 7)
    np.testing.assert_array_equal(
        jnp.stack([first[:, 0], second[:, 0]], 1), jax.random.key_data(jax.random.split(key, 7))
    )
    np.testing.assert_allclose(
        smax_fast.uniform(words, -0.1, 0.2)[0], jax.random.uniform(key, (), minval=-0.1, maxval=0.2), atol=1e-7
    )


def test_batch_last_is_vmap_at_every_level():
    f = smax_fast.with_batch_last(lambda x, y: x * y[0] + jnp.arange(3.0)[:, None])
    x, y = jnp.arange(24.0).reshape(2, 4, 3), jnp.arange(16.0).reshape(2, 4, 2)
    want = x * y[..., :1] + jnp.arange(3.0)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(f))(x, y), want)
    np.testing.assert_array_equal(f(x[1, 2], y[1, 2]), want[1, 2])
    np.testing.assert_array_equal(jax.vmap(f, (0, None))(x[0], y[0, 1]), x[0] * y[0, 1, 0] + jnp.arange(3.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("2s3z", {}),
        ("5m_vs_6m", dict(see_enemy_actions=False, walls_cause_death=False, use_self_play_reward=True)),
        ("smacv2_5_units", dict(enemy_shoots=False)),
    ],
)
def test_equal_to_the_library(name, options):
    """Attacks are likelier than moves, so that battles are decided."""
    lib, fast = make(name, **options), smax_fast.faster(make(name, **options))
    theirs, ours = (
        jax.jit(jax.vmap(lambda k, s, a, x=x: (x.step_env(k, s, a), x.get_avail_actions(s), x.get_world_state(s))))
        for x in (lib, fast)
    )
    keys = jax.random.split(jax.random.key(0), 32)
    obs, state = jax.jit(jax.vmap(lib.reset))(keys)
    agree(jax.jit(jax.vmap(fast.reset))(keys), (obs, state), 1e-5)
    masks = jax.jit(jax.vmap(lib.get_avail_actions))(state)
    for t in range(60):
        keys = jax.random.split(jax.random.key(t), 32)
        eager = jnp.where(jnp.arange(lib.num_ally_actions) >= lib.num_movement_actions, 2.0, 0.0)
        actions = {
            a: jax.random.categorical(jax.random.fold_in(keys[0], i), jnp.where(masks[a] > 0, eager, -jnp.inf))
            for i, a in enumerate(lib.agents)
        }
        want = theirs(keys, state, actions)
        agree(ours(keys, state, actions), want, 1e-5)
        state = want[0][1]
        masks = jax.jit(jax.vmap(lib.get_avail_actions))(state)
    assert not bool(state.state.unit_alive.all())


@pytest.mark.parametrize("options", [dict(action_type="continuous"), dict(attack_mode="random")])
def test_other_options_keep_the_librarys_step(options):
    assert "step_env" in vars(smax_fast.faster(make("3m")))
    assert "step_env" not in vars(smax_fast.faster(make("3m", **options)))
