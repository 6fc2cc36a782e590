"""Vessels of the choroid by thresholds, without learning: Niblack's threshold and multi-scale median-cut quantisation.

They run on the host, in NumPy, SciPy and scikit-image, on one image at a time. Both need the region of the choroid.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from jaxstack.core.errors import UserError


def niblack_vessels(image: np.ndarray, region: np.ndarray, window: int = 51, k: float = -0.05) -> np.ndarray:
    """Dark pixels of a region by a local threshold, mean + k deviations (Niblack, 1986).

    Mean and deviation are over those pixels of the window that lie in the region: the bright line above the choroid
    would raise the threshold.

    Args:
        image: [H, W] grey values.
        region: [H, W] bool.
        window: side of the window in pixels, odd.
        k: deviations above the mean.

    Returns:
        [H, W] bool.

    Raises:
        UserError: for an even window.
    """
    if window < 1 or window % 2 == 0:
        raise UserError(f"window={window}: expected an odd number of pixels")
    inside = np.asarray(region, bool)
    x = np.asarray(image, np.float64)
    local = lambda values: ndimage.uniform_filter(np.where(inside, values, 0.0), window, mode="constant")
    share = np.maximum(local(np.ones_like(x)), 1e-12)
    mean = local(x) / share
    deviation = np.sqrt(np.maximum(local(x**2) / share - mean**2, 0.0))
    return inside & (x < mean + k * deviation)


def median_cut(values: Any, clusters: int) -> np.ndarray:
    """Cluster grey values: the cluster with the widest range is split at its median until there are enough.

    Args:
        values: [N], or any shape.
        clusters: how many; fewer where values are equal.

    Returns:
        The number of each value's cluster, 0 the darkest; of the shape of `values`.
    """
    x = np.sort(np.asarray(values, np.float64).ravel())
    if not x.size:
        return np.zeros(np.shape(values), int)
    parts = [x]
    while len(parts) < clusters:
        widest = max(range(len(parts)), key=lambda i: parts[i][-1] - parts[i][0])
        part = parts[widest]
        if part[0] == part[-1]:
            break
        # the median goes to the darker side, unless it is the largest value
        cut = float(np.median(part))
        at = int(np.searchsorted(part, cut, "right"))
        at = at if at < len(part) else int(np.searchsorted(part, part[-1], "left"))
        parts[widest : widest + 1] = [part[:at], part[at:]]
    edges = np.array([part[0] for part in parts[1:]])
    return np.searchsorted(edges, values, "right")


def _quantised(image: np.ndarray, inside: np.ndarray, window: int) -> np.ndarray:
    """Each window's pixels as the means of their dark and bright halves by median cut."""
    out = image.copy()
    for top in range(0, image.shape[0], window):
        for left in range(0, image.shape[1], window):
            at = np.s_[top : top + window, left : left + window]
            mask, part = inside[at], image[at]
            if not mask.any():
                continue
            label = median_cut(part[mask], 2)
            halves = [part[mask][label == i].mean() if (label == i).any() else 0.0 for i in (0, 1)]
            out[at] = np.where(mask, np.asarray(halves)[(part > part[mask][label == 0].max()).astype(int)], part)
    return out


def _dark(image: np.ndarray, inside: np.ndarray, thickness: float, clusters: int, darkest: int) -> np.ndarray:
    """The darkest clusters of the enhanced image, where `inside`."""
    from skimage import filters
    from skimage.morphology import disk

    sizes = [max(2, round(thickness / part)) for part in (10, 5, 2)]
    layers = np.mean([_quantised(image, inside, size) for size in sizes], 0)
    smooth = filters.median(layers, disk(2))
    out = np.zeros_like(inside)
    out[inside] = median_cut(smooth[inside], clusters) < darkest
    return out


