"""Linear attention (Katharopoulos et al., 2020, arXiv 2006.16236) and gated linear attention (Yang et al., 2024,
arXiv 2312.06635): heads with a matrix state in place of a cache. Both are mixers as described in mixer.py; the
recurrence is that of gated_recurrence.py."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.sequence.gated_recurrence import GatedState, gated_scan
from jaxstack.sequence.mixer import LINEAR, ShortConv, begin, check_at_least, convolve, finish
from jaxstack.sequence.scan import compute_dtype


def rms_norm(x: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32 or wider, also where x^2 is out of range."""
    x = x.astype(compute_dtype(x))
    size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1.0))
    x = x / size
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps / size / size)


def elu_feature(x: Array) -> Array:
    """elu(x) + 1 > 0 in float32 or wider, as exp(x) below 0, which does not cancel."""
    x = x.astype(compute_dtype(x))
    return jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0)))


def split_heads(x: Array, heads: int) -> Array:
    """[..., H d] -> [..., H, d]"""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class LinearAttention(nn.Module):
    """o_t = sum_{s<=t} phi(q_t).phi(k_s) v_s / (sum_{s<=t} phi(q_t).phi(k_s) + eps), phi = elu + 1, then out_proj.

    The sum below the line is the output of one more value column, of ones: the state is [B, H, D/H, D/H + 1].
    `conv_size` > 0 puts a causal convolution and SiLU before q, k, v, which the paper does not have.
    """

    features: int
    """D"""
    num_heads: int = 4
    conv_size: int = 0
    use_bias: bool = False
    eps: float = 1e-6
    method: str = "auto"
    """See `gated_scan`."""
    dtype: Any = None
    """Type of the projections; None promotes x and the parameters. The recurrence runs in float32 or wider."""

    @nn.nowrap
    def init_state(self, batch: int) -> GatedState:
        """Zeros."""
        self._validate()
        conv = jnp.zeros((batch, self.conv_size - 1, 3 * self.features)) if self.conv_size else None
        width = self.features // self.num_heads
        return GatedState(conv, jnp.zeros((batch, self.num_heads, width, width + 1)))

    def setup(self) -> None:
        self._validate()
        dense = lambda width: nn.Dense(width, self.use_bias, self.dtype, kernel_init=LINEAR)
        self.in_proj = dense(3 * self.features)
        self.conv = ShortConv(3 * self.features, self.conv_size) if self.conv_size else None
        self.out_proj = dense(self.features)

    def __call__(
        self, x: Array, *, mask: Array | None = None, state: GatedState | None = None
    ) -> tuple[Array, GatedState]:
        """x [B, T, D] -> (y [B, T, D], state); mask as in mixer.py."""
        x, start = begin(self, x, mask, state)
        z, window = convolve(self.conv, self.in_proj(x), mask, start.conv)
        q, k, v = (split_heads(y, self.num_heads) for y in jnp.split(z, 3, axis=-1))
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        o, matrix = gated_scan(elu_feature(q), elu_feature(k), v, state=start.matrix, mask=mask, method=self.method)
        o = o[..., :-1] / (o[..., -1:] + self.eps)
        y = self.out_proj(o.reshape(x.shape).astype(z.dtype))
        return finish(y, x, mask), GatedState(window, matrix)

    def step(self, x: Array, state: GatedState) -> tuple[Array, GatedState]:
        """x [B, D] -> (y [B, D], state), constant time and memory."""
        y, state = self(x[:, None], state=state)
        return y[:, 0], state

    @nn.nowrap
    def _validate(self) -> None:
        check_heads(self, self.features, "features")
        check_at_least(self, conv_size=0)


