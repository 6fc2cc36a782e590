"""Networks of one agent: a torso (optional convolutions, optional GRU) and an MLP head."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.nn.init import orthogonal
from jaxstack.nn.recurrent import GRU

Activation = Literal["relu", "tanh", "silu", "gelu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}


NARROW = 16
"""Outputs up to which a layer's weight gradient is a product in the other order."""


def product(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """x [B, D] @ kernel [D, n]; serves as `dot_general=` of flax's Dense on inputs of rank 2.

    For a few outputs the weight gradient is computed as (g^T x)^T. XLA would turn that back into x^T g, which is
    several times slower on CPU: a product with few columns runs in one thread.
    """
    return _narrow(x, kernel) if kernel.shape[-1] <= NARROW else x @ kernel


@jax.custom_vjp
def _narrow(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _narrow_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _narrow_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return g @ kernel.T, _turned(g, x, 0)


_narrow.defvjp(_narrow_forward, _narrow_backward)


def _turned(a: Array, b: Array, axis: int) -> Array:
    """The transpose of the product of a and b over `axis` of both, in this order."""
    return jax.lax.optimization_barrier(jax.lax.dot_general(a, b, (((axis,), (axis,)), ((), ())))).T


FEW = 32
"""Rows up to which `FewRows` has its own gradient."""


class FewRows(nn.Module):
    """nn.Dense for inputs [R, D] with few rows and many outputs, such as a hypernetwork's: a row an agent.

    On CPU the gradient to the input is faster as (kernel g^T)^T; that to the bias is written as additions, which can
    join the loops of what uses it. The values are those of nn.Dense.
    """

    features: int
    kernel_init: Callable = nn.initializers.lecun_normal()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = jnp.zeros(self.features, jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return _few_rows(x, kernel, bias) if x.ndim == 2 and len(x) <= FEW else x @ kernel + bias


@jax.custom_vjp
def _few_rows(x: Array, kernel: Array, bias: Array) -> Array:
    return x @ kernel + bias


def _few_rows_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return _few_rows(x, kernel, bias), (x, kernel)


def _few_rows_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, kernel = saved
    return _turned(kernel, g, 1), x.T @ g, functools.reduce(jnp.add, g)


_few_rows.defvjp(_few_rows_forward, _few_rows_backward)


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
        # one row a sample: XLA turns the weight gradients of higher ranks into products of transposed copies
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
                x = act(nn.Conv(self.channels, (size, size), kernel_init=orthogonal(2**0.5))(x))
        if not self.gru:
            return carry, x.reshape(*lead, -1)
        x = x.reshape(math.prod(lead), -1)
        x = act(nn.Dense(self.gru, kernel_init=orthogonal(2**0.5))(x)).reshape(*lead, self.gru)
        return GRU(self.gru)(jnp.asarray(carry), x, first)


def initial_carry(gru: int, *batch: int) -> Array | tuple:
    """Zeros [*batch, gru], or () for feed-forward networks."""
    return jnp.zeros((*batch, gru), jnp.float32) if gru else ()
