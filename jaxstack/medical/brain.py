"""Phantoms of slices through a brain: tissue of a template, warped, with a lesion whose place is known exactly."""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from jaxstack.core.errors import UserError

Kind = Literal["mri", "ct"]
TEMPLATES = ("mni", "ellipses")
LEVELS = range(75, 111)
"""Axial slices of the MNI template, from the basal ganglia to above the ventricles, 1 mm apart."""


class Template(NamedTuple):
    """Shares of tissue in 0..1 in slices through a healthy brain, [Z, N, N] float32. Rows run from front to back."""

    gray: np.ndarray
    white: np.ndarray
    inside: np.ndarray
    """The brain, ventricles included."""


class Brain(NamedTuple):
    """One slice."""

    image: np.ndarray
    """[N, N] float32: MRI (as FLAIR) in 0..1, CT in Hounsfield units."""
    lesion: np.ndarray
    """[N, N] bool, the exact mask; empty in a healthy brain."""
    inside: np.ndarray
    """[N, N] bool: the brain."""


def _square(volume: np.ndarray, size: int) -> np.ndarray:
    """Axial slices [X, Y, Z] of a RAS volume as squares [Z, N, N], front at the top, area averaged."""
    slices = np.moveaxis(volume, 2, 0).swapaxes(1, 2)[:, ::-1]
    side = max(slices.shape[1:])
    rows, columns = side - slices.shape[1], side - slices.shape[2]
    slices = np.pad(slices, ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)))
    shrunk = [np.asarray(Image.fromarray(s).resize((size, size), Image.Resampling.BOX)) for s in slices]
    return np.stack(shrunk).astype(np.float32)


@lru_cache(4)
def template(name: str = "mni", size: int = 48) -> Template:
    """Healthy tissue.

    Args:
        name: `mni` (ICBM 2009a symmetric, the maps in nilearn's package, 36 slices), or `ellipses` (drawn: nested
            ellipses with a folded cortex and two ventricles, 36 sizes), which needs no package.
        size: pixels of a side, N.

    Raises:
        UserError: for an unknown name, less than 16 pixels, or where nilearn is missing.
    """
    if size < 16:
        raise UserError(f"size={size}: expected at least 16 pixels")
    if name == "ellipses":
        return _ellipses(size)
    if name != "mni":
        raise UserError(f"template={name!r}: expected one of {', '.join(TEMPLATES)}")
    try:
        from nilearn import datasets
    except ImportError as e:
        raise UserError(
            "template='mni': nilearn is missing; pip install 'jaxstack[medical]', or take 'ellipses'"
        ) from e
    volumes = [
        np.asarray(load(resolution=1).dataobj, np.float32)[:, :, LEVELS.start : LEVELS.stop]
        for load in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template, datasets.load_mni152_template)
    ]
    gray, white, whole = volumes
    inside = np.stack([np.asarray(ndimage.binary_fill_holes(s)) for s in np.moveaxis(whole > 0, 2, 0)])
    return Template(*[_square(v, size) for v in (gray, white, np.moveaxis(inside, 0, 2).astype(np.float32))])


def _ellipses(size: int) -> Template:
    fine = 4 * size
    y, x = np.mgrid[:fine, :fine] / fine + 0.5 / fine - 0.5
    made = []
    for level in np.linspace(0.0, 1.0, len(LEVELS)):
        tall, wide = 0.42 + 0.04 * level, 0.34 + 0.03 * level
        radius, angle = np.hypot(y / tall, x / wide), np.arctan2(y, x)
        folds = 0.8 + 0.05 * np.sin(13 * angle + 6 * level) + 0.03 * np.sin(29 * angle)
        ventricles = np.hypot(y / (0.14 - 0.06 * level), (np.abs(x) - 0.05) / 0.03) < 1
        inside = radius < 1
        white = inside & (radius < folds) & ~ventricles
        gray = inside & ~white & ~ventricles & (radius < 0.97)
        made.append([m.reshape(size, 4, size, 4).mean((1, 3)) for m in (gray, white, inside)])
    gray, white, inside = np.asarray(made, np.float32).transpose(1, 0, 2, 3)
    return Template(gray, white, inside)


