"""Phantoms of ultra-widefield images: red and green of a whole retina, seven diseases at fixed places, artefacts.

They are drawn as left eyes: the optic disc left of the macula. A camera shows right eyes as the mirror image, and so
does a set here. Five of the seven diseases lie near the posterior pole by construction.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from jaxstack.core.errors import UserError

DISEASES = ("MH", "RP", "AMD", "RVO", "RD", "Gla", "DR")
"""Macular hole, retinitis pigmentosa, macular degeneration, vein occlusion, detachment, glaucoma, diabetic."""
LABELS = (*DISEASES, "any_retina_disease")
HEALTHY = 0.35
"""Share of healthy patients."""
SHARES = (0.04, 0.03, 0.055, 0.08, 0.08, 0.175, 0.13)
"""How often each disease is a patient's first, in relation: those of the Tsukazaki images, the rarest more often."""
SECOND = 0.2
"""Share of the ill who have a second disease."""
AFFECTED = 0.85
"""Chance that an eye of an ill patient has the disease; the first eye has the first disease."""


class Uwf(NamedTuple):
    """One left eye."""

    image: np.ndarray
    """[H, W, 2] float32 in 0..1: red and green."""
    labels: np.ndarray
    """[8] bool, as `LABELS`."""
    lesions: np.ndarray
    """[7, H, W] bool: where each disease was drawn."""
    macula: np.ndarray
    """(y, x) in pixels."""
    disc: np.ndarray


class UwfSet(NamedTuple):
    """Eyes of patients as a camera stores them: right ones mirrored."""

    images: np.ndarray
    """[M, H, W, 2] uint8."""
    labels: np.ndarray
    """[M, 8] bool."""
    patients: np.ndarray
    """[M] int: number of the patient; two eyes each."""
    right: np.ndarray
    """[M] bool."""
    lesions: np.ndarray
    """[M, 7, H, W] bool, of the eye aligned as a left one."""


