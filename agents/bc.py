"""Behaviour cloning: a deterministic actor regressed on the actions of a data set, or of its best episodes (%BC)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.agents import offline
from jaxstack.core.config import require
from jaxstack.core.learner import Learner
from jaxstack.data.offline import OfflineData, OfflineDataset
from jaxstack.nn.ensembles import Net, forward


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 3e-4


@dataclass(frozen=True)
class Config(offline.OfflineConfig):
    """Behaviour cloning; the critic's options have no effect."""

    fraction: float = 1.0
    """Share of the episodes, those with the largest returns, that are cloned; 0.1 is 10%BC (Chen et al., 2021)."""
    layer_norm: bool = False
    """Normalise layers before each ReLU, without scale and shift."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require(self, "fraction", 0 < self.fraction <= 1, "a number in (0, 1]")


def best_episodes(data: OfflineDataset, fraction: float) -> OfflineDataset:
    """Return the episodes with the largest undiscounted returns: that share of them, rounded up."""
    returns = data.episode_returns()
    count = int(np.ceil(fraction * len(returns)))
    order = data.episode[np.flatnonzero(data.ends)]
    best = order[np.argsort(-returns, kind="stable")[:count]]
    keep = np.isin(data.episode, best)
    return data._replace(**{k: v[keep] for k, v in data.arrays().items()})


def bc(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions."""
    task = offline.make_task(config)
    net = Net(config.actor_hidden, task.action_size, "before" if config.layer_norm else "none")

    def actor(params, obs):
        return jnp.tanh(forward(net, params, obs))

    def init(key, hypers):
        k_actor, key = jax.random.split(key)
        params = {"actor": net.init(k_actor, jnp.zeros((1, task.obs_size), jnp.float32))["params"]}
        return offline.fresh(task, hypers, params, {}, offline.adam_states(params), key)

    def update(s, batch, number, key):
        loss = lambda params: jnp.square(actor(params, batch.obs) - batch.action).mean()
        value, grads = jax.value_and_grad(loss)(s.params["actor"])
        params, opt_state = offline.descend(s.params, s.opt_state, "actor", grads, s.hypers.lr)
        return s._replace(params=params, opt_state=opt_state), {"loss/actor": value}

    def data(cfg):
        chosen = best_episodes(offline.read(cfg.dataset), cfg.fraction)
        rows = offline.rows_of(task, chosen, cfg.dataset, 0.99)
        return OfflineData(rows.batch, rows.shared, cfg.batch_size)

    return offline.make_learner("bc", task, init, update, actor, data=data)
