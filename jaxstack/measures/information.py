"""Entropies and (conditional) mutual informations of samples, by nearest neighbours: functions of arrays [n, ...].

All results are in nats. Distances are computed in blocks of rows, so that 8,000 rows of 300 columns stay far below
2 GiB. Rows at equal distances are told apart by a hash of the pair: discrete data are full of ties, and if the lowest
indices won, all rows of one value would share one neighbourhood.

Sources: posteriors of nested neighbourhoods as in Tessera et al. (2026); Ross (2014) for real against discrete;
Kraskov, Stoegbauer & Grassberger (2004), first estimator; Frenzel & Pompe (2007); Kozachenko & Leonenko (1987).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma
from jaxtyping import Array, Bool, Float, Int

BLOCK = 512
"""Rows whose distances to all others are held at once."""

DIRECT = 16
"""Most columns for which distances are sums of squared differences; with more they come from a matrix product, whose
rounding grows with the norms."""


class Neighbours(NamedTuple):
    """The nearest rows of each row, itself excluded, nearest first."""

    index: Int[Array, "n m"]
    square: Float[Array, "n m"]
    """Squared Euclidean distances."""


def standardise(x: Float[Array, "n d"], floor: float = 1e-12) -> Float[Array, "n d"]:
    """Return columns of mean 0 and deviation 1; constant columns become 0."""
    return (x - x.mean(0)) / jnp.maximum(x.std(0), floor)


def ranks(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Return each column's ranks 0..n-1. One argsort gives the sorting permutation; ranks need the argsort of it."""
    return jnp.argsort(jnp.argsort(x, axis=0), axis=0).astype(x.dtype)


def principal(x: Float[Array, "n d"], most: int) -> Float[Array, "n k"]:
    """Return the first `most` principal components, or `x` where it has no more columns."""
    if x.shape[1] <= most:
        return x
    centred = x - x.mean(0)
    _, vectors = jnp.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, ::-1][:, :most]


def neighbours(x: Float[Array, "n d"], count: int) -> Neighbours:
    """Find the `count` nearest rows of each row by Euclidean distance.

    Args:
        x: [n, d] points.
        count: number of neighbours, at most n - 1.

    Returns:
        `Neighbours` [n, count].
    """

    def nearest(rows: Array, index: Array) -> tuple[Array, Array]:
        far, at = jax.lax.top_k(-_square(x, rows, index), count)
        return at, -far

    return Neighbours(*_by_rows(nearest, x))


def joint(near: Neighbours, x: Float[Array, "n d"], k: int) -> Int[Array, "n k"]:
    """Re-rank the neighbours in Z by the distance in [Z, X] and keep the k nearest.

    These are not the nearest rows of the joint space: they are constrained to be near in Z, which is what makes the
    difference of the two posteriors a conditional information.
    """

    def nearest(rows: Array, index: Array) -> Array:
        square = near.square[index] + jnp.square(rows[:, None] - x[near.index[index]]).sum(-1)
        return jnp.take_along_axis(near.index[index], jax.lax.top_k(-square, k)[1], axis=1)

    return _by_rows(nearest, x)


def posterior(action: Int[Array, " n"], index: Int[Array, "n k"], classes: int, alpha: float) -> Float[Array, "n c"]:
    """Return p(a | neighbourhood) = (count_a + alpha) / (k + alpha C) of each row."""
    near = action[index]
    count = jnp.stack([(near == c).sum(1) for c in range(classes)], -1)
    return (count + alpha) / (index.shape[1] + alpha * classes)


