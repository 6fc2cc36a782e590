"""HAPPO: heterogeneous-agent PPO (Kuba et al., ICLR 2022; Zhong et al., JMLR 2024).

Agents with networks of their own are updated one after another in a random order. Agent i maximises the clipped
surrogate of M * A, where A is the joint advantage and M the product of the ratios of the agents updated before it; then
M <- M * pi_new^i / pi_old^i on all samples. Each agent has a critic of its own on the global state, trained beside it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.agents import team_ppo
from jaxstack.agents.team_ppo import Batch, Hypers, PPOConfig, State, Task
from jaxstack.core import losses
from jaxstack.core.config import require
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.envs.base import Environment
from jaxstack.nn import team
from jaxstack.nn.distributions import TeamDistribution
from jaxstack.nn.minibatches import minibatch_sgd, transitions
from jaxstack.nn.observations import reading
from jaxstack.nn.team import TeamNet, TeamSpec


@dataclass(frozen=True)
class Config(PPOConfig):
    """HAPPO with a network for each agent and a centralised critic, feed-forward."""

    def validate(self) -> None:
        super().validate()
        require(self, "gru", self.gru == 0, "0: HAPPO is feed-forward here")
        require(self, "advantage_norm", self.advantage_norm == "group", "group: all agents have one joint advantage")


def happo(config: Config = Config()) -> Learner:
    """Raises `UserError` where config and environment do not fit."""
    env = team_ppo.make_env(config)
    shape = team_ppo.team_shape(env, config, central=True)
    fits = shape.actions.kind != "continuous" or shape.actions.valid is None
    require(config, "env", fits, "equal numbers of action dimensions for all agents")
    task = make_task(config, env, shape)
    return team_ppo.make_learner("happo", task, sequential_update, init_optimisers)


def make_task(config: Config, env: Environment, shape: TeamSpec) -> Task:
    """The task with a network for each agent. The joint advantage couples the agents by design, so that one scale for
    all rewards keeps the team's objective what it is; the rest of an agent's statistics, its clip and its optimiser are
    its own."""
    return team_ppo.make_task(config, env, shape, team.separate(shape, config.arch))._replace(one_objective=True)


def init_optimisers(task: Task, hypers: Hypers, params: Any) -> Any:
    """An optimiser for each agent, leaves [A, ...]."""
    return jax.vmap(team_ppo.optimiser(task.cfg, hypers).init)(params)


def sequential_update(task: Task, s: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
    """All epochs of one agent, then of the next, in random order; the factor M [T, N] is carried along."""
    k_order, k_agents = jax.random.split(key)
    count = task.shape.num_agents
    row = lambda tree, i: jax.tree.map(lambda x: x[i], tree)

    def one_agent(c: tuple, inputs: tuple[Array, Key]) -> tuple[tuple, Metrics]:
        params, opt_state, factor = c
        agent, key = inputs
        own = select(batch, agent)
        mask = _mask(task, batch, agent)
        new, new_opt, metrics = agent_epochs(task, row(params, agent), row(opt_state, agent), s, own, mask, factor, key)
        ratio = jnp.exp(_distribution(task, new, own, mask).log_prob(own.action) - own.logp)[..., 0]
        factor = factor * jnp.where(own.agent_mask[..., 0] > 0, ratio, 1.0)
        put = lambda tree, value: jax.tree.map(lambda x, v: x.at[agent].set(v), tree, value)
        return (put(params, new), put(opt_state, new_opt), factor), metrics

    inputs = (jax.random.permutation(k_order, count), jax.random.split(k_agents, count))
    (params, opt_state, factor), metrics = jax.lax.scan(
        one_agent, (s.params, s.opt_state, jnp.ones(batch.first.shape, jnp.float32)), inputs
    )
    metrics = jax.tree.map(jnp.mean, metrics) | {"train/factor": factor.mean()}
    return s._replace(params=params, opt_state=opt_state), metrics


def agent_epochs(
    task: Task, params: Any, opt_state: Any, s: State, own: Batch, mask: Array | None, factor: Array, key: Key
) -> tuple[Any, Any, Metrics]:
    """E epochs of M minibatches on one agent's data: (its parameters, its optimiser, metrics)."""
    cfg = task.cfg
    params, opt_state, _, metrics = minibatch_sgd(
        lambda params, aux_state, sample: agent_loss(task, params, s, *sample, aux_state),
        team_ppo.optimiser(cfg, s.hypers, total=s.total),
        params,
        opt_state,
        transitions((own, mask, factor)),
        key,
        epochs=cfg.num_epochs,
        minibatches=cfg.num_minibatches,
    )
    return params, opt_state, metrics


def agent_loss(
    task: Task, params: Any, s: State, mb: Batch, mask: Array | None, factor: Array, aux_state: Any = ()
) -> tuple[Array, tuple[Any, Metrics]]:
    """Clipped surrogate of M times the joint advantage (the team's mean), value loss and entropy of one agent."""
    cfg, hypers = task.cfg, s.hypers
    dist = _distribution(task, params, mb, mask)
    solo = _solo(task)
    _, value = solo.critic(jax.tree.map(lambda x: x[None], params), (), mb.critic_x, mb.first)
    advantage = losses.standardise(mb.advantage, mb.agent_mask) if cfg.normalise_advantage else mb.advantage
    clip = hypers.clip if cfg.clip_value else jnp.inf
    terms = {
        # M is positive, so it may stand outside of the minimum
        "loss/actor": factor[..., None] * losses.ppo_clip(dist.log_prob(mb.action), mb.logp, advantage, hypers.clip),
        "loss/critic": losses.clipped_value(value, mb.value, mb.target, clip),
        "train/entropy": dist.entropy(),
    }
    means = losses.masked_means(terms, mb.agent_mask)
    total = means["loss/actor"] + hypers.vf_coef * means["loss/critic"] - hypers.ent_coef * means["train/entropy"]
    return total, (aux_state, {"loss/total": total} | means)


def select(batch: Batch, agent: Array) -> Batch:
    """One agent's part of a batch, with an agent axis of length 1; the advantage is the team's."""
    pick = lambda x: jax.lax.dynamic_slice_in_dim(x, agent, 1, axis=2)
    return batch._replace(
        obs=pick(batch.obs),
        action=pick(batch.action),
        action_mask=None,
        agent_mask=pick(batch.agent_mask),
        logp=pick(batch.logp),
        value=pick(batch.value),
        advantage=batch.advantage.mean(2, keepdims=True),
        target=pick(batch.target),
        start=(),
    )


def _mask(task: Task, batch: Batch, agent: Array) -> Array | None:
    """Legal actions of one agent [T, N, 1, n]: the environment's, or those that its action space really has."""
    if batch.action_mask is not None:
        return jax.lax.dynamic_slice_in_dim(batch.action_mask, agent, 1, axis=2)
    if task.actions.valid is None:
        return None
    return jnp.broadcast_to(jnp.asarray(task.actions.valid)[agent], (*batch.first.shape, 1, task.actions.params))


def _solo(task: Task) -> TeamNet:
    net = team.separate(task.shape._replace(num_agents=1), task.cfg.arch)
    return net if task.cfg.normalise_obs else reading(net, task.inputs, task.shape.central)


def _distribution(task: Task, params: Any, mb: Batch, mask: Array | None) -> TeamDistribution:
    one = jax.tree.map(lambda x: x[None], params)
    _, raw = _solo(task).actor(one, (), mb.obs, mb.first)
    return task.actions._replace(valid=None).distribution(raw, one.get("log_std"), mask)
