# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own environment and network
#
# An environment is a frozen dataclass of pure functions; a network is a flax module. Both live in a module, so that a
# run stores their names and any process can rebuild them. This notebook writes that module, `corridor.py`.

# %% tags=["parameters"]
updates, seeds = 40, 3

# %%
import sys
from pathlib import Path

import jax
import pandas as pd

import jaxstack

sys.path.insert(0, ".")
Path("corridor.py").write_text('''
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxstack.envs.base import Discrete, Environment, Spec, first_step


class State(NamedTuple):
    place: Any  # [2]
    t: Any


@dataclass(frozen=True)
class Corridor(Environment):
    """Two walkers on a line of `length` cells earn 1 in each step in which they share a cell; the time limit cuts."""

    length: int = 5
    horizon: int = 16

    @property
    def spec(self):
        return Spec("corridor", ("left", "right"), (2 * self.length,), Discrete(3), horizon=self.horizon)

    def reset(self, key):
        state = State(jnp.array([0, self.length - 1], jnp.int32), jnp.int32(0))
        return state, first_step(self.spec, self.see(state))

    def step(self, key, state, action):
        place = jnp.clip(state.place + action.astype(jnp.int32) - 1, 0, self.length - 1)
        state = State(place, state.t + 1)
        reward = jnp.full(2, place[0] == place[1], jnp.float32)
        ts = first_step(self.spec, self.see(state), reward=reward)
        return state, ts._replace(truncated=state.t >= self.horizon)

    def see(self, state):
        own = jax.nn.one_hot(state.place, self.length)
        return jnp.concatenate([own, own[::-1]], -1)  # own cell, the other's cell


class Residual(nn.Module):
    """Observations [B, D] -> features [B, width]."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        return x + nn.Dense(self.width)(nn.relu(nn.LayerNorm()(x)))
''')

# %% [markdown]
# ## Check it
# `check_env` traces reset and step and compares them with the spec: one line names what does not fit. Here a number
# stands where a Boolean belongs:

# %%
from corridor import Corridor


class Wrong(Corridor):
    def step(self, key, state, action):
        state, ts = super().step(key, state, action)
        return state, ts._replace(truncated=state.t // self.horizon)


jaxstack.check_env(Corridor())
try:
    jaxstack.check_env(Wrong())
except jaxstack.UserError as e:
    print(e)

# %% [markdown]
# ## Train
# The environment, a wrapper and the network by name: the run directory can be resumed, evaluated and exported
# elsewhere, and `jaxstack train ippo --env corridor:Corridor --network corridor:Residual=32` does it from a shell.

# %%
options = dict(env="corridor:Corridor", env_args=("length=4",), wrap=("agent_id",), network="corridor:Residual=32")
learner = jaxstack.make_agent(
    "ippo", hidden=(16,), num_envs=16, num_steps=16, total_steps=updates * 256, lr=3e-3, **options
)
result = jaxstack.train(learner, seeds=seeds, run_dir="run", progress=False)
result.metrics.groupby("step")["rollout/return"].mean().iloc[[0, -1]]

# %% [markdown]
# The best return is 15 with length 4: the walkers meet in their second of 16 steps and stay together.

# %%
policy = jaxstack.load_policy("run/policy")
env = policy.learner.env
reset, step = jax.jit(env.reset), jax.jit(env.step)
state, ts = reset(jax.random.key(0))
carry, rows = None, []
for t in range(6):
    carry, actions = policy.act(ts.obs[None], carry)
    state, ts = step(jax.random.key(t), state, actions[0])
    rows.append({"left": int(actions[0, 0]) - 1, "right": int(actions[0, 1]) - 1, "reward": float(ts.reward[0])})
pd.DataFrame(rows)
