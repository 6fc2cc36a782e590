"""DeltaNet (Yang et al., 2024, arXiv 2406.06484) and Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2025, arXiv
2412.06464), layers around the delta rule of delta_rule.py.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.sequence import scan
from jaxstack.sequence.delta_rule import METHODS, delta_rule, delta_step
from jaxstack.sequence.kla import l2_normalise
from jaxstack.sequence.mixer import LINEAR, ShortConv, begin, check_sequence, check_state, delta_init, finish


class DeltaState(NamedTuple):
    conv: Array
    """Last inputs of the convolutions of q, k and v side by side [B, conv_size - 1, H (2K + V)]."""
    memory: Array
    """[B, H, K, V]"""


class DeltaNet(nn.Module):
    """The layer of Yang et al. (2024), section 4; a mixer as described in mixer.py.

    q, k, v = SiLU(conv(W x)), q and k of unit length a head, beta = sigmoid(W_b x), delta rule, RMS norm of each head's
    output (one scale [V] for all), out_proj. Heads have widths K = floor(expand_k D / H) and V = floor(expand_v D / H).
    q, k, v have one projection and one convolution, which is depthwise. The delta rule runs in float32 or wider.
    """

    features: int
    """D"""
    num_heads: int = 4
    """H"""
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int = 4
    negative_eigenvalues: bool = False
    """beta in (0, 2): transitions may reflect (Grazzi et al., 2025, arXiv 2411.12537), which state tracking needs."""
    method: str = "auto"
    """See `delta_rule`."""
    dtype: Any = None
    """Type of the projections; None promotes x and the parameters."""

    @property
    def widths(self) -> tuple[int, int]:
        """(K, V)"""
        if self.num_heads < 1:
            raise UserError(f"{type(self).__name__}.num_heads={self.num_heads!r}: expected a whole number >= 1")
        return int(self.expand_k * self.features / self.num_heads), int(self.expand_v * self.features / self.num_heads)

    @nn.nowrap
    def init_state(self, batch: int) -> DeltaState:
        """Zeros."""
        k, v = self.widths
        window = jnp.zeros((batch, self.conv_size - 1, self.num_heads * (2 * k + v)))
        return DeltaState(window, jnp.zeros((batch, self.num_heads, k, v)))

    def setup(self) -> None:
        self._validate()
        h, (k, v) = self.num_heads, self.widths
        self.qkv_proj = self.dense(h * (2 * k + v))
        self.conv = ShortConv(h * (2 * k + v), self.conv_size, use_bias=False)
        self.b_proj = self.dense(h)
        self.norm = nn.RMSNorm(epsilon=1e-5)
        self.out_proj = self.dense(self.features)
        self.setup_gates()

    def setup_gates(self) -> None:
        """Parameters that variants add."""

    @nn.nowrap
    def dense(self, width: int) -> nn.Dense:
        """A projection without bias."""
        return nn.Dense(width, False, self.dtype, kernel_init=LINEAR)

    def log_decay(self, x: Array) -> Array | None:
        """x [B, T, D] -> log alpha [B, T, H], None for no decay."""
        return None

    def gate(self, x: Array, o: Array) -> Array:
        """Normalised outputs o [B, T, H, V] -> the same, gated by x [B, T, D]."""
        return o

    def __call__(
        self, x: Array, *, mask: Array | None = None, state: DeltaState | None = None
    ) -> tuple[Array, DeltaState]:
        """x [B, T, D] -> (out [B, T, D], state); mask as in mixer.py."""
        x, start = begin(self, x, mask, state)
        inputs, window = self._inputs(x, mask, start.conv)
        o, memory = delta_rule(*inputs, state=start.memory, mask=mask, method=self.method)
        out = self._outputs(x, o, inputs[2].dtype)
        return finish(out, x, mask), DeltaState(window, memory)

    def step(self, x: Array, state: DeltaState) -> tuple[Array, DeltaState]:
        """x [B, D] -> (out [B, D], state); constant time and memory."""
        check_sequence(x[:, None], self.features)
        check_state(state, self.init_state(x.shape[0]))
        inputs, window = self._inputs(x[:, None], None, state.conv)
        q, k, v, beta, decay = jax.tree.map(lambda t: t[:, 0], inputs)
        o, memory = delta_step(q, k, v, beta, decay, state.memory)
        out = self._outputs(x[:, None], o[:, None], v.dtype)
        return out[:, 0].astype(x.dtype), DeltaState(window, memory)

    def _inputs(self, x: Array, mask: Array | None, window: Array) -> tuple[Any, Array]:
        h, (k, v) = self.num_heads, self.widths
        z, window = self.conv(self.qkv_proj(x), mask=mask, state=window)
        q, key, value = jnp.split(jax.nn.silu(z), (h * k, 2 * h * k), axis=-1)
        q, key, value = (t.reshape(*t.shape[:2], h, n) for t, n in ((q, k), (key, k), (value, v)))
        beta = jax.nn.sigmoid(self.b_proj(x).astype(scan.compute_dtype(x)))
        beta = 2.0 * beta if self.negative_eigenvalues else beta
        return (l2_normalise(q), l2_normalise(key), value, beta, self.log_decay(x)), window

    def _outputs(self, x: Array, o: Array, dtype: Any) -> Array:
        o = self.gate(x, self.norm(o))
        return self.out_proj(o.reshape(*o.shape[:2], self.num_heads * self.widths[1]).astype(dtype))

    def _validate(self) -> None:
        checks = [
            ("features", self.features, self.features >= 1, "a whole number >= 1"),
            ("expand_k", self.expand_k, self.widths[0] >= 1, "keys of at least one number per head"),
            ("expand_v", self.expand_v, self.widths[1] >= 1, "values of at least one number per head"),
            ("conv_size", self.conv_size, self.conv_size >= 1, "a whole number >= 1"),
            ("method", self.method, self.method in METHODS, f"one of {METHODS}"),
        ]
        for name, value, ok, expected in checks:
            if not ok:
                raise UserError(f"{type(self).__name__}.{name}={value!r}: expected {expected}")


class GatedDeltaNet(DeltaNet):
    """The layer of Yang, Kautz and Hatamizadeh (2025), section 3.4: DeltaNet with a decay and an output gate a head.

    alpha = exp(-exp(A_log) softplus(W_a x + dt_bias)), A = exp(A_log) starting uniform in (0, 16) and softplus(dt_bias)
    log-uniform in `dt_range`; the normalised output is multiplied by SiLU(W_g x). Key and value widths over all heads
    are 0.75 D and 1.5 D, so that a layer has about 6 D^2 weights. Keep A_log and dt_bias out of weight decay.
    """

    expand_k: float = 0.75
    expand_v: float = 1.5
    dt_range: tuple[float, float] = (0.001, 0.1)

    def setup_gates(self) -> None:
        """a_proj, g_proj, A_log, dt_bias."""
        low, high = self.dt_range
        if not 0 < low <= high:
            raise UserError(f"GatedDeltaNet.dt_range={self.dt_range!r}: expected 0 < low <= high")
        rate = lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=1e-3, maxval=16.0))
        self.a_log = self.param("A_log", rate, (self.num_heads,))
        self.dt_bias = self.param("dt_bias", delta_init(self.dt_range), (self.num_heads,))
        self.a_proj = self.dense(self.num_heads)
        self.g_proj = self.dense(self.num_heads * self.widths[1])

    def log_decay(self, x: Array) -> Array:
        """-exp(A_log) softplus(W_a x + dt_bias), [B, T, H]."""
        a = self.a_proj(x).astype(scan.compute_dtype(x))
        return -jnp.exp(self.a_log) * jax.nn.softplus(a + self.dt_bias)

    def gate(self, x: Array, o: Array) -> Array:
        """o SiLU(W_g x)."""
        return o * jax.nn.silu(self.g_proj(x).astype(o.dtype)).reshape(o.shape)
