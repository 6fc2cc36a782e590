"""Our form of OvercookedV2 against the library's own methods: equal numbers for equal keys and actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import agree

from jaxstack.envs.jaxmarl import adapter, overcooked_v2_fast

BUSY = dict(random_reset=True, agent_view_size=2, negative_rewards=True, sample_recipe_on_delivery=True)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("cramped_room", dict(random_reset=True, start_cooking_interaction=True, random_agent_positions=True)),
        ("test_time_simple", BUSY | dict(indicate_successful_delivery=True)),
    ],
    ids=["by_hand", "view"],
)
def test_equal_to_the_librarys_methods(layout, options):
    """Kitchens that start in use, so that dishes are delivered; interacting is likelier than moving."""
    theirs, mine = (adapter.library(f"overcooked_v2/{layout}", tuple(options.items()))[0] for _ in range(2))
    ours = overcooked_v2_fast.faster(mine)
    assert "get_obs" in vars(ours)
    weights = jnp.log(jnp.array([1.0] * 5 + [2.0]))

    def play(lib, key):
        obs, state = lib.reset(key)

        def body(state, key):
            k_act, key = jax.random.split(key)
            action = jax.random.categorical(k_act, weights, shape=(lib.num_agents,))
            out = lib.step_env(key, state, {a: action[i] for i, a in enumerate(lib.agents)})
            return out[1], out

        return obs, state, jax.lax.scan(body, state, jax.random.split(key, 60))[1]

    keys = jax.random.split(jax.random.key(0), 60)
    want, got = (jax.jit(jax.vmap(lambda key, lib=lib: play(lib, key)))(keys) for lib in (theirs, ours))
    agree(got, want)
    assert np.count_nonzero(want[2][2]["agent_0"]) > 0


def test_what_is_not_covered_keeps_the_librarys_methods():
    """Here several permutations of the ingredients in what cooks see."""
    lib, _ = adapter.library("overcooked_v2/cramped_room", (("op_ingredient_permutations", (0, 1)),))
    assert "get_obs" not in vars(overcooked_v2_fast.faster(lib))
