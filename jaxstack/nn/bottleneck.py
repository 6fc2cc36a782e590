"""The conditional entropy bottleneck (Fischer, 2020) as a measure of what is in distribution: encoders of x and of a
second view y, trained in both directions; a marginal of the codes; the rate of an input under both.

An encoder gives the mean and log-variance [B, Z] of a diagonal normal. float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxstack.nn.dynamics import HIGH, LOW, soft_clamp
from jaxstack.nn.ensembles import Net, forward

VIEW = 0.01
"""y = x u elementwise, u in [1 - VIEW, 1 + VIEW]."""
RANGE = (-10.0, 2.0)
"""Of an encoder's log-variance."""
ADAM = optax.adam(1e-3)


class Gaussian(NamedTuple):
    """Diagonal normals."""

    mean: Float[Array, "B Z"]
    logvar: Float[Array, "B Z"]

    def sample_from(self, noise: Array) -> Array:
        """Codes [B, Z] made of standard normal noise."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def log_prob(self, z: Array) -> Array:
        """Log-densities [B] of codes [B, Z]."""
        return log_normal(z, self.mean, self.logvar)


def log_normal(z: Array, mean: Array, logvar: Array) -> Array:
    """Log-density of diagonal normals, summed over the last axis."""
    return -0.5 * (jnp.square(z - mean) * jnp.exp(-logvar) + logvar + np.log(2 * np.pi)).sum(-1)


class Encoders(NamedTuple):
    """Static: e(z|x) and b(z|y), of one architecture."""

    inputs: int
    hidden: tuple[int, ...] = (256, 128, 64)
    codes: int = 8

    @property
    def net(self) -> Net:
        """One encoder."""
        return Net(self.hidden, 2 * self.codes)

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh parameters {"e", "b"}."""
        one = lambda k: self.net.init(k, jnp.zeros((1, self.inputs), jnp.float32))["params"]
        return {name: one(k) for name, k in zip(("e", "b"), jax.random.split(key))}

    def __call__(self, params: Any, x: Float[Array, "B D"]) -> Gaussian:
        """The codes of inputs under one encoder's parameters."""
        mean, logvar = jnp.split(forward(self.net, params, x), 2, axis=-1)
        return Gaussian(mean, soft_clamp(logvar, *RANGE))


def contrast(z: Float[Array, "B Z"], other: Gaussian) -> Float[Array, " B"]:
    """Return log softmax_j(log q(z_i | other_j)) at j = i: -log B where all are equal, 0 where each is its own class.

    I(Z; other) >= its mean + log B. The released code adds log Z instead, which changes no gradient.
    """
    logits = log_normal(z[:, None], other.mean[None], other.logvar[None])
    return jnp.diagonal(jax.nn.log_softmax(logits, axis=1))


def losses(e: Gaussian, b: Gaussian, z_e: Array, z_b: Array, beta: Array | float) -> tuple[Array, Array]:
    """Return the losses of both directions [B]: beta I(X;Z|Y) - I(Y;Z), and the same with the encoders' roles swapped.

    Args:
        e: codes of x.
        b: codes of y.
        z_e: [B, Z] samples of e.
        z_b: [B, Z] samples of b.
        beta: weight of the information that y does not have.
    """
    there = beta * (e.log_prob(z_e) - b.log_prob(z_e)) - contrast(z_e, b)
    back = beta * (b.log_prob(z_b) - e.log_prob(z_b)) - contrast(z_b, e)
    return there, back


def ceb_loss(encoders: Encoders, params: Any, x: Float[Array, "B D"], key: Array, beta: Array | float) -> Array:
    """Mean of both directions' losses, y a noisy view of x."""
    k_view, k_noise = jax.random.split(key)
    y = x * jax.random.uniform(k_view, x.shape, jnp.float32, 1 - VIEW, 1 + VIEW)
    e, b = encoders(params["e"], x), encoders(params["b"], y)
    noise = jax.random.normal(k_noise, (2, len(x), encoders.codes), jnp.float32)
    there, back = losses(e, b, e.sample_from(noise[0]), b.sample_from(noise[1]), beta)
    return there.mean() + back.mean()


