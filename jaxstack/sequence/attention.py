"""Causal softmax attention (Vaswani et al., 2017, arXiv 1706.03762) with a cache of keys and values, as a mixer."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.sequence.linear_attention import check_heads, split_heads
from jaxstack.sequence.mixer import LINEAR, ShortConv, begin, check_at_least, convolve, finish
from jaxstack.sequence.scan import compute_dtype


class KVCache(NamedTuple):
    """Keys and values of the tokens seen, in order from place 0; padding has no place."""

    k: Array
    """[B, context, H, D/H], float32; rotated if the layer rotates."""
    v: Array
    """[B, context, H, D/H], float32"""
    count: Array
    """Tokens seen [B], int32."""
    conv: Array | None = None
    """Last inputs of the convolution [B, K-1, 3D], None without one."""


def rotate(x: Array, position: Array, base: float = 10_000.0) -> Array:
    """Rotary positions (Su et al., 2021, arXiv 2104.09864): x [B, T, H, d], position [B, T] -> as x, float32 or wider.

    Dimensions i and i + d/2 turn by position / base^(2i/d), so q.k depends on the distance of the two tokens alone.
    """
    half = x.shape[-1] // 2
    x = x.astype(compute_dtype(x))
    angle = position[..., None, None] * base ** (-jnp.arange(half, dtype=x.dtype) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: Array, k: Array, v: Array, allowed: Array) -> Array:
    """softmax(q k^T / sqrt(d)) v: q [B, T, H, d], k, v [B, S, H, d], allowed bool [B or 1, T, S], True somewhere in
    each row -> [B, T, H, d], float32 or wider."""
    dtype = compute_dtype(q, k, v)
    logits = jnp.einsum("bthd,bshd->bhts", q.astype(dtype) * q.shape[-1] ** -0.5, k.astype(dtype))
    weights = jax.nn.softmax(jnp.where(allowed[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v.astype(dtype))


class SoftmaxAttention(nn.Module):
    """Multi-head causal softmax attention: in_proj: D -> 3D, softmax(q k^T / sqrt(D/H)) v a head, out_proj: D -> D.

    Without `rope` there is no position code, as in the MAD suite. `conv_size` > 0 puts a causal convolution and SiLU
    before q, k, v, so that one layer can compare a token with its neighbours, as recurrent mixers can; the paper has
    none. The state holds the keys and values of `context` tokens. More tokens are a `UserError` where their number is
    known: T > context, or a state that is not traced.
    Inside jit the count of a state is not known; outputs of tokens beyond the context are NaN there.
    """

    features: int
    """D"""
    num_heads: int = 4
    context: int = 2048
    """The longest sequence, all pieces together."""
    rope: bool = False
    """Rotary positions."""
    rope_base: float = 10_000.0
    conv_size: int = 0
    use_bias: bool = False
    dtype: Any = None
    """Type of the projections; None promotes x and the parameters. Logits and softmax are float32 or wider."""

    @nn.nowrap
    def init_state(self, batch: int) -> KVCache:
        """An empty cache."""
        self._validate()
        shape = (batch, self.context, self.num_heads, self.features // self.num_heads)
        conv = jnp.zeros((batch, self.conv_size - 1, 3 * self.features)) if self.conv_size else None
        return KVCache(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(batch, jnp.int32), conv)

    def setup(self) -> None:
        self._validate()
        dense = lambda width: nn.Dense(width, self.use_bias, self.dtype, kernel_init=LINEAR)
        self.in_proj, self.out_proj = dense(3 * self.features), dense(self.features)
        self.conv = ShortConv(3 * self.features, self.conv_size) if self.conv_size else None

    def __call__(self, x: Array, *, mask: Array | None = None, state: KVCache | None = None) -> tuple[Array, KVCache]:
        """x [B, T, D] -> (y [B, T, D], state); mask as in mixer.py. The cost is T^2, or T context from a state."""
        x, start = begin(self, x, mask, state)
        batch, length = x.shape[:2]
        valid = jnp.ones((batch, length), bool) if mask is None else mask
        self._check_room(length, start.count, valid)
        position = start.count[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        z, window = convolve(self.conv, self.in_proj(x), mask, start.conv)
        q, k, v = (split_heads(y, self.num_heads) for y in jnp.split(z, 3, axis=-1))
        if self.rope:
            q, k = (rotate(y, position, self.rope_base) for y in (q, k))
        place = jnp.where(valid, position, self.context)
        write = jax.vmap(lambda cache, new, at: cache.at[at].set(new.astype(cache.dtype), mode="drop"))
        cache = KVCache(write(start.k, k, place), write(start.v, v, place), start.count + valid.sum(1, dtype=jnp.int32))
        cache = cache._replace(conv=window)
        if state is None and length > 0:
            causal = jnp.tri(length, dtype=bool)
            o = attend(q, k, v, causal & (valid[:, None, :] | jnp.eye(length, dtype=bool)))
        else:
            o = attend(q, cache.k, cache.v, jnp.arange(self.context) <= jnp.maximum(position, 0)[..., None])
            o = jnp.where((position < self.context)[..., None, None], o, jnp.nan)
        y = self.out_proj(o.reshape(x.shape).astype(z.dtype))
        return finish(y, x, mask), cache

    def step(self, x: Array, state: KVCache) -> tuple[Array, KVCache]:
        """x [B, D] -> (y [B, D], state); time in proportion to the context."""
        y, state = self(x[:, None], state=state)
        return y[:, 0], state

    @nn.nowrap
    def _validate(self) -> None:
        check_heads(self, self.features, "features")
        check_at_least(self, context=1, conv_size=0)
        if self.rope and self.features // self.num_heads % 2:
            width = self.features // self.num_heads
            raise UserError(f"SoftmaxAttention.rope=True: expected heads of even width, found {width}")
        if not self.rope_base > 0:
            raise UserError(f"SoftmaxAttention.rope_base={self.rope_base!r}: expected a number > 0")

    @nn.nowrap
    def _check_room(self, length: int, count: Array, valid: Array) -> None:
        if length > self.context:
            raise UserError(f"SoftmaxAttention.context={self.context}: expected at least the {length} tokens of x")
        if isinstance(count, Tracer) or isinstance(valid, Tracer) or not count.size:
            return
        most = int((count + valid.sum(1)).max())
        if most > self.context:
            raise UserError(f"SoftmaxAttention.context={self.context}: the state and x together have {most} tokens")
