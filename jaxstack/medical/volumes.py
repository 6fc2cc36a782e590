"""Volumes of slices from NIfTI files and DICOM series, all in one orientation. Not a medical device.

An array is [slices from foot to head, rows from front to back, columns from the patient's LEFT to right]. The file's
own geometry decides it: the affine of NIfTI, position and orientation of DICOM. Files that cannot be read raise a
`UserError` of one line that begins with the path.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.core.errors import UserError


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
