"""Networks of one agent: a torso (optional convolutions, optional GRU) and an MLP head."""

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.entries import read
from jaxstack.core.errors import UserError
from jaxstack.core.registry import Registry
from jaxstack.fast.products import PRODUCTS, Precision
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
    precision: Precision = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., out]."""
        lead = x.shape[:-1]
        # one row per sample: XLA turns the weight gradients of higher ranks into products of transposed copies
        x = x.reshape(-1, x.shape[-1])
        for width in self.hidden:
            x = ACTIVATIONS[self.activation](dense(width, 2**0.5, self.precision)(x))
        out = nn.Dense(self.out, kernel_init=orthogonal(self.out_gain), dot_general=PRODUCTS[self.precision])
        return out(x).reshape(*lead, self.out)


def dense(width: int, gain: float, precision: Precision) -> nn.Dense:
    """A dense layer with orthogonal weights."""
    dot = None if precision == "float32" else PRODUCTS[precision]
    return nn.Dense(width, kernel_init=orthogonal(gain), dot_general=dot)


class CNN(nn.Module):
    """Convolutions with orthogonal weights of gain sqrt(2), "same" padding, an activation after each.

    Layer i has `channels[i]` channels, kernels of `sizes[i]` and strides of `strides[i]`; lists of one entry serve for
    all layers.
    """

    channels: tuple[int, ...] = (32, 32, 32)
    sizes: tuple[int, ...] = (5, 3, 3)
    strides: tuple[int, ...] = (1,)
    activation: Activation = "tanh"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, H, W, C] -> [B, H', W', channels[-1]]."""
        given = {name: getattr(self, name) for name in ("channels", "sizes", "strides")}
        count = max(len(value) for value in given.values())
        for name, value in given.items():
            if len(value) not in (1, count) or not all(isinstance(n, int) and n >= 1 for n in value):
                raise UserError(f"cnn: {name}={value}: expected one whole number >= 1, or {count} of them")
        channels, sizes, strides = (v * (count // len(v)) for v in given.values())
        for width, size, stride in zip(channels, sizes, strides):
            layer = Conv(width, (size, size), stride, kernel_init=orthogonal(2**0.5))
            x = ACTIVATIONS[self.activation](layer(x))
        return x


NETWORKS = Registry("network", {"cnn": "jaxstack.nn.networks:CNN"})
"""What can read observations before the head: flax modules that map [B, *obs_shape] to [B, ...]."""


def make(entry: str, activation: Activation) -> nn.Module:
    """The network of an entry such as `cnn={channels: [16, 32]}` or `module:attribute=64`.

    Raises `UserError` for an unknown name or option, and for what is no flax module.
    """
    where = f"network={entry!r}"
    factory, options = read(NETWORKS, entry, where, but=("parent", "name"))
    if entry.partition("=")[0] == "cnn":
        options = {"activation": activation} | options
    module = factory(**options)
    if not isinstance(module, nn.Module):
        raise UserError(f"{where}: made a {type(module).__name__}, expected a flax.linen.Module")
    return module


def check(entry: str, shape: tuple[int, ...], activation: Activation = "tanh") -> None:
    """Trace a network on observations of `shape`, without running it.

    Raises `UserError` where it does not take them, returns something else than real features [B, ...], or holds
    collections other than parameters, which agents do not carry (BatchNorm's statistics).
    """
    where = f"network={entry!r}"
    module = make(entry, activation)
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    try:
        out, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), x)
    except UserError:
        raise
    except Exception as e:  # whatever a user's module raises
        found = " ".join(str(e).split())[:200]
        raise UserError(f"{where}: fails on a batch of observations {shape}: {type(e).__name__}: {found}") from e
    shapes = getattr(out, "shape", None)
    if shapes is None or len(shapes) < 2 or shapes[0] != 2 or not jnp.issubdtype(out.dtype, jnp.floating):
        raise UserError(f"{where}: returns {out} for {x}, expected real features [batch, ...]")
    if set(variables) - {"params"}:
        raise UserError(f"{where}: found the collections {sorted(variables)}, expected params alone")


class Torso(nn.Module):
    """What stands before the head. With neither `network` nor `gru` it only flattens and has no parameters.

    `network`: entry of what reads observations, see `make`; empty: nothing.
    `gru`: Dense(gru), activation, GRU(gru); 0 for feed-forward.
    """

    obs_ndim: int
    gru: int = 0
    network: str = ""
    activation: Activation = "tanh"
    precision: Precision = "float32"

    @nn.compact
    def __call__(self, carry: Array | tuple, x: Array, first: Array) -> tuple[Array | tuple, Array]:
        """carry [B, ..., gru] or (), x [T, B, ..., *obs_shape], first [T, B] -> (carry, features [T, B, ..., F])."""
        act = ACTIVATIONS[self.activation]
        lead = x.shape[: x.ndim - self.obs_ndim]
        x = x.astype(jnp.float32)
        if self.network:
            network: Any = make(self.network, self.activation)
            if isinstance(network, CNN):  # its parameters are the torso's own, as in runs of before `network`
                nn.share_scope(self, network)
            x = network(x.reshape(-1, *x.shape[-self.obs_ndim :]))
        if not self.gru:
            return carry, x.reshape(*lead, -1)
        x = x.reshape(math.prod(lead), -1)
        x = act(dense(self.gru, 2**0.5, self.precision)(x)).reshape(*lead, self.gru)
        return GRU(self.gru)(jnp.asarray(carry), x, first)


def initial_carry(gru: int, *batch: int) -> Array | tuple:
    """Zeros [*batch, gru], or () for feed-forward networks."""
    return jnp.zeros((*batch, gru), jnp.float32) if gru else ()
