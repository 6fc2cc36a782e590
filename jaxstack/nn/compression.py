"""Compression of trained networks: weights removed by magnitude, channels with what reads them, int8.

Masks keep an exact number of weights in the whole network; channels go with their coupled producers, norms, depthwise
convolutions and consumers; int8 has a scale per output channel, one per layer for what it reads, and sums in int32.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.conv_forms import Window
from jaxstack.nn.lowering import Choice, apply_by, multiplied
from jaxstack.nn.vision.folding import Folded

MOST = 127
"""The largest int8 that is used, on both sides of zero."""


def exact(share: float) -> Fraction:
    """A share as it is written: 0.9 is nine tenths."""
    return Fraction(str(share))


def kept_count(count: int, sparsity: float) -> int:
    """floor((1 - s) n), for the s that is written: of 1,000 weights at 0.9 it is 100, where floats say 99.

    Raises:
        UserError: for a sparsity outside [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity={sparsity:g}: expected a share in [0, 1)")
    return int((1 - exact(sparsity)) * count)


def weight_count(params: Any) -> int:
    """Weights that can be removed: those of convolutions and dense layers, not biases or norms."""
    return sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)


def masks_of_count(params: Any, count: Any) -> Any:
    """Masks that keep the `count` largest weights by magnitude in the whole network; of equals the first.

    Args:
        params: a tree of arrays.
        count: how many, an int or a traced one.

    Returns:
        A tree of bools, of the shapes of convolutions' and dense layers' kernels; True for what else there is.
    """
    leaves, tree = jax.tree.flatten(params)
    weights = [p for p in leaves if p.ndim > 1]
    flat = jnp.concatenate([jnp.abs(p).reshape(-1) for p in weights])
    order = jnp.argsort(-flat, stable=True)
    kept = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(len(flat)) < count, unique_indices=True)
    parts = iter(jnp.split(kept, np.cumsum([p.size for p in weights])[:-1]))
    return jax.tree.unflatten(tree, [next(parts).reshape(p.shape) if p.ndim > 1 else jnp.array(True) for p in leaves])


def magnitude_masks(params: Any, sparsity: float) -> Any:
    """Masks that keep floor((1 - sparsity) n) of the n weights, the largest by magnitude in the whole network.

    Args:
        params: a tree of arrays.
        sparsity: share in [0, 1) that is removed.

    Returns:
        As `masks_of_count`.

    Raises:
        UserError: for a sparsity outside [0, 1).
    """
    return masks_of_count(params, kept_count(weight_count(params), sparsity))


def apply_masks(params: Any, masks: Any) -> Any:
    """Parameters whose masked weights are exact zeros."""
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros((), p.dtype)), params, masks)


def gradual_sparsity(step: Any, steps: Any, final: Any) -> Any:
    """s_t = s_f (1 - (1 - t / T)^3) up to step T, then s_f (Zhu and Gupta, 2017); numbers or arrays."""
    left = 1.0 - jnp.clip(jnp.asarray(step) / steps, 0.0, 1.0)
    return final * (1.0 - left**3)


# Channels


def channels_kept(count: int, share: float) -> int:
    """Channels that stay of `count` when so large a share goes, rounded up: at least one.

    Raises:
        UserError: for a share outside [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise UserError(f"channels: found a share of {share:g}, expected one in [0, 1)")
    return count - int(exact(share) * count)


def channel_prune(network: Any, variables: Mapping[str, Any], share: float) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Remove a share of the channels of each space, those of the least absolute weights (Li et al., 2017).

    A channel's worth is the L1 norm of the filters that give it, summed over the producers of its space, whatever else
    is removed; with it go its entries in norms and depthwise convolutions, and the weights that read it.

    Args:
        network: with `spaces`, as those of `jaxstack.nn.vision.small`.
        variables: {"params": ..., "batch_stats": ...}.
        share: in [0, 1).

    Returns:
        (widths of the smaller network, its variables).

    Raises:
        UserError: for a share outside [0, 1), or a network without spaces.
    """
    if not hasattr(network, "spaces"):
        raise UserError(f"channels: {type(network).__name__} does not say which are coupled, expected a small network")
    params = {k: dict(v) for k, v in variables["params"].items()}
    stats = {k: dict(v) for k, v in variables["batch_stats"].items()}
    widths = []
    for space in network.spaces():
        filters = [np.asarray(variables["params"][name]["kernel"]) for name in space.producers]
        worth = np.sum([np.abs(f).sum((0, 1, 2)) for f in filters], 0)
        count = channels_kept(len(worth), share)
        kept = np.sort(np.argsort(-worth, kind="stable")[:count])
        widths.append(count)
        for name in (*space.producers, *space.followers):
            for tree in (params, stats):
                if name in tree:
                    tree[name] = {k: v[..., kept] for k, v in tree[name].items()}
        for name in space.consumers:  # [R, S, C, K] or [C, K]
            params[name]["kernel"] = params[name]["kernel"][..., kept, :]
    return tuple(widths), {"params": params, "batch_stats": stats}