def fit_encoders(
    encoders: Encoders,
    params: Any,
    opt_state: Any,
    x: Float[Array, "N D"],
    count: Array | int,
    key: Array,
    *,
    steps: int,
    batch: int = 512,
    beta: Array | float = 0.01,
) -> tuple[Any, Any, Array]:
    """Train encoders by `ADAM` on random rows among the first `count` of x.

    Returns:
        Parameters, the optimiser's state and the losses [steps].
    """

    def loss(params: Any, key: Array) -> Array:
        k_rows, k_loss = jax.random.split(key)
        rows = x[jax.random.randint(k_rows, (batch,), 0, count)]
        return ceb_loss(encoders, params, rows, k_loss, beta)

    return _descend(loss, params, opt_state, key, steps)


def _descend(loss: Callable, params: Any, opt_state: Any, key: Array, steps: int) -> tuple[Any, Any, Array]:
    def step(c: tuple, key: Array) -> tuple[tuple, Array]:
        params, opt_state = c
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, opt_state = ADAM.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, opt_state), values = jax.lax.scan(step, (params, opt_state), jax.random.split(key, steps))
    return params, opt_state, values


class Mixture(NamedTuple):
    """A mixture of C diagonal normals of codes."""

    logits: Float[Array, " C"]
    mean: Float[Array, "C Z"]
    logvar: Float[Array, "C Z"]

    def log_prob(self, z: Float[Array, "B Z"]) -> Float[Array, " B"]:
        """Log-densities of codes."""
        each = log_normal(z[:, None], self.mean, self.logvar)
        return jax.nn.logsumexp(jax.nn.log_softmax(self.logits) + each, axis=-1)


class ReleasedMixture(Mixture):
    """The released code's: the clamped log-variance serves as the standard deviation, and raw weights, cut at 0, are
    not normalised. Deviations begin at 0.026, hence rates in the thousands; a negative one gives NaN."""

    def log_prob(self, z: Float[Array, "B Z"]) -> Float[Array, " B"]:
        scale = soft_clamp(self.logvar, LOW, HIGH)
        square = jnp.square((z[:, None] - self.mean) / scale)
        each = (-0.5 * square - jnp.log(scale) - 0.5 * np.log(2 * np.pi)).sum(-1)
        return jax.nn.logsumexp(each, axis=-1, b=jnp.maximum(self.logits, 0.0))


def standard_normal(codes: int) -> Mixture:
    """N(0, I): the marginal that is not learned."""
    return Mixture(jnp.zeros(1, jnp.float32), jnp.zeros((1, codes), jnp.float32), jnp.zeros((1, codes), jnp.float32))


def first_mixture(z: Float[Array, "N Z"], count: Array | int, key: Array, components: int, released: bool) -> Mixture:
    """Components at random rows among the first `count` of z, with the deviation of all; or the released code's."""
    mean = z[jax.random.randint(key, (components,), 0, count)]
    if released:
        ones = jnp.ones(mean.shape, jnp.float32)
        return ReleasedMixture(jnp.full(components, 1.0 / components, jnp.float32), mean, ones)
    valid = (jnp.arange(len(z)) < count)[:, None]
    centre = jnp.where(valid, z, 0.0).sum(0) / count
    var = jnp.where(valid, jnp.square(z - centre), 0.0).sum(0) / count
    spread = jnp.broadcast_to(jnp.log(jnp.maximum(var, 1e-6)), mean.shape)
    return Mixture(jnp.zeros(components, jnp.float32), mean, spread)


def fit_marginal(
    mixture: Mixture,
    opt_state: Any,
    z: Float[Array, "N Z"],
    count: Array | int,
    key: Array,
    *,
    steps: int,
    batch: int = 512,
) -> tuple[Mixture, Any, Array]:
    """Fit a mixture by maximum likelihood to codes, by `ADAM` on random rows among the first `count` of z.

    Returns:
        The mixture, the optimiser's state and the negative log-likelihoods [steps].
    """

    def loss(m: Mixture, key: Array) -> Array:
        return -m.log_prob(z[jax.random.randint(key, (batch,), 0, count)]).mean()

    return _descend(loss, mixture, opt_state, key, steps)


def rate_of(code: Gaussian, marginal: Mixture) -> Float[Array, " B"]:
    """Return log e(mu|x) - log m(mu) in nats, at the codes' means: high for what is improbable under the marginal."""
    return code.log_prob(code.mean) - marginal.log_prob(code.mean)


def rate(encoders: Encoders, params: Any, marginal: Mixture, x: Float[Array, "B D"]) -> Float[Array, " B"]:
    """The rate of inputs, `params` those of both encoders."""
    return rate_of(encoders(params["e"], x), marginal)
