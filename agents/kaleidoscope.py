"""Kaleidoscope: learnable masks for heterogeneous parameter sharing (Li et al., NeurIPS 2024), here on IPPO.

All agents share one network; agent i sees its weights through soft thresholds of its own,
theta^i = sign(theta) relu(|theta| - sigmoid(s^i)). A bonus keeps the masked weights apart. The paper trains off-policy
(QMIX, MATD3), adapts the bonus to the size of the TD error and resets masks now and then; here the loss is PPO's and
the bonus has a fixed weight.
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
    """Learnable masks over a shared actor; the critic is shared."""

    diversity_coef: float = 10.0
    """Weight of the mean distance between agents' masked weights."""
    start_threshold: float = -5.0
    """First value of s. sigmoid(-5) = 0.007 lies under most weights; a weight below its threshold gets no gradient, so
    sigmoid(-2) = 0.12 would kill the last layer, which starts small."""

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 0, "diversity_coef")
        require(self, "gru", self.gru == 0, "0: masks act on feed-forward actors")


def kaleidoscope_mask(weight: Array, threshold: Array) -> Array:
    """sign(theta) relu(|theta| - sigmoid(s)) for theta [...] and s [A, ...]."""
    return jnp.sign(weight) * jax.nn.relu(jnp.abs(weight) - jax.nn.sigmoid(threshold))


def masked_team(cfg: Config, shape: TeamSpec, arch: Arch) -> TeamNet:
    """Shared weights, one set of thresholds for each agent and weight of the actor."""
    common = team.shared(shape, arch, with_id=False)
    own = team.per_agent_functions(team.modules(shape, arch), shape, arch)
    count = shape.num_agents

    def init(key: Array) -> Any:
        k_net, k_mask = jax.random.split(key)
        params = common.init(k_net)
        leaves, tree = jax.tree.flatten(params["actor_head"])
        keys = jax.random.split(k_mask, len(leaves))
        # agents must start a little apart: equal masks get equal gradients; biases start at 0 and are not masked
        noise = [
            cfg.start_threshold + jax.random.normal(k, (count, *x.shape), jnp.float32) for k, x in zip(keys, leaves)
        ]
        noise = [n if n.ndim > 2 else jnp.zeros((count, 0), jnp.float32) for n in noise]
        return params | {"thresholds": jax.tree.unflatten(tree, noise)}

    def masked(params: Any) -> Any:
        def one(weight: Array, threshold: Array) -> Array:
            if weight.ndim < 2:
                return jnp.broadcast_to(weight, (count, *weight.shape))
            return kaleidoscope_mask(weight, threshold)

        return jax.tree.map(one, params["actor_head"], params["thresholds"])

    def materialise(params: Any, aux_state: Any, obs: Array | None) -> tuple[Any, Any]:
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), params["actor_torso"])
        return {"own_torso": copies, "own_head": masked(params)} | {
            k: v for k, v in params.items() if k != "thresholds"
        }, aux_state

    def actor(w: Any, carry: Any, obs: Array, first: Array) -> tuple[Any, Array]:
        return own["actor"]({"actor_torso": w["own_torso"], "actor_head": w["own_head"]}, carry, obs, first)

    def penalty(params: Any, aux_state: Any) -> Array:
        return -cfg.diversity_coef * mask_diversity(masked(params))

    return TeamNet(
        init=init,
        init_aux_state=lambda: (),
        materialise=materialise,
        actor=actor,
        critic=common.critic,
        log_std=common.log_std,
        carry=common.carry,
        penalty=penalty,
        groups=common.groups,
    )


def mask_diversity(weights: Any) -> Array:
    """Mean L1 distance between agents' weights [A, ...], per weight and pair."""
    leaves = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(weights)]
    flat = jnp.concatenate(leaves, -1)
    count = flat.shape[0]
    # sum over pairs of |x_i - x_j| from the sorted values: no [A, A, P] array
    ranked = jnp.sort(flat, axis=0)
    factors = 2.0 * jnp.arange(count, dtype=jnp.float32) - (count - 1)
    pairs = (ranked * factors[:, None]).sum(0)
    return 2.0 * pairs.mean() / max(count * (count - 1), 1)


def kaleidoscope(config: Config = Config()) -> Learner:
    """Raises `UserError` where config and environment do not fit."""
    env = team_ppo.make_env(config)
    shape = team_ppo.team_shape(env, config, central=False)
    task = team_ppo.make_task(config, env, shape, masked_team(config, shape, config.arch))
    return team_ppo.make_learner("kaleidoscope", task)