def brain(
    rng: np.random.Generator, size: int = 48, kind: Kind = "mri", lesion: bool = False, source: str = "mni"
) -> Brain:
    """Draw a slice: tissue of the template at a random height, smoothly warped, with gains of its own.

    MRI: .55 gray + .38 white + .12 brain, a lesion brighter by .30 to .45. CT: 37 gray + 29 white + 8 of the rest of
    the brain, a skull of 900 HU, noise of 6 HU, a lesion darker by 3 to 10 HU. A lesion is a rotated ellipse with radii
    of 2.5 to 6 px at 48 pixels and a noisy outline.

    Args:
        rng: the only source of chance.
        size: pixels of a side, N; lengths in pixels grow with it.
        kind: mri or ct.
        lesion: whether there is one.
        source: name of the template.

    Raises:
        UserError: as `template`, and for an unknown kind.
    """
    if kind not in ("mri", "ct"):
        raise UserError(f"kind={kind!r}: expected 'mri' or 'ct'")
    tissue, px = template(source, size), size / 48.0
    level = int(rng.integers(len(tissue.gray)))
    field = ndimage.gaussian_filter(rng.normal(size=(2, size, size)), (0, 5 * px, 5 * px))
    field *= rng.uniform(0.3, 1.6) * px / field.std()
    at = np.mgrid[:size, :size] + field
    gray, white, inside = (ndimage.map_coordinates(part[level], at, order=1) for part in tissue)
    gray, white = gray * rng.uniform(0.9, 1.1), white * rng.uniform(0.9, 1.1)
    within = inside > 0.5
    mask = _lesion(rng, within, px) if lesion else np.zeros_like(within)
    soft = ndimage.gaussian_filter(mask.astype(np.float32), 0.6 * px)
    if kind == "mri":
        image = np.clip(0.55 * gray + 0.38 * white + 0.12 * inside + rng.uniform(0.30, 0.45) * soft, 0.0, 1.0)
    else:
        image = 37.0 * gray + 29.0 * white + 8.0 * np.clip(inside - gray - white, 0.0, 1.0)
        image -= rng.uniform(3.0, 10.0) * soft
        width = max(round(3 * px), 1)
        skull = np.asarray(ndimage.binary_dilation(within, iterations=width), bool) & ~within
        image = np.where(skull, 900.0, image) + rng.normal(0.0, 6.0, image.shape)
    return Brain(image.astype(np.float32), mask, within)


def _lesion(rng: np.random.Generator, within: np.ndarray, px: float) -> np.ndarray:
    places = np.argwhere(ndimage.binary_erosion(within, iterations=max(round(3 * px), 1)))
    cy, cx = places[rng.integers(len(places))]
    a, b = rng.uniform(2.5, 6.0, 2) * px
    turn = rng.uniform(0.0, np.pi)
    y, x = np.mgrid[: within.shape[0], : within.shape[1]]
    along = (y - cy) * np.sin(turn) + (x - cx) * np.cos(turn)
    across = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    rough = ndimage.gaussian_filter(rng.normal(size=within.shape), 1.5 * px)
    return within & (np.hypot(along / a, across / b) + 0.15 * rough / rough.std() < 1.0)


def brain_set(
    seed: int, count: int, size: int = 48, kind: Kind = "mri", lesion: bool = False, source: str = "mni"
) -> tuple[np.ndarray, np.ndarray]:
    """Slices of a seed.

    Args:
        seed: another one gives other brains, and lesions do not follow the healthy ones.
        count: how many, M.
        size: pixels of a side, N.
        kind: mri or ct.
        lesion: whether each has one.
        source: name of the template.

    Returns:
        Images [M, N, N] float32 and masks of the lesions [M, N, N] bool.
    """
    made = [brain(np.random.default_rng((seed, int(lesion), i)), size, kind, lesion, source) for i in range(count)]
    return np.stack([m.image for m in made]), np.stack([m.lesion for m in made])
