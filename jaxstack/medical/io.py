"""Reading medical images: grey pictures of any common kind, DICOM, masks, and tables of scales. Not a medical device.

Where the size of a pixel comes from is told with it: nothing is guessed. Files that cannot be read raise a `UserError`
of one line that begins with the path.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.data.pictures import opened

LEAST_SIDE = 32
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
UM_RANGE = (0.1, 500.0)
"""Micrometres per pixel that are plausible; smaller numbers look like millimetres."""


class Scan(NamedTuple):
    """One image and what its file says about it."""

    image: np.ndarray
    """[H, W] float32 in 0..1."""
    scale: tuple[float, float] | None
    """(x, y) micrometres per pixel, where the file tells."""
    laterality: str
    """"L" or "R" where the file tells, else empty."""
    source: str
    """What was read, e.g. "PNG, 16 bit"."""


def read_scan(path: str | Path) -> Scan:
    """A grey image of a PNG, JPEG, TIFF or BMP file (8 or 16 bit, grey, colour, with transparency, palette) or DICOM.

    Colour becomes luminance, transparency is left out, 16 bits are divided by 65,535.

    Raises:
        UserError: for a file that is no image, is broken, too small or huge, or has several frames.
    """
    path = Path(path)
    scan = _dicom(path) if is_dicom(path) else _picture(path)
    height, width = scan.image.shape
    if min(height, width) < LEAST_SIDE:
        raise UserError(f"{path}: found {width} x {height} pixels, expected at least {LEAST_SIDE} x {LEAST_SIDE}")
    return scan


def _picture(path: Path) -> Scan:
    if path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: a NIfTI volume, expected one B-scan or slice as a picture or DICOM")
    with opened(path) as image:
        mode, kind = image.mode, image.format
        if mode.startswith("I"):
            values = np.asarray(image).astype(np.float32)
            if values.size and (values.min() < 0 or values.max() > 65_535):
                raise UserError(f"{path}: found values up to {values.max():g}, expected 8 or 16 bits")
            return Scan(values / 65_535.0, None, "", f"{kind}, 16 bit")
        if mode == "F":
            values = np.asarray(image)
            if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
                raise UserError(f"{path}: found real numbers outside of 0 to 1, expected 8 or 16 bits or 0 to 1")
            return Scan(values.astype(np.float32), None, "", f"{kind}, real numbers")
        # palettes with transparency go by way of RGBA
        grey = (image.convert("RGBA") if mode in ("P", "PA") else image).convert("L")
        return Scan(np.asarray(grey, np.float32) / 255.0, None, "", f"{kind}, 8 bit")


def is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM, by its name or its first bytes. Raises `UserError`."""
    if path.suffix.lower() in (".dcm", ".dicom"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e


def dicom(path: Path) -> tuple[Any, np.ndarray]:
    """The data set of a DICOM file of one frame, and its stored values as float32. Raises `UserError`."""
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as e:
        raise UserError(f"{path}: DICOM needs pydicom; pip install 'jaxstack[medical]'") from e
    try:
        data = pydicom.dcmread(path)
        if "PixelData" not in data:
            raise UserError(f"{path}: DICOM without pixels")
        frames = int(data.get("NumberOfFrames", 1) or 1)
        if frames != 1:
            raise UserError(f"{path}: found {frames} frames, expected one image")
        return data, np.asarray(data.pixel_array).astype(np.float32)
    except UserError:
        raise
    except InvalidDicomError as e:
        raise UserError(f"{path}: not a DICOM file") from e
    # what pydicom raises where no decoder of the transfer syntax is installed
    except (NotImplementedError, RuntimeError) as e:
        needs = "pylibjpeg and pylibjpeg-openjpeg"
        raise UserError(f"{path}: its pixels are compressed; pip install {needs} ({e})") from e
    except (OSError, ValueError, AttributeError, KeyError, TypeError, EOFError) as e:
        raise UserError(f"{path}: broken DICOM file ({e})") from e


def _dicom(path: Path) -> Scan:
    """One frame of a DICOM file: stored values over the largest that their bits can hold, MONOCHROME1 inverted.

    Slope and intercept are not applied: a scan of reflectivity has no unit.
    """
    data, pixels = dicom(path)
    if pixels.ndim == 3:
        pixels = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    bits, signed = int(data.get("BitsStored", 8)), int(data.get("PixelRepresentation", 0))
    image = (pixels + (2.0 ** (bits - 1) if signed else 0.0)) / (2.0**bits - 1.0)
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        image = 1.0 - image
    spacing = data.get("PixelSpacing")
    if spacing is None and "SharedFunctionalGroupsSequence" in data:
        measures = data.SharedFunctionalGroupsSequence[0].get("PixelMeasuresSequence")
        spacing = measures[0].get("PixelSpacing") if measures else None
    scale = None if spacing is None else (float(spacing[1]) * 1000.0, float(spacing[0]) * 1000.0)
    side = str(data.get("ImageLaterality") or data.get("Laterality") or "")
    return Scan(np.clip(image, 0.0, 1.0).astype(np.float32), scale, side if side in ("L", "R") else "", "DICOM")


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that are named, and those in the folders that are named, but for tables and hidden ones; each once.

    Raises:
        UserError: for a path that does not exist, or no files at all.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: not found")
        inside = lambda p: p.is_file() and p.suffix != ".csv" and not p.name.startswith(".")
        files += sorted(filter(inside, path.iterdir())) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{', '.join(map(str, paths))}: no files")
    once: dict[Path, Path] = {}
    for path in files:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def read_mask(path: str | Path) -> np.ndarray:
    """A mask [H, W] bool: what is brighter than half of the file's range. Raises `UserError`."""
    return read_scan(path).image > 0.5


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image [H, W] float32 in `size` rows and columns, bilinear, averaged where it shrinks."""
    if image.shape == tuple(size):
        return image
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask [H, W] bool in `size` rows and columns, by the nearest pixel: it stays a mask."""
    if mask.shape == tuple(size):
        return mask
    height, width = size
    found = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(found) > 0


class Row(NamedTuple):
    """What a table says about a file."""

    scale: tuple[float, float] | None
    """(x, y) micrometres per pixel."""
    fovea: tuple[float, float] | None
    """(x, y) in pixels."""
    patient: str


def checked_scale(x: float, y: float, where: str) -> tuple[float, float]:
    """A plausible scale in micrometres per pixel. Raises `UserError` that begins with `where`."""
    low, high = UM_RANGE
    if not (math.isfinite(x) and math.isfinite(y)) or min(x, y) <= 0:
        raise UserError(f"{where} {x:g} {y:g}: expected positive micrometres per pixel")
    if min(x, y) < low:
        raise UserError(f"{where} {x:g} {y:g}: expected micrometres per pixel, these look like millimetres")
    if max(x, y) > high:
        raise UserError(f"{where} {x:g} {y:g}: expected micrometres per pixel, at most {high:g}")
    return x, y


def read_scales(path: str | Path) -> dict[str, Row]:
    """Rows of a table by file name.

    Args:
        path: a CSV file with the columns file, um_x, um_y and, optionally, fovea_x, fovea_y, patient. An empty entry
            means that nothing is known.

    Raises:
        UserError: for a missing table, missing columns, a file that is named twice, or numbers that are none; the
            message names the line.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{path}: cannot be read ({reason}); expected a table of file, um_x, um_y") from e
    if not rows or not {"file", "um_x", "um_y"} <= set(rows[0]):
        found = ", ".join(str(k) for k in rows[0]) if rows else "none"
        raise UserError(f"{path}: found columns {found}, expected file, um_x, um_y")
    out: dict[str, Row] = {}
    for line, row in enumerate(rows, 2):
        where = f"{path}: line {line}"
        name = (row["file"] or "").strip()
        if not name:
            raise UserError(f"{where}: file: found nothing, expected a name")
        if name in out:
            raise UserError(f"{where}: file: found {name} a second time")
        scale = _pair(row, ("um_x", "um_y"), where)
        fovea = _pair(row, ("fovea_x", "fovea_y"), where)
        scale = scale if scale is None else checked_scale(*scale, where=f"{where}: um_x, um_y")
        out[name] = Row(scale, fovea, (row.get("patient") or "").strip())
    return out


def _pair(row: dict[str, Any], names: tuple[str, str], where: str) -> tuple[float, float] | None:
    texts = [(row.get(name) or "").strip() for name in names]
    if not any(texts):
        return None
    values = []
    for name, text in zip(names, texts):
        try:
            values.append(float(text))
        except ValueError:
            raise UserError(f"{where}: {name}: found {text!r}, expected a number") from None
        if not math.isfinite(values[-1]):
            raise UserError(f"{where}: {name}: found {text}, expected a finite number")
    return values[0], values[1]
