"""Two-dimensional convolutions that stay fast on XLA's CPU backend: alone, in loops, over vmapped seeds, in groups.

There XLA takes its fast path only for a plain forward convolution. The gradient by the kernel becomes tens of times
slower inside a loop, a vmap over kernels becomes a grouped convolution, and grouped convolutions have no fast path.
`conv2d` is one form of the trilinear sum

    T(x, w, g) = sum over n, i, j, r, s, c, k of x[n, i S + r D - P, j S + s D - P, c] w[r, s, c, k] g[n, i, j, k]

whose three derivatives are two primitives: `conv_p` (by g, and with the kernel turned by x) and `kernel_p` (by w). Each
is bilinear and its transposes are again the two, so derivatives of every order, forward and reverse, have the fast
form. Vmapping unrolls over kernels. On other backends everything is `jax.lax.conv_general_dilated`.
"""

import functools
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxstack.core import cache
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
    stride, dilation = _pair(stride), _pair(dilation)
    window = Window(size, stride, (1, 1), dilation, pads(x.shape[1:3], size, stride, padding, dilation), groups)
    if min(_out(x.shape[1:3], window)) < 1:
        raise UserError(f"conv2d: images of {x.shape[1]}x{x.shape[2]} are smaller than the kernel")
    return conv_p.bind(x, kernel, window=window)


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


def _pair(value: int | Sequence[int]) -> Pair:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _out(image: Sequence[int], w: Window) -> Pair:
    """Rows and columns of the output."""
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
    stride, dilation = _pair(stride), _pair(dilation)
    return Window(size, stride, (1, 1), dilation, pads(image[1:3], size, stride, padding, dilation), groups)


def multiply_adds(x: Sequence[int], kernel: Sequence[int], window: Window) -> int:
    """Of a convolution of images and a kernel of given shapes: half its floating-point operations."""
    return x[0] * math.prod(_out(x[1:3], window)) * math.prod(kernel)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


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
    height, width = _out(x.shape[1:3], window)
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
    more = x.shape[1] - _out(x.shape[1:3], window)[0] + 1
    return conv_plain(x, kernel, window=window._replace(padding=((above, below + more), columns)))[:, :-more]


def on_all_cores(x: Array, kernel: Array, window: Window) -> bool:
    """Whether `conv_rows` was measured to be faster: few output channels, many rows, work for several cores."""
    more = x.shape[1] - _out(x.shape[1:3], window)[0] + 1
    return (
        cores() > 1
        and window.stride == window.spread == (1, 1)
        and kernel.shape[3] <= ONE_BLOCK
        and 0 < more * MOST_WASTE <= x.shape[1]
        and multiply_adds(x.shape, kernel.shape, window) >= MUCH_WORK
    )


def cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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

FEW_GROUPS = 8
"""So many convolutions one after the other are faster than one of all groups."""
ONE_BLOCK = 64
"""Output channels that one core computes in YNNPACK's convolutions."""
MOST_WASTE = 16
"""Rows of an image for each one that `conv_rows` adds."""
MUCH_WORK = 1 << 22
"""Multiply-adds of a convolution for which it is worth while to wake other cores."""
FEW_ROWS = 1024
"""So many pixels of a batch are faster by a product per group than by one of all groups."""
TUNED: dict[str, str] = {}
"""What was measured to be fastest on this machine, by `signature`; see `jaxstack tune-conv`."""


def machine() -> dict[str, str]:
    """What choices hold for."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"jax": jax.__version__, "backend": jax.default_backend(), "cpu": cpu, "cores": str(os.cpu_count())}


def choices_file() -> Path:
    """Where choices are kept: conv.json beside the folder of compiled programs."""
    return cache.default_dir().parent / "conv.json"


def save_choices(path: Path | None = None) -> Path:
    """Write what was tuned, with what the file held for the same machine. Raises `UserError`."""
    path = path or choices_file()
    load_choices(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "choices": TUNED}, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    return path


def load_choices(path: Path | None = None) -> int:
    """Use the choices of a file, where they are this machine's; what this process tuned stays.

    Returns how many there are. Raises `UserError` for a broken file.
    """
    path = path or choices_file()
    if not path.exists():
        return 0
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        choices, forms = content["choices"], {"conv": CONV_FORMS, "kernel": KERNEL_FORMS}
        if not all(form in forms[name.split()[0]] for name, form in choices.items()):
            raise ValueError("unknown form")
        mine = content["machine"] == machine()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path}: is no file of choices ({e}); remove it") from e
    for name, form in choices.items() if mine else ():
        TUNED.setdefault(name, form)
    return len(choices) if mine else 0


@functools.cache
def _load_once() -> None:
    """The user's own choices, when the first convolution is lowered."""
    if os.environ.get("JAXSTACK_CACHE") != "off":
        load_choices()


