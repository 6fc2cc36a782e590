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
# # What did a trained pair learn?
#
# In `follow_partner` each of two agents draws a random symbol, its cue, in every step. Both see both cues, and both are
# rewarded when their actions agree. A pair may read the cues, or it may settle on a constant: either earns all rewards
# in self-play. Two tools tell them apart. The probes ask what an action depends on (Tessera et al., 2026), and the
# audit of conventions plays each agent with partners that it did not train with. The case study is this project's.

# %% tags=["parameters"]
updates, seeds, episodes = 150, 2, 256

# %%
import jax
import pandas as pd

import jaxstack
from jaxstack.measures import conventions, partners, probes

steps = 64 * 16  # 64 episodes of 16 steps in each update
learner = jaxstack.make_agent(
    "ippo",
    env="follow_partner",
    sharing="none",  # each agent has its own network
    gru=32,
    hidden=(32,),
    num_envs=64,
    num_steps=16,
    num_minibatches=1,
    total_steps=updates * steps,
    gamma=0.0,
    lam=0.0,
    lr=2e-3,
)
trained = jaxstack.train(learner, seeds=seeds)  # both pairs in one program

# %% [markdown]
# ## Probes of greedy play
#
# Each value is read against its null, the same estimate with actions in random order. A constant action has no entropy
# that a probe could explain, so its normalised value does not exist; the note says so.

# %%
env = jaxstack.make_env("follow_partner")
played = conventions.record(learner, trained.state, env, jax.random.key(1), episodes=episodes)
found = [probes.audit(pair, probes.Settings(null_reps=20)) for pair in played]
pd.DataFrame(
    [
        {"pair": k, "probe": name, "bits": p.bits, "value": p.norm, "null": p.null.mean(), "p": p.p, "notes": p.notes}
        for k, pair in enumerate(found)
        for name, p in pair.items()
    ]
).round(3)

# %% [markdown]
# ## Conventions
#
# `constant` always plays action 0, `grounded(k)` its own cue of the step before plus k, and `noisy(0.5)` a random
# action in half of the steps; `tit` copies what agent 0 did last. A convention index of 1 says that nothing of the
# score in self-play is left with that partner.

# %%
zoo = partners.follow_partner_zoo(env.symbols, env.types)
report = conventions.audit(env, learner, trained.state, zoo, episodes=episodes, settings=probes.Settings(null_reps=20))
pd.DataFrame(report.rows()).round(3).T

# %%
pd.DataFrame({name: {"mean": e.value, "low": e.low, "high": e.high} for name, e in report.summary().items()}).round(3).T

# %% [markdown]
# Agent 0 of each pair (rows) with agent 1 of each pair (columns):

# %%
from IPython.display import Image

Image(report.figure("matrix.png", "score per step"))
