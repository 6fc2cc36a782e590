"""Volumes: one orientation from NIfTI of any axes and from DICOM series, Hounsfield units, what is refused."""

import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.medical.volumes import bilinear, oriented, read_volume, scan_paths, write_volume

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

HU = np.random.default_rng(0).integers(-1000, 1500, (5, 6, 8)).astype(np.float32)
SPACING = (5.0, 0.5, 0.5)


def write_series(folder, hu=HU, positions=None, **changes):
    """A DICOM file for each slice of an array in our orientation, as scanners store them: columns towards the patient's
    left, names in no order."""
    folder.mkdir(exist_ok=True)
    for t, image in enumerate(hu):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, f"1.2.3.{t}"
        data.Modality, data.SeriesInstanceUID, data.ImageType = "CT", "1.2.3", ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Rows, data.Columns, data.SamplesPerPixel = *image.shape, 1
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation, data.PhotometricInterpretation = 15, 0, "MONOCHROME2"
        data.PixelSpacing, data.SliceThickness = [0.5, 0.5], 5.0
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [-2.0, -3.0, 5.0 * t if positions is None else positions[t]]
        data.RescaleSlope, data.RescaleIntercept = 0.5, -1024.0
        data.PixelData = ((image[:, ::-1] + 1024.0) * 2.0).astype(np.uint16).tobytes()
        for name, value in changes.items():
            value = value(t) if callable(value) else value
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)
        data.save_as(folder / f"{(7 * t) % 5}.dcm", enforce_file_format=True)
    return folder


def test_the_same_head_in_any_axes_gives_the_same_array(tmp_path):
    write_volume(tmp_path / "ras.nii.gz", HU, SPACING)
    ras = nibabel.load(tmp_path / "ras.nii.gz")
    codes = [("L", "P", "S"), ("L", "A", "S"), ("R", "A", "I"), ("S", "L", "P"), ("A", "I", "R")]
    for code in codes:
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(ras.affine), nibabel.orientations.axcodes2ornt(code)
        )
        ras.as_reoriented(turn).to_filename(tmp_path / f"{''.join(code)}.nii")
    for path in tmp_path.iterdir():
        found = read_volume(path)
        np.testing.assert_array_equal(found.hu, HU, err_msg=path.name)
        assert found.spacing == SPACING
        assert found.source == f"NIfTI, {path.name.split('.')[0].upper()}"
    # stored numbers without their affine are another head
    flipped = nibabel.Nifti1Image(np.asarray(ras.dataobj)[::-1], ras.affine)
    flipped.to_filename(tmp_path / "mirrored.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "mirrored.nii").hu, HU[..., ::-1])


def test_a_dicom_series_is_ordered_by_position_and_in_hounsfield_units(tmp_path):
    found = read_volume(write_series(tmp_path / "series"))
    np.testing.assert_array_equal(found.hu, HU)
    assert found.spacing == SPACING
    assert found.source == "DICOM, LPS"
    # a tilted gantry shears the slices, which stay as they are; the gap is the distance of their planes
    c, s = np.cos(0.3), np.sin(0.3)
    tilted = write_series(tmp_path / "tilted", ImageOrientationPatient=[1, 0, 0, 0, float(c), float(-s)])
    found = read_volume(tilted)
    np.testing.assert_array_equal(found.hu, HU)
    np.testing.assert_allclose(found.spacing[0], 5.0 * c, rtol=1e-5)
    # a display that shows small values bright shows the same Hounsfield units
    inverted = write_series(tmp_path / "inverted", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_volume(inverted).hu, HU)
    scout = lambda t: ["ORIGINAL", "PRIMARY", "LOCALIZER" if t == 4 else "AXIAL"]
    np.testing.assert_array_equal(read_volume(write_series(tmp_path / "scout", ImageType=scout)).hu, HU[:4])
    np.testing.assert_array_equal(read_volume(tmp_path / "series" / "0.dcm").hu, HU[:1])


def test_scans_are_found_in_folders(tmp_path):
    series = write_series(tmp_path / "series")
    write_volume(tmp_path / "a.nii.gz", HU, SPACING)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    assert scan_paths([tmp_path]) == [tmp_path / "a.nii.gz", series]
    assert scan_paths([series, tmp_path / "a.nii.gz", series]) == [series, tmp_path / "a.nii.gz"]
    for path, message in ((tmp_path / "empty", "found no NIfTI files"), (tmp_path / "none", "not found")):
        with pytest.raises(UserError, match=message):
            scan_paths([path])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": (0, 5, 10, 15, 22)}, "found gaps of 5.00 to 7.00 mm, expected equal ones"),
        ({"positions": (0, 5, 5, 10, 15)}, "found two slices at one position"),
        ({"SeriesInstanceUID": lambda t: f"1.{t // 3}"}, "found 2 series, expected one"),
        ({"Modality": "MR"}, "found modality MR, expected CT"),
        ({"ImagePositionPatient": None}, "without ImagePositionPatient: left and right are unknown"),
        ({"RescaleSlope": None}, "without RescaleSlope and RescaleIntercept, expected Hounsfield units"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "found slices that are not axial"),
        ({"PixelSpacing": lambda t: [0.5 + 0.1 * t, 0.5]}, "several directions or pixel sizes"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "found scout images alone"),
        ({"PixelData": None}, "DICOM without pixels"),
    ],
)
def test_what_is_no_series_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as e:
        read_volume(write_series(tmp_path / "series", **changes))
    assert str(e.value).startswith(str(tmp_path))
    assert "\n" not in str(e.value)


