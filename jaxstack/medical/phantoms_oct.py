"""Phantoms of OCT: cross-sections (B-scans) of the retina and the choroid with the exact truth. Ours, not patients'."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from jaxstack.core.errors import UserError

FIELD_UM = (11.49 * 768, 3.87 * 496)
"""Width and height of device A's field in micrometres, that of a common scanner at 768 x 496 pixels."""
BASE = (192, 128)
"""Columns and rows in which the anatomy is stated; other sizes and fields scale it."""


class Device(NamedTuple):
    """What differs between scanners. Ranges are drawn from uniformly, for each scan anew."""

    size: tuple[int, int] = (128, 192)
    """Rows and columns, H and W."""
    field: tuple[float, float] = (1.0, 1.0)
    """Width and height of what is seen, over device A's: a larger field shows the same eye in fewer pixels."""
    looks: tuple[float, float] = (4.0, 12.0)
    """Of the speckle, which is Gamma(L, 1/L): fewer looks are noisier."""
    gain: tuple[float, float] = (0.8, 1.2)
    blur: float = 0.7
    """Deviation of the optics' Gaussian, in pixels."""
    shadows: tuple[int, int] = (0, 4)
    """How many retinal vessels cast one, fewest and most."""

    def scale(self) -> np.ndarray:
        """Micrometres per pixel, (x, y)."""
        return np.array(FIELD_UM) * self.field / self.size[::-1]


DEVICES = {
    "A": Device(),
    "B": Device(field=(1.1, 1.2), looks=(3.0, 6.0), gain=(0.6, 0.9), blur=1.0),
    "C": Device(field=(1.25, 0.9), looks=(10.0, 20.0), gain=(1.0, 1.4), blur=0.5),
}


class OCT(NamedTuple):
    """One B-scan, or M of them with a first axis M."""

    image: np.ndarray
    """[H, W] float32 in 0..1."""
    region: np.ndarray
    """[H, W] bool: the choroid, one run of rows in each column."""
    vessels: np.ndarray
    """[H, W] bool, inside the region."""
    fovea: np.ndarray
    """(x, y): column and row of the pit of the inner limiting membrane, in pixels."""
    scale: np.ndarray
    """(x, y) micrometres per pixel."""
    target: np.ndarray
    """The share of vessels that was asked for."""
    shadow: np.ndarray
    """[W] bool: columns in the shadow of a retinal vessel."""

    def thickness_um(self) -> np.ndarray:
        """Vertical thickness of each column, [W]."""
        return self.region.sum(-2) * self.scale[..., 1:]

    def area_mm2(self) -> np.ndarray:
        """Area of the whole region."""
        return self.region.sum((-2, -1)) * self.scale[..., 0] * self.scale[..., 1] * 1e-6

    def cvi(self) -> np.ndarray:
        """Choroid vascularity index of the whole region: pixels of vessels over pixels of the choroid."""
        return self.vessels.sum((-2, -1)) / self.region.sum((-2, -1))


