"""Phantoms of routine CT scans of the head: slices through a brain of `jaxstack.medical.brain`, with strokes of known
place, size, number and age, and with what misleads: old strokes, calcifications, atrophy, tilt, gain, noise.

Arrays of a scan are [slices from foot to head, rows from front to back, columns from the patient's left to right].
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from jaxstack.core.errors import UserError
from jaxstack.medical.brain import LEVELS, template
from jaxstack.medical.volumes import bilinear

SIDES = ("none", "left", "right", "both")
"""Bit 0: the patient's left, bit 1: right."""
SIZES = ("none", "S", "M", "L")
TIMINGS = ("baseline", "follow-up")
OUTSIDE, BRAIN, OLD, CALCIFIED, ACUTE = range(5)
"""What `CtScans.marks` says about a pixel."""
RADII = (3.0, 5.0, 8.0)
"""Of strokes S, M, L, in pixels at 64 pixels of a side."""
GRAY, WHITE, CSF, SKULL, AIR = 37.0, 29.0, 8.0, 900.0, -1000.0
"""Hounsfield units."""
FIT = {"mni": 1.0, "ellipses": 0.85}
"""Mean enlargement of a template, by which skull and shifts fit into the image."""
GAP_MM, VIEW_MM = 5.0, 230.0
"""Largest distance of slices, and the side of the field of view."""


class Design(NamedTuple):
    """How scans are drawn; a probability where nothing else is said."""

    slices: int = 7
    """T, at most 36."""
    size: int = 64
    """Pixels of a side, N; lengths in pixels grow with it."""
    present: float = 0.54
    """Of an acute stroke."""
    numbers: tuple[float, float, float] = (0.6, 0.25, 0.15)
    """Of one, two or three lesions of a stroke."""
    both: float = 0.2
    """Of both sides, given two lesions or three."""
    sizes: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    """Of S, M, L."""
    baseline: tuple[float, float] = (3.0, 5.0)
    """How much darker a stroke is in a patient's first scan, in HU."""
    follow_up: tuple[float, float] = (6.0, 10.0)
    """In later ones."""
    scans: tuple[float, ...] = (0.2, 0.5, 0.2, 0.1)
    """Of one scan per patient, two, ...; 2.2 in the mean."""
    old: float = 0.3
    """Of one or two old strokes, as dark as CSF and with a sharp edge."""
    calcified: float = 0.25
    """Of one to four small bright spots."""
    atrophied: float = 0.5
    """Of wider CSF spaces, degrees of .2 to .7."""
    warp: tuple[float, float] = (0.2, 0.8)
    """Deviation of the smooth displacement, in pixels at 48 pixels of a side; more does not look like a head."""
    asymmetry: float = 0.25
    """Share that is kept of the displacement's part that differs between the sides."""
    tilt: float = 2.0
    """Largest turn of the head, in degrees."""
    shift: float = 1.0
    """Largest displacement of the head along each axis, in pixels at 64."""
    gain: float = 0.05
    """The scanner's gain is 1 +- this."""
    offset: float = 2.0
    """And its offset +- this, in HU."""
    noise: float = 6.0
    """Deviation, in HU."""
    source: str = "mni"
    """Name of the template."""


class CtScans(NamedTuple):
    """M scans; all but the first two fields are [M]."""

    hu: np.ndarray
    """[M, T, N, N] int16, Hounsfield units."""
    marks: np.ndarray
    """[M, T, N, N] uint8: 0 outside, 1 brain, 2 old stroke, 3 calcification, 4 acute stroke."""
    patient: np.ndarray
    """int32: scans of a patient share anatomy and strokes."""
    side: np.ndarray
    """int8, of the acute stroke: 0 none, 1 left, 2 right, 3 both."""
    extent: np.ndarray
    """int8, size of its lesions: 0 none, 1 S, 2 M, 3 L."""
    number: np.ndarray
    """int8, of its lesions."""
    timing: np.ndarray
    """int8: 0 the patient's first scan, 1 a later one."""
    contrast: np.ndarray
    """float32: by how many HU the stroke is darker."""
    old: np.ndarray
    """int8, side of old strokes, like `side`."""
    calcified: np.ndarray
    """bool."""
    atrophy: np.ndarray
    """float32: degree, 0 to 1."""
    tilt: np.ndarray
    """float32: degrees that the head is turned by, clockwise as displayed."""
    gain: np.ndarray
    """float32."""
    offset: np.ndarray
    """float32, in HU."""

    @property
    def lesion(self) -> np.ndarray:
        """[M, T, N, N] bool: the acute stroke."""
        return self.marks == ACUTE


