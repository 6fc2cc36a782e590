"""EDAC (An et al., 2021): soft actor-critic with N critics, their action gradients kept apart; eta = 0 is SAC-N."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxstack.agents import offline, soft
from jaxstack.core.config import require_at_least
from jaxstack.core.learner import Learner


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""
    eta: float = 1.0
    """Weight of the critics' diversity; 0 is SAC-N."""


@dataclass(frozen=True)
class Config(offline.OfflineConfig):
    """EDAC with ten critics; the paper takes 50 for hopper."""

    num_critics: int = 10
    actor_hidden: tuple[int, ...] = (256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = False
    """Normalise layers before each ReLU, without scale and shift."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "num_critics")


def edac(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions."""
    task = offline.make_task(config)
    norm = "before" if config.layer_norm else "none"
    nets = soft.nets_of(task, config.actor_hidden, config.critic_hidden, config.num_critics, norm)

    def update(s, batch, number, key):
        return soft.update(nets, s, batch, soft.draw(nets, key, config.batch_size))

    return offline.make_learner("edac", task, lambda key, hypers: soft.init(nets, key, hypers), update, nets.actor)
