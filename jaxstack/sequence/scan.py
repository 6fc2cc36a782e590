"""Linear and Moebius recurrences over time in three forms, with adjoints that are scans themselves.

    affine    h_t = a_t h_{t-1} + b_t
    Moebius   lam_t = lam_{t-1} / (abar^2 + pbar lam_{t-1}) + phi_t

The second is the precision of a scalar Kalman filter (Shaj et al., 2026, arXiv 2602.10743): a fractional linear map, so
that maps compose as 2x2 matrices. Forms:

    sequential    lax.scan over T; fewest operations and the smallest error, the choice on CPU
    associative   lax.associative_scan (Blelloch, 1990): O(T) work, O(log T) depth
    chunked       totals of all chunks in parallel, one carry over T/C chunks, then all chunks in parallel again

Both recurrences have a scalar adjoint, mu_t = d_t + gain_{t+1} mu_{t+1}, so each backward pass is one reversed affine
scan of the same form: memory O(T), not O(T log T), and no adjoint of matrix products. Arithmetic is float32 at least,
whatever the inputs; float64 stays float64. Reverse mode can be nested; forward mode is not defined.
"""

import functools
import json
import math
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxstack.core.errors import UserError, unknown

METHODS = ("auto", "sequential", "associative", "chunked")
MASKED = ("freeze", "predict")


