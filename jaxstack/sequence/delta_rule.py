"""The delta rule of DeltaNet (Yang et al., 2024, arXiv 2406.06484) and, with a decay, of Gated DeltaNet (Yang, Kautz
and Hatamizadeh, 2025, arXiv 2412.06464): a matrix state per head that corrects what it holds under a key.

    S~_t = alpha_t S_{t-1}        S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T        o_t = S_t^T q_t / sqrt(K)

S [K, V]. With |k| = 1 a step is alpha (I - beta k k^T) S + beta k v^T, a contraction for beta in [0, 2].

`delta_rule` has a recurrent form and a chunkwise one. With G_t the sum of log alpha from the chunk's start to t and
D_ij = exp(G_i - G_j) for i >= j, the corrections u_t = beta_t (v_t - S~_t^T k_t) of a chunk solve a triangular system,

    (I + L) U = beta V - beta e^G K S_0,   L_ij = beta_i D_ij k_i.k_j  (i > j),

so that U = U_0 - W S_0 by one inverse (the UT transform, section 3.2 of the first paper), and a chunk maps the state
affinely: S_C = (e^G_C I - K_d^T W) S_0 + K_d^T U_0, row t of K_d being e^(G_C - G_t) k_t. All exponents are <= 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxstack.core.errors import UserError, unknown
from jaxstack.sequence import scan

METHODS = ("auto", "recurrent", "chunked")
CHUNK = {"cpu": 16}
"""Steps of a chunk by backend; 64 elsewhere, which suits matrix units."""
BLOCK = 16
"""Rows that are inverted by substitution, which rounds least: with equal keys and beta = 2 eight rows joined by
products were seven times less exact after 30 steps, and no faster (CPU). More take longer to compile."""


def delta_rule(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    beta: ArrayLike,
    log_decay: ArrayLike | None = None,
    *,
    state: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    method: str = "auto",
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """q, k [B, T, H, K]; v [B, T, H, V]; beta [B, T, H]; log_decay = log alpha [B, T, H] in [-inf, 0], None for
    alpha = 1; state [B, H, K, V], zeros if None -> (o [B, T, H, V], the last state), float32 or wider.

    mask bool [B, T]: at False the state stays, o is 0 and what stands in the arrays is ignored.
    method: "recurrent" (lax.scan over tokens), "chunked" (matrix products in chunks of `chunk` steps) or "auto":
    chunked from T = 16 on. In training on CPU it was 1.5 (K = V = 16) to 6 (64) times faster than the recurrent form.
    Differentiable in all arrays. Raises `UserError` for shapes that do not fit.
    """
    arrays = (q, k, v, beta) if log_decay is None else (q, k, v, beta, log_decay)
    dtype = scan.compute_dtype(*arrays)
    tokens = _Token(*(jnp.asarray(x, dtype) for x in arrays))
    s = _check(tokens, state, dtype)
    batch, length, width = *tokens.q.shape[:2], tokens.q.shape[-1]
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != (batch, length) or mask.dtype != jnp.bool_:
            raise UserError(f"mask has shape {mask.shape}, type {mask.dtype}: expected bool {(batch, length)}")
        tokens = jax.tree.map(lambda x: jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, 0.0), tokens)
    if method not in METHODS:
        raise unknown("method of the delta rule", method, METHODS)
    if chunk is None:
        chunk = CHUNK.get(jax.default_backend(), 64)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise UserError(f"chunk={chunk!r}: expected a whole number >= 1")
    if length == 0:
        return tokens.v, s
    tokens = tokens._replace(q=tokens.q * width**-0.5)
    if tokens.log_decay is not None:
        tokens = tokens._replace(log_decay=jnp.maximum(tokens.log_decay, -1e30))  # -inf would meet zeros in products
    if method == "recurrent" or (method == "auto" and length < 16):
        return _recurrent(tokens, s)
    return _chunked(tokens, s, min(chunk, length))


def delta_step(q: Array, k: Array, v: Array, beta: Array, log_decay: Array | None, state: Array) -> tuple[Array, Array]:
    """One token of `delta_rule`: q, k [B, H, K]; v [B, H, V]; beta, log_decay [B, H] -> (o [B, H, V], state)."""
    s, o = _advance(state, _Token(q * q.shape[-1] ** -0.5, k, v, beta, log_decay))
    return o, s


class _Token(NamedTuple):
    q: Array
    k: Array
    v: Array
    beta: Array
    log_decay: Array | None = None


def _check(tokens: _Token, state: ArrayLike | None, dtype: Any) -> Array:
    """The state to start from; raises `UserError` for what does not fit."""
    q, k, v, beta, log_decay = tokens
    if q.ndim != 4 or v.ndim != 4:
        raise UserError(f"q has shape {q.shape}, v {v.shape}: expected [batch, time, heads, width]")
    scalars, shape = q.shape[:3], (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    expected = [("k", k, q.shape), ("v", v, (*scalars, v.shape[3])), ("beta", beta, scalars)]
    expected += [] if log_decay is None else [("log_decay", log_decay, scalars)]
    for name, x, want in expected:
        if x.shape != want:
            raise UserError(f"{name} has shape {x.shape}: expected {want}")
    if state is None:
        return jnp.zeros(shape, dtype)
    if jnp.shape(state) != shape:
        raise UserError(f"state has shape {jnp.shape(state)}: expected {shape}")
    return jnp.asarray(state, dtype)


def _advance(s: Array, token: _Token) -> tuple[Array, Array]:
    """s [..., K, V], one token -> (next s, o [..., V])."""
    if token.log_decay is not None:
        s = jnp.exp(token.log_decay)[..., None, None] * s
    k = token.k[..., None]
    error = token.v - (s * k).sum(-2)
    s = s + k * (token.beta[..., None] * error)[..., None, :]
    return s, (s * token.q[..., None]).sum(-2)


def _recurrent(tokens: _Token, s: Array) -> tuple[Array, Array]:
    s, o = jax.lax.scan(_advance, s, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens))
    return jnp.swapaxes(o, 0, 1), s


# ---------------------------------------------------------------- chunks


def _product(spec: str, *arrays: Array) -> Array:
    """Full float32 products: by default accelerators round the factors, and single steps would not agree."""
    return jnp.einsum(spec, *arrays, precision="highest")


def _chunked(tokens: _Token, s: Array, chunk: int) -> tuple[Array, Array]:
    """Arrays below are [n, B, H, C, ...]. A step added at the end has beta = log_decay = 0: it changes nothing."""
    batch, length = tokens.q.shape[:2]
    q, k, v, beta, log_decay = jax.tree.map(lambda x: _chunks(x, chunk), tokens)
    lower = jnp.tri(chunk, dtype=s.dtype)
    scores = _product("...ik,...jk->...ij", q, k) * lower
    overlap = beta[..., None] * _product("...ik,...jk->...ij", k, k) * (lower - jnp.eye(chunk, dtype=s.dtype))
    from_start, to_end, end = k, k, None
    if log_decay is not None:
        pair, start = _decays(log_decay)
        scores, overlap = scores * pair, overlap * pair
        q, from_start = start[..., None] * q, start[..., None] * k
        to_end, end = pair[..., -1, :, None] * k, start[..., -1, None, None]
    inverse = unit_lower_inverse(overlap)
    u0 = _product("...ij,...jv->...iv", inverse, beta[..., None] * v)
    w = _product("...ij,...jk->...ik", inverse, beta[..., None] * from_start)

    def body(s: Array, xs: Any) -> tuple[Array, tuple[Array, Array]]:
        to_end, u0, w, end = xs
        u = u0 - _product("...ik,...kv->...iv", w, s)
        kept = s if end is None else end * s
        return kept + _product("...ik,...iv->...kv", to_end, u), (s, u)

    s, (starts, u) = jax.lax.scan(body, s, (to_end, u0, w, end))
    o = _product("...ik,...kv->...iv", q, starts) + _product("...ij,...jv->...iv", scores, u)
    o = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(batch, -1, *o.shape[2:3], o.shape[-1])
    return o[:, :length], s


def _chunks(x: Array, chunk: int) -> Array:
    """[B, T, H, ...] -> [n, B, H, C, ...], zeros at the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), (1, 3), (0, 2))


