"""Recurrent layers unrolled over time: everything that does not depend on the previous step stays outside the scan."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.nn.init import orthogonal


class GRU(nn.Module):
    """Gated recurrent unit (Cho et al., 2014) over T steps, in the variant of cuDNN and flax.linen.GRUCell.

    The input projection is one matrix product for all T; the scan holds only h @ U. The state is set to zero where
    `first` is true, before the step is taken.
    """

    features: int

    @nn.compact
    def __call__(self, h: Array, x: Array, first: Array) -> tuple[Array, Array]:
        """h [B, ..., H], x [T, B, ..., D], first [T, B] bool -> (h after the last step, outputs [T, B, ..., H])."""
        f = self.features
        wi = self.param("input", nn.initializers.lecun_normal(), (x.shape[-1], 3 * f))
        bi = self.param("input_bias", nn.initializers.zeros_init(), (3 * f,))
        wh = self.param("recurrent", _orthogonal_blocks, (f, 3 * f))
        bn = self.param("candidate_bias", nn.initializers.zeros_init(), (f,))
        keep = 1.0 - first.astype(x.dtype).reshape(*first.shape, *[1] * (x.ndim - first.ndim))
        return gru_scan(h, x @ wi + bi, keep, wh, bn)


def gru_scan(h: Array, gates: Array, keep: Array, wh: Array, bn: Array) -> tuple[Array, Array]:
    """h [B.., H], gates [T, B.., 3H] (input part of reset, update, candidate), keep [T, B.., 1], wh [H, 3H], bn [H]."""

    def body(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        g, k = inputs
        h = h * k
        xr, xz, xn = jnp.split(g, 3, axis=-1)
        hr, hz, hn = jnp.split(h @ wh, 3, axis=-1)
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        n = jnp.tanh(xn + r * (hn + bn))
        h = n + z * (h - n)
        return h, h

    return jax.lax.scan(body, h, (gates, keep))


def _orthogonal_blocks(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    rows, cols = shape
    init = orthogonal()
    keys = jax.random.split(key, cols // rows)
    return jnp.concatenate([init(k, (rows, rows), dtype) for k in keys], axis=-1)
