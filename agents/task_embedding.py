"""Task embeddings of a team: encoders of what agents lived through, one decoder, and the loss that trains them.

Schäfer et al., "Learning Task Embeddings for Teamwork Adaptation in Multi-Agent Reinforcement Learning" (2022,
arXiv 2207.02249), from the paper's abstract and what its released code computes. An encoder q(z | history) is a
recurrent network over transitions x_t = [o_t, a_t, r_t]; its output e = [mu, log variance] is the embedding. The
decoder predicts the team's next observations and rewards from a sample z, the joint observation and the joint action.

    L = c_o MSE(o') + c_r MSE(r) + c_kl KL,    KL = -1/2 sum(1 + log var - mu^2 - var), per transition

Three paradigms: `ind` (an encoder per agent on its own transitions, L averaged over agents), `cen` (one encoder on
joint transitions), `mix` (encoders as in `ind`, L = sum_i w_i L_i with weights w = softmax(g(joint observation))).

Arrays are [T, N, ...]: T steps of N environments; E encoders, A agents. float32.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxstack.core import losses
from jaxstack.core.learner import Key, Metrics
from jaxstack.nn.networks import MLP, Torso

LOWEST_LOG_STD = -4.0
"""Of a probabilistic decoder: outputs that never vary would otherwise earn an unbounded likelihood."""


class Coefs(NamedTuple):
    """Weights of the terms of the loss, numbers or traced scalars."""

    obs: Any = 1.0
    reward: Any = 1.0
    kl: Any = 0.1


class Batch(NamedTuple):
    """What the loss is computed from."""

    embedding: Float[Array, "T N E 2e"]
    """Of the history before each transition (with `leak`: the transition included)."""
    obs: Float[Array, "T N O"]
    """Joint observations: those of all agents side by side."""
    action: Float[Array, "T N K"]
    """Joint actions as networks read them: one-hot where they are discrete."""
    next_obs: Float[Array, "T N O"]
    reward: Float[Array, "T N A"]
    mask: Bool[Array, "T N"]
    """False where the transition ended an episode: such transitions count nothing."""


class Embedder(NamedTuple):
    """Static description of the encoders, the decoder and the mixture's gate."""

    mode: Literal["ind", "cen", "mix"]
    agents: int
    obs: int
    """Numbers in an agent's observation, padding included."""
    action: int
    """Numbers in an agent's action."""
    dim: int = 3
    """e, the numbers in z."""
    hidden: int = 64
    """Width of the encoder's layers: dense, GRU, dense."""
    decoder: tuple[int, ...] = (64, 64)
    mixer: tuple[int, ...] = (64,)
    deterministic: bool = False
    """The encoder outputs z itself: e numbers, no sample, no KL."""
    probabilistic: bool = False
    """The decoder outputs a mean and a log standard deviation for each number; its loss is the Gaussian NLL."""
    obs_sizes: tuple[int, ...] = ()
    """True numbers of each agent's observation; padding is no target. Empty: all."""

    @property
    def encoders(self) -> int:
        """E: one, or one per agent."""
        return 1 if self.mode == "cen" else self.agents

    @property
    def width(self) -> int:
        """Numbers in an embedding."""
        return self.dim if self.deterministic else 2 * self.dim

    @property
    def _torso(self) -> Torso:
        return Torso(1, self.hidden, activation="relu")

    @property
    def _head(self) -> MLP:
        return MLP((self.hidden,), self.width, "relu")

    @property
    def _decoder(self) -> MLP:
        targets = self.agents * (self.obs + 1)
        return MLP(self.decoder, 2 * targets if self.probabilistic else targets, "relu")

    @property
    def _mixer(self) -> MLP:
        return MLP(self.mixer, self.agents, "relu")

    def init(self, key: Key) -> dict[str, Any]:
        """Draw parameters: `encoder` and `head` with a leading axis of encoders, `decoder`, and `mixer` for `mix`."""
        keys = jax.random.split(key, 4)
        joint = self.agents // self.encoders
        x = jnp.zeros((1, 1, joint * (self.obs + self.action + 1)), jnp.float32)

        def encoder(k: Key) -> Any:
            return self._torso.init(k, jnp.zeros((1, self.hidden), jnp.float32), x, jnp.zeros((1, 1), bool))

        state = jnp.zeros((1, self.hidden), jnp.float32)
        out = {
            "encoder": jax.vmap(encoder)(jax.random.split(keys[0], self.encoders)),
            "head": jax.vmap(lambda k: self._head.init(k, state))(jax.random.split(keys[1], self.encoders)),
            "decoder": self._decoder.init(
                keys[2], jnp.zeros((1, self.dim + self.agents * (self.obs + self.action)), jnp.float32)
            ),
        }
        if self.mode == "mix":
            out["mixer"] = self._mixer.init(keys[3], jnp.zeros((1, self.agents * self.obs), jnp.float32))
        return out

    def start(self, envs: int) -> Float[Array, "N E H"]:
        """Zero states of the encoders before the first transition."""
        return jnp.zeros((envs, self.encoders, self.hidden), jnp.float32)

    def encode(
        self, params: Any, state: Float[Array, "N E H"], x: Float[Array, "T N A D"], first: Bool[Array, "T N"]
    ) -> tuple[Float[Array, "N E H"], Float[Array, "T N E W"]]:
        """Read T transitions.

        Args:
            params: From `init`.
            state: Encoders' states before the first of them.
            x: Transitions of each agent: observation, action and reward side by side, D = obs + action + 1.
            first: Where a transition begins an episode; the state is cleared before it is read.

        Returns:
            (states after the last one, embeddings after each: [mu, log variance], or z alone of deterministic ones).
        """
        x = x.reshape(*x.shape[:2], self.encoders, -1)

        def one(torso: Any, head: Any, h: Array, x: Array) -> tuple[Any, Any]:
            h, features = self._torso.apply(torso, h, x, first)  # pyright: ignore[reportAssignmentType]
            return h, self._head.apply(head, features)

        each = jax.vmap(one, in_axes=(0, 0, 1, 2), out_axes=(1, 2))
        return each(params["encoder"], params["head"], state, x)

    def for_agents(self, embedding: Float[Array, "*B E W"]) -> Float[Array, "*B A W"]:
        """Hand embeddings to agents: each its own, or all the one of the joint encoder."""
        return jnp.broadcast_to(embedding, (*embedding.shape[:-2], self.agents, self.width))

    def moments(self, embedding: Float[Array, "*B W"]) -> tuple[Float[Array, "*B e"], Float[Array, "*B e"] | None]:
        """Split an embedding into (mu, log variance), the second None for deterministic encoders."""
        if self.deterministic:
            return embedding, None
        mu, log_var = jnp.split(embedding, 2, axis=-1)
        return mu, log_var

    def decode(
        self, params: Any, z: Float[Array, "*B E e"], obs: Float[Array, "*B O"], action: Float[Array, "*B K"]
    ) -> tuple[Array, Array, Array | None]:
        """Predict the joint transition from each z.

        Args:
            params: From `init`.
            z: Samples of the embeddings.
            obs: Joint observation.
            action: Joint action.

        Returns:
            (next joint observation [..., E, O], rewards [..., E, A], log standard deviations [..., E, O + A] or None).
        """
        given = jnp.concatenate([obs, action], -1)[..., None, :]
        given = jnp.broadcast_to(given, (*z.shape[:-1], given.shape[-1]))
        out = self._decoder.apply(params["decoder"], jnp.concatenate([z, given], -1))
        log_std = None
        if self.probabilistic:
            out, log_std = jnp.split(out, 2, axis=-1)
            log_std = jnp.maximum(log_std, LOWEST_LOG_STD)
        return (*jnp.split(out, [self.agents * self.obs], axis=-1), log_std)

    def weights(self, params: Any, obs: Float[Array, "*B O"]) -> Float[Array, "*B A"]:
        """Mixture weights of the agents' embeddings, from the joint observation."""
        return jax.nn.softmax(self._mixer.apply(params["mixer"], obs), -1)

    def real(self) -> Float[Array, " O"]:
        """Return 1 where an entry of the joint observation is one, 0 where it is padding."""
        sizes = jnp.asarray(self.obs_sizes or (self.obs,) * self.agents)
        return (jnp.arange(self.obs) < sizes[:, None]).reshape(-1).astype(jnp.float32)


