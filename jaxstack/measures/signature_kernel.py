"""The signature kernel of paths: k(x, y) = <S(x), S(y)> by Goursat's equation, without truncation.

Salvi, Cass, Foster, Lyons and Yang (2021), "The signature kernel is the solution of a Goursat PDE". `make_paths` turns
trajectories into paths with a time channel; `signature_kernel_gram` gives the kernel of all pairs.

Numbers are of the type of the paths: give float64 (`with jax.enable_x64():`) where paths are long or differences small.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxstack.core.errors import UserError

Static = Literal["rbf", "linear"]
Scheme = Literal["second", "naive"]


class Kernel(NamedTuple):
    """Which signature kernel; hashable, so it can be a static argument."""

    static: Static = "rbf"
    """rbf: exp(-|a - b|^2 / sigma); linear: a . b."""
    sigma: float = 1.0
    """Of rbf; no factor 2."""
    order: int = 2
    """Dyadic refinement: each cell becomes 2^order x 2^order."""
    scheme: Scheme = "second"
    """second: (1 + z/2 + z^2/12), the error falls towards four times per order; naive: first order."""


def checked(kernel: Kernel) -> Kernel:
    """Return the kernel.

    Raises:
        UserError: For a field out of its range.
    """
    if kernel.static not in ("rbf", "linear"):
        raise UserError(f"static={kernel.static!r}: expected 'rbf' or 'linear'")
    if kernel.scheme not in ("second", "naive"):
        raise UserError(f"scheme={kernel.scheme!r}: expected 'second' or 'naive'")
    if not 0.0 < kernel.sigma < float("inf"):
        raise UserError(f"sigma={kernel.sigma!r}: expected a number > 0")
    if not 0 <= kernel.order <= 10:
        raise UserError(f"order={kernel.order!r}: expected 0 to 10")
    return kernel


def make_paths(
    values: ArrayLike,
    times: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    time: bool = True,
    span: tuple[float, float] | None = None,
    lead_lag: bool = False,
    basepoint: bool = True,
) -> Float[Array, "n p c"]:
    """Turn trajectories into paths, all of one length.

    A missing stamp is dropped: the last present point stands in its place, which adds no increment, so the path is the
    one through the points that are there. Scale the variables with fixed constants before, never with statistics of a
    forecast.

    Args:
        values: Trajectories [N, L, d]; what stands at missing stamps is not read.
        times: Stamps, common [L] or of each trajectory [N, L]; default: 0, 1, ... Missing ones are not read.
        mask: True where a stamp is present [N, L]; each trajectory needs one.
        time: Add the stamps as a channel, in front.
        span: Stamps that become 0 and 1; default: the first and last one given. Where the samples to be compared have
            stamps of their own, all need the same span.
        lead_lag: Double the variables, the second half one step behind.
        basepoint: Begin at 0, without which the level of a trajectory cannot be seen.

    Returns:
        [N, P, C] with P = L, or 2L - 1 with lead-lag, and one more with a base point.

    Raises:
        UserError: For shapes that do not fit, times that do not increase, numbers that are not finite, or a trajectory
            without a stamp.
    """
    values = jnp.asarray(values)
    values = values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float)
    if values.ndim != 3 or 0 in values.shape:
        raise UserError(f"values: found shape {list(values.shape)}, expected [N, L, d], none of them 0")
    n, length, _ = values.shape
    stamps = np.arange(length, dtype=np.float64) if times is None else np.asarray(times, np.float64)
    if stamps.shape not in ((length,), (n, length)):
        raise UserError(f"times: found shape {list(stamps.shape)}, expected [{length}] or [{n}, {length}]")
    stamps = np.broadcast_to(stamps, (n, length))
    moved = np.full((n, max(length - 1, 0)), True)
    if mask is not None:
        present = np.asarray(mask, bool)
        if present.shape != (n, length):
            raise UserError(f"mask: found shape {list(present.shape)}, expected [{n}, {length}]")
        if not present.any(1).all():
            raise UserError(f"mask: trajectory {int(np.argmin(present.any(1)))} has no stamp")
        last = np.maximum.accumulate(np.where(present, np.arange(length), -1), axis=1)
        take = np.where(last < 0, present.argmax(1)[:, None], last)
        stamps, moved = np.take_along_axis(stamps, take, 1), np.diff(take, axis=1) > 0
        values = jnp.take_along_axis(values, jnp.asarray(take)[..., None], 1)
    if not np.isfinite(stamps).all():
        raise UserError("times: found a stamp that is not finite")
    if not (np.diff(stamps, axis=1)[moved] > 0).all():
        raise UserError("times: found stamps that do not increase along a trajectory")
    if not isinstance(values, Tracer) and not bool(jnp.isfinite(values).all()):
        raise UserError("values: found a number that is not finite at a stamp that is present")
    first, final = (stamps.min(), stamps.max()) if span is None else span
    if span is not None and not first < final:
        raise UserError(f"span={span}: expected two stamps, the first one earlier")
    t = jnp.asarray((stamps - first) / (final - first if final > first else 1.0), values.dtype)
    if lead_lag:
        twice = lambda x: jnp.repeat(x, 2, 1)
        values = jnp.concatenate([twice(values)[:, 1:], twice(values)[:, :-1]], -1)
        t = twice(t)[:, 1:]
    paths = jnp.concatenate([t[..., None], values], -1) if time else values
    return jnp.pad(paths, ((0, 0), (1, 0), (0, 0))) if basepoint else paths


def median_sigma(paths: Float[Array, "n p c"], most: int = 1000) -> float:
    """Compute the median heuristic for `Kernel.sigma`: the median of |a - b|^2 over points a, b of paths.

    Args:
        paths: Of training data, never of a forecast.
        most: Points that are used, evenly spread over the paths.

    Raises:
        UserError: Where more than half of the points are equal.
    """
    points = np.asarray(paths, np.float64).reshape(-1, np.shape(paths)[-1])
    points = points[np.linspace(0, len(points) - 1, min(most, len(points))).astype(int)]
    far = np.square(points[:, None] - points[None]).sum(-1)[np.triu_indices(len(points), 1)]
    middle = float(np.median(far)) if len(far) else 0.0
    if not middle > 0:
        raise UserError("paths: the median distance of their points is 0, give sigma as a number")
    return middle


def increments(x: Float[Array, "p c"], y: Float[Array, "q c"], kernel: Kernel) -> Float[Array, "p-1 q-1"]:
    """Compute z_ij, the mixed second differences of the static kernel; for the linear one <dx_i, dy_j>."""
    if kernel.static == "linear":
        return jnp.diff(x, axis=0) @ jnp.diff(y, axis=0).T
    far = jnp.square(x[:, None] - y[None]).sum(-1)
    return jnp.diff(jnp.diff(jnp.exp(-far / kernel.sigma), axis=0), axis=1)


def goursat(z: Float[Array, "p q"], kernel: Kernel) -> Float[Array, ""]:
    """Solve d^2 u / ds dt = z u with u(0, .) = u(., 0) = 1 for u(1, 1), on a grid refined 2^order times.

    u_{i+1,j+1} = (u_{i+1,j} + u_{i,j+1}) (1 + z/2 + z^2/12) - u_{i,j} (1 - z^2/12), or
    u_{i+1,j} + u_{i,j+1} + u_{i,j} (z - 1) in the naive scheme. A step of the scan is an anti-diagonal of the grid.
    """
    if 0 in z.shape:
        return jnp.ones((), z.dtype)
    z = z.T if z.shape[0] > z.shape[1] else z
    parts = 2**kernel.order
    rows, columns = z.shape[0] * parts, z.shape[1] * parts
    # a last column of zeros is for cells outside the grid: u stays 1 before column 0, and as it was beyond the end
    cells = jnp.pad(z / parts**2, ((0, 0), (0, 1)))
    of_row = np.arange(rows)

    def diagonal(last: tuple[Array, Array], d: Array) -> tuple[tuple[Array, Array], None]:
        before, u = last  # u_{i,d-i} and u_{i,d+1-i}
        j = d - of_row
        column = jnp.where((j >= 0) & (j < columns), j // parts, z.shape[1])
        own = cells.at[of_row // parts, column].get(mode="promise_in_bounds")
        if kernel.scheme == "naive":
            new = u[1:] + u[:-1] + before[:-1] * (own - 1.0)
        else:
            square = jnp.square(own) / 12.0
            new = (u[1:] + u[:-1]) * (1.0 + own / 2.0 + square) - before[:-1] * (1.0 - square)
        return (u, jnp.concatenate([jnp.ones((1,), z.dtype), new])), None

    ones = jnp.ones(rows + 1, z.dtype)
    (_, last), _ = jax.lax.scan(diagonal, (ones, ones), jnp.arange(rows + columns - 1, dtype=jnp.int32))
    return last[-1]


@jax.jit(static_argnames=("kernel",))
def signature_kernel(x: Float[Array, "p c"], y: Float[Array, "q c"], kernel: Kernel = Kernel()) -> Float[Array, ""]:
    """Compute k(x, y) of two paths."""
    return goursat(increments(x, y, checked(kernel)), kernel)


def signature_kernel_gram(
    x: Float[Array, "n p c"],
    y: Float[Array, "m q c"] | None = None,
    kernel: Kernel = Kernel(),
    block: int | None = None,
) -> Float[Array, "n m"]:
    """Compute k(x_i, y_j) of all pairs; of x with itself where y is left out, each pair once.

    Args:
        x: Paths of one length (`make_paths`).
        y: Paths with the same channels.
        kernel: See `Kernel`.
        block: Pairs that are computed at once; default: as many as a CPU's cache holds.

    Raises:
        UserError: For paths of different channels, or a field of the kernel out of its range.
    """
    if x.ndim != 3 or (y is not None and (y.ndim != 3 or y.shape[2] != x.shape[2])):
        raise UserError(f"paths: found {x.shape} and {None if y is None else y.shape}, expected [N, P, C] of equal C")
    if y is None:
        rows, columns = np.triu_indices(len(x))
    else:
        rows, columns = (i.ravel() for i in np.indices((len(x), len(y))))
    return _gram(x, y, rows.astype(np.int32), columns.astype(np.int32), checked(kernel), block)


@jax.jit(static_argnames=("kernel", "block"))
def _gram(x: Array, y: Array | None, rows: Array, columns: Array, kernel: Kernel, block: int | None) -> Array:
    if y is not None:
        return _pairs(x, y, rows, columns, kernel, block).reshape(len(x), len(y))
    found = _pairs(x, x, rows, columns, kernel, block)
    half = jnp.zeros((len(x), len(x)), found.dtype).at[rows, columns].set(found)
    return half + jnp.triu(half, 1).T


def self_kernels(x: Float[Array, "n p c"], kernel: Kernel = Kernel()) -> Float[Array, " n"]:
    """Compute k(x_i, x_i)."""
    own = np.arange(len(x), dtype=np.int32)
    return _pairs(x, x, own, own, checked(kernel), None)


@jax.jit(static_argnames=("kernel", "block"))
def _pairs(x: Array, y: Array, rows: Array, columns: Array, kernel: Kernel, block: int | None) -> Array:
    if block is None:
        cells = max(min(x.shape[1], y.shape[1]) - 1, 1) * 2**kernel.order
        block = max(8, 4096 // cells)
    count = len(rows)
    block = min(block, count)
    # whole blocks, so that the solver is compiled once
    rows, columns = (jnp.pad(i, (0, -count % block)) for i in (rows, columns))
    of_pair = lambda pair: signature_kernel(x[pair[0]], y[pair[1]], kernel)
    return jax.lax.map(of_pair, (rows, columns), batch_size=block)[:count]


def truncated_signature(x: Float[Array, "p c"], depth: int) -> Float[Array, " s"]:
    """Compute levels 1 to `depth` of a path's signature, one after another: C + C^2 + ... numbers.

    By Chen's identity, segment by segment.

    Raises:
        UserError: For a depth below 1.
    """
    if depth < 1:
        raise UserError(f"depth={depth}: expected at least 1")
    channels = x.shape[1]

    def segment(levels: tuple[Array, ...], dx: Array) -> tuple[tuple[Array, ...], None]:
        powers = [jnp.ones((), x.dtype)]
        for k in range(1, depth + 1):
            powers.append(jnp.tensordot(powers[-1], dx, 0) / k)
        whole = (jnp.ones((), x.dtype), *levels)
        product = lambda k: sum((jnp.tensordot(whole[i], powers[k - i], 0) for i in range(1, k + 1)), powers[k])
        return tuple(product(k) for k in range(1, depth + 1)), None

    start = tuple(jnp.zeros((channels,) * k, x.dtype) for k in range(1, depth + 1))
    levels, _ = jax.lax.scan(segment, start, jnp.diff(x, axis=0))
    return jnp.concatenate([level.ravel() for level in levels])
