"""Phantoms of CT scans: the truth is what is seen, patients share anatomy, the command."""

import csv
import hashlib

import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.medical import phantoms_ct
from jaxstack.medical.phantoms_ct import ACUTE, BRAIN, CALCIFIED, OLD, OUTSIDE, Design, ct_set

PLAIN = Design(source="ellipses", noise=0.0, tilt=0.0, shift=0.0, warp=(0.0, 0.0), gain=0.0, offset=0.0)


def test_a_seed_draws_the_same_scans_and_the_first_do_not_depend_on_the_count():
    scans = ct_set(0, 5, Design(source="ellipses"))
    assert scans.hu.shape == (5, 7, 64, 64)
    assert hashlib.sha256(scans.marks[0].tobytes()).hexdigest()[:16] == "001a399fd0e8c9c5"
    for name, few, many in zip(scans._fields, scans, ct_set(0, 9, Design(source="ellipses"))):
        np.testing.assert_array_equal(few, many[:5], err_msg=name)
    assert (ct_set(1, 5, Design(source="ellipses")).hu != scans.hu).any()


def test_shares_are_those_of_the_design():
    scans = ct_set(3, 800, Design(size=32, slices=4, source="ellipses"))
    assert abs((scans.side > 0).mean() - 0.54) < 0.08
    assert abs((scans.side == 1).sum() / np.isin(scans.side, (1, 2)).sum() - 0.5) < 0.1
    assert abs(len(scans.patient) / (scans.patient.max() + 1) - 2.2) < 0.2
    assert abs((scans.old > 0).mean() - 0.3) < 0.08
    assert abs(scans.calcified.mean() - 0.25) < 0.08
    ill = scans.side > 0
    np.testing.assert_array_equal(ill, scans.extent > 0)
    np.testing.assert_array_equal(ill, scans.number > 0)
    assert (scans.number[scans.side == 3] >= 2).all()
    low, high = np.where(scans.timing, 6.0, 3.0), np.where(scans.timing, 10.0, 5.0)
    assert ((scans.contrast >= low) & (scans.contrast <= high))[ill].all()
    # one first scan per patient, and what a patient's scans share
    first = np.unique(scans.patient, return_index=True)[1]
    assert (np.flatnonzero(scans.timing == 0) == first).all()
    for name in ("side", "extent", "number", "old", "calcified", "atrophy"):
        np.testing.assert_array_equal(getattr(scans, name), getattr(scans, name)[first][scans.patient], err_msg=name)
    pixels = scans.lesion.sum((1, 2, 3))
    small, middle, large = (np.median(pixels[scans.extent == k]) for k in (1, 2, 3))
    assert 2 * small < middle < large / 2


@pytest.mark.parametrize("source", ["ellipses", "mni"])
def test_what_is_seen_follows_the_truth(source):
    if source == "mni":
        pytest.importorskip("nilearn")
    scans = ct_set(0, 60, PLAIN._replace(source=source))
    left = np.arange(64) < 31.5
    for i in range(60):
        acute = scans.marks[i] == ACUTE
        # an old stroke may cover a new one
        assert acute[..., left].any() <= bool(scans.side[i] & 1)
        assert acute[..., ~left].any() <= bool(scans.side[i] & 2)
        if scans.side[i] and not scans.old[i]:
            assert acute[..., left].any() == bool(scans.side[i] & 1)
    assert (scans.hu[scans.marks == OLD] == 8).all()
    assert scans.hu[scans.marks == CALCIFIED].min() > 40
    brain, acute = scans.hu[scans.marks == BRAIN], scans.hu[scans.marks == ACUTE]
    assert 20 < np.median(brain) < 40
    assert np.median(acute) < np.median(brain) - 3
    assert scans.hu[..., 0, 0].max() == -1000
    assert scans.hu[scans.marks == OUTSIDE].max() > 800
    # without strokes and spots the outline is symmetric, and atrophy widens what holds CSF
    healthy = PLAIN._replace(source=source, present=0.0, old=0.0, calcified=0.0, atrophied=0.0)
    narrow, wide = ct_set(0, 30, healthy), ct_set(0, 30, healthy._replace(atrophied=1.0))
    assert np.mean(narrow.marks != narrow.marks[..., ::-1]) < 2e-3
    csf = lambda s: np.mean(s.hu[s.marks == BRAIN] < 18)
    assert csf(wide) > 1.1 * csf(narrow)


def test_a_tilted_head_is_turned_clockwise():
    scans = ct_set(0, 20, PLAIN._replace(tilt=10.0, present=0.0, old=0.0))
    for marks, tilt in zip(scans.marks, scans.tilt):
        rows, columns = np.nonzero(marks[3] > 0)
        spread = np.cov(rows, columns)
        axis = np.rad2deg(np.arctan2(-2 * spread[0, 1], spread[0, 0] - spread[1, 1]) / 2)
        assert abs(axis - tilt) < 1.0


def test_the_command_writes_scans_whose_affine_tells_left_from_right(tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    pytest.importorskip("nilearn")
    out = tmp_path / "scans"
    run = lambda *argv: cli.main([str(a) for a in argv])
    assert run("phantoms", "ct", "--num", 6, "--slices", 5, "--size", 48, "--seed", 2, "--out", out) in (None, 0)
    expected = ct_set(2, 6, Design(slices=5, size=48))
    table = list(csv.DictReader((out / "scans.csv").open()))
    assert [row["side"] for row in table] == [phantoms_ct.SIDES[s] for s in expected.side]
    assert len({row["patient"] for row in table}) == expected.patient.max() + 1
    assert expected.lesion.any()
    for row, hu, lesion in zip(table, expected.hu, expected.lesion):
        scan, mask = nibabel.load(out / row["file"]), nibabel.load(out / "masks" / row["file"])
        assert nibabel.aff2axcodes(scan.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(np.asarray(scan.dataobj).transpose(2, 1, 0)[:, ::-1], hu)
        if lesion.any():
            x = nibabel.affines.apply_affine(mask.affine, np.argwhere(np.asarray(mask.dataobj)))[:, 0]
            middle = nibabel.affines.apply_affine(mask.affine, [23.5, 0, 0])[0]
            np.testing.assert_array_equal((x < middle).any(), (lesion[..., :24]).any())
    capsys.readouterr()
    for argv, message in (
        (["mri", "--slices", 5], "--slices: expected none, it is for ct"),
        (["ct", "--slices", 40], "--slices 40: expected 2 to 36"),
    ):
        assert run("phantoms", *argv, "--out", tmp_path / "other") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"slices": 37}, "slices=37: expected 1 to 36"), ({"size": 16}, "size=16: expected at least 32 pixels")],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        ct_set(0, 1, PLAIN._replace(**change))