def tuned(kind: str, first: Array, second: Array, window: Window) -> str | None:
    """The form that was chosen for these shapes, if any was."""
    _load_once()
    return TUNED.get(signature(kind, first, second, window))


def signature(kind: str, first: Any, second: Any, window: Window) -> str:
    """A name for "conv" (image, kernel) or "kernel" (image, cotangent) of given shapes, as in the file of choices."""
    shapes = "x".join(map(str, first.shape)), "x".join(map(str, second.shape))
    flat = [window.size, window.stride, window.spread, window.dilation, *window.padding]
    return " ".join([kind, *shapes, *(f"{a},{b}" for a, b in flat), str(window.groups), str(first.dtype)])


def conv_cpu(x: Array, kernel: Array, *, window: Window) -> Array:
    """The form that was tuned for these shapes, else the one that was measured to be fast: see docs/performance.md."""
    if form := tuned("conv", x, kernel, window):
        return CONV_FORMS[form](x, kernel, window=window)
    if window.groups > 1 and kernel.shape[2] == 1:
        return conv_depthwise(x, kernel, window=window)
    if 1 < window.groups <= FEW_GROUPS:
        return conv_split(x, kernel, window=window)
    if window.groups > 1 and x.shape[0] * math.prod(_out(x.shape[1:3], window)) <= FEW_ROWS:
        return conv_pack(x, kernel, window=window)
    unpadded = window.spread == (1, 1) and window.padding == ((0, 0), (0, 0))
    if window.groups == 1 and window.size == (1, 1) and (window.stride == (1, 1) or unpadded):
        return conv_point(x, kernel, window=window)
    if window.groups == 1 and on_all_cores(x, kernel, window):
        return conv_rows(x, kernel, window=window)
    return conv_dense(x, kernel, window=window)


def kernel_cpu(x: Array, g: Array, *, window: Window) -> Array:
    """The form that was tuned for these shapes, else the one that was measured to be fast."""
    if form := tuned("kernel", x, g, window):
        return KERNEL_FORMS[form](x, g, window=window)
    if window.groups > 1 and x.shape[3] == window.groups:
        return kernel_depthwise(x, g, window=window)
    return (kernel_pack if window.groups > 1 else kernel_dense)(x, g, window=window)


# Derivatives


def turned(kernel: Array, groups: int) -> Array:
    """The kernel of the transposed convolution: [R, S, C/G, K] -> [R, S, K/G, C], entries in reverse order."""
    r, s, depth, out = kernel.shape
    kernel = kernel[::-1, ::-1].reshape(r, s, depth, groups, out // groups)
    return jnp.transpose(kernel, (0, 1, 4, 3, 2)).reshape(r, s, out // groups, groups * depth)


def backwards(image: Sequence[int], window: Window) -> Window:
    """The window from the output's cotangent to that of an image [H, W]."""
    out, padding = _out(image, window), []
    for i in range(2):
        reach = (window.size[i] - 1) * window.dilation[i]
        before = reach - window.padding[i][0]
        spread_out = (out[i] - 1) * window.stride[i] + 1
        after = (image[i] - 1) * window.spread[i] + 1 + reach - before - spread_out
        padding.append((before, after))
    return window._replace(stride=window.spread, spread=window.stride, padding=(padding[0], padding[1]))


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
    return x.update(shape=(x.shape[0], *_out(x.shape[1:3], window), kernel.shape[3]))


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
