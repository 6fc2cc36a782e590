"""One step of the scalar Kalman filters of Kalman Linear Attention, its hand-written adjoint, and their scan over time.

Every (channel m, state s) pair is a scalar filter that sees v_m through k_s (Shaj et al., 2026, arXiv 2602.10743):

    z_t ~ N(abar z_{t-1}, pbar)        v_t ~ N(k_t z_t, 1/Lambda_t)
    lam-_t = lam_{t-1} / (abar^2 + pbar lam_{t-1})              lam_t = lam-_t + k_t^2 Lambda_t
    mu_t   = (abar lam-_t / lam_t) mu_{t-1} + (k_t Lambda_t / lam_t) v_t
    y_t    = sum_s q_t mu_t,   var_t = sum_s q_t^2 / lam_t      (read="prior": of abar mu_t, abar^2 / lam_t + pbar)

The mean is carried instead of the information vector eta = lam mu: its coefficients stay in [0, abar], where those of
eta exceed 1 and overflow once pbar is small. `filter_step` and `filter_step_grad` serve the scan here and the GPU/TPU
kernels of scan_pallas.py. State arrays are [.., S, M]: with channels innermost the sums over S are vector additions
(which makes the scan up to 2.5 times faster on CPU than S innermost does), and channels fill the lanes of a TPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.sequence.scan import own_adjoint, precision_range

SPAN = 32
"""Steps between the states that the scan keeps for its backward pass, which recomputes the others."""


class Token(NamedTuple):
    """What one time step sees, shaped to broadcast against a state [.., S, M]."""

    v: Array
    """Values [.., 1, M]."""
    precision: Array
    """Observation precision Lambda >= 0 [.., 1, M]."""
    k: Array
    """Keys [.., S, 1]."""
    q: Array
    """Queries [.., S, 1]."""


class _Quantities(NamedTuple):
    rho: Array
    before: Array
    lam: Array
    kept: Array
    gain: Array
    mean: Array


def _update(lam: Array, mean: Array, token: Token, abar: Array, pbar: Array) -> _Quantities:
    low, high = precision_range(lam.dtype)
    rho = 1.0 / jnp.maximum(abar * abar + pbar * lam, low**0.5)
    before = jnp.minimum(lam * rho, high)
    after = jnp.clip(before + token.k * token.k * token.precision, low, high)
    kept, gain = before / after, token.k * token.precision / after
    return _Quantities(rho, before, after, kept, gain, abar * kept * mean + gain * token.v)


def filter_step(
    lam: Array, mean: Array, token: Token, abar: Array, pbar: Array, *, prior: bool
) -> tuple[Array, Array, Array, Array]:
    """State lam, mean [.., S, M], coefficients that broadcast to it -> (lam, mean, y, variance of y [.., 1, M])."""
    new = _update(lam, mean, token, abar, pbar)
    mu, var = new.mean, 1.0 / new.lam
    if prior:
        mu, var = abar * mu, abar * abar * var + pbar
    y = (token.q * mu).sum(-2, keepdims=True)
    return new.lam, new.mean, y, (token.q * token.q * var).sum(-2, keepdims=True)


class StepGrad(NamedTuple):
    """Cotangents of `filter_step`'s inputs; abar's and pbar's have the state's shape (not summed over the batch)."""

    lam: Array
    mean: Array
    token: Token
    abar: Array
    pbar: Array


def filter_step_grad(
    lam: Array,
    mean: Array,
    token: Token,
    abar: Array,
    pbar: Array,
    cotangent: tuple[Array, Array, Array, Array],
    *,
    prior: bool,
    over_channels: Callable[[Array], Array] = lambda x: x.sum(-1, keepdims=True),
) -> StepGrad:
    """Adjoint of `filter_step` at its inputs, for cotangents of (lam, mean, y, variance); `over_channels` sums
    [.., S, M] -> [.., S, 1].

    From mu = (abar lam- m + k Lambda v) / lam: d mu / d lam = -mu / lam, d mu / d lam- = abar m / lam.
    """
    low, high = precision_range(lam.dtype)
    v, precision, k, q = token
    d_lam, d_mean, d_y, d_var = cotangent
    new = _update(lam, mean, token, abar, pbar)
    var = 1.0 / new.lam
    d_read = q * q * d_var
    if prior:
        d_q = abar * new.mean * d_y + 2.0 * q * (abar * abar * var + pbar) * d_var
        d_abar = q * new.mean * d_y + 2.0 * abar * var * d_read
        d_pbar, d_mean, d_read = d_read, d_mean + q * abar * d_y, abar * abar * d_read
    else:
        d_q = new.mean * d_y + 2.0 * q * var * d_var
        d_abar, d_pbar, d_mean = 0.0, 0.0, d_mean + q * d_y
    per_lam = d_mean * var
    d_lam = d_lam - d_read * var * var - per_lam * new.mean
    d_lam = jnp.where((new.lam > low) & (new.lam < high), d_lam, 0.0)
    rho = jnp.where(new.before < high, new.rho, 0.0)
    d_before = d_lam + per_lam * abar * mean
    through = d_before * rho * rho
    return StepGrad(
        lam=through * abar * abar,
        mean=d_mean * abar * new.kept,
        token=Token(
            v=(new.gain * d_mean).sum(-2, keepdims=True),
            precision=(k * k * d_lam + per_lam * k * v).sum(-2, keepdims=True),
            k=over_channels(precision * (2.0 * k * d_lam + per_lam * v)),
            q=over_channels(d_q),
        ),
        abar=d_abar + d_mean * mean * new.kept - 2.0 * abar * lam * through,
        pbar=d_pbar - lam * (lam * through),
    )


def hold(abar: Array, pbar: Array, keep: Array | None) -> tuple[Array, Array]:
    """Coefficients of a step that a padded token leaves out: abar = 1 and pbar = 0 where `keep` is 0."""
    if keep is None:
        return abar, pbar
    return jnp.where(keep > 0, abar, 1.0), jnp.where(keep > 0, pbar, 0.0)


@own_adjoint(6)
def filter_scan(
    tokens: Token, keep: Array | None, abar: Array, pbar: Array, lam: Array, mean: Array, prior: bool
) -> tuple[Array, Array, Array, Array]:
    """The filter as one lax.scan; nothing of size T M S is stored unless a gradient is asked for.

    tokens: v, precision [T, B, 1, M], k, q [T, B, S, 1]; keep [T, B, 1, 1] in {0, 1} or None; abar, pbar [S, M];
    lam, mean [B, S, M] -> (y [T, B, 1, M], variance [T, B, 1, M], last lam, last mean).
    """

    def body(state: Any, xs: Any) -> Any:
        a, p = hold(abar, pbar, xs[1])
        lam, mean, y, var = filter_step(state[0], state[1], xs[0], a, p, prior=prior)
        return (lam, mean), (y, var)

    (lam, mean), (y, var) = jax.lax.scan(body, (lam, mean), (tokens, keep))
    return y, var, lam, mean


def _filter_fwd(
    tokens: Token, keep: Array | None, abar: Array, pbar: Array, lam: Array, mean: Array, prior: bool
) -> Any:
    """A step added at the end is one that padding leaves out: it changes nothing."""
    length = tokens.v.shape[0]
    span = min(SPAN, length)
    if length % span and keep is None:
        keep = jnp.ones((length, 1, 1, 1), lam.dtype)
    spans = jax.tree.map(lambda x: _spans(x, span), (tokens, keep))

    def body(state: Any, part: Any) -> Any:
        y, var, *last = filter_scan(*part, abar, pbar, *state, prior)
        return tuple(last), (y, var, state)

    (lam, mean), (y, var, starts) = jax.lax.scan(body, (lam, mean), spans)
    return (_whole(y, length), _whole(var, length), lam, mean), (spans, abar, pbar, starts)


def _filter_bwd(prior: bool, saved: Any, cotangent: Any) -> Any:
    spans, abar, pbar, starts = saved
    d_y, d_var, d_lam, d_mean = cotangent
    length, span = d_y.shape[0], spans[0].v.shape[1]

    def forward(state: Any, xs: Any) -> Any:
        a, p = hold(abar, pbar, xs[1])
        return filter_step(state[0], state[1], xs[0], a, p, prior=prior)[:2], state

    def backward(carry: Any, xs: Any) -> Any:
        d_lam, d_mean, d_abar, d_pbar = carry
        (token, keep), state, d_y, d_var = xs
        a, p = hold(abar, pbar, keep)
        cotangent = (d_lam, d_mean, d_y, d_var)
        grad = filter_step_grad(
            state[0], state[1], token, a, p, cotangent, prior=prior, over_channels=_product_with_ones
        )
        on = 1.0 if keep is None else keep
        return (grad.lam, grad.mean, d_abar + on * grad.abar, d_pbar + on * grad.pbar), grad.token

    def body(carry: Any, xs: Any) -> Any:
        part, start, d_y, d_var = xs
        _, states = jax.lax.scan(forward, start, part)
        return jax.lax.scan(backward, carry, (part, states, d_y, d_var), reverse=True)

    zero = jnp.zeros_like(d_lam)
    xs = (spans, starts, _spans(d_y, span), _spans(d_var, span))
    carry, d_tokens = jax.lax.scan(body, (d_lam, d_mean, zero, zero), xs, reverse=True)
    d_lam, d_mean, d_abar, d_pbar = carry
    d_tokens = jax.tree.map(lambda x: _whole(x, length), d_tokens)
    return d_tokens, None, d_abar.sum(0), d_pbar.sum(0), d_lam, d_mean


filter_scan.defvjp(_filter_fwd, _filter_bwd)


def _product_with_ones(x: Array) -> Array:
    """Sum over the innermost axis, which is kept. XLA's CPU compiler makes one chain of additions of a plain sum."""
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision=jax.lax.Precision.HIGHEST)


def _spans(x: Array, span: int) -> Array:
    """[T, ...] -> [ceil(T / span), span, ...], zeros at the end."""
    x = jnp.pad(x, ((0, -x.shape[0] % span), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(-1, span, *x.shape[1:])


def _whole(x: Array, length: int) -> Array:
    """Inverse of `_spans`."""
    return x.reshape(-1, *x.shape[2:])[:length]