def affine_scan(
    a: ArrayLike,
    b: ArrayLike,
    h0: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    reverse: bool = False,
    axis: int = -2,
    method: str = "auto",
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """h_t = a_t h_{t-1} + b_t along `axis` -> (h, the state after the last step), both in float32 or wider.

    Shapes: b [..., T, ...] with T at `axis`; `a` broadcasts against b (it is never copied to b's size, so a gate
    [B, T, H, K, 1] may drive a matrix state [B, T, H, K, V]); h0 broadcasts to b without its time axis (zeros if None).
    mask: bool, b's axes up to and including time; where it is False the step is the identity (a=1, b=0) and what stands
    in a and b there is ignored. reverse: h_t = a_t h_{t+1} + b_t, h0 enters at the end, the last state is that of t=0.
    chunk: steps per chunk of the chunked form, about sqrt(T) by default.
    Differentiable in a, b and h0, also through the last state. Raises `UserError` for shapes that do not fit.
    """
    dtype = compute_dtype(a, b, *(() if h0 is None else (h0,)))
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    axis = _time_axis(b, axis, "b")
    a = _align(a, b, axis, "a")
    keep = _mask(mask, b, axis)
    if keep is not None:
        a, b = jnp.where(keep, a, 1.0), jnp.where(keep, b, 0.0)
    a, b = jnp.moveaxis(a, axis, 0), jnp.moveaxis(b, axis, 0)
    start = _state(0.0 if h0 is None else h0, b, dtype, "h0")
    if b.shape[0] == 0:
        return jnp.moveaxis(b, 0, axis), start
    a = jnp.broadcast_to(a, (b.shape[0], *a.shape[1:]))
    form = choose("affine", method, b.shape[0], b[0].size)
    h, last = _affine(a, b, start, form, _chunk(chunk, b.shape[0]), reverse)
    return jnp.moveaxis(h, 0, axis), last


def moebius_scan(
    phi: ArrayLike,
    abar2: ArrayLike,
    pbar: ArrayLike,
    lam0: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    masked: str = "freeze",
    axis: int = -2,
    method: str = "auto",
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """lam_t = lam_{t-1} / (abar2 + pbar lam_{t-1}) + phi_t along `axis` -> (lam, the last lam), float32 or wider.

    Shapes: phi [..., T, ...] >= 0 with T at `axis`; abar2 >= 0, pbar >= 0 and lam0 > 0 broadcast to phi without its
    time axis. mask: bool, phi's axes up to and including time; a False step keeps lam as it is (masked="freeze":
    padding) or predicts without an observation, phi = 0 (masked="predict": time passes unseen).
    lam, phi and pbar saturate at `precision_range(dtype)` (7e30 in float32), which only pbar = 0 or absurd inputs
    reach; the gradient there is zero. Differentiable in phi, abar2, pbar, lam0, also through the last lam. Raises
    `UserError`.
    """
    dtype = compute_dtype(phi, abar2, pbar, lam0)
    phi = jnp.asarray(phi, dtype)
    axis = _time_axis(phi, axis, "phi")
    keep = _mask(mask, phi, axis)
    if masked not in MASKED:
        raise unknown("treatment of masked steps", masked, MASKED)
    if keep is not None:
        phi, keep = jnp.where(keep, phi, 0.0), jnp.moveaxis(keep, axis, 0)
    phi, pbar = bounded(jnp.moveaxis(phi, axis, 0), jnp.asarray(pbar, dtype))
    lam0 = _state(lam0, phi, dtype, "lam0")
    abar2, pbar = (_coefficient(x, phi, dtype, n) for x, n in ((abar2, "abar2"), (pbar, "pbar")))
    if phi.shape[0] == 0:
        return jnp.moveaxis(phi, 0, axis), lam0
    if keep is not None and masked == "freeze":
        abar2, pbar = jnp.where(keep, abar2, 1.0), jnp.where(keep, pbar, 0.0)
    form = choose("moebius", method, phi.shape[0], phi[0].size)
    lam, last = _moebius(phi, abar2, pbar, lam0, form, _chunk(chunk, phi.shape[0]))
    return jnp.moveaxis(lam, 0, axis), last


def compute_dtype(*arrays: ArrayLike) -> Any:
    """The type in which a scan computes: float32, or float64 if an array has it. Raises `UserError` for complex."""
    dtype = jnp.result_type(*arrays, jnp.float32)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"a scan takes real numbers, found {dtype}")
    return dtype


def own_adjoint(*static: int) -> Callable[[Callable[..., Any]], Any]:
    """Decorator for a function whose gradient `defvjp` gives; `static`: positions of arguments that are not data."""
    return functools.partial(jax.custom_vjp, nondiff_argnums=static)


def precision_range(dtype: Any) -> tuple[float, float]:
    """Least and greatest precision that the filter holds: max(dtype)^(-0.8) and max(dtype)^0.8."""
    high = float(jnp.finfo(dtype).max) ** 0.8
    return 1.0 / high, high


def bounded(phi: Array, pbar: Array) -> tuple[Array, Array]:
    """phi and pbar, saturated so that products of maps stay in range."""
    high = precision_range(phi.dtype)[1]
    return jnp.minimum(phi, high), jnp.minimum(pbar, high)


def choose(recurrence: str, method: str, length: int, lanes: int, methods: tuple[str, ...] = METHODS) -> str:
    """The form to run. "auto": on a measured backend the fastest at the nearest size of scan_table.json (written by
    scripts/bench_scan.py); on others, where a sequential step costs a kernel launch, chunked from T = 64 on."""
    if method not in methods:
        raise unknown("scan method", method, methods)
    if method != "auto":
        return method
    rows = _table().get(jax.default_backend(), {}).get(recurrence)
    if not rows:
        return "chunked" if length >= 64 else "sequential"
    size = (math.log2(max(length, 1)), math.log2(max(lanes, 1)))
    return min(rows, key=lambda r: math.hypot(math.log2(r["length"]) - size[0], math.log2(r["lanes"]) - size[1]))[
        "best"
    ]


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return json.loads(resources.files("jaxstack.sequence").joinpath("scan_table.json").read_text())


# ---------------------------------------------------------------- shapes


def _time_axis(x: Array, axis: int, name: str) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise UserError(f"{name} has shape {x.shape}: there is no time axis {axis}")
    return axis % x.ndim


def _align(a: Array, b: Array, axis: int, name: str) -> Array:
    try:
        fits = jnp.broadcast_shapes(a.shape, b.shape) == b.shape
    except ValueError:
        fits = False
    if not fits:
        raise UserError(f"{name} has shape {a.shape}: expected one that broadcasts to {b.shape} (time axis {axis})")
    return a.reshape((1,) * (b.ndim - a.ndim) + a.shape)


def _mask(mask: ArrayLike | None, x: Array, axis: int) -> Array | None:
    """mask [..., T] -> bool with the rank of x."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_ or mask.ndim > axis + 1 or mask.ndim == 0 or mask.shape[-1] != x.shape[axis]:
        raise UserError(f"mask has shape {mask.shape}, type {mask.dtype}: expected bool {x.shape[: axis + 1]}")
    return _align(mask.reshape(*mask.shape, *[1] * (x.ndim - axis - 1)), x, axis, "mask")


def _state(h0: ArrayLike, b: Array, dtype: Any, name: str) -> Array:
    try:
        return jnp.broadcast_to(jnp.asarray(h0, dtype), b.shape[1:])
    except ValueError:
        raise UserError(f"{name} has shape {jnp.shape(h0)}: expected one that broadcasts to {b.shape[1:]}") from None


def _coefficient(x: ArrayLike, b: Array, dtype: Any, name: str) -> Array:
    """[...] -> [1, ...] with the rank of b: constant over time, not copied over the batch."""
    x = jnp.asarray(x, dtype)
    _state(x, b, dtype, name)
    return x.reshape((1,) * (b.ndim - x.ndim) + x.shape)


def _chunk(chunk: int | None, length: int) -> int:
    if chunk is None:
        return 2 ** max(round(math.log2(max(length, 1)) / 2), 0)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise UserError(f"chunk={chunk!r}: expected a whole number >= 1")
    return min(chunk, length)


def _fold(x: Array, chunk: int, fill: float) -> Array:
    """[T, ...] -> [C, N, ...] with x[c, n] at time n C + c, padded at the end with `fill`."""
    pad = -x.shape[0] % chunk
    x = jnp.concatenate([x, jnp.full((pad, *x.shape[1:]), fill, x.dtype)]) if pad else x
    return jnp.swapaxes(x.reshape(-1, chunk, *x.shape[1:]), 0, 1)


def _unfold(x: Array, length: int) -> Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:length]


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    axes = tuple(i for i, (n, m) in enumerate(zip(x.shape, shape)) if n != m)
    return x.sum(axes, keepdims=True) if axes else x


# ---------------------------------------------------------------- affine


def _affine_step(h: Array, ab: tuple[Array, Array]) -> tuple[Array, Array]:
    h = ab[0] * h + ab[1]
    return h, h


def _affine_compose(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
    return then[0] * first[0], then[0] * first[1] + then[1]


@own_adjoint(3, 4, 5)
def _affine(a: Array, b: Array, h0: Array, form: str, chunk: int, reverse: bool) -> tuple[Array, Array]:
    """a, b [T, ...] with a's other axes broadcasting, h0 [...] -> (h [T, ...], last state)."""
    if form == "sequential":
        last, h = jax.lax.scan(_affine_step, h0, (a, b), reverse=reverse)
        return h, last
    if reverse:
        h, last = _affine(a[::-1], b[::-1], h0, form, chunk, False)
        return h[::-1], last
    if form == "associative":
        b = b.at[0].add(a[0] * h0)
        h = jax.lax.associative_scan(_affine_compose, (a, b))[1]
        return h, h[-1]
    length = b.shape[0]
    a, b = _fold(a, chunk, 1.0), _fold(b, chunk, 0.0)
    identity = (jnp.ones_like(a[0]), jnp.zeros_like(b[0]))
    total, _ = jax.lax.scan(lambda m, ab: (_affine_compose(m, ab), None), identity, (a, b))
    _, starts = jax.lax.scan(lambda h, ab: (ab[0] * h + ab[1], h), h0, total)
    h = _unfold(jax.lax.scan(_affine_step, starts, (a, b))[1], length)
    return h, h[-1]


def _affine_fwd(a: Array, b: Array, h0: Array, form: str, chunk: int, reverse: bool) -> Any:
    h, last = _affine(a, b, h0, form, chunk, reverse)
    return (h, last), (a, h, h0)


def _affine_bwd(form: str, chunk: int, reverse: bool, saved: Any, cotangent: Any) -> tuple[Array, Array, Array]:
    a, h, h0 = saved
    d, d_last = cotangent
    first, final = (-1, 0) if reverse else (0, -1)
    d = d.at[final].add(d_last)
    zero = jnp.zeros_like(a[:1])
    gain = jnp.concatenate([zero, a[:-1]] if reverse else [a[1:], zero])
    mu, _ = _affine(gain, d, jnp.zeros_like(h0), form, chunk, not reverse)
    before = jnp.concatenate([h[1:], h0[None]] if reverse else [h0[None], h[:-1]])
    return _sum_to(mu * before, a.shape), mu, a[first] * mu[first]


_affine.defvjp(_affine_fwd, _affine_bwd)


# ---------------------------------------------------------------- Moebius


class _Map(NamedTuple):
    """lam -> (a lam + b) / (c lam + d), known up to a common factor."""

    a: Array
    b: Array
    c: Array
    d: Array


def _compose(first: _Map, then: _Map) -> _Map:
    """`then` after `first`, divided by its trace: entries are >= 0 and products of such maps stay so, hence the trace
    is positive, a, d <= 1 and b c < 1/4 (the determinant, a product of abar^2, is positive)."""
    a, b = then.a * first.a + then.b * first.c, then.a * first.b + then.b * first.d
    c, d = then.c * first.a + then.d * first.c, then.c * first.b + then.d * first.d
    scale = 1.0 / (a + d)
    return _Map(a * scale, b * scale, c * scale, d * scale)


def _leaf(phi: Array, abar2: Array, pbar: Array) -> _Map:
    """One step, divided by its trace as products are: two undivided maps of precise observations (pbar phi of 1e20 in
    float32) would overflow when they meet. The transition is divided first, so that pbar phi does not overflow."""
    one = 1.0 / (1.0 + pbar + abar2)
    c, d = one * pbar, one * abar2
    a = one + c * phi
    scale = 1.0 / (a + d)
    return _Map(a * scale, d * phi * scale, c * scale, d * scale)


def _apply(m: _Map, lam: Array) -> Array:
    low, high = precision_range(lam.dtype)
    return jnp.clip((m.a * lam + m.b) / jnp.maximum(m.c * lam + m.d, low), low, high)


def predict_precision(lam: Array, abar2: Array, pbar: Array) -> Array:
    """Precision after the transition and before the observation: 1 / (abar2 / lam + pbar), saturating. The divisor is
    kept above 4e-16 (float32), so that its inverse squared, which gradients need, is finite."""
    low, high = precision_range(lam.dtype)
    return jnp.minimum(lam / jnp.maximum(abar2 + pbar * lam, low**0.5), high)


def _moebius_step(lam: Array, phi: Array, abar2: Array, pbar: Array) -> Array:
    low, high = precision_range(lam.dtype)
    return jnp.clip(predict_precision(lam, abar2, pbar) + phi, low, high)


def _constant(x: Array, like: Array) -> bool:
    """Whether a coefficient [1 or T, ...] is the same at all steps."""
    return x.shape[0] == 1 and like.shape[0] != 1


def _scan_moebius(phi: Array, abar2: Array, pbar: Array, lam0: Array) -> tuple[Array, Array]:
    fixed = _constant(abar2, phi)

    def body(lam: Array, xs: Any) -> tuple[Array, Array]:
        lam = _moebius_step(lam, xs[0], *((abar2[0], pbar[0]) if fixed else xs[1:]))
        return lam, lam

    return jax.lax.scan(body, lam0, (phi,) if fixed else (phi, abar2, pbar))


@own_adjoint(4, 5)
def _moebius(phi: Array, abar2: Array, pbar: Array, lam0: Array, form: str, chunk: int) -> tuple[Array, Array]:
    """phi [T, ...], abar2 and pbar [1 or T, ...], lam0 [...] -> (lam [T, ...], last lam)."""
    if form == "sequential":
        last, lam = _scan_moebius(phi, abar2, pbar, lam0)
        return lam, last
    if form == "associative":
        maps = jax.lax.associative_scan(_compose, _leaf(phi, abar2, pbar))
        lam = _apply(maps, lam0)
        return lam, lam[-1]
    length = phi.shape[0]
    fixed = _constant(abar2, phi) and length % chunk == 0
    if not fixed:  # the padding needs abar2 = 1, pbar = 0
        abar2, pbar = (jnp.broadcast_to(x, (length, *x.shape[1:])) for x in (abar2, pbar))
        abar2, pbar = _fold(abar2, chunk, 1.0), _fold(pbar, chunk, 0.0)
    phi = _fold(phi, chunk, 0.0)

    def total(m: _Map, xs: Any) -> tuple[_Map, None]:
        return _compose(m, _leaf(xs[0], *((abar2, pbar) if fixed else xs[1:]))), None

    one, zero = jnp.ones_like(phi[0]), jnp.zeros_like(phi[0])
    totals, _ = jax.lax.scan(total, _Map(one, zero, zero, one), (phi,) if fixed else (phi, abar2, pbar))
    _, starts = jax.lax.scan(lambda lam, m: (_apply(m, lam), lam), lam0, totals)
    abar2, pbar = (abar2[None], pbar[None]) if fixed else (abar2, pbar)
    lam = _unfold(_scan_moebius(phi, abar2, pbar, starts)[1], length)
    return lam, lam[-1]


def _moebius_fwd(phi: Array, abar2: Array, pbar: Array, lam0: Array, form: str, chunk: int) -> Any:
    lam, last = _moebius(phi, abar2, pbar, lam0, form, chunk)
    return (lam, last), (lam, abar2, pbar, lam0)


def _moebius_bwd(form: str, chunk: int, saved: Any, cotangent: Any) -> tuple[Array, Array, Array, Array]:
    lam, abar2, pbar, lam0 = saved
    d, d_last = cotangent
    low, high = precision_range(lam.dtype)
    before = jnp.concatenate([lam0[None], lam[:-1]])
    inside = (lam > low) & (lam < high)
    rho = jnp.where(inside, 1.0 / jnp.maximum(abar2 + pbar * before, low**0.5), 0.0)
    gain = abar2 * rho * rho
    shifted = jnp.concatenate([gain[1:], jnp.zeros_like(gain[:1])])
    nu, _ = _affine(shifted, d.at[-1].add(d_last), jnp.zeros_like(lam0), form, chunk, True)
    pull = -nu * rho * rho * before
    return jnp.where(inside, nu, 0.0), _sum_to(pull, abar2.shape), _sum_to(pull * before, pbar.shape), gain[0] * nu[0]


_moebius.defvjp(_moebius_fwd, _moebius_bwd)