def _decays(log_decay: Array) -> tuple[Array, Array]:
    """[..., C] -> exp of the sums over (j, i] [..., C, C] (1 for i < j) and over [0, i] [..., C].

    The sums are products with triangles of ones, not differences of cumulative sums: these cancel, so that after a
    step that forgets everything the decays behind it would be noise, even greater than 1.
    """
    chunk = log_decay.shape[-1]
    after = jnp.concatenate([jnp.ones((chunk, 1)), jnp.tri(chunk, k=-1)], 1).astype(log_decay.dtype)
    sums = _product("im,...mj->...ij", jnp.tri(chunk, dtype=log_decay.dtype), log_decay[..., None] * after)
    decays = jnp.exp(sums)
    return decays[..., 1:], decays[..., 0]


@scan.own_adjoint()
def unit_lower_inverse(lower: Array) -> Array:
    """(I + L)^-1 for strictly lower triangular L [..., C, C]: forward substitution in small blocks, which products then
    join. Its adjoint is two products.

    A BLAS triangular solve a chunk is equal on CPU at C = 16 and was 5 times slower at 32. Powers of L, the other way
    to use products alone, cancel: with equal keys they reach 10^18 at C = 64.
    """
    return _inverse(lower)


def _inverse(lower: Array) -> Array:
    size, levels = lower.shape[-1], 0
    while size > BLOCK << levels:
        levels += 1
    width = -(-size // 2**levels)
    pad = (width << levels) - size
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, pad), (0, pad)])
    cut = lambda i, j, width: lower[..., i * width : (i + 1) * width, j * width : (j + 1) * width]
    inverse = _substitute(jnp.stack([cut(i, i, width) for i in range(2**levels)], -3))
    for level in range(levels):
        top, bottom = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        count = 2 ** (levels - level)
        corner = jnp.stack([cut(i + 1, i, width << level) for i in range(0, count, 2)], -3)
        corner = -_product("...ij,...jk,...kl->...il", bottom, corner, top)
        top = jnp.concatenate([top, jnp.zeros_like(top)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, bottom], -1)], -2)
    return inverse[..., 0, :size, :size]


def _substitute(lower: Array) -> Array:
    """Row i of the inverse is e_i minus the product of L's row i with the rows above."""
    size = lower.shape[-1]
    unit = jnp.eye(size, dtype=lower.dtype)
    rows = [jnp.broadcast_to(unit[0], (*lower.shape[:-2], size))]
    for i in range(1, size):
        rows.append(unit[i] - sum(lower[..., i, j, None] * row for j, row in enumerate(rows)))
    return jnp.stack(rows, -2)


def _inverse_fwd(lower: Array) -> tuple[Array, Array]:
    inverse = _inverse(lower)
    return inverse, inverse


def _inverse_bwd(inverse: Array, cotangent: Array) -> tuple[Array]:
    return (-jnp.tril(_product("...ji,...jk,...lk->...il", inverse, cotangent, inverse), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)
