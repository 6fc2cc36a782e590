"""Mamba (Gu and Dao, 2023, arXiv 2312.00752): a diagonal state-space model whose step size, input and output matrices
depend on the token.

    h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t^T        y_t = h_t C_t + D u_t        (h: M channels x N states)

A is diagonal and negative. A is discretised by zero-order hold and B by Euler's rule, as in the released code (section
3.6 of the paper writes zero-order hold for both). `selective_scan` runs whole sequences, `Mamba` is the layer.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxstack.core.errors import UserError, unknown
from jaxstack.sequence import scan
from jaxstack.sequence.mixer import LINEAR, ShortConv, begin, check_sequence, check_state, delta_init, finish

SPAN = 32
"""Steps between the states that the fused scan keeps for its backward pass, which recomputes the others."""


def selective_scan(
    u: ArrayLike,
    delta: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    c: ArrayLike,
    *,
    state: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    method: str = "auto",
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """u, delta [B, T, M] (delta >= 0); a [M, N] < 0; b, c [B, T, N]; state [B, M, N], zeros if None
    -> (y [B, T, M] without the skip D u, the last state [B, M, N]), float32 or wider.

    mask bool [B, T]: at False the state stays, y is 0 and what stands in u, delta, b, c is ignored.
    method: "sequential" (one fused scan that never holds [B, T, M, N]), "associative" or "chunked" (`affine_scan` on
    arrays of that size; `chunk` steps per chunk), "auto": sequential on CPU (3.5 times faster than chunked there),
    elsewhere chunked from T = 64 on. Differentiable in all arrays. Raises `UserError` for shapes that do not fit.
    """
    dtype = scan.compute_dtype(u, delta, a, b, c)
    u, delta, a, b, c = (jnp.asarray(x, dtype) for x in (u, delta, a, b, c))
    if u.ndim != 3 or a.ndim != 2:
        raise UserError(f"u has shape {u.shape}, a {a.shape}: expected [batch, time, M] and [M, N]")
    (batch, length, channels), d_state = u.shape, a.shape[1]
    wide, narrow = (batch, length, channels), (batch, length, d_state)
    expected = dict(delta=(delta, wide), a=(a, (channels, d_state)), b=(b, narrow), c=(c, narrow))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise UserError(f"{name} has shape {x.shape}: expected {shape}")
    if state is not None and jnp.shape(state) != (batch, channels, d_state):
        raise UserError(f"state has shape {jnp.shape(state)}: expected {(batch, channels, d_state)}")
    h = jnp.zeros((batch, channels, d_state), dtype) if state is None else jnp.asarray(state, dtype)
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != (batch, length) or mask.dtype != jnp.bool_:
            raise UserError(f"mask has shape {mask.shape}, type {mask.dtype}: expected bool {(batch, length)}")
        u, delta, b, c = (jnp.where(mask[..., None], x, 0.0) for x in (u, delta, b, c))
    if length == 0:
        return u, h
    form = method
    if method not in scan.METHODS:
        raise unknown("scan method", method, scan.METHODS)
    if method == "auto":
        form = "sequential" if jax.default_backend() == "cpu" or length < 64 else "chunked"
    if form == "sequential":
        tokens = _Token(*(jnp.swapaxes(x, 0, 1) for x in (delta, delta * u, b, c)))
        y, h = _fused(tokens, a.T, jnp.swapaxes(h, 1, 2))
        return jnp.swapaxes(y, 0, 1), jnp.swapaxes(h, 1, 2)
    decay, drive = jnp.exp(delta[..., None] * a), (delta * u)[..., None] * b[:, :, None]
    states, h = scan.affine_scan(decay, drive, h, axis=1, method=form, chunk=chunk)
    return jnp.einsum("btmn,btn->btm", states, c, precision="highest"), h


def selective_step(u: Array, delta: Array, a: Array, b: Array, c: Array, state: Array) -> tuple[Array, Array]:
    """One token of `selective_scan`: u, delta [B, M]; b, c [B, N]; state [B, M, N] -> (y [B, M], state)."""
    h = jnp.exp(delta[..., None] * a) * state + (delta * u)[..., None] * b[:, None]
    return (h * c[:, None]).sum(-1), h


# ---------------------------------------------------------------- the fused scan


class _Token(NamedTuple):
    """Time first: delta, drive = delta u [T, B, M]; b, c [T, B, N]."""

    delta: Array
    drive: Array
    b: Array
    c: Array


def _advance(h: Array, token: _Token, a: Array) -> Array:
    """h [B, N, M], a [N, M], one token -> the next h. Channels are innermost, as in kla_filter.py."""
    return jnp.exp(token.delta[:, None] * a) * h + token.drive[:, None] * token.b[..., None]


@scan.own_adjoint()
def _fused(tokens: _Token, a: Array, h: Array) -> tuple[Array, Array]:
    """a [N, M], h [B, N, M] -> (y [T, B, M], last h)."""

    def body(h: Array, token: _Token) -> tuple[Array, Array]:
        h = _advance(h, token, a)
        return h, (h * token.c[..., None]).sum(1)

    h, y = jax.lax.scan(body, h, tokens)
    return y, h


def _fused_fwd(tokens: _Token, a: Array, h: Array) -> Any:
    """A step added at the end has delta = drive = 0: it changes nothing."""
    length = tokens.delta.shape[0]
    span = min(SPAN, length)
    spans = jax.tree.map(lambda x: _spans(x, span), tokens)

    def outer(h: Array, part: _Token) -> tuple[Array, tuple[Array, Array]]:
        y, last = _fused(part, a, h)
        return last, (y, h)

    last, (y, starts) = jax.lax.scan(outer, h, spans)
    return (y.reshape(-1, *y.shape[2:])[:length], last), (spans, a, starts)


def _fused_bwd(saved: Any, cotangent: Any) -> tuple[_Token, Array, Array]:
    spans, a, starts = saved
    d_y, d_h = cotangent
    length, span = d_y.shape[0], spans.delta.shape[1]

    def inner(carry: tuple[Array, Array], xs: Any) -> Any:
        d_h, d_a = carry
        before, after, token, d_y = xs
        d_h = d_h + token.c[..., None] * d_y[:, None]
        kept = d_h * jnp.exp(token.delta[:, None] * a)
        through = kept * before
        grad = _Token(
            delta=(through * a).sum(1),
            drive=(d_h * token.b[..., None]).sum(1),
            b=(d_h * token.drive[:, None]).sum(2),
            c=(after * d_y[:, None]).sum(2),
        )
        return (kept, d_a + through * token.delta[:, None]), grad

    def outer(carry: Any, xs: Any) -> Any:
        part, start, d_y = xs

        def keep(h: Array, token: _Token) -> tuple[Array, Array]:
            h = _advance(h, token, a)
            return h, h

        _, after = jax.lax.scan(keep, start, part)
        before = jnp.concatenate([start[None], after[:-1]])
        return jax.lax.scan(inner, carry, (before, after, part, d_y), reverse=True)

    carry = (d_h, jnp.zeros_like(d_h))
    (d_h, d_a), grads = jax.lax.scan(outer, carry, (spans, starts, _spans(d_y, span)), reverse=True)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], grads), d_a.sum(0), d_h


_fused.defvjp(_fused_fwd, _fused_bwd)


def _spans(x: Array, span: int) -> Array:
    """[T, ...] -> [ceil(T / span), span, ...], zeros at the end."""
    x = jnp.pad(x, ((0, -x.shape[0] % span), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(-1, span, *x.shape[1:])


# ---------------------------------------------------------------- layer


class MambaState(NamedTuple):
    conv: Array
    """Last inputs of the convolution [B, K-1, M]."""
    ssm: Array
    """[B, M, N]"""


class Mamba(nn.Module):
    """The block of Gu and Dao (2023), figure 3; a mixer as described in mixer.py.

    in_proj: D -> 2M (M = expand D), causal convolution and SiLU, x_proj: -> Delta's bottleneck [R], B, C [N],
    dt_proj: R -> M, Delta = softplus(dt_proj + dt_bias), selective scan, skip D, SiLU gate, out_proj: M -> D.
    A_log starts at log(1..N) (S4D-Real), Delta log-uniform in `delta_range`. The scan runs in float32 or wider; keep
    A_log, dt_bias and D out of weight decay.
    """

    features: int
    """D"""
    d_state: int = 16
    """N, states per channel."""
    expand: float = 2.0
    dt_rank: int | None = None
    """R; None: ceil(D / 16)."""
    conv_size: int = 4
    delta_range: tuple[float, float] = (0.001, 0.1)
    method: str = "auto"
    """See `selective_scan`."""
    dtype: Any = None
    """Type of the projections; None promotes x and the parameters."""

    @property
    def channels(self) -> int:
        """M"""
        return int(self.expand * self.features)

    @nn.nowrap
    def init_state(self, batch: int) -> MambaState:
        """Zeros."""
        window = jnp.zeros((batch, self.conv_size - 1, self.channels))
        return MambaState(window, jnp.zeros((batch, self.channels, self.d_state)))

    def setup(self) -> None:
        self._validate()
        m, n = self.channels, self.d_state
        rank = math.ceil(self.features / 16) if self.dt_rank is None else self.dt_rank
        dense = lambda width: nn.Dense(width, False, self.dtype, kernel_init=LINEAR)
        self.in_proj = dense(2 * m)
        self.conv = ShortConv(m, self.conv_size)
        self.x_proj = dense(rank + 2 * n)
        self.dt_proj = dense(m)
        self.out_proj = dense(self.features)
        self.splits = (rank, rank + n)
        self.dt_bias = self.param("dt_bias", delta_init(self.delta_range), (m,))
        self.a_log = self.param("A_log", lambda _: jnp.log(jnp.tile(jnp.arange(1.0, n + 1.0), (m, 1))))
        self.skip = self.param("D", nn.initializers.ones_init(), (m,))

    def __call__(
        self, x: Array, *, mask: Array | None = None, state: MambaState | None = None
    ) -> tuple[Array, MambaState]:
        """x [B, T, D] -> (out [B, T, D], state); mask as in mixer.py."""
        x, start = begin(self, x, mask, state)
        z, gate, window = self._inputs(x, mask, start.conv)
        y, ssm = selective_scan(*self._select(z), state=start.ssm, mask=mask, method=self.method)
        out = self._outputs(y, z, gate)
        return finish(out, x, mask), MambaState(window, ssm)

    def step(self, x: Array, state: MambaState) -> tuple[Array, MambaState]:
        """x [B, D] -> (out [B, D], state); constant time and memory."""
        check_sequence(x[:, None], self.features)
        check_state(state, self.init_state(x.shape[0]))
        z, gate, window = self._inputs(x[:, None], None, state.conv)
        u, delta, a, b, c = self._select(z)
        y, ssm = selective_step(u[:, 0], delta[:, 0], a, b[:, 0], c[:, 0], state.ssm)
        return self._outputs(y[:, None], z, gate)[:, 0].astype(x.dtype), MambaState(window, ssm)

    def _inputs(self, x: Array, mask: Array | None, window: Array) -> tuple[Array, Array, Array]:
        z, gate = jnp.split(self.in_proj(x), 2, axis=-1)
        z, window = self.conv(z, mask=mask, state=window)
        return jax.nn.silu(z), gate, window

    def _select(self, z: Array) -> tuple[Array, Array, Array, Array, Array]:
        """z [B, T, M] -> u, Delta [B, T, M], A [M, N], B, C [B, T, N]."""
        dt, b, c = jnp.split(self.x_proj(z), self.splits, axis=-1)
        wide = scan.compute_dtype(z)
        delta = jax.nn.softplus(self.dt_proj(dt).astype(wide) + self.dt_bias)
        return z.astype(wide), delta, -jnp.exp(self.a_log), b.astype(wide), c.astype(wide)

    def _outputs(self, y: Array, z: Array, gate: Array) -> Array:
        y = (y + self.skip * z) * jax.nn.silu(gate.astype(y.dtype))
        return self.out_proj(y.astype(z.dtype))

    def _validate(self) -> None:
        rank = self.dt_rank
        checks = [
            ("features", self.features, self.features >= 1, "a whole number >= 1"),
            ("d_state", self.d_state, self.d_state >= 1, "a whole number >= 1"),
            ("expand", self.expand, self.channels >= 1, "at least one channel"),
            ("dt_rank", rank, rank is None or rank >= 1, "None or a whole number >= 1"),
            ("conv_size", self.conv_size, self.conv_size >= 1, "a whole number >= 1"),
            ("delta_range", self.delta_range, 0 < self.delta_range[0] <= self.delta_range[1], "0 < low <= high"),
        ]
        for name, value, ok, expected in checks:
            if not ok:
                raise UserError(f"Mamba.{name}={value!r}: expected {expected}")
