"""Networks of a team of A agents: how parameters are shared, generated or kept apart.

Every scheme gives a `TeamNet` of pure functions, so the training loop does not know which one it trains. Data is
grouped by agent, [T, B, A, ...] (T time, B environments or samples), so per-agent weights meet only their own agent's
samples: one batched product, no N-fold waste.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.fast.products import Precision
from jaxstack.nn.distributions import Actions
from jaxstack.nn.networks import MLP, Activation, Torso, initial_carry


class TeamSpec(NamedTuple):
    """Static sizes of a team's task. `critic_shape` is the critic's input: an observation, or the global state."""

    num_agents: int
    obs_shape: tuple[int, ...]
    critic_shape: tuple[int, ...]
    central: bool
    actions: Actions


class Arch(NamedTuple):
    """Sizes of each agent's networks."""

    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    gru: int = 0
    network: str = ""
    """What reads observations, see `networks.NETWORKS`; empty: they are flattened."""
    precision: Precision = "float32"


class TeamNet(NamedTuple):
    """Pure functions of a team's parameters.

    `materialise` runs once for each parameter value (once per rollout and gradient step): a hypernetwork generates its
    weights there. `aux_state` is state that no gradient touches (running diversity, masks' schedule); most have none.
    """

    init: Callable[[Array], Any]
    init_aux_state: Callable[[], Any]
    materialise: Callable[[Any, Any, Array | None], tuple[Any, Any]]
    """(params, aux_state, obs [T, B, A, ...] of the gradient step or None) -> (weights, aux_state)."""
    actor: Callable[[Any, Any, Array, Array], tuple[Any, Array]]
    """(weights, carry, obs [T, B, A, *obs_shape], first [T, B]) -> (carry, raw [T, B, A, actions.params])."""
    critic: Callable[..., tuple[Any, Array]]
    """(weights, carry, x, first) -> (carry, values [T, B, A]); x [T, B, A, *obs_shape], or [T, B, state] if central.
    With `return_all_states=True` the recurrent states after each step come back [T, B, ...] instead of the last one."""
    log_std: Callable[[Any], Array | None]
    """weights -> [k] or [A, k], None for discrete actions."""
    carry: Callable[[int], tuple[Any, Any]]
    """B -> zero recurrent states (actor's, critic's)."""
    penalty: Callable[[Any, Any], Array]
    """(params, aux_state) -> scalar added to the loss."""
    groups: tuple[int, ...]
    """The parameter group of each agent: 0 for all where they share a network, 0, 1, ... where none do. With several
    groups every leaf of the parameters is [G, ...], and nothing of one group reaches another: see core/groups.py."""
    actor_critic: Callable[[Any, Any, Array, Array], tuple[Array, Array]] | None = None
    """Where actor and critic have one torso: (weights, carry, obs, first) -> (raw, values), the torso run once."""


class Modules(NamedTuple):
    """The flax modules of one agent, actor and critic."""

    actor_torso: Torso
    actor_head: MLP
    critic_torso: Torso
    critic_head: MLP


def modules(shape: TeamSpec, arch: Arch) -> Modules:
    """Actor head with gain 0.01, critic head with gain 1, as is usual for PPO."""
    ndim = len(shape.critic_shape)
    return Modules(
        Torso(len(shape.obs_shape), arch.gru, arch.network, arch.activation, arch.precision),
        MLP(arch.hidden, shape.actions.params, arch.activation, 0.01, arch.precision),
        Torso(ndim, arch.gru, "" if shape.central else arch.network, arch.activation, arch.precision),
        MLP(arch.hidden, 1, arch.activation, 1.0, arch.precision),
    )


def shared(shape: TeamSpec, arch: Arch, with_id: bool, with_obs: bool = True, common_torso: bool = False) -> TeamNet:
    """Full parameter sharing (FuPS); `with_id` appends a one-hot agent id to flat inputs (FuPS+ID).

    `with_obs=False` feeds the id alone ("no state"). `common_torso`: convolutions and GRU serve actor and critic, whose
    inputs must then be the same.
    """
    m = modules(shape, arch)
    count = shape.num_agents
    # a central critic without ids sees the same input for every agent: one evaluation serves all
    single = shape.central and not with_id

    def ids(x: Array, ndim: int) -> Array:
        if not with_id:
            return x
        x = x.reshape(*x.shape[: x.ndim - ndim], -1)
        eye = jnp.broadcast_to(jnp.eye(count, dtype=jnp.float32), (*x.shape[:-1], count))
        return jnp.concatenate([x.astype(jnp.float32), eye], -1) if with_obs else eye

    if with_id:
        m = m._replace(actor_torso=m.actor_torso.clone(obs_ndim=1), critic_torso=m.critic_torso.clone(obs_ndim=1))

    critic_torso = "actor_torso" if common_torso else "critic_torso"

    def actor(w: Any, carry: Any, obs: Array, first: Array) -> tuple[Any, Array]:
        carry, x = m.actor_torso.apply(w["actor_torso"], carry, ids(obs, len(shape.obs_shape)), first)  # pyright: ignore
        return carry, m.actor_head.apply(w["actor_head"], x)  # pyright: ignore[reportReturnType]

    def critic(w: Any, carry: Any, x: Array, first: Array, return_all_states: bool = False) -> tuple[Any, Array]:
        x = critic_input(shape, x, 1 if single else count)
        carry, x = m.critic_torso.apply(w[critic_torso], carry, ids(x, len(shape.critic_shape)), first)  # pyright: ignore
        v = m.critic_head.apply(w["critic_head"], x)[..., 0]  # pyright: ignore
        return states(arch, carry, x, return_all_states), jnp.broadcast_to(v, (*v.shape[:-1], count))

    def actor_critic(w: Any, carry: Any, obs: Array, first: Array) -> tuple[Array, Array]:
        _, x = m.actor_torso.apply(w["actor_torso"], carry, ids(obs, len(shape.obs_shape)), first)  # pyright: ignore
        return m.actor_head.apply(w["actor_head"], x), m.critic_head.apply(w["critic_head"], x)[..., 0]  # pyright: ignore

    def init(key: Array) -> Any:
        params = init_modules(key, m, shape, count if with_id else 0, with_obs, 1 if single else count)
        return {k: v for k, v in params.items() if not (common_torso and k == "critic_torso")}

    return TeamNet(
        init=init,
        init_aux_state=lambda: (),
        materialise=lambda params, aux_state, obs: (params, aux_state),
        actor=actor,
        critic=critic,
        log_std=lambda w: w.get("log_std"),
        carry=lambda b: (initial_carry(arch.gru, b, count), initial_carry(arch.gru, b, 1 if single else count)),
        penalty=lambda params, aux_state: jnp.float32(0),
        groups=(0,) * count,
        actor_critic=actor_critic if common_torso else None,
    )


