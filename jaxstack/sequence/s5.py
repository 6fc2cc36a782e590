"""S5 (Smith, Warrington and Linderman, 2023, arXiv 2208.04933): one linear state-space model with many inputs and
outputs, diagonal and complex, discretised by zero-order hold with a learned step for every state.

    x_t = Lbar x_{t-1} + Bbar u_t        y_t = 2 Re(C x_t) + D u_t
    Lbar = exp(Lambda Delta)             Bbar = Lambda^-1 (Lbar - 1) B

States come in conjugate pairs, of which one is kept: P states are P/2 complex numbers. Complex numbers are pairs of
real arrays throughout, which every backend and optimiser takes. `complex_scan` is the recurrence, `S5` the layer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxstack.core.errors import UserError
from jaxstack.sequence import scan
from jaxstack.sequence.mixer import LINEAR, begin, check_sequence, check_state, finish
from jaxstack.sequence.scan import _chunk, _fold, _sum_to, _unfold

DECAY_MIN = 1e-4
"""Least -Re(Lambda): the eigenvalues are clipped into the left half plane, so that no state can grow."""


class Complex(NamedTuple):
    """Real and imaginary part."""

    re: Array
    im: Array


def _times(x: Complex, y: Complex) -> Complex:
    return Complex(x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re)


def _plus(x: Complex, y: Complex) -> Complex:
    return Complex(x.re + y.re, x.im + y.im)


def _conj(x: Complex) -> Complex:
    return Complex(x.re, -x.im)


# ---------------------------------------------------------------- scan


def complex_scan(
    a: Complex,
    b: Complex,
    x0: Complex,
    *,
    mask: ArrayLike | None = None,
    method: str = "auto",
    chunk: int | None = None,
) -> tuple[Complex, Complex]:
    """x_t = a x_{t-1} + b_t: a [P] (the same at all steps), b [B, T, P], x0 [B, P] -> (x [B, T, P], the last x [B, P]).

    mask bool [B, T]: at False x stays and what stands in b is ignored. method, chunk: see `scan.affine_scan`; "auto" is
    its choice too. Differentiable in a, b and x0. Raises `UserError` for shapes that do not fit.
    """
    dtype = scan.compute_dtype(*a, *b, *x0)
    a, b, x0 = jax.tree.map(lambda x: jnp.asarray(x, dtype), (a, b, x0))
    if b.re.ndim != 3:
        raise UserError(f"b has shape {b.re.shape}: expected [batch, time, P]")
    batch, length, width = b.re.shape
    expected = {"b": (b, (batch, length, width)), "a": (a, (width,)), "x0": (x0, (batch, width))}
    for name, (pair, shape) in expected.items():
        if pair.re.shape != shape or pair.im.shape != shape:
            raise UserError(f"{name} has shapes {pair.re.shape}, {pair.im.shape}: expected {shape}")
    b = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), b)
    a = jax.tree.map(lambda x: jnp.broadcast_to(x, (length, 1, width)), a)
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != (batch, length) or mask.dtype != jnp.bool_:
            raise UserError(f"mask has shape {mask.shape}, type {mask.dtype}: expected bool {(batch, length)}")
        keep = mask.T[..., None]
        a = Complex(jnp.where(keep, a.re, 1.0), jnp.where(keep, a.im, 0.0))
        b = jax.tree.map(lambda x: jnp.where(keep, x, 0.0), b)
    form = scan.choose("affine", method, length, batch * width)
    chunk = _chunk(chunk, length)
    if length == 0:
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), b), x0
    x, last = _scan(a, b, x0, form, chunk, False)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), x), last


def _advance(x: Complex, ab: tuple[Complex, Complex]) -> tuple[Complex, Complex]:
    x = _plus(_times(ab[0], x), ab[1])
    return x, x


def _compose(first: tuple[Complex, Complex], then: tuple[Complex, Complex]) -> tuple[Complex, Complex]:
    return _times(then[0], first[0]), _plus(_times(then[0], first[1]), then[1])


@scan.own_adjoint(3, 4, 5)
def _scan(a: Complex, b: Complex, x0: Complex, form: str, chunk: int, reverse: bool) -> tuple[Complex, Complex]:
    """a [T, 1 or B, P], b [T, B, P], x0 [B, P] -> (x [T, B, P], last x); the forms are those of scan.py."""
    if form == "sequential":
        last, x = jax.lax.scan(_advance, x0, (a, b), reverse=reverse)
        return x, last
    if reverse:
        x, last = _scan(*jax.tree.map(lambda t: t[::-1], (a, b)), x0, form, chunk, False)
        return jax.tree.map(lambda t: t[::-1], x), last
    if form == "associative":
        start = _plus(jax.tree.map(lambda t: t[0], b), _times(jax.tree.map(lambda t: t[0], a), x0))
        b = jax.tree.map(lambda t, s: t.at[0].set(s), b, start)
        x = jax.lax.associative_scan(_compose, (a, b))[1]
        return x, jax.tree.map(lambda t: t[-1], x)
    length = b.re.shape[0]
    a = Complex(_fold(a.re, chunk, 1.0), _fold(a.im, chunk, 0.0))
    b = jax.tree.map(lambda t: _fold(t, chunk, 0.0), b)
    one = Complex(jnp.ones_like(a.re[0]), jnp.zeros_like(a.im[0]))
    identity = (one, jax.tree.map(lambda t: jnp.zeros_like(t[0]), b))
    total, _ = jax.lax.scan(lambda m, ab: (_compose(m, ab), None), identity, (a, b))
    _, starts = jax.lax.scan(lambda x, ab: (_advance(x, ab)[0], x), x0, total)
    x = jax.tree.map(lambda t: _unfold(t, length), jax.lax.scan(_advance, starts, (a, b))[1])
    return x, jax.tree.map(lambda t: t[-1], x)


def _scan_fwd(a: Complex, b: Complex, x0: Complex, form: str, chunk: int, reverse: bool) -> Any:
    x, last = _scan(a, b, x0, form, chunk, reverse)
    return (x, last), (a, x, x0)


def _scan_bwd(form: str, chunk: int, reverse: bool, saved: Any, cotangent: Any) -> tuple[Complex, Complex, Complex]:
    """The adjoint of a product by a is the product by its conjugate; the scan then runs the other way."""
    a, x, x0 = saved
    d, d_last = cotangent
    first, final = (-1, 0) if reverse else (0, -1)
    d = jax.tree.map(lambda t, s: t.at[final].add(s), d, d_last)
    shift = lambda t, end, ahead: jnp.concatenate([t[1:], end] if ahead else [end, t[:-1]])
    gain = jax.tree.map(lambda t: shift(t, jnp.zeros_like(t[:1]), not reverse), _conj(a))
    mu, _ = _scan(gain, d, jax.tree.map(jnp.zeros_like, x0), form, chunk, not reverse)
    before = jax.tree.map(lambda t, s: shift(t, s[None], reverse), x, x0)
    d_a = jax.tree.map(lambda t: _sum_to(t, a.re.shape), _times(mu, _conj(before)))
    at_first = lambda t: jax.tree.map(lambda s: s[first], t)
    return d_a, mu, _times(at_first(mu), _conj(at_first(a)))


_scan.defvjp(_scan_fwd, _scan_bwd)


# ---------------------------------------------------------------- dynamics


@functools.lru_cache(maxsize=16)
def hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Half of the eigenvalues [size/2] of HiPPO-N and their eigenvectors [size, size/2], complex; the other half are
    conjugates.

    HiPPO-LegS is A_nk = -sqrt((2n+1)(2k+1)) (n > k), -(n+1) (n = k), 0 (n < k). Adding P P^T with P_n = sqrt(n + 1/2)
    leaves -I/2 and a skew-symmetric part: a normal matrix (appendix B.1.1 of the paper).
    """
    root = np.sqrt(2.0 * np.arange(size) + 1.0)
    skew = -0.5 * (np.tril(np.outer(root, root), -1) - np.triu(np.outer(root, root), 1))
    frequency, vectors = np.linalg.eigh(-1j * skew)
    upper = frequency > 0
    return -0.5 + 1j * frequency[upper], vectors[:, upper]


