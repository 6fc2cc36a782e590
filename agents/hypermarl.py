"""HyperMARL: adaptive hypernetworks for multi-agent RL (Tessera, Rahman, Storkey & Albrecht, NeurIPS 2025).

One shared hypernetwork maps an agent's embedding to that agent's actor and critic weights; the rest is ordinary IPPO
or MAPPO. Agent i has the embedding e_i, every generated layer l a kernel W and a bias b of its own:

    (H1) linear:   vec(W_l^i) = H_l e_i + c_l                   likewise b_l^i, from a hypernetwork of its own
    (H2) MLP:      h = act(U_l e_i + u_l),  vec(W_l^i) = H_l h + c_l
    (H3) agent i:  x <- act(x W_l^i + b_l^i) on its own samples, no activation at the end
    (H4) gradient: d J / d phi = sum_i (d theta^i / d phi)^T Z^i,  Z^i = E[A d log pi_{theta^i}(a|o) / d theta^i]

In (H4) the first factor, the Jacobian of the generation, depends on e_i alone, and the second on agent i's samples
alone: agents interfere only through the hypernetwork, not through mixed inputs. `coupled_team` is the ablation without
this. The numbers are those of docs/methods/hypermarl.md.

Weights are generated once for a rollout and once for a gradient step. Feed-forward networks are generated whole;
recurrent ones share encoder and GRU and generate the layers after it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.stats import norm

from jaxstack.agents import team_ppo
from jaxstack.agents.team_ppo import PPOConfig
from jaxstack.core.config import require, require_at_least
from jaxstack.core.learner import Learner
from jaxstack.fast.products import PRODUCTS, FewRows, Precision
from jaxstack.nn.init import orthogonal
from jaxstack.nn.networks import ACTIVATIONS, Activation, initial_carry
from jaxstack.nn.team import Arch, Modules, TeamNet, TeamSpec, modules, states


@dataclass(frozen=True)
class Config(PPOConfig):
    """HyperMARL on IPPO or MAPPO."""

    algorithm: Literal["ippo", "mappo"] = "ippo"
    kind: Literal["mlp", "linear"] = "mlp"
    """Hypernetwork: one hidden layer of `hyper_hidden` (each target layer has its own), or linear in the embedding."""
    embedding: Literal["learned", "one_hot"] = "learned"
    embedding_dim: int = 8
    """Ignored for one-hot embeddings, whose size is the number of agents."""
    hyper_hidden: tuple[int, ...] = (64,)
    hyper_activation: Literal["relu", "tanh"] = "relu"
    """Of the hypernetwork's hidden layers; relu as released. Rectified features of different embeddings are positively
    correlated (1 / pi for orthogonal ones), so that agents' weights move together; those of tanh are not. On Dispersion
    this made no difference."""
    share_embedding: bool = True
    """Actor and critic use the same embeddings."""
    condition: Literal["id", "id+obs"] = "id"
    """`id+obs` is the ablation without gradient decoupling: the hypernetwork also sees the observation, so every sample
    has weights of its own (memory grows with batch times weights)."""
    init: Literal["orthogonal", "normalised", "default"] = "orthogonal"
    """orthogonal: the released initialisation; normalised: the same, scaled so that generated weights have the nominal
    gain; default: the ablation, flax's initialisation of a dense layer."""
    hyper_bias: bool = True
    """Biases in the hypernetworks' own layers, as released. A linear hypernetwork on one-hot embeddings without them is
    a network for each agent (NoPS) in disguise; all that then couples agents is the one optimiser: its clip, and
    advantages unless `advantage_norm` is `agent`."""
    level_steps: bool = False
    """Each layer of the hypernetwork reads its input divided by the sum of magnitudes that this input has at first; its
    initial weights are multiplied by it. The network starts as the same function, but a step of Adam then moves a
    generated weight by about the learning rate, whatever the widths, as it does a weight of an ordinary network. As
    released (False) it moves it by the learning rate times that sum, which grows with `hyper_hidden`."""

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "embedding_dim")
        require(self, "hyper_hidden", all(h >= 1 for h in self.hyper_hidden), "layer widths >= 1")
        require(
            self, "hyper_hidden", self.kind == "linear" or bool(self.hyper_hidden), "at least one width for kind=mlp"
        )
        field, expected = ("cnn", "off") if self.cnn else ("network", "mlp")
        require(self, field, not self.reader, f"{expected}: generated networks read flat observations")
        require(self, "condition", self.condition == "id" or self.gru == 0, "'id' for recurrent networks")


