"""ReBRAC (Tarasov et al., 2023): TD3 with behaviour penalties of their own weights in actor and critic.

Target r + gamma (min Q'(s', a') - beta2 |a' - a_next|^2); actor -mean min Q / mean |min Q| + beta1 |pi - a|^2. Critics
have LayerNorm after each ReLU, deeper networks and larger batches than TD3+BC.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxstack.agents import offline, td3
from jaxstack.core.learner import Learner
from jaxstack.nn.ensembles import Critics, Net


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 1e-3
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""
    beta1: float = 0.01
    """Weight of the actor's distance to the data."""
    beta2: float = 0.01
    """Weight of the target action's distance to the data's next action."""
    policy_noise: float = 0.2
    noise_clip: float = 0.5


@dataclass(frozen=True)
class Config(offline.OfflineConfig):
    """ReBRAC; the paper chooses beta1 and beta2 per data set from 0.001 to 0.1."""

    batch_size: int = 1024
    actor_hidden: tuple[int, ...] = (256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = True
    """Normalise the critics' layers after each ReLU."""
    hypers: Hypers = Hypers()


def rebrac(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions."""
    task = offline.make_task(config)
    norm = "after" if config.layer_norm else "none"
    critics = Critics(Net(config.critic_hidden, 1, norm, bias=0.1, last=3e-3), td3.CRITICS)
    actor = Net(config.actor_hidden, task.action_size, bias=0.1, last=1e-3)
    nets = td3.Nets(task, actor, critics, regularised=True)

    def update(s, batch, number, key):
        return td3.update(nets, s, batch, number, td3.draw(nets, key, config.batch_size))

    return offline.make_learner("rebrac", task, lambda key, hypers: td3.init(nets, key, hypers), update, nets.actor)
