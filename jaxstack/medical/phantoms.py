"""Phantoms: images drawn by a seeded generator, with the truth of what was drawn. They are ours, not patients'."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from jaxstack.core.errors import UserError

BACKGROUND = (0.80, 0.40, 0.20)
"""Colour of the retina, before nuisances."""
ABSORPTION = (0.30, 0.62, 0.55)
"""Share of each colour that a vessel takes away."""
DISC = (1.0, 0.85, 0.55)


class Fundus(NamedTuple):
    """A colour photograph of the back of the eye."""

    image: np.ndarray
    """[N, N, 3] float32 in 0..1; black outside the field of view."""
    vessels: np.ndarray
    """[2N, 2N] bool: what was drawn, at twice the resolution."""
    levels: int
    """Generations of branches, 3 to 8."""
    twigs: float
    """Density of side twigs, 0 to 1."""


def field_of_view(size: int) -> np.ndarray:
    """The disc that a fundus camera sees, [size, size] bool; its radius is 0.485 of the side."""
    y, x = np.mgrid[:size, :size] + 0.5
    return np.hypot(y - size / 2, x - size / 2) < 0.485 * size


def fundus(rng: np.random.Generator, size: int = 128) -> Fundus:
    """Draw a fundus: background with falloff, macula, optic disc and a branching tree of vessels.

    Four arcades leave the disc. A branch is 5 to 8 segments whose heading wanders; it splits by Murray's law,
    r^3 = r1^3 + r2^3, until its radius or its generation ends it, and keeps away from the macula.

    Args:
        rng: the only source of chance.
        size: pixels of a side, N.

    Raises:
        UserError: for less than 32 pixels.
    """
    if size < 32:
        raise UserError(f"size={size}: expected at least 32 pixels")
    n = float(size)
    levels, twigs = int(rng.integers(3, 9)), float(rng.uniform())
    side = rng.choice((-1.0, 1.0))
    disc = np.array([0.5 + rng.uniform(-0.02, 0.02), 0.5 + side * 0.17]) * n
    macula = np.array([0.5 + rng.uniform(-0.02, 0.02), 0.5 - side * 0.08]) * n
    vessels = _tree(rng, n, disc, macula, side, levels, twigs)
    y, x = np.mgrid[:size, :size] + 0.5
    far = lambda at: np.hypot(y - at[0], x - at[1])
    radius = far((n / 2, n / 2)) / (0.485 * n)
    base = np.array(BACKGROUND) * rng.uniform(0.85, 1.1) * rng.uniform(0.95, 1.05, 3)
    image = base * (1.0 - 0.25 * radius**2)[..., None]
    image *= 1.0 - 0.3 * np.exp(-0.5 * (far(macula) / (0.09 * n)) ** 2)[..., None]
    cup = np.exp(-((far(disc) / (0.055 * n)) ** 4))[..., None]
    image = image * (1.0 - cup) + cup * np.array(DISC) * rng.uniform(0.9, 1.0)
    share = vessels.reshape(size, 2, size, 2).mean((1, 3))[..., None]
    image = image * (1.0 - share * np.array(ABSORPTION)) * field_of_view(size)[..., None]
    return Fundus(np.clip(image, 0.0, 1.0).astype(np.float32), vessels, levels, twigs)


def _tree(
    rng: np.random.Generator, n: float, disc: np.ndarray, macula: np.ndarray, side: float, levels: int, twigs: float
) -> np.ndarray:
    """Vessels [2N, 2N] bool, drawn as lines at twice the resolution."""
    canvas = Image.new("L", (int(2 * n), int(2 * n)))
    draw = ImageDraw.Draw(canvas)
    away = np.pi if side > 0 else 0.0  # heading from the disc to the macula; 0 is along +x
    waiting = []
    for up in (-1.0, 1.0):
        for lateral, thick in ((1.0, 1.0), (-1.0, 0.8)):
            spread = rng.uniform(1.0, 1.3) if lateral > 0 else rng.uniform(0.6, 1.1)
            course = away if lateral > 0 else away + np.pi
            heading = course + up * spread * (1.0 if np.cos(course) > 0 else -1.0)
            waiting.append((disc.copy(), heading, thick * 0.0105 * n, 0.016 * n, 0))
    while waiting:
        at, heading, radius, step, level = waiting.pop()
        for _ in range(int(rng.integers(5, 9))):
            heading += rng.normal(0.0, 0.16)
            to = macula - at
            distance = float(np.hypot(*to))
            if distance < 0.16 * n:
                # turn away from the macula's side
                cross = np.cos(heading) * to[0] - np.sin(heading) * to[1]
                heading -= np.sign(cross) * 0.35 * (1.0 - distance / (0.16 * n))
            end = at + step * np.array([np.sin(heading), np.cos(heading)])
            line = [(2 * at[1], 2 * at[0]), (2 * end[1], 2 * end[0])]
            draw.line(line, fill=1, width=max(1, round(4 * radius)))
            at, radius = end, radius * 0.985
            if np.hypot(*(at - n / 2)) > 0.485 * n or radius < 0.15:
                break
            if rng.uniform() < 0.16 * twigs:
                turn = rng.choice((-1.0, 1.0)) * rng.uniform(0.6, 1.2)
                waiting.append((at.copy(), heading + turn, 0.5 * radius, 0.6 * step, levels - 1))
        else:
            share = rng.uniform(0.35, 0.65)
            for part, turn in ((share, 1.0), (1.0 - share, -1.0)):
                smaller = radius * part ** (1.0 / 3.0)
                if level + 1 < levels and smaller >= 0.15:
                    angle = turn * rng.uniform(0.25, 0.6)
                    waiting.append((at.copy(), heading + angle, smaller, step * rng.uniform(0.75, 0.95), level + 1))
    inside = np.repeat(np.repeat(field_of_view(int(n)), 2, 0), 2, 1)
    return (np.asarray(canvas) > 0) & inside


def fundus_set(seed: int, count: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Fundus phantoms of a seed.

    Args:
        seed: another one gives other eyes.
        count: how many, M.
        size: pixels of a side, N.

    Returns:
        Images [M, N, N, 3] uint8 and masks of the vessels [M, 2N, 2N] bool.
    """
    images = np.empty((count, size, size, 3), np.uint8)
    vessels = np.empty((count, 2 * size, 2 * size), bool)
    for i in range(count):
        one = fundus(np.random.default_rng((seed, i)), size)
        images[i], vessels[i] = np.round(one.image * 255.0), one.vessels
    return images, vessels
