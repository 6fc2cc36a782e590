"""B-scans of Heidelberg Engineering's .vol and .e2e exports, read by the package eyepy. Not a medical device."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError

ENDINGS = (".vol", ".e2e")


class Volume(NamedTuple):
    """What a file holds: its B-scans in their order, in .e2e those of all its volumes (eyepy leaves out circles and
    stars there)."""

    images: list[np.ndarray]
    """[H, W] uint8 each, with the contrast of Heidelberg's own viewer."""
    scales: list[tuple[float, float]]
    """(x, y) micrometres per pixel of each."""
    lateralities: list[str]
    """"L", "R" or empty for each."""


def is_heidelberg(path: str | Path) -> bool:
    """Whether a name ends in .vol or .e2e."""
    return Path(path).suffix.lower() in ENDINGS


def read_volume(path: str | Path) -> Volume:
    """All B-scans of a file.

    Raises:
        UserError: where eyepy is not installed, or for a file that is empty, broken or without B-scans.
    """
    path = Path(path)
    try:
        stamp = path.stat()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    if not stamp.st_size:
        raise UserError(f"{path}: empty file")
    return _read(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(2)  # its B-scans are asked for one by one
def _read(path: Path, changed: int, size: int) -> Volume:
    try:
        from eyepy.io import HeE2eReader, HeVolReader  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"{path}: Heidelberg's files need eyepy; pip install 'jaxstack[heidelberg]'") from e
    try:
        if path.suffix.lower() == ".vol":
            found = [_of_vol(HeVolReader(path))]
        else:
            with HeE2eReader(path) as file:
                found = [_of_e2e(volume) for volume in file.volumes]
    except Exception as e:  # whatever a broken file makes the parser raise is a fault of the file
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path}: cannot be read as a Heidelberg file ({reason})") from e
    images = [image for one in found for image in one[0]]
    if not images:
        raise UserError(f"{path}: found no B-scans")
    each = lambda i: [one[i] for one in found for _ in one[0]]
    return Volume(images, each(1), each(2))


def _side(name: Any) -> str:
    return {"OS": "L", "OD": "R", "L": "L", "R": "R"}.get(str(name or "").strip("\0 ").upper(), "")


def _of_vol(reader: Any) -> tuple[list[np.ndarray], tuple[float, float], str]:
    """Lines, volumes, circles and stars alike: each B-scan has its own pixels, one scale holds for all."""
    from eyepy.core.utils import vol_intensity_transform  # pyright: ignore[reportMissingImports]

    file = reader.parsed_file
    images = [np.asarray(vol_intensity_transform(np.array(b.data, np.float32))) for b in file.bscans]
    return images, (1000.0 * float(file.scale_x), 1000.0 * float(file.scale_y)), _side(file.scan_position)


def _of_e2e(volume: Any) -> tuple[list[np.ndarray], tuple[float, float], str]:
    scale = (1000.0 * float(volume.scale_x), 1000.0 * float(volume.scale_y))
    return list(np.asarray(volume.data, np.uint8)), scale, _side(volume.laterality)
