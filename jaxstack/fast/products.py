"""Matrix products with few rows or columns, whose gradients are computed transposed."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

Precision = Literal["float32", "bf16"]
"""Of matrix products; sums, and what is stored, are float32."""

NARROW = 16
"""Outputs up to which a layer's weight gradient is computed transposed."""


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


def half_product(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """x [B, D] @ kernel [D, n] with factors rounded to bfloat16 and sums in float32, in the gradients, too."""
    return _halved(x, kernel)


@jax.custom_vjp
def _halved(x: Array, kernel: Array) -> Array:
    return _half(x, kernel, 1, 0)


def _half(a: Array, b: Array, i: int, j: int) -> Array:
    """The product of a and b over axis i of a and j of b."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


_halved.defvjp(
    lambda x, kernel: (_half(x, kernel, 1, 0), (x, kernel)),
    lambda saved, g: (_half(g, saved[1], 1, 1), _half(saved[0], g, 0, 0)),
)

PRODUCTS: dict[Precision, Callable[..., Array]] = {"float32": product, "bf16": half_product}


FEW = 32
"""Rows up to which `FewRows` has its own gradient."""


class FewRows(nn.Module):
    """nn.Dense for inputs [R, D] with few rows and many outputs, such as a hypernetwork's: one row per agent.

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


def normalise(x: Array, epsilon: float = 1e-5) -> Array:
    """x [..., D] standardised over its last axis, as LayerNorm without scale and shift (Ba et al., 2016).

    Means are products with a column of 1/D, in the gradient too: XLA's sums over a short last axis are several times
    slower on CPU.
    """
    return _normalise(x, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalise(x: Array, epsilon: float) -> Array:
    return _normalise_forward(x, epsilon)[0]


def _normalise_forward(x: Array, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    mean = _mean(x)
    inverse = jax.lax.rsqrt(jnp.maximum(_mean(x * x) - mean * mean, 0.0) + epsilon)
    y = (x - mean) * inverse
    return y, (y, inverse)


def _normalise_backward(epsilon: float, saved: tuple[Array, Array], g: Array) -> tuple[Array]:
    y, inverse = saved
    return ((g - _mean(g) - y * _mean(g * y)) * inverse,)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def _mean(x: Array) -> Array:
    """[..., D] -> [..., 1]."""
    return x @ jnp.full((x.shape[-1], 1), 1.0 / x.shape[-1], x.dtype)
