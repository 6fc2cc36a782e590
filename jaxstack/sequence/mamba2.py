"""Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060): a state space model with one decay per head, in its dual matrix form.

The recurrence is that of gated_recurrence.py with k = B, q = C, v = Delta x and log decay Delta A.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.sequence.gated_recurrence import GatedState, gated_scan
from jaxstack.sequence.linear_attention import rms_norm, split_heads
from jaxstack.sequence.mixer import LINEAR, ShortConv, begin, check_at_least, convolve, delta_init, finish
from jaxstack.sequence.scan import compute_dtype


class Mamba2(nn.Module):
    """[z, x, B, C, Delta] = in_proj(u); x, B, C = SiLU(conv(x, B, C)); Delta = softplus(Delta + dt_bias);

        A = -exp(A_log), a number for each head
        S_t = exp(Delta_t A) S_{t-1} + B_t (Delta_t x_t)^T,   y_t = S_t^T C_t + D x_t   for each head of P channels
        out = out_proj(RMSNorm(y * SiLU(z)))

    A mixer as described in mixer.py. M = expand D channels in M/P heads; each group of heads has its own B and C, and
    the norm is over the channels of a group. A_log, dt_bias and D stay float32 and are not decayed.
    """

    features: int
    """D"""
    d_state: int = 128
    """N, the width of B and C."""
    expand: float = 2.0
    head_dim: int | None = None
    """P; None: 64, or all M channels in one head where M < 64."""
    num_groups: int = 1
    conv_size: int = 4
    a_range: tuple[float, float] = (1.0, 16.0)
    """-A starts uniform here."""
    delta_range: tuple[float, float] = (0.001, 0.1)
    """Delta starts log-uniform here."""
    norm_eps: float = 1e-5
    method: str = "auto"
    """See `gated_scan`."""
    dtype: Any = None
    """Type of the projections; None promotes x and the parameters. The recurrence runs in float32 or wider."""

    @nn.nowrap
    def sizes(self) -> tuple[int, int, int]:
        """(channels M, heads H, width of what the convolution sees)"""
        channels = int(self.expand * self.features)
        head_dim = min(64, channels) if self.head_dim is None else self.head_dim
        return channels, channels // max(head_dim, 1), channels + 2 * self.num_groups * self.d_state

    @nn.nowrap
    def init_state(self, batch: int) -> GatedState:
        """Zeros."""
        self._validate()
        channels, heads, width = self.sizes()
        matrix = jnp.zeros((batch, heads, self.d_state, channels // heads))
        return GatedState(jnp.zeros((batch, self.conv_size - 1, width)), matrix)

    def setup(self) -> None:
        self._validate()
        channels, heads, width = self.sizes()
        dense = lambda width: nn.Dense(width, False, self.dtype, kernel_init=LINEAR)
        self.in_proj = dense(channels + width + heads)
        self.conv = ShortConv(width, self.conv_size)
        low, high = self.a_range
        log_uniform = lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))
        self.a_log = self.param("A_log", log_uniform, (heads,))
        self.dt_bias = self.param("dt_bias", delta_init(self.delta_range), (heads,))
        self.skip = self.param("D", nn.initializers.ones_init(), (heads,))
        self.scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        self.out_proj = dense(self.features)

    def __call__(
        self, x: Array, *, mask: Array | None = None, state: GatedState | None = None
    ) -> tuple[Array, GatedState]:
        """x [B, T, D] -> (y [B, T, D], state); mask as in mixer.py."""
        x, start = begin(self, x, mask, state)
        channels, heads, width = self.sizes()
        gate, mixed, delta = jnp.split(self.in_proj(x), (channels, channels + width), axis=-1)
        mixed, window = convolve(self.conv, mixed, mask, start.conv)
        inner, b, c = jnp.split(mixed, (channels, (channels + width) // 2), axis=-1)
        delta = jax.nn.softplus(delta.astype(compute_dtype(delta)) + self.dt_bias)
        inner = split_heads(inner.astype(delta.dtype), heads)
        o, matrix = gated_scan(
            split_heads(c, self.num_groups),
            split_heads(b, self.num_groups),
            inner * delta[..., None],
            -jnp.exp(self.a_log) * delta,
            state=start.matrix,
            mask=mask,
            method=self.method,
        )
        o = (o + self.skip[:, None] * inner).reshape(*x.shape[:2], channels)
        o = split_heads(o * jax.nn.silu(gate.astype(o.dtype)), self.num_groups)
        o = rms_norm(o, self.norm_eps).reshape(*x.shape[:2], channels) * self.scale
        y = self.out_proj(o.astype(mixed.dtype))
        return finish(y, x, mask), GatedState(window, matrix)

    def step(self, x: Array, state: GatedState) -> tuple[Array, GatedState]:
        """x [B, D] -> (y [B, D], state), constant time and memory."""
        y, state = self(x[:, None], state=state)
        return y[:, 0], state

    @nn.nowrap
    def _validate(self) -> None:
        check_at_least(self, features=1, d_state=1, num_groups=1, conv_size=1)
        channels = int(self.expand * self.features)
        if channels < 1:
            raise UserError(f"Mamba2.expand={self.expand!r}: expected at least one channel")
        if self.head_dim is not None:
            check_at_least(self, head_dim=1)
        size = min(64, channels) if self.head_dim is None else self.head_dim
        if channels % size:
            raise UserError(f"Mamba2.head_dim={size}: expected a divisor of expand * features = {channels}")
        if channels // size % self.num_groups:
            raise UserError(f"Mamba2.num_groups={self.num_groups}: expected a divisor of the {channels // size} heads")
        for name in ("a_range", "delta_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"Mamba2.{name}={(low, high)}: expected 0 < low <= high")
