"""Preparation of CT scans: the sampler, the window, the brain's mask, the mid-line, halves; real slices of packages."""

import numpy as np
import pytest
from scipy import ndimage

from jaxstack.core.errors import UserError
from jaxstack.medical import head_ct
from jaxstack.medical.phantoms_ct import ACUTE, VIEW_MM, Design, ct_set
from jaxstack.medical.volumes import Volume, read_volume, write_volume

PIXEL = VIEW_MM / 64
SPACING = (5.0, PIXEL, PIXEL)
STRAIGHT = Design(source="ellipses", warp=(0.0, 0.0))


@pytest.mark.parametrize(
    ("n", "t", "expected"),
    [
        (12, 11, range(11)),
        (24, 11, range(1, 22, 2)),
        (30, 11, range(4, 25, 2)),
        (38, 11, range(3, 34, 3)),
        (40, 19, range(1, 38, 2)),
        (30, 19, range(5, 24)),
        (7, 7, range(7)),
        (8, 8, range(8)),
        (9, 1, [4]),
    ],
)
def test_slices_are_sampled_as_in_the_released_code(n, t, expected):
    assert head_ct.uniform_slices(n, t) == list(expected)


def test_any_number_of_slices_gives_as_many_different_ones():
    for t in range(1, 20):
        for n in range(t, 60):
            found = head_ct.uniform_slices(n, t)
            assert len(set(found)) == len(found) == t
            assert 0 <= found[0] <= found[-1] < n
    with pytest.raises(UserError, match="found 9 slices, expected at least 11"):
        head_ct.uniform_slices(9, 11)


def test_the_window():
    np.testing.assert_array_equal(head_ct.window(np.array([-1000.0, 0.0, 40.0, 200.0])), [0.0, 0.0, 0.5, 1.0])
    np.testing.assert_allclose(head_ct.window(np.array([-1000.0, -300.0, 400.0]), -1000.0, 400.0), [0.0, 0.5, 1.0])


def test_the_mask_is_the_brain():
    scans = ct_set(0, 8, Design(source="ellipses"))
    for hu, marks in zip(scans.hu, scans.marks):
        found, truth = head_ct.brain_mask(hu, PIXEL), marks > 0
        assert (found & truth).sum() / (found | truth).sum() > 0.9
    # nothing of a scalp outside the skull, whatever its size
    rows, columns = np.mgrid[:96, :96] - 47.5
    radius = np.hypot(rows, columns)
    head = np.select([radius < 20, radius < 24, radius < 44], [30.0, 900.0, 40.0], -1000.0)[None]
    np.testing.assert_array_equal(head_ct.brain_mask(head, 2.0)[0], radius < 20)
    # an image without a skull is all brain
    bare = np.where(radius < 20, 30.0, -1000.0)[None]
    assert (head_ct.brain_mask(bare, 2.0)[0] ^ (radius < 20)).mean() < 0.01
    assert not head_ct.brain_mask(np.full((2, 32, 32), -1000.0), 2.0).any()


def test_a_turned_head_is_found_within_half_a_degree():
    scans = ct_set(5, 40, STRAIGHT._replace(tilt=10.0))
    lines = [head_ct.find_midline(hu, head_ct.brain_mask(hu, PIXEL), PIXEL) for hu in scans.hu]
    assert np.abs(scans.tilt).max() > 9
    np.testing.assert_allclose([line.tilt for line in lines], scans.tilt, atol=0.5)
    # a shifted head is found where it is: the line passes within a pixel of the drawn one
    still = ct_set(1, 1, STRAIGHT._replace(tilt=0.0, shift=0.0))
    for move in (-6, 0, 5):
        hu = ndimage.shift(still.hu[0].astype(np.float32), (0, 0, move), order=1, cval=-1000.0)
        line = head_ct.find_midline(hu, head_ct.brain_mask(hu, PIXEL), PIXEL)
        assert abs(line.column - 31.5 - move) < 0.5
    with pytest.raises(UserError, match="found no brain"):
        head_ct.find_midline(hu, np.zeros(hu.shape, bool), PIXEL)


def test_a_straightened_head_is_its_own_mirror_image():
    plain = STRAIGHT._replace(tilt=8.0, shift=3.0, noise=0.0, present=0.0, old=0.0, calcified=0.0)
    scans = ct_set(3, 12, plain)
    hu = scans.hu[np.abs(scans.tilt).argmax()]
    mask = head_ct.brain_mask(hu, PIXEL)
    line = head_ct.find_midline(hu, mask, PIXEL)
    upright = head_ct.upright(mask, line, PIXEL, 64)
    before, after = (np.abs(x - x[..., ::-1]).mean() for x in (mask.astype(np.float32), upright))
    assert after < 0.4 * before
    left, right = head_ct.halves(upright)
    assert left.shape == (7, 64, 32)
    np.testing.assert_allclose(left.mean(), right.mean(), rtol=0.02)
    # the mid-line is the last column of both, where most of the brain's rows are
    assert left[3].sum(0).argmax() > 20
    assert left[3, :, 0].max() == 0


