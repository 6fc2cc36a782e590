"""Separable convolutions: a depthwise one and a structured map of channels, in place of a convolution.

Gray, Crowley and Storkey, "Separable Layers Enable Structured Efficient Linear Substitutions" (2019, arXiv 1906.00859).
The maps are in `jaxstack.nn.structured`. Between the two parts is no nonlinearity: the layer is linear. What is
structured stands in a subtree "structured" of the layer's parameters, which is how `labels` knows it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.learner import Key
from jaxstack.nn import structured
from jaxstack.nn.conv import Conv, conv2d
from jaxstack.nn.conv_forms import Pair
from jaxstack.nn.structured import Shape
from jaxstack.nn.vision.layers import fan_out_normal, torch_uniform

STRUCTURED = "structured"
DEPTHWISE = "depthwise"


def start(kind: str, shapes: Mapping[str, tuple[int, ...]], shape: Shape, kernel: int, key: Key) -> dict[str, Array]:
    """Draw the initial arrays of a map, as released.

    Low-rank and grouped maps are N(0, 2 / fan out) for each factor; acdc's diagonals N(1, 0.01^2), so that it starts
    near a permutation of frequencies; tt and tucker are decomposed from a matrix, and hashed weights drawn, as PyTorch
    starts a convolution: uniform in +-1/sqrt(fan in).

    Args:
        kind: one of `structured.KINDS`.
        shapes: of `structured.param_shapes`.
        shape: channels in and out.
        kernel: entries of the kernel, for hashed-full.
        key: of the layer.
    """
    keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
    if kind in ("tt", "tucker"):
        return structured.factored(kind, torch_uniform(key, shape), shapes)
    if kind == "acdc":
        return {name: 1.0 + 0.01 * jax.random.normal(keys[name], s) for name, s in shapes.items()}
    if kind in ("hashed", "hashed-full"):
        bound = (shape[0] * kernel) ** -0.5
        return {name: jax.random.uniform(keys[name], s, minval=-bound, maxval=bound) for name, s in shapes.items()}
    if kind == "lowrank":  # as PyTorch's kernel [r, C_out], whose fan out is r
        return {"factor": fan_out_normal(key, shapes["factor"][::-1]).T}
    return {name: _grouped_normal(keys[name], s) for name, s in shapes.items()}


def _grouped_normal(key: Key, shape: tuple[int, ...]) -> Array:
    """N(0, 2 / C_out) of maps [C_in, C_out] or [g, C_in / g, C_out / g]: all outputs count."""
    outputs = shape[-1] * (shape[0] if len(shape) == 3 else 1)
    return jax.random.normal(key, shape) * (2.0 / outputs) ** 0.5


class Depthwise(nn.Module):
    """A kernel for each channel."""

    kernel: Pair
    stride: int = 1
    reference_compat: bool = False
    """Start as released, N(0, 2 / (k^2 C)), as if all channels were outputs of one; else N(0, 2 / k^2)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[N, H, W, C] -> [N, H / stride, W / stride, C]."""
        channels, (rows, columns) = x.shape[-1], self.kernel
        outputs = rows * columns * (channels if self.reference_compat else 1)
        init = nn.initializers.normal((2.0 / outputs) ** 0.5)
        kernel = self.param("kernel", init, (rows, columns, 1, channels))
        return conv2d(x, kernel.astype(x.dtype), self.stride, _around(self.kernel), groups=channels)


class Structured(nn.Module):
    """A structured map of channels, or with hashed-full a convolution; hash indices are in the collection "hash"."""

    features: int
    kind: str
    size: float | None = None
    kernel: Pair = (1, 1)
    stride: int = 1
    """Of hashed-full."""
    reference_compat: bool = False

    def shapes(self, c_in: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters. Raises `UserError`."""
        entries = self.kernel[0] * self.kernel[1]
        return structured.param_shapes(self.kind, (c_in, self.features), self.size, entries, self.reference_compat)

    @nn.compact
    def __call__(self, x: Array, between: Callable[[Array], Array] = lambda x: x) -> Array:
        """[N, H, W, C] -> [N, H', W', features]; `between` is applied between the two maps of shuffle."""
        shape, entries = (x.shape[-1], self.features), self.kernel[0] * self.kernel[1]
        shapes = self.shapes(shape[0])
        if self.has_variable("params", next(iter(shapes))):
            params = {name: self.get_variable("params", name) for name in shapes}
        else:  # all at once, as a decomposition gives all cores
            drawn = start(self.kind, shapes, shape, entries, self.make_rng("params"))
            params = {name: self.param(name, lambda _, name=name: drawn[name]) for name in shapes}
        if "theta" in shapes:
            whole = (*self.kernel, *shape) if self.kind == "hashed-full" else shape
            budget = shapes["theta"][0]
            draw = lambda: structured.hash_index(self.make_rng("params"), whole, budget, self.reference_compat)
            params["index"] = self.variable("hash", "index", draw).value
        if self.kind == "shuffle":
            middle = structured.grouped_map(x, params["reduce"])
            middle = between(structured.channel_shuffle(middle, params["reduce"].shape[0]))
            return structured.grouped_map(middle, params["expand"])
        if self.kind != "hashed-full":
            return structured.apply_structured(self.kind, params, x, self.features)
        kernel = structured.hashed_weights(params["theta"], params["index"])
        y = conv2d(x, kernel.astype(x.dtype), self.stride, _around(self.kernel))
        return y + params["bias"] if "bias" in params else y


