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
# # Sweeps in one program
#
# Numeric hyperparameters are traced: settings x seeds are rows of one compiled program, however many there are. Here
# four learning rates and two entropy coefficients, then what the result can and cannot say.

# %% tags=["parameters"]
updates, seeds = 40, 5

# %%
import functools

import jaxstack
from jaxstack.sweeps import grid, log_uniform, sweep, uniform

# %%
ippo = functools.partial(
    jaxstack.make_agent,
    "ippo",
    env="matrix_game",
    hidden=(16,),
    num_envs=8,
    num_steps=20,
    total_steps=updates * 8 * 20,
)
space = {"lr": grid(1e-4, 1e-3, 1e-2, 1e-1), "ent_coef": grid(0.0, 0.05)}
result = sweep(ippo, space, seeds=seeds, progress=False, eval_every=-1)
[program["name"] for program in result.programs]  # what was compiled

# %% [markdown]
# ## Which setting is best
# Settings are ranked by the interquartile mean over seeds. The last column says which ones tie with the best: the 95%
# interval of the probability that a seed of the best beats one of theirs includes 1/2.

# %%
print(result.report("rollout/return"))

# %%
from IPython.display import Image

Image(result.figure("sweep.png", "rollout/return", title="ippo on matrix_game"))

# %% [markdown]
# The best of many settings is partly luck: train it again with seeds that it was not chosen by. As many rows as before
# are the same program, so nothing compiles.

# %%
best = result.best("rollout/return")
again = sweep(
    ippo,
    {name: grid(value) for name, value in best.items()},
    seeds=range(100, 100 + len(result.table)),
    progress=False,
    eval_every=-1,
)
again.summary("rollout/return")

# %% [markdown]
# ## Random search
# Settings drawn at random, as many as before. A draw depends on `search_seed`, the name and its number alone, so a
# larger `num` continues where a smaller one ended. Options that change shapes, such as `hidden=choice((8,), (16,))`,
# are swept likewise and cost a program for each value.

# %%
space = {"lr": log_uniform(1e-4, 1e-1), "ent_coef": uniform(0.0, 0.05)}
random = sweep(ippo, space, seeds=seeds, num=8, search_seed=1, progress=False, eval_every=-1)
random.summary("rollout/return")[["lr", "ent_coef", "iqm", "iqm_low", "iqm_high"]]
