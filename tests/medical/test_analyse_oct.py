"""`analyse-oct`: measures of phantoms against their truth, broken files, scales, resuming, models; reading of files."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image

from jaxstack import cli
from jaxstack.cli import oct as command
from jaxstack.core.errors import UserError
from jaxstack.medical import choroid, io, overlays
from jaxstack.medical import choroidalyzer as ch
from jaxstack.medical.phantoms_oct import DEVICES, oct_set
from jaxstack.nn import torch_weights as tw
from jaxstack.nn.vision.unet import UNet

SIZE = (64, 96)


def call(*argv):
    return cli.main([str(a) for a in argv])


def rows_of(out):
    with open(out / "results.csv", newline="") as file:
        return {row["file"].rsplit("/", 1)[-1]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Phantoms whose images are their masks: grey levels of background, region, vessel and the fovea's blob."""
    folder = tmp_path_factory.mktemp("coded")
    scans = oct_set(0, 3, DEVICES["A"]._replace(size=SIZE))
    lines = ["file,um_x,um_y"]
    for i in range(3):
        level = 60.0 * scans.region[i] + 60.0 * scans.vessels[i]
        x, y = np.rint(scans.fovea[i]).astype(int)
        level[y - 1 : y + 2, x - 1 : x + 2] = 250.0
        Image.fromarray(level.astype(np.uint8)).save(folder / f"eye{i}.png")
        lines.append(f"eye{i}.png,{scans.scale[i][0]},{scans.scale[i][1]}")
    (folder / "scales.csv").write_text("\n".join([*lines, "gone.png,10,4"]))
    return folder, scans


@pytest.fixture
def reader(monkeypatch):
    """In the network's place what reads the coded images."""

    def probabilities(x):
        level = jnp.round(x * 255.0)
        near = lambda value: jnp.abs(level - value) < 1
        return jnp.stack([near(60) | near(120), near(120), near(250)], -1).astype(jnp.float32)

    net = command.Net(probabilities, None, 32, (3, 3), {"kind": "test", "sha256": "0" * 16})
    monkeypatch.setattr(command, "_net", lambda given: net)


def test_phantoms_are_measured_as_they_were_drawn(coded, reader, tmp_path, capsys):
    (folder, scans), out = coded, tmp_path / "out"
    argv = ("analyse-oct", folder, "--model", "any", "--out", out, "--scales", folder / "scales.csv", "--batch", 2)
    assert call(*argv, "--roi-um", 2000) == 0
    said = capsys.readouterr().out
    assert "scales.csv: 1 rows without a file: gone.png" in said
    assert "3 of 3 files" in said
    rows = rows_of(out)
    assert list(rows) == ["eye0.png", "eye1.png", "eye2.png"]
    for i, row in enumerate(rows.values()):
        region, vessel, scale = scans.region[i], scans.vessels[i], scans.scale[i]
        fovea = np.rint(scans.fovea[i])
        truth = ch.measured(choroid.largest_component(region), vessel, fovea, scale, 2000.0)
        assert (row["status"], row["flags"], row["scale_source"], row["cvi_of"]) == ("ok", "", "table", "window")
        assert float(row["area_mm2"]) == pytest.approx(float(truth.area_mm2), abs=1e-6)
        assert float(row["cvi"]) == pytest.approx(float(truth.cvi), abs=1e-5)
        assert float(row["vessel_area_mm2"]) == pytest.approx(float(truth.vessel_area_mm2), abs=1e-6)
        found = [float(row[f"thickness_{part}_um"]) for part in ("left", "fovea", "right")]
        np.testing.assert_allclose(found, truth.thickness_um, atol=0.051)
        assert float(row["thickness_mean_um"]) == pytest.approx(np.mean(found), abs=0.1)
        assert [float(row["fovea_x"]), float(row["fovea_y"])] == pytest.approx(list(fovea), abs=1.0)
        assert (int(row["region_px"]), int(row["vessel_px"])) == (region.sum(), vessel.sum())
        picture = np.asarray(Image.open(out / row["overlay"]))
        assert picture.shape == (SIZE[0] * 6, SIZE[1] * 6, 3)
        assert all((picture == colour).all(-1).any() for colour in (overlays.REGION, overlays.WINDOW, overlays.FOVEA))
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert (record["status"], record["measured"], record["options"]["roi_um"]) == ("finished", 3, 2000.0)
    # resuming measures what is not there, and only with the same options
    before = (out / "results.csv").read_text()
    (out / "results.csv").write_text("\n".join(before.splitlines()[:2]) + "\n")
    assert call(*argv, "--roi-um", 2000) == 2
    assert "exists and is not an empty folder; --resume continues in it" in capsys.readouterr().err
    assert call(*argv, "--roi-um", 2000, "--resume") == 0
    assert (out / "results.csv").read_text() == before
    capsys.readouterr()
    assert call(*argv, "--roi-um", 2500, "--resume") == 2
    assert "--resume: roi_um: found 2500.0, expected 2000.0 as in" in capsys.readouterr().err


