"""DiCo: diversity control (Bettini, Kortvelesy & Prorok, ICML 2024) on IPPO.

An agent's policy is a shared network plus its own deviation, scaled so that the team's diversity (SND of the means
or logits) has the wanted value: out^i(o) = shared(o) + (wanted / measured) * deviation^i(o). The measured value is a
running mean over gradient steps; the gradient flows through the step's own term.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.agents import team_ppo
from jaxstack.agents.team_ppo import PPOConfig
from jaxstack.core.config import require, require_at_least
from jaxstack.core.learner import Learner
from jaxstack.nn import team
from jaxstack.nn.team import Arch, TeamNet, TeamSpec


@dataclass(frozen=True)
class Config(PPOConfig):
    """Diversity control on IPPO, feed-forward."""

    diversity: float = 1.0
    """Wanted diversity; 0: homogeneous, -1: unconstrained."""
    tau: float = 0.01
    """Weight of a gradient step in the running measurement."""

    def validate(self) -> None:
        super().validate()
        require(self, "diversity", self.diversity == -1 or self.diversity >= 0, "-1 (unconstrained) or a number >= 0")
        require(self, "tau", 0 < self.tau <= 1, "a number in (0, 1]")
        require_at_least(self, 0, "gru")
        require(self, "gru", self.gru == 0, "0: the deviations are feed-forward")


def mean_distance(x: Array) -> Array:
    """Mean Euclidean distance between agents' outputs [..., A, n] on the same inputs, over pairs and samples."""
    count = x.shape[-2]
    square = jnp.square(x[..., :, None, :] - x[..., None, :, :]).sum(-1)
    # the diagonal is 0, where the root has no gradient
    distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return distance.sum((-1, -2)).mean() / max(count * (count - 1), 1)


def dico_team(cfg: Config, shape: TeamSpec, arch: Arch) -> TeamNet:
    """Shared network, per-agent deviations and the running diversity (the state without gradient)."""
    common = team.shared(shape, arch, with_id=False)
    own = team.separate(shape, arch)
    count = shape.num_agents

    def init(key: Array) -> Any:
        k_common, k_own = jax.random.split(key)
        return {"common": common.init(k_common), "own": own.init(k_own)}

    def deviation(params: Any, obs: Array) -> Array:
        """[T, B * A, A, n]: every agent's deviation on every agent's observations."""
        seen = obs.reshape(obs.shape[0], -1, 1, *shape.obs_shape)
        seen = jnp.broadcast_to(seen, (*seen.shape[:2], count, *shape.obs_shape))
        return own.actor(params["own"], (), seen, jnp.zeros(seen.shape[:2], bool))[1]

    def materialise(params: Any, aux_state: Array, obs: Array | None) -> tuple[Any, Array]:
        if obs is None:
            scale = _scale(cfg, aux_state)
        else:
            measured = mean_distance(deviation(params, obs))
            # the first measurement replaces the start value
            running = jnp.where(aux_state < 0, measured, (1 - cfg.tau) * aux_state + cfg.tau * measured)
            scale = _scale(cfg, running)
            aux_state = jax.lax.stop_gradient(running)
        return params | {"scale": scale}, aux_state

    def actor(w: Any, carry: Any, obs: Array, first: Array) -> tuple[Any, Array]:
        _, base = common.actor(w["common"], carry, obs, first)
        _, dev = own.actor(w["own"], carry, obs, first)
        return carry, base + w["scale"] * dev

    return TeamNet(
        init=init,
        init_aux_state=lambda: jnp.float32(-1.0),
        materialise=materialise,
        actor=actor,
        critic=lambda w, *args, **options: common.critic(w["common"], *args, **options),
        log_std=lambda w: w["common"].get("log_std"),
        carry=common.carry,
        penalty=lambda params, aux_state: jnp.float32(0),
        groups=common.groups,
    )


def _scale(cfg: Config, running: Array) -> Array:
    if cfg.diversity == -1:
        return jnp.float32(1.0)
    if cfg.diversity == 0:
        return jnp.float32(0.0)
    return jnp.where(running < 0, 1.0, cfg.diversity / jnp.maximum(running, 1e-8))


def dico(config: Config = Config()) -> Learner:
    """Raises `UserError` where config and environment do not fit."""
    env = team_ppo.make_env(config)
    shape = team_ppo.team_shape(env, config, central=False)
    return team_ppo.make_learner("dico", team_ppo.make_task(config, env, shape, dico_team(config, shape, config.arch)))