def aligned(images: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Right eyes [M, H, W, ...] mirrored left to right, so that a pixel is the same place in all; an involution."""
    return np.where(right.reshape(-1, *(1,) * (images.ndim - 1)), images[:, :, ::-1], images)


def uwf(
    rng: np.random.Generator,
    size: tuple[int, int] = (64, 80),
    diseases: Sequence[str] = (),
    artefacts: bool = True,
) -> Uwf:
    """Draw a left eye.

    Args:
        rng: the only source of chance.
        size: rows and columns; lengths grow with the columns.
        diseases: of `DISEASES`, drawn with a contrast of .15 to .5 each.
        artefacts: eyelids, lashes, hue, blur.

    Raises:
        UserError: for less than 32 rows or columns, or an unknown disease.
    """
    if min(size) < 32:
        raise UserError(f"size={size[0]} {size[1]}: expected at least 32 rows and columns")
    if unknown := [d for d in diseases if d not in DISEASES]:
        raise UserError(f"diseases: found {unknown[0]!r}, expected some of {', '.join(DISEASES)}")
    height, width = size
    px = width / 80.0
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    macula = np.array([0.5 * height, 0.57 * width]) + rng.normal(0.0, 0.5 * px, 2)
    disc = macula - np.array([0.02 * height, 0.19 * width]) + rng.normal(0.0, 0.4 * px, 2)
    reach = (np.abs((y - height / 2) / (0.49 * height)) ** 2.5 + np.abs((x - width / 2) / (0.49 * width)) ** 2.5) ** 0.4
    far = lambda at: np.hypot(y - at[0], x - at[1])
    image = np.array([0.36, 0.31], np.float32) * (1.0 - 0.3 * reach**2)[..., None]
    texture = ndimage.gaussian_filter(rng.normal(size=size), 4 * px)
    image *= (1.0 + 0.06 * texture / texture.std())[..., None]
    image *= 1.0 - np.array([0.2, 0.35]) * np.exp(-0.5 * (far(macula) / (4.5 * px)) ** 2)[..., None]
    radius = 3.5 * px * rng.uniform(0.95, 1.05)
    bright = np.exp(-((far(disc) / radius) ** 4))[..., None]
    image += bright * np.array([0.22, 0.26])
    cup = np.exp(-((far(disc) / (rng.uniform(0.3, 0.45) * radius)) ** 4))[..., None]
    image += 0.08 * cup
    image *= 1.0 - _vessels(rng, size, disc, px)[..., None] * np.array([0.25, 0.55])
    lesions = np.zeros((len(DISEASES), *size), bool)
    place = _Place(y, x, macula, disc, reach, radius, px)
    for i, name in enumerate(DISEASES):
        if name in diseases:
            share, change = _DRAW[name](rng, place)
            lesions[i] = (share > 0.3) & (reach < 1.0)
            image *= np.maximum(1.0 + rng.uniform(0.15, 0.5) * change, 0.0)
    if artefacts:
        image = _artefacts(rng, image, px)
    image = np.where((reach < 1.0)[..., None], image, 0.03) + rng.normal(0.0, 0.012, image.shape)
    labels = np.array([*(d in diseases for d in DISEASES), bool(diseases)])
    return Uwf(np.clip(image, 0.0, 1.0).astype(np.float32), labels, lesions, macula, disc)


class _Place(NamedTuple):
    """What lesions are drawn by."""

    y: np.ndarray
    x: np.ndarray
    macula: np.ndarray
    disc: np.ndarray
    reach: np.ndarray
    """[H, W]: 0 in the middle, 1 at the edge of what the camera sees."""
    radius: float
    """Of the disc, pixels."""
    px: float

    def spots(
        self, at: np.ndarray, radii: np.ndarray, along: np.ndarray | None = None, long: float = 1.0
    ) -> np.ndarray:
        """[K, H, W]: soft spots at `at` [K, 2], `long` times as long in the directions `along` [K] (radians)."""
        dy, dx = self.y - at[:, 0, None, None], self.x - at[:, 1, None, None]
        if along is not None:
            c, s = np.cos(along)[:, None, None], np.sin(along)[:, None, None]
            dy, dx = dy * c - dx * s, (dx * c + dy * s) / long
        return np.exp(-(((dy**2 + dx**2) / radii[:, None, None] ** 2) ** 2))

    def around(self, center: np.ndarray, distance: np.ndarray, angle: np.ndarray) -> np.ndarray:
        """[K, 2] points in polar coordinates; angle 0 is temporal (+x), pi/2 is up."""
        return center + np.stack([-distance * np.sin(angle), distance * np.cos(angle)], -1)


Drawn = tuple[np.ndarray, np.ndarray]
"""How much of a lesion each pixel holds [H, W], and the relative change of red and green [H, W, 2] at a contrast
of 1."""
DARK, PALE = np.array([-0.9, -1.5]), np.array([1.0, 1.4])


def _macular_hole(rng: np.random.Generator, p: _Place) -> Drawn:
    far = np.hypot(p.y - p.macula[0], p.x - p.macula[1]) / p.px
    hole = np.exp(-((far / rng.uniform(2.0, 2.7)) ** 4))
    rim = np.exp(-(((far - 4.4) / 1.2) ** 2))
    return np.maximum(hole, rim), hole[..., None] * DARK + 0.8 * rim[..., None] * PALE


def _macular_degeneration(rng: np.random.Generator, p: _Place) -> Drawn:
    count = int(rng.integers(9, 17))
    at = p.around(p.macula, rng.uniform(2.0, 7.5, count) * p.px, rng.uniform(0, 2 * np.pi, count))
    share = p.spots(at, rng.uniform(1.1, 1.8, count) * p.px).max(0)
    return share, 1.2 * share[..., None] * PALE


def _glaucoma(rng: np.random.Generator, p: _Place) -> Drawn:
    far = np.hypot(p.y - p.disc[0], p.x - p.disc[1])
    share = np.exp(-((far / (rng.uniform(0.8, 1.1) * p.radius)) ** 4))
    return share, share[..., None] * PALE


def _diabetic(rng: np.random.Generator, p: _Place) -> Drawn:
    count = int(rng.integers(7, 16))
    at = p.around(p.macula, rng.uniform(9.0, 17.0, count) * p.px, rng.uniform(0, 2 * np.pi, count))
    spots = p.spots(at, rng.uniform(1.1, 2.0, count) * p.px)
    pale = rng.uniform(size=count) < 0.3
    change = np.zeros((*p.y.shape, 2))
    for kind, color in ((~pale, DARK), (pale, PALE)):
        change += spots[kind].max(0, initial=0.0)[..., None] * color
    return spots.max(0), change


def _vein_occlusion(rng: np.random.Generator, p: _Place) -> Drawn:
    count = int(rng.integers(14, 26))
    angle = np.deg2rad(rng.uniform(15.0, 75.0, count))  # superotemporal
    at = p.around(p.disc, rng.uniform(6.0, 24.0, count) * p.px, angle)
    share = p.spots(at, rng.uniform(0.9, 1.4, count) * p.px, -angle, 2.5).max(0)
    return share, share[..., None] * DARK


def _detachment(rng: np.random.Generator, p: _Place) -> Drawn:
    angle = np.arctan2(-(p.y - p.y.mean()), p.x - p.x.mean())
    middle = np.deg2rad(rng.uniform(30.0, 60.0))
    turn = np.abs(np.angle(np.exp(1j * (angle - middle))))
    edge = rng.uniform(0.6, 0.7)
    wide = np.deg2rad(rng.uniform(22.0, 38.0))
    share = 1.0 / (1.0 + np.exp((turn - wide) / 0.08)) / (1.0 + np.exp((edge - p.reach) / 0.03))
    fold = np.exp(-(((p.reach - edge) / 0.04) ** 2)) * (turn < wide)
    return np.maximum(share, fold), 0.8 * share[..., None] * PALE + fold[..., None] * DARK


def _pigmentosa(rng: np.random.Generator, p: _Place) -> Drawn:
    count = int(rng.integers(40, 70))
    angle = rng.uniform(0, 2 * np.pi, count)
    reach = rng.uniform(0.55, 0.85, count)
    height, width = p.y.shape
    at = np.stack([height * (0.5 - 0.49 * reach * np.sin(angle)), width * (0.5 + 0.49 * reach * np.cos(angle))], -1)
    share = p.spots(at, rng.uniform(1.0, 1.5, count) * p.px).max(0)
    return share, 1.2 * share[..., None] * DARK


_DRAW = {
    "MH": _macular_hole,
    "RP": _pigmentosa,
    "AMD": _macular_degeneration,
    "RVO": _vein_occlusion,
    "RD": _detachment,
    "Gla": _glaucoma,
    "DR": _diabetic,
}


def _vessels(rng: np.random.Generator, size: tuple[int, int], disc: np.ndarray, px: float) -> np.ndarray:
    """Share of each pixel that is vessel, [H, W]: four arcades with side branches, drawn at twice the resolution."""
    height, width = size
    canvas = Image.new("L", (2 * width, 2 * height))
    draw = ImageDraw.Draw(canvas)
    t = np.linspace(0.0, 1.0, 20)
    line = lambda at, wide: draw.line([(2 * q, 2 * r) for r, q in at.tolist()], fill=255, width=wide)
    for up in (-1.0, 1.0):
        for side, length in ((1.0, 0.5), (-1.0, 0.38)):
            rise = rng.uniform(0.17, 0.23) * height * (1.0 - np.exp(-5.0 * t)) + rng.uniform(0.0, 0.2) * height * t**2
            course = np.stack([up * rise, side * (length * width * t - 2.5 * px * np.sin(np.pi * t))], -1)
            wander = np.cumsum(rng.normal(0.0, 0.35 * px, course.shape), 0)
            main = disc + course + wander - wander[0]
            line(main, max(2, round(2 * px)))
            for start in rng.integers(3, 17, 4):
                heading = np.arctan2(up * rng.uniform(0.2, 1.4), side)
                steps = np.cumsum(rng.normal(0.0, 0.25, 8)) + heading
                way = np.cumsum(np.stack([np.sin(steps), np.cos(steps)], -1) * rng.uniform(1.0, 2.2) * px, 0)
                line(np.concatenate([main[start : start + 1], main[start] + way]), max(1, round(px)))
    drawn = np.asarray(canvas, np.float32) / 255.0
    return drawn.reshape(height, 2, width, 2).mean((1, 3))


def _artefacts(rng: np.random.Generator, image: np.ndarray, px: float) -> np.ndarray:
    """Blur, hue, eyelids above and below, lashes."""
    height, width = image.shape[:2]
    if rng.uniform() < 0.8:
        image = ndimage.gaussian_filter(image, (*(2 * [0.3 * rng.uniform(0.2, 1.0) * 0.022 * width]), 0))
    image = image * rng.uniform(0.85, 1.15) * rng.uniform(0.93, 1.07, 2)
    y, x = np.mgrid[:height, :width] + 0.5
    for edge in (y, height - y):
        if rng.uniform() < 0.4:
            depth, bow = rng.uniform(0.02, 0.1) * height, rng.uniform(0.1, 0.25) * height
            lid = edge < depth + bow * ((x - width * rng.uniform(0.4, 0.6)) / (0.5 * width)) ** 2
            image = np.where(lid[..., None], np.array([0.3, 0.16]) * rng.uniform(0.8, 1.2), image)
    if rng.uniform() < 0.4:
        canvas = Image.new("L", (width, height))
        draw = ImageDraw.Draw(canvas)
        for at in rng.uniform(0.1, 0.9, int(rng.integers(5, 13))) * width:
            end = (at + rng.normal(0.0, 3.0) * px, height * (1.0 - rng.uniform(0.08, 0.2)))
            draw.line([(float(at), float(height)), (float(end[0]), float(end[1]))], fill=255, width=max(1, round(px)))
        image = image * (1.0 - 0.7 * np.asarray(canvas, np.float32)[..., None] / 255.0)
    return image


def patient(rng: np.random.Generator) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Diseases of the two eyes of a random patient: none in a share of `HEALTHY`, else one or two."""
    if rng.uniform() < HEALTHY:
        return (), ()
    shares = np.array(SHARES) / sum(SHARES)
    own = list(rng.choice(len(DISEASES), 1 + int(rng.uniform() < SECOND), replace=False, p=shares))
    here = rng.uniform(size=(2, len(own))) < AFFECTED
    here[0, 0] = True
    first, second = (tuple(DISEASES[i] for i, there in zip(own, eye) if there) for eye in here)
    return (first, second) if rng.uniform() < 0.5 else (second, first)


def uwf_set(seed: int, count: int, size: tuple[int, int] = (64, 80)) -> UwfSet:
    """Eyes of a seed, left and right in turn.

    Args:
        seed: another one gives other patients.
        count: images M; patients have two, but for the last one of an odd number.
        size: rows and columns.
    """
    eyes, right = [], np.arange(count) % 2 == 1
    for i in range(count):
        own = patient(np.random.default_rng((seed, i // 2)))[i % 2]
        eyes.append(uwf(np.random.default_rng((seed, i // 2, i % 2)), size, own))
    pixels = np.stack([np.round(e.image * 255.0).astype(np.uint8) for e in eyes])
    labels, lesions = np.stack([e.labels for e in eyes]), np.stack([e.lesions for e in eyes])
    return UwfSet(aligned(pixels, right), labels, np.arange(count) // 2, right, lesions)
