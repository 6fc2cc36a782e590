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
# # From JaxMARL to jaxstack
#
# A config of JaxMARL's `ippo_ff_mpe.py` becomes a learner, its environment keeps its name, and what its script does by
# hand (seeds, logging, evaluation, saving) is the runner's. `docs/coming-from.md` has the whole table.

# %% tags=["parameters"]
updates, seeds = 60, 3

# %%
import jax
import jax.numpy as jnp
import pandas as pd

import jaxstack
from jaxstack import envs
from jaxstack.report import plots

# %% [markdown]
# ## The config
# Names on the left are JaxMARL's. `ANNEAL_LR`, `ACTIVATION` and the coefficients keep their meaning; the hidden layers
# of that script are two of 64.

# %%
theirs = {
    "LR": 2.5e-4,
    "NUM_ENVS": 16,
    "NUM_STEPS": 128,
    "TOTAL_TIMESTEPS": updates * 16 * 128,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95,
    "CLIP_EPS": 0.2,
    "ENT_COEF": 0.01,
    "VF_COEF": 0.5,
    "MAX_GRAD_NORM": 0.5,
    "ACTIVATION": "tanh",
    "ANNEAL_LR": True,
}
names = {
    "LR": "lr",
    "TOTAL_TIMESTEPS": "total_steps",
    "UPDATE_EPOCHS": "num_epochs",
    "GAE_LAMBDA": "lam",
    "CLIP_EPS": "clip",
}
options = {names.get(key, key.lower()): value for key, value in theirs.items()}
learner = jaxstack.make_agent("ippo", env="jaxmarl/MPE_simple_spread_v3", sharing="full", **options)

# %% [markdown]
# ## The environment
# `jaxmarl/NAME` is JaxMARL's environment behind one protocol: arrays with an agent axis instead of dictionaries, and
# `terminated` and `truncated` apart. `step` does not reset by itself; the runner does, and keeps the true last
# observation, from which a cut episode is bootstrapped. `Spec.notes` says where the adapter differs from the library.

# %%
env = envs.make("jaxmarl/MPE_simple_spread_v3")
state, ts = jax.jit(env.reset)(jax.random.key(0))
state, ts = jax.jit(env.step)(jax.random.key(1), state, jnp.array([0, 1, 2]))
print(ts.obs.shape, ts.reward, ts.terminated, ts.truncated)
env.spec.notes

# %% [markdown]
# ## Training
# All seeds are one compiled program. Metrics are a table with a row per update and seed. `rollout/return` is the mean
# over agents; JaxMARL's `MPELogWrapper` multiplies rewards by the number of agents before it sums them, so its numbers
# are three times these.

# %%
result = jaxstack.train(learner, seeds=seeds, progress=False)
last = result.metrics[result.metrics.step == result.metrics.step.max()]
last[["seed", "samples", "rollout/return", "eval/return"]]

# %%
from IPython.display import Image

Image(plots.learning_curves({"IPPO": result.metrics}, "curves.png", title="ippo on MPE simple_spread"))

# %% [markdown]
# ## After training
# The policy is saved as safetensors and JSON, and loads in any script.

# %%
from jaxstack.core import bundle

bundle.save_policy("policy", learner, jax.tree.map(lambda leaf: leaf[0], result.state))
policy = jaxstack.load_policy("policy")
_, actions = policy.act(ts.obs[None])  # one environment
pd.DataFrame({"agent": env.spec.agents, "action": actions[0]})
