"""Reading medical images: grey pictures of any common kind, DICOM, masks, and tables of scales. Not a medical device.

Where the size of a pixel comes from is told with it: nothing is guessed. Files that cannot be read raise a `UserError`
of one line that begins with the path.
"""

import contextlib
import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.data.pictures import opened
from jaxstack.medical import heidelberg

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


def frame_of(path: str | Path) -> tuple[Path, int | None]:
    """The file, and which of its images is meant: "eye.vol#3" is the fourth of eye.vol; None where none is named."""
    path = Path(path)
    found = re.fullmatch(r"(.+)#(\d+)", path.name)
    return (path.with_name(found[1]), int(found[2])) if found and not path.exists() else (path, None)


def scan_items(paths: Sequence[str | Path]) -> list[Path]:
    """As `image_files`, but each image of a file with several (.vol, .e2e, DICOM of many frames) as FILE#NUMBER.

    A file whose images cannot be counted stays as it is; reading it tells why.
    """
    found: list[Path] = []
    for path in image_files(paths):
        count = 1
        with contextlib.suppress(UserError):
            if heidelberg.is_heidelberg(path):
                count = len(heidelberg.read_volume(path).images)
            elif is_dicom(path):
                count = _frames(path)
        found += [path.with_name(f"{path.name}#{i}") for i in range(count)] if count > 1 else [path]
    return found


def read_scan(path: str | Path) -> Scan:
    """A grey image of a PNG, JPEG, TIFF or BMP file (8 or 16 bit, grey, colour, with transparency, palette), of DICOM,
    or of Heidelberg's .vol or .e2e.

    Colour becomes luminance, transparency is left out, 16 bits are divided by 65,535.

    Args:
        path: a file of one image, or FILE#NUMBER as `scan_items` gives it.

    Raises:
        UserError: for a file that is no image, is broken, too small or huge, or has several images.
    """
    path = Path(path)
    file, frame = frame_of(path)
    if heidelberg.is_heidelberg(file):
        scan = _heidelberg(path, file, frame)
    elif is_dicom(file):
        scan = _dicom(file, frame)
    else:
        scan = _picture(path)
    _require_size(path, *scan.image.shape)
    return scan


def _require_size(path: Path, height: int, width: int) -> None:
    if min(height, width) < LEAST_SIDE:
        raise UserError(f"{path}: found {width} x {height} pixels, expected at least {LEAST_SIDE} x {LEAST_SIDE}")


def _heidelberg(path: Path, file: Path, frame: int | None) -> Scan:
    images, scales, sides = heidelberg.read_volume(file)
    if frame is None and len(images) > 1:
        raise UserError(f"{path}: found {len(images)} B-scans, expected one; {path.name}#0 is the first")
    if (frame or 0) >= len(images):
        raise UserError(f"{path}: found {len(images)} B-scans in {file.name}, numbered from 0")
    i = frame or 0
    kind = f"Heidelberg {file.suffix.lower()}"
    scale = scales[i] if min(scales[i]) > 0 else None
    return Scan(images[i].astype(np.float32) / 255.0, scale, sides[i], kind)


def read_colour(path: str | Path) -> np.ndarray:
    """A colour image [H, W, 3] uint8 of the kinds of `read_scan` but Heidelberg's: grey ones have three equal channels,
    16 bits become 8.

    Raises:
        UserError: as `read_scan`.
    """
    path = Path(path)
    if path.is_file() and is_dicom(path):
        data, pixels = dicom(path)
        values = _in_unit(data, pixels)
    else:
        refuse_volume(path)
        with opened(path) as image:
            grey = image.mode[:1] in ("I", "F")
            rgb = None if grey else (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
            values = _picture(path).image if rgb is None else np.asarray(rgb)
    _require_size(path, *values.shape[:2])
    values = values if values.dtype == np.uint8 else np.round(values * 255.0).astype(np.uint8)
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)


def refuse_volume(path: Path) -> None:
    """Raise `UserError` for a NIfTI file."""
    if path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: a NIfTI volume, expected one B-scan or slice as a picture or DICOM")


def _picture(path: Path) -> Scan:
    refuse_volume(path)
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


def _pydicom(path: Path) -> Any:
    try:
        import pydicom
    except ImportError as e:
        raise UserError(f"{path}: DICOM needs pydicom; pip install 'jaxstack[medical]'") from e
    return pydicom


@contextlib.contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """What pydicom raises for a file, as a `UserError` of one line."""
    from pydicom.errors import InvalidDicomError

    try:
        yield
    except UserError:
        raise
    except InvalidDicomError as e:
        raise UserError(f"{path}: not a DICOM file") from e
    # what pydicom raises where no decoder of the transfer syntax is installed
    except (NotImplementedError, RuntimeError) as e:
        needs = "pylibjpeg and pylibjpeg-openjpeg"
        raise UserError(f"{path}: its pixels are compressed; pip install {needs} ({' '.join(str(e).split())})") from e
    except (OSError, ValueError, AttributeError, KeyError, TypeError, EOFError) as e:
        raise UserError(f"{path}: broken DICOM file ({' '.join(str(e).split())})") from e


