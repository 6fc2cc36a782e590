"""minGRU (Feng et al., 2024, arXiv 2410.01201): a gated recurrent unit whose gates depend on the token alone.

    h_t = (1 - z_t) h_{t-1} + z_t h~_t        z_t = sigmoid(W_z x_t)        h~_t = W_h x_t  or  g(W_h x_t)

so that it is an affine recurrence. g(x) = x + 1/2 for x >= 0, sigmoid(x) below (their appendix B) keeps h positive;
they need it to compute in logarithms, `affine_scan` does not.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.sequence import scan
from jaxstack.sequence.mixer import LINEAR, ShortConv, begin, check_sequence, check_state, finish

CANDIDATES = ("linear", "positive")


def positive(x: Array) -> Array:
    """g of appendix B: x + 1/2 for x >= 0, sigmoid(x) below."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(jnp.minimum(x, 0)))


class MinGRUState(NamedTuple):
    conv: Array | None
    """Last inputs of the convolution [B, conv_size - 1, D], None without one."""
    hidden: Array
    """[B, M]"""


class MinGRU(nn.Module):
    """The unit with M = expand D hidden units and out_proj: M -> D; a mixer as described in mixer.py.

    The hidden state starts at 0. The recurrence runs in float32 or wider.
    """

    features: int
    """D"""
    expand: float = 2.0
    candidate: str = "linear"
    """h~: "linear" or "positive" (g)."""
    use_conv: bool = False
    """A causal convolution on x, as in the paper's language models."""
    conv_size: int = 4
    use_bias: bool = True
    method: str = "auto"
    """See `scan.affine_scan`."""
    dtype: Any = None
    """Type of the projections; None promotes x and the parameters."""

    @property
    def channels(self) -> int:
        """M"""
        return int(self.expand * self.features)

    @nn.nowrap
    def init_state(self, batch: int) -> MinGRUState:
        """Zeros."""
        window = jnp.zeros((batch, self.conv_size - 1, self.features)) if self.use_conv else None
        return MinGRUState(window, jnp.zeros((batch, self.channels)))

    def setup(self) -> None:
        checks = [
            ("features", self.features, self.features >= 1, "a whole number >= 1"),
            ("expand", self.expand, self.channels >= 1, "at least one channel"),
            ("candidate", self.candidate, self.candidate in CANDIDATES, "'linear' or 'positive'"),
            ("conv_size", self.conv_size, self.conv_size >= 1, "a whole number >= 1"),
            ("method", self.method, self.method in scan.METHODS, f"one of {scan.METHODS}"),
        ]
        for name, value, ok, expected in checks:
            if not ok:
                raise UserError(f"MinGRU.{name}={value!r}: expected {expected}")
        dense = lambda width: nn.Dense(width, self.use_bias, self.dtype, kernel_init=LINEAR)
        self.conv = ShortConv(self.features, self.conv_size) if self.use_conv else None
        self.in_proj = dense(2 * self.channels)
        self.out_proj = dense(self.features)

    def __call__(
        self, x: Array, *, mask: Array | None = None, state: MinGRUState | None = None
    ) -> tuple[Array, MinGRUState]:
        """x [B, T, D] -> (out [B, T, D], state); mask as in mixer.py."""
        x, start = begin(self, x, mask, state)
        z, window = self._inputs(x, mask, start.conv)
        h, last = scan.affine_scan(*self._gates(z), start.hidden, mask=mask, axis=1, method=self.method)
        out = self.out_proj(h.astype(z.dtype))
        return finish(out, x, mask), MinGRUState(window, last)

    def step(self, x: Array, state: MinGRUState) -> tuple[Array, MinGRUState]:
        """x [B, D] -> (out [B, D], state); constant time and memory."""
        check_sequence(x[:, None], self.features)
        check_state(state, self.init_state(x.shape[0]))
        z, window = self._inputs(x[:, None], None, state.conv)
        keep, drive = self._gates(z[:, 0])
        h = keep * state.hidden + drive
        return self.out_proj(h.astype(z.dtype)).astype(x.dtype), MinGRUState(window, h)

    def _inputs(self, x: Array, mask: Array | None, window: Array | None) -> tuple[Array, Array | None]:
        if self.conv is not None:
            x, window = self.conv(x, mask=mask, state=window)
        return self.in_proj(x), window

    def _gates(self, z: Array) -> tuple[Array, Array]:
        """in_proj's output [..., 2M] -> 1 - z and z h~ [..., M], the coefficients of the recurrence."""
        gate, h = jnp.split(z.astype(scan.compute_dtype(z)), 2, axis=-1)
        h = positive(h) if self.candidate == "positive" else h
        return jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * h
