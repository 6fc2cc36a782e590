"""Kalman Linear Attention (Shaj et al., 2026, arXiv 2602.10743): a causal mixer that is an exact Kalman filter.

`kla_scan` filters whole sequences, `kla_step` one token from a constant-size state, `KalmanLinearAttention` is the
layer around them. Every output has a mean and a variance, and the forget gate depends on the precision gathered so far
(with zero process noise it does not, and the layer is a linear recurrence). The variance is that of the filter under
its own model; nothing in a cross-entropy loss calibrates it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxstack.core.errors import UserError, unknown
from jaxstack.sequence import scan
from jaxstack.sequence.kla_filter import Token, filter_scan, filter_step
from jaxstack.sequence.mixer import LINEAR, ShortConv, begin, check_sequence, check_state, delta_init, finish

METHODS = (*scan.METHODS, "pallas")
READS = ("posterior", "prior")


class KLAState(NamedTuple):
    """Belief after the tokens seen: N(mean, 1/precision) for every channel and state, float32 or wider."""

    precision: Array
    """[B, M, S]"""
    mean: Array
    """[B, M, S]; the information vector of the released code is precision * mean."""


def init_kla_state(batch: int, channels: int, d_state: int, dtype: Any = jnp.float32) -> KLAState:
    """The unit normal prior."""
    shape = (batch, channels, d_state)
    return KLAState(jnp.ones(shape, dtype), jnp.zeros(shape, dtype))


def kla_scan(
    v: ArrayLike,
    obs_precision: ArrayLike,
    k: ArrayLike,
    q: ArrayLike,
    abar: ArrayLike,
    pbar: ArrayLike,
    *,
    state: KLAState | None = None,
    mask: ArrayLike | None = None,
    masked: str = "freeze",
    read: str = "posterior",
    method: str = "auto",
    chunk: int | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, KLAState]:
    """Filter a batch of sequences -> (y [B, T, M], variance of y [B, T, M], state after the last token).

    v [B, T, M] observed values; obs_precision [B, T, M] >= 0, 0 for no observation (clipped to 2e15 in float32);
    k, q [B, T, S] observation (clipped to 3e18) and read-out vectors; abar [M, S] decay in [0, 1]; pbar [M, S] >= 0
    process noise.
    state: the prior, unit normal if None; the first token is predicted, then updated.
    mask [B, T]: what stands at False is ignored. masked="freeze" (padding): the state stays, y and its variance are 0.
    masked="predict" (a gap in the data): time passes without an observation, q still reads the prediction.
    read="prior": y is the one-step-ahead prediction, from abar mean and abar^2 / precision + pbar.
    method: "sequential" (one fused scan), "associative", "chunked" (see scan.py; `chunk` steps per chunk), "pallas"
    (one GPU/TPU kernel; `interpret=True` runs it anywhere, slowly) or "auto" (the fastest measured, see `scan.choose`).
    Computes in float32, or float64 if an input has it. Differentiable in all six arrays and the state. `UserError`.
    """
    dtype = scan.compute_dtype(v, obs_precision, k, q, abar, pbar)
    tokens = Token(*(jnp.asarray(x, dtype) for x in (v, obs_precision, k, q)))
    abar, pbar = jnp.asarray(abar, dtype), jnp.asarray(pbar, dtype)
    batch, length, channels, d_state = _check(tokens, abar, pbar, mask, masked, read)
    state = _prior(state, batch, channels, d_state, dtype)
    form = scan.choose("kla", method, length, batch * channels * d_state, METHODS)
    if interpret and form != "pallas":
        raise UserError(f"interpret=True applies to method='pallas', not {method!r}")
    keep = None if mask is None else jnp.asarray(mask)
    tokens = silence(tokens, keep, masked)
    keep = keep if masked == "freeze" else None
    if length == 0:
        return tokens.v, tokens.v, state
    if form == "sequential":
        return _sequential(tokens, keep, abar, pbar, state, read)
    if form == "pallas":
        from jaxstack.sequence.scan_pallas import kalman_filter

        y, var, *last = kalman_filter(tokens, keep, abar, pbar, *state, prior=read == "prior", interpret=interpret)
        return y, var, KLAState(*last)
    return _parallel(tokens, keep, abar, pbar, state, read, form, chunk)


def kla_step(
    v: ArrayLike,
    obs_precision: ArrayLike,
    k: ArrayLike,
    q: ArrayLike,
    abar: ArrayLike,
    pbar: ArrayLike,
    state: KLAState,
    *,
    read: str = "posterior",
) -> tuple[Array, Array, KLAState]:
    """One token of `kla_scan`: v, obs_precision [B, M]; k, q [B, S] -> (y [B, M], variance [B, M], state)."""
    dtype = scan.compute_dtype(v, obs_precision, k, q, abar, pbar)
    tokens = Token(*(jnp.expand_dims(jnp.asarray(x, dtype), -2) for x in (v, obs_precision, k, q)))
    abar, pbar = jnp.asarray(abar, dtype), jnp.asarray(pbar, dtype)
    batch, _, channels, d_state = _check(tokens, abar, pbar, None, "freeze", read)
    state = _prior(state, batch, channels, d_state, dtype)
    token = Token(*(x[0] for x in _time_first(silence(tokens, None, "freeze"))))
    lam, mean, y, var = filter_step(*_swap(state), token, abar.T, pbar.T, prior=read == "prior")
    return y[:, 0], var[:, 0], _swap((lam, mean))


def _check(
    tokens: Token, abar: Array, pbar: Array, mask: ArrayLike | None, masked: str, read: str
) -> tuple[int, int, int, int]:
    """(B, T, M, S); raises `UserError` for what does not fit."""
    if tokens.v.ndim != 3 or tokens.k.ndim != 3:
        raise UserError(f"v has shape {tokens.v.shape}, k {tokens.k.shape}: expected [batch, time, M] and [.., S]")
    (batch, length, channels), d_state = tokens.v.shape, tokens.k.shape[-1]
    wide, narrow, state = (batch, length, channels), (batch, length, d_state), (channels, d_state)
    names = ("v", "obs_precision", "k", "q", "abar", "pbar")
    for name, x, shape in zip(names, (*tokens, abar, pbar), (wide, wide, narrow, narrow, state, state)):
        if x.shape != shape:
            raise UserError(f"{name} has shape {x.shape}: expected {shape}")
    if mask is not None and (jnp.shape(mask) != (batch, length) or jnp.asarray(mask).dtype != jnp.bool_):
        raise UserError(f"mask has shape {jnp.shape(mask)}: expected bool {(batch, length)}")
    if masked not in scan.MASKED:
        raise unknown("treatment of masked tokens", masked, scan.MASKED)
    if read not in READS:
        raise unknown("read-out", read, READS)
    return batch, length, channels, d_state


def _prior(state: KLAState | None, batch: int, channels: int, d_state: int, dtype: Any) -> KLAState:
    unit = init_kla_state(batch, channels, d_state, dtype)
    if state is None:
        return unit
    check_state(state, unit)
    low, high = scan.precision_range(dtype)
    return KLAState(jnp.clip(jnp.asarray(state.precision, dtype), low, high), jnp.asarray(state.mean, dtype))


def silence(tokens: Token, keep: Array | None, masked: str) -> Token:
    """Bounded observations; whatever a masked token holds (even NaN) is replaced by an absent one."""
    if keep is not None:
        v, precision, k, q = (jnp.where(keep[..., None], x, 0.0) for x in tokens)
        tokens = Token(v, precision, k, q if masked == "freeze" else tokens.q)
    return _scale(tokens._replace(precision=jnp.clip(tokens.precision, 0.0, _bound(tokens.v.dtype, 0.5))))


def _bound(dtype: Any, power: float) -> float:
    return scan.precision_range(dtype)[1] ** power


def _scale(tokens: Token) -> Token:
    """Where a key exceeds 1e5, divide the observation: v = k z + noise of precision Lambda says what v / c = (k / c) z
    + noise of precision c^2 Lambda says, but k^2 would overflow float32. c is a constant to the gradient: what is
    computed does not depend on it."""
    size = jnp.abs(tokens.k).max(-1, keepdims=True)
    largest, high = _bound(size.dtype, 0.6), _bound(size.dtype, 1.0)
    c = jax.lax.stop_gradient(jnp.where(size > 1e5, jnp.minimum(size, largest), 1.0))
    precision = jnp.minimum(tokens.precision, high / (c * c)) * (c * c)
    return tokens._replace(v=tokens.v / c, precision=precision, k=jnp.clip(tokens.k / c, -1e5, 1e5))


def _time_first(tokens: Token) -> Token:
    """[B, T, M] -> [T, B, 1, M] and [B, T, S] -> [T, B, S, 1]."""
    v, precision, k, q = (jnp.swapaxes(x, 0, 1) for x in tokens)
    return Token(v[:, :, None], precision[:, :, None], k[..., None], q[..., None])


def _swap(state: tuple[Array, Array]) -> KLAState:
    """[B, M, S] <-> [B, S, M]."""
    return KLAState(*(jnp.swapaxes(x, 1, 2) for x in state))


def _sequential(
    tokens: Token, keep: Array | None, abar: Array, pbar: Array, state: KLAState, read: str
) -> tuple[Array, Array, KLAState]:
    on = None if keep is None else keep.T[:, :, None, None].astype(abar.dtype)
    y, var, *last = filter_scan(_time_first(tokens), on, abar.T, pbar.T, *_swap(state), read == "prior")
    return jnp.swapaxes(y[:, :, 0], 0, 1), jnp.swapaxes(var[:, :, 0], 0, 1), _swap((last[0], last[1]))


def _parallel(
    tokens: Token,
    keep: Array | None,
    abar: Array,
    pbar: Array,
    state: KLAState,
    read: str,
    form: str,
    chunk: int | None,
) -> tuple[Array, Array, KLAState]:
    """Precisions first, then the means, whose coefficients the precisions of the step before decide."""
    v, precision, k, q = tokens.v[..., None], tokens.precision[..., None], tokens.k[:, :, None], tokens.q[:, :, None]
    how: dict[str, Any] = dict(mask=keep, axis=1, method=form, chunk=chunk)
    lam, last = scan.moebius_scan(precision * k * k, abar * abar, pbar, state.precision, **how)
    earlier = jnp.concatenate([state.precision[:, None], lam[:, :-1]], axis=1)
    kept = scan.predict_precision(earlier, abar * abar, pbar) / lam
    mean, last_mean = scan.affine_scan(abar * kept, k * precision / lam * v, state.mean, **how)
    mu, var = mean, 1.0 / lam
    if read == "prior":
        mu, var = abar * mu, abar * abar * var + pbar
    return (q * mu).sum(-1), (q * q * var).sum(-1), KLAState(last, last_mean)


# ---------------------------------------------------------------- dynamics


def discretise(rate: ArrayLike, noise: ArrayLike, delta: ArrayLike, discretisation: str = "ou") -> tuple[Array, Array]:
    """dz = -rate z dt + sqrt(noise) dW over a step `delta` -> (abar, pbar), elementwise; rate > 0.

    "ou": the exact Ornstein-Uhlenbeck transition, pbar = noise / (2 rate) (1 - exp(-2 rate delta)).
    "zoh": pbar = noise delta, the paper's ablation.
    """
    rate, noise, delta = jnp.asarray(rate), jnp.asarray(noise), jnp.asarray(delta)
    if discretisation == "ou":
        return jnp.exp(-rate * delta), noise / (2.0 * rate) * -jnp.expm1(-2.0 * rate * delta)
    if discretisation == "zoh":
        return jnp.exp(-rate * delta), noise * delta
    raise unknown("discretisation", discretisation, ("ou", "zoh"))


def l2_normalise(x: Array, eps: float = 1e-12) -> Array:
    """x / |x| over the last axis in float32 or wider; 0, with zero gradient, where |x| <= eps."""
    x = x.astype(scan.compute_dtype(x))
    square = (x * x).sum(-1, keepdims=True)
    long = square > eps * eps
    return jnp.where(long, x * jax.lax.rsqrt(jnp.where(long, square, 1.0)), 0.0)


def marginal_log_probs(
    head: Callable[[Array], Array], mean: Array, variance: Array, key: Array, num_samples: int
) -> Array:
    """Monte-Carlo read-out: log (1/n) sum_i softmax(head(mean + eps_i sqrt(variance))), eps_i standard normal.

    mean, variance [..., D]; head: [n, ..., D] -> logits [n, ..., V]; returns log-probabilities [..., V], normalised.
    `head` is everything after the last mixer. Differentiable in mean and variance. `UserError` for num_samples < 1.
    """
    if num_samples < 1:
        raise UserError(f"num_samples={num_samples!r}: expected a whole number >= 1")
    tiny = jnp.finfo(variance.dtype).tiny ** 0.5
    noise = jax.random.normal(key, (num_samples, *mean.shape), mean.dtype)
    log_p = jax.nn.log_softmax(head(mean + noise * jnp.sqrt(jnp.maximum(variance, tiny))), axis=-1)
    return jax.nn.logsumexp(log_p, axis=0) - math.log(num_samples)


# ---------------------------------------------------------------- layer


class KLALayerState(NamedTuple):
    conv: Array | None
    """Last inputs of the convolution [B, K-1, M], None without one."""
    belief: KLAState


class KalmanLinearAttention(nn.Module):
    """The layer of Shaj et al. (2026), figure 7; a mixer as described in mixer.py. All switches are static.

    in_proj: D -> 2M (M = expand D), causal convolution and SiLU, sensor: -> v, log variance [M], k, q [S], filter,
    skip, SiLU gate, out_proj: M -> D. block="plain" projects v and the variance at full width; block="mamba" takes v
    from the convolution as it is and the variance through a bottleneck of rank ceil(D/8); `value_rank` and `var_rank`
    override these.
    The filter's parameters are not input dependent; keep `delta` and `lambda_log` out of weight decay.
    """

    features: int
    """D"""
    d_state: int = 16
    """S, filters per channel."""
    expand: float = 2.0
    block: str = "plain"
    """"plain" or "mamba"."""
    value_rank: int | str | None = None
    """How v is made: "full", "conv" (v is the convolved stream) or the rank of a bottleneck; None: as `block` says."""
    var_rank: int | str | None = None
    """How the observation variance is made: "full" or the rank of a bottleneck; None: as `block` says."""
    discretisation: str = "ou"
    """"ou" or "zoh"."""
    process_noise: float = 0.01
    """P at the start; 0 is the ablation without process noise (then it is not a parameter)."""
    learn_process_noise: bool = True
    use_conv: bool = True
    conv_size: int = 4
    use_gate: bool = True
    qk_norm: bool = True
    skip: str = "scalar"
    """Learned multiple of the convolved stream added to y: "scalar", "vector" or "none"."""
    read: str = "posterior"
    """"posterior" or "prior" (one-step-ahead prediction)."""
    use_bias: bool = False
    obs_var_min: float = 1e-4
    obs_var_max: float | None = None
    delta_range: tuple[float, float] = (0.001, 0.1)
    """Delta starts log-uniform here."""
    method: str = "auto"
    """See `kla_scan`."""
    dtype: Any = None
    """Type of the projections; None promotes x and the parameters. The filter runs in float32 or wider."""

    @property
    def channels(self) -> int:
        """M"""
        return int(self.expand * self.features)

    @nn.nowrap
    def ranks(self) -> tuple[int | str, int | str]:
        """(value_rank, var_rank) with the block's presets filled in."""
        low = math.ceil(self.features / 8)
        preset = {"plain": ("full", "full"), "mamba": ("conv", low)}
        if self.block not in preset:
            raise unknown("block of KalmanLinearAttention", self.block, preset)
        value, var = preset[self.block]
        return value if self.value_rank is None else self.value_rank, var if self.var_rank is None else self.var_rank

    @nn.nowrap
    def init_state(self, batch: int) -> KLALayerState:
        """The state before any token: zeros in the window, the unit normal prior."""
        belief = init_kla_state(batch, self.channels, self.d_state)
        return KLALayerState(jnp.zeros((batch, self.conv_size - 1, self.channels)) if self.use_conv else None, belief)

    def setup(self) -> None:
        self._validate()
        m, s = self.channels, self.d_state
        value, var = self.ranks()
        wide = {"full": m, "conv": 0}
        widths = [wide[r] if isinstance(r, str) else r for r in (value, var)]
        dense = lambda width: nn.Dense(width, self.use_bias, self.dtype, kernel_init=LINEAR)
        self.in_proj = dense(2 * m if self.use_gate else m)
        self.conv = ShortConv(m, self.conv_size) if self.use_conv else None
        self.sensor = dense(sum(widths) + 2 * s)
        self.splits = (widths[0], sum(widths), sum(widths) + s)
        self.value_expand = dense(m) if isinstance(value, int) else None
        self.var_expand = dense(m) if isinstance(var, int) else None
        self.out_proj = dense(self.features)
        self.delta = self.param("delta", delta_init(self.delta_range), (m, s))
        self.lambda_log = self.param("lambda_log", nn.initializers.zeros_init(), (m, s))
        learned = self.learn_process_noise and self.process_noise > 0
        constant = nn.initializers.constant(self.process_noise)
        self.noise = self.param("process_noise", constant, (m, s)) if learned else None
        shape = {"scalar": (), "vector": (m,)}.get(self.skip)
        self.lambda_skip = None if shape is None else self.param("lambda_skip", nn.initializers.constant(-1.0), shape)

    def dynamics(self) -> tuple[Array, Array]:
        """(abar, pbar), each [M, S]."""
        if self.noise is not None:
            noise = jnp.maximum(self.noise, 1e-7)
        else:
            noise = jnp.full_like(self.delta, self.process_noise)
        delta = jax.nn.softplus(self.delta) + 1e-7
        return discretise(jnp.exp(self.lambda_log), noise, delta, self.discretisation)

    def __call__(
        self, x: Array, *, mask: Array | None = None, state: KLALayerState | None = None, return_variance: bool = False
    ) -> Any:
        """x [B, T, D] -> (out [B, T, D], state), or (out, variance of out [B, T, D], state); mask as in mixer.py."""
        x, start = begin(self, x, mask, state)
        z, gate, window = self._inputs(x, mask, start.conv)
        y, var, belief = kla_scan(
            *self._sense(z), *self.dynamics(), state=start.belief, mask=mask, read=self.read, method=self.method
        )
        out, out_var = self._outputs(y, var, z, gate, return_variance)
        out, state = finish(out, x, mask), KLALayerState(window, belief)
        if mask is not None and out_var is not None:
            out_var = jnp.where(mask[..., None], out_var, 0)
        return (out, out_var, state) if return_variance else (out, state)

    def step(self, x: Array, state: KLALayerState, *, return_variance: bool = False) -> Any:
        """x [B, D] -> (out [B, D], state), or with the variance between; constant time and memory."""
        check_sequence(x[:, None], self.features)
        check_state(state, self.init_state(x.shape[0]))
        z, gate, window = self._inputs(x[:, None], None, state.conv)
        v, precision, k, q = (t[:, 0] for t in self._sense(z))
        abar, pbar = self.dynamics()
        y, var, belief = kla_step(v, precision, k, q, abar, pbar, state.belief, read=self.read)
        out, out_var = self._outputs(y[:, None], var[:, None], z, gate, return_variance)
        out, state = out[:, 0].astype(x.dtype), KLALayerState(window, belief)
        return (out, out_var[:, 0], state) if out_var is not None else (out, state)

    def _inputs(self, x: Array, mask: Array | None, window: Array | None) -> tuple[Array, Array | None, Array | None]:
        z = self.in_proj(x)
        z, gate = jnp.split(z, 2, axis=-1) if self.use_gate else (z, None)
        if self.conv is not None:
            z, window = self.conv(z, mask=mask, state=window)
            z = jax.nn.silu(z)
        return z, gate, window

    def _sense(self, z: Array) -> tuple[Array, Array, Array, Array]:
        """z [B, T, M] -> v, observation precision [B, T, M], k, q [B, T, S]."""
        v, raw, k, q = jnp.split(self.sensor(z), self.splits, axis=-1)
        if self.value_expand is not None:
            v = self.value_expand(v)
        elif self.splits[0] == 0:
            v = z
        raw = raw if self.var_expand is None else self.var_expand(raw)
        var = jax.nn.softplus(raw.astype(scan.compute_dtype(raw))) + self.obs_var_min
        if self.obs_var_max is not None:
            var = jnp.minimum(var, self.obs_var_max)
        return v, 1.0 / var, *((l2_normalise(k), l2_normalise(q)) if self.qk_norm else (k, q))

    def _outputs(
        self, y: Array, var: Array, z: Array, gate: Array | None, return_variance: bool
    ) -> tuple[Array, Array | None]:
        if self.lambda_skip is not None:
            y = y + self.lambda_skip * z
        act = None if gate is None else jax.nn.silu(gate.astype(y.dtype))
        out = self.out_proj((y if act is None else y * act).astype(z.dtype))
        if not return_variance:
            return out, None
        var = var if act is None else var * act * act
        weight = self.variables["params"]["out_proj"]["kernel"].astype(var.dtype)
        return out, var @ (weight * weight)

    def _validate(self) -> None:
        value, var = self.ranks()
        checks = [
            ("features", self.features, self.features >= 1, "a whole number >= 1"),
            ("d_state", self.d_state, self.d_state >= 1, "a whole number >= 1"),
            ("expand", self.expand, self.channels >= 1, "at least one channel"),
            ("value_rank", value, value in ("full", "conv") or _rank(value), "'full', 'conv' or a rank >= 1"),
            ("var_rank", var, var == "full" or _rank(var), "'full' or a rank >= 1"),
            ("process_noise", self.process_noise, 0 <= self.process_noise < math.inf, "a number >= 0"),
            ("conv_size", self.conv_size, self.conv_size >= 1, "a whole number >= 1"),
            ("skip", self.skip, self.skip in ("scalar", "vector", "none"), "'scalar', 'vector' or 'none'"),
            ("read", self.read, self.read in READS, "'posterior' or 'prior'"),
            ("discretisation", self.discretisation, self.discretisation in ("ou", "zoh"), "'ou' or 'zoh'"),
            ("obs_var_min", self.obs_var_min, self.obs_var_min > 0, "a number > 0"),
            ("delta_range", self.delta_range, 0 < self.delta_range[0] <= self.delta_range[1], "0 < low <= high"),
        ]
        for name, value, ok, expected in checks:
            if not ok:
                raise UserError(f"KalmanLinearAttention.{name}={value!r}: expected {expected}")


def _rank(value: int | str) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
