"""Sequence parallelism: recurrences and the KLA filter with time spread over the devices of a mesh.

Each device holds T/n tokens. It reduces them to one map of the state (affine: 2 numbers a lane, Moebius: 4), all
devices exchange these n maps, and every device starts its own scan from the state that the earlier maps lead to: two
passes over T/n tokens and one exchange whose size does not depend on T. Gradients go the same way: the adjoint of
either recurrence is a reversed affine scan (see scan.py). Results equal those of one device up to rounding.

A token's neighbour may live on another device; shifts by one (and the short convolution) are left to XLA, which sends
the border tokens alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.sequence import scan
from jaxstack.sequence.kla import KalmanLinearAttention, KLALayerState, KLAState, init_kla_state, silence
from jaxstack.sequence.kla_filter import Token
from jaxstack.sequence.mixer import check_sequence, check_state
from jaxstack.sequence.scan import _apply, _compose, _leaf, _Map

SEQUENCE, DATA = "sequence", "data"
"""Names of the mesh axes that hold time and, if the mesh has it, batch rows."""


def make_mesh(data: int, sequence: int) -> Mesh:
    """A mesh [data, sequence] of the first devices. Raises `UserError` if there are too few."""
    count = data * sequence
    if not 1 <= count <= jax.device_count():
        raise UserError(
            f"data_parallel * sequence_parallel = {count}: expected at most {jax.device_count()}, "
            "the devices of this machine"
        )
    return Mesh(np.asarray(jax.devices()[:count]).reshape(data, sequence), (DATA, SEQUENCE))


def _over(mesh: Mesh, body: Callable[..., Any], kinds: str, outs: str) -> Callable[..., Any]:
    """shard_map with a letter an argument: t [B, T, ...] split in rows and time, b [B, ...] in rows, r a copy each."""
    rows = DATA if DATA in mesh.axis_names else None
    specs = {"t": PartitionSpec(rows, SEQUENCE), "b": PartitionSpec(rows), "r": PartitionSpec()}
    take = lambda letters: tuple(specs[k] for k in letters)
    return jax.shard_map(body, mesh=mesh, in_specs=take(kinds), out_specs=take(outs), check_vma=False)


def _divides(mesh: Mesh, x: Array) -> bool:
    return x.shape[0] % mesh.shape.get(DATA, 1) == 0 and x.shape[1] % mesh.shape[SEQUENCE] == 0


def _check(mesh: Mesh, x: Array) -> None:
    if SEQUENCE not in mesh.axis_names:
        raise UserError(f"mesh has the axes {mesh.axis_names}: expected one named {SEQUENCE!r}")
    if not _divides(mesh, x):
        raise UserError(f"array of shape {x.shape}: rows and time must be divisible by the mesh's {dict(mesh.shape)}")


def affine_scan(a: Array, b: Array, h0: Array, mesh: Mesh, *, reverse: bool = False) -> tuple[Array, Array]:
    """`scan.affine_scan` over axis 1: a, b [B, T, ...] of one shape, h0 [B, ...] -> (h, the last state [B, ...])."""
    _check(mesh, b)

    def body(a: Array, b: Array, h0: Array) -> tuple[Array, Array]:
        local = functools.partial(scan.affine_scan, a, axis=1, reverse=reverse)
        product, total_a = local(jnp.zeros_like(b), jnp.ones_like(h0))
        own, total_b = local(b, jnp.zeros_like(h0))
        maps = jax.lax.all_gather((total_a, total_b), SEQUENCE)
        last, starts = jax.lax.scan(lambda h, m: (m[0] * h + m[1], h), h0, maps, reverse=reverse)
        return own + product * starts[jax.lax.axis_index(SEQUENCE)][:, None], last

    return _over(mesh, body, "ttb", "tb")(a, b, h0)


def moebius_scan(phi: Array, abar2: Array, pbar: Array, lam0: Array, mesh: Mesh) -> tuple[Array, Array]:
    """`scan.moebius_scan` over axis 1: phi [B, T, ...], abar2 and pbar without these axes, lam0 [B, ...]."""
    _check(mesh, phi)
    phi, pbar = scan.bounded(phi, pbar)
    return _moebius(phi, abar2, pbar, lam0, mesh)


@scan.own_adjoint(4)
def _moebius(phi: Array, abar2: Array, pbar: Array, lam0: Array, mesh: Mesh) -> tuple[Array, Array]:
    def body(phi: Array, abar2: Array, pbar: Array, lam0: Array) -> tuple[Array, Array]:
        add = lambda total, x: (_compose(total, _leaf(x, abar2, pbar)), None)
        one, zero = jnp.ones_like(lam0), jnp.zeros_like(lam0)
        total, _ = jax.lax.scan(add, _Map(one, zero, zero, one), jnp.swapaxes(phi, 0, 1))
        maps = jax.lax.all_gather(total, SEQUENCE)
        last, starts = jax.lax.scan(lambda lam, m: (_apply(m, lam), lam), lam0, maps)
        lam, _ = scan.moebius_scan(phi, abar2, pbar, starts[jax.lax.axis_index(SEQUENCE)], axis=1)
        return lam, last

    return _over(mesh, body, "trrb", "tb")(phi, abar2, pbar, lam0)


def _forward(phi: Array, abar2: Array, pbar: Array, lam0: Array, mesh: Mesh) -> Any:
    lam, last = _moebius(phi, abar2, pbar, lam0, mesh)
    return (lam, last), (lam, abar2, pbar, lam0)


def _backward(mesh: Mesh, saved: Any, cotangent: Any) -> tuple[Array, Array, Array, Array]:
    lam, abar2, pbar, lam0 = saved
    d, d_last = cotangent
    before = jnp.concatenate([lam0[:, None], lam[:, :-1]], 1)
    low, high = scan.precision_range(lam.dtype)
    inside = (lam > low) & (lam < high)
    rho = jnp.where(inside, 1.0 / jnp.maximum(abar2 + pbar * before, low**0.5), 0.0)
    gain = abar2 * rho * rho
    shifted = jnp.concatenate([gain[:, 1:], jnp.zeros_like(gain[:, :1])], 1)
    nu, _ = affine_scan(shifted, d.at[:, -1].add(d_last), jnp.zeros_like(lam0), mesh, reverse=True)
    pull = -nu * rho * rho * before
    return jnp.where(inside, nu, 0.0), pull.sum((0, 1)), (pull * before).sum((0, 1)), gain[:, 0] * nu[:, 0]


_moebius.defvjp(_forward, _backward)


def kla_scan(
    v: Array,
    obs_precision: Array,
    k: Array,
    q: Array,
    abar: Array,
    pbar: Array,
    mesh: Mesh,
    *,
    state: KLAState | None = None,
    read: str = "posterior",
) -> tuple[Array, Array, KLAState]:
    """`kla.kla_scan` without padding, with B over the mesh's `data` axis and T over `sequence`; both must divide."""
    dtype = scan.compute_dtype(v, obs_precision, k, q, abar, pbar)
    v, precision, k, q = silence(Token(*(x.astype(dtype) for x in (v, obs_precision, k, q))), None, "freeze")
    state = init_kla_state(v.shape[0], v.shape[2], k.shape[-1], dtype) if state is None else state
    v, precision, k, q = v[..., None], precision[..., None], k[:, :, None], q[:, :, None]
    lam, last = moebius_scan(precision * k * k, abar * abar, pbar, state.precision, mesh)
    earlier = jnp.concatenate([state.precision[:, None], lam[:, :-1]], axis=1)
    kept = scan.predict_precision(earlier, abar * abar, pbar) / lam
    mean, last_mean = affine_scan(abar * kept, k * precision / lam * v, state.mean, mesh)
    mu, var = mean, 1.0 / lam
    if read == "prior":
        mu, var = abar * mu, abar * abar * var + pbar
    return (q * mu).sum(-1), (q * q * var).sum(-1), KLAState(last, last_mean)


