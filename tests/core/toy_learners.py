"""Tiny learners for tests of the runner."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxstack.core.config import Config
from jaxstack.core.learner import Learner


class Hypers(NamedTuple):
    lr: float = 0.1
    poison: float = -1.0
    """Step whose loss becomes NaN."""


@dataclass(frozen=True)
class ToyConfig(Config):
    width: int = 4
    num_updates: int = 7


class State(NamedTuple):
    hypers: Any
    params: Any
    opt_state: Any
    key: Any
    step: Any


def regression(config: ToyConfig = ToyConfig(), conv: bool = False) -> Learner:
    """Linear regression on data drawn from the state's key, with adam."""
    tx = optax.scale_by_adam()
    target = jnp.arange(config.width, dtype=jnp.float32)

    def init(key, hypers):
        k, key = jax.random.split(key)
        params = {"w": jax.random.normal(k, (config.width,)), "b": jnp.zeros(())}
        return State(hypers, params, tx.init(params), key, jnp.int32(0))

    def loss(params, x):
        if conv:
            x = x + 0.1 * jax.lax.conv(x[:, None], jnp.ones((1, 1, 1)), (1,), "SAME")[:, 0]
        return jnp.mean((x @ params["w"] + params["b"] - x @ target) ** 2)

    def step(s):
        key, k = jax.random.split(s.key)
        x = jax.random.normal(k, (8, config.width))
        value, grads = jax.value_and_grad(loss)(s.params, x)
        value = jnp.where(s.step + 1 == s.hypers.poison, jnp.nan, value)
        updates, opt_state = tx.update(grads, s.opt_state)
        params = jax.tree.map(lambda p, u: p - s.hypers.lr * u, s.params, updates)
        return State(s.hypers, params, opt_state, key, s.step + 1), {"loss/total": value, "train/w0": params["w"][0]}

    def evaluate(s, key):
        x = jax.random.normal(key, (16, config.width))
        return {"eval/return": -loss(s.params, x), "eval/step": s.step.astype(jnp.float32), "eval/draw": x[0, 0]}

    return Learner(
        init, step, Hypers(), config, "toy", samples_per_step=8, evaluate=evaluate, num_steps=config.num_updates
    )


def classifier(features: int = 64, classes: int = 10) -> Learner:
    """Softmax regression on batches (x [B, features], y [B])."""
    tx = optax.sgd(0.5)

    def init(key, hypers):
        params = {"w": 0.01 * jax.random.normal(key, (features, classes)), "b": jnp.zeros(classes)}
        return State(hypers, params, tx.init(params), key, jnp.int32(0))

    def step(s, batch):
        x, y = batch

        def loss(p):
            logits = x @ p["w"] + p["b"]
            accuracy = (logits.argmax(-1) == y).mean()
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), accuracy

        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(s.params)
        updates, opt_state = tx.update(grads, s.opt_state)
        params = optax.apply_updates(s.params, updates)
        return State(s.hypers, params, opt_state, s.key, s.step + 1), {"loss/total": value, "train/accuracy": accuracy}

    return Learner(init, step, Hypers(), None, "softmax", samples_per_step=32, takes_batch=True)


def numbers(tree):
    """Leaves as numpy, typed keys as their data."""
    import numpy as np

    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(data(x)) for x in jax.tree.leaves(tree)]


def assert_same(a, b):
    """Bitwise equal."""
    import numpy as np

    a, b = numbers(a), numbers(b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x, y)