def discretise(eigenvalues: Complex, delta: Array) -> tuple[Complex, Complex]:
    """Zero-order hold: Lambda (Re < 0), Delta > 0, both [P] -> exp(Lambda Delta), (exp(Lambda Delta) - 1) / Lambda.

    The difference is formed without cancellation: Re(exp(a + ib) - 1) = expm1(a) cos b - 2 sin^2(b/2).
    """
    re, im = eigenvalues.re * delta, eigenvalues.im * delta
    size = jnp.exp(re)
    minus_one = Complex(jnp.expm1(re) * jnp.cos(im) - 2.0 * jnp.sin(im / 2) ** 2, size * jnp.sin(im))
    square = eigenvalues.re**2 + eigenvalues.im**2
    inverse = Complex(eigenvalues.re / square, -eigenvalues.im / square)
    return Complex(size * jnp.cos(im), size * jnp.sin(im)), _times(minus_one, inverse)


# ---------------------------------------------------------------- layer


class S5(nn.Module):
    """The layer of Smith et al. (2023) without norm and residual; a mixer as described in mixer.py.

    y = SSM(x), g = gelu(y), out = g sigmoid(W g + b). Lambda starts at the eigenvalues of HiPPO-N, `blocks` times those
    of size P / blocks, B and C in its eigenbasis, Delta log-uniform in `delta_range`. B and C are stored as [2, ...],
    real and imaginary part. The SSM runs in float32 or wider; its parameters (Lambda_re, Lambda_im, B, C, D, log_step)
    stay out of weight decay.
    """

    features: int
    """D"""
    d_state: int = 64
    """P, twice the number of complex states."""
    blocks: int = 1
    """J"""
    delta_range: tuple[float, float] = (0.001, 0.1)
    use_gate: bool = True
    """False: out = g."""
    method: str = "auto"
    """See `complex_scan`."""
    dtype: Any = None
    """Type of the gate's projection; None promotes."""

    @nn.nowrap
    def init_state(self, batch: int) -> Complex:
        """Zeros [B, P/2]."""
        zero = jnp.zeros((batch, self.d_state // 2))
        return Complex(zero, zero)

    def setup(self) -> None:
        self._validate()
        half, d = self.d_state // 2, self.features
        eigenvalues, vectors = hippo_normal(self.d_state // self.blocks)
        value = lambda part: lambda _: jnp.asarray(np.tile(part, self.blocks), jnp.float32)
        self.lambda_re = self.param("Lambda_re", value(np.real(eigenvalues)))
        self.lambda_im = self.param("Lambda_im", value(np.imag(eigenvalues)))
        basis = np.kron(np.eye(self.blocks), vectors)
        self.b = self.param("B", _input_init(basis), (2, half, d))
        self.c = self.param("C", _output_init(basis), (2, d, half))
        self.skip = self.param("D", nn.initializers.normal(1.0), (d,))
        low, high = (math.log(x) for x in self.delta_range)
        step = lambda key: jax.random.uniform(key, (half,), minval=low, maxval=high)
        self.log_step = self.param("log_step", step)
        self.gate = nn.Dense(d, dtype=self.dtype, kernel_init=LINEAR) if self.use_gate else None

    def dynamics(self) -> tuple[Complex, Complex]:
        """(Lbar [P/2], Bbar [P/2, D])."""
        eigenvalues = Complex(jnp.minimum(self.lambda_re, -DECAY_MIN), self.lambda_im)
        decay, weight = discretise(eigenvalues, jnp.exp(self.log_step))
        return decay, _times(Complex(weight.re[:, None], weight.im[:, None]), Complex(self.b[0], self.b[1]))

    def __call__(self, x: Array, *, mask: Array | None = None, state: Complex | None = None) -> tuple[Array, Complex]:
        """x [B, T, D] -> (out [B, T, D], state); mask as in mixer.py."""
        x, start = begin(self, x, mask, state)
        u = x.astype(scan.compute_dtype(x))
        decay, weight = self.dynamics()
        hidden, last = complex_scan(decay, _project(u, weight), start, mask=mask, method=self.method)
        return finish(self._outputs(hidden, u, x.dtype), x, mask), last

    def step(self, x: Array, state: Complex) -> tuple[Array, Complex]:
        """x [B, D] -> (out [B, D], state); constant time and memory."""
        check_sequence(x[:, None], self.features)
        check_state(state, self.init_state(x.shape[0]))
        u = x.astype(scan.compute_dtype(x))
        decay, weight = self.dynamics()
        state = _plus(_times(decay, state), _project(u, weight))
        return self._outputs(state, u, x.dtype), state

    def _outputs(self, hidden: Complex, u: Array, dtype: Any) -> Array:
        y = 2.0 * (hidden.re @ self.c[0].T - hidden.im @ self.c[1].T) + self.skip * u
        g = jax.nn.gelu(y)
        if self.gate is not None:
            g = g * jax.nn.sigmoid(self.gate(g.astype(dtype)).astype(g.dtype))
        return g.astype(dtype)

    def _validate(self) -> None:
        low, high = self.delta_range
        block = self.d_state / max(self.blocks, 1)
        checks = [
            ("features", self.features, self.features >= 1, "a whole number >= 1"),
            ("d_state", self.d_state, self.d_state >= 2 and self.d_state % 2 == 0, "an even number >= 2"),
            (
                "blocks",
                self.blocks,
                self.blocks >= 1 and block % 2 == 0,
                f"parts of d_state={self.d_state} of even size",
            ),
            ("delta_range", self.delta_range, 0 < low <= high, "0 < low <= high"),
            ("method", self.method, self.method in scan.METHODS, f"one of {scan.METHODS}"),
        ]
        for name, value, ok, expected in checks:
            if not ok:
                raise UserError(f"S5.{name}={value!r}: expected {expected}")


def _project(u: Array, weight: Complex) -> Complex:
    """u [..., D], weight [P/2, D] -> [..., P/2]."""
    return Complex(u @ weight.re.T, u @ weight.im.T)


def _input_init(basis: np.ndarray) -> Callable[..., Array]:
    """Real LeCun normal [P, D] in the eigenbasis: V^H B."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        real = jax.random.normal(key, (basis.shape[0], shape[2])) * shape[2] ** -0.5
        return jnp.stack([jnp.asarray(part.T, jnp.float32) @ real for part in (np.real(basis), -np.imag(basis))])

    return init


def _output_init(basis: np.ndarray) -> Callable[..., Array]:
    """Complex normal [D, P], each part of variance 1/P, in the eigenbasis: C V."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        re, im = jax.random.normal(key, (2, shape[1], basis.shape[0])) * basis.shape[0] ** -0.5
        v_re, v_im = (jnp.asarray(part, jnp.float32) for part in (np.real(basis), np.imag(basis)))
        return jnp.stack([re @ v_re - im @ v_im, re @ v_im + im @ v_re])

    return init