def test_broken_nifti_files_are_refused(tmp_path):
    write_volume(tmp_path / "good.nii.gz", HU, SPACING)
    good = nibabel.load(tmp_path / "good.nii.gz")
    values = np.asarray(good.dataobj).copy()

    def saved(name, image):
        image.to_filename(tmp_path / name)

    lost = nibabel.Nifti1Image(values, None)
    values[0, 0, :3] = np.nan
    saved("nan.nii", nibabel.Nifti1Image(values, good.affine))
    saved("lost.nii", lost)
    saved("time.nii", nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), good.affine))
    saved("flat.nii", nibabel.Nifti1Image(np.zeros((4, 4), np.int16), good.affine))
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:200])
    (tmp_path / "empty.nii").write_bytes(b"")
    (tmp_path / "text.nii").write_text("no volume")
    (tmp_path / "text.txt").write_text("no volume")
    for name, message in {
        "nan.nii": "found 3 values that are not finite, expected Hounsfield units",
        "lost.nii": r"without an affine \(sform and qform codes are 0\): left and right are unknown",
        "time.nii": "found 4 axes, expected a volume of 3",
        "flat.nii": "found 2 axes",
        "cut.nii.gz": "cannot be read as NIfTI",
        "empty.nii": "empty file",
        "text.nii": "cannot be read as NIfTI",
        "text.txt": "expected a NIfTI file",
        "none.nii": "not found",
    }.items():
        with pytest.raises(UserError, match=message) as e:
            read_volume(tmp_path / name)
        assert str(e.value).startswith(str(tmp_path / name))
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="affine: found one"):
        oriented(HU, np.zeros((4, 4)))


def test_bilinear_reads_planes_exactly_and_repeats_the_edge():
    y, x = np.mgrid[:5, :7].astype(np.float32)
    plane = (2.0 * y - 3.0 * x).ravel()
    at = np.random.default_rng(0).uniform(0, 4, (2, 50))
    np.testing.assert_allclose(bilinear(at, (5, 7)) @ plane, 2.0 * at[0] - 3.0 * at[1], atol=1e-5)
    np.testing.assert_allclose(bilinear(np.array([[-4.0], [9.0]]), (5, 7)) @ plane, [-18.0], atol=0.01)
