"""Phantoms of OCT: the drawn truth counts, the devices, the command."""

import csv
import hashlib

import numpy as np
import pytest
from PIL import Image

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.medical.phantoms_oct import DEVICES, Device, oct_scan, oct_set


def test_a_seed_draws_the_same_scan_everywhere():
    scan = oct_scan(np.random.default_rng(0))
    pixels = np.round(scan.image * 255).astype(np.uint8).tobytes() + scan.region.tobytes() + scan.vessels.tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == "770584f58837df75"
    assert scan.image.dtype == np.float32
    assert scan.image.shape == (128, 192)
    assert (oct_scan(np.random.default_rng(1)).image != scan.image).any()


@pytest.mark.parametrize("device", [*DEVICES.values(), Device(size=(96, 144)), Device(size=(248, 384))])
def test_the_truth_is_exact(device):
    scans = oct_set(3, 12, device)
    height, width = device.size
    assert scans.image.shape == scans.region.shape == scans.vessels.shape == (12, height, width)
    assert scans.image.min() >= 0
    assert scans.image.max() <= 1
    # each column of the choroid is one run of rows inside the image
    edges = np.diff(scans.region.astype(int), axis=1)
    assert (edges == 1).sum(1).min() == (edges == 1).sum(1).max() == 1
    assert (edges == -1).sum(1).min() == (edges == -1).sum(1).max() == 1
    # area is the sum of the thickness
    um_x, um_y = scans.scale[0]
    np.testing.assert_allclose(scans.area_mm2(), scans.thickness_um().sum(1) * um_x * 1e-6, rtol=1e-5)
    np.testing.assert_allclose((um_x * width, um_y * height), np.array([8824.32, 1919.52]) * device.field, rtol=1e-5)
    # the anatomy has the same size in micrometres on every device
    assert 180 < scans.thickness_um().mean() < 560
    assert not (scans.vessels & ~scans.region).any()
    np.testing.assert_allclose(scans.cvi(), scans.target, atol=0.02)
    assert ((scans.target >= 0.3) & (scans.target <= 0.6)).all()
    x, y = scans.fovea.T
    assert ((x >= 0.35 * width) & (x <= 0.65 * width)).all()
    # the pit lies above the choroid, and below it the retina is thinnest
    top = scans.region.argmax(1)
    assert (y < top[np.arange(12), x.astype(int)]).all()


def test_what_is_seen_follows_the_truth():
    clear = Device(looks=(1e4, 1e4), gain=(1.0, 1.0), blur=0.0, shadows=(0, 0))
    scans = oct_set(0, 8, clear)
    assert not scans.shadow.any()
    stroma = scans.region & ~scans.vessels
    assert scans.image[scans.vessels].mean() < 0.75 * scans.image[stroma].mean()
    # the row above the choroid is the RPE, the brightest layer, up to the square root
    top = scans.region.argmax(1)
    above = np.take_along_axis(scans.image, top[:, None] - 1, 1)
    np.testing.assert_allclose(above, np.sqrt(0.9), rtol=0.05)
    # the vitreous lies above the floor of the pit
    for i, (x, y) in enumerate(scans.fovea):
        column = scans.image[i, :, round(x)]
        assert column[: int(y) - 1].max() < 0.3 < column[int(y) + 2]
    shadowed = oct_set(0, 8, clear._replace(shadows=(2, 2)))
    assert shadowed.shadow.any(1).all()
    np.testing.assert_array_equal(shadowed.region, scans.region)
    at = shadowed.shadow[:, None] & scans.region
    np.testing.assert_allclose(shadowed.image[at].mean() / scans.image[at].mean(), np.sqrt(0.55), rtol=0.02)
    # fewer looks are noisier
    flat = lambda looks: oct_set(0, 8, clear._replace(looks=(looks, looks))).image[stroma].std()
    assert flat(3.0) > 1.3 * flat(10.0)


def test_the_command_writes_images_masks_and_tables(tmp_path, capsys):
    run = lambda *argv: cli.main([str(a) for a in argv])
    out = tmp_path / "scans"
    assert run("phantoms", "oct", "--num", 3, "--out", out, "--device", "B", "--size", 64, 96, "--seed", 5) == 0
    expected = oct_set(5, 3, DEVICES["B"]._replace(size=(64, 96)))
    scales = list(csv.DictReader((out / "scales.csv").open()))
    truth = list(csv.DictReader((out / "truth.csv").open()))
    for i, (row, values) in enumerate(zip(scales, truth, strict=True)):
        assert row["file"] == values["file"] == f"scan{i:04d}.png"
        pixels = np.asarray(Image.open(out / row["file"]))
        np.testing.assert_array_equal(pixels, np.round(expected.image[i] * 255))
        for name, mask in (("region", expected.region), ("vessels", expected.vessels)):
            np.testing.assert_array_equal(np.asarray(Image.open(out / name / row["file"])), mask[i])
        found = [float(row[k]) for k in ("um_x", "um_y", "fovea_x", "fovea_y")]
        np.testing.assert_allclose(found, [*expected.scale[i], *expected.fovea[i]], atol=1e-5)
        assert float(values["cvi"]) == pytest.approx(expected.cvi()[i], abs=1e-6)
        assert float(values["area_mm2"]) == pytest.approx(expected.area_mm2()[i], abs=1e-6)
    refused = (
        (("--size", 64), "--size 64: expected 2 for oct"),
        (("--severity", 0, 1), "--severity: expected none, it is for fundus"),
        (("--size", 16, 96), "size=(16, 96): expected at least 32 rows and 32 columns"),
        (("--num", 0), "--num 0: expected at least 1"),
    )
    for options, message in refused:
        assert run("phantoms", "oct", "--out", tmp_path / "no", *options) == 2
        assert message in capsys.readouterr().err
    assert run("phantoms", "fundus", "--out", tmp_path / "no", "--device", "A") == 2
    assert "--device: expected none, it is for oct" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected positive fields, looks and gains"):
        oct_scan(np.random.default_rng(0), Device(gain=(0.0, 1.0)))
