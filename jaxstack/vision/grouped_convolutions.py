"""Grouped convolutions as fast as their work promises: one sum, several lowerings, chosen by measurement.

Gibson, Cano, Turner, Crowley, O'Boyle and Storkey, ASAP 2020 (arXiv 2006.09791): Grouped Spatial Pack Convolution puts
the groups outside, each a small dense convolution over packed channels. Here the same algebra is written as one matrix
product per kernel entry and group (`conv_pack`), beside the ways in which frameworks do it; the forms themselves are in
`jaxstack.nn.conv`, whose `conv2d` uses what was tuned.

    y[n, i, j, g KPG + k] = sum over c < CPG, r, s of
        xpad[n, i S + r D, j S + s D, g CPG + c] w[r, s, c, g KPG + k]
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxstack.core.errors import UserError, unknown
from jaxstack.nn import conv, conv_choice
from jaxstack.nn import conv_forms as forms
from jaxstack.nn.conv_forms import Pair, Window, largest_divisor, window_of
from jaxstack.nn.conv_forms import multiply_adds as multiply_adds
from jaxstack.report.timing import Timing, interleaved


class Tiles(NamedTuple):
    """Block sizes of the spatial pack schedule."""

    oc_bn: int
    """Output channels of a group that are computed together, the vector lanes."""
    ic_bn: int
    """Input channels that are packed together."""
    ow_bn: int
    """Columns of the output that are computed together, as accumulators in registers."""


def gspc_tiles(kpg: int, cpg: int, out_w: int, lanes: int = 16) -> Tiles:
    """Block sizes where nothing was tuned, as released.

    Args:
        kpg: output channels of a group.
        cpg: input channels of a group.
        out_w: columns of the output.
        lanes: float32 numbers in a vector register: 4 (NEON), 8 (AVX2), 16 (AVX-512).
    """
    oc_bn = largest_divisor(kpg, lanes)
    return Tiles(oc_bn, largest_divisor(cpg, oc_bn), largest_divisor(out_w, 31))


def pack_kernel(kernel: Array, groups: int, tiles: Tiles | None = None) -> Array:
    """[R, S, CPG, K] -> [G, KPG/oc_bn, CPG/ic_bn, R, S, ic_bn, oc_bn], in which a tile's lanes lie side by side."""
    r, s, cpg, out = kernel.shape
    kpg = out // groups
    oc, ic, _ = tiles or gspc_tiles(kpg, cpg, 1)
    split = kernel.reshape(r, s, cpg // ic, ic, groups, kpg // oc, oc)
    return jnp.transpose(split, (4, 5, 2, 0, 1, 3, 6))


def unpack_kernel(packed: Array) -> Array:
    """The inverse of `pack_kernel`."""
    g, koc, cic, r, s, ic, oc = packed.shape
    return jnp.transpose(packed, (3, 4, 2, 5, 0, 1, 6)).reshape(r, s, cic * ic, g * koc * oc)


def grouped_conv_pallas(x: Array, kernel: Array, *, window: Window, interpret: bool | None = None) -> Array:
    """The algorithm as a Pallas kernel: a program per image and group, its kernel resident, a product per kernel entry.

    Compiled for GPU and TPU; on a CPU Pallas interprets, which proves the result and says nothing about speed.
    """
    interpret = jax.default_backend() == "cpu" if interpret is None else interpret
    height, width = forms.out_size(x.shape[1:3], window)
    x, w = forms.padded(x, window)
    groups, cpg, kpg = w.groups, kernel.shape[2], kernel.shape[3] // w.groups
    images = jnp.moveaxis(x.reshape(*x.shape[:3], groups, cpg), 3, 1)  # [N, G, H, W, CPG]
    packed = jnp.moveaxis(kernel.reshape(*w.size, cpg, groups, kpg), 3, 0)  # [G, R, S, CPG, KPG]

    def program(x_ref: Any, w_ref: Any, o_ref: Any) -> None:
        total = jnp.zeros((height * width, kpg), jnp.float32)
        for r in range(w.size[0]):
            for s in range(w.size[1]):
                top, left = r * w.dilation[0], s * w.dilation[1]
                end = (top + (height - 1) * w.stride[0] + 1, left + (width - 1) * w.stride[1] + 1)
                seen = jax.lax.slice(x_ref[0, 0], (top, left, 0), (*end, cpg), (*w.stride, 1))
                total += jnp.dot(seen.reshape(-1, cpg), w_ref[0, r, s], preferred_element_type=jnp.float32)
        o_ref[0, 0] = total.reshape(height, width, kpg).astype(o_ref.dtype)

    block = lambda *shape: (1, 1, *shape)
    out = pl.pallas_call(
        program,
        grid=(x.shape[0], groups),
        in_specs=[
            pl.BlockSpec(block(*x.shape[1:3], cpg), lambda n, g: (n, g, 0, 0, 0)),
            pl.BlockSpec((1, *w.size, cpg, kpg), lambda n, g: (g, 0, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec(block(height, width, kpg), lambda n, g: (n, g, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], groups, height, width, kpg), x.dtype),
        interpret=interpret,
    )(images, packed)
    return jnp.moveaxis(out, 1, 3).reshape(x.shape[0], height, width, -1)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {**forms.CONV_FORMS, "pallas": grouped_conv_pallas}
"""Lowerings by name; "auto" is `conv2d`, with what was tuned."""


def grouped_conv(
    x: Array,
    kernel: Array,
    groups: int,
    stride: int | Pair = 1,
    padding: str | int | Sequence[Pair] = 1,
    dilation: int | Pair = 1,
    implementation: str = "auto",
) -> Array:
    """A grouped convolution by a lowering of one's choice.

    Args:
        x: images [N, H, W, C] float.
        kernel: [R, S, C / groups, K].
        groups: divides C and K.
        stride: as `conv2d`'s.
        padding: as `conv2d`'s; a number pads all sides, as PyTorch does.
        dilation: as `conv2d`'s.
        implementation: "auto", or a name in `IMPLEMENTATIONS`, whose derivatives are then JAX's of this very form.

    Raises:
        UserError: for an unknown name, shapes that do not fit, or "depthwise" with more input channels per group.
    """
    if implementation == "auto":
        return conv.conv2d(x, kernel, stride, padding, dilation, groups)
    if implementation not in IMPLEMENTATIONS:
        raise unknown("implementation", implementation, ("auto", *IMPLEMENTATIONS))
    jax.eval_shape(lambda a, b: conv.conv2d(a, b, stride, padding, dilation, groups), x, kernel)  # the checks
    if implementation == "depthwise" and kernel.shape[2] != 1:
        raise UserError(f"implementation='depthwise': expected 1 input channel per group, found {kernel.shape[2]}")
    return IMPLEMENTATIONS[implementation](
        x, kernel, window=window_of(x.shape, kernel.shape, groups, stride, padding, dilation)
    )


class GroupedConv(nn.Module):
    """A layer of `grouped_conv`, as `jaxstack.nn.conv.Conv` with a lowering of one's choice."""

    features: int
    groups: int
    kernel_size: Pair = (3, 3)
    stride: int | Pair = 1
    padding: str | int | Sequence[Pair] = 1
    dilation: int | Pair = 1
    use_bias: bool = False
    implementation: str = "auto"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[N, H, W, C] -> [N, H', W', features]."""
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1] // self.groups, self.features))
        options = (self.groups, self.stride, self.padding, self.dilation, self.implementation)
        x = grouped_conv(x, kernel.astype(x.dtype), *options)
        return x + self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else x


# Tuning


class Case(NamedTuple):
    """A grouped convolution to measure: 3x3, stride 1, padding 1 unless told."""

    batch: int
    side: int
    channels: int
    groups: int
    features: int | None = None
    """Output channels; default: as many."""
    stride: int = 1

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of images and kernel."""
        out = self.features or self.channels
        if self.channels % self.groups or out % self.groups:
            raise UserError(f"groups={self.groups}: expected a divisor of {self.channels} and {out} channels")
        return (self.batch, self.side, self.side, self.channels), (3, 3, self.channels // self.groups, out)

    @property
    def window(self) -> Window:
        return window_of(*self.shapes, self.groups, self.stride, 1)

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the output."""
        image, kernel = self.shapes
        return (image[0], *forms.out_size(image[1:3], self.window), kernel[3])

    def arrays(self, seed: int = 0) -> tuple[Array, Array, Array]:
        """Random images, kernel and cotangent: a constant one would be folded and flatter XLA's gradient."""
        keys = jax.random.split(jax.random.key(seed), 3)
        x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, (*self.shapes, self.out)))
        return x, 0.1 * w, g


def candidates(
    kind: str, first: Sequence[int], second: Sequence[int], window: Window
) -> dict[str, Callable[..., Array]]:
    """Forms of "conv" or "kernel" that these shapes allow."""
    known: dict[str, Callable[..., Array]] = forms.CONV_FORMS if kind == "conv" else forms.KERNEL_FORMS
    depthwise = window.groups > 1 and first[3] == window.groups
    fit = {n: f for n, f in known.items() if n != "depthwise" or depthwise}
    return {n: functools.partial(f, window=window) for n, f in fit.items() if n != "split" or window.groups <= 32}


def sums(case: Case) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...], Window]]:
    """The three sums of a convolution and its gradient: (kind, shapes of both arguments, window)."""
    image, kernel = case.shapes
    turned = (*kernel[:2], kernel[3] // case.groups, image[3])
    return {
        "forward": ("conv", image, kernel, case.window),
        "gradient by the image": ("conv", case.out, turned, forms.backwards(image[1:3], case.window)),
        "gradient by the kernel": ("kernel", image, case.out, case.window),
    }


def tune(case: Case, repeats: int = 3) -> dict[str, dict[str, Timing]]:
    """Time every form of a case's three sums, and let `conv2d` use the fastest from now on in this process.

    Programs that are compiled already keep what they have. Returns the times by sum and form.
    """
    found = {}
    for title, (kind, first, second, window) in sums(case).items():
        keys = jax.random.split(jax.random.key(len(found)))
        a, b = (jax.random.normal(k, s) for k, s in zip(keys, (first, second)))
        times = interleaved(candidates(kind, first, second, window), [(a, b)], repeats)
        conv_choice.TUNED[conv_choice.signature(kind, a, b, window)] = min(times, key=lambda form: times[form].median)
        found[title] = times
    return found


def benchmark_grouped_conv(
    case: Case, implementations: Sequence[str] = ("lax", "auto"), gradient: bool = False, repeats: int = 5
) -> dict[str, Timing]:
    """Times per call of a case by implementation, interleaved: forward, or value and both gradients."""
    x, w, g = case.arrays()

    def function(name: str) -> Callable[..., Any]:
        form = lambda x, w: grouped_conv(x, w, case.groups, case.stride, 1, implementation=name)
        if not gradient:
            return lambda x, w, g: form(x, w)
        return lambda x, w, g: jax.value_and_grad(lambda x, w: (form(x, w) * g).sum(), (0, 1))(x, w)

    return interleaved({n: function(n) for n in implementations}, [(x, w, g), (x + 1.0, w, g)], repeats)