class Layer(NamedTuple):
    """A generated layer: kernel [rows, cols] and bias [cols], nominal gain of the kernel."""

    rows: int
    cols: int
    gain: float


class Form(NamedTuple):
    """How layers are generated, the same for all of them."""

    hidden: tuple[int, ...]
    activation: Activation
    init: str
    trunk_gain: float | None
    """Of orthogonal hidden layers; None for flax's initialisation."""
    sums: tuple[float, ...]
    """What the input of each hidden layer, then of the head is divided by, see `input_sums`."""
    use_bias: bool


class HyperLayer(nn.Module):
    """Generates one target layer from embeddings (H1, H2): separate hypernetworks for kernel and bias."""

    layer: Layer
    form: Form

    @nn.compact
    def __call__(self, e: Array) -> tuple[Array, Array]:
        """e [..., d] -> kernel [..., rows, cols], bias [..., cols]."""
        (rows, cols, _), form = self.layer, self.form
        trunk = nn.initializers.lecun_normal() if form.trunk_gain is None else orthogonal(form.trunk_gain)

        def dense(x: Array, width: int, init: Any, total: float, name: str) -> Array:
            scaled = lambda key, shape, dtype=jnp.float32: total * init(key, shape, dtype)
            return FewRows(width, kernel_init=scaled, use_bias=form.use_bias, name=name)(x / total)

        def hidden(name: str) -> Array:
            h = e
            for i, width in enumerate(form.hidden):
                h = ACTIVATIONS[form.activation](dense(h, width, trunk, form.sums[i], f"{name}_trunk_{i}"))
            return h

        hw, hb = hidden("kernel"), hidden("bias")
        if form.init == "default":
            kernel_init = bias_init = nn.initializers.lecun_normal()
        else:
            # parameters are initialised where the embeddings are known, so the scale can be set from them
            scale = 1.0
            if form.init == "normalised":
                scale = 1.0 / jnp.maximum(jnp.linalg.norm(hw, axis=-1).mean(), 1e-6)
            kernel_init, bias_init = _row_orthogonal(self.layer, scale), nn.initializers.zeros_init()
        kernel = dense(hw, rows * cols, kernel_init, form.sums[-1], "kernel_head")
        bias = dense(hb, cols, bias_init, form.sums[-1], "bias_head")
        return kernel.reshape(*kernel.shape[:-1], rows, cols), bias