def kl_to_standard_normal(mu: Float[Array, "*B e"], log_var: Float[Array, "*B e"]) -> Float[Array, "*B"]:
    """Compute KL(N(mu, var) || N(0, 1)) in nats, summed over the last axis (Kingma & Welling, 2014, appendix B).

    Args:
        mu: Means.
        log_var: Logarithms of the variances.

    Returns:
        -1/2 sum(1 + log var - mu^2 - var).
    """
    return -0.5 * (1.0 + log_var - jnp.square(mu) - jnp.exp(log_var)).sum(-1)


def mixture(weight: Float[Array, "*B E"], each: Float[Array, "*B E"]) -> Float[Array, "*B"]:
    """Average the encoders' losses: sum_i w_i L_i. The gate that gives the weights gets its gradient from it."""
    return (weight * each).sum(-1)


def mate_loss(
    embedder: Embedder,
    params: Any,
    batch: Batch,
    coefs: Coefs,
    key: Key,
    released: bool = False,
) -> tuple[Float[Array, ""], Metrics]:
    """Evaluate the loss of encoders, decoder and gate; gradients reach the encoders through `batch.embedding`.

    Args:
        embedder: Their description.
        params: Their parameters.
        batch: Transitions and embeddings.
        coefs: Weights of the terms.
        key: Of the samples z.
        released: As the paper's released code: the KL summed over the whole batch and the encoders, and for `mix` one
            embedding drawn per transition, so that the gate gets no gradient.

    Returns:
        (loss, metrics): means over the transitions that count.
    """
    k_z, k_mix = jax.random.split(key)
    z, log_var = embedder.moments(batch.embedding)
    kl = jnp.zeros(z.shape[:-1], jnp.float32)
    if log_var is not None:
        kl = kl_to_standard_normal(z, log_var)
        z = z + jnp.exp(0.5 * log_var) * jax.random.normal(k_z, z.shape, jnp.float32)
    obs, reward, log_std = embedder.decode(params, z, batch.obs, batch.action)
    real = embedder.real()
    off = jnp.square(obs - batch.next_obs[..., None, :]) * real
    off_reward = jnp.square(reward - batch.reward[..., None, :])
    if log_std is not None:
        s_obs, s_reward = jnp.split(log_std, [obs.shape[-1]], axis=-1)
        off = (0.5 * off * jnp.exp(-2.0 * s_obs) + s_obs) * real
        off_reward = 0.5 * off_reward * jnp.exp(-2.0 * s_reward) + s_reward
    errors = {"obs": off.sum(-1) / real.sum(), "reward": off_reward.mean(-1)}
    each = coefs.obs * errors["obs"] + coefs.reward * errors["reward"]
    if not released:
        each = each + coefs.kl * kl
    weight = jnp.full_like(each, 1.0 / embedder.encoders)
    metrics: Metrics = {}
    if embedder.mode == "mix":
        weight = embedder.weights(params, batch.obs)
        metrics["train/mixture_entropy"] = -(weight * jnp.log(weight + 1e-12)).sum(-1).mean()
        if released:
            drawn = jax.random.categorical(k_mix, jnp.log(weight + 1e-12))
            weight = jax.nn.one_hot(drawn, embedder.agents, dtype=jnp.float32)
    loss = losses.masked_mean(mixture(weight, each), batch.mask)
    if released:
        loss = loss + coefs.kl * (kl * batch.mask[..., None]).sum()
    mean = lambda x: losses.masked_mean(x, batch.mask[..., None])
    metrics |= {"loss/next_obs": mean(errors["obs"]), "loss/next_reward": mean(errors["reward"]), "loss/kl": mean(kl)}
    return loss, {"loss/embedding": loss} | metrics
