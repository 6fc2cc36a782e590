"""Networks of one agent: a torso (optional convolutions, optional GRU) and an MLP head."""

import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.fast.products import product
from jaxstack.nn.conv import Conv
from jaxstack.nn.init import orthogonal
from jaxstack.nn.recurrent import GRU

Activation = Literal["relu", "tanh", "silu", "gelu", "elu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
}


class MLP(nn.Module):
    """Dense layers with orthogonal weights: gain sqrt(2) inside, `out_gain` at the end; no activation on the last."""

    hidden: tuple[int, ...]
    out: int
    activation: Activation = "tanh"
    out_gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., out]."""
        lead = x.shape[:-1]
        # one row per sample: XLA turns the weight gradients of higher ranks into products of transposed copies
        x = x.reshape(-1, x.shape[-1])
        for width in self.hidden:
            x = ACTIVATIONS[self.activation](nn.Dense(width, kernel_init=orthogonal(2**0.5))(x))
        out = nn.Dense(self.out, kernel_init=orthogonal(self.out_gain), dot_general=product)
        return out(x).reshape(*lead, self.out)


class Torso(nn.Module):
    """What stands before the head. With neither `cnn` nor `gru` it only flattens and has no parameters.

    `cnn`: three convolutions of `channels` (5x5, 3x3, 3x3, same padding) on [H, W, C] observations.
    `gru`: Dense(gru), activation, GRU(gru); 0 for feed-forward.
    """

    obs_ndim: int
    gru: int = 0
    cnn: bool = False
    channels: int = 32
    activation: Activation = "tanh"

    @nn.compact
    def __call__(self, carry: Array | tuple, x: Array, first: Array) -> tuple[Array | tuple, Array]:
        """carry [B, ..., gru] or (), x [T, B, ..., *obs_shape], first [T, B] -> (carry, features [T, B, ..., F])."""
        act = ACTIVATIONS[self.activation]
        lead = x.shape[: x.ndim - self.obs_ndim]
        x = x.astype(jnp.float32)
        if self.cnn:
            x = x.reshape(-1, *x.shape[-self.obs_ndim :])
            for size in (5, 3, 3):
                x = act(Conv(self.channels, (size, size), kernel_init=orthogonal(2**0.5))(x))
        if not self.gru:
            return carry, x.reshape(*lead, -1)
        x = x.reshape(math.prod(lead), -1)
        x = act(nn.Dense(self.gru, kernel_init=orthogonal(2**0.5))(x)).reshape(*lead, self.gru)
        return GRU(self.gru)(jnp.asarray(carry), x, first)


def initial_carry(gru: int, *batch: int) -> Array | tuple:
    """Zeros [*batch, gru], or () for feed-forward networks."""
    return jnp.zeros((*batch, gru), jnp.float32) if gru else ()