class GatedLinearAttention(nn.Module):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(d_k) a head, y = out_proj(swish(g_t) norm(o_t)).

    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/gate_normalizer) in R^{d_k}, norm an RMS norm of each head with one learned
    scale [d_v] (Yang et al., section 4.4). `conv_size` > 0 puts a causal convolution and SiLU before q, k, v, as later
    work does; the paper does not.
    """

    features: int
    """D"""
    num_heads: int = 4
    expand_k: float = 0.5
    """Width of all keys over D."""
    expand_v: float = 1.0
    """Width of all values over D."""
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    """The gate's temperature: larger forgets more slowly."""
    conv_size: int = 0
    norm_eps: float = 1e-5
    method: str = "auto"
    """See `gated_scan`."""
    dtype: Any = None
    """Type of the projections; None promotes x and the parameters. The recurrence runs in float32 or wider."""

    @nn.nowrap
    def widths(self) -> tuple[int, int]:
        """Width of all keys and of all values."""
        return int(self.expand_k * self.features), int(self.expand_v * self.features)

    @nn.nowrap
    def init_state(self, batch: int) -> GatedState:
        """Zeros."""
        self._validate()
        keys, values = self.widths()
        conv = jnp.zeros((batch, self.conv_size - 1, 2 * keys + values)) if self.conv_size else None
        matrix = jnp.zeros((batch, self.num_heads, keys // self.num_heads, values // self.num_heads))
        return GatedState(conv, matrix)

    def setup(self) -> None:
        self._validate()
        keys, values = self.widths()
        dense = lambda width, bias=False: nn.Dense(width, bias, self.dtype, kernel_init=LINEAR)
        self.in_proj = dense(2 * keys + values)
        self.conv = ShortConv(2 * keys + values, self.conv_size) if self.conv_size else None
        self.gate_down, self.gate_up = dense(self.gate_rank), dense(keys, True)
        self.out_gate = dense(values)
        self.scale = self.param("scale", nn.initializers.ones_init(), (values // self.num_heads,))
        self.out_proj = dense(self.features)

    def __call__(
        self, x: Array, *, mask: Array | None = None, state: GatedState | None = None
    ) -> tuple[Array, GatedState]:
        """x [B, T, D] -> (y [B, T, D], state); mask as in mixer.py."""
        x, start = begin(self, x, mask, state)
        keys, values = self.widths()
        z, window = convolve(self.conv, self.in_proj(x), mask, start.conv)
        q, k, v = (split_heads(y, self.num_heads) for y in jnp.split(z, (keys, 2 * keys), axis=-1))
        logits = self.gate_up(self.gate_down(x))
        decay = jax.nn.log_sigmoid(logits.astype(compute_dtype(logits))) / self.gate_normalizer
        o, matrix = gated_scan(
            q.astype(decay.dtype) * (keys // self.num_heads) ** -0.5,
            k,
            v,
            split_heads(decay, self.num_heads),
            state=start.matrix,
            mask=mask,
            method=self.method,
        )
        o = (rms_norm(o, self.norm_eps) * self.scale).reshape(*x.shape[:2], values)
        gate = self.out_gate(x)
        y = self.out_proj((o * jax.nn.silu(gate.astype(o.dtype))).astype(z.dtype))
        return finish(y, x, mask), GatedState(window, matrix)

    def step(self, x: Array, state: GatedState) -> tuple[Array, GatedState]:
        """x [B, D] -> (y [B, D], state), constant time and memory."""
        y, state = self(x[:, None], state=state)
        return y[:, 0], state

    @nn.nowrap
    def _validate(self) -> None:
        keys, values = self.widths()
        check_heads(self, keys, "expand_k * features")
        check_heads(self, values, "expand_v * features")
        check_at_least(self, gate_rank=1, conv_size=0)
        if not self.gate_normalizer > 0:
            raise UserError(f"GatedLinearAttention.gate_normalizer={self.gate_normalizer!r}: expected a number > 0")


# ---------------------------------------------------------------- what layers around the recurrence share


def check_heads(module: Any, width: int, name: str) -> None:
    """Raise `UserError` unless num_heads divides `width`, which `name` describes."""
    check_at_least(module, features=1, num_heads=1)
    if width < 1 or width % module.num_heads:
        owner = type(module).__name__
        raise UserError(f"{owner}.num_heads={module.num_heads!r}: expected a divisor of {name} = {width}")
