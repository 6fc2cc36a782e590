"""A tiny learner with an axis of environments: a linear policy that follows drifting targets."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from toy_learners import Hypers

from jaxstack.core.devices import split
from jaxstack.core.learner import Learner

NUM_ENVS, STEPS, MINIBATCHES = 8, 4, 2


class State(NamedTuple):
    hypers: Any
    params: Any
    envs: Any
    """Targets and running sums, [N, 3] each."""
    key: Any
    step: Any


def tracker() -> Learner:
    """T steps of N environments, then shuffled minibatches over all transitions, as PPO has them."""

    def init(key, hypers):
        k, key = jax.random.split(key)
        envs = {"target": jax.random.normal(k, (NUM_ENVS, 3)), "total": jnp.zeros((NUM_ENVS, 3))}
        return State(hypers, {"w": jnp.eye(3) * 0.1}, envs, key, jnp.int32(0))

    def step(s):
        k_roll, k_order = jax.random.split(jax.random.fold_in(s.key, s.step))

        def move(envs, t):
            noise = jax.random.normal(jax.random.fold_in(k_roll, t), (NUM_ENVS, 3))
            target = 0.9 * envs["target"] + 0.1 * noise
            return {"target": target, "total": envs["total"] + target}, (envs["target"], target)

        envs, data = jax.lax.scan(move, s.envs, jnp.arange(STEPS))

        def sgd(w, index):
            x, y = (a.reshape(-1, 3)[index] for a in data)
            value, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
            return w - s.hypers.lr * grad, value

        order = jax.random.permutation(k_order, NUM_ENVS * STEPS).reshape(MINIBATCHES, -1)
        w, losses = jax.lax.scan(sgd, s.params["w"], split(order, 1, "the size of a minibatch"))
        return s._replace(params={"w": w}, envs=envs, step=s.step + 1), {"loss/total": losses.mean()}

    def evaluate(s, key):
        return {"eval/return": -jnp.square(s.params["w"] @ jax.random.normal(key, (3,))).sum()}

    return Learner(
        init, step, Hypers(), None, "tracker", samples_per_step=32, evaluate=evaluate, over_envs=lambda s: s.envs
    )