def oct_scan(rng: np.random.Generator, device: Device = DEVICES["A"]) -> OCT:
    """Draw a B-scan: vitreous, three layers of the retina with the foveal pit, RPE, choroid with vessels, sclera.

    The RPE is a tilted parabola with smooth noise, the choroid's thickness T0 (1 + a sin(2 pi x / W + phi)) with T0 of
    14 to 34 rows (of 128). Vessels are ellipses that grow with depth, added until the drawn share of the choroid, 0.3
    to 0.6, is covered. Below the RPE light fades; shadows, blur, multiplicative speckle and a square root follow.

    Args:
        rng: the only source of chance.
        device: the scanner.

    Raises:
        UserError: for less than 32 rows or columns, or a field, look, gain or blur that is not positive.
    """
    height, width = device.size
    if min(device.size) < 32:
        raise UserError(f"size={device.size}: expected at least 32 rows and 32 columns")
    if min(*device.field, *device.looks, *device.gain) <= 0 or device.blur < 0 or device.shadows[0] < 0:
        raise UserError(f"device={device}: expected positive fields, looks and gains, no negative blur or shadows")
    scale = device.scale()
    # pixels per pixel of the stated anatomy
    across, down = np.array(FIELD_UM) / BASE / scale
    x = np.arange(width)
    t = (x - width / 2) / across
    fovea_x = rng.uniform(0.35, 0.65) * width
    rpe = rng.uniform(-0.06, 0.06) * t + rng.uniform(-6e-4, 6e-4) * t**2 + _smooth(rng, width, BASE[0] / 8, 1.5, across)
    wave = 1.0 + rng.uniform(0.0, 0.25) * np.sin(2 * np.pi * x / width + rng.uniform(0.0, 2 * np.pi))
    thickness = rng.uniform(14.0, 34.0) * wave + _smooth(rng, width, BASE[0] / 24, 1.0, across)
    thickness = np.maximum(thickness, 4.0) * down
    rpe = 0.52 * height + rpe * down
    top = rpe + 2.0 * down
    bottom = top + thickness
    up = max(bottom.max() - (height - 3), 0.0)  # all surfaces, so that the choroid ends inside
    rpe, top, bottom = rpe - up, top - up, bottom - up
    pit = lambda at: (0.17 - 0.09 * np.exp(-(((at - fovea_x) / (0.09 * BASE[0] * across)) ** 2))) * BASE[1] * down
    ilm = rpe - pit(x)
    y = np.arange(height)[:, None]
    region = (y >= top) & (y < bottom)
    target = rng.uniform(0.3, 0.6)
    vessels = _vessels(rng, region, target, across, down)
    layer = np.clip((y - ilm) / np.maximum((rpe - down) - ilm, 1.0), 0.0, 1.0)
    image = np.select(
        [y < ilm, y < rpe - down, y < top, vessels, region],
        [0.06, np.array([0.35, 0.5, 0.3])[np.minimum((3 * layer).astype(int), 2)], 0.9, 0.25, 0.55],
        0.45 * np.exp(-(y - bottom) / (20.0 * down)),
    )
    image *= np.exp(-0.012 * np.maximum(y - top, 0.0) / down)
    shadow = np.zeros(width, bool)
    for _ in range(int(rng.integers(device.shadows[0], device.shadows[1] + 1))):
        wide = rng.uniform(3.0, 8.0) * across
        left = rng.uniform(0.0, width - wide)
        shadow |= (x >= left) & (x < left + wide)
    image = np.where(shadow & (y >= ilm), 0.55 * image, image)
    image = ndimage.gaussian_filter(image, device.blur) if device.blur else image
    looks = rng.uniform(*device.looks)
    image = np.sqrt(image * rng.gamma(looks, 1.0 / looks, image.shape)) * rng.uniform(*device.gain)
    fovea = np.array([fovea_x, np.interp(fovea_x, x, rpe) - pit(fovea_x)], np.float32)
    clipped = np.clip(image, 0.0, 1.0).astype(np.float32)
    return OCT(clipped, region, vessels, fovea, scale.astype(np.float32), np.array(target, np.float32), shadow)


def _smooth(rng: np.random.Generator, width: int, sigma: float, deviation: float, across: float) -> np.ndarray:
    """Gaussian noise [W] of a given deviation, low-passed by a Gaussian of `sigma` columns of the stated anatomy."""
    sigma = sigma * across
    reach = int(4 * sigma) + 1
    white = rng.normal(size=width + 2 * reach)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return deviation * np.convolve(white, kernel / np.sqrt((kernel**2).sum()), "valid")


def _vessels(rng: np.random.Generator, region: np.ndarray, target: float, across: float, down: float) -> np.ndarray:
    """Ellipses in the region that cover the share `target` of it to a pixel: the last one is shrunk."""
    rows, columns = np.nonzero(region)
    count = int(2.0 * len(rows) / (40.0 * across * down)) + 8
    chosen = rng.integers(len(rows), size=count)
    row, column = rows[chosen], columns[chosen]
    first = region.argmax(0)[column]
    depth = (row - first) / region.sum(0)[column]
    radius = lambda low, more, high: np.clip(
        (low + more * depth) * np.exp(rng.normal(0.0, 0.25, count)), low * 0.75, high
    )
    rx, ry = radius(4.0, 4.0, 9.0) * across, radius(2.6, 1.8, 5.0) * down
    dy, dx = (np.arange(-int(r.max()) - 1, int(r.max()) + 2) for r in (ry, rx))
    far = ((dy / ry[:, None]) ** 2)[:, :, None] + ((dx / rx[:, None]) ** 2)[:, None, :]
    at, to = row[:, None, None] + dy[:, None], column[:, None, None] + dx
    inside = (far < 1.0) & (at >= 0) & (at < region.shape[0]) & (to >= 0) & (to < region.shape[1])
    # the order in which pixels are covered: by ellipse, within one from its centre
    order = np.full(region.shape, np.inf)
    flat = (at * region.shape[1] + to)[inside]
    np.minimum.at(order.reshape(-1), flat, (np.arange(count)[:, None, None] + far)[inside])
    order[~region] = np.inf
    wanted = min(round(target * len(rows)), int(np.isfinite(order).sum()))
    last = np.partition(order.reshape(-1), wanted - 1)[wanted - 1]
    return order <= last


def oct_set(seed: int, count: int, device: Device = DEVICES["A"]) -> OCT:
    """B-scans of a seed, stacked: M = `count`; another seed gives other eyes."""
    scans = [oct_scan(np.random.default_rng((seed, i)), device) for i in range(count)]
    return OCT(*(np.stack(parts) for parts in zip(*scans)))
