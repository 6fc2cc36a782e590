"""Forms of the two sums of a convolution: XLA's own, and those that are fast on its CPU backend.

Those by image and kernel have the names conv_..., those by image and cotangent, whose result is the kernel's gradient,
kernel_.... `nn.conv_choice` chooses among them, `nn.conv` makes primitives of them.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxstack.core.errors import UserError

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]


class Window(NamedTuple):
    """How a kernel passes over an image; pairs are (rows, columns)."""

    size: Pair
    """Of the kernel."""
    stride: Pair
    spread: Pair
    """Distance of the image's pixels, for transposed convolutions: between them are zeros."""
    dilation: Pair
    """Distance of the kernel's entries."""
    padding: Pads
    """Zeros before and after; negative ones cut."""
    groups: int


def pads(image: Sequence[int], size: Pair, stride: Pair, padding: str | int | Sequence[Pair], dilation: Pair) -> Pads:
    """Padding of rows and columns as pairs. Raises `UserError` for an unknown name."""
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    if not isinstance(padding, str):
        (a, b), (c, d) = padding
        return (a, b), (c, d)
    if padding not in ("SAME", "VALID"):
        raise UserError(f"padding={padding!r}: expected 'SAME', 'VALID', a number, or ((above, below), (left, right))")
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
    (a, b), (c, d) = lax.padtype_to_pads(tuple(image), reach, stride, padding)
    return (a, b), (c, d)


def pair(value: int | Sequence[int]) -> Pair:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def out_size(image: Sequence[int], w: Window) -> Pair:
    """Rows and columns of the output of images [H, W]."""
    one = lambda i: (
        (((image[i] - 1) * w.spread[i] + 1 + sum(w.padding[i])) - (w.size[i] - 1) * w.dilation[i] - 1) // w.stride[i]
        + 1
    )
    return one(0), one(1)


def window_of(
    image: Sequence[int],
    kernel: Sequence[int],
    groups: int,
    stride: int | Pair = 1,
    padding: str | int | Sequence[Pair] = 1,
    dilation: int | Pair = 1,
) -> Window:
    """The window of images [N, H, W, C] and a kernel [R, S, C/G, K] of given shapes."""
    size = (kernel[0], kernel[1])
    stride, dilation = pair(stride), pair(dilation)
    return Window(size, stride, (1, 1), dilation, pads(image[1:3], size, stride, padding, dilation), groups)


