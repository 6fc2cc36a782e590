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
# # Kalman Linear Attention as a layer
#
# The layer is a flax module: `y, state = layer(x)` over `[B, T, D]`. Inside, every channel is a bank of Kalman filters,
# so each output has a variance, and tokens that are missing can be skipped as gaps in time. Here a small model of our
# own filters a noisy signal.

# %% tags=["parameters"]
updates, length = 300, 48

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from jaxstack.sequence.kla import KalmanLinearAttention


# %%
class Filter(nn.Module):
    """Noisy values [B, T, 1] -> the signal's estimate [B, T, 1]."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width)(x)
        y, _ = KalmanLinearAttention(self.width, d_state=4)(nn.LayerNorm()(h))
        return x + nn.Dense(1)(nn.silu(h + y))


def signals(key, batch=32):
    """A sum of two slow waves, and the same with noise [B, T, 1]."""
    phase, rate, noise = (jax.random.split(k, 2)[0] for k in jax.random.split(key, 3))
    t = jnp.arange(length) / length
    turns = jax.random.uniform(rate, (batch, 1, 2), minval=1.0, maxval=3.0)
    wave = jnp.sin(2 * jnp.pi * (turns * t[:, None] + jax.random.uniform(phase, (batch, 1, 2)))).sum(-1, keepdims=True)
    return wave, wave + jax.random.normal(noise, wave.shape)


# %% [markdown]
# ## Training
# All updates are one program: a scan over keys.

# %%
model, optimiser = Filter(), optax.adam(3e-3)
variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, length, 1)))


def update(carry, key):
    weights, moments = carry
    wave, seen = signals(key)
    loss = lambda weights: jnp.square(model.apply(weights, seen) - wave).mean()
    value, gradient = jax.value_and_grad(loss)(weights)
    change, moments = optimiser.update(gradient, moments, weights)
    return (optax.apply_updates(weights, change), moments), value


keys = jax.random.split(jax.random.key(1), updates)
(variables, _), losses = jax.jit(lambda c, k: jax.lax.scan(update, c, k))((variables, optimiser.init(variables)), keys)
wave, seen = jax.jit(signals)(jax.random.key(2))
error = lambda x: float(jnp.square(x - wave).mean())
pd.Series({"noise": error(seen), "model": error(jax.jit(model.apply)(variables, seen))}).round(3)

# %% [markdown]
# ## The filter by itself
# `kla_scan` is the recurrence without projections. A mask with `masked="predict"` marks a gap: time passes, nothing is
# observed, and the variance grows until the next observation.

# %%
from jaxstack.sequence.kla import kla_scan

values = np.asarray(seen[:1])  # one channel
one = np.ones((1, length, 1), np.float32)
observed = np.ones((1, length), bool)
observed[:, length // 3 : length // 2] = False
decay, drift = np.full((1, 1), 0.98, np.float32), np.full((1, 1), 0.05, np.float32)
y, variance, _ = kla_scan(values, one, one, one, decay, drift, mask=observed, masked="predict")

# %%
from IPython.display import Image

from jaxstack.report import plots

rows = [("signal", wave[0, :, 0]), ("estimate", y[0, :, 0]), ("its variance", variance[0, :, 0])]
table = {name: (np.arange(1, length + 1), np.asarray(v, np.float64)[None]) for name, v in rows}
Image(plots.curve_panels([("a gap in the middle", "value", "time", "linear", table)], "gap.png"))

# %% [markdown]
# ## Step by step
# A step gives what the whole sequence gives at that place, from a state of constant size.

# %%
layer = KalmanLinearAttention(8, d_state=4)
x = jax.random.normal(jax.random.key(3), (1, 6, 8))
weights = jax.jit(layer.init)(jax.random.key(4), x)
whole, _ = jax.jit(layer.apply)(weights, x)
step = jax.jit(lambda token, state: layer.apply(weights, token, state, method="step"))
state = layer.init_state(1)
for t in range(x.shape[1]):
    out, state = step(x[:, t], state)
bool(jnp.allclose(out, whole[:, -1], atol=1e-4))