def test_without_a_scale_pixels_are_given_and_odd_masks_are_flagged(coded, reader, tmp_path, capsys):
    folder, scans = coded
    odd = tmp_path / "odd"
    odd.mkdir()
    level = np.asarray(Image.open(folder / "eye0.png")).copy()
    variants = {"plain": level, "absent": np.zeros_like(level)}
    variants["no_vessels"] = np.where(level == 120, 60, level).astype(np.uint8)
    variants["no_fovea"] = np.where(level == 250, 0, level).astype(np.uint8)
    variants["short"] = level.copy()
    variants["short"][:, 60:] = 0
    variants["split"] = level.copy()
    variants["split"][:, 28:30] = 0
    for name, image in variants.items():
        Image.fromarray(image).save(odd / f"{name}.png")
    assert call("analyse-oct", odd, "--model", "any", "--out", tmp_path / "a") == 0
    rows = rows_of(tmp_path / "a")
    row = rows["plain.png"]
    assert row["flags"] == "no_scale"
    assert row["reason"] == "no scale: give --scale-um or --scales"
    assert (row["area_mm2"], row["thickness_mean_um"], row["um_x"], row["cvi_of"]) == ("", "", "", "region")
    assert float(row["cvi"]) == pytest.approx(scans.vessels[0].sum() / scans.region[0].sum(), abs=1e-5)
    assert float(row["thickness_px"]) == pytest.approx(scans.region[0].sum() / SIZE[1], abs=0.01)
    scale = ("--scale-um", 91.92, 29.99)
    assert call("analyse-oct", odd, "--model", "any", "--out", tmp_path / "b", *scale) == 0
    flags = {name: row["flags"].split() for name, row in rows_of(tmp_path / "b").items()}
    assert set(flags["absent.png"]) == {"no_region", "fovea_not_found"}
    assert "no_vessels" in flags["no_vessels.png"]
    assert "fovea_not_found" in flags["no_fovea.png"]
    assert "region_too_short" in flags["short.png"]
    assert "region_split" in flags["split.png"]
    absent = rows_of(tmp_path / "b")["absent.png"]
    assert [float(absent[k]) for k in ("area_mm2", "cvi", "thickness_mean_um")] == [0.0] * 3
    # a fovea of the table, one outside of the scan, and the middle
    table = tmp_path / "foveas.csv"
    table.write_text("file,um_x,um_y,fovea_x,fovea_y\nplain.png,90,30,40,20\nno_vessels.png,90,30,400,20\n")
    argv = ("analyse-oct", odd / "plain.png", odd / "no_vessels.png", "--model", "any", "--scales", table)
    assert call(*argv, "--out", tmp_path / "c", "--require-scale") == 0
    rows = rows_of(tmp_path / "c")
    assert (rows["plain.png"]["fovea_source"], rows["plain.png"]["fovea_x"]) == ("table", "40.0")
    assert rows["no_vessels.png"]["fovea_source"] == "network"
    assert "fovea_outside" in rows["no_vessels.png"]["flags"]
    assert call(*argv, "--out", tmp_path / "d", "--fovea", "centre") == 0
    assert rows_of(tmp_path / "d")["plain.png"]["fovea_source"] == "centre"
    capsys.readouterr()


