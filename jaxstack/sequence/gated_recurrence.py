"""Recurrence of a matrix state with decay, in a sequential and a chunked form; gated linear attention runs on it.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   alpha_t = exp(log_decay_t)

alpha_t is a vector over the key dimensions (gated linear attention, Yang et al., 2024, arXiv 2312.06635), a number per
head (Mamba-2, Dao and Gu, 2024, arXiv 2405.21060) or 1 (linear attention). Forms:

    recurrent    lax.scan over T, one token per step
    chunked      matrix products inside chunks of C tokens, lax.scan over the T/C chunks (Yang et al., section 4)

Within a chunk the weight of token j at token i is exp(l_{j+1} + ... + l_i). That exponent is summed, never a difference
of cumulative sums, which would cancel, and nothing is divided by a product of decays: all factors are at most 1. Work
and memory are O(T), arithmetic is float32 at least. Gradients are autodiff's; a chunk is recomputed, not stored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxstack.core.errors import UserError, unknown
from jaxstack.sequence.mixer import check_state
from jaxstack.sequence.scan import compute_dtype

METHODS = ("auto", "recurrent", "chunked")

CHUNK = {True: 16, False: 32}
"""Tokens of a chunk with decays per key dimension and without, the fastest on CPU at heads of 16 to 64 dimensions."""

FORGOTTEN = -1e4
"""Log decays are kept above this, where exp is 0 in float32 and float64: -inf would give 0 * inf in gradients."""

_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class GatedState(NamedTuple):
    """State of a layer around the recurrence."""

    conv: Array | None
    """Last inputs of the convolution [B, K-1, channels], None without one."""
    matrix: Array
    """S [B, H, K, V], float32 or wider."""


def gated_scan(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    log_decay: ArrayLike | None = None,
    *,
    state: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    method: str = "auto",
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """q, k [B, T, G, K], v [B, T, H, V] -> (o [B, T, H, V], S after the last token [B, H, K, V]), float32 or wider.

    G divides H: heads in groups of H/G, in order, share q and k. log_decay <= 0: [B, T, H, K] per key dimension,
    [B, T, H] per head, or None for no decay. state: S before the first token, zeros if None.
    mask [B, T] bool: a False token leaves the state as it is, its output is 0, and what stands there is ignored.
    method: "recurrent", "chunked" (`chunk` tokens, a power of two) or "auto" (chunked, recurrent for a single token).
    Differentiable in q, k, v, log_decay and state. Raises `UserError` for shapes that do not fit.
    """
    arrays = [x for x in (q, k, v, log_decay, state) if x is not None]
    dtype = compute_dtype(*arrays)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    decay = None if log_decay is None else jnp.maximum(jnp.asarray(log_decay, dtype), FORGOTTEN)
    keep = None if mask is None else jnp.asarray(mask)
    _check(q, k, v, decay, keep)
    batch, length, heads, d_v = v.shape
    empty = jnp.zeros((batch, heads, k.shape[-1], d_v), dtype)
    start = empty if state is None else jnp.asarray(state, dtype)
    check_state(start, empty)
    per_key = decay is not None and decay.ndim == 4
    size = _size(chunk, length, per_key)
    if method not in METHODS:
        raise unknown("method of gated_scan", method, METHODS)
    if keep is not None:
        hide = lambda x: jnp.where(keep.reshape(*keep.shape, *[1] * (x.ndim - 2)), x, 0.0)
        q, k, v, decay = hide(q), hide(k), hide(v), None if decay is None else hide(decay)
    if length == 0:
        return v, start
    if per_key and k.shape[2] != heads:
        q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    groups = k.shape[2]
    if method == "auto":
        method = "recurrent" if length == 1 else "chunked"
    form = _recurrent if method == "recurrent" else functools.partial(_chunked, size=size)
    o, last = form(q, k, v, decay, start.reshape(batch, groups, heads // groups, *start.shape[2:]))
    return o, last.reshape(start.shape)


# ---------------------------------------------------------------- shapes


def _check(q: Array, k: Array, v: Array, decay: Array | None, mask: Array | None) -> None:
    if k.ndim != 4 or v.ndim != 4 or k.shape[:2] != v.shape[:2] or k.shape[2] < 1 or v.shape[2] % k.shape[2]:
        raise UserError(
            f"k has shape {k.shape}, v {v.shape}: expected [batch, time, groups, keys], [batch, time, heads, values], "
            "groups a divisor of heads"
        )
    if q.shape != k.shape:
        raise UserError(f"q has shape {q.shape}: expected that of k, {k.shape}")
    if decay is not None and decay.shape not in (v.shape[:3], (*v.shape[:3], k.shape[-1])):
        raise UserError(f"log_decay has shape {decay.shape}: expected {v.shape[:3]} or {(*v.shape[:3], k.shape[-1])}")
    if mask is not None and (mask.shape != v.shape[:2] or mask.dtype != jnp.bool_):
        raise UserError(f"mask has shape {mask.shape}, type {mask.dtype}: expected bool {v.shape[:2]}")


def _size(chunk: int | None, length: int, per_key: bool) -> int:
    """Tokens per chunk: as asked or by default, and no more than the power of two that holds the whole sequence."""
    chunk = CHUNK[per_key] if chunk is None else chunk
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1 or chunk & (chunk - 1):
        raise UserError(f"chunk={chunk!r}: expected a power of two")
    return min(chunk, 1 << max(length - 1, 0).bit_length())


def _group(x: Array, groups: int) -> Array:
    """[B, T, H, ...] -> [T, B, G, H/G, ...]"""
    return jnp.swapaxes(x.reshape(*x.shape[:2], groups, x.shape[2] // groups, *x.shape[3:]), 0, 1)


# ---------------------------------------------------------------- forms; states are [B, G, H/G, K, V]


def _recurrent(q: Array, k: Array, v: Array, decay: Array | None, start: Array) -> tuple[Array, Array]:
    groups = k.shape[2]
    alpha = None
    if decay is not None:
        alpha = _group(jnp.exp(decay if decay.ndim == 4 else decay[..., None]), groups)[..., None]

    @jax.checkpoint
    def step(s: Array, token: Any) -> tuple[Array, Array]:
        q, k, v, alpha = token
        s = (s if alpha is None else alpha * s) + k[..., :, None] * v[..., None, :]
        return s, (q[..., :, None] * s).sum(-2)

    last, o = jax.lax.scan(step, start, (*(_group(x, groups) for x in (q, k, v)), alpha))
    return jnp.swapaxes(o, 0, 1).reshape(v.shape), last


def _chunked(q: Array, k: Array, v: Array, decay: Array | None, start: Array, size: int) -> tuple[Array, Array]:
    groups, (batch, length, heads, d_v) = k.shape[2], v.shape
    chunks = -(-length // size)

    def fold(x: Array) -> Array:
        """[B, T, H, ...] -> [N, B, G, H/G, C, ...]; tokens added at the end neither decay nor write."""
        x = _group(jnp.pad(x, ((0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2))), groups)
        return jnp.moveaxis(x.reshape(chunks, size, *x.shape[1:]), 1, 4)

    def step(s: Array, tokens: Any) -> tuple[Array, Array]:
        q, k, v, decay = tokens
        if decay is None:
            return _plain(s, q, k, v)
        return (_per_key if decay.ndim == q.ndim else _per_head)(s, q, k, v, decay)

    tokens = (fold(q), fold(k), fold(v), None if decay is None else fold(decay))
    last, o = jax.lax.scan(jax.checkpoint(step), start, tokens)
    o = jnp.moveaxis(o, (0, 4), (1, 2)).reshape(batch, chunks * size, heads, d_v)
    return o[:, :length], last


def _plain(s: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """A chunk without decay: q, k [..., C, K], v [..., C, V], s [..., K, V] -> (s after it, o [..., C, V])."""
    scores = _dot("...ik,...jk->...ij", q, k) * jnp.tri(q.shape[-2], dtype=q.dtype)
    o = _dot("...ij,...jv->...iv", scores, v) + _dot("...ik,...kv->...iv", q, s)
    return s + _dot("...jk,...jv->...kv", k, v), o


def _per_head(s: Array, q: Array, k: Array, v: Array, decay: Array) -> tuple[Array, Array]:
    """A chunk with decay [..., C]. Exponents of all pairs [..., C, C] are sums of the decays in between."""
    lower = np.tri(q.shape[-2], dtype=q.dtype)
    later = jnp.where(lower.T == 0, decay[..., :, None], 0.0)  # [..., s, j]: decay of s if s > j
    exponent = _dot("is,...sj->...ij", lower, later)
    scores = _dot("...ik,...jk->...ij", q, k) * (jnp.exp(exponent) * lower)
    ahead, behind = exponent[..., :, 0] + decay[..., :1], exponent[..., -1, :]
    o = _dot("...ij,...jv->...iv", scores, v) + jnp.exp(ahead)[..., None] * _dot("...ik,...kv->...iv", q, s)
    kept = jnp.exp(ahead[..., -1])[..., None, None] * s
    return kept + _dot("...jk,...jv->...kv", k, jnp.exp(behind)[..., None] * v), o


def _per_key(s: Array, q: Array, k: Array, v: Array, decay: Array) -> tuple[Array, Array]:
    """A chunk with decay [..., C, K]. Neighbouring blocks of 1, 2, 4, ... tokens merge: a query of the later one meets
    a key of the earlier one at their border, the query decayed from there on, the key up to there."""
    scores = (q * k).sum(-1)[..., None, None]  # [..., blocks, tokens, tokens]
    q_in, k_in, ahead = (x[..., None, :] for x in (q, k, decay))  # [..., blocks, tokens, K]
    behind = jnp.zeros_like(ahead)  # decay from after a token to the end of its block
    while ahead.shape[-3] > 1:
        pairs = [(x[..., 0::2, :, :], x[..., 1::2, :, :]) for x in (scores, q_in, k_in, ahead, behind)]
        (scores1, scores2), (q1, q2), (k1, k2), (ahead1, ahead2), (behind1, behind2) = pairs
        cross = _dot("...ik,...jk->...ij", q2 * jnp.exp(ahead2), k1 * jnp.exp(behind1))
        rows = (jnp.concatenate([scores1, jnp.zeros_like(scores1)], -1), jnp.concatenate([cross, scores2], -1))
        scores = jnp.concatenate(rows, -2)
        q_in, k_in = jnp.concatenate([q1, q2], -2), jnp.concatenate([k1, k2], -2)
        ahead, behind = (
            jnp.concatenate([ahead1, ahead2 + ahead1[..., -1:, :]], -2),
            jnp.concatenate([behind1 + ahead2[..., -1:, :], behind2], -2),
        )
    scores, ahead, behind = (x[..., 0, :, :] for x in (scores, ahead, behind))
    o = _dot("...ij,...jv->...iv", scores, v) + _dot("...ik,...kv->...iv", q * jnp.exp(ahead), s)
    kept = jnp.exp(ahead[..., -1, :])[..., None] * s
    return kept + _dot("...jk,...jv->...kv", k * jnp.exp(behind), v), o
