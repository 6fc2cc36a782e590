"""Gaussian process edge tracing (GPET, Burke and King, 2021): the slow tracer whose masks DeepGPET learns.

An edge is a function row(column) between two known end points. A Gaussian process given what is known so far draws
curves; the best of them, by arc length over the gradient gathered along the way, say where the edge is likely; the most
likely pixels become observations, one for each bin of columns, until every bin has one. The process fitted to these is
the edge.

This runs on the host in double precision: with end points known to a variance of 1e-7 the covariance is not positive
definite in single precision.
"""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import linalg, ndimage, optimize

from jaxstack.core.errors import UserError

Kernel = Literal["rbf", "matern"]
END_NOISE, PIXEL_NOISE = 1e-7, 1.0
"""Variances of end points and of pixels, in rows squared."""
NEW_BINS = 5
"""Bins that each round fills, at least."""


class Trace(NamedTuple):
    """An edge, in rows, for the columns from the first end point to the last."""

    columns: np.ndarray
    """[N] int."""
    rows: np.ndarray
    """[N] mean."""
    low: np.ndarray
    """[N] lower end of the 95% band."""
    high: np.ndarray
    rounds: int


class Settings(NamedTuple):
    """How an edge is traced."""

    kernel: Kernel = "rbf"
    height: float = 0.1
    """Deviation of the process over the image's rows: one of 1/10, 1/8, 1/6, 1/4, 1/2, 1 in the released code."""
    length: float = 0.25
    """Length scale over the edge's: one of 1/10, 1/4, 1/2, 3/4, 1."""
    curves: int = 500
    keep: float = 0.1
    """Share of the curves that is kept."""
    bins: int = 20
    """Columns of a bin."""
    restarts: int = 12
    """Starts of the last fit of deviation, length scale and noise."""


@lru_cache(1)
def _controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # of the extra `medical`; without it traces are the same, only slower
        return None
    return ThreadpoolController()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep BLAS to one thread: with matrices as small as these, threads only wait for each other."""
    controller = _controller()
    with controller.limit(limits=1, user_api="blas") if controller else contextlib.nullcontext():
        yield


def _correlation(kind: Kernel, far: np.ndarray) -> np.ndarray:
    """Of distances over the length scale: exp(-r^2 / 2), or Matern's of smoothness 5/2."""
    if kind == "rbf":
        return np.exp(-0.5 * far**2)
    r = np.sqrt(5.0) * np.abs(far)
    return (1.0 + r + r**2 / 3.0) * np.exp(-r)


def edge_map(image: np.ndarray, brighter_below: bool, sigma: float = 1.5) -> np.ndarray:
    """How much a pixel looks like an edge, [H, W] in 0..1: the derivative along columns of the smoothed image.

    Args:
        image: [H, W] in 0..1.
        brighter_below: True for an edge from dark to bright going down, False for one from bright to dark.
        sigma: of the Gaussian, in pixels.
    """
    smooth = ndimage.gaussian_filter1d(np.asarray(image, np.float64), sigma, axis=1)
    slope = ndimage.gaussian_filter1d(smooth, sigma, axis=0, order=1)
    found = np.clip(slope if brighter_below else -slope, 0.0, None)
    return found / max(found.max(), 1e-12)


def _scaled(x: np.ndarray) -> np.ndarray:
    """To 0..1 by its smallest and largest value."""
    return (x - x.min()) / max(x.max() - x.min(), 1e-12)


def cost(rows: np.ndarray, gradient: np.ndarray, first: int) -> np.ndarray:
    """Arc length of curves over the gradient gathered along them, by Simpson's rule.

    Args:
        rows: curves [S, N], a row for each column from `first` on.
        gradient: [H, W] in 0..1.
        first: column of the curves' start.

    Returns:
        [S]; large where a curve meets no edge.
    """
    from scipy.integrate import simpson

    columns = first + np.arange(rows.shape[1])
    y = np.clip(rows, 0.0, gradient.shape[0] - 1.0)
    above = np.minimum(y.astype(int), gradient.shape[0] - 2)
    share = y - above
    met = (1.0 - share) * gradient[above, columns] + share * gradient[above + 1, columns]
    arc = np.sqrt(1.0 + np.gradient(rows, axis=1) ** 2)
    return simpson(arc, axis=1) / np.maximum(simpson(met * arc, axis=1), 1e-9)


