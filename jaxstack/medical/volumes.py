"""Volumes of slices in Hounsfield units from NIfTI files and DICOM series, in one orientation. Not a medical device.

An array is [slices from foot to head, rows from front to back, columns from the patient's LEFT to right]. The file's
own geometry decides it: the affine of NIfTI, position and orientation of DICOM. Files that cannot be read raise a
`UserError` of one line that begins with the path.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from jaxstack.core.errors import UserError
from jaxstack.medical.io import dicom, is_dicom

ENDINGS = (".nii", ".nii.gz")
GAP_TOLERANCE = 0.02
"""Share of the usual gap by which a gap between slices may differ."""


class Volume(NamedTuple):
    """A scan."""

    hu: np.ndarray
    """[T, H, W] float32, Hounsfield units: foot to head, front to back, patient's left to right."""
    spacing: tuple[float, float, float]
    """Millimetres between slices, rows and columns."""
    source: str
    """What was read, e.g. "NIfTI, LPS"."""


def _nibabel(path: Path) -> Any:
    try:
        import nibabel
    except ImportError as e:
        raise UserError(f"{path}: NIfTI needs nibabel; pip install 'jaxstack[medical]'") from e
    return nibabel


def write_volume(path: str | Path, values: np.ndarray, spacing: tuple[float, float, float]) -> None:
    """Write a NIfTI file with axes RAS.

    Args:
        path: ends in .nii or .nii.gz.
        values: [T, H, W], oriented as arrays of this file are.
        spacing: millimetres between slices, rows and columns.
    """
    nibabel, path = _nibabel(Path(path)), Path(path)
    image = nibabel.Nifti1Image(values[:, ::-1].transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0]))
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def oriented(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Bring voxels into the orientation of this file: axes are swapped and turned, nothing is interpolated.

    Args:
        values: [I, J, K].
        affine: [4, 4], from indices to millimetres towards the patient's right, front and head (RAS).

    Returns:
        [T, H, W] and millimetres between slices, rows and columns.

    Raises:
        UserError: for an affine that is not finite or flattens an axis.
    """
    from nibabel import orientations

    affine = np.asarray(affine, np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0) if affine.shape == (4, 4) else np.zeros(3)
    if not np.isfinite(affine).all() or not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise UserError("affine: found one that is not finite or flattens an axis, expected 4 x 4 numbers of a volume")
    code = orientations.io_orientation(affine)
    turned = orientations.apply_orientation(values, code)
    x, y, z = (float(lengths[list(code[:, 0]).index(i)]) for i in range(3))
    return np.ascontiguousarray(turned.transpose(2, 1, 0)[:, ::-1]), (z, y, x)


def bilinear(at: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """A matrix that reads images bilinearly: [M, H * W], for one image or many as columns.

    Outside of the image, edge pixels are repeated.

    Args:
        at: rows and columns [2, M], in pixels.
        shape: H, W.
    """
    at = np.clip(at, 0.0, np.array(shape)[:, None] - 1.001)
    corner = at.astype(np.int32)
    y, x = (at - corner).astype(np.float32)
    first = corner[0] * shape[1] + corner[1]
    columns = np.stack([first, first + 1, first + shape[1], first + shape[1] + 1], 1)
    weights = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], 1)
    ends = np.arange(0, 4 * len(y) + 1, 4, dtype=np.int32)
    return sparse.csr_array((weights.ravel(), columns.ravel(), ends), shape=(len(y), shape[0] * shape[1]))


def read_volume(path: str | Path) -> Volume:
    """A scan of a NIfTI file, or of the DICOM series in a folder or a single DICOM file.

    Raises:
        UserError: for a file or folder that is none or broken, without an affine or positions (left and right would be
            a guess), with unequal gaps between slices, several series, values that are not finite, or without the
            slope and intercept of Hounsfield units.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: not found")
    if path.is_dir():
        return _series(path, [p for p in sorted(path.iterdir()) if _candidate(p) and is_dicom(p)])
    if path.name.lower().endswith(ENDINGS):
        return _nifti(path)
    if is_dicom(path):
        return _series(path, [path])
    raise UserError(f"{path}: expected a NIfTI file (.nii, .nii.gz) or DICOM")


def _candidate(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _finished(path: Path, values: np.ndarray, affine: np.ndarray, source: str) -> Volume:
    from nibabel.orientations import aff2axcodes

    if bad := int((~np.isfinite(values)).sum()):
        raise UserError(f"{path}: found {bad} values that are not finite, expected Hounsfield units")
    try:
        hu, spacing = oriented(values, affine)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    return Volume(hu.astype(np.float32), spacing, f"{source}, {''.join(aff2axcodes(affine))}")


def _nifti(path: Path) -> Volume:
    nibabel = _nibabel(path)
    if not path.stat().st_size:
        raise UserError(f"{path}: empty file")
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Pair):  # NIfTI-2 is one, too
            raise UserError(f"{path}: found {type(image).__name__}, expected NIfTI")
        if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
            raise UserError(f"{path}: without an affine (sform and qform codes are 0): left and right are unknown")
        if image.header.get_data_dtype().kind not in "iuf":
            raise UserError(f"{path}: found values of {image.header.get_data_dtype()}, expected real numbers")
        values = np.asarray(image.dataobj, np.float32)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as e:
        raise UserError(f"{path}: cannot be read as NIfTI ({str(e).splitlines()[0] if str(e) else 'cut off'})") from e
    values = values[..., 0] if values.ndim == 4 and values.shape[3] == 1 else values
    if values.ndim != 3:
        raise UserError(f"{path}: found {values.ndim} axes, expected a volume of 3")
    return _finished(path, values, image.affine, "NIfTI")


class _Slice(NamedTuple):
    values: np.ndarray
    position: np.ndarray
    orientation: np.ndarray
    """Directions of growing column and growing row, [2, 3]."""
    spacing: np.ndarray
    thickness: float
    series: str


def _slice(path: Path) -> _Slice | None:
    """A slice in Hounsfield units, None for a scout image. Raises `UserError`.

    MONOCHROME1 changes how a display shows the values, not the values: slope and intercept apply to the stored ones.
    """
    data, pixels = dicom(path)
    if "LOCALIZER" in [str(v).upper() for v in data.get("ImageType") or []]:
        return None
    kind = str(data.get("Modality") or "CT")
    if kind != "CT":
        raise UserError(f"{path}: found modality {kind}, expected CT")
    if pixels.ndim != 2:
        raise UserError(f"{path}: found colours, expected grey values")
    names = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    if missing := [name for name in names if not data.get(name)]:
        raise UserError(f"{path}: without {missing[0]}: left and right are unknown")
    if data.get("RescaleSlope") is None or data.get("RescaleIntercept") is None:
        raise UserError(f"{path}: without RescaleSlope and RescaleIntercept, expected Hounsfield units")
    try:
        position, orientation, spacing = (np.asarray(data.get(name), np.float64) for name in names)
        values = pixels * float(data.RescaleSlope) + float(data.RescaleIntercept)
        thickness = float(data.get("SliceThickness") or 1.0)
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: its geometry cannot be read ({e})") from e
    sizes = position.shape, orientation.shape, spacing.shape
    if sizes != ((3,), (6,), (2,)) or not (spacing > 0).all():
        raise UserError(f"{path}: found positions, directions and spacing of {sizes} numbers, expected 3, 6 and 2")
    series = str(data.get("SeriesInstanceUID") or "")
    return _Slice(values.astype(np.float32), position, orientation.reshape(2, 3), spacing, thickness, series)


def _series(path: Path, files: Sequence[Path]) -> Volume:
    if not files:
        raise UserError(f"{path}: found no DICOM files, expected a series of slices")
    slices = [s for s in map(_slice, files) if s is not None]
    if not slices:
        raise UserError(f"{path}: found scout images alone, expected slices")
    first = slices[0]
    if len(found := {s.series for s in slices}) > 1:
        raise UserError(f"{path}: found {len(found)} series, expected one")
    if len(shapes := {s.values.shape for s in slices}) > 1:
        raise UserError(f"{path}: found slices of {len(shapes)} sizes, expected one")
    same = lambda s: np.allclose(s.orientation, first.orientation, atol=1e-3) and np.allclose(s.spacing, first.spacing)
    if not all(map(same, slices)):
        raise UserError(f"{path}: found slices of several directions or pixel sizes, expected one")
    normal = np.cross(*first.orientation)
    if abs(normal[2]) < np.sqrt(0.5):
        raise UserError(f"{path}: found slices that are not axial")
    slices.sort(key=lambda s: float(s.position @ normal))
    gap = first.thickness
    if len(slices) > 1:
        gaps = np.diff([s.position @ normal for s in slices])
        gap = float(np.median(gaps))
        if gaps.min() < 1e-3:
            raise UserError(f"{path}: found two slices at one position")
        if np.abs(gaps - gap).max() > GAP_TOLERANCE * gap + 0.01:
            raise UserError(f"{path}: found gaps of {gaps.min():.2f} to {gaps.max():.2f} mm, expected equal ones")
    columns, rows = first.orientation[0] * first.spacing[1], first.orientation[1] * first.spacing[0]
    along = (slices[-1].position - slices[0].position) / (len(slices) - 1) if len(slices) > 1 else normal * gap
    affine = np.eye(4)
    # DICOM counts towards the patient's left, back and head
    affine[:3] = np.diag([-1.0, -1.0, 1.0]) @ np.stack([columns, rows, along, slices[0].position], 1)
    values = np.stack([s.values for s in slices], 2).swapaxes(0, 1)
    volume = _finished(path, values, affine, "DICOM")
    return volume._replace(spacing=(gap, *volume.spacing[1:]))


def scan_paths(paths: Sequence[str | Path]) -> list[Path]:
    """Scans among paths: NIfTI files, folders of DICOM files, and what of both is in other folders that are named.

    Raises:
        UserError: for a path that does not exist, or no scans at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: not found")
        if path.is_file():
            found.append(path)
            continue
        files = sorted(p for p in path.iterdir() if _candidate(p))
        if any(map(is_dicom, files)):
            found.append(path)
            continue
        found += [p for p in files if p.name.lower().endswith(ENDINGS)]
        for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if any(_candidate(p) and is_dicom(p) for p in folder.iterdir()):
                found.append(folder)
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: found no NIfTI files and no folders of DICOM files")
    return list({p.resolve(): p for p in found}.values())
