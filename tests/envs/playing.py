"""Random play for comparisons with the references."""

from functools import partial

import jax
import numpy as np

from jaxstack.envs.base import sample_action


def play(env, episodes=200, steps=None, seed=0):
    """Random play: (states before, actions, states after, TimeSteps), leaves [T, E, ...] numpy; `alive` [T, E]."""
    steps = steps or env.spec.horizon

    @jax.jit
    def run(key):
        k_reset, key = jax.random.split(key)
        start = jax.vmap(env.reset)(jax.random.split(k_reset, episodes))

        def body(carry, key):
            k_act, k_step = jax.random.split(key)
            action = jax.vmap(partial(sample_action, env.spec))(jax.random.split(k_act, episodes), carry[1])
            new = jax.vmap(env.step)(jax.random.split(k_step, episodes), carry[0], action)
            return new, (carry[0], action, *new)

        return jax.lax.scan(body, start, jax.random.split(key, steps))[1]

    before, action, after, ts = jax.tree.map(np.asarray, run(jax.random.key(seed)))
    done = ts.terminated | ts.truncated
    alive = np.cumsum(done, 0) - done == 0
    return before, action, after, ts, alive