def test_ten_broken_files_are_ten_reasons(coded, reader, tmp_path, capsys):
    folder, mixed = coded[0], tmp_path / "mixed"
    mixed.mkdir()
    good = (folder / "eye0.png").read_bytes()
    (mixed / "good.png").write_bytes(good)
    (mixed / "empty.png").write_bytes(b"")
    (mixed / "cut.png").write_bytes(good[: len(good) // 2])
    (mixed / "notes.txt").write_text("not a picture")
    (mixed / "brain.nii.gz").write_bytes(b"\x1f\x8b")
    (mixed / "fake.dcm").write_bytes(b"\0" * 200)
    Image.new("L", (8, 8)).save(mixed / "tiny.png")
    Image.new("1", (8000, 4000)).save(mixed / "huge.png")
    frames = [Image.new("L", (40, 40), i) for i in (0, 90)]
    frames[0].save(mixed / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((40, 40), 9.5, np.float32)).save(mixed / "real.tif")
    Image.fromarray(np.full((40, 40), 70_000, np.int32)).save(mixed / "deep.tif")
    assert call("analyse-oct", mixed, "--model", "any", "--out", tmp_path / "out", "--scale-um", 90, 30) == 0
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "skipped"}
    assert len(rows) == 11
    assert len(set(reasons.values())) == len(reasons) == 10
    for name, part in {
        "empty.png": "empty file",
        "cut.png": "truncated, the file ends after",
        "notes.txt": "not a picture of a known kind",
        "brain.nii.gz": "a NIfTI volume, expected one B-scan",
        "fake.dcm": "not a DICOM file",
        "tiny.png": "found 8 x 8 pixels, expected at least 32 x 32",
        "huge.png": "found 8000 x 4000 pixels, expected at most 30,000,000",
        "moving.gif": "found 2 frames, expected one image",
        "real.tif": "found real numbers outside of 0 to 1",
        "deep.tif": "found values up to 70000, expected 8 or 16 bits",
    }.items():
        assert part in reasons[name]
        assert f"{mixed / name}: {reasons[name]}, skipped" in printed
    assert rows["good.png"]["status"] == "ok"
    assert call("analyse-oct", mixed / "empty.png", "--model", "any", "--out", tmp_path / "none") == 2
    (mixed / "plain.png").write_bytes(good)
    argv = ("analyse-oct", mixed / "plain.png", "--model", "any", "--out", tmp_path / "strict", "--require-scale")
    assert call(*argv) == 2
    assert rows_of(tmp_path / "strict")["plain.png"]["reason"] == "no scale in --scales, --scale-um or the file"


def test_wrong_calls_are_one_line(coded, tmp_path, capsys):
    folder = coded[0]
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"\x80\x02cposix\nsystem\nq\x00.")
    table = tmp_path / "scales.csv"
    table.write_text("file,um_x,um_y\neye0.png,0.0115,0.0039\n")
    for argv, message in (
        (("--model", weights, "--scale-um", "0.0115", "0.0039"), "--scale-um 0.0115 0.0039: expected micrometres per"),
        (("--model", weights, "--scale-um", "-1", "4"), "--scale-um -1 4: expected positive micrometres"),
        (("--model", weights, "--scales", table), "line 2: um_x, um_y 0.0115 0.0039: expected micrometres per pixel, "),
        (("--model", weights, "--scales", tmp_path / "no.csv"), "no.csv: cannot be read"),
        (("--model", weights, "--roi-um", "0"), "--roi-um 0: expected micrometres"),
        (("--model", weights), "weights.pth: "),
        (("--model", tmp_path / "no.pth"), "no.pth: not found, expected a run"),
        (("--model", weights, "--scale-um", "9", "4", "--scales", table), "--scale-um, --scales: expected at most one"),
    ):
        assert call("analyse-oct", folder, "--out", tmp_path / "out", *argv) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1, said
    assert call("analyse-oct", tmp_path / "no", "--model", weights, "--out", tmp_path / "out") == 2
    assert "no: not found" in capsys.readouterr().err
    for text, message in {
        "file,um_x\n": "found columns none",
        "file,um_x\na,1\n": "found columns file, um_x, expected",
        "file,um_x,um_y\na.png,wide,4\n": "line 2: um_x: found 'wide', expected a number",
        "file,um_x,um_y\na.png,9,\n": "line 2: um_y: found '', expected a number",
        "file,um_x,um_y\na.png,9,4\na.png,9,4\n": "line 3: file: found a.png a second time",
        "file,um_x,um_y,fovea_x,fovea_y\na.png,9,4,nan,3\n": "line 2: fovea_x: found nan, expected a finite",
    }.items():
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            io.read_scales(table)


