"""CQL (Kumar et al., 2020): soft actor-critic whose critics are pushed down on the policy's actions and up on the
data's.

The term of each critic is weight (logsumexp_j [Q(s, a_j) - log density of a_j] - Q(s, a)) over K uniform actions, K of
pi(s) and K of pi(s'), all valued at s, as in the authors' code; weight 0 is SAC.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jaxstack.agents import conservative, offline, soft
from jaxstack.agents.offline import Batch, State
from jaxstack.core.config import require_at_least
from jaxstack.core.learner import Key, Learner
from jaxstack.nn.ensembles import Norm


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""
    weight: float = 5.0
    """Of the conservative term; 0 is SAC."""


@dataclass(frozen=True)
class Config(offline.OfflineConfig):
    """CQL(H) with densities; the authors take weights from 5 to 10."""

    num_critics: int = 2
    num_actions: int = 10
    """K: uniform actions, actions of pi(s) and of pi(s') in the conservative term."""
    layer_norm: bool = False
    """Normalise layers before each ReLU, without scale and shift."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "num_critics", "num_actions")


def update(nets: soft.Nets, s: State, batch: Batch, noise: soft.Noise, more: conservative.Noise) -> tuple:
    """One update of soft actor-critic with the conservative term in the critics' loss, its actions from the actor
    before the update."""
    actions, log_density = conservative.candidates(nets, s, batch, more)

    def loss(critic: Any, goal: Array) -> Array:
        apart = conservative.term(nets, critic, batch, actions, log_density)
        return soft.regression(nets, critic, batch, goal) + s.hypers.weight * apart

    return soft.update(nets, s, batch, noise, critic_loss=loss)


def cql(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions."""
    task = offline.make_task(config)
    norm: Norm = "before" if config.layer_norm else "none"
    nets = soft.nets_of(task, config.actor_hidden, config.critic_hidden, config.num_critics, norm)

    def improve(s: State, batch: Batch, number: Array, key: Key) -> tuple:
        k_soft, k_more = jax.random.split(key)
        noise = soft.draw(nets, k_soft, config.batch_size)
        return update(nets, s, batch, noise, conservative.draw(nets, k_more, config.batch_size, config.num_actions))

    return offline.make_learner("cql", task, lambda key, hypers: soft.init(nets, key, hypers), improve, nets.actor)
