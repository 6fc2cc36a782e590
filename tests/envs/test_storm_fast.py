"""Our form of STORM against the library's own methods: equal numbers for equal keys, states and actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import agree

from jaxstack.envs.jaxmarl import adapter, storm_fast


def make(**options):
    return adapter.library("storm_np", tuple(options.items()))[0]


def test_rarely_is_where_at_every_level_of_vmap():
    then = lambda x: x * x
    when = jnp.arange(12).reshape(3, 4) % 5 == 0
    x = jnp.arange(12.0).reshape(3, 4)
    one = lambda w, x: storm_fast.rarely(w, then, x, x)
    want = jnp.where(when, x * x, x)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(one))(when, x), want)
    np.testing.assert_array_equal(one(when[0, 0], x[0, 0]), want[0, 0])
    np.testing.assert_array_equal(jax.vmap(one, (None, 0))(when[0, 0], x[0]), x[0] * x[0])


def test_shuffled_is_the_generators_permutation():
    for seed in range(5):
        key = jax.random.key(seed)
        want = jax.random.permutation(key, 64)
        np.testing.assert_array_equal(storm_fast.shuffled(key, 64, jnp.arange(64)), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(num_inner_steps=30, num_outer_steps=2),
        dict(num_agents=4, grid_size=6, obs_size=4, num_coins=4, freeze_penalty=2),
    ],
    ids=["two", "four"],
)
def test_equal_to_the_library(options):
    """Half of the actions are zaps, so that agents freeze, come free and collide."""
    lib, fast = make(**options), make(**options)
    fast = storm_fast.faster(fast, **options)
    reset = jax.jit(jax.vmap(lib.reset))
    keys = jax.random.split(jax.random.key(0), 64)
    obs, state = reset(keys)
    agree(jax.jit(jax.vmap(fast.reset))(keys), (obs, state), 1e-6)
    theirs, ours = (jax.jit(jax.vmap(x.step_env)) for x in (lib, fast))
    seen = 0
    for t in range(60):
        keys = jax.random.split(jax.random.key(t), 64)
        action = jax.random.randint(keys[0], (64, lib.num_agents), 0, lib.num_actions)  # pyright: ignore
        action = {a: action[:, i] for i, a in enumerate(lib.agents)}
        want = theirs(keys, state, action)
        agree(ours(keys, state, action), want, 1e-6)
        state = want[1]
        seen += int((want[2] != 0).sum())
    assert seen


def test_grids_too_full_to_place_all_keep_the_librarys_methods():
    options = dict(grid_size=4, num_coins=6)
    lib = make(**options)
    before = lib.step_env
    assert storm_fast.faster(lib, **options).step_env is before
