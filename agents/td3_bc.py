"""TD3+BC (Fujimoto and Gu, 2021): TD3 on a data set, its actor held near the data by behaviour cloning.

Actor: -alpha mean Q_1(s, pi) / mean |Q_1| + mean (pi - a)^2; alpha = 0 is behaviour cloning.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxstack.agents import offline, td3
from jaxstack.core.learner import Learner
from jaxstack.nn.ensembles import Critics, Net


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""
    alpha: float = 2.5
    """Weight of the value beside behaviour cloning."""
    policy_noise: float = 0.2
    noise_clip: float = 0.5


@dataclass(frozen=True)
class Config(offline.OfflineConfig):
    """TD3+BC; the defaults are the paper's, with a tenth of its updates."""

    layer_norm: bool = False
    """Normalise layers before each ReLU, without scale and shift."""
    hypers: Hypers = Hypers()


def td3_bc(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions."""
    task = offline.make_task(config)
    norm = "before" if config.layer_norm else "none"
    critics = Critics(Net(config.critic_hidden, 1, norm), td3.CRITICS)
    nets = td3.Nets(task, Net(config.actor_hidden, task.action_size, norm), critics)

    def update(s, batch, number, key):
        return td3.update(nets, s, batch, number, td3.draw(nets, key, config.batch_size))

    return offline.make_learner("td3_bc", task, lambda key, hypers: td3.init(nets, key, hypers), update, nets.actor)
