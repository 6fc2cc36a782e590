"""Two-dimensional convolutions that stay fast on XLA's CPU backend: alone, in loops, over vmapped seeds, in groups.

There XLA takes its fast path only for a plain forward convolution. The gradient by the kernel becomes tens of times
slower inside a loop, a vmap over kernels becomes a grouped convolution, and grouped convolutions have no fast path.
`conv2d` is one form of the trilinear sum

    T(x, w, g) = sum over n, i, j, r, s, c, k of x[n, i S + r D - P, j S + s D - P, c] w[r, s, c, k] g[n, i, j, k]

whose three derivatives are two primitives: `conv_p` (by g, and with the kernel turned by x) and `kernel_p` (by w). Each
is bilinear and its transposes are again the two, so derivatives of every order, forward and reverse, have the fast
form. Vmapping unrolls over kernels. The forms of the sums are in `nn.conv_forms`, the choice among them on CPUs in
`nn.conv_choice`. On other backends everything is `jax.lax.conv_general_dilated`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.conv_choice import conv_cpu, kernel_cpu
from jaxstack.nn.conv_forms import (
    Pair,
    Window,
    backwards,
    conv_plain,
    kernel_plain,
    out_size,
    pads,
    pair,
    turned,
)


def conv2d(
    x: Array,
    kernel: Array,
    stride: int | Pair = 1,
    padding: str | int | Sequence[Pair] = "SAME",
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Array:
    """Convolve images with a kernel (cross-correlation, as all libraries of the field).

    Args:
        x: images [N, H, W, C] float.
        kernel: [R, S, C / groups, K], the same dtype.
        stride: of the output's pixels, one number or (rows, columns).
        padding: "SAME" or "VALID" as XLA's (with stride 2, SAME pads even sizes behind only), a number for all sides as
            PyTorch's, or ((above, below), (left, right)).
        dilation: distance of the kernel's entries.
        groups: output channels k of group k // (K / groups) read the input channels of that group alone.

    Returns:
        [N, H', W', K].

    Raises:
        UserError: for ranks, channels or groups that do not fit.
    """
    if x.ndim != 4 or kernel.ndim != 4:
        raise UserError(
            f"conv2d: expected x [N, H, W, C] and kernel [R, S, C/groups, K], found {x.shape}, {kernel.shape}"
        )
    if groups < 1 or x.shape[3] % groups or kernel.shape[3] % groups:
        raise UserError(
            f"groups={groups}: expected a divisor of {x.shape[3]} input and {kernel.shape[3]} output channels"
        )
    if kernel.shape[2] * groups != x.shape[3]:
        raise UserError(
            f"conv2d: {x.shape[3]} input channels in {groups} groups need kernels of {x.shape[3] // groups}, "
            f"found {kernel.shape[2]}"
        )
    if x.dtype != kernel.dtype:
        raise UserError(f"conv2d: expected x and kernel of one dtype, found {x.dtype}, {kernel.dtype}")
    size = (kernel.shape[0], kernel.shape[1])
    stride, dilation = pair(stride), pair(dilation)
    window = Window(size, stride, (1, 1), dilation, pads(x.shape[1:3], size, stride, padding, dilation), groups)
    if min(out_size(x.shape[1:3], window)) < 1:
        raise UserError(f"conv2d: images of {x.shape[1]}x{x.shape[2]} are smaller than the kernel")
    return conv_p.bind(x, kernel, window=window)


def _by_image(g: Array, kernel: Array, image: Sequence[int], window: Window) -> Array:
    return conv_p.bind(g, turned(kernel, window.groups), window=backwards(image, window))


def _conv_by_image(g: Array, x: Any, kernel: Array, *, window: Window) -> Array:
    return _by_image(g, kernel, x.aval.shape[1:3], window)


def _conv_by_kernel(g: Array, x: Array, kernel: Any, *, window: Window) -> Array:
    return kernel_p.bind(x, g, window=window)


def _kernel_by_image(w: Array, x: Any, g: Array, *, window: Window) -> Array:
    return _by_image(g, w, x.aval.shape[1:3], window)


def _kernel_by_output(w: Array, x: Array, g: Any, *, window: Window) -> Array:
    return conv_p.bind(x, w, window=window)


def _unrolled(primitive: Primitive, args: Sequence[Any], dims: Sequence[Any], *, window: Window) -> tuple[Array, int]:
    """Batching: one call for each member, as a batch of kernels has no fast form."""
    count = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
    pick = lambda a, d, i: a if d is None else lax.index_in_dim(a, i, d, keepdims=False)
    return jnp.stack(
        [primitive.bind(*(pick(a, d, i) for a, d in zip(args, dims)), window=window) for i in range(count)]
    ), 0


def _batch_conv(args: Sequence[Any], dims: Sequence[Any], *, window: Window) -> tuple[Array, int]:
    x, kernel = args
    if dims[1] is None:  # more images of the same kernel
        x = jnp.moveaxis(x, dims[0], 0)
        out = conv_p.bind(x.reshape(-1, *x.shape[2:]), kernel, window=window)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    if dims[0] is None and window.groups == 1:  # more kernels of the same images
        kernel = jnp.moveaxis(kernel, dims[1], 3)
        members = kernel.shape[3]
        out = conv_p.bind(x, kernel.reshape(*kernel.shape[:3], -1), window=window)
        return out.reshape(*out.shape[:3], members, -1), 3
    return _unrolled(conv_p, args, dims, window=window)


def _shape_conv(x: Any, kernel: Any, *, window: Window) -> Any:
    return x.update(shape=(x.shape[0], *out_size(x.shape[1:3], window), kernel.shape[3]))


def _shape_kernel(x: Any, g: Any, *, window: Window) -> Any:
    return x.update(shape=(*window.size, x.shape[3] // window.groups, g.shape[3]))


def _define(name: str, shape: Any, plain: Any, cpu: Any, transposes: tuple[Any, Any], batch: Any) -> Primitive:
    primitive = Primitive(name)
    primitive.def_abstract_eval(shape)
    primitive.def_impl(lambda *args, window: _compiled(primitive, window)(*args))
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = batch
    return primitive


@functools.cache
def _compiled(primitive: Primitive, window: Window) -> Any:
    """What runs outside of a jitted function."""
    return jax.jit(functools.partial(primitive.bind, window=window))


conv_p = _define("conv2d", _shape_conv, conv_plain, conv_cpu, (_conv_by_image, _conv_by_kernel), _batch_conv)
kernel_p = _define(
    "conv2d_kernel",
    _shape_kernel,
    kernel_plain,
    kernel_cpu,
    (_kernel_by_image, _kernel_by_output),
    lambda args, dims, **kw: _unrolled(kernel_p, args, dims, **kw),
)


class Conv(nn.Module):
    """A convolution layer as flax's `nn.Conv` with NHWC images, on `conv2d`."""

    features: int
    kernel_size: Pair = (3, 3)
    stride: int | Pair = 1
    padding: str | int | Sequence[Pair] = "SAME"
    dilation: int | Pair = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[N, H, W, C] -> [N, H', W', features]."""
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x = conv2d(x, kernel.astype(x.dtype), self.stride, self.padding, self.dilation, self.groups)
        if self.use_bias:
            x += self.param("bias", self.bias_init, (self.features,)).astype(x.dtype)
        return x
