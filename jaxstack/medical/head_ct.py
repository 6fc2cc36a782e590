"""Preparation of CT scans of the head: slices, window, mask of the brain, mid-line, halves that look the same way.

Arrays are oriented as in `jaxstack.medical.volumes`: foot to head, front to back, the patient's left to right.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from jaxstack.core.errors import UserError
from jaxstack.medical.volumes import Volume, bilinear, oriented

WINDOW = (0.0, 80.0)
"""Hounsfield units that are seen: 40 +- 40."""
BRAIN = (0.0, 100.0)
BONE = 150.0
VIEW_MM = 230.0
"""Side of the square that is cut out."""
MOST_TILT = 10.0
"""Degrees; a head that is turned by more is refused."""
SEARCHED = np.arange(-15.0, 15.5)
"""Angles that are tried, in degrees."""
COARSE = 64
"""Pixels of a side of what the mid-line is looked for in."""
SMOOTH = 0.7
"""Deviation in these pixels of the Gaussian that it is smoothed by."""
DENSE, DEPTH, REACH_MM = 900.0, 10.0, 20.0
"""Bone counts in full from so many HU on and to so many millimetres from the brain, tissue to so many HU from the
median: a dark lesion has a mid-line of its own."""
WEIGHTS = (1.0, 2.0, 0.5)
"""What full differences of outline, bone and tissue count."""
_PLANE = np.zeros((3, 3, 3), bool)
_PLANE[1] = ndimage.generate_binary_structure(2, 1)


def uniform_slices(n: int, t: int) -> list[int]:
    """Indices of t slices of n, evenly spaced about the middle, as the released code of ACAT samples them.

    With m = floor(n / 2), k = floor(t / 2 + 1) and a step of floor(n / 2 / k) they run from m - step (k - 1) - 1 to
    below m + step (k - 1): one slice below what would be symmetric. Where the step is 0, of n = t or t + 1 slices, that
    rule gives nothing; the lowest t are taken here. Of an even t it gives t + 1; the last is left out.

    Raises:
        UserError: for fewer than t slices.
    """
    if not 1 <= t <= n:
        raise UserError(f"found {n} slices, expected at least {t}" if t > 0 else f"slices={t}: expected at least 1")
    k = t // 2 + 1
    step = n // 2 // k if t > 1 else 1
    if t == 1 or not step:
        return list(range((n - t) // 2, (n - t) // 2 + t))
    first, end = n // 2 - step * (k - 1) - 1, n // 2 + step * (k - 1)
    return list(range(first, end, step))[:t]


def window(hu: Any, low: float = WINDOW[0], high: float = WINDOW[1]) -> Any:
    """Hounsfield units as 0 to 1 between `low` and `high`, which lie at the ends."""
    return ((hu - low) / (high - low)).clip(0.0, 1.0)


def _label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Components of [T, H, W], each within its slice, numbered from 1."""
    found: Any = ndimage.label(mask, _PLANE)
    return found


def _filled(mask: np.ndarray) -> np.ndarray:
    """A stack of masks [T, H, W] whose holes, slice by slice, are filled."""
    outside, count = _label(~mask)
    if not count:
        return mask
    edge = np.zeros(count + 1, bool)
    for side in (outside[:, 0], outside[:, -1], outside[:, :, 0], outside[:, :, -1]):
        edge[side.ravel()] = True
    edge[0] = False
    return ~edge[outside]


