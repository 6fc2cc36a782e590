"""Structured pruning of channels against training smaller networks (Crowley et al., 2018, arXiv 1810.04622).

Prune-and-tune starts from a trained network and repeats: some updates at a small learning rate, then one channel
fewer. Prunable are the middle channels of the blocks of a network that takes `masks` (`jaxstack.nn.vision`): the
outputs of conv1. A mask is an argument, so all rounds share one program. `compress` removes masked channels for good.
Rivals of the same size are trained from scratch: the architecture that pruning found, a narrower network, one with
bottlenecks, and `copycat`, which scales the profile of a pruned network to any size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from jaxstack.core.errors import UserError, unknown
from jaxstack.core.learner import Key
from jaxstack.data.sources import shuffled_rows as shuffled_rows
from jaxstack.nn import optimisers
from jaxstack.nn.supervised import Hypers, cross_entropy
from jaxstack.nn.vision import wrn

Masks = tuple[Array, ...]
"""For each block which of its middle channels are there: [C] float of zeros and ones."""
CRITERIA = ("fisher", "l1", "l1-normalised", "l1-signed", "random")
"""What a channel is removed by; "l1-signed" is what the released code calls L1."""
param_count = wrn.param_count


def full_masks(mid_features: Sequence[int]) -> Masks:
    """Masks of a network that has lost nothing."""
    return tuple(jnp.ones(n, jnp.float32) for n in mid_features)


def widths(masks: Masks) -> tuple[int, ...]:
    """Middle channels that each block has left."""
    return tuple(int(np.asarray(m).sum()) for m in masks)


# What a channel is worth


def fisher_step(
    loss: Callable[[Any, Masks], tuple[Array, Any]], params: Any, masks: Masks, count: int
) -> tuple[tuple[Array, Any], Any, Masks]:
    """Loss, gradients, and the Fisher saliency of a batch, from one backward pass.

    With h the activations that a mask multiplies, Delta_c = 1/2 mean_n g_nc^2, g_nc = sum over pixels of h dL/dh: the
    second-order change of the loss when channel c is zeroed, with the empirical Fisher information as Hessian. g is the
    gradient by a mask that has a row for each image, so no activation is kept for it.

    Args:
        loss: (params, rows) -> (mean loss of the batch, anything); `rows` are masks [N, C].
        params: what is trained.
        masks: one [C] for each block.
        count: N, images in the batch.

    Returns:
        ((loss, anything), gradients, Delta: one [C] for each block, 0 where a mask is 0).
    """
    rows = tuple(jnp.broadcast_to(m, (count, len(m))) for m in masks)
    out, (grads, by_rows) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, rows)
    return out, grads, tuple(0.5 * jnp.square(m * g).mean(0) for m, g in zip(masks, by_rows))


def l1_saliency(params: Any, masks: Masks, *, signed: bool = False, normalised: bool = False) -> Masks:
    """Sum of the absolute weights of each channel's filter in conv1 (Li et al., 2017).

    Args:
        params: of a network whose blocks are block0, block1, ...
        masks: one [C] for each block.
        signed: the released code's: the sum without absolute values.
        normalised: divide by the filter's number of weights, so that wide layers are not emptied last.
    """
    found = []
    for i, mask in enumerate(masks):
        if not len(mask):
            found.append(mask)
            continue
        kernel = params[f"block{i}"]["conv1"]["kernel"]
        size = float(np.prod(kernel.shape[:3])) if normalised else 1.0
        found.append((kernel if signed else jnp.abs(kernel)).sum((0, 1, 2)) / size)
    return tuple(found)


def random_saliency(key: Key, masks: Masks) -> Masks:
    """Uniform numbers: the least of them is a channel drawn uniformly from those that are left."""
    keys = jax.random.split(key, len(masks))
    return tuple(jax.random.uniform(k, m.shape) for k, m in zip(keys, masks))


def prune_argmin(saliency: Masks, masks: Masks) -> tuple[Masks, Array]:
    """Remove the channel of the least saliency in the whole network.

    Args:
        saliency: one [C] for each block.
        masks: likewise.

    Returns:
        (masks with one channel fewer, its number in all channels one after another). With no channel left: as it was.
    """
    flat = jnp.concatenate([jnp.where(m > 0, s, jnp.inf) for s, m in zip(saliency, masks)])
    index = flat.argmin()
    left = jnp.concatenate(masks).at[index].set(0.0)
    cuts = np.cumsum([len(m) for m in masks])[:-1]
    return tuple(jnp.split(left, cuts)), index


# Prune and tune


class Tuning(NamedTuple):
    """The updates between two removals; the numbers may be arrays."""

    lr: Any = 8e-4
    momentum: Any = 0.9
    weight_decay: Any = 5e-4

    def optimiser(self) -> optax.GradientTransformation:
        """SGD as in training, at a constant learning rate."""
        rate = lambda step: jnp.asarray(self.lr, jnp.float32)
        decay = dict(weight_decay=self.weight_decay, mask=optimisers.weights_only)
        return optimisers.sgd(rate, momentum=self.momentum, **decay)


class State(NamedTuple):
    """What prune-and-tune carries."""

    params: Any
    stats: Any
    """Variables beside the parameters: {"batch_stats": ...}."""
    opt_state: Any
    masks: Masks
    key: Key


def begin(variables: Mapping[str, Any], mid_features: Sequence[int], key: Key, tuning: Tuning = Tuning()) -> State:
    """The state of a trained network that has lost nothing."""
    stats = {k: v for k, v in variables.items() if k != "params"}
    params = variables["params"]
    return State(params, stats, tuning.optimiser().init(params), full_masks(mid_features), key)


def prune_and_tune(
    network: Any,
    data: tuple[Array, Array],
    state: State,
    rows: Array,
    criterion: Any,
    tuning: Tuning = Tuning(),
    change: Callable[[Key, Array], Array] = lambda key, x: x,
) -> tuple[State, Array]:
    """Remove R channels, one after U updates each; one program, a scan over removals.

    Args:
        network: module with `masks`, e.g. `WRN`.
        data: images [M, H, W, C] and labels [M].
        state: see `begin`.
        rows: [R, U, B] int, which images the updates see.
        criterion: number in `CRITERIA`, may be traced.
        tuning: optimisation.
        change: (key, images [B, H, W, C]) -> what the network is given: augmented, as floats.

    Returns:
        The state after R removals, and the numbers [R] of the removed channels in all channels one after another.
    """
    images, labels = data
    optimiser = tuning.optimiser()

    def update(carry: tuple[State, Masks], at: Array) -> tuple[tuple[State, Masks], tuple]:
        s, saliency = carry
        key, k_change = jax.random.split(s.key)
        x, y = change(k_change, images[at]), labels[at]

        def loss(params: Any, rows: Masks) -> tuple[Array, Any]:
            variables = {"params": params, **s.stats}
            logits, stats = network.apply(variables, x, True, masks=rows, mutable=list(s.stats))
            return cross_entropy(logits, y, Hypers()).mean(), stats

        (_, stats), grads, delta = fisher_step(loss, s.params, s.masks, len(at))
        updates, opt_state = optimiser.update(grads, s.opt_state, s.params)
        params = optax.apply_updates(s.params, updates)
        return (State(params, stats, opt_state, s.masks, key), jax.tree.map(jnp.add, saliency, delta)), ()

    def removal(s: State, rows: Array) -> tuple[State, Array]:
        # the saliency begins anew: after a removal the network is another one
        (s, fisher), _ = lax.scan(update, (s, jax.tree.map(jnp.zeros_like, s.masks)), rows)
        key, k_random = jax.random.split(s.key)
        worth = (
            jax.tree.map(lambda d: d / len(rows), fisher),
            l1_saliency(s.params, s.masks),
            l1_saliency(s.params, s.masks, normalised=True),
            l1_saliency(s.params, s.masks, signed=True),
            random_saliency(k_random, s.masks),
        )
        chosen = jax.tree.map(lambda *v: jnp.stack(v)[criterion], *worth)
        masks, index = prune_argmin(chosen, s.masks)
        return s._replace(masks=masks, key=key), index

    return lax.scan(removal, state, rows)


def criterion_number(name: str) -> int:
    """The place of a name in `CRITERIA`. Raises `UserError` for an unknown one."""
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    return CRITERIA.index(name)


# Smaller networks


def compress(variables: Mapping[str, Any], masks: Masks) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Remove masked channels for good: rows of conv1, entries of bn2, columns of conv2.

    Args:
        variables: {"params": ..., "batch_stats": ...} of a network whose blocks are block0, block1, ...
        masks: one [C] for each block.

    Returns:
        (`mid_features` of the smaller network, its variables). A block that has lost all channels keeps its shortcut
        alone.
    """
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    for i, mask in enumerate(masks):
        name, kept = f"block{i}", np.flatnonzero(np.asarray(mask))
        if name not in params or not len(mask):  # had no middle channels
            continue
        block, own = dict(params[name]), dict(stats[name])
        if len(kept):
            block["conv1"] = {"kernel": block["conv1"]["kernel"][..., kept]}
            block["conv2"] = {"kernel": block["conv2"]["kernel"][:, :, kept]}
            block["bn2"], own["bn2"] = (jax.tree.map(lambda v, k=kept: v[k], t["bn2"]) for t in (block, own))
        else:
            lost = ("conv1", "bn2", "conv2") if "shortcut" in block else tuple(block)
            block, own = ({k: v for k, v in t.items() if k not in lost} for t in (block, own))
        params[name], stats[name] = block, own
    params, stats = ({k: v for k, v in t.items() if v} for t in (params, stats))
    return widths(masks), {"params": params, "batch_stats": stats}


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest t in low..high for which a monotone condition holds, to a millionth, by bisection."""
    if fits(high):
        return high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if fits(middle) else (low, middle)
        if high - low < 1e-6:
            break
    return low


def copycat(
    profile: Sequence[float], target: int, depth: int, width: float, classes: int = 10, channels: int = 3
) -> tuple[int, ...]:
    """The profile of a pruned network scaled to a number of parameters: max(1, round(t p_b C_b)) middle channels.

    The paper reads a simple rule off the profile by eye; this rule is ours.

    Args:
        profile: share p_b of its output channels C_b that each block of a pruned network keeps in the middle.
        target: parameters that the network may have.
        depth, width, classes, channels: of the WRN.

    Raises:
        UserError: for a profile of another length, or when one channel per block has more parameters.
    """
    outs, _, _ = wrn.block_features(depth, width)
    if len(profile) != len(outs):
        raise UserError(f"profile: found {len(profile)} shares, expected {len(outs)}, one for each block")
    mid = lambda t: tuple(max(1, round(t * p * c)) for p, c in zip(profile, outs))
    count = lambda t: param_count(depth, width, mid(t), classes, channels)
    _refuse(count(0.0), target)
    return mid(_largest(lambda t: count(t) <= target, 0.0, 64.0))


def bottleneck(target: int, depth: int, width: float, classes: int = 10, channels: int = 3) -> tuple[int, ...]:
    """The same share of middle channels in every block, the largest that a number of parameters allows."""
    outs, _, _ = wrn.block_features(depth, width)
    return copycat([1.0] * len(outs), target, depth, width, classes, channels)


def narrower(target: int, depth: int, classes: int = 10, channels: int = 3) -> float:
    """The largest width w of WRN-depth-w, in 64ths, that a number of parameters allows: int(16 w), int(32 w) and
    int(64 w) channels. Raises `UserError`."""
    _refuse(param_count(depth, 4 / 64, None, classes, channels), target)
    parts = 4
    while param_count(depth, (parts + 1) / 64, None, classes, channels) <= target:
        parts += 1
    return parts / 64


def shallower(target: int, width: float, classes: int = 10, channels: int = 3) -> int:
    """The largest depth 6 n + 4 of WRN-depth-width that a number of parameters allows. Raises `UserError`."""
    _refuse(param_count(10, width, None, classes, channels), target)
    depth = 10
    while param_count(depth + 6, width, None, classes, channels) <= target:
        depth += 6
    return depth


def folded(variables: Mapping[str, Any], masks: Masks) -> dict[str, Any]:
    """Variables of the same shapes whose network without masks is the masked one: conv2 reads no masked channel."""
    params = dict(variables["params"])
    for i, mask in enumerate(masks):
        if len(mask):
            block = params[f"block{i}"]
            params[f"block{i}"] = {**block, "conv2": {"kernel": block["conv2"]["kernel"] * mask[:, None]}}
    return {**variables, "params": params}


def _refuse(smallest: int, target: int) -> None:
    if smallest > target:
        raise UserError(f"target={target}: expected at least {smallest}, the parameters of the smallest candidate")