def separate(shape: TeamSpec, arch: Arch, groups: tuple[int, ...] | None = None) -> TeamNet:
    """A network for each agent (NoPS), or for each group: `groups[i]` is the parameter set of agent i (SePS)."""
    m = modules(shape, arch)
    index = np.arange(shape.num_agents) if groups is None else np.asarray(groups)
    identity = bool((index == np.arange(shape.num_agents)).all())

    def materialise(params: Any, aux_state: Any, obs: Array | None) -> tuple[Any, Any]:
        return (params if identity else jax.tree.map(lambda x: x[index], params)), aux_state

    return TeamNet(
        init=lambda key: jax.vmap(lambda k: init_modules(k, m, shape))(jax.random.split(key, int(index.max()) + 1)),
        init_aux_state=lambda: (),
        materialise=materialise,
        **per_agent_functions(m, shape, arch),
        penalty=lambda params, aux_state: jnp.float32(0),
        groups=tuple(int(g) for g in index),
    )


def per_agent_functions(m: Modules, shape: TeamSpec, arch: Arch) -> dict[str, Any]:
    """actor, critic, log_std and carry of a TeamNet whose weights have a leading agent axis in every leaf."""
    count = shape.num_agents

    def run(torso: Torso, head: MLP, axis: int | None, return_all_states: bool = False) -> Callable:
        def one(wt: Any, wh: Any, carry: Any, x: Array, first: Array) -> tuple[Any, Array]:
            carry, x = torso.apply(wt, carry, x, first)  # pyright: ignore[reportAssignmentType]
            return states(arch, carry, x, return_all_states), head.apply(wh, x)  # pyright: ignore[reportReturnType]

        return jax.vmap(one, in_axes=(0, 0, 1, axis, None), out_axes=(2 if return_all_states else 1, 2))

    act = run(m.actor_torso, m.actor_head, 2)

    def critic(w: Any, carry: Any, x: Array, first: Array, return_all_states: bool = False) -> tuple[Any, Array]:
        value = run(m.critic_torso, m.critic_head, None if shape.central else 2, return_all_states)
        carry, v = value(w["critic_torso"], w["critic_head"], carry, x, first)
        return carry, v[..., 0]

    return dict(
        actor=lambda w, carry, obs, first: act(w["actor_torso"], w["actor_head"], carry, obs, first),
        critic=critic,
        log_std=lambda w: w.get("log_std"),
        carry=lambda b: (initial_carry(arch.gru, b, count), initial_carry(arch.gru, b, count)),
    )


def states(arch: Arch, last: Any, features: Array, return_all_states: bool) -> Any:
    """What a critic returns as its carry: a GRU's features are its states after each step."""
    return features if return_all_states and arch.gru else last


def critic_input(shape: TeamSpec, x: Array, copies: int) -> Array:
    """Give a central state [T, B, G] an agent axis of length `copies`; observations pass through."""
    if not shape.central:
        return x
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], copies, *x.shape[2:]))


def init_modules(
    key: Array, m: Modules, shape: TeamSpec, num_ids: int = 0, with_obs: bool = True, critic_agents: int | None = None
) -> dict[str, Any]:
    """Parameters of one actor and one critic; with `num_ids` inputs are flat and carry a one-hot id.

    `critic_agents` None: no agent axis (the caller vmaps over agents).
    """
    keys = jax.random.split(key, 4)
    lead = (1, 1) if critic_agents is None else (1, 1, 1)

    def dummy(size: tuple[int, ...]) -> Array:
        if not num_ids:
            return jnp.zeros((*lead, *size), jnp.float32)
        return jnp.zeros((*lead, (int(np.prod(size)) if with_obs else 0) + num_ids), jnp.float32)

    out: dict[str, Any] = {}
    for k, (kt, kh), torso, head, size in (
        ("actor", keys[:2], m.actor_torso, m.actor_head, shape.obs_shape),
        ("critic", keys[2:], m.critic_torso, m.critic_head, shape.critic_shape),
    ):
        carry = initial_carry(torso.gru, *lead[1:])
        first = jnp.zeros((1, 1), bool)
        (_, features), params = torso.init_with_output(kt, carry, dummy(size), first)
        out[f"{k}_torso"] = params
        out[f"{k}_head"] = head.init(kh, features)
    if shape.actions.kind == "continuous":
        out["log_std"] = jnp.zeros(shape.actions.params, jnp.float32)
    return out
