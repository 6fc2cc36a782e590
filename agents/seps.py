"""SePS: selective parameter sharing (Christianos et al., ICML 2021): which agents should share a network.

Random policies collect transitions; a variational autoencoder maps an agent's identity to a code from which, together
with observation and action, the next observation and reward are decoded; agents whose codes cluster share. One hidden
ReLU layer each: without it a code could only shift predictions, never select what matters in an observation.
"""

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Box, Environment, sample_action
from jaxstack.nn.observations import categories, inputs_of


class Options(NamedTuple):
    """As published: 5000 joint transitions, codes of 10, layers of 64, Adam 3e-4, 10 epochs of 128, KL weight 1e-4."""

    transitions: int = 5000
    hidden: int = 64
    code: int = 10
    lr: float = 3e-4
    epochs: int = 10
    batch: int = 128
    kl: float = 1e-4
    max_groups: int = 8


def find_groups(env: Environment, key: Array, options: Options = Options()) -> tuple[int, ...]:
    """The group of each agent, numbered in order of first appearance. Raises `UserError` for one agent."""
    count = env.spec.num_agents
    if count < 2:
        raise UserError(f"{env.spec.id}: groups need at least two agents")
    k_data, k_train = jax.random.split(key)
    data = jax.jit(lambda k: transitions(env, k, options.transitions))(k_data)
    means = np.asarray(jax.jit(lambda k: codes(data, count, k, options))(k_train))
    return cluster(means, min(options.max_groups, count - 1) if count > 2 else 2)


def transitions(env: Environment, key: Array, total: int) -> tuple[Array, Array, Array, Array]:
    """Random play: (observation [M, D], action features [M, K], next observation [M, D], reward [M]) with agents in
    order within each step, M = a multiple of their number."""
    spec = env.spec
    vec = vector.vectorise(env, 10)
    steps = -(-total // 10)
    k_init, k_roll = jax.random.split(key)

    def act(key: Array, carry: Any, vs: vector.VecState) -> tuple[Any, Array, Any]:
        return carry, jax.vmap(partial(sample_action, spec))(jax.random.split(key, 10), vs.ts), ()

    data = rollout.collect(vec, act, k_roll, vector.init(vec, k_init), (), steps).steps
    flat = lambda x: x.reshape(-1, *x.shape[3:]).reshape(steps * 10 * spec.num_agents, -1).astype(jnp.float32)
    inputs = inputs_of(spec, data.ts.obs.dtype)
    space = spec.action_space
    action = data.action if isinstance(space, Box) else categories(space).encode(data.action)
    assert data.final_obs is not None
    seen, nxt = (flat(inputs.encode(x)) for x in (data.ts.obs, data.final_obs))
    return seen, flat(action), nxt, flat(data.reward)[:, 0]


def codes(data: tuple[Array, Array, Array, Array], count: int, key: Array, options: Options) -> Array:
    """Mean codes [A, code] of the trained autoencoder (its loss: summed squared error + kl * KL)."""
    obs, action, nxt, reward = data
    size = obs.shape[0]
    agent = jnp.arange(size) % count
    target = jnp.concatenate([nxt, reward[:, None]], -1)
    k_init, k_run = jax.random.split(key)
    keys = jax.random.split(k_init, 5)
    dense = lambda k, m, n: jax.random.normal(k, (m, n), jnp.float32) / m**0.5
    inputs = options.code + obs.shape[1] + action.shape[1]
    params = {
        "in": dense(keys[0], count, options.hidden),
        "mean": dense(keys[1], options.hidden, options.code),
        "logvar": dense(keys[2], options.hidden, options.code),
        "hidden": dense(keys[3], inputs, options.hidden),
        "out": dense(keys[4], options.hidden, target.shape[1]),
    }
    tx = optax.adam(options.lr)

    def loss(params: dict[str, Array], index: Array, key: Array) -> Array:
        h = jax.nn.relu(params["in"][agent[index]])
        mean, logvar = h @ params["mean"], h @ params["logvar"]
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
        h = jax.nn.relu(jnp.concatenate([z, obs[index], action[index]], -1) @ params["hidden"])
        out = h @ params["out"]
        kl = -0.5 * (1 + logvar - jnp.square(mean) - jnp.exp(logvar)).sum(-1)
        return (jnp.square(out - target[index]).sum(-1) + options.kl * kl).mean()

    def step(c: tuple, inputs: tuple[Array, Array]) -> tuple[tuple, None]:
        params, opt_state = c
        index, key = inputs
        updates, opt_state = tx.update(jax.grad(loss)(params, index, key), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    batches = size // min(options.batch, size)

    def epoch(c: tuple, key: Array) -> tuple[tuple, None]:
        k_order, k_noise = jax.random.split(key)
        order = jax.random.permutation(k_order, size)[: batches * min(options.batch, size)].reshape(batches, -1)
        return jax.lax.scan(step, c, (order, jax.random.split(k_noise, batches)))[0], None

    (params, _), _ = jax.lax.scan(epoch, (params, tx.init(params)), jax.random.split(k_run, options.epochs))
    return jax.nn.relu(params["in"]) @ params["mean"]


def cluster(points: np.ndarray, max_groups: int) -> tuple[int, ...]:
    """k-means of the codes with as many clusters as give the lowest Davies-Bouldin index; equal codes are one group."""
    best: tuple[float, np.ndarray] = (np.inf, np.zeros(len(points), int))
    for k in range(2, min(max_groups, len(np.unique(points, axis=0))) + 1):
        labels = _kmeans(points, k)
        score = davies_bouldin(points, labels)
        if score < best[0]:
            best = (score, labels)
    _, first, labels = np.unique(best[1], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return tuple(int(rank[g]) for g in labels)


def davies_bouldin(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean over clusters of the worst (spread_i + spread_j) / distance of centres (Davies & Bouldin, 1979)."""
    kinds = np.unique(labels)
    if len(kinds) < 2:
        return float("inf")
    centres = np.stack([points[labels == k].mean(0) for k in kinds])
    spread = np.asarray([np.linalg.norm(points[labels == k] - c, axis=1).mean() for k, c in zip(kinds, centres)])
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    return float(((spread[:, None] + spread[None]) / np.maximum(apart, 1e-12)).max(1).mean())


def _kmeans(points: np.ndarray, k: int) -> np.ndarray:
    """Labels from scipy's k-means++ with a fixed seed; empty clusters are allowed."""
    from scipy.cluster.vq import kmeans2

    best: tuple[float, np.ndarray] = (np.inf, np.zeros(len(points), int))
    for seed in range(5):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="One of the clusters is empty")
            centres, labels = kmeans2(points.astype(np.float64), k, minit="++", seed=seed, missing="warn")
        cost = float(np.square(points - centres[labels]).sum())
        if cost < best[0]:
            best = (cost, labels)
    return best[1]
