"""What the networks for images share: BatchNorm with PyTorch's running variance, its initialisers, masks, counts."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.conv import Conv

Variance = Literal["torch", "flax"]
"""Running variances of BatchNorm: of the unbiased estimate, n / (n - 1) times the batch's variance, as PyTorch's, or of
the biased one, as flax's. What a batch is normalised by is biased in both."""

fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, 2 / (k^2 C_out)) (He et al., 2015)."""
torch_uniform = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
"""PyTorch's default for kernels: uniform in +-1/sqrt(fan in)."""


def torch_bias(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default for biases: uniform in +-1/sqrt(fan in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy, 2015)."""

    variance: Variance = "torch"
    momentum: float = 0.9
    """Share of the old running statistics that is kept: 1 less PyTorch's."""
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[..., C] -> [..., C]; with `train` by the batch's own statistics, whose running averages change."""
        if self.variance not in ("torch", "flax"):
            raise UserError(f"variance={self.variance!r}: expected 'torch' or 'flax'")
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            var = jax.nn.relu(jnp.square(x).mean(axes) - jnp.square(mean))
            if not self.is_initializing():
                count = math.prod(x.shape[:-1])
                unbiased = count / max(count - 1, 1) if self.variance == "torch" else 1.0
                average = lambda old, new: self.momentum * old + (1.0 - self.momentum) * new
                running_mean.value = average(running_mean.value, mean)
                running_var.value = average(running_var.value, unbiased * var)
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return x * factor + (bias - mean * factor)


class GroupNorm(nn.Module):
    """Normalisation by groups of an image's channels (Wu and He, 2018), with the parameters of flax's.

    Pixels are summed for each channel, then channels for each group: sums over few channels at once are slow on CPUs.
    """

    num_groups: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[N, ..., C] -> [N, ..., C]. Raises `UserError` for channels that the groups do not divide."""
        width = x.shape[-1]
        if width % self.num_groups:
            raise UserError(f"num_groups={self.num_groups}: expected a divisor of {width} channels")
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        axes = tuple(range(1, x.ndim - 1))

        def grouped(x: Array) -> Array:
            means = x.mean(axes).reshape(len(x), self.num_groups, -1).mean(-1)
            return jnp.expand_dims(jnp.repeat(means, width // self.num_groups, 1), axes)

        mean = grouped(x)
        var = jax.nn.relu(grouped(jnp.square(x)) - jnp.square(mean))
        return (x - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias


def conv(features: int, size: int = 3, stride: int = 1, **options: Any) -> Conv:
    """A convolution without bias, padded on all sides as PyTorch's `padding=size // 2`."""
    options = dict(use_bias=False, kernel_init=fan_out_normal) | options
    return Conv(features, (size, size), stride, size // 2, **options)


def head(classes: int) -> nn.Dense:
    """The last layer: PyTorch's default kernel, no initial bias."""
    return nn.Dense(classes, kernel_init=torch_uniform)


def masked(h: Array, mask: Array | None) -> Array:
    """Activations [N, H, W, C] times a mask, [C] or a row for each image [N, C]; None leaves them.

    The gradient by a row of ones is the sum over pixels of h dL/dh, which Fisher pruning squares.
    """
    if mask is None:
        return h
    return h * (mask if mask.ndim == 1 else mask[:, None, None, :])


def branch_output(module: nn.Module, h: Array) -> Array:
    """The output of a residual branch, as it is; applied with mutable "branches" it is kept there, and applied with
    "perturbations" those are added, so that the gradient by zeros is the one by the output."""
    if module.is_initializing():
        return h
    h = module.perturb("branch", h)
    module.sow("branches", "branch", h, reduce_fn=lambda old, new: new, init_fn=lambda: jnp.zeros(()))
    return h


def of_blocks(values: Sequence[Any] | None, count: int, what: str) -> Sequence[Any]:
    """`values`, one for each of `count` blocks; None: as many Nones. Raises `UserError` naming `what`."""
    if values is None:
        return [None] * count
    if len(values) != count:
        raise UserError(f"{what}: found {len(values)}, expected {count}, one for each block")
    return values


@jax.custom_jvp
def larger(a: Array, b: Array) -> Array:
    """The elementwise maximum, whose gradient goes to the first of equal ones, as PyTorch's.

    That of `jnp.maximum` goes to whatever equals the result. Where XLA computes an operand again in another kernel,
    with another rounding, none does, and the gradient is lost.
    """
    return jnp.maximum(a, b)


@larger.defjvp
def _larger_jvp(values: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    a, b = values
    return larger(a, b), jnp.where(a >= b, *tangents)


def max_pool(x: Array, size: int = 2, stride: int = 2) -> Array:
    """Maximum over windows, by slices: [N, H, W, C] -> [N, (H - size) // stride + 1, ..., C]."""
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    parts = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    out = parts[0]
    for part in parts[1:]:
        out = larger(out, part)
    return out


def mean_pool(x: Array) -> Array:
    """Means over 2x2 pixels; an odd last row or column is left out, as PyTorch does: [N, H, W, C] -> half of H, W."""
    n, rows, columns, c = x.shape
    x = x[:, : rows // 2 * 2, : columns // 2 * 2]
    return x.reshape(n, rows // 2, 2, columns // 2, 2, c).mean((2, 4))