def posterior_divergence(
    action: Int[Array, " n"], near_z: Int[Array, "n k"], near_zx: Int[Array, "n k"], classes: int, alpha: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (I(X; A | Z), H(A | Z)): the mean of KL(p_ZX || p_Z) and of the entropy of p_Z."""
    return _divergence(*(posterior(action, index, classes, alpha) for index in (near_zx, near_z)))


def _divergence(p: Array, q: Array) -> tuple[Array, Array]:
    """(mean KL(p || q), mean entropy of q) of distributions [n, C]."""
    return (p * (jnp.log(p) - jnp.log(q))).sum(-1).mean(), -(q * jnp.log(q)).sum(-1).mean()


def smallest(values: Float[Array, "m n"], k: int) -> Bool[Array, "m n"]:
    """Mark the k smallest entries of each column, the first ones of equal values.

    The bound is bisected among the bit patterns of numbers, which are in the numbers' order, until k entries of every
    column are below it: much faster than sorting a part of each column.

    Args:
        values: at least 0, so no NaN.
        k: 1 to m.
    """
    kind = jnp.int64 if values.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(values, kind)

    def below(bound: Array) -> Array:
        # a sum of rows, which runs along the columns; computed once, not in each fusion that reads it
        rows = [(row < bound).astype(jnp.int32) for row in bits]
        return jax.lax.optimization_barrier(functools.reduce(jnp.add, rows))

    def narrower(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, count = state
        middle = low + (high - low >> 1)
        found = below(middle)
        unsure = (count > k) & (high - low > 1)
        enough = unsure & (found >= k)
        return (
            jnp.where(unsure & ~enough, middle, low),
            jnp.where(enough, middle, high),
            jnp.where(enough, found, count),
        )

    start = bits.min(0), bits.max(0) + 1, jnp.full(values.shape[1], len(values), jnp.int32)
    wide = lambda s: ((s[2] > k) & (s[1] - s[0] > 1)).any()
    _, high, count = jax.lax.while_loop(wide, narrower, start)

    def without_last(inside: Array) -> Array:
        equal = bits == high - 1
        return inside & ~(equal & (jnp.cumsum(equal, 0) > equal.sum(0) - (count - k)))

    return jax.lax.cond((count > k).any(), without_last, lambda inside: inside, bits < high)


def label_counts(labels: Int[Array, "m n"], inside: Bool[Array, "m n"], classes: int, most: int) -> Int[Array, "n c"]:
    """Count each label among the marked entries of each column.

    Args:
        labels: ids 0..classes-1.
        inside: the entries that count.
        classes: number of labels C.
        most: entries of a column that are marked at most; the counts of several labels share an integer.
    """
    width = most.bit_length()
    each, found = max(31 // width, 1), []
    for first in range(0, classes, each):
        mine = inside & (labels >= first) & (labels < first + each)
        packed = jnp.where(mine, 1 << (width * jnp.clip(labels - first, 0, each - 1)), 0).sum(0)
        found += [packed >> (width * i) & (1 << width) - 1 for i in range(min(each, classes - first))]
    return jnp.stack(found, -1)


def label_divergence(
    near: Neighbours,
    given: Int[Array, "r n"],
    action: Int[Array, "r n"],
    classes: int,
    k: int,
    alpha: float,
) -> tuple[Float[Array, " r"], Float[Array, " r"]]:
    """Return `posterior_divergence` of several labellings, X being the standardised one-hot code of `given`.

    In X two rows of labels a, b are 1 / var_a + 1 / var_b apart, and 0 where they agree.

    Args:
        near: neighbours in Z, those that are re-ranked.
        given, action: labels 0..classes-1.
        classes, k, alpha: as of `cmi_discrete`.
    """
    # columns of neighbours, so that sums over them run along the rows of the sample
    index, square = jax.lax.optimization_barrier((near.index.T, near.square.T))

    def one(labels: tuple[Array, Array]) -> tuple[Array, Array]:
        x, a = labels
        scale = 1.0 / jnp.square(jnp.maximum(jax.nn.one_hot(x, classes, dtype=square.dtype).std(0), 1e-12))[x]
        apart = jnp.where(x[index] == x, 0.0, scale + scale[index])
        both, a = smallest(jax.lax.optimization_barrier(square + apart), k), a[index]
        smooth = lambda count: (count + alpha) / (k + alpha * classes)
        first = label_counts(a[:k], jnp.ones((k, a.shape[1]), bool), classes, k)
        return _divergence(smooth(label_counts(a, both, classes, k)), smooth(first))

    return jax.lax.map(one, (given, action))


def candidates(n: int, k: int, factor: int = 5) -> int:
    """Return how many neighbours in Z are re-ranked: min(n - 1, max(k + 5, factor k))."""
    return min(n - 1, max(k + 5, factor * k))


@functools.partial(jax.jit, static_argnames=("classes", "k", "factor"))
def cmi_discrete(
    z: Float[Array, "n dz"],
    x: Float[Array, "n dx"],
    action: Int[Array, " n"],
    classes: int,
    k: int = 25,
    alpha: float = 0.5,
    factor: int = 5,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate I(X; A | Z) of a discrete A by posteriors of nested neighbourhoods.

    The estimate is never negative and has a positive floor (about .05 bits for independent binary actions with
    n = 2400, k = 25): read it against a null.

    Args:
        z, x: [n, d] standardised columns.
        action: [n] ids 0..classes-1.
        classes: number of actions C.
        k: neighbours of a posterior.
        alpha: pseudo-count of each action.
        factor: neighbours in Z that are re-ranked, over k.

    Returns:
        (I(X; A | Z), H(A | Z)) in nats.
    """
    near = neighbours(z, candidates(len(z), k, factor))
    return posterior_divergence(action, near.index[:, :k], joint(near, x, k), classes, alpha)


@functools.partial(jax.jit, static_argnames=("classes", "k"))
def conditional_entropy(
    x: Float[Array, "n d"], action: Int[Array, " n"], classes: int, k: int = 25, alpha: float = 0.5
) -> Float[Array, ""]:
    """Estimate H(A | X) of a discrete A by the posteriors of X's neighbourhoods, in nats."""
    p = posterior(action, neighbours(x, k).index, classes, alpha)
    return -(p * jnp.log(p)).sum(-1).mean()


def entropy(action: Int[Array, " n"], classes: int) -> Float[Array, ""]:
    """Return the plug-in entropy of a discrete sample, in nats."""
    p = jnp.stack([(action == c).mean() for c in range(classes)])
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum()


def mi_ross(x: Float[Array, "n d"], action: Int[Array, " n"], classes: int, k: int = 3) -> Float[Array, ""]:
    """Estimate I(X; A) of real X and discrete A (Ross, 2014, eq. 6), in nats, at least 0.

    psi(N) + <psi(k_c)> - <psi(N_c)> - <psi(m)> over rows whose class has more than one; k_c = min(k, N_c - 1), m the
    rows of all classes nearer than the k_c-th neighbour of the own class, the row itself included.

    Args:
        x: [n, d] columns on comparable scales.
        action: [n] ids 0..classes-1.
        classes: number of classes.
        k: neighbours.
    """
    return mi_ross_each(x, action[None], classes, k)[0]


@functools.partial(jax.jit, static_argnames=("classes", "k", "depth", "spare"))
def mi_ross_each(
    x: Float[Array, "n d"], actions: Int[Array, "r n"], classes: int, k: int = 3, depth: int = 128, spare: int = 512
) -> Float[Array, " r"]:
    """Return `mi_ross` of several labellings [R, n] of the same points, whose neighbours are found once.

    m is the place of the k_c-th row of the own class in the list of neighbours. Lists have `depth` entries; up to
    `spare` rows of rare classes that need more are compared with all points, and all rows if there are more of them.
    """
    n = len(x)
    near = neighbours(x, min(depth, n - 1)).index.T
    place = 1 + jnp.arange(len(near))[:, None]

    def one(action: Array) -> Array:
        size = jnp.stack([(action == c).sum() for c in range(classes)])[action]
        own, use = jnp.clip(size - 1, 1, k), size > 1
        same = action[near] == action
        within = last = jnp.zeros(n, place.dtype)
        for count in range(1, k + 1):  # the next row of the own class, behind the list where there is none
            last = jnp.where(same & (place > last), place, len(near) + 1).min(0)
            within = jnp.where(own == count, last, within)
        missing = use & (within > len(near))

        def compared(rows: Array, index: Array) -> Array:
            square = _square(x, rows, index)
            same = jnp.where(action[index][:, None] == action[None], square, jnp.inf)
            nearest = -jax.lax.top_k(-same, min(k, n - 1))[0]
            return 1 + (square < jnp.take_along_axis(nearest, own[index][:, None] - 1, axis=1)).sum(1)

        def few(within: Array) -> Array:
            index = jnp.nonzero(missing, size=min(spare, n), fill_value=n)[0]
            inside = jnp.minimum(index, n - 1)
            return within.at[index].set(compared(x[inside], inside), mode="drop")

        case = jnp.where(missing.any(), 1 + (missing.sum() > spare), 0)
        within = jax.lax.switch(case, [lambda w: w, few, lambda w: _by_rows(compared, x)], within)
        total = use.sum()
        mean = lambda v: jnp.where(use, v, 0.0).sum() / jnp.maximum(total, 1)
        real = lambda v: digamma(v.astype(x.dtype))
        out = real(jnp.maximum(total, 1)) + mean(real(own) - real(size) - real(within))
        return jnp.maximum(out, 0.0)

    return jax.lax.map(one, actions)


@functools.partial(jax.jit, static_argnames="k")
def mi_ksg(x: Float[Array, "n dx"], y: Float[Array, "n dy"], k: int = 3) -> Float[Array, ""]:
    """Estimate I(X; Y) of real samples (Kraskov et al., 2004, eq. 8; max-norm), in nats, at least 0."""
    n = len(x)

    def one(_: Array, index: Array) -> tuple[Array, Array]:
        dx, dy = _max_norm(x, index), _max_norm(y, index)
        radius = _kth(jnp.maximum(dx, dy), index, k)
        return (dx < radius).sum(1), (dy < radius).sum(1)  # the row itself included: psi(n_x + 1)

    nx, ny = _by_rows(one, x)
    real = lambda v: digamma(v.astype(x.dtype)).mean()
    return jnp.maximum(digamma(jnp.asarray(k, x.dtype)) + digamma(jnp.asarray(n, x.dtype)) - real(nx) - real(ny), 0.0)


@functools.partial(jax.jit, static_argnames="k")
def cmi_ksg(x: Float[Array, "n dx"], y: Float[Array, "n dy"], z: Float[Array, "n dz"], k: int = 25) -> Float[Array, ""]:
    """Estimate I(X; Y | Z) of real samples (Frenzel & Pompe, 2007, eq. 7; max-norm), in nats, at least 0.

    psi(k) + <psi(k_z) - psi(k_xz) - psi(k_yz)>, counts within the distance to the k-th neighbour in (X, Y, Z).
    """

    def one(_: Array, index: Array) -> tuple[Array, Array, Array]:
        dx, dy, dz = (_max_norm(v, index) for v in (x, y, z))
        xz, yz = jnp.maximum(dx, dz), jnp.maximum(dy, dz)
        radius = _kth(jnp.maximum(xz, yz), index, k)
        return tuple((d < radius).sum(1) for d in (dz, xz, yz))  # pyright: ignore[reportReturnType]

    kz, kxz, kyz = (digamma(v.astype(x.dtype)).mean() for v in _by_rows(one, x))
    return jnp.maximum(digamma(jnp.asarray(k, x.dtype)) + kz - kxz - kyz, 0.0)


@functools.partial(jax.jit, static_argnames="k")
def entropy_knn(x: Float[Array, "n d"], k: int = 25) -> Float[Array, ""]:
    """Estimate the differential entropy (Kozachenko & Leonenko, 1987; max-norm), in nats:
    -psi(k) + psi(n) + d <log 2 eps>."""
    n, d = x.shape
    radius = jnp.asarray(_by_rows(lambda _, index: _kth(_max_norm(x, index), index, k)[:, 0], x))
    log = jnp.log(jnp.maximum(2.0 * radius, jnp.finfo(x.dtype).tiny)).mean()
    return -digamma(jnp.asarray(k, x.dtype)) + digamma(jnp.asarray(n, x.dtype)) + d * log


def _square(x: Array, rows: Array, index: Array) -> Array:
    """[b, n] squared distances of `rows` (those at `index`) to all, with ties broken; infinite to the row itself."""
    if x.shape[1] <= DIRECT:
        column = lambda far, c: (far + jnp.square(c[index][:, None] - c[None]), None)
        square, noise = jax.lax.scan(column, jnp.zeros((len(index), len(x)), x.dtype), x.T)[0], 1e-13
    else:
        norm = jnp.square(x).sum(-1)
        square = jnp.maximum(norm[index][:, None] + norm[None] - 2.0 * rows @ x.T, 0.0)
        noise = 64.0 * jnp.finfo(x.dtype).eps * norm.mean()
    square = square + noise * _hash(index, len(x)).astype(x.dtype)
    return square.at[jnp.arange(len(index)), index].set(jnp.inf)


def _hash(index: Array, n: int) -> Array:
    """[b, n] numbers in [0, 1) of the pairs (index, 0..n-1), the same whatever the block."""
    h = index.astype(jnp.uint32)[:, None] * jnp.uint32(2654435761) ^ jnp.arange(n, dtype=jnp.uint32) * jnp.uint32(
        2246822519
    )
    h = (h ^ h >> 15) * jnp.uint32(2146121005)
    h = (h ^ h >> 13) * jnp.uint32(2221713035)
    return (h >> 8).astype(jnp.float32) / 2**24


def _max_norm(x: Array, index: Array) -> Array:
    """[b, n] largest difference of a column between the rows `index` and all rows, column by column."""
    column = lambda far, c: (jnp.maximum(far, jnp.abs(c[index][:, None] - c[None])), None)
    return jax.lax.scan(column, jnp.zeros((len(index), len(x)), x.dtype), x.T)[0]


def _kth(distance: Array, index: Array, k: int) -> Array:
    """[b, 1] distance to the k-th nearest other row."""
    others = distance.at[jnp.arange(len(index)), index].set(jnp.inf)
    return -jax.lax.top_k(-others, k)[0][:, -1:]


def _by_rows(function: Callable, x: Array) -> Any:
    """`function(rows [b, d], their indices [b])` over all rows, BLOCK at a time; the last block wraps around."""
    n = len(x)
    block = min(BLOCK, n)
    blocks = -(-n // block)
    index = (jnp.arange(blocks * block) % n).reshape(blocks, block)
    out = jax.lax.map(lambda i: function(x[i], i), index)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[:n], out)
