"""Scripted processes of two agents whose probes are known: what a probe must and must not light up on."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import unknown
from jaxstack.measures.probes import Trajectories, trajectories

SCRIPTS = ("reactive", "memory", "private", "sync", "temporal", "independent")


def scripted(kind: str, key: Array, episodes: int = 200, steps: int = 12) -> Trajectories:
    """Draw a scripted process of two agents with binary observations and actions, whose probes are known.

    reactive: a = o_t. memory: a = o_{t-1}. private: agent 1 plays agent 0's o_t. sync: both play one coin. temporal:
    agent 1 plays agent 0's o_{t-1}; agent 0 is idle in both. independent: coins. The action before the first
    observation is a coin.

    Raises:
        UserError: an unknown kind.
    """
    if kind not in SCRIPTS:
        raise unknown("process", kind, SCRIPTS)
    k_obs, k_act = jax.random.split(key)
    obs = jax.random.bernoulli(k_obs, 0.5, (episodes, steps, 2)).astype(jnp.int32)
    coin = jax.random.bernoulli(k_act, 0.5, (episodes, steps, 2)).astype(jnp.int32)
    last = jnp.concatenate([coin[:, :1], obs[:, :-1]], axis=1)
    second = lambda a: jnp.stack([jnp.zeros_like(a), a], -1)  # agent 0 is idle
    action = {
        "reactive": obs,
        "memory": last,
        "private": second(obs[..., 0]),
        "sync": jnp.repeat(coin[..., :1], 2, -1),
        "temporal": second(last[..., 0]),
        "independent": coin,
    }[kind]
    return trajectories(np.asarray(obs, np.float32)[..., None], np.asarray(action))