class _Tissue(NamedTuple):
    """Shares of tissue at T heights of a padded template of P pixels, [P * P, T] float32."""

    gray: np.ndarray
    white: np.ndarray
    csf: np.ndarray
    lost_gray: np.ndarray
    """What atrophy of degree 1 takes away."""
    lost_white: np.ndarray
    skull: np.ndarray
    air: np.ndarray
    places: tuple[np.ndarray, np.ndarray]
    """Where lesions may be centred, left and right: (slice, row, column), rows and columns from the centre in pixels
    at 64 pixels of a side."""


@lru_cache(16)
def _tissue(source: str, size: int, slices: int, start: int) -> _Tissue:
    healthy = template(source, size)
    gap = gap_mm(slices)
    margin = size // 8
    at = lambda x: np.pad(x[start :: max(gap, 1)][:slices], ((0, 0), (margin, margin), (margin, margin)))
    gray, white, inside = (at(x).astype(np.float32) for x in healthy)
    csf = np.clip(inside - gray - white, 0.0, 1.0)
    grown = 2 * max(round(size / 64), 1) + 1
    wide = np.minimum(np.asarray(ndimage.grey_dilation(csf, size=(1, grown, grown))), inside)
    left = np.clip((inside - wide) / np.maximum(inside - csf, 1e-3), 0.0, 1.0)
    away = np.stack([np.asarray(ndimage.distance_transform_edt(s <= 0.5)) for s in inside])
    bone = np.clip(3.0 * size / 64 + 1.0 - away, 0.0, 1.0) * (away > 0) * (1.0 - inside)
    depth = max(2 * size // 64, 1)
    room = np.stack([np.asarray(ndimage.binary_erosion(s > 0.5, iterations=depth), bool) for s in inside])
    places = np.argwhere(room & (gray + white > 0.6)).astype(np.float32)
    places[:, 1:] = (places[:, 1:] - (gray.shape[1] - 1) / 2) * 64 / size
    sides = places[places[:, 2] < -2.0], places[places[:, 2] > 2.0]
    flat = lambda x: np.ascontiguousarray(x.reshape(slices, -1).T, np.float32)
    lost_gray, lost_white, air = gray * (1.0 - left), white * (1.0 - left), 1.0 - inside - bone
    return _Tissue(flat(gray), flat(white), flat(csf), flat(lost_gray), flat(lost_white), flat(bone), flat(air), sides)


def gap_mm(slices: int) -> int:
    """Millimetres, levels of the template, between slices: 5 where they fit."""
    return min(int(GAP_MM), (len(LEVELS) - 1) // (slices - 1)) if slices > 1 else 0


@lru_cache(8)
def _basis(size: int, knots: int) -> np.ndarray:
    """Smooth bumps along an axis, [N, K] float32: products with white noise make smooth fields."""
    x, centres = np.arange(size)[:, None], np.linspace(0, size - 1, knots)[None]
    return np.exp(-0.5 * ((x - centres) / (size / knots)) ** 2).astype(np.float32)


def _smooth(rng: np.random.Generator, count: int, size: int, knots: int) -> np.ndarray:
    """Random fields [count, N * N] float32 of deviation 1."""
    basis = _basis(size, knots)
    field = basis @ rng.standard_normal((count, knots, knots), np.float32) @ basis.T
    return (field / field.std((1, 2), keepdims=True)).reshape(count, -1)


class _Lesion(NamedTuple):
    at: np.ndarray
    """(slice, row, column) of the centre, as `_Tissue.places`."""
    radii: np.ndarray
    """Along, across, in pixels at 64, and in slices."""
    turn: float
    side: int


class _Patient(NamedTuple):
    start: int
    zoom: np.ndarray
    field: np.ndarray
    rough: np.ndarray
    gains: np.ndarray
    atrophy: float
    extent: int
    acute: list[_Lesion]
    old: list[_Lesion]
    spots: list[_Lesion]


def _patient(rng: np.random.Generator, design: Design) -> _Patient:
    room = len(LEVELS) - gap_mm(design.slices) * (design.slices - 1)
    start = int(rng.integers(room))
    tissue = _tissue(design.source, design.size, design.slices, start)

    def lesion(side: int, low: float, high: float) -> _Lesion:
        places = tissue.places[side]
        if not len(places):
            raise UserError(f"size={design.size}: too few pixels to place lesions, expected more")
        radii = rng.uniform(low, high, 2)
        tall = radii.mean() * rng.uniform(0.8, 1.2) * VIEW_MM / 64 / GAP_MM
        at = places[rng.integers(len(places))]
        return _Lesion(at, np.array([*radii, tall]), rng.uniform(0.0, np.pi), side)

    extent, acute = 0, []
    if rng.uniform() < design.present:
        extent = 1 + int(rng.choice(3, p=design.sizes))
        number = 1 + int(rng.choice(3, p=design.numbers))
        first = int(rng.integers(2))
        sides = [first] * number
        if number > 1 and rng.uniform() < design.both:
            sides[1] = 1 - first
        radius = RADII[extent - 1]
        acute = [lesion(side, 0.85 * radius, 1.15 * radius) for side in sides]
    old = []
    if rng.uniform() < design.old:
        old = [lesion(int(rng.integers(2)), 2.5, 5.0) for _ in range(int(rng.integers(1, 3)))]
    spots = []
    if rng.uniform() < design.calcified:
        spots = [lesion(int(rng.integers(2)), 0.8, 1.5) for _ in range(int(rng.integers(1, 5)))]
    atrophy = rng.uniform(0.2, 0.7) if rng.uniform() < design.atrophied else 0.0
    field = _smooth(rng, 2, design.size, 6).reshape(2, design.size, -1)
    mirrored = field[..., ::-1] * np.array([[[1.0]], [[-1.0]]], np.float32)
    keep = np.float32(design.asymmetry)
    field = ((1.0 + keep) * field + (1.0 - keep) * mirrored).reshape(2, -1)
    field *= np.float32(rng.uniform(*design.warp) * design.size / 48) / field.std(1, keepdims=True)
    rough = _smooth(rng, 1, design.size, 16)[0]
    return _Patient(
        start,
        FIT[design.source] * rng.uniform(0.96, 1.08, 2),
        field,
        rough,
        rng.uniform(0.9, 1.1, 2),
        atrophy,
        extent,
        acute,
        old,
        spots,
    )


def _blob(lesion: _Lesion, y: np.ndarray, x: np.ndarray, rough: np.ndarray, slices: int) -> tuple[np.ndarray, float]:
    """Distance from the centre over the radius, [N * N, T], infinite on the other side; and the mean radius."""
    (z, row, column), (a, b, c) = lesion.at, lesion.radii
    along = (y - row) * np.sin(lesion.turn) + (x - column) * np.cos(lesion.turn)
    across = (y - row) * np.cos(lesion.turn) - (x - column) * np.sin(lesion.turn)
    flat = ((along / a) ** 2 + (across / b) ** 2).astype(np.float32)
    flat[(x > 0) != bool(lesion.side)] = np.inf
    tall = ((np.arange(slices) - z) / c).astype(np.float32) ** 2
    return np.sqrt(flat[:, None] + tall[None]) + np.float32(0.15) * rough[:, None], (a + b) / 2


def _draw(rng: np.random.Generator, patient: _Patient, first: bool, design: Design) -> dict[str, Any]:
    size, px = design.size, design.size / 64
    tissue = _tissue(design.source, size, design.slices, patient.start)
    side = round(len(tissue.gray) ** 0.5)
    tilt, shift = rng.uniform(-design.tilt, design.tilt), rng.uniform(-design.shift, design.shift, 2) * px
    angle = np.deg2rad(tilt)
    v = np.arange(size, dtype=np.float32) - (size - 1) / 2
    down, right = v[:, None] - shift[0], v[None] - shift[1]
    y = (down * np.cos(angle) - right * np.sin(angle)).ravel() / patient.zoom[0] + patient.field[0]
    x = (down * np.sin(angle) + right * np.cos(angle)).ravel() / patient.zoom[1] + patient.field[1]
    gray = patient.gains[0] * (tissue.gray - patient.atrophy * tissue.lost_gray)
    white = patient.gains[1] * (tissue.white - patient.atrophy * tissue.lost_white)
    lost = patient.atrophy * (tissue.lost_gray + tissue.lost_white)
    hu = GRAY * gray + WHITE * white + CSF * (tissue.csf + lost) + SKULL * tissue.skull + AIR * tissue.air
    solid = tissue.gray + tissue.white - lost
    inside = solid + tissue.csf + lost
    read = bilinear(np.stack([y, x]) + (side - 1) / 2, (side, side))
    hu, solid, inside = np.split(read @ np.concatenate([hu, solid, inside], 1).astype(np.float32), 3, 1)
    within = inside > 0.5
    marks = within.astype(np.uint8)
    y, x = y / px, x / px
    contrast = rng.uniform(*(design.baseline if first else design.follow_up))
    soft = np.zeros_like(hu)
    for lesion in patient.acute:
        distance, radius = _blob(lesion, y, x, patient.rough, design.slices)
        # an edge of 1.2 px
        np.maximum(soft, np.clip((1.0 - distance) * (radius / 1.2) + 0.5, 0.0, 1.0), out=soft)
        marks[within & (distance < 1.0)] = ACUTE
    if patient.acute:
        hu -= contrast * soft * np.clip(solid, 0.0, 1.0)
    for lesion in patient.old:
        there = within & (_blob(lesion, y, x, patient.rough, design.slices)[0] < 1.0)
        hu[there], marks[there] = CSF, OLD
    for lesion in patient.spots:
        distance = _blob(lesion, y, x, patient.rough, design.slices)[0]
        there = within & (distance < 1.0)
        hu[there], marks[there] = hu[there] + rng.uniform(40.0, 120.0), CALCIFIED
    gain, offset = 1.0 + rng.uniform(-design.gain, design.gain), rng.uniform(-design.offset, design.offset)
    hu = (
        hu * np.float32(gain)
        + np.float32(offset)
        + np.float32(design.noise) * rng.standard_normal(hu.shape, np.float32)
    )
    cube = lambda values: values.T.reshape(design.slices, size, size)
    sides = lambda lesions: sum({1 << lesion.side for lesion in lesions})
    return {
        "hu": cube(np.rint(hu)),
        "marks": cube(marks),
        "side": sides(patient.acute),
        "extent": patient.extent,
        "number": len(patient.acute),
        "timing": int(not first),
        "contrast": contrast if patient.acute else 0.0,
        "old": sides(patient.old),
        "calcified": bool(patient.spots),
        "atrophy": patient.atrophy,
        "tilt": tilt,
        "gain": gain,
        "offset": offset,
    }


def ct_set(seed: int, count: int, design: Design = Design()) -> CtScans:
    """Scans of a seed, those of a patient one after the other; the first of them do not depend on how many there are.

    Tissue is that of `jaxstack.medical.brain`: 37 HU gray, 29 white, 8 CSF, a skull of 900; air is -1000. A stroke is
    one to three ellipsoids with rough outlines on its side of the mid-line, darker than tissue by the contrast.

    Args:
        seed: another one gives other patients.
        count: scans, M.
        design: how they are drawn.

    Raises:
        UserError: for a size or number of slices that cannot be drawn, or a missing template.
    """
    if not 1 <= design.slices <= len(LEVELS):
        raise UserError(f"slices={design.slices}: expected 1 to {len(LEVELS)}")
    if design.size < 32:
        raise UserError(f"size={design.size}: expected at least 32 pixels")
    if count < 1:
        raise UserError(f"count={count}: expected at least 1")
    shape = (count, design.slices, design.size, design.size)
    types: dict[str, Any] = dict.fromkeys(("side", "extent", "number", "timing", "old"), np.int8)
    types |= dict.fromkeys(("contrast", "atrophy", "tilt", "gain", "offset"), np.float32)
    types |= {"calcified": bool, "patient": np.int32}
    found = {name: np.empty(count, kind) for name, kind in types.items()}
    found |= {"hu": np.empty(shape, np.int16), "marks": np.empty(shape, np.uint8)}
    made = number = 0
    while made < count:
        rng = np.random.default_rng((seed, number))
        patient = _patient(rng, design)
        scans = 1 + int(rng.choice(len(design.scans), p=design.scans))
        for scan in range(min(scans, count - made)):
            for name, value in (_draw(rng, patient, not scan, design) | {"patient": number}).items():
                found[name][made] = value
            made += 1
        number += 1
    return CtScans(**found)


TABLE = ("file", "patient", "side", "size", "number", "timing", "old", "calcified", "atrophy", "tilt", "contrast")
"""Columns of `rows`."""


def rows(scans: CtScans, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The truth of scans as rows of text with the columns of `TABLE`.

    Args:
        scans: M of them.
        names: of their files, M.
    """
    found = []
    for i, name in enumerate(names):
        yes = ("no", "yes")[int(scans.calcified[i])]
        words = SIDES[scans.side[i]], SIZES[scans.extent[i]], str(scans.number[i]), TIMINGS[scans.timing[i]]
        numbers = (f"{x[i]:.4f}" for x in (scans.atrophy, scans.tilt, scans.contrast))
        found.append((name, f"p{scans.patient[i]:05d}", *words, SIDES[scans.old[i]], yes, *numbers))
    return found
