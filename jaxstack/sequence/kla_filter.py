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

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

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


def _predict(lam: Array, abar: Array, pbar: Array) -> tuple[Array, Array]:
    """(lam- / lam, lam-)"""
    low, high = precision_range(lam.dtype)
    rho = 1.0 / jnp.maximum(abar * abar + pbar * lam, low**0.5)
    return rho, jnp.minimum(lam * rho, high)


def _update(lam: Array, mean: Array, token: Token, abar: Array, pbar: Array) -> tuple[Array, Array]:
    low, high = precision_range(lam.dtype)
    _, before = _predict(lam, abar, pbar)
    after = jnp.clip(before + token.k * token.k * token.precision, low, high)
    kept, gain = before / after, token.k * token.precision / after
    return after, abar * kept * mean + gain * token.v


def _read(lam: Array, mean: Array, abar: Array, pbar: Array, prior: bool) -> tuple[Array, Array]:
    """Mean and variance that a query weighs, from the state after the step."""
    var = 1.0 / lam
    return (abar * mean, abar * abar * var + pbar) if prior else (mean, var)


def filter_step(
    lam: Array, mean: Array, token: Token, abar: Array, pbar: Array, *, prior: bool
) -> tuple[Array, Array, Array, Array]:
    """State lam, mean [.., S, M], coefficients that broadcast to it -> (lam, mean, y, variance of y [.., 1, M])."""
    lam, mean = _update(lam, mean, token, abar, pbar)
    mu, var = _read(lam, mean, abar, pbar, prior)
    y = (token.q * mu).sum(-2, keepdims=True)
    return lam, mean, y, (token.q * token.q * var).sum(-2, keepdims=True)


class StepGrad(NamedTuple):
    """Cotangents of `filter_step`'s inputs; abar's and pbar's have the state's shape (not summed over the batch)."""

    lam: Array
    mean: Array
    token: Token
    abar: Array
    pbar: Array


class Sums(NamedTuple):
    """The weighted sums of `filter_step_grad`."""

    over_states: Callable[[Array, Array], Array]
    """Weights [.., S, 1], x [.., S, M] -> [.., 1, M]."""
    over_channels: Callable[[Array, Array], Array]
    """x [.., S, M], weights [.., 1, M] -> [.., S, 1]."""


PLAIN = Sums(lambda w, x: (w * x).sum(-2, keepdims=True), lambda x, w: (x * w).sum(-1, keepdims=True))


def filter_step_grad(
    lam: Array,
    mean: Array,
    token: Token,
    abar: Array,
    pbar: Array,
    cotangent: tuple[Array, Array, Array, Array],
    *,
    prior: bool,
    after: tuple[Array, Array] | None = None,
    sums: Sums = PLAIN,
) -> StepGrad:
    """Adjoint of `filter_step` at its inputs, for cotangents of (lam, mean, y, variance); `after` is the state that
    the step returned, computed if None.

    From mu = (abar lam- m + k Lambda v) / lam: d mu / d lam = -mu / lam, d mu / d lam- = abar m / lam.
    """
    low, high = precision_range(lam.dtype)
    v, precision, k, q = token
    d_lam, d_mean, d_y, d_var = cotangent
    new_lam, new_mean = _update(lam, mean, token, abar, pbar) if after is None else after
    rho, before = _predict(lam, abar, pbar)
    var = 1.0 / new_lam
    kept = before * var
    d_read = q * q * d_var
    if prior:
        d_abar = q * new_mean * d_y + 2.0 * abar * var * d_read
        d_pbar, d_mean, d_read = d_read, d_mean + q * abar * d_y, abar * abar * d_read
    else:
        d_abar, d_pbar, d_mean = 0.0, 0.0, d_mean + q * d_y
    per_lam = d_mean * var
    d_lam = d_lam - d_read * var * var - per_lam * new_mean
    d_lam = jnp.where((new_lam > low) & (new_lam < high), d_lam, 0.0)
    rho = jnp.where(before < high, rho, 0.0)
    d_before = d_lam + per_lam * abar * mean
    through = d_before * rho * rho
    d_gain = sums.over_states(k, per_lam)
    return StepGrad(
        lam=through * abar * abar,
        mean=d_mean * abar * kept,
        token=Token(
            v=precision * d_gain,
            precision=sums.over_states(k * k, d_lam) + v * d_gain,
            k=sums.over_channels(2.0 * k * d_lam + per_lam * v, precision),
            q=_query_grad(new_lam, new_mean, q, abar, pbar, d_y, d_var, prior, sums),
        ),
        abar=d_abar + d_mean * mean * kept - 2.0 * abar * lam * through,
        pbar=d_pbar - lam * (lam * through),
    )