def trace_edge(
    rng: np.random.Generator,
    gradient: np.ndarray,
    start: tuple[float, float],
    end: tuple[float, float],
    settings: Settings = Settings(),
) -> Trace:
    """Trace an edge between two points.

    Args:
        rng: of the curves.
        gradient: [H, W] in 0..1, as `edge_map` gives it.
        start, end: (x, y) of the edge's ends; x are columns.
        settings: see `Settings`.

    Raises:
        UserError: for end points outside of the image, in the wrong order, or too near to each other.
    """
    height, width = gradient.shape
    first, last = round(start[0]), round(end[0])
    inside = all(0 <= x < width and 0 <= y < height for x, y in (start, end))
    if not inside or last - first < 4:
        raise UserError(
            f"start={start}, end={end}: expected (x, y) inside of {width} columns and {height} rows, the end at "
            "least 4 columns to the right"
        )
    if settings.kernel not in ("rbf", "matern"):
        raise UserError(f"kernel={settings.kernel!r}: expected 'rbf' or 'matern'")
    x = np.arange(first, last + 1, dtype=np.float64)
    line = np.interp(x, (first, last), (start[1], end[1]))  # mean of the process
    deviation, length = settings.height * height, settings.length * (last - first)
    prior = deviation**2 * _correlation(settings.kernel, (x[:, None] - x) / length)
    values, vectors = linalg.eigh(prior)
    kept = values > 1e-9 * values[-1]  # smooth curves live in few dimensions
    root = vectors[:, kept] * np.sqrt(values[kept])
    edges = _scaled(ndimage.gaussian_filter(gradient[:, first : last + 1], 1.0))
    bins = (x - first).astype(int) // settings.bins
    many = bins[-1] + 1
    at, rows, noise = [0, len(x) - 1], [0.0, 0.0], [END_NOISE, END_NOISE]  # rows less the line's
    filled = np.zeros(many, bool)
    rounds = 0
    while not filled.all():
        rounds += 1
        # Matheron's rule: a draw of the prior, moved by what it gets wrong at the observations
        draws = rng.normal(size=(settings.curves, root.shape[1])) @ root.T
        error = np.array(rows) - draws[:, at] - rng.normal(size=(settings.curves, len(at))) * np.sqrt(noise)
        gain = linalg.solve(prior[np.ix_(at, at)] + np.diag(noise), prior[at], assume_a="pos")
        curves = line + draws + error @ gain
        costs = cost(curves, gradient, first)
        best = np.argsort(costs)[: max(round(settings.keep * settings.curves), 1)]
        likely = np.zeros((height, len(x)))
        to = np.clip(np.rint(curves[best]).astype(int), 0, height - 1)
        np.add.at(likely, (to, np.arange(len(x))), np.broadcast_to(1.0 / costs[best][:, None], to.shape))
        k = _scaled(ndimage.gaussian_filter(likely, 1.0, mode="constant"))
        score = np.where(k > 1e-3, (k * edges + k + edges) / 3.0, -1.0)
        score[:, [0, -1]] = -1.0  # the ends are known
        of_column = score.max(0)
        of_bin = np.full(many, -1.0)
        np.maximum.at(of_bin, bins, of_column)
        of_bin[filled] = -np.inf
        wanted = np.sort(of_bin)[::-1][min(NEW_BINS, (~filled).sum()) - 1]
        # the threshold starts at 1 and falls by a twentieth until enough bins reach it
        threshold = 0.95 ** np.ceil(np.log(max(wanted, 1e-6)) / np.log(0.95)) if wanted > 0 else wanted
        for b in np.flatnonzero(of_bin >= threshold):
            filled[b] = True
            if of_bin[b] <= 0:
                continue  # a bin of end points alone
            column = int(np.where(bins == b, of_column, -np.inf).argmax())
            at.append(column)
            rows.append(float(score[:, column].argmax() - line[column]))
            noise.append(PIXEL_NOISE)
    mean, spread = _fit(rng, settings, x, np.array(at), np.array(rows), np.array(noise), deviation, length)
    mean = np.clip(line + mean, 0.0, height - 1.0)
    return Trace(x.astype(int), mean, mean - 1.96 * spread, mean + 1.96 * spread, rounds)