class SeparableConv(nn.Module):
    """A convolution without bias whose map of channels is structured: the drop-in for `layers.conv`.

    Kernels of one pixel have no depthwise part; they take the stride before the map. shuffle has its depthwise part
    between its two maps, at a quarter of the output's channels; hashed-full has none.
    """

    features: int
    kernel: Pair = (3, 3)
    strides: int = 1
    pointwise: str = "dense"
    """One of `structured.KINDS`."""
    size: float | None = None
    """See `structured.SIZES`; None: the value there."""
    reference_compat: bool = False
    """As released: see `structured.param_shapes`, `structured.hash_index` and `Depthwise`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[N, H, W, C] -> [N, H / strides, W / strides, features]; sizes are rounded up.

        Raises:
            UserError: for a size that makes no map of these channels.
        """
        compat = self.reference_compat
        if self.pointwise == "hashed-full":
            full = (self.features, self.pointwise, self.size, self.kernel, self.strides, compat)
            return Structured(*full, name=STRUCTURED)(x)
        layer = Structured(self.features, self.pointwise, self.size, reference_compat=compat, name=STRUCTURED)
        if self.kernel == (1, 1):
            return layer(x[:, :: self.strides, :: self.strides])
        depthwise = Depthwise(self.kernel, self.strides, compat, name=DEPTHWISE)
        return layer(x, depthwise) if self.pointwise == "shuffle" else layer(depthwise(x))


def _around(kernel: Pair) -> tuple[Pair, Pair]:
    """Zeros on all sides, as PyTorch's `padding=k // 2`."""
    rows, columns = kernel[0] // 2, kernel[1] // 2
    return (rows, rows), (columns, columns)


# Weight decay scaled by the compression ratio


def labels(params: Any, reference_compat: bool = False) -> Any:
    """Tell for each parameter how it decays.

    Args:
        params: of a network with `SeparableConv`.
        reference_compat: as released, where names are searched for letters: the depthwise kernels of shuffle count as
            structured, and biases and the scales of normalisations decay like weights.

    Returns:
        A tree of "structured" (arrays of structured maps), "weights" (other arrays of two or more axes) and "none".
    """

    def label(path: tuple[Any, ...], value: Array) -> str:
        names = [str(entry.key) for entry in path]
        if STRUCTURED in names[:-1]:
            return "structured"
        if reference_compat and names[-2:-1] == [DEPTHWISE]:
            layer = params
            for name in names[:-2]:
                layer = layer[name]
            reduce = layer[STRUCTURED].get("reduce")
            return "structured" if reduce is not None and reduce.ndim == 3 else "weights"
        return "weights" if value.ndim > 1 or reference_compat else "none"

    return jax.tree_util.tree_map_with_path(label, params)


def crs_factors(labels: Any, ratio: Any) -> Any:
    """Factors of the weight decay by label: the compression ratio for "structured", 1 for "weights", else 0."""
    return jax.tree.map(lambda label: {"structured": ratio, "weights": 1.0, "none": 0.0}[label], labels)


def crs_weight_decay(params: Any, labels: Any, ratio: Any, wd: Any) -> Any:
    """Return what compression-ratio-scaled weight decay adds to the gradients.

    A structured map of few numbers stands for a matrix of many; with its decay scaled down by the same ratio the prior
    variance of the matrix stays as it was.

    Args:
        params: any tree of arrays.
        labels: a tree of the same structure, see `labels`.
        ratio: parameters of the whole compressed network over those of the uncompressed one.
        wd: the weight decay of uncompressed networks.

    Returns:
        wd times the factor times each parameter.
    """
    return jax.tree.map(lambda p, factor: (wd * factor) * p, params, crs_factors(labels, ratio))


# Counts


def layer_params(
    shape: Shape, pointwise: str, size: float | None = None, kernel: Pair = (3, 3), reference_compat: bool = False
) -> int:
    """Trained numbers of a `SeparableConv` from and to given channels. Raises `UserError`."""
    entries = math.prod(kernel)
    shapes = structured.param_shapes(pointwise, shape, size, entries, reference_compat)
    total = sum(math.prod(s) for s in shapes.values())
    if entries == 1 or pointwise == "hashed-full":
        return total
    return total + entries * (shape[1] // 4 if pointwise == "shuffle" else shape[0])


def count_params(variables: Any) -> int:
    """Trained numbers of variables {"params": ..., ...}, or of a tree of parameters."""
    params = variables["params"] if isinstance(variables, Mapping) and "params" in variables else variables
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def count_mult_adds(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Count the multiply-adds of a network's convolutions and dense layers, without running it.

    Normalisations, ReLU, pooling and biases are not counted. Structured maps: see `structured.position_mult_adds`.

    Args:
        module: unbound.
        input_shape: of what it is given, [N, H, W, C] or another.
    """
    total = 0

    def seen(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal total
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            total += _mult_adds(context.module, args[0].shape, out.shape if isinstance(out, jax.Array) else ())
        return out

    with nn.intercept_methods(seen):
        jax.eval_shape(lambda key: module.init(key, jnp.zeros(tuple(input_shape))), jax.random.key(0))
    return total


def _mult_adds(module: nn.Module, given: tuple[int, ...], out: tuple[int, ...]) -> int:
    """Of one layer alone."""
    pixels, c_in = math.prod(out[:-1]), given[-1] if given else 0
    if isinstance(module, Conv):
        return math.prod(out) * math.prod(module.kernel_size) * (c_in // module.groups)
    if isinstance(module, Depthwise):
        return math.prod(out) * math.prod(module.kernel)
    if isinstance(module, nn.Dense):
        return math.prod(out) * c_in
    if isinstance(module, Structured):
        shapes, shape = module.shapes(c_in), (c_in, module.features)
        if module.kind == "shuffle":  # its first map is before the stride
            return math.prod(given[:-1]) * math.prod(shapes["reduce"]) + pixels * math.prod(shapes["expand"])
        return pixels * math.prod(module.kernel) * structured.position_mult_adds(module.kind, shapes, shape)
    return 0