def _row_orthogonal(layer: Layer, scale: Array | float):
    """Each input unit's row is an independent orthogonal [rows, cols] matrix with the layer's gain."""

    def init(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        one = orthogonal(layer.gain)
        rows = jax.vmap(lambda k: one(k, (layer.rows, layer.cols), dtype))(jax.random.split(key, shape[0]))
        return rows.reshape(shape) * scale

    return init


NORMALS = norm.ppf((np.arange(1000) + 0.5) / 1000)
"""Standard normal numbers of equal probability."""


def input_sums(cfg: Config, inputs: int, count: int, trunk_gain: float | None) -> tuple[float, ...]:
    """Expected sums of magnitudes of what each layer of the hypernetwork reads at first: of an embedding (with
    `id+obs` also `inputs` numbers of size one), then of each hidden layer. Ones without `level_steps`."""
    hidden = cfg.hyper_hidden if cfg.kind == "mlp" else ()
    if not cfg.level_steps:
        return (1.0,) * (len(hidden) + 1)
    seen = inputs if cfg.condition == "id+obs" else 0
    if cfg.embedding == "one_hot":
        width, square, first = count, 1.0, 1.0
    else:  # orthogonal, gain sqrt(2): entries of variance 2 / max(count, d)
        width = cfg.embedding_dim
        square = 2.0 * width / max(count, width)
        first = width * math.sqrt(2.0 / max(count, width)) * float(np.abs(NORMALS).mean())
    width, square, sums = width + seen, square + seen, [first + seen]
    for units in hidden:
        variance = square * (1.0 / width if trunk_gain is None else trunk_gain**2 / max(width, units))
        before = math.sqrt(variance) * NORMALS
        feature = np.tanh(before) if cfg.hyper_activation == "tanh" else np.maximum(before, 0.0)
        sums.append(units * float(np.abs(feature).mean()))
        width, square = units, units * float(np.square(feature).mean())
    return tuple(sums)


class HyperNet(nn.Module):
    """All layers of one target MLP."""

    layers: tuple[Layer, ...]
    form: Form

    @nn.compact
    def __call__(self, e: Array) -> list[tuple[Array, Array]]:
        """e [..., d] -> [(kernel [..., m, n], bias [..., n])] for each target layer."""
        return [HyperLayer(layer, self.form, name=f"layer_{i}")(e) for i, layer in enumerate(self.layers)]


def target_layers(inputs: int, hidden: tuple[int, ...], out: int, out_gain: float) -> tuple[Layer, ...]:
    """Sizes of the generated MLP; gain sqrt(2) inside."""
    sizes = (inputs, *hidden, out)
    gains = [2**0.5] * len(hidden) + [out_gain]
    return tuple(Layer(m, n, g) for m, n, g in zip(sizes[:-1], sizes[1:], gains))


def apply_generated(
    weights: list[tuple[Array, Array]], x: Array, activation: Activation, precision: Precision = "float32"
) -> Array:
    """Run every agent's own MLP on its own samples (H3): x [T, B, A, m] (or [T, B, 1, m], for all) -> [T, B, A, n]."""
    act = ACTIVATIONS[activation]
    count, lead = weights[0][0].shape[0], x.shape[:2]
    # agents first, turned once: a batch of plain matrix products
    x = jnp.moveaxis(jnp.broadcast_to(x, (*lead, count, x.shape[-1])), 2, 0).reshape(count, -1, x.shape[-1])
    for i, (kernel, bias) in enumerate(weights):
        x = jax.vmap(PRODUCTS[precision])(x, kernel) + bias[:, None]
        x = act(x) if i < len(weights) - 1 else x
    return jnp.moveaxis(x.reshape(count, *lead, x.shape[-1]), 0, 2)


def apply_per_sample(weights: list[tuple[Array, Array]], x: Array, activation: Activation) -> Array:
    """The same with weights [T, B, A, m, n] of each sample."""
    act = ACTIVATIONS[activation]
    for i, (kernel, bias) in enumerate(weights):
        x = jnp.einsum("tbam,tbamn->tban", x, kernel) + bias
        x = act(x) if i < len(weights) - 1 else x
    return x


def hyper_team(cfg: Config, shape: TeamSpec, arch: Arch) -> TeamNet:
    """The team network: parameters are embeddings, hypernetworks and (recurrent) the shared torsos. Weights are
    generated once for many samples (H1, H2), and each agent's meet its own samples alone (H3): so the gradient of the
    hypernetwork is a sum over agents of products of two factors (H4)."""
    mods = modules(shape, arch)
    nets = _hypernets(cfg, shape, arch)
    count = shape.num_agents

    def materialise(params: Any, aux_state: Any, obs: Array | None) -> tuple[Any, Any]:
        weights = {k: params[k] for k in ("actor_torso", "critic_torso", "log_std") if k in params}
        read = embeddings(cfg, count, params)
        generated = {k: net.apply(params[k], e) for k, net, e in zip(("actor", "critic"), nets, read)}
        return weights | generated, aux_state

    def actor(w: Any, carry: Any, obs: Array, first: Array) -> tuple[Any, Array]:
        carry, x = mods.actor_torso.apply(w["actor_torso"], carry, obs, first)  # pyright: ignore[reportGeneralTypeIssues]
        return carry, apply_generated(w["actor"], x, arch.activation, arch.precision)

    def critic(w: Any, carry: Any, x: Array, first: Array, return_all_states: bool = False) -> tuple[Any, Array]:
        x = x[:, :, None] if shape.central else x
        carry, x = mods.critic_torso.apply(w["critic_torso"], carry, x, first)  # pyright: ignore[reportGeneralTypeIssues]
        return states(arch, carry, x, return_all_states), apply_generated(
            w["critic"], x, arch.activation, arch.precision
        )[..., 0]

    return _team_net(cfg, shape, arch, materialise, actor, critic)


def _team_net(cfg: Config, shape: TeamSpec, arch: Arch, materialise: Any, actor: Any, critic: Any) -> TeamNet:
    """What both team networks have in common: parameters, carries, one group for all agents."""
    count = shape.num_agents
    return TeamNet(
        init=lambda key: init_params(cfg, shape, modules(shape, arch), _hypernets(cfg, shape, arch), key),
        init_aux_state=lambda: (),
        materialise=materialise,
        actor=actor,
        critic=critic,
        log_std=lambda w: w.get("log_std"),
        carry=lambda b: (initial_carry(arch.gru, b, count), initial_carry(arch.gru, b, 1 if shape.central else count)),
        penalty=lambda params, aux_state: jnp.float32(0),
        groups=(0,) * count,
    )


def embeddings(cfg: Config, count: int, params: Any) -> tuple[Array, Array]:
    """Embeddings [A, d] that the actors' and the critics' hypernetworks read."""
    if cfg.embedding == "one_hot":
        return jnp.eye(count, dtype=jnp.float32), jnp.eye(count, dtype=jnp.float32)
    return params["embedding"], params.get("critic_embedding", params["embedding"])


def init_params(cfg: Config, shape: TeamSpec, mods: Modules, nets: Sequence[HyperNet], key: Array) -> dict[str, Any]:
    """Initial parameters of the team, with decoupling or without."""
    k_emb, k_critic, k_actor_net, k_critic_net, k_torso, k_torso2 = jax.random.split(key, 6)
    count = shape.num_agents
    params: dict[str, Any] = {}
    if cfg.embedding == "learned":
        params["embedding"] = orthogonal(2**0.5)(k_emb, (count, cfg.embedding_dim))
        if not cfg.share_embedding:
            params["critic_embedding"] = orthogonal(2**0.5)(k_critic, (count, cfg.embedding_dim))
    read = embeddings(cfg, count, params)
    if cfg.condition == "id+obs":
        sizes = (int(np.prod(s)) for s in (shape.obs_shape, shape.critic_shape))
        read = [_with_input(e, jnp.zeros((1, 1, count, n), jnp.float32)) for e, n in zip(read, sizes)]
    for name, net, k, e in zip(("actor", "critic"), nets, (k_actor_net, k_critic_net), read):
        params[name] = net.init(k, e)
    params |= _init_torsos(mods, shape, k_torso, k_torso2)
    if shape.actions.kind == "continuous":
        params["log_std"] = jnp.zeros(shape.actions.params, jnp.float32)
    return params


def _hypernets(cfg: Config, shape: TeamSpec, arch: Arch) -> tuple[HyperNet, HyperNet]:
    trunk_gain = 2**0.5 if arch.gru else None  # as released: lecun in feed-forward nets, orthogonal in recurrent ones
    inputs = [arch.gru or int(np.prod(s)) for s in (shape.obs_shape, shape.critic_shape)]
    actor = target_layers(inputs[0], arch.hidden, shape.actions.params, 0.01)
    critic = target_layers(inputs[1], arch.hidden, 1, 1.0)

    def net(layers: tuple[Layer, ...], size: int) -> HyperNet:
        hidden = cfg.hyper_hidden if cfg.kind == "mlp" else ()
        sums = input_sums(cfg, size, shape.num_agents, trunk_gain)
        return HyperNet(layers, Form(hidden, cfg.hyper_activation, cfg.init, trunk_gain, sums, cfg.hyper_bias))

    return net(actor, inputs[0]), net(critic, inputs[1])


def _init_torsos(mods: Modules, shape: TeamSpec, k_actor: Array, k_critic: Array) -> dict[str, Any]:
    out = {}
    for name, torso, size, key in (
        ("actor_torso", mods.actor_torso, shape.obs_shape, k_actor),
        ("critic_torso", mods.critic_torso, shape.critic_shape, k_critic),
    ):
        carry, first = initial_carry(torso.gru, 1, 1), jnp.zeros((1, 1), bool)
        out[name] = torso.init(key, carry, jnp.zeros((1, 1, 1, *size), jnp.float32), first)
    return out


def _with_input(embedding: Array, x: Array) -> Array:
    """[A, d] beside x [T, B, A, D] -> [T, B, A, d + D]."""
    return jnp.concatenate([jnp.broadcast_to(embedding, (*x.shape[:2], *embedding.shape)), x], axis=-1)


def coupled_team(cfg: Config, shape: TeamSpec, arch: Arch) -> TeamNet:
    """The ablation without decoupling, feed-forward: the hypernetwork reads embedding and observation, so every sample
    has weights of its own and the Jacobian of their generation depends on it."""
    mods = modules(shape, arch)
    nets = _hypernets(cfg, shape, arch)
    count = shape.num_agents

    def materialise(params: Any, aux_state: Any, obs: Array | None) -> tuple[Any, Any]:
        # nothing can be generated before the sample is seen
        read = dict(zip(("actor_read", "critic_read"), embeddings(cfg, count, params)))
        return {k: v for k, v in params.items() if "embedding" not in k} | read, aux_state

    def actor(w: Any, carry: Any, obs: Array, first: Array) -> tuple[Any, Array]:
        carry, x = mods.actor_torso.apply(w["actor_torso"], carry, obs, first)  # pyright: ignore[reportGeneralTypeIssues]
        net: Any = nets[0].apply(w["actor"], _with_input(w["actor_read"], x))
        return carry, apply_per_sample(net, x, arch.activation)

    def critic(w: Any, carry: Any, x: Array, first: Array, return_all_states: bool = False) -> tuple[Any, Array]:
        x = x[:, :, None] if shape.central else x
        carry, x = mods.critic_torso.apply(w["critic_torso"], carry, x, first)  # pyright: ignore[reportGeneralTypeIssues]
        carry = states(arch, carry, x, return_all_states)
        x = jnp.broadcast_to(x, (*x.shape[:2], count, x.shape[-1]))
        net: Any = nets[1].apply(w["critic"], _with_input(w["critic_read"], x))
        return carry, apply_per_sample(net, x, arch.activation)[..., 0]

    return _team_net(cfg, shape, arch, materialise, actor, critic)


def team_network(cfg: Config, shape: TeamSpec, arch: Arch) -> TeamNet:
    """The team network of a config, decoupled or the ablation."""
    return (coupled_team if cfg.condition == "id+obs" else hyper_team)(cfg, shape, arch)


def hypermarl(config: Config = Config()) -> Learner:
    """Raises `UserError` where config and environment do not fit."""
    env = team_ppo.make_env(config)
    shape = team_ppo.team_shape(env, config, central=config.algorithm == "mappo")
    team = team_network(config, shape, config.arch)
    return team_ppo.make_learner("hypermarl", team_ppo.make_task(config, env, shape, team))
