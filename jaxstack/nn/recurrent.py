"""Recurrent layers unrolled over time: everything that does not depend on the previous step stays outside the scan."""

from typing import Any

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
        wi = self.param("input", nn.initializers.lecun_normal(), (x.shape[-1], 3 * f), jnp.float32)
        bi = self.param("input_bias", nn.initializers.zeros_init(), (3 * f,), jnp.float32)
        wh = self.param("recurrent", _orthogonal_blocks, (f, 3 * f), jnp.float32)
        bn = self.param("candidate_bias", nn.initializers.zeros_init(), (f,), jnp.float32)
        keep = 1.0 - first.astype(x.dtype).reshape(*first.shape, *[1] * (x.ndim - first.ndim))
        gates = x.reshape(-1, x.shape[-1]) @ wi + bi  # one row per sample: see networks.MLP
        return gru_scan(h, gates.reshape(*x.shape[:-1], 3 * f), keep, wh, bn)


@jax.custom_vjp
def gru_scan(h: Array, gates: Array, keep: Array, wh: Array, bn: Array) -> tuple[Array, Array]:
    """h [B.., H], gates [T, B.., 3H] (input part of reset, update, candidate), keep [T, B.., 1], wh [H, 3H], bn [H].

    The adjoint is written out: the weight gradient is one matrix product over all T steps instead of one per step.
    `keep` gets no gradient.
    """

    def body(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        h = _gru_step(h * inputs[1], inputs[0], wh, bn)[0]
        return h, h

    return jax.lax.scan(body, h, (gates, keep))


def _gru_step(h: Array, gates: Array, wh: Array, bn: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """(next h, (reset, update, candidate, recurrent part of the candidate)); h after the episode's reset."""
    xr, xz, xn = jnp.split(gates, 3, axis=-1)
    hr, hz, hn = jnp.split(h @ wh, 3, axis=-1)
    r, z, c = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz), hn + bn
    n = jnp.tanh(xn + r * c)
    return n + z * (h - n), (r, z, n, c)


def _gru_forward(h: Array, gates: Array, keep: Array, wh: Array, bn: Array) -> tuple[Any, Any]:
    def body(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Any]:
        before = h * inputs[1]
        h, parts = _gru_step(before, inputs[0], wh, bn)
        return h, (h, before, parts)

    last, (out, before, parts) = jax.lax.scan(body, h, (gates, keep))
    return (last, out), (before, parts, keep, wh)


def _gru_backward(saved: Any, cotangent: tuple[Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
    before, parts, keep, wh = saved
    d_last, d_out = cotangent

    def body(dh: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
        d, h, (r, z, n, c), k = inputs
        dh = dh + d
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dz = dh * (h - n) * z * (1.0 - z)
        dr = dn * c * r * (1.0 - r)
        d_gates, d_recurrent = jnp.concatenate([dr, dz, dn], -1), jnp.concatenate([dr, dz, dn * r], -1)
        return (dh * z + d_recurrent @ wh.T) * k, (d_gates, d_recurrent)

    d_h, (d_gates, d_recurrent) = jax.lax.scan(body, d_last, (d_out, before, parts, keep), reverse=True)
    rows = d_recurrent.reshape(-1, d_recurrent.shape[-1])
    d_wh = before.reshape(-1, before.shape[-1]).T @ rows
    return d_h, d_gates, jnp.zeros_like(keep), d_wh, rows[:, -before.shape[-1] :].sum(0)


gru_scan.defvjp(_gru_forward, _gru_backward)


def _orthogonal_blocks(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    rows, cols = shape
    init = orthogonal()
    keys = jax.random.split(key, cols // rows)
    return jnp.concatenate([init(k, (rows, rows), dtype) for k in keys], axis=-1)