def multiply_adds(x: Sequence[int], kernel: Sequence[int], window: Window) -> int:
    """Of a convolution of images and a kernel of given shapes: half its floating-point operations."""
    return x[0] * math.prod(out_size(x[1:3], window)) * math.prod(kernel)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def turned(kernel: Array, groups: int) -> Array:
    """The kernel of the transposed convolution: [R, S, C/G, K] -> [R, S, K/G, C], entries in reverse order."""
    r, s, depth, out = kernel.shape
    kernel = kernel[::-1, ::-1].reshape(r, s, depth, groups, out // groups)
    return jnp.transpose(kernel, (0, 1, 4, 3, 2)).reshape(r, s, out // groups, groups * depth)


def backwards(image: Sequence[int], window: Window) -> Window:
    """The window from the output's cotangent to that of an image [H, W]."""
    out, padding = out_size(image, window), []
    for i in range(2):
        reach = (window.size[i] - 1) * window.dilation[i]
        before = reach - window.padding[i][0]
        spread_out = (out[i] - 1) * window.stride[i] + 1
        after = (image[i] - 1) * window.spread[i] + 1 + reach - before - spread_out
        padding.append((before, after))
    return window._replace(stride=window.spread, spread=window.stride, padding=(padding[0], padding[1]))


# Forms of the two sums; `*_plain` is XLA's own, the others are for its CPU backend


def conv_plain(x: Array, kernel: Array, *, window: Window) -> Array:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window.stride,
        window.padding,
        lhs_dilation=window.spread,
        rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=window.groups,
    )


def kernel_plain(x: Array, g: Array, *, window: Window) -> Array:
    """XLA's gradient of the convolution by its kernel."""
    groups = window.groups
    shape = (*window.size, x.shape[3] // groups, g.shape[3])
    form = functools.partial(conv_plain, x, window=window)
    (out,) = jax.linear_transpose(form, jax.ShapeDtypeStruct(shape, x.dtype))(g)
    return out


def padded(x: Array, window: Window) -> tuple[Array, Window]:
    """The image with its padding and the zeros between its pixels, and the window that is left."""
    if window.spread == (1, 1) and window.padding == ((0, 0), (0, 0)):
        return x, window
    rows, columns = window.padding
    config = ((0, 0, 0), (*rows, window.spread[0] - 1), (*columns, window.spread[1] - 1), (0, 0, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    return x, window._replace(spread=(1, 1), padding=((0, 0), (0, 0)))


def shifts(x: Array, window: Window) -> list[Array]:
    """For each entry of the kernel, row by row, the pixels [N, H', W', C] that it meets."""
    height, width = out_size(x.shape[1:3], window)
    x, w = padded(x, window)
    found = []
    for r in range(w.size[0]):
        for s in range(w.size[1]):
            top, left = r * w.dilation[0], s * w.dilation[1]
            end = (top + (height - 1) * w.stride[0] + 1, left + (width - 1) * w.stride[1] + 1)
            found.append(lax.slice(x, (0, top, left, 0), (x.shape[0], *end, x.shape[3]), (1, *w.stride, 1)))
    return found


def conv_depthwise(x: Array, kernel: Array, *, window: Window) -> Array:
    """One input channel a group: a sum of products of shifted images, which XLA fuses."""
    many = kernel.shape[3] // window.groups
    taps = kernel.reshape(-1, kernel.shape[3])
    parts = (jnp.repeat(v, many, -1) if many > 1 else v for v in shifts(x, window))
    return functools.reduce(jnp.add, (v * tap for v, tap in zip(parts, taps)))


def kernel_depthwise(x: Array, g: Array, *, window: Window) -> Array:
    many = g.shape[3] // window.groups
    parts = (jnp.repeat(v, many, -1) if many > 1 else v for v in shifts(x, window))
    return jnp.stack([(v * g).sum((0, 1, 2)) for v in parts]).reshape(*window.size, 1, g.shape[3])


def conv_pack(x: Array, kernel: Array, *, window: Window) -> Array:
    """A matrix product per kernel entry and group: spatial pack convolution (Gibson et al., 2020) without tiles."""
    groups = window.groups
    taps = kernel.reshape(-1, kernel.shape[2], groups, kernel.shape[3] // groups)
    split = lambda v: v.reshape(*v.shape[:3], groups, -1)
    one = lambda v, tap: jnp.einsum("nhwgc,cgk->nhwgk", split(v), tap)
    out = functools.reduce(jnp.add, (one(v, tap) for v, tap in zip(shifts(x, window), taps)))
    return out.reshape(*out.shape[:3], -1)


def kernel_pack(x: Array, g: Array, *, window: Window) -> Array:
    """A matrix product per kernel entry and group."""
    groups = window.groups
    depth = x.shape[3] // groups
    if groups == 1:
        flat = g.reshape(-1, g.shape[3])
        taps = [lax.dot(v.reshape(-1, depth).T, flat) for v in shifts(x, window)]
    else:
        split = lambda v: v.reshape(-1, groups, v.shape[3] // groups)
        taps = [jnp.einsum("mgc,mgk->cgk", split(v), split(g)).reshape(depth, -1) for v in shifts(x, window)]
    return jnp.stack(taps).reshape(*window.size, depth, g.shape[3])


def block_diagonal(kernel: Array, groups: int) -> Array:
    """A kernel [R, S, C/G, K] of G groups as one of a dense convolution, [R, S, C, K]."""
    r, s, depth, out = kernel.shape
    mine = jnp.repeat(jnp.eye(groups, dtype=kernel.dtype), out // groups, 1)  # [G, K]
    return (kernel[:, :, None] * mine[:, None, :]).reshape(r, s, groups * depth, out)


def of_blocks(kernel: Array, groups: int) -> Array:
    """The blocks [R, S, C/G, K] on the diagonal of a dense kernel [R, S, C, K]."""
    r, s, depth, out = kernel.shape
    mine = jnp.repeat(jnp.eye(groups, dtype=kernel.dtype), out // groups, 1)
    return (kernel.reshape(r, s, groups, depth // groups, out) * mine[:, None, :]).sum(2)


def conv_dense(x: Array, kernel: Array, *, window: Window) -> Array:
    """All groups in one dense convolution of G times the work, by XLA's fast path."""
    x, w = padded(x, window) if window.spread != (1, 1) else (x, window)
    kernel = block_diagonal(kernel, w.groups) if w.groups > 1 else kernel
    return conv_plain(x, kernel, window=w._replace(groups=1))


def kernel_dense(x: Array, g: Array, *, window: Window) -> Array:
    """One dense convolution with the batch as channels, the cotangent as kernel; the transposes are written out, as
    XLA's fast path wants them. Of groups the blocks on the diagonal are kept."""
    if window.size == (1, 1):
        whole = kernel_pack(x, g, window=window._replace(groups=1))
    else:
        # without a border of its own the image is up to four times as fast, unless the cotangent is larger
        small = all(b <= a for a, b in zip(x.shape[1:3], g.shape[1:3])) and min(map(min, window.padding)) >= 0
        x, w = (x, window) if small and window.spread == (1, 1) else padded(x, window)
        whole = lax.conv_general_dilated(
            jnp.transpose(x, (3, 1, 2, 0)),
            jnp.transpose(g, (1, 2, 0, 3)),
            w.dilation,
            w.padding,
            rhs_dilation=w.stride,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        whole = jnp.transpose(whole[:, : w.size[0], : w.size[1]], (1, 2, 0, 3))
    return of_blocks(whole, window.groups) if window.groups > 1 else whole


def conv_point(x: Array, kernel: Array, *, window: Window) -> Array:
    """A 1x1 kernel as one matrix product; where there is a stride, without padding."""
    if window.stride != (1, 1):
        (x,) = shifts(x, window)
    out = lax.dot(x.reshape(-1, x.shape[3]), kernel[0, 0]).reshape(*x.shape[:3], -1)
    return padded(out, window)[0] if window.stride == (1, 1) else out


def conv_rows(x: Array, kernel: Array, *, window: Window) -> Array:
    """XLA's convolution with more rows than the image has, which are cut off: so it is Eigen's, on all cores.

    What YNNPACK would compute, which XLA prefers for all other convolutions of more than 16 channels, runs on one core
    unless there are several blocks of output channels.
    """
    (above, below), columns = window.padding
    more = x.shape[1] - out_size(x.shape[1:3], window)[0] + 1
    return conv_plain(x, kernel, window=window._replace(padding=((above, below + more), columns)))[:, :-more]


def conv_im2col(x: Array, kernel: Array, *, window: Window) -> Array:
    """One matrix product per group, of all shifts beside each other: R S times the memory of the image."""
    groups, depth = window.groups, kernel.shape[2]
    split = [v.reshape(*v.shape[:3], groups, depth) for v in shifts(x, window)]
    patches = jnp.stack(split, 4)  # [N, H', W', G, R S, C/G]
    taps = kernel.reshape(len(split), depth, groups, -1)
    out = jnp.einsum("nhwgsc,scgk->nhwgk", patches, taps)
    return out.reshape(*out.shape[:3], -1)


def conv_split(x: Array, kernel: Array, *, window: Window) -> Array:
    """A convolution per group, one after the other: what frameworks without grouped kernels do."""
    if window.groups == 1:
        return conv_dense(x, kernel, window=window)
    one = window._replace(groups=1)
    parts = zip(jnp.split(x, window.groups, 3), jnp.split(kernel, window.groups, 3))
    return jnp.concatenate([conv_dense(a, b, window=one) for a, b in parts], 3)


CONV_FORMS = {
    "lax": conv_plain,
    "pack": conv_pack,
    "im2col": conv_im2col,
    "dense": conv_dense,
    "split": conv_split,
    "depthwise": conv_depthwise,
}
KERNEL_FORMS = {"lax": kernel_plain, "pack": kernel_pack, "dense": kernel_dense, "depthwise": kernel_depthwise}
