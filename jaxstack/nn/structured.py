"""Structured linear maps from C_in to C_out channels, each with one size (Gray, Crowley and Storkey, 2019).

A map is a dictionary of arrays; `param_shapes` says which for a kind, channels and a size, `structured_matrix` gives
the matrix [C_in, C_out] that they stand for, `apply_structured` multiplies by it in the cheapest way, and
`closest` finds the arrays whose matrix is nearest to a given one. Channels are the last axis.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jax import lax
from jaxtyping import Array

from jaxstack.core.errors import UserError, unknown
from jaxstack.core.learner import Key
from jaxstack.nn.linalg import eigenvectors, leading

KINDS = ("dense", "generic", "lowrank", "shuffle", "acdc", "tt", "tucker", "hashed", "hashed-full")
"""dense: no structure; generic: low rank; lowrank: low rank with one factor for both sides; shuffle: two grouped maps
with a channel shuffle between; acdc: products of diagonals and cosine transforms; tt: tensor train; tucker: Tucker;
hashed: weights shared at random; hashed-full: so too the whole kernel of a convolution."""
SIZES = {
    "generic": 0.1,
    "lowrank": 0.1,
    "shuffle": 4.0,
    "acdc": 12.0,
    "tt": 0.44,
    "tucker": 0.41,
    "hashed": 0.2,
    "hashed-full": 0.02,
}
"""The sizes that are used where none is given, and what a size is: share of max(C_in, C_out) that the rank has
(generic, lowrank), groups (shuffle), layers (acdc), share of the dimensions that the ranks have (tt, tucker), share of
the weights (hashed, hashed-full)."""
WAYS = 3
"""Dimensions of the tensor that tt and tucker make of a matrix; the paper tried 2, 4 and 6 too."""
Shape = tuple[int, int]
"""Channels in and out."""
Params = Mapping[str, Any]


def param_shapes(
    kind: str, shape: Shape, size: float | None = None, kernel: int = 1, reference_compat: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of a map.

    Args:
        kind: one of `KINDS`.
        shape: channels in and out.
        size: see `SIZES`; None: the value there.
        kernel: entries of the kernel, for hashed-full.
        reference_compat: as released: one layer of acdc fewer than named, groups lowered until they divide, tucker's
            core as a tensor train, a bias with hashed.

    Raises:
        UserError: an unknown kind, or a size that makes no map of these channels.
    """
    if kind not in KINDS:
        raise unknown("pointwise", kind, KINDS)
    size = SIZES.get(kind, 1.0) if size is None else float(size)
    c_in, c_out = shape
    count = c_in * c_out
    wrong = lambda what: UserError(f"size={size:g} of pointwise={kind!r} with {c_in} to {c_out} channels: {what}")
    if not (math.isfinite(size) and size > 0):
        raise wrong("expected a positive number")
    if kind == "dense":
        return {"kernel": shape}
    if kind in ("generic", "lowrank"):
        rank = int(size * max(shape))
        if rank < 1:
            raise wrong(f"found rank 0, expected at least 1, a size of {1 / max(shape):.3g} or more")
        if kind == "generic":
            return {"reduce": (c_in, rank), "expand": (rank, c_out)}
        if c_out % c_in:
            raise wrong("expected as many channels out as in, or a multiple")
        return {"factor": (rank, c_out)}
    if kind in ("shuffle", "acdc") and size != int(size):
        raise wrong(f"expected a whole number of {'groups' if kind == 'shuffle' else 'layers'}")
    if kind == "shuffle":
        middle, groups = c_out // 4, int(size)
        if middle < 1:
            raise wrong("expected at least 4 channels out")
        divides = lambda g: c_in % g == 0 and c_out % g == 0 and middle % g == 0
        if reference_compat:
            groups = next(g for g in range(groups, 0, -1) if divides(g))
        if not divides(groups):
            raise wrong(f"groups do not divide, expected a divisor of {c_in}, {c_out} and {middle}")
        return {
            "reduce": (groups, c_in // groups, middle // groups),
            "expand": (groups, middle // groups, c_out // groups),
        }
    if kind == "acdc":
        width, layers = max(shape), int(size) - reference_compat
        if c_in > c_out and c_in % c_out:
            raise wrong("expected a divisor of the channels in, so that neighbours can be summed")
        if width % 2:
            raise wrong(f"found {width} channels inside, expected an even number")
        if layers < 1:
            raise wrong("expected at least 2 layers, of which the released code makes one fewer")
        return {"a": (layers, width), "d": (layers, width)}
    if kind in ("tt", "tucker"):
        dims = tensor_shape(count)
        if kind == "tt":
            ranks = (1, *tt_ranks(dims, size), 1)
            return {f"core_{i}": (ranks[i], n, ranks[i + 1]) for i, n in enumerate(dims)}
        ranks = tucker_ranks(dims, size)
        found = {f"factor_{i}": (n, r) for i, (n, r) in enumerate(zip(dims, ranks))}
        if not reference_compat:
            return {**found, "core": ranks}
        bonds = (1, *released_bonds(dims, ranks), 1)
        return {**found, **{f"core_{i}": (bonds[i], n, bonds[i + 1]) for i, n in enumerate(ranks)}}
    whole = count * (kernel if kind == "hashed-full" else 1)
    budget = int(size * whole)
    if not 1 <= budget <= whole:
        raise wrong(f"found {budget} weights, expected 1 to {whole}")
    return {"theta": (budget,), **({"bias": (c_out,)} if reference_compat else {})}


def structured_matrix(kind: str, params: Params, shape: Shape) -> Array:
    """Return the matrix [C_in, C_out] of a map.

    Args:
        kind: one of `KINDS` but hashed-full, which is no matrix of channels (see `hashed_weights`).
        params: arrays of `param_shapes`; hashed also needs `index`, [C_in, C_out] int.
        shape: channels in and out.

    Raises:
        UserError: an unknown kind.
    """
    if kind == "dense":
        return params["kernel"]
    if kind == "generic":
        return params["reduce"] @ params["expand"]
    if kind == "lowrank":
        return tied_reduce(params["factor"], shape[0]) @ params["factor"]
    if kind == "shuffle":
        reduce, expand = (grouped_matrix(params[name]) for name in ("reduce", "expand"))
        return channel_shuffle(reduce, params["reduce"].shape[0]) @ expand
    if kind == "acdc":
        return contracted(acdc_matrix(params["a"], params["d"]).T, shape)
    if kind == "tt":
        cores = [params[f"core_{i}"] for i in range(sum(name.startswith("core_") for name in params))]
        return tt_full(cores).reshape(shape[::-1]).T
    if kind == "tucker":
        factors = [params[f"factor_{i}"] for i in range(sum(name.startswith("factor_") for name in params))]
        core = params["core"] if "core" in params else tt_full([params[f"core_{i}"] for i in range(len(factors))])
        return tucker_full(core, factors).reshape(shape[::-1]).T
    if kind == "hashed":
        return hashed_weights(params["theta"], params["index"])
    raise unknown("pointwise", kind, [k for k in KINDS if k != "hashed-full"])


def apply_structured(kind: str, params: Params, x: Array, features: int) -> Array:
    """Multiply channels by a map: [..., C_in] -> [..., features].

    Low-rank and grouped maps are applied one factor after the other. acdc is streamed through cosine transforms where x
    has fewer rows than channels; elsewhere one matrix is made of all layers first. What is left is as dear as a dense
    map: tt, tucker and hashed save memory, not time.
    """
    shape = (x.shape[-1], features)
    rows = x.reshape(-1, shape[0])
    if kind == "generic":
        out = rows @ params["reduce"] @ params["expand"]
    elif kind == "lowrank":
        out = rows @ tied_reduce(params["factor"], shape[0]) @ params["factor"]
    elif kind == "shuffle":
        out = grouped_map(
            channel_shuffle(grouped_map(rows, params["reduce"]), params["reduce"].shape[0]), params["expand"]
        )
    elif kind == "acdc" and len(rows) < max(shape):
        out = contracted_rows(acdc_stream(params["a"], params["d"], expanded(rows, shape)), shape)
    else:
        out = rows @ structured_matrix(kind, params, shape)
    if "bias" in params:
        out = out + params["bias"]
    return out.reshape(*x.shape[:-1], features)


def position_mult_adds(kind: str, shapes: Mapping[str, tuple[int, ...]], shape: Shape) -> int:
    """Return the multiply-adds of a map for each pixel, from its `param_shapes`.

    acdc has 4 N + 5 N log2(N) for each layer, those of the streamed form, as the paper counts; tt, tucker and hashed
    have those of the dense map that is made of them, which is not counted itself. Shuffles and sums of channels are
    free.
    """
    c_in, c_out = shape
    if kind in ("generic", "shuffle"):
        return math.prod(shapes["reduce"]) + math.prod(shapes["expand"])
    if kind == "lowrank":
        return shapes["factor"][0] * (c_in + c_out)
    if kind == "acdc":
        layers, n = shapes["a"]
        return round(layers * (4 * n + 5 * n * math.log2(n)))
    return c_in * c_out


def closest(kind: str, matrix: Array, size: float | None = None, index: Array | None = None) -> dict[str, Array]:
    """Return the arrays of a map that stand for a given matrix, or for one near it.

    Generic by singular vectors (the nearest of its rank), tt by TT-SVD (Oseledets, 2011), tucker by HOSVD (De Lathauwer
    et al., 2000), hashed by means over the weights that share one (the nearest for its index).

    Args:
        kind: dense, generic, tt, tucker or hashed.
        matrix: [C_in, C_out].
        size: see `SIZES`.
        index: [C_in, C_out] int, for hashed.

    Raises:
        UserError: another kind, or hashed without index.
    """
    shape = (matrix.shape[0], matrix.shape[1])
    shapes = param_shapes(kind, shape, size)
    if kind == "dense":
        return {"kernel": matrix}
    if kind == "generic":
        rank = shapes["reduce"][1]
        fits = min(rank, *shape)
        reduce, expand = leading(matrix, fits)
        pad = rank - fits
        return {"reduce": jnp.pad(reduce, ((0, 0), (0, pad))), "expand": jnp.pad(expand, ((0, pad), (0, 0)))}
    if kind in ("tt", "tucker"):
        return factored(kind, matrix, shapes)
    if kind == "hashed" and index is not None:
        count = shapes["theta"][0]
        total = lambda v: jax.ops.segment_sum(jnp.ravel(v), jnp.ravel(index), count)
        return {"theta": total(matrix) / jnp.maximum(total(jnp.ones_like(matrix)), 1.0)}
    raise UserError(f"pointwise={kind!r}: expected dense, generic, tt, tucker, or hashed with an index")


def factored(kind: str, matrix: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Cores and factors of tt or tucker in given shapes, for a matrix [C_in, C_out]."""
    cores = [s for name, s in shapes.items() if name.startswith("core_")]
    if kind == "tt":
        tensor = matrix.T.reshape([s[1] for s in cores])
        found = tt_svd(tensor, [s[2] for s in cores[:-1]])
        return {f"core_{i}": core for i, core in enumerate(found)}
    sides = [s for name, s in shapes.items() if name.startswith("factor_")]
    core, factors = hosvd(matrix.T.reshape([s[0] for s in sides]), [s[1] for s in sides])
    named: dict[str, Array] = {f"factor_{i}": f for i, f in enumerate(factors)}
    if not cores:
        return {**named, "core": core}
    return {**named, **{f"core_{i}": c for i, c in enumerate(tt_from_right(core, [s[2] for s in cores[:-1]]))}}


# Low rank with one factor for both sides


def tied_reduce(factor: Array, c_in: int) -> Array:
    """The left factor [C_in, r] of V^T V, V [r, C_out], for an input that is repeated C_out / C_in times."""
    rank, c_out = factor.shape
    return factor.reshape(rank, c_out // c_in, c_in).sum(1).T


# Grouped maps with a channel shuffle


def channel_shuffle(x: Array, groups: int) -> Array:
    """Channels [..., g, C / g] in the order [..., C / g, g] (Zhang et al., 2018). The inverse has C / g groups."""
    split = x.reshape(*x.shape[:-1], groups, -1)
    return jnp.swapaxes(split, -1, -2).reshape(x.shape)


def grouped_map(x: Array, kernel: Array) -> Array:
    """Maps [g, C / g, K / g] of groups of channels: [..., C] -> [..., K]."""
    split = x.reshape(*x.shape[:-1], *kernel.shape[:2])
    return jnp.einsum("...gc,gck->...gk", split, kernel).reshape(*x.shape[:-1], -1)


def grouped_matrix(kernel: Array) -> Array:
    """A grouped map [g, C / g, K / g] as a matrix [C, K] of blocks on the diagonal."""
    groups, c, k = kernel.shape
    return jnp.einsum("gck,gh->gchk", kernel, jnp.eye(groups, dtype=kernel.dtype)).reshape(groups * c, groups * k)


# ACDC (Moczulski et al., 2016)


@functools.cache
def _expansion(c_in: int, c_out: int) -> np.ndarray:
    """Which input channel each of C_out > C_in is: the input, extended by its own first channels until they divide
    C_out, and repeated."""
    wide = next(n for n in range(c_in, c_out + 1) if c_out % n == 0)
    return np.arange(c_out) % wide % c_in


def expanded(x: Array, shape: Shape) -> Array:
    """Inputs [..., C_in] as the N = max(C_in, C_out) channels inside."""
    return x if shape[0] >= shape[1] else x[..., _expansion(*shape)]


def contracted_rows(y: Array, shape: Shape) -> Array:
    """Outputs of N channels as [..., C_out]: neighbours are summed where there are more."""
    c_in, c_out = shape
    return y if c_in <= c_out else y.reshape(*y.shape[:-1], c_out, c_in // c_out).sum(-1)


def contracted(square: Array, shape: Shape) -> Array:
    """A map of the N channels inside, [N, N] of inputs by outputs, as one of C_in to C_out."""
    outer = contracted_rows(square, shape)
    if shape[0] >= shape[1]:
        return outer
    return jax.ops.segment_sum(outer, jnp.asarray(_expansion(*shape)), shape[0])


def riffle(x: Array) -> Array:
    """Even places of the last axis first, then the odd ones."""
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], -1)


def unriffle(x: Array) -> Array:
    """The inverse of `riffle`."""
    half = x.shape[-1] // 2
    return jnp.stack([x[..., :half], x[..., half:]], -1).reshape(x.shape)


@functools.cache
def _cosines(n: int) -> tuple[np.ndarray, np.ndarray]:
    """C with rows dct(e_i), DCT-II without normalisation, and its inverse."""
    forward = np.asarray(scipy.fft.dct(np.eye(n)))
    return forward.astype(np.float32), np.linalg.inv(forward).astype(np.float32)


def acdc_layer(a: Array, d: Array) -> Array:
    """M = riffle(diag(a) C) diag(d) C^-1 of one layer, a and d [N]; riffle permutes columns."""
    forward, inverse = _cosines(len(a))
    return riffle(a[:, None] * forward) @ (d[:, None] * inverse)


def acdc_matrix(a: Array, d: Array) -> Array:
    """The product of all layers' riffle(M), first one left, [N, N] of outputs by inputs; a and d are [L, N].

    In the gradient each layer is computed again instead of being kept.
    """
    forward, inverse = _cosines(a.shape[1])

    @jax.checkpoint
    def layer(product: Array, ad: tuple[Array, Array]) -> tuple[Array, None]:
        middle = riffle((product * ad[0]) @ forward)
        return riffle((middle * ad[1]) @ inverse), None

    return lax.scan(layer, jnp.eye(a.shape[1], dtype=a.dtype), (a, d))[0]


def acdc_stream(a: Array, d: Array, x: Array) -> Array:
    """x [..., N] times the transposed `acdc_matrix`, by cosine transforms: N log N for each layer and row."""
    n = a.shape[1]
    # C is orthonormal but for this scale of frequencies
    scale = jnp.full(n, math.sqrt(2 * n), jnp.float32).at[0].set(2 * math.sqrt(n))

    def layer(x: Array, ad: tuple[Array, Array]) -> tuple[Array, None]:
        x = jax.scipy.fft.dct(unriffle(x), norm="ortho") / scale
        x = jax.scipy.fft.idct(scale * unriffle(ad[1] * x), norm="ortho")
        return ad[0] * x, None

    return lax.scan(layer, x, (a, d), reverse=True)[0]


# Tensor trains and Tucker


def tensor_shape(count: int, ways: int = WAYS) -> tuple[int, ...]:
    """About equal dimensions whose product is `count`.

    The same number for all where a root exists; else for each but the last the smallest divisor of what is left that is
    not below the rounded root.
    """
    root = math.exp(math.log(count) / ways)
    if abs(round(root) - root) < 1e-6:
        return (round(root),) * ways
    dims, left = [], count
    for _ in range(ways - 1):
        least = round(root)
        dims.append(left if left < least else next(n for n in range(least, left + 1) if left % n == 0))
        left //= dims[-1]
    return (*dims, left)


def full_ranks(dims: Sequence[int]) -> tuple[int, ...]:
    """The ranks between neighbouring dimensions at which a tensor train is exact for every tensor, the least such."""
    bounds, found = [math.prod(dims[i + 1 :]) for i in range(len(dims) - 1)], []
    for n, bound in zip(dims, bounds):
        found.append(min((found[-1] if found else 1) * n, bound))
    return tuple(found)


def tt_ranks(dims: Sequence[int], size: float) -> tuple[int, ...]:
    """max(1, round(size min(d_k, d_k+1))), and no more than `full_ranks`."""
    wanted = [max(1, round(size * min(a, b))) for a, b in itertools.pairwise(dims)]
    return tuple(min(w, full) for w, full in zip(wanted, full_ranks(dims)))


def tucker_ranks(dims: Sequence[int], size: float) -> tuple[int, ...]:
    """max(1, round(size d_k)), and no more than d_k or the product of the other ranks' dimensions."""
    count = math.prod(dims)
    return tuple(min(max(1, round(size * n)), n, count // n) for n in dims)


def tt_svd(tensor: Array, ranks: Sequence[int]) -> list[Array]:
    """Cut a tensor into a train of cores [r_k, d_k, r_k+1], first bond first (Oseledets, 2011).

    Args:
        tensor: [d_1, ..., d_n].
        ranks: of the n - 1 bonds.
    """
    dims, cores, left, rest = tensor.shape, [], 1, tensor
    for n, rank in zip(dims, ranks):
        core, rest = leading(rest.reshape(left * n, -1), rank)
        cores.append(core.reshape(left, n, rank))
        left = rank
    return [*cores, rest.reshape(left, dims[-1], 1)]


def released_bonds(dims: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Ranks between the cores of a Tucker core as tntorch leaves them: of the whole tensor, cut from the right."""
    found: list[int] = []
    for full, rank in zip(reversed(full_ranks(dims)), reversed(ranks[1:])):
        found.insert(0, min(full, rank * (found[0] if found else 1)))
    return tuple(found)


def tt_from_right(tensor: Array, ranks: Sequence[int]) -> list[Array]:
    """Cut a tensor into a train, last bond first, without loss at ranks that may be larger than it needs.

    Where they are, the right core has unit vectors more, and the left one zeros, so that both can learn.
    """
    cores, rest, after = [], tensor, 1
    for n, rank in zip(reversed(tensor.shape[1:]), reversed(ranks)):
        flat = rest.reshape(-1, n * after)
        fits = min(rank, *flat.shape)
        left, right = leading(flat, fits)
        more = jnp.eye(rank - fits, n * after, dtype=tensor.dtype)
        cores.insert(0, jnp.concatenate([right, more]).reshape(rank, n, after))
        rest, after = jnp.pad(left, ((0, 0), (0, rank - fits))), rank
    return [rest.reshape(1, tensor.shape[0], after), *cores]


def tt_full(cores: Sequence[Array]) -> Array:
    """The tensor [d_1, ..., d_n] of a train."""
    whole = cores[0]
    for core in cores[1:]:
        whole = jnp.tensordot(whole, core, 1)
    return whole[0, ..., 0]


def hosvd(tensor: Array, ranks: Sequence[int]) -> tuple[Array, list[Array]]:
    """Return the core [R_1, ..., R_n] and orthonormal factors [d_k, R_k] of a tensor (De Lathauwer et al., 2000)."""
    factors, core = [], tensor
    for axis, rank in enumerate(ranks):
        flat = jnp.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
        factors.append(eigenvectors(flat @ flat.T)[1][:, :rank])
        core = jnp.moveaxis(jnp.tensordot(factors[-1], core, (0, axis)), 0, axis)
    return core, factors


def tucker_full(core: Array, factors: Sequence[Array]) -> Array:
    """The tensor [d_1, ..., d_n] of a core and factors."""
    for axis, factor in enumerate(factors):
        core = jnp.moveaxis(jnp.tensordot(factor, core, (1, axis)), 0, axis)
    return core


# Hashing (Chen et al., 2015), without their signs


def hash_index(key: Key, shape: Sequence[int], budget: int, reference_compat: bool = False) -> Array:
    """Which of `budget` weights each entry of a kernel has, uniformly at random.

    Args:
        key: of the layer.
        shape: of the kernel.
        budget: weights.
        reference_compat: as released: the last weight is never used.
    """
    return jax.random.randint(key, tuple(shape), 0, max(1, budget - reference_compat))


def hashed_weights(theta: Array, index: Array) -> Array:
    """The kernel whose entries are theta [budget] by index."""
    return theta[index]