def test_halves_mirror_the_right_side():
    slices = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    left, right = head_ct.halves(slices)
    np.testing.assert_array_equal(left, slices[..., :3])
    np.testing.assert_array_equal(right, slices[..., :2:-1])
    np.testing.assert_array_equal(head_ct.halves(np.stack([slices, slices]))[1], [left, right])


def test_a_lesion_on_the_left_of_any_file_is_in_the_left_half(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    scans = ct_set(2, 40, Design(source="ellipses", sizes=(0.0, 0.0, 1.0), present=1.0, old=0.0))
    chosen = int(np.flatnonzero(scans.side == 1)[0])
    hu = scans.hu[chosen].astype(np.float32)
    hu[scans.marks[chosen] == ACUTE] = 5.0
    write_volume(tmp_path / "RAS.nii.gz", hu, SPACING)
    ras = nibabel.load(tmp_path / "RAS.nii.gz")
    for code in ("LPS", "LAS", "RAI"):
        to = nibabel.orientations.axcodes2ornt(tuple(code))
        turn = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(ras.affine), to)
        ras.as_reoriented(turn).to_filename(tmp_path / f"{code}.nii.gz")
    found = [head_ct.prepare(read_volume(p), 7, 64).halves for p in sorted(tmp_path.iterdir())]
    assert len(found) == 4
    for one in found:
        np.testing.assert_array_equal(one, found[0])
    dark = lambda one: ((one > 0) & (one < 0.2 * 255)).sum((1, 2, 3))
    healthy = dark(head_ct.prepare(Volume(scans.hu[chosen].astype(np.float32), SPACING, ""), 7, 64).halves)
    more = dark(found[0]) - healthy
    assert more[0] > 200
    assert abs(more[1]) < 20
    by_affine = head_ct.prepare_scan(np.asarray(ras.dataobj), ras.affine, 7, 64)
    np.testing.assert_allclose(by_affine[..., 0], found[0] / 255.0, atol=1e-6)
    mirrored = head_ct.prepare(Volume(hu[..., ::-1], SPACING, ""), 7, 64).halves
    np.testing.assert_allclose(dark(mirrored), dark(found[0])[::-1], atol=40)


def test_finer_pixels_give_the_same_halves():
    hu = ct_set(4, 1, STRAIGHT._replace(noise=0.0)).hu[0].astype(np.float32)
    fine = np.repeat(np.repeat(hu, 4, 1), 4, 2)
    coarse, found = (
        head_ct.prepare(Volume(x, (5.0, mm, mm), ""), 7, 64).halves.astype(np.float32)
        for x, mm in ((hu, PIXEL), (fine, PIXEL / 4))
    )
    inside = (coarse > 0) & (found > 0)
    assert inside.sum() > 0.9 * (coarse > 0).sum()
    assert np.abs(coarse - found)[inside].mean() < 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hu: (hu[:5], SPACING), "found 5 slices, expected at least 7"),
        (lambda hu: (hu, (5.0, 3.0, 4.0)), "found pixels of 3 x 4 mm, expected square ones"),
        (lambda hu: (hu - 2000.0, SPACING), "found no brain, expected Hounsfield units of a head"),
        (lambda hu: (hu.clip(0, 80) / 80, SPACING), "found values of 0 to 1, expected Hounsfield units of a head"),
        (
            lambda hu: (ndimage.rotate(hu, -14.0, (1, 2), reshape=False, order=1, cval=-1000.0), SPACING),
            r"found a tilt of 1\d.\d degrees, expected at most 10",
        ),
    ],
)
def test_what_cannot_be_prepared_is_refused(change, message):
    hu, spacing = change(ct_set(0, 1, STRAIGHT._replace(tilt=0.0)).hu[0].astype(np.float32))
    with pytest.raises(UserError, match=message):
        head_ct.prepare(Volume(hu, spacing, ""), 7, 64)


REAL = {
    # (row, column) of the crests of the skull in front and behind, read off the picture
    "J2K_pixelrep_mismatch.dcm": ((93, 254), (390, 263)),
    "693_UNCR.dcm": ((132, 264), (416, 232)),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_slice_passes(name):
    data = pytest.importorskip("pydicom.data")
    path = data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name}: its package is not installed (pydicom-data)")
    try:
        volume = read_volume(path)
    except UserError as e:
        if "compressed" not in str(e):
            raise
        pytest.skip(f"{name}: {e}")
    (top, front), (bottom, back) = REAL[name]
    found = head_ct.prepare(volume, 1, 128)
    assert abs(found.line.tilt - np.rad2deg(np.arctan2(front - back, bottom - top))) < 3
    rows = np.array([top, bottom])
    across = found.line.column - np.tan(np.deg2rad(found.line.tilt)) * (rows - found.line.row)
    np.testing.assert_allclose(across, [front, back], atol=10)
    assert 0.1 < found.mask.mean() < 0.4
    inside = volume.hu[found.slices][found.mask]
    assert 15 < np.median(inside) < 50
    shares = (found.halves > 0).mean((1, 2, 3))
    assert shares.min() > 0.15
    assert shares.max() < 1.5 * shares.min()
