"""Measures of the choroid from a mask of an OCT B-scan: boundaries, thickness, area and volume.

Boundaries are rows for each column, [W], with a mask of the columns that have any: shapes are static, so that all of it
but `largest_component` is jitted and vmapped. Rows are whole pixels: a choroid of T rows reaches from the upper edge of
its first row to the lower edge of its last, and its thickness is T rows. The released code takes row differences
(T - 1 rows) and perpendiculars in pixels that are not square; `released=True` and `perpendicular="pixel"` give these.

Source: Burke et al. (2023), "An open-source deep learning algorithm for efficient and fully automatic analysis of the
choroid in optical coherence tomography".
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import ndimage

from jaxstack.core.errors import UserError

Axis = Literal["choroid", "image"]
Perpendicular = Literal["physical", "pixel", "vertical"]
DEFAULT_SCALE = (11.49, 3.87)
"""Micrometres per pixel (x, y) of the scanner of the paper."""


class Boundaries(NamedTuple):
    """Two rows for each column of an image."""

    top: Int[Array, " w"]
    """First row of the choroid."""
    bottom: Int[Array, " w"]
    """Last row, inclusive."""
    valid: Bool[Array, " w"]
    """Columns that have any."""


class Choroid(NamedTuple):
    """What is measured in a window around the fovea. All is zero, and `ok` False, where the trace is too short."""

    thickness_um: Float[Array, " n"]
    """From left to right; NaN where the lower boundary is not met."""
    area_mm2: Float[Array, ""]
    roi: Bool[Array, "h w"]
    """The pixels that the area counts."""
    upper: Float[Array, "n 2"]
    """(x, y) of the places on the upper boundary, in pixels."""
    lower: Float[Array, "n 2"]
    """(x, y) of their partners on the lower boundary."""
    ok: Bool[Array, ""]
    """Whether the trace reaches to both ends of the window."""


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest set of pixels of a mask [H, W] that touch each other along sides or corners (8 neighbours).

    Of equally large ones the first in reading order; an empty mask gives an empty one. Runs on the host.
    """
    labels = np.empty(np.shape(mask), np.int32)
    if not ndimage.label(np.asarray(mask, bool), np.ones((3, 3)), output=labels):
        return np.zeros(np.shape(mask), bool)
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    return labels == sizes.argmax()


def boundaries(mask: Bool[Array, "h w"]) -> Boundaries:
    """First and last row of a mask in each column; holes between them are ignored."""
    mask = jnp.asarray(mask, bool)
    last = mask.shape[0] - 1
    return Boundaries(mask.argmax(0).astype(jnp.int32), (last - mask[::-1].argmax(0)).astype(jnp.int32), mask.any(0))


def between(found: Boundaries, height: int) -> Bool[Array, "h w"]:
    """The mask [height, W] of all rows from `top` to `bottom`: the inverse of `boundaries` for one without holes."""
    y = jnp.arange(height)[:, None]
    return found.valid & (y >= found.top) & (y <= found.bottom)


def smart_crop(found: Boundaries, check: int = 20, released: bool = False) -> Boundaries:
    """Cut ragged ends off both traces and fill gaps.

    A step between neighbouring columns of more than one row, in either trace, among the `check` columns at an end cuts
    what lies outboard of it; of several steps the innermost one cuts. Columns without a mask between others are
    interpolated linearly, rounded down.

    Args:
        found: boundaries of one component.
        check: columns at each end.
        released: also drop the last column, as the released code does.
    """
    top, bottom, valid = found
    x = jnp.arange(valid.shape[0])
    first, last = valid.argmax(), valid.shape[0] - 1 - valid[::-1].argmax()
    before = jax.lax.cummax(jnp.where(valid, x, -1))
    after = jax.lax.cummin(jnp.where(valid, x, valid.shape[0]), reverse=True)
    inside = valid.any() & (x >= first) & (x <= last)

    def filled(y: Array) -> Array:
        a, b = jnp.where(inside, before, x), jnp.where(inside, after, x)
        rise = (y[b] - y[a]) * (x - a)
        return y[a] + rise // jnp.maximum(b - a, 1)

    top, bottom = filled(top), filled(bottom)
    step = (jnp.abs(jnp.diff(top)) > 1) | (jnp.abs(jnp.diff(bottom)) > 1)  # between x and x + 1
    at = x[:-1]
    step &= (at >= first) & (at < last)
    left = jnp.where(step & (at < first + check - 1), at + 1, first).max()
    right = jnp.where(step & (at > last - check), at, last).min()
    return Boundaries(top, bottom, inside & (x >= left) & (x <= right - released))