def test_runs_and_weights_give_what_their_networks_say(coded, tmp_path, capsys):
    folder = coded[0]
    # a file of weights: scans are padded, whatever their size
    net = UNet((4, 6))
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    np.savez(tmp_path / "net.npz", **tw.to_torch(net, variables))  # pyright: ignore[reportArgumentType]
    image = np.asarray(Image.open(folder / "eye0.png"))
    odd = tmp_path / "odd.png"
    Image.fromarray(image[:61, :83]).save(odd)
    assert call("analyse-oct", odd, folder / "eye0.png", "--model", tmp_path / "net.npz", "--out", tmp_path / "a") == 0
    rows = rows_of(tmp_path / "a")
    for name, x in (("odd.png", image[:61, :83]), ("eye0.png", image)):
        p = np.asarray(jax.jit(lambda x: ch.predict(net, variables, x))(x[None]))[0]
        assert int(rows[name]["region_px"]) == choroid.largest_component(p[..., 0] >= 0.5).sum()
        assert float(rows[name]["fovea_score"]) == pytest.approx(p[..., 2].max(), abs=1e-4)
    assert len(rows["odd.png"]["model"]) == 16
    # a run: scans are resized to its size and masks back; the mean over seeds
    options = ("--channels", 4, 4, "--size", 32, 48, "--num-train", 4, "--num-valid", 2, "--batch-size", 2)
    run = ("--seeds", 0, 1, "--num-updates", 1, "--run-dir", tmp_path / "run", "--no-guard")
    assert call("train", "jaxstack.medical.choroidalyzer:choroidalyzer", *options, *run) == 0
    argv = ("analyse-oct", folder, "--model", tmp_path / "run", "--out", tmp_path / "b", "--scale-um", 91.9, 30)
    assert call(*argv) == 0
    rows = rows_of(tmp_path / "b")
    assert {(row["height_px"], row["width_px"]) for row in rows.values()} == {("64", "96")}
    assert yaml.safe_load((tmp_path / "b" / "run.yaml").read_text())["options"]["model"]["networks"] == 2
    from jaxstack.cli import runs
    from jaxstack.core import runner

    learner, _ = runs.load(str(tmp_path / "run"))
    state, _ = runner.stored(learner, tmp_path / "run")
    x = io.resized(io.read_scan(folder / "eye1.png").image, (32, 48))[None]
    p = np.asarray(jax.vmap(learner.predict, in_axes=(0, None))(state, x)).mean(0)[0]  # pyright: ignore
    assert float(rows["eye1.png"]["fovea_score"]) == pytest.approx(p[..., 2].max(), abs=1e-4)
    capsys.readouterr()


def test_pictures_of_any_kind_are_read(tmp_path):
    grey = (np.arange(32 * 40) % 251).reshape(32, 40).astype(np.uint8)
    save = lambda name, image, **options: image.save(tmp_path / name, **options)
    save("grey.png", Image.fromarray(grey))
    save("grey.bmp", Image.fromarray(grey))
    save("grey.tif", Image.fromarray(grey))
    save("rgb.png", Image.fromarray(np.repeat(grey[..., None], 3, 2)))
    clear = np.dstack([grey, grey, grey, np.full_like(grey, 9)])
    save("rgba.png", Image.fromarray(clear))
    save("palette.png", Image.fromarray(grey).convert("P"))
    save("deep.png", Image.fromarray(grey.astype(np.uint16) * 257))
    save("deep.tif", Image.fromarray(grey.astype(np.uint16) * 257))
    save("unit.tif", Image.fromarray((grey / 255.0).astype(np.float32)))
    for path in sorted(tmp_path.iterdir()):
        scan = io.read_scan(path)
        assert scan.image.dtype == np.float32
        np.testing.assert_allclose(scan.image, grey / 255.0, atol=1e-6, err_msg=path.name)
        assert scan.scale is None
    save("grey.jpg", Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (32, 1))), quality=95)
    np.testing.assert_allclose(
        io.read_scan(tmp_path / "grey.jpg").image, np.arange(40) * 6 / 255.0 + np.zeros((32, 1)), atol=0.03
    )
    big = np.zeros((60, 80), np.float32)
    assert io.resized(big, (30, 40)).shape == (30, 40)
    assert io.resized(big, (60, 80)) is big
    assert [p.name for p in io.image_files([tmp_path / "rgb.png", tmp_path])][:2] == ["rgb.png", "deep.png"]
    assert len(io.image_files([tmp_path, tmp_path / "rgb.png"])) == 10


def test_dicom_is_rescaled_turned_and_brings_its_scale(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, OphthalmicTomographyImageStorage, generate_uid

    values = (np.arange(32 * 40).reshape(32, 40) * 50).astype(np.uint16)

    def write(name, **changes):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = OphthalmicTomographyImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Rows, data.Columns = values.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.PixelSpacing, data.ImageLaterality = [0.00387, 0.01149], "R"
        data.PixelData = values.tobytes()
        for key, value in changes.items():
            if value is None:
                delattr(data, key)
            else:
                setattr(data, key, value)
        pydicom.dcmwrite(tmp_path / name, data, enforce_file_format=True)
        return tmp_path / name

    scan = io.read_scan(write("a.dcm"))
    np.testing.assert_allclose(scan.image, values / 65_535.0, atol=1e-6)
    assert scan.scale == pytest.approx((11.49, 3.87))
    assert (scan.laterality, scan.source) == ("R", "DICOM")
    turned = io.read_scan(write("b", PhotometricInterpretation="MONOCHROME1", PixelSpacing=None))
    np.testing.assert_allclose(turned.image, 1.0 - values / 65_535.0, atol=1e-6)
    assert turned.scale is None
    with pytest.raises(UserError, match=r"c.dcm: DICOM without pixels"):
        io.read_scan(write("c.dcm", PixelData=None))
    with pytest.raises(UserError, match=r"d.dcm: found 2 frames, expected one image"):
        io.read_scan(write("d.dcm", NumberOfFrames=2, PixelData=2 * values.tobytes()))