def _enhanced(image: np.ndarray, inside: np.ndarray, gamma: float | None, contrast: float) -> np.ndarray:
    """Even columns, less noise, more local contrast, and a gamma by which the region's mean becomes 0.35."""
    from skimage import exposure, filters, restoration
    from skimage.morphology import disk

    columns = np.array(
        [image[:, i][inside[:, i]].mean() if inside[:, i].any() else np.nan for i in range(inside.shape[1])]
    )
    columns = np.where(np.isfinite(columns), columns, np.nanmean(columns))
    wide = ndimage.gaussian_filter1d(columns, max(1.0, inside.shape[1] / 8))
    x = np.clip(image * wide / np.maximum(columns, 1e-6), 0.0, 1.0)
    x = restoration.denoise_nl_means(x, patch_size=5, patch_distance=10, h=0.015, fast_mode=True)
    kernel = tuple(max(1, n // 8) for n in x.shape)
    x = exposure.equalize_adapthist(np.clip(x, 0.0, 1.0), kernel_size=kernel, clip_limit=contrast / 256)
    x = filters.median(x, disk(2))
    mean = float(np.clip(x[inside].mean(), 1e-3, 0.999))
    return np.clip(x, 0.0, 1.0) ** (np.log(0.35) / np.log(mean) if gamma is None else gamma)


def mmcq_vessels(
    image: np.ndarray,
    region: np.ndarray,
    scale_y: float = 3.87,
    *,
    clusters: int = 20,
    darkest: int = 11,
    gammas: Sequence[float | None] = (None,),
    contrasts: Sequence[float] = (2.0,),
) -> np.ndarray:
    """Vessels of the choroid by multi-scale median-cut quantisation (Burke et al., 2024).

    The region is cut out; columns are evened against shadows, denoised by non-local means, their contrast raised in
    tiles, and a gamma brings the mean to 0.35. Windows of a tenth, a fifth and a half of the mean thickness are
    quantised to two grey values each and averaged; of 20 clusters of the result by median cut the 11 darkest are
    vessels. This is repeated for the region without its upper 10 micrometres (the choriocapillaris, which counts as
    vessel), without 10 pixels and without a third of the thickness; the union is opened by a disc of 2 pixels. With
    several gammas or contrasts, pixels are vessels that more than half of the contrasts call so, for more than half of
    the gammas.

    Args:
        image: [H, W] grey values in 0..1.
        region: [H, W] bool, a run of rows in each column.
        scale_y: micrometres per row.
        clusters: of the median cut.
        darkest: clusters that are vessels.
        gammas: exponents; None brings the mean to 0.35.
        contrasts: limits of the adaptive histogram.

    Returns:
        [H, W] bool.

    Raises:
        UserError: where scikit-image is missing.
    """
    try:
        from skimage import morphology
    except ImportError as e:
        raise UserError("mmcq_vessels: scikit-image is missing; pip install 'jaxstack[medical]'") from e
    inside = np.asarray(region, bool)
    out = np.zeros(inside.shape, bool)
    if not inside.any():
        return out
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    at = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    crop, mask = np.asarray(image, np.float64)[at], inside[at]
    depth = np.where(mask, np.arange(mask.shape[0])[:, None] - mask.argmax(0), -1)
    thickness = float(mask.sum(0)[mask.any(0)].mean())
    capillaries = mask & (depth < round(10.0 / scale_y))
    cuts = (0.0, round(10.0 / scale_y), 10.0, thickness / 3)

    def vessels(gamma: float | None, contrast: float) -> np.ndarray:
        enhanced = _enhanced(crop, mask, gamma, contrast)
        union = capillaries.copy()
        for cut in cuts:
            part = mask & (depth >= cut)
            if part.any():
                union |= _dark(enhanced, part, thickness, clusters, darkest)
        return mask & np.asarray(morphology.opening(union, morphology.disk(2)), bool)

    votes: Any = [np.mean([vessels(g, c) for c in contrasts], 0) > 0.5 for g in gammas]
    out[at] = np.mean(votes, 0) > 0.5
    return out