# int8


class Quantised(NamedTuple):
    """What int8 inference needs beside the folded variables, whose kernels it replaces."""

    kernels: dict[str, Array]
    """int8, by the name of the layer."""
    scales: dict[str, Array]
    """Of each output channel [K]."""
    inputs: dict[str, Array]
    """Of what each layer reads."""


def int8_kernel(kernel: Array) -> tuple[Array, Array]:
    """A kernel [..., K] as int8 and a scale per output channel [K]: q = round(w / s), s = max |w| / 127.

    A channel of zeros has scale 1.
    """
    most = jnp.abs(kernel).max(tuple(range(kernel.ndim - 1)))
    scale = jnp.where(most > 0, most / MOST, 1.0)
    return jnp.clip(jnp.round(kernel / scale), -MOST, MOST).astype(jnp.int8), scale


def quantize_int8(folded: Folded, variables: Any, calibration: Array, percentile: float = 100.0) -> Quantised:
    """Quantise the layers of a network: symmetric, a scale per output channel, one for what each layer reads.

    Fold BatchNorm first: scales belong to the kernels that are multiplied in the end.

    Args:
        folded: of `fold_batchnorm`.
        variables: of `fold_batchnorm`.
        calibration: training images [N, H, W, C] as the network is given them.
        percentile: of the absolute values that a layer reads, which becomes 127; 100: the largest.

    Raises:
        UserError: without images.
    """
    if calibration.ndim != 4 or not len(calibration):
        raise UserError(f"calibration: found {len(calibration)} images, expected at least 1 for the scales of int8")
    kernels, scales, inputs = {}, {}, {}

    def note(name: str, x: Array, kernel: Array, window: Window | None) -> Array:
        most = jnp.abs(x).max() if percentile >= 100.0 else jnp.percentile(jnp.abs(x), percentile)
        inputs[name] = jnp.where(most > 0, most / MOST, 1.0)
        kernels[name], scales[name] = int8_kernel(kernel)
        return multiplied(x, kernel, window)

    apply_by(folded, variables, calibration, note)
    return Quantised(kernels, scales, inputs)


def apply_int8(
    folded: Folded,
    variables: Any,
    quantised: Quantised,
    x: Array,
    choices: Mapping[str, Choice] | Choice = Choice(),
    simulated: bool = False,
) -> Array:
    """Apply a quantised network: int8 products, sums in int32, then floats between the layers.

    Args:
        folded, variables: of `fold_batchnorm`.
        quantised: of `quantize_int8`.
        x: images [N, H, W, C] float.
        choices: how convolutions are computed, one for all or by the name of the layer.
        simulated: compute the same integers in float32, which is exact while sums stay below 2^24: up to 1,040 products
            of the largest values.
    """

    def compute(name: str, x: Array, kernel: Array, window: Window | None) -> Array:
        scale, choice = quantised.inputs[name], choices if isinstance(choices, Choice) else choices.get(name, Choice())
        whole = jnp.clip(jnp.round(x / scale), -MOST, MOST)
        dtype = jnp.float32 if simulated else jnp.int8
        found = multiplied(whole.astype(dtype), quantised.kernels[name].astype(dtype), window, choice)
        return found.astype(jnp.float32) * (scale * quantised.scales[name])

    return apply_by(folded, variables, x, compute)