class ShardedKLA(KalmanLinearAttention):
    """The KLA layer with its filter spread over a mesh; parameters, states and results are those of the plain layer.

    Batches that the mesh does not divide, and padded ones, run the plain filter.
    """

    mesh: Mesh | None = None

    def __call__(
        self, x: Array, *, mask: Array | None = None, state: KLALayerState | None = None, return_variance: bool = False
    ) -> Any:
        """As the plain layer."""
        mesh = self.mesh
        if mesh is None or mask is not None or not _divides(mesh, x):
            return super().__call__(x, mask=mask, state=state, return_variance=return_variance)
        check_sequence(x, self.features)
        state = self.init_state(x.shape[0]) if state is None else state
        check_state(state, self.init_state(x.shape[0]))
        z, gate, window = self._inputs(x, None, state.conv)
        sensed = self._sense(z)
        y, var, belief = kla_scan(*sensed, *self.dynamics(), mesh, state=state.belief, read=self.read)
        out, out_var = self._outputs(y, var, z, gate, return_variance)
        out, state = out.astype(x.dtype), KLALayerState(window, belief)
        return (out, out_var, state) if return_variance else (out, state)


def shard_mixer(mixer: Any, mesh: Mesh) -> Any:
    """A KLA layer that runs over `mesh`; other mixers as they are, XLA partitions them."""
    if type(mixer) is not KalmanLinearAttention:
        return mixer
    own = [f.name for f in dataclasses.fields(mixer) if f.name not in ("parent", "name")]
    return ShardedKLA(**{name: getattr(mixer, name) for name in own}, mesh=mesh)
