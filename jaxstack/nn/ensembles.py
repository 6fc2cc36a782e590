"""Networks of off-policy learners: multilayer perceptrons of observations and actions, and ensembles of them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.fast.products import normalise, product
from jaxstack.nn.networks import ACTIVATIONS, Activation

Norm = Literal["none", "before", "after"]
"""Where layers are normalised: before each activation without scale and shift, or after it with both."""


def uniform(limit: float) -> Callable[..., Array]:
    """Return an initialiser that draws from U(-limit, limit)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class Net(nn.Module):
    """Dense layers with an activation between them.

    Weights are drawn from U(+-1/sqrt(inputs)), PyTorch's default. `bias`: constant of the hidden biases instead;
    `last`: limit of the last layer's uniform weights and biases instead (An et al., 2021: 0.1 and 1e-3 or 3e-3).
    """

    hidden: tuple[int, ...]
    out: int
    norm: Norm = "none"
    bias: float | None = None
    last: float | None = None
    activation: Activation = "relu"

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B out"]:
        """x [B, D] -> [B, out]."""
        for i, width in enumerate(self.hidden):
            limit = x.shape[-1] ** -0.5
            bias = uniform(limit) if self.bias is None else nn.initializers.constant(self.bias)
            x = nn.Dense(width, kernel_init=uniform(limit), bias_init=bias)(x)
            if self.norm == "before":
                x = normalise(x)
            x = ACTIVATIONS[self.activation](x)
            if self.norm == "after":
                scale = self.param(f"scale_{i}", nn.initializers.ones_init(), (width,), jnp.float32)
                x = normalise(x) * scale + self.param(f"shift_{i}", nn.initializers.zeros_init(), (width,), jnp.float32)
        limit = x.shape[-1] ** -0.5 if self.last is None else self.last
        return nn.Dense(self.out, kernel_init=uniform(limit), bias_init=uniform(limit), dot_general=product)(x)


def forward(net: Net, params: Any, x: Float[Array, "B D"]) -> Float[Array, "B out"]:
    """Return the outputs [B, out] of a network for x [B, D]."""
    return net.apply({"params": params}, x)  # pyright: ignore[reportReturnType]


class Critics(NamedTuple):
    """An ensemble of critics Q(s, a) of one architecture, evaluated together; parameters have a leading axis [E]."""

    net: Net
    size: int

    def init(self, key: Array, inputs: int) -> Any:
        """Draw the parameters of all members, for so many numbers of an observation and an action."""
        keys = jax.random.split(key, self.size)
        return jax.vmap(lambda k: self.net.init(k, jnp.zeros((1, inputs), jnp.float32))["params"])(keys)

    def __call__(self, params: Any, obs: Float[Array, "B O"], action: Float[Array, "B A"]) -> Float[Array, "E B"]:
        """Return the values [E, B] of observations [B, O] and actions [B, A]."""
        x = jnp.concatenate([obs, action], -1)
        return jax.vmap(lambda p: forward(self.net, p, x))(params)[..., 0]


def action_gradients(
    critics: Critics, params: Any, obs: Float[Array, "B O"], action: Float[Array, "B A"]
) -> Float[Array, "E B A"]:
    """Return dQ_i/da of each member, in batches: no network runs on single samples."""
    one = lambda p, a: forward(critics.net, p, jnp.concatenate([obs, a], -1)).sum()
    return jax.vmap(jax.grad(one, 1), (0, None))(params, action)


def diversity(gradients: Float[Array, "E B A"]) -> Float[Array, ""]:
    """Return the mean over the batch of sum_{i != j} <g_i, g_j> / (E - 1), g_i normalised (An et al., 2021, eq. 9).

    E for members that agree, 0 for orthogonal gradients, at least -E / (E - 1).

    Args:
        gradients: dQ_i/da [E, B, A] of at least two members.
    """
    square = jnp.square(gradients).sum(-1, keepdims=True)
    # a member whose units are all off has no direction; the slope of a norm at zero would be NaN
    some = square > 1e-20
    unit = jnp.where(some, gradients * jax.lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)
    # |sum g|^2 = sum_ij <g_i, g_j>: E products fewer than the matrix of all pairs
    pairs = jnp.square(unit.sum(0)).sum(-1) - jnp.square(unit).sum((0, 2))
    return pairs.mean() / (len(gradients) - 1)


def conservative(
    critics: Critics, params: Any, obs: Float[Array, "B O"], action: Float[Array, "B A"], random: Float[Array, "K B A"]
) -> Float[Array, ""]:
    """Return mean[logsumexp over K random actions of Q_i(s, a_k) - Q_i(s, a)], summed over members (Kumar et al., 2020,
    without the correction by the actions' density).

    Args:
        critics: the ensemble.
        params: its parameters [E, ...].
        obs: observations [B, O].
        action: actions [B, A] of the data.
        random: actions [K, B, A], uniform in the bounds.
    """
    count = len(random)
    flat = critics(params, jnp.tile(obs, (count, 1)), random.reshape(-1, random.shape[-1]))
    others = jax.nn.logsumexp(flat.reshape(critics.size, count, -1), axis=1)
    return (others - critics(params, obs, action)).mean(-1).sum()
