"""With `JAX_ENABLE_X64` everything of ours keeps the types that it states: 32 bits, the same from step to step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents, envs
from jaxstack.core.errors import UserError
from jaxstack.envs import base

TINY = dict(num_envs=2, num_steps=4, num_minibatches=2, hidden=(4,), total_steps=64, eval_episodes=2, eval_steps=3)
REPLAY = dict(num_envs=2, train_every=2, rounds=2, learning_starts=4, batch_size=4, hidden=(4,), total_steps=16)
NORMS = dict(normalise_obs=True, normalise_reward=True, normalise_value=True)
CASES = {
    "matrix game": ("ippo", dict(env="matrix_game")),
    "dispersion, forces": ("ippo", dict(env="dispersion", env_args=("continuous=true", "share_reward=true"))),
    "navigation": ("mappo", dict(env="navigation", sharing="none", **NORMS)),
    "spread": ("ippo", dict(env="blind_particle_spread", env_args=("groups=[1, 1]",), sharing="full+id")),
    "recurrent": ("ippo", dict(env="dispersion", gru=4, auto_reset="exact")),
    "hypermarl": ("hypermarl", dict(env="matrix_game", condition="id+obs")),
    "hypermarl, recurrent": ("hypermarl", dict(env="dispersion", gru=4, algorithm="mappo", embedding="one_hot")),
    "happo": ("happo", dict(env="dispersion")),
    "dico": ("dico", dict(env="navigation")),
    "kaleidoscope": ("kaleidoscope", dict(env="dispersion")),
    "ppo, categories": ("ppo", dict(env="gymnax/FrozenLake-misc")),
    "dqn, tables": ("dqn", dict(env="cliff_walking", env_args=("eps=0.2", "eps_spread=0.1"), norm="layer")),
    "dqn, options": ("dqn", dict(env="taxi", double=True, dueling=True, n_step=2, norm="weight", loss="huber")),
    "overcooked": ("ippo", dict(env="jaxmarl/overcooked/cramped_room")),
}


def types(tree):
    """Types by name; the state of a wrapped library (flashbax keeps a place) is its own business."""
    leaves = {jax.tree_util.keystr(k): x.dtype for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    return {k: dtype for k, dtype in leaves.items() if ".lib" not in k and ".buffer.current_index" not in k}


@pytest.mark.parametrize("name", CASES)
def test_an_update_and_an_evaluation_keep_their_types(name):
    agent, options = CASES[name]
    if "/" in options["env"]:
        envs.make(options["env"])  # modules of libraries hold arrays, made when they are imported: for tests to come
    with jax.enable_x64():
        one = agents.make(agent, **(REPLAY if agent == "dqn" else TINY), **options)
        state = jax.eval_shape(one.init, jax.random.key(0), one.hypers)
        new, metrics = jax.eval_shape(one.step, state)
        results = jax.eval_shape(one.evaluate, state, jax.random.key(0))
    assert types(new) == types(state)
    wide = [k for k, dtype in types((new, metrics, results)).items() if dtype in (jnp.float64, jnp.int64)]
    assert not wide


def test_64_bits_give_the_same_starts_and_steps():
    """And they run, not only trace."""

    def play():
        env = envs.make("dispersion")
        key = jax.random.key(0)
        state, ts = env.reset(key)
        return env.step(key, state, base.sample_action(env.spec, key, ts))

    want = jax.jit(play)()
    with jax.enable_x64():
        got = jax.jit(play)()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), got, want)


def test_a_library_that_fails_is_named():
    class Failing(base.Environment):
        name = "lib/failing"

        def reset(self, key):
            raise TypeError("two types\nthat differ")

        @property
        def spec(self):
            return base.Spec("failing", ("a",), (1,), base.Discrete(2))

    assert base.runs(Failing()) is not None
    with (
        jax.enable_x64(),
        pytest.raises(UserError, match=r"lib/failing: JAX_ENABLE_X64 found on.*two types that differ"),
    ):
        base.runs(Failing())