def _large(mask: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Of each slice of [T, H, W] the components that have at least `share` of its largest one's pixels."""
    labels, count = _label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    # a component lies in one slice
    where = np.zeros(count + 1, np.int64)
    where[labels] = np.arange(len(mask))[:, None, None]
    largest = np.zeros(len(mask), np.int64)
    np.maximum.at(largest, where[1:], sizes[1:])
    return (sizes >= np.maximum(share * largest[where], 1))[labels]


def brain_mask(hu: np.ndarray, pixel_mm: float, low: float = BRAIN[0], high: float = BRAIN[1]) -> np.ndarray:
    """Find the brain in each slice: tissue of `low` to `high` Hounsfield units that the skull surrounds.

    Values are smoothed, bone is closed and filled, thin links are cut by opening by 3 mm, large components are kept,
    closed and filled. Slices without a closed skull take all tissue.

    Args:
        hu: [T, H, W].
        pixel_mm: millimetres of a pixel.
        low, high: of tissue.

    Returns:
        [T, H, W] bool; slices without brain are empty.
    """
    sigma = max(1.0 / pixel_mm, 0.7)
    smooth = ndimage.gaussian_filter(np.clip(hu, low - 100.0, high + 100.0).astype(np.float32), (0, sigma, sigma))
    tissue = (smooth > low) & (smooth < high)
    steps = lambda mm: max(round(mm / pixel_mm), 1)
    framed = np.pad(hu > BONE, ((0, 0), (16, 16), (16, 16)))
    bone = np.asarray(ndimage.binary_closing(framed, _PLANE, steps(4.0)), bool)
    inside = (_filled(bone) & ~bone)[:, 16:-16, 16:-16]
    closed = inside.sum((1, 2)) > 0.2 * tissue.sum((1, 2))
    tissue &= inside | ~closed[:, None, None]
    core = np.asarray(ndimage.binary_erosion(tissue, _PLANE, steps(3.0)), bool)
    grown = ndimage.binary_dilation(_large(core), _PLANE, steps(3.0), mask=tissue)
    padded = np.pad(np.asarray(grown, bool), ((0, 0), (8, 8), (8, 8)))
    return _filled(np.asarray(ndimage.binary_closing(padded, _PLANE, steps(3.0)), bool))[:, 8:-8, 8:-8]


class Midline(NamedTuple):
    """Where the two halves of a head meet, the same in all slices."""

    tilt: float
    """Degrees that the head is turned by, clockwise as displayed."""
    row: float
    column: float
    """A point of the line, in pixels: the middle of the brain along it."""


@lru_cache(2)
def _turns() -> Any:
    """A matrix that turns a coarse image [COARSE^2] back by each of `SEARCHED`: [angles * COARSE^2, COARSE^2]."""
    v = np.arange(COARSE, dtype=np.float32) - (COARSE - 1) / 2
    y, x = (a.ravel() for a in np.meshgrid(v, v, indexing="ij"))
    angles = np.deg2rad(SEARCHED)[:, None]
    at = np.stack([y * np.cos(angles) + x * np.sin(angles), x * np.cos(angles) - y * np.sin(angles)])
    return bilinear(at.reshape(2, -1) + (COARSE - 1) / 2, (COARSE, COARSE))


def _peak(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place and height of the maximum along the last axis, by the parabola through it and its neighbours."""
    i = values[..., 1:-1].argmax(-1) + 1
    a, b, c = (np.take_along_axis(values, (i + d)[..., None], -1)[..., 0] for d in (-1, 0, 1))
    bend = np.minimum(a - 2 * b + c, -1e-12)
    move = np.clip(0.5 * (a - c) / bend, -1.0, 1.0)
    return i + move, b - 0.25 * (a - c) * move


def _coarse(image: np.ndarray) -> np.ndarray:
    """[H, W] as a square [COARSE, COARSE], filled up evenly with zeros and area averaged."""
    side = max(image.shape)
    if image.shape == (COARSE, COARSE):
        return image
    rows, columns = ((side - n) // 2 for n in image.shape)
    square = np.zeros((side, side), np.float32)
    square[rows : rows + image.shape[0], columns : columns + image.shape[1]] = image
    return np.asarray(Image.fromarray(square).resize((COARSE, COARSE), Image.Resampling.BOX))


def find_midline(hu: np.ndarray, mask: np.ndarray, pixel_mm: float) -> Midline:
    """Find the line about which the head is most symmetric.

    For each angle the mean over slices, turned back, is multiplied with its mirror image about every column, which is
    one product of Fourier transforms. The score is the correlation of outline, bone and tissue with their mirror
    images, over their energy. Parabolas give fractions of columns and degrees.

    Args:
        hu: [T, H, W].
        mask: [T, H, W] bool, as `brain_mask` gives it.
        pixel_mm: millimetres of a pixel.

    Raises:
        UserError: for an empty mask.
    """
    if not mask.any():
        raise UserError("found no brain, expected Hounsfield units of a head")
    share = mask.mean(0, dtype=np.float32)
    near = np.asarray(ndimage.binary_dilation(mask, _PLANE, max(round(REACH_MM / pixel_mm), 1)), bool)
    bone = np.where(near, np.clip((hu - BRAIN[1]) / (DENSE - BRAIN[1]), 0.0, 1.0), 0.0).mean(0, dtype=np.float32)
    tissue = np.where(mask, np.clip(hu - np.median(hu[mask]), -DEPTH, DEPTH) / DEPTH, 0.0).mean(0, dtype=np.float32)
    channels = ndimage.gaussian_filter(np.stack([_coarse(x) for x in (share, bone, tissue)]), (0, SMOOTH, SMOOTH))
    channels *= np.array(WEIGHTS, np.float32)[:, None, None]
    turned = np.ascontiguousarray((_turns() @ channels.reshape(3, -1).T).T).reshape(3, -1, COARSE, COARSE)
    # the product with the mirror image, summed over rows: its squared difference is twice the energy less twice this
    spectra = np.square(np.asarray(fft.rfft(turned, 2 * COARSE))).sum((0, 2))
    energy = np.square(turned).sum((0, 2, 3))
    score = np.asarray(fft.irfft(spectra, 2 * COARSE)) / energy[:, None]
    twice, heights = _peak(score)
    best, _ = _peak(heights[None])
    tilt = float(np.interp(best[0], np.arange(len(SEARCHED)), SEARCHED))
    scale = max(hu.shape[1:]) / COARSE
    offset = (np.interp(best[0], np.arange(len(SEARCHED)), twice) - (COARSE - 1)) / 2 * scale
    # the middle of the brain along the line, from the centre of the image
    angle, (down, right) = np.deg2rad(tilt), ((n - 1) / 2 for n in hu.shape[1:])
    rows, columns = np.nonzero(share > 0.25 * share.max())
    along = (rows - down) * np.cos(angle) - (columns - right) * np.sin(angle)
    middle = 0.5 * (along.min() + along.max())
    row, column = middle * np.cos(angle) + offset * np.sin(angle), offset * np.cos(angle) - middle * np.sin(angle)
    return Midline(tilt, float(row + down), float(column + right))


def upright(values: np.ndarray, line: Midline, pixel_mm: float, size: int, view_mm: float = VIEW_MM) -> np.ndarray:
    """Turn slices so that the mid-line is vertical, between the two middle columns, and cut out a square.

    Args:
        values: [T, H, W]; averaged over the new pixels where those are larger.
        line: of these slices.
        pixel_mm: millimetres of a pixel.
        size: pixels of a side of the square, even.
        view_mm: its side.

    Returns:
        [T, size, size] float32.
    """
    step = view_mm / size / pixel_mm
    values = values.astype(np.float32)
    if step > 1.5:
        values = ndimage.gaussian_filter(values, (0, 0.4 * step, 0.4 * step))
    v = (np.arange(size) - (size - 1) / 2) * step
    y, x = (a.ravel() for a in np.meshgrid(v, v, indexing="ij"))
    c, s = np.cos(np.deg2rad(line.tilt)), np.sin(np.deg2rad(line.tilt))
    at = np.stack([y * c + x * s + line.row, x * c - y * s + line.column])
    # a frame of zeros, so that nothing is repeated beyond the edge
    framed = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    read = bilinear(at + 1, (framed.shape[1], framed.shape[2]))
    return (read @ framed.reshape(len(values), -1).T).T.reshape(len(values), size, size)


def halves(slices: np.ndarray) -> np.ndarray:
    """Split upright slices [..., T, S, S] into [..., 2, T, S, S / 2]: the patient's left, and right mirrored, so that
    in both the first column is the outer one and the last lies at the mid-line."""
    half = slices.shape[-1] // 2
    return np.stack([slices[..., :half], slices[..., ::-1][..., :half]], -4)


class Prepared(NamedTuple):
    """What a network is given of a scan."""

    halves: np.ndarray
    """[2, T, S, S / 2] uint8: left and right, 0 to 255 over the window; 0 outside the brain."""
    line: Midline
    mask: np.ndarray
    """[T, H, W] bool, the brain in the chosen slices."""
    slices: list[int]


def prepare(
    volume: Volume, slices: int = 11, size: int = 128, view_mm: float = VIEW_MM, strip: bool = True, jitter: int = 0
) -> Prepared:
    """Choose slices, find brain and mid-line, turn, cut out, window, split.

    Args:
        volume: a scan.
        slices: how many, T.
        size: pixels of a side of the square, S, even.
        view_mm: its side.
        strip: set to 0 what is not brain.
        jitter: also give the chosen slices moved by -jitter to jitter slices of the volume, at its ends fewer: halves
            are then [2, (2 jitter + 1) T, S, S / 2], the slices as they are chosen in the middle.

    Raises:
        UserError: for too few slices, pixels that are not square, values of a picture, no brain, or a tilt above 10
            degrees.
    """
    chosen = uniform_slices(len(volume.hu), slices)
    _, down, right = volume.spacing
    if abs(down - right) > 0.01 * right:
        raise UserError(f"found pixels of {down:g} x {right:g} mm, expected square ones")
    low, high = float(volume.hu.min()), float(volume.hu.max())
    if high - low <= 2.0:  # brightness of a picture; brain and bone are hundreds apart
        raise UserError(f"found values of {low:g} to {high:g}, expected Hounsfield units of a head")
    hu = volume.hu[chosen]
    mask = brain_mask(hu, right)
    line = find_midline(hu, mask, right)
    middle = mask
    if jitter:
        shifts = range(-jitter, jitter + 1)
        hu = volume.hu[[min(max(i + shift, 0), len(volume.hu) - 1) for shift in shifts for i in chosen]]
        mask = brain_mask(hu, right)
    if abs(line.tilt) > MOST_TILT:
        raise UserError(f"found a tilt of {line.tilt:.1f} degrees, expected at most {MOST_TILT:g}")
    seen = upright(window(hu) * mask if strip else window(hu), line, right, size, view_mm)
    return Prepared(np.round(255.0 * halves(seen)).astype(np.uint8), line, middle, chosen)


def prepare_scan(vol_hu: np.ndarray, affine: np.ndarray, slices: int, size: int) -> np.ndarray:
    """Halves [2, T, S, S / 2, 1] float32 in 0..1 of voxels [I, J, K] with a RAS affine, see `prepare`.

    Raises:
        UserError: as `prepare` and `jaxstack.medical.volumes.oriented`.
    """
    hu, spacing = oriented(np.asarray(vol_hu, np.float32), affine)
    return prepare(Volume(hu, spacing, "array"), slices, size).halves[..., None].astype(np.float32) / 255.0