def _fit(
    rng: np.random.Generator,
    settings: Settings,
    x: np.ndarray,
    at: np.ndarray,
    rows: np.ndarray,
    noise: np.ndarray,
    deviation: float,
    length: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the process at x [N], with the deviation and length scale of most marginal likelihood."""
    far = np.abs(x[at][:, None] - x[at])
    span = x[-1] - x[0]
    bounds = np.log([(0.05 * deviation, 20.0 * deviation), (settings.bins / 2, 2.0 * span)])

    def negative(log: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log marginal likelihood and its gradient by the logarithms."""
        r = far / np.exp(log[1])
        shared = np.exp(2 * log[0]) * _correlation(settings.kernel, r)
        factor = np.linalg.cholesky(shared + np.diag(noise))
        inverse = np.linalg.inv(factor)
        precision = inverse.T @ inverse
        weights = precision @ rows
        s = np.sqrt(5.0) * r
        by_length = shared * r**2
        if settings.kernel == "matern":
            by_length = np.exp(2 * log[0]) * s**2 * (1.0 + s) / 3.0 * np.exp(-s)
        pull = 0.5 * (precision - np.outer(weights, weights))
        value = 0.5 * rows @ weights + np.log(np.diag(factor)).sum()
        return float(value), np.array([2.0 * (pull * shared).sum(), (pull * by_length).sum()])

    starts = [np.log([deviation, length]), *rng.uniform(bounds[:, 0], bounds[:, 1], (settings.restarts - 1, 2))]
    found = [
        optimize.minimize(
            negative, np.clip(s, *bounds.T), jac=True, method="L-BFGS-B", bounds=[tuple(b) for b in bounds]
        )
        for s in starts
    ]
    best = min(found, key=lambda r: float(r.fun)).x
    variance, scale = np.exp(2 * best[0]), np.exp(best[1])
    covariance = variance * _correlation(settings.kernel, far / scale) + np.diag(noise)
    cross = variance * _correlation(settings.kernel, (x[:, None] - x[at]) / scale)
    gain = linalg.solve(covariance, cross.T, assume_a="pos").T
    return gain @ rows, np.sqrt(np.maximum(variance - (gain * cross).sum(1), 0.0))


def trace_choroid(
    rng: np.random.Generator,
    image: np.ndarray,
    upper: tuple[tuple[float, float], tuple[float, float]],
    lower: tuple[tuple[float, float], tuple[float, float]],
    settings: Settings = Settings(),
) -> np.ndarray:
    """The mask [H, W] of the choroid between two traces: RPE to choroid (bright to dark), choroid to sclera (dark to
    bright).

    Args:
        rng: of both traces.
        image: [H, W] in 0..1.
        upper, lower: end points ((x, y), (x, y)) of the first and the last row of the choroid.
        settings: see `Settings`.

    Raises:
        UserError: as `trace_edge`.
    """
    y = np.arange(image.shape[0])[:, None]
    above = np.zeros(image.shape[1])
    with one_thread():
        top = trace_edge(rng, edge_map(image, False), *upper, settings)
        above[top.columns] = top.rows + 3.0
        bottom = trace_edge(rng, np.where(y > above, edge_map(image, True), 0.0), *lower, settings)
    mask = np.zeros(image.shape, bool)
    columns = np.intersect1d(top.columns, bottom.columns)
    pick = lambda trace: np.rint(trace.rows)[np.isin(trace.columns, columns)]
    mask[:, columns] = (y >= pick(top)) & (y <= pick(bottom))
    return mask