def _query_grad(
    lam: Array, mean: Array, q: Array, abar: Array, pbar: Array, d_y: Array, d_var: Array, prior: bool, sums: Sums
) -> Array:
    """From the state after the step."""
    mu, var = _read(lam, mean, abar, pbar, prior)
    return sums.over_channels(mu, d_y) + 2.0 * q * sums.over_channels(var, d_var)


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
    """One sequence goes without its batch axis: XLA's CPU compiler drops an axis of one element from products only, and
    then computes what enters a product again for every other use of it."""
    spans, abar, pbar, starts = saved
    alone = starts[0].shape[1] == 1
    squeeze = lambda tree: jax.tree.map(lambda x: x.squeeze(-3), tree) if alone else tree
    widen = lambda tree: jax.tree.map(lambda x: jnp.expand_dims(x, -3), tree) if alone else tree
    grads = _adjoint(prior, squeeze(spans), abar, pbar, squeeze(starts), squeeze(cotangent))
    d_tokens, d_abar, d_pbar, *d_state = grads
    return widen(d_tokens), None, d_abar, d_pbar, *widen(d_state)


def _adjoint(prior: bool, spans: Any, abar: Array, pbar: Array, starts: Any, cotangent: Any) -> Any:
    """Span by span from the last: forward again, then back. The states of a span are written into one buffer that all
    spans share; the scan's own outputs would be filled with zeros again for every span."""
    d_y, d_var, d_lam, d_mean = cotangent
    length, span = d_y.shape[0], spans[0].v.shape[1]
    steps = jnp.arange(span, dtype=jnp.uint32)

    def forward(carry: Any, xs: Any) -> Any:
        state, states = carry
        (token, keep), t, d_y, d_var = xs
        a, p = hold(abar, pbar, keep)
        lam, mean = _update(state[0], state[1], token, a, p)
        d_q = _query_grad(lam, mean, token.q, a, p, d_y, d_var, prior, PRODUCTS)
        return ((lam, mean), _put(states, t, state)), d_q

    def backward(states: Any, carry: Any, xs: Any) -> Any:
        d_lam, d_mean, d_abar, d_pbar = carry
        (token, keep), t, d_y, d_var = xs
        a, p = hold(abar, pbar, keep)
        (lam, mean), after = _take(states, t), _take(states, t + 1)
        cotangent = (d_lam, d_mean, d_y, d_var)
        grad = filter_step_grad(lam, mean, token, a, p, cotangent, prior=prior, after=after, sums=PRODUCTS)
        on = 1.0 if keep is None else keep
        return (grad.lam, grad.mean, d_abar + on * grad.abar, d_pbar + on * grad.pbar), grad.token._replace(q=None)

    def body(carry: Any, xs: Any) -> Any:
        grads, states = carry
        part, start, d_y, d_var = xs
        inner = (part, steps, d_y, d_var)
        (last, states), d_q = jax.lax.scan(forward, (start, states), inner)
        states = _put(states, span, last)
        grads, d_tokens = jax.lax.scan(functools.partial(backward, states), grads, inner, reverse=True)
        return (grads, states), d_tokens._replace(q=d_q)

    zero = jnp.zeros_like(d_lam)
    states = (jnp.zeros((span + 1, *d_lam.shape), d_lam.dtype),) * 2
    xs = (spans, starts, _spans(d_y, span), _spans(d_var, span))
    (grads, _), d_tokens = jax.lax.scan(body, ((d_lam, d_mean, zero, zero), states), xs, reverse=True)
    d_lam, d_mean, *d_coefficients = grads
    d_abar, d_pbar = (x.sum(tuple(range(x.ndim - 2))) for x in d_coefficients)
    return jax.tree.map(lambda x: _whole(x, length), d_tokens), d_abar, d_pbar, d_lam, d_mean


filter_scan.defvjp(_filter_fwd, _filter_bwd)


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


PRODUCTS = Sums(lambda w, x: _product(jnp.swapaxes(w, -1, -2), x), lambda x, w: _product(x, jnp.swapaxes(w, -1, -2)))
"""As products. XLA's CPU compiler makes scalar code of a plain sum and computes all that is summed within it."""


def _put(states: Any, t: ArrayLike, state: Any) -> Any:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, t, 0), states, state)


def _take(states: Any, t: ArrayLike) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, t, 0, keepdims=False), states)


def _spans(x: Array, span: int) -> Array:
    """[T, ...] -> [ceil(T / span), span, ...], zeros at the end."""
    x = jnp.pad(x, ((0, -x.shape[0] % span), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(-1, span, *x.shape[1:])


def _whole(x: Array, length: int) -> Array:
    """Inverse of `_spans`."""
    return x.reshape(-1, *x.shape[2:])[:length]
