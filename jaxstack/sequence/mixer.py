"""What every sequence mixer offers, and what several of them share: checks, initialisers, the causal convolution.

A mixer is a flax module with the field `features` (D, width of input and output) and three methods:

    __call__(x [B, T, D], *, mask=None, state=None) -> (y [B, T, D], state)
    step(x [B, D], state) -> (y [B, D], state)
    init_state(batch) -> state

`init_state` depends on static fields alone: `module.init_state(8)` works on an unbound module, without parameters. It
is what `__call__` starts from when no state is given. A state is a pytree of arrays with the batch axis first, float32
(or wider) whatever the activations; for recurrent mixers its size does not grow with T, attention declares its longest
context as a field. The three agree: a sequence cut into pieces with the state carried, or a prefill followed by `step`,
gives what the whole sequence gives. T = 0 returns an empty y and the state it was given.

mask [B, T] bool: False marks padding, anywhere in the row. A padded token leaves the state as it is, its output is 0,
and what stands in x there is ignored, so ragged batches need no special care: left and right padding give equal
outputs, and after a padded prefill every row can go on with `step`.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError


@runtime_checkable
class Mixer(Protocol):
    """The interface; see the module's docstring."""

    features: int

    def __call__(self, x: Array, *, mask: Array | None = None, state: Any = None) -> tuple[Array, Any]: ...

    def step(self, x: Array, state: Any) -> tuple[Array, Any]: ...

    def init_state(self, batch: int) -> Any: ...


def check_sequence(x: Array, features: int, mask: Array | None = None) -> None:
    """Raise `UserError` unless x is [B, T, features] of a floating type and mask is None or bool [B, T]."""
    if x.ndim != 3 or x.shape[-1] != features:
        raise UserError(f"x has shape {x.shape}: expected [batch, time, {features}]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"x has type {x.dtype}: expected a floating type")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != jnp.bool_):
        raise UserError(f"mask has shape {mask.shape}, type {mask.dtype}: expected bool {x.shape[:2]}")


def check_state(state: Any, expected: Any) -> None:
    """Raise `UserError` unless `state` has the structure and shapes of `expected` (what `init_state` returns)."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise UserError(f"state has structure {jax.tree.structure(state)}: expected {jax.tree.structure(expected)}")
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected)):
        if jnp.shape(leaf) != want.shape:
            name = jax.tree_util.keystr(path)
            raise UserError(f"state{name} has shape {jnp.shape(leaf)}: expected {want.shape}")


def begin(module: Any, x: Array, mask: Array | None, state: Any) -> tuple[Array, Any]:
    """Check the arguments of `__call__` -> (x with 0 at padding, the state to start from)."""
    check_sequence(x, module.features, mask)
    expected = module.init_state(x.shape[0])
    state = expected if state is None else state
    check_state(state, expected)
    return x if mask is None else jnp.where(mask[..., None], x, 0), state


def finish(y: Array, x: Array, mask: Array | None) -> Array:
    """y in x's type, 0 at padding."""
    return (y if mask is None else jnp.where(mask[..., None], y, 0)).astype(x.dtype)


def check_at_least(module: Any, **bounds: int) -> None:
    """Raise `UserError` unless each named field is a whole number of at least its bound."""
    for name, low in bounds.items():
        value = getattr(module, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise UserError(f"{type(module).__name__}.{name}={value!r}: expected a whole number >= {low}")


def compact(x: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Move each row's valid tokens to its front, in order.

    x [B, T, D], mask [B, T] -> (x [B, T, D] with zeros behind the valid tokens, their number [B], places [B, T]);
    `spread(y, places, mask)` undoes it. A causal operation on the compacted row does not see the padding.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)
    count = mask.sum(axis=1)
    valid = jnp.arange(x.shape[1]) < count[:, None]
    moved = jnp.take_along_axis(x, order[:, :, None], axis=1)
    return jnp.where(valid[:, :, None], moved, 0), count, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def spread(y: Array, places: Array, mask: Array) -> Array:
    """Inverse of `compact`: token t of a row gets y at places[t], 0 where the mask is False."""
    return jnp.where(mask[:, :, None], jnp.take_along_axis(y, places[:, :, None], axis=1), 0)


class ShortConv(nn.Module):
    """Causal depthwise convolution over time with a carried window: y_t = bias + sum_j weight[j] x_{t-K+1+j}.

    Parameters: weight [K, features], U(-1/sqrt(K), 1/sqrt(K)); bias [features], zeros. State: the last K-1 inputs
    [B, K-1, features], float32 or wider. Written as K shifted products: the gradient of a grouped convolution is one to
    two orders slower on XLA CPU.
    """

    features: int
    kernel_size: int = 4
    use_bias: bool = True

    def setup(self) -> None:
        if self.kernel_size < 1:
            raise UserError(f"kernel_size={self.kernel_size!r}: expected a whole number >= 1")
        bound = self.kernel_size**-0.5
        init = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        self.weight = self.param("weight", init, (self.kernel_size, self.features))
        self.bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None

    @nn.nowrap
    def init_state(self, batch: int) -> Array:
        return jnp.zeros((batch, self.kernel_size - 1, self.features))

    def __call__(self, x: Array, *, mask: Array | None = None, state: Array | None = None) -> tuple[Array, Array]:
        """x [B, T, features] -> (y [B, T, features] in x's type, window); a padded token is not seen at all."""
        check_sequence(x, self.features, mask)
        window = self.init_state(x.shape[0]) if state is None else state
        check_state(window, self.init_state(x.shape[0]))
        if mask is None:
            return self._convolve(x, window, None)
        packed, count, places = compact(x, mask)
        y, window = self._convolve(packed, window, count)
        return spread(y, places, mask), window

    def step(self, x: Array, state: Array) -> tuple[Array, Array]:
        """x [B, features] -> (y [B, features], window)."""
        y, state = self(x[:, None], state=state)
        return y[:, 0], state

    def _convolve(self, x: Array, window: Array, count: Array | None) -> tuple[Array, Array]:
        length, keep = x.shape[1], self.kernel_size - 1
        padded = jnp.concatenate([window.astype(x.dtype), x], axis=1)
        weight = self.weight.astype(x.dtype)
        y = sum((padded[:, j : j + length] * weight[j] for j in range(self.kernel_size)), start=jnp.zeros((), x.dtype))
        if self.bias is not None:
            y = y + self.bias.astype(x.dtype)
        if count is None:
            last = padded[:, length:]
        else:
            last = jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, keep))(padded, count)
        return y, last.astype(window.dtype)


def convolve(conv: ShortConv | None, z: Array, mask: Array | None, window: Array | None) -> tuple[Array, Array | None]:
    """SiLU of the convolution and its new window, or what came in if there is none."""
    if conv is None:
        return z, window
    z, window = conv(z, mask=mask, state=window)
    return jax.nn.silu(z), window


LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Weights of projections: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as the released layers of most mixers start."""


def delta_init(bounds: tuple[float, float]) -> Callable[..., Array]:
    """Log-uniform in `bounds`, floor 1e-4, stored before the softplus."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        low, high = (math.log(x) for x in bounds)
        delta = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high)), 1e-4)
        return delta + jnp.log(-jnp.expm1(-delta))

    return init