@functools.partial(
    jax.jit,
    static_argnames=("height", "n_measures", "n_avg", "axis", "perpendicular", "force", "offset", "released"),
)
def choroid_metrics(
    top: Int[Array, " w"],
    bottom: Int[Array, " w"],
    valid: Bool[Array, " w"],
    fovea_xy: Any = None,
    scale: Any = DEFAULT_SCALE,
    *,
    height: int,
    macula_um: Any = 3000.0,
    n_measures: int = 3,
    n_avg: int = 0,
    axis: Axis = "choroid",
    perpendicular: Perpendicular = "physical",
    force: bool = False,
    offset: int = 15,
    released: bool = False,
) -> Choroid:
    """Measure thickness and area in a window around the fovea.

    The reference is the point of the upper trace nearest to the fovea, in pixels. Places lie at distances 0 to
    `macula_um` on both sides, `n_measures` in all, and the outermost two bound the area.

    Args:
        top, bottom, valid: `boundaries`; columns between the first and the last valid one must be valid (`smart_crop`
            fills gaps).
        fovea_xy: (x, y) in pixels; None or NaN: the middle column of the choroid, at the mean row of the upper trace.
        scale: (x, y) micrometres per pixel.
        height: rows of the image, H.
        macula_um: R, half the width of the window.
        n_measures: odd.
        n_avg: neighbours on each side over whose columns a thickness is averaged. Rows of a mask are whole, so that
            one place of a tilted choroid is exact to a row; with 3 neighbours steps cancel.
        axis: distances along the upper trace ("choroid": the sum of sqrt((sx dx)^2 + (sy dy)^2)) or along the image's
            rows ("image"); a place is the last column within its distance.
        perpendicular: direction of thickness: perpendicular to the chord of the upper trace over +-`offset` columns,
            in micrometres ("physical") or in pixels ("pixel": wrong where pixels are not square, as the released
            code), or along the column ("vertical").
        force: where the trace ends too early, measure at its end instead of giving zeros.
        offset: columns.
        released: thickness from row differences and whole micrometres, partners on whole rows, edges of the area at
            whole columns, area to six decimals.

    Returns:
        `Choroid`; `ok` is False where the trace is too short, also where `force` measured at its ends.

    Raises:
        UserError: for an even `n_measures`, or an unknown axis or direction.
    """
    if n_measures < 1 or n_measures % 2 == 0:
        raise UserError(f"n_measures={n_measures}: expected an odd number, so that one place is the fovea")
    if axis not in ("choroid", "image"):
        raise UserError(f"axis={axis!r}: expected 'choroid' or 'image'")
    if perpendicular not in ("physical", "pixel", "vertical"):
        raise UserError(f"perpendicular={perpendicular!r}: expected 'physical', 'pixel' or 'vertical'")
    if n_avg < 0 or offset < 1:
        raise UserError(f"n_avg={n_avg}, offset={offset}: expected at least 0 and 1")
    top, bottom = jnp.asarray(top, jnp.float32), jnp.asarray(bottom, jnp.float32)
    valid, scale = jnp.asarray(valid, bool), jnp.asarray(scale, jnp.float32)
    width = valid.shape[0]
    x = jnp.arange(width)
    first, last = valid.argmax(), width - 1 - valid[::-1].argmax()
    # before and after the trace its end values are repeated, so that every column has one
    top, bottom = (y[jnp.clip(x, first, last)] for y in (top, bottom))

    middle = jnp.stack([(first + last) // 2, jnp.where(valid, top, 0.0).sum() / jnp.maximum(valid.sum(), 1)])
    fovea = middle if fovea_xy is None else jnp.asarray(fovea_xy, jnp.float32)
    fovea = jnp.where(jnp.isfinite(fovea).all(), fovea, middle)
    far = jnp.square(x - fovea[0]) + jnp.square(top - fovea[1])
    ref = jnp.where(valid, far, jnp.inf).argmin()

    half = (n_measures - 1) // 2
    distance = macula_um * jnp.arange(half + 1) / max(half, 1)
    rise = jnp.diff(top) if axis == "choroid" else jnp.zeros(width - 1)
    steps = jnp.hypot(scale[0], scale[1] * rise) * ((x[:-1] >= first) & (x[:-1] < last))
    along = jnp.concatenate([jnp.zeros(1), jnp.cumsum(steps)])
    along -= along[ref]
    # 0.01 um: a distance of whole columns stays whole in single precision
    within = lambda d, side: ((side * along <= d + 0.01) & (side * (x - ref) > 0) & (x >= first) & (x <= last)).sum()
    left = ref - jax.vmap(lambda d: within(d, -1))(distance)
    right = ref + jax.vmap(lambda d: within(d, 1))(distance)
    places = jnp.concatenate([left[::-1], right[1:]])
    ok = valid.any() & (jnp.minimum(-along[first], along[last]) + scale[0] > distance[-1] + 0.01)
    places = jnp.clip(places, first, last)

    rows = jnp.arange(height, dtype=jnp.float32)
    edge = 0.0 if released else 0.5  # of a pixel, from its centre

    def lean(place: Array) -> Array:
        """Columns per row of the line through a place on the upper trace: 0 is vertical."""
        if perpendicular == "vertical":
            return jnp.zeros(())
        a, b = jnp.clip(place - offset, first, last), jnp.clip(place + offset, first, last)
        slope = (top[b] - top[a]) / jnp.maximum(b - a, 1)
        return -slope if perpendicular == "pixel" else -slope * jnp.square(scale[1] / scale[0])

    def partner(place: Array) -> tuple[Array, Array]:
        """The point (x, y) where the line from a place meets the lower trace, and the distance in micrometres."""
        place = jnp.clip(place, first, last)
        start, g = top[place] - edge, lean(place)
        columns = place + g * (rows - start)
        below = jnp.interp(columns, x.astype(jnp.float32), bottom + edge)
        gap = jnp.where(rows >= start, rows - below, -jnp.inf)
        if released:
            row = jnp.abs(jnp.where(jnp.isfinite(gap), gap, jnp.inf)).argmin().astype(jnp.float32)
            found = jnp.abs(gap[row.astype(jnp.int32)]) <= 2.0
        else:
            at = (gap >= 0).argmax()
            rise = jnp.where(at > 0, gap[at] - gap[at - 1], jnp.inf)
            row = jnp.where(jnp.isfinite(rise), rows[at] - gap[at] / rise, rows[at])
            found = (gap >= 0).any()
            # the lower edge of the image is the last row's
            at_end = (gap < 0).all() & (gap[-1] >= -edge)
            row, found = jnp.where(at_end, below[-1], row), found | at_end
        end = jnp.stack([place + g * (row - start), row])
        found &= (end[0] >= first - 0.5) & (end[0] <= last + 0.5)
        long = jnp.hypot(scale[0] * g * (row - start), scale[1] * (row - start))
        return jnp.where(found, end, jnp.nan), jnp.where(found, long, jnp.nan)

    near = places[:, None] + jnp.arange(-n_avg, n_avg + 1)
    ends, long = jax.vmap(jax.vmap(partner))(near)
    thickness = long.mean(1)
    upper = jnp.stack([places.astype(jnp.float32), top[places]], -1)
    lower = ends[:, n_avg]

    y = rows[:, None]
    sides = [places[i] + lean(places[i]) * (y - (top[places[i]] - edge)) for i in (0, -1)]
    if released:
        sides = [jnp.trunc(side) for side in sides]
    roi = valid & (y >= top) & (y <= bottom) & (x >= sides[0]) & (x < sides[1])
    # as many as `roi` has, without looking at its pixels
    spans = [_rows_beside(side[:, 0], lean(places[i]) >= 0, x) for side, i in zip(sides, (0, -1))]
    low = jnp.maximum(jnp.ceil(top), jnp.maximum(spans[0].right[0], spans[1].left[0]))
    high = jnp.minimum(jnp.floor(bottom) + 1, jnp.minimum(spans[0].right[1], spans[1].left[1]))
    area = jnp.where(valid, jnp.maximum(high - low, 0), 0).sum() * scale[0] * scale[1] * 1e-6
    if released:
        thickness, area = jnp.rint(thickness), jnp.round(area, 6)
    use = valid.any() if force else ok
    zero = lambda value: jnp.where(use, value, jnp.zeros_like(value))
    return Choroid(zero(thickness), zero(area), zero(roi), zero(upper), zero(lower), ok)


class _Rows(NamedTuple):
    """First row and last row + 1 for each column: where it is at or right of a line, and where left of it."""

    right: tuple[Array, Array]
    left: tuple[Array, Array]


def _rows_beside(line: Float[Array, " h"], rising: Array, x: Int[Array, " w"]) -> _Rows:
    """The rows in which columns x lie on either side of a line whose column grows with the rows, or falls."""
    height = len(line)
    bound = jnp.ceil(line).astype(jnp.int32)
    count = jnp.searchsorted(jnp.where(rising, bound, bound[::-1]), x, side="right")
    zero, end, cut = jnp.zeros_like(count), jnp.full_like(count, height), jnp.where(rising, count, height - count)
    pick = lambda first: (jnp.where(first, zero, cut), jnp.where(first, cut, end))
    return _Rows(pick(rising), pick(~rising))


def choroid_volume(
    top: Int[Array, "s w"],
    bottom: Int[Array, "s w"],
    valid: Bool[Array, "s w"],
    fovea_xy: Any,
    scale: Any = DEFAULT_SCALE,
    *,
    height: int,
    dz_um: float | None = None,
    macula_um: float = 3000.0,
    **options: Any,
) -> Float[Array, ""]:
    """Volume of the choroid in a cylinder around the fovea, in mm^3, from a stack of parallel B-scans.

    Scan i, at the distance i dz from the middle one, is measured to sqrt(R^2 - (i dz)^2) on both sides; Simpson's rule
    adds up the areas. Between the last scan and the rim of the cylinder the area falls to nothing.

    Args:
        top, bottom, valid: boundaries of an odd number S of scans, the fovea in the middle one.
        fovea_xy: (x, y) in pixels of the middle scan, for all.
        scale: (x, y) micrometres per pixel.
        height: rows of a scan.
        dz_um: distance of scans; default: 120 um for 61 scans, else 240 um.
        macula_um: R.
        options: of `choroid_metrics`.

    Returns:
        mm^3; NaN where a scan is too short.

    Raises:
        UserError: for an even number of scans, or a stack that does not reach to the rim.
    """
    count = len(valid)
    dz = (120.0 if count == 61 else 240.0) if dz_um is None else dz_um
    if dz <= 0 or macula_um <= 0:
        raise UserError(f"dz_um={dz:g}, macula_um={macula_um:g}: expected positive lengths")
    reach = int(np.ceil(macula_um / dz) - 1)  # scans on each side inside the cylinder
    if count % 2 == 0 or reach > count // 2:
        raise UserError(
            f"scans: found {count} at {dz:g} um, expected an odd number, at least {2 * reach + 1} for {macula_um:g} um"
        )
    steps = np.arange(-reach, reach + 1)
    chosen = count // 2 + steps
    radius = jnp.asarray(np.sqrt(macula_um**2 - (steps * dz) ** 2), jnp.float32)

    def measure(t: Array, b: Array, v: Array, r: Array) -> Choroid:
        return choroid_metrics(t, b, v, fovea_xy, scale, height=height, macula_um=r, **options)

    t, b, v = (jnp.asarray(a)[chosen] for a in (top, bottom, valid))
    found = jax.vmap(measure)(t, b, v, radius)
    areas = jnp.where(found.ok, found.area_mm2, jnp.nan)
    return jnp.dot(areas, jnp.asarray(_simpson(np.array([-macula_um, *(steps * dz), macula_um]))[1:-1] * 1e-3))


def _simpson(z: np.ndarray) -> np.ndarray:
    """Weights of Simpson's rule at an odd number of places of any distance: a parabola through each three."""
    weights = np.zeros(len(z))
    for i in range(0, len(z) - 2, 2):
        a, b = z[i + 1] - z[i], z[i + 2] - z[i + 1]
        weights[i : i + 3] += (a + b) / 6.0 * np.array([2.0 - b / a, (a + b) ** 2 / (a * b), 2.0 - a / b])
    return weights
