"""Pictures of what was found in B-scans, to check before a number is trusted."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

VESSEL, REGION, WINDOW, FOVEA = (230, 60, 60), (60, 220, 90), (250, 220, 60), (80, 200, 255)
"""Colours of vessels, boundaries, places of measurement and fovea."""
WIDTH = 576
"""Narrower scans are drawn larger."""


def overlay(
    image: np.ndarray,
    region: np.ndarray,
    vessel: np.ndarray,
    fovea: tuple[float, float] | None = None,
    upper: np.ndarray | None = None,
    lower: np.ndarray | None = None,
) -> Image.Image:
    """A scan with vessels tinted, the region's boundaries, where thickness was measured, and a cross at the fovea.

    Args:
        image: [H, W] in 0..1.
        region: [H, W] bool.
        vessel: [H, W] bool, shown inside the region.
        fovea: (x, y) in pixels, or None.
        upper: [N, 2], (x, y) of the places of measurement on the upper boundary.
        lower: [N, 2], on the lower boundary; not drawn where NaN.

    Returns:
        RGB, of the scan's size or a whole multiple of it.
    """
    height, width = image.shape
    larger = max(1, -(-WIDTH // width))
    grown = lambda x: np.repeat(np.repeat(x, larger, 0), larger, 1)
    grey = np.repeat(grown(np.clip(image, 0.0, 1.0))[..., None] * 255.0, 3, -1)
    grey = np.where(grown(region & vessel)[..., None], 0.6 * grey + 0.4 * np.array(VESSEL), grey)
    picture = Image.fromarray(np.round(grey).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    place = lambda x, y: ((x + 0.5) * larger, (y + 0.5) * larger)
    columns = np.flatnonzero(region.any(0))
    for part in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
        if not len(part):
            continue
        top, bottom = region[:, part].argmax(0), height - 1 - region[::-1, part].argmax(0)
        for rows, edge in ((top, -0.5), (bottom, 0.5)):
            points = [place(x, y + edge) for x, y in zip(part, rows)]
            draw.line([*points, points[-1]], fill=REGION, width=max(1, larger // 2))
    if upper is not None and lower is not None:
        for a, b in zip(np.asarray(upper), np.asarray(lower)):
            if np.isfinite([*a, *b]).all():
                draw.line([place(*a), place(*b)], fill=WINDOW, width=max(1, larger // 2))
    if fovea is not None:
        x, y = place(*fovea)
        for dx, dy in ((6, 0), (0, 6)):
            draw.line([(x - dx, y - dy), (x + dx, y + dy)], fill=FOVEA, width=max(2, larger // 2))
    return picture


def points(found: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`upper` and `lower` of `choroidalyzer.Measures`, or nothing where nothing was measured."""
    return (np.asarray(found.upper), np.asarray(found.lower)) if found is not None and found.ok else (None, None)
