"""Tiny training runs on the probe environments, shared by the tests of the agents."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack import agents
from jaxstack.agents import happo, hypermarl, sharing, team_ppo
from jaxstack.agents.dico import dico_team
from jaxstack.agents.kaleidoscope import masked_team
from jaxstack.core import ledger
from jaxstack.core.metrics import Mean, on_host
from jaxstack.nn import team

SMALL = dict(env="probe", num_steps=16, num_envs=16, num_minibatches=2, hidden=(32,), anneal_lr=False, lr=1e-2)


class Trained(NamedTuple):
    learner: Any
    state: Any
    metrics: Any
    returns: float
    """Mean return of greedy episodes after training."""


def make(agent: str, kind: str, count: int = 1, /, **options: Any) -> Any:
    """A learner of a probe environment, with those of the small sizes that it has."""
    cls = agents.config_class(agent)
    small = {k: v for k, v in SMALL.items() if k in cls.__dataclass_fields__ or k in cls().hypers._fields}
    return agents.make(agent, **(small | dict(env_args=(f"kind={kind}", f"count={count}")) | options))


def train(learner: Any, updates: int, key: jax.Array) -> tuple[Any, Any, Mean]:
    """(state, metrics of all updates, mean return of greedy episodes after them)."""
    k_init, k_eval = jax.random.split(key)
    state, metrics = jax.lax.scan(lambda s, _: learner.step(s), learner.init(k_init), None, length=updates)
    return state, metrics, learner.evaluate(state, k_eval)["eval/return"]


@functools.cache
def run(agent: str, kind: str, count: int = 1, /, updates: int = 50, **options: Any) -> Trained:
    """Train for `updates` updates and evaluate, in one program."""
    learner = make(agent, kind, count, total_steps=256 * updates, **options)
    state, metrics, returns = jax.jit(lambda key: train(learner, updates, key))(jax.random.key(0))
    return Trained(learner, state, on_host(metrics), float(on_host(returns)))


def seeds_with_return(
    target: float, agent: str, kind: str, count: int = 1, /, seeds: int = 8, updates: int = 100, **options: Any
) -> int:
    """How many of `seeds` vmapped seeds reach the mean return `target` in greedy episodes after training."""
    learner = make(agent, kind, count, total_steps=256 * updates, **options)
    of_seeds = jax.vmap(lambda key: train(learner, updates, key)[2])
    # these compute longer than they compile: what the other tests do without pays here
    options = ledger.known_options((("xla_backend_optimization_level", 1),))
    returns = jax.jit(of_seeds, compiler_options=options)(jax.random.split(jax.random.key(0), seeds))
    return int(np.sum(np.abs(on_host(returns) - target) < 1e-6))


def network(agent: str, config: Any) -> team_ppo.Task:
    """The task behind a learner: environment, shapes and the team's networks."""
    env = team_ppo.make_env(config)
    central = agent in ("mappo", "happo") or getattr(config, "algorithm", "") == "mappo"
    shape = team_ppo.team_shape(env, config, central)
    if agent == "happo":
        return happo.make_task(config, env, shape)
    if agent == "hypermarl":
        net = hypermarl.team_network(config, shape, config.arch)
    elif agent in ("ippo", "mappo"):
        net = sharing.team_network(config, shape, env)
    elif agent == "dico":
        net = dico_team(config, shape, config.arch)
    elif agent == "kaleidoscope":
        net = masked_team(config, shape, config.arch)
    else:
        net = team.shared(shape, config.arch, with_id=False)
    return team_ppo.make_task(config, env, shape, net)


def values(agent: str, trained: Trained, obs: Any) -> jax.Array:
    """The trained critic [B, A] on observations [B, A, 2], feed-forward."""
    task = network(agent, trained.learner.config)
    obs = jnp.asarray(obs, jnp.float32)
    weights, _ = task.team.materialise(trained.state.params, trained.state.aux_state, None)
    x = obs.reshape(obs.shape[0], -1) if task.shape.central else obs
    return task.team.critic(weights, (), x[None], jnp.zeros((1, len(obs)), bool))[1][0]