def _frames(path: Path) -> int:
    """How many images a DICOM file says that it has. Raises `UserError`."""
    pydicom = _pydicom(path)
    with _faults_of(path):
        return int(pydicom.dcmread(path, stop_before_pixels=True).get("NumberOfFrames", 1) or 1)


def dicom(path: Path, frame: int | None = None) -> tuple[Any, np.ndarray]:
    """The data set of a DICOM file and the stored values of one image as float32, [H, W] or [H, W, 3].

    Colours are RGB, those of a palette as well.

    Args:
        path: the file.
        frame: of a file with several, which; None: it must have one.

    Raises:
        UserError: for a file that is no DICOM, is broken, has no pixels, no such frame, or needs a decoder.
    """
    pydicom = _pydicom(path)
    with _faults_of(path):
        data = pydicom.dcmread(path)
        if "PixelData" not in data:
            raise UserError(f"{path}: DICOM without pixels")
        frames = int(data.get("NumberOfFrames", 1) or 1)
        if frame is None and frames != 1:
            raise UserError(f"{path}: found {frames} frames, expected one image")
        if (frame or 0) >= frames:
            raise UserError(f"{path}: found {frames} frames, numbered from 0, expected frame {frame} among them")
        pixels = data.pixel_array if frames == 1 else pydicom.pixels.pixel_array(data, index=frame)
        if data.get("PhotometricInterpretation") == "PALETTE COLOR":
            colours = pydicom.pixels.apply_color_lut(pixels, data)
            top = 2.0 ** int(data.get("BitsStored", 8)) - 1.0
            return data, colours[..., :3].astype(np.float32) * np.float32(top / np.iinfo(colours.dtype).max)
        return data, np.asarray(pixels).astype(np.float32)


def _in_unit(data: Any, pixels: np.ndarray) -> np.ndarray:
    """Stored values over the largest that their bits can hold, float32; MONOCHROME1 inverted.

    Slope and intercept are not applied: a picture has no unit.
    """
    bits, signed = int(data.get("BitsStored", 8)), int(data.get("PixelRepresentation", 0))
    image = (pixels + (2.0 ** (bits - 1) if signed else 0.0)) / (2.0**bits - 1.0)
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        image = 1.0 - image
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def _spacing(data: Any, frame: int | None) -> Any:
    """Millimetres between rows and between columns, where the file tells: of all frames, or of each."""
    if (found := data.get("PixelSpacing")) is not None:
        return found
    each = data.get("PerFrameFunctionalGroupsSequence") or []
    groups = [*(data.get("SharedFunctionalGroupsSequence") or []), *list(each)[frame or 0 : (frame or 0) + 1]]
    measures = [m for g in groups for m in (g.get("PixelMeasuresSequence") or [])]
    return next((s for m in measures if (s := m.get("PixelSpacing")) is not None), None)


def _dicom(path: Path, frame: int | None = None) -> Scan:
    data, pixels = dicom(path, frame)
    image = _in_unit(data, pixels)
    if image.ndim == 3:
        image = image @ np.array([0.299, 0.587, 0.114], np.float32)
    with _faults_of(path):
        spacing = _spacing(data, frame)
        scale = None if spacing is None else (float(spacing[1]) * 1000.0, float(spacing[0]) * 1000.0)
    side = str(data.get("ImageLaterality") or data.get("Laterality") or "")
    return Scan(image, scale, side if side in ("L", "R") else "", "DICOM")


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
    resolution: float | None = None
    """Of the scan as it was taken, over that which it is trained at."""


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
        path: a CSV file with the columns file, um_x, um_y and, optionally, fovea_x, fovea_y, patient, resolution. An
            empty entry means that nothing is known.

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
        share = _number((row.get("resolution") or "").strip(), f"{where}: resolution")
        if share is not None and share <= 0:
            raise UserError(f"{where}: resolution: found {share:g}, expected a positive share of the training size")
        out[name] = Row(scale, fovea, (row.get("patient") or "").strip(), share)
    return out


def _pair(row: dict[str, Any], names: tuple[str, str], where: str) -> tuple[float, float] | None:
    texts = [(row.get(name) or "").strip() for name in names]
    if not any(texts):
        return None
    values = [_number(text, f"{where}: {name}", required=True) for name, text in zip(names, texts)]
    return values[0], values[1]  # pyright: ignore[reportReturnType]


def _number(text: str, where: str, required: bool = False) -> float | None:
    """A finite number; None for nothing, unless it is required. Raises `UserError`."""
    if not text and not required:
        return None
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: found {text!r}, expected a number") from None
    if not math.isfinite(value):
        raise UserError(f"{where}: found {text}, expected a finite number")
    return value
