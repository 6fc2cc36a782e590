"""Each agent's policy gradient of a team's shared parameters: the raw material of interference measures."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxstack.agents import hypermarl, sharing, team_ppo
from jaxstack.agents.team_ppo import Batch, State, Task
from jaxstack.core.learner import Key, Metrics
from jaxstack.measures import gradients


def task_of(agent: str, config: Any) -> Task:
    """The static task of an `ippo` or `hypermarl` config, for measuring without training."""
    env = team_ppo.make_env(config)
    shape = team_ppo.team_shape(env, config, central=False)
    if agent == "hypermarl":
        return team_ppo.make_task(config, env, shape, hypermarl.team_network(config, shape, config.arch))
    return team_ppo.make_task(config, env, shape, sharing.team_network(config, shape, env))


def agent_gradients(task: Task, s: State, batch: Batch) -> Array:
    """[A, P]: gradient of the policy loss from one agent's samples, with respect to the actor's parameters."""
    count = task.shape.num_agents

    def one(agent: Array) -> Array:
        weight = batch.agent_mask * (jnp.arange(count) == agent)
        flat, rebuild = ravel_pytree(s.params)

        def loss(flat: Array) -> Array:
            weights, _ = task.team.materialise(rebuild(flat), s.aux_state, batch.obs)
            logp = team_ppo.distribution(task, weights, batch).log_prob(batch.action)
            return -(logp * batch.advantage * weight).sum() / jnp.maximum(batch.agent_mask.sum(), 1.0)

        return jax.grad(loss)(flat)

    return jax.lax.map(one, jnp.arange(count))


def measure(task: Task, key: Key, batches: int = 20) -> Metrics:
    """At initialisation, over fresh rollouts: mean cosine between agents' gradients, and the variance over minibatches
    of the team's gradient relative to its squared mean norm; `entries` is the variance over one gradient's entries."""
    k_init, k_roll = jax.random.split(key)
    state = team_ppo.make_learner("measure", task).init(k_init)

    def one(s: State, key: Key) -> tuple[State, tuple[Array, Array, Array]]:
        s, batch, _ = team_ppo.gather_batch(task, s, key)
        each = agent_gradients(task, s, batch)
        total = each.sum(0)
        return s, (gradients.interference(each), total, gradients.entry_variance(total))

    _, (cosine, total, entries) = jax.lax.scan(one, state, jax.random.split(k_roll, batches))
    return {"cosine": cosine.mean(), "variance": gradients.relative_variance(total), "entries": entries.mean()}
