"""Signature-kernel scores of probabilistic forecasts: Sig-MMD and CSig-MMD.

Redhead, Lee, Gu, Elvira and Storkey (2026), arXiv 2602.10182. A forecast is a sample of whole trajectories, as paths of
`make_paths`. `sig_mmd2` is the squared maximum mean discrepancy of two samples, `sig_score` its form for one
observation. `csig_mmd2` and `csig_score` look at the tail: `TailWeights` are about 1 there and 0 in the bulk, whose
mass moves to a pivot path. `jaxstack.measures.forecasts` compares whole forecasters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError
from jaxstack.measures.signature_kernel import (
    Kernel,
    checked,
    increments,
    make_paths,
    median_sigma,
    self_kernels,
    signature_kernel,
    signature_kernel_gram,
    truncated_signature,
)

__all__ = [
    "Grams",
    "Kernel",
    "TailWeights",
    "censor",
    "censored",
    "censored_grams",
    "csig_mmd2",
    "csig_score",
    "grams",
    "increments",
    "kernel_score",
    "make_paths",
    "median_sigma",
    "mmd2",
    "normalised",
    "permutation_p",
    "robust_moments",
    "self_kernels",
    "sig_mmd2",
    "sig_score",
    "signature_kernel",
    "signature_kernel_gram",
    "truncated_signature",
]

MOST_FEATURES = 4096
"""Of a truncated signature: the precision of the tail weights has the square of it."""


class Grams(NamedTuple):
    """Gram matrices of a reference x (observations) and a forecast y."""

    xx: Float[Array, "n n"]
    xy: Float[Array, "n m"]
    yy: Float[Array, "m m"]


def grams(
    x: Float[Array, "n p c"], y: Float[Array, "m q c"], kernel: Kernel = Kernel(), normalize: bool = False
) -> Grams:
    """Compute the Gram matrices of two samples.

    Args:
        x: Paths of the reference.
        y: Paths of the forecast.
        kernel: See `Kernel`.
        normalize: k(x, y) / sqrt(k(x, x) k(y, y)), which keeps long paths from dominating.
    """
    found = Grams(*(signature_kernel_gram(a, b, kernel) for a, b in ((x, None), (x, y), (y, None))))
    return normalised(found) if normalize else found


@jax.jit
def normalised(g: Grams) -> Grams:
    """Divide k(x, y) by sqrt(k(x, x) k(y, y))."""
    a, b = jnp.sqrt(jnp.diag(g.xx)), jnp.sqrt(jnp.diag(g.yy))
    return Grams(g.xx / (a[:, None] * a), g.xy / (a[:, None] * b), g.yy / (b[:, None] * b))


def _within(gram: Array, unbiased: bool) -> Array:
    n = len(gram)
    if not unbiased:
        return gram.mean()
    if n < 2:
        raise UserError(f"paths: found {n}, expected at least 2 of each sample; one observation has `sig_score`")
    return (gram.sum() - jnp.trace(gram)) / (n * (n - 1))


@jax.jit(static_argnames=("unbiased",))
def mmd2(g: Grams, unbiased: bool = True) -> Float[Array, ""]:
    """Compute the squared maximum mean discrepancy, E k(X, X') - 2 E k(X, Y) + E k(Y, Y').

    Args:
        g: Gram matrices of the two samples.
        unbiased: Leave the diagonals out; the value may then be below 0. Else all entries count, and a sample against
            itself has 0.

    Raises:
        UserError: For a sample of one path, unless biased.
    """
    return _within(g.xx, unbiased) - 2.0 * g.xy.mean() + _within(g.yy, unbiased)


@jax.jit
def kernel_score(g: Grams) -> Float[Array, " n"]:
    """Compute the kernel score of a forecast y for each observation x: E k(Y, Y') - 2 E k(Y, x) + k(x, x).

    Its mean over observations is the unbiased MMD^2 plus a number that is the same for every forecast.
    """
    return _within(g.yy, True) - 2.0 * g.xy.mean(1) + jnp.diag(g.xx)


def sig_mmd2(
    x: Float[Array, "n p c"],
    y: Float[Array, "m q c"],
    kernel: Kernel = Kernel(),
    *,
    unbiased: bool = True,
    normalize: bool = False,
) -> Float[Array, ""]:
    """Compute Sig-MMD^2 of two samples of paths; arguments as of `grams` and `mmd2`."""
    return mmd2(grams(x, y, kernel, normalize), unbiased)


def sig_score(
    samples: Float[Array, "m p c"], observed: Float[Array, "q c"], kernel: Kernel = Kernel(), normalize: bool = False
) -> Float[Array, ""]:
    """Compute the kernel score of a forecast for one observed path; smaller is better."""
    return kernel_score(grams(observed[None], samples, kernel, normalize))[0]


def robust_moments(x: np.ndarray, share: float = 0.75, condition: float = 50.0) -> tuple[np.ndarray, np.ndarray]:
    """Compute location and precision by the regularised minimum covariance determinant (Boudt et al., 2020).

    Concentration steps on standardised columns, from the points nearest to the median; the covariance is shrunk towards
    the identity until its condition number is at most `condition`.

    Args:
        x: Points [N, S].
        share: Of the points that are kept, above 0 and at most 1.
        condition: See above, more than 1.

    Returns:
        Location [S] and precision [S, S], float64.
    """
    x = np.asarray(x, np.float64)
    middle = np.median(x, 0)
    scale = 1.4826 * np.median(np.abs(x - middle), 0)
    scale = np.where(scale > 1e-12, scale, np.maximum(x.std(0), 1e-12))
    u = (x - middle) / scale
    count = max(2, int(np.ceil(share * len(u))))
    kept = np.sort(np.argsort(np.square(u).sum(1), kind="stable")[:count])
    for _ in range(100):
        mean = u[kept].mean(0)
        cov = np.cov(u[kept].T, bias=True).reshape(u.shape[1], u.shape[1])
        values = np.linalg.eigvalsh(cov)
        excess = max(values[-1] - condition * max(values[0], 0.0), 0.0)
        rho = excess / (condition - 1.0 + excess)
        precision = np.linalg.inv(rho * np.eye(len(cov)) + (1.0 - rho) * cov + 1e-12 * np.eye(len(cov)))
        far = np.einsum("ns,ns->n", (u - mean) @ precision, u - mean)
        new = np.sort(np.argsort(far, kind="stable")[:count])
        if (new == kept).all():
            break
        kept = new
    return middle + scale * mean, precision / np.outer(scale, scale)


class TailWeights(NamedTuple):
    """w(x) = sigmoid(beta (D(x) - c2)), D the Mahalanobis distance of the truncated signature over sqrt(k(x, x)).

    Fitted on training paths alone: weights that knew the forecast would make the score improper.
    """

    location: Float[Array, " s"]
    precision: Float[Array, "s s"]
    c2: float
    """Quantile of D over the training paths."""
    beta: float
    depth: int
    kernel: Kernel
    pivot: Float[Array, "p c"]
    """The path to which the mass of the bulk moves."""

    @classmethod
    def fit(
        cls,
        paths: Float[Array, "n p c"],
        pivot: Float[Array, "q c"],
        depth: int = 2,
        alpha: float = 0.92,
        beta: float | None = None,
        kernel: Kernel = Kernel(),
    ) -> "TailWeights":
        """Fit the weights to training paths.

        Args:
            paths: Of the training data.
            pivot: `make_paths` of a trajectory of zeros, with the options of the others.
            depth: Of the truncated signature.
            alpha: Quantile of D at which w is 1/2.
            beta: Sharpness; default 25.6 / c2, which takes w from .12 to .88 within 8% of c2 on both sides. `inf`
                gives weights 0 and 1.
            kernel: Of the score.

        Raises:
            UserError: For alpha outside (0, 1), beta that is not positive, a depth below 1 or with more than 4096
                features, fewer than 4 paths, or paths that are all equal.
        """
        if not 0.0 < alpha < 1.0:
            raise UserError(f"alpha={alpha}: expected a number between 0 and 1")
        if beta is not None and not beta > 0.0:
            raise UserError(f"beta={beta}: expected a number > 0")
        if len(paths) < 4:
            raise UserError(f"paths: found {len(paths)}, expected at least 4 to fit tail weights")
        channels = paths.shape[2]
        if (count := sum(channels**k for k in range(1, depth + 1))) > MOST_FEATURES:
            raise UserError(
                f"depth={depth}: {channels} channels have {count} features, expected {MOST_FEATURES} at most"
            )
        features = np.asarray(_features(paths, depth, checked(kernel)))
        location, precision = (jnp.asarray(a, paths.dtype) for a in robust_moments(features))
        made = cls(location, precision, 0.0, 1.0, depth, kernel, pivot)
        c2 = float(np.quantile(np.asarray(made.distances(paths)), alpha))
        if np.ptp(features, axis=0).max() == 0 or not c2 > 0.0:
            raise UserError("paths: the training paths do not differ, so none is in the tail")
        return made._replace(c2=c2, beta=25.6 / c2 if beta is None else float(beta))

    def distances(self, paths: Float[Array, "n p c"]) -> Float[Array, " n"]:
        """Compute D of each path."""
        return _distances(paths, self.location, self.precision, self.depth, self.kernel)

    def __call__(self, paths: Float[Array, "n p c"]) -> Float[Array, " n"]:
        """Compute w of each path, in 0..1."""
        over = self.distances(paths) - self.c2
        if self.beta == float("inf"):
            return (over > 0).astype(over.dtype)
        return jax.nn.sigmoid(self.beta * over)


@jax.jit(static_argnames=("depth", "kernel"))
def _features(paths: Array, depth: int, kernel: Kernel) -> Array:
    size = jnp.sqrt(self_kernels(paths, kernel))
    return jax.vmap(lambda path: truncated_signature(path, depth))(paths) / size[:, None]


@jax.jit(static_argnames=("depth", "kernel"))
def _distances(paths: Array, location: Array, precision: Array, depth: int, kernel: Kernel) -> Array:
    far = _features(paths, depth, kernel) - location
    return jnp.sqrt(jnp.maximum(jnp.einsum("ns,ns->n", far @ precision, far), 0.0))


def censored(
    gram: Float[Array, "n m"],
    w_x: Float[Array, " n"],
    w_y: Float[Array, " m"],
    x_pivot: Float[Array, " n"],
    y_pivot: Float[Array, " m"],
    pivot: Float[Array, ""],
) -> Float[Array, "n m"]:
    """Compute the kernel of the censored features w Phi(x) + (1 - w) Phi(0).

    w_x w_y k(x, y) + w_x (1 - w_y) k(x, 0) + (1 - w_x) w_y k(0, y) + (1 - w_x)(1 - w_y) k(0, 0)

    Args:
        gram: k(x_i, y_j).
        w_x: Weights of x.
        w_y: Weights of y.
        x_pivot: k(x_i, 0).
        y_pivot: k(0, y_j).
        pivot: k(0, 0).
    """
    u, v = w_x[:, None], w_y[None]
    return u * v * gram + u * (1 - v) * x_pivot[:, None] + (1 - u) * v * y_pivot[None] + (1 - u) * (1 - v) * pivot


Weights = TailWeights | Callable[[Array], Array]


def censored_grams(
    x: Float[Array, "n p c"],
    y: Float[Array, "m q c"],
    weights: Weights,
    pivot: Float[Array, "r c"] | None = None,
    kernel: Kernel | None = None,
    normalize: bool = False,
) -> Grams:
    """Compute the Gram matrices of censored features.

    Args:
        x: Paths of the reference.
        y: Paths of the forecast.
        weights: `TailWeights`, or any function of paths [N, P, C] to [N] in 0..1 that knows the training data alone.
        pivot: The path to which the mass of the bulk moves; default: that of the weights.
        kernel: Default: that of the weights.
        normalize: As of `grams`; the kernel is normalised before the features are mixed.

    Raises:
        UserError: For a function without a pivot.
    """
    if pivot is None:
        pivot = weights.pivot if isinstance(weights, TailWeights) else None
    if pivot is None:
        raise UserError("pivot: expected a path, as the weights have none")
    if kernel is None:
        kernel = weights.kernel if isinstance(weights, TailWeights) else Kernel()
    w_x, w_y = weights(x), weights(y)
    g = grams(x, y, kernel)
    p_x, p_y = (signature_kernel_gram(paths, pivot[None], kernel)[:, 0] for paths in (x, y))
    p = signature_kernel(pivot, pivot, kernel)
    return censor(g, w_x, w_y, p_x, p_y, p, normalize)


@jax.jit(static_argnames=("normalize",))
def censor(
    g: Grams,
    w_x: Float[Array, " n"],
    w_y: Float[Array, " m"],
    x_pivot: Float[Array, " n"],
    y_pivot: Float[Array, " m"],
    pivot: Float[Array, ""],
    normalize: bool = False,
) -> Grams:
    """Turn Gram matrices into those of censored features; arguments as of `censored`, of the plain kernel."""
    if normalize:
        a, b, p = jnp.sqrt(jnp.diag(g.xx)), jnp.sqrt(jnp.diag(g.yy)), jnp.sqrt(pivot)
        g = normalised(g)
        x_pivot, y_pivot, pivot = x_pivot / (a * p), y_pivot / (b * p), jnp.ones_like(pivot)
    return Grams(
        censored(g.xx, w_x, w_x, x_pivot, x_pivot, pivot),
        censored(g.xy, w_x, w_y, x_pivot, y_pivot, pivot),
        censored(g.yy, w_y, w_y, y_pivot, y_pivot, pivot),
    )


def csig_mmd2(
    x: Float[Array, "n p c"],
    y: Float[Array, "m q c"],
    weights: Weights,
    pivot: Float[Array, "r c"] | None = None,
    kernel: Kernel | None = None,
    *,
    unbiased: bool = True,
    normalize: bool = False,
) -> Float[Array, ""]:
    """Compute CSig-MMD^2, the MMD^2 of the censored features; arguments as of `censored_grams` and `mmd2`."""
    return mmd2(censored_grams(x, y, weights, pivot, kernel, normalize), unbiased)


def csig_score(
    samples: Float[Array, "m p c"],
    observed: Float[Array, "q c"],
    weights: Weights,
    pivot: Float[Array, "r c"] | None = None,
    kernel: Kernel | None = None,
    normalize: bool = False,
) -> Float[Array, ""]:
    """Compute the censored kernel score of a forecast for one observed path; smaller is better."""
    return kernel_score(censored_grams(observed[None], samples, weights, pivot, kernel, normalize))[0]


@jax.jit(static_argnames=("permutations",))
def permutation_p(key: Any, g: Grams, permutations: int = 500) -> Float[Array, ""]:
    """Compute the p-value of the unbiased MMD^2 when members are exchanged at random between the two samples.

    (1 + the permutations with a value at least as large) / (1 + permutations), so it is valid for any number of them.

    Args:
        key: Of the permutations.
        g: Gram matrices of the two samples.
        permutations: Their number.
    """
    whole = jnp.block([[g.xx, g.xy], [g.xy.T, g.yy]])
    n, m = len(g.xx), len(g.yy)
    if min(n, m) < 2:
        raise UserError(f"paths: found {n} and {m}, expected at least 2 of each sample")
    first = (jnp.arange(n + m) < n).astype(whole.dtype)
    groups = jax.vmap(lambda k: jax.random.permutation(k, first))(jax.random.split(key, permutations))
    x = jnp.concatenate([first[None], groups])  # members of the first sample; the first row is the data
    y = 1.0 - x
    of_x, of_y, own = x @ whole, y @ whole, jnp.diag(whole)
    within = lambda a, of, count: ((a * of).sum(1) - a @ own) / (count * (count - 1))
    found = within(x, of_x, n) - 2.0 * (y * of_x).sum(1) / (n * m) + within(y, of_y, m)
    # equal values, which repeated paths give, may differ by rounding
    slack = 64.0 * jnp.finfo(whole.dtype).eps * jnp.abs(whole).max()
    return (1.0 + (found[1:] >= found[0] - slack).sum()) / (1.0 + permutations)
