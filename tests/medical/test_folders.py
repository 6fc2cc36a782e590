"""Folder commands: files of every kind, resuming, records, pictures, broken files; Heidelberg's formats; weights."""

import csv
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image

from jaxstack import cli
from jaxstack.cli import folders, fundus, screening, segmenting
from jaxstack.core.errors import UserError
from jaxstack.medical import dart, io, quickqual, uwf
from jaxstack.medical import heidelberg as he
from jaxstack.medical.phantoms_uwf import LABELS
from jaxstack.nn import torch_weights as tw

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(30, 250, (40, 50, 3)).astype(np.uint8)


def call(*argv):
    return cli.main([str(a) for a in argv])


def rows_of(out):
    with open(out / "results.csv", newline="") as file:
        return {row["file"].rsplit("/", 1)[-1]: row for row in csv.DictReader(file)}


def write_dicom(path, pixels, **changes):
    """A DICOM file of a photograph [H, W, 3] uint8, grey values [H, W] or frames [N, H, W] uint8 or uint16."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, OphthalmicPhotography8BitImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        OphthalmicPhotography8BitImageStorage,
        generate_uid(),
    )
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    rgb = pixels.ndim == 3 and pixels.shape[-1] == 3
    data.Rows, data.Columns = pixels.shape[:2] if rgb else pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if rgb else (1, "MONOCHROME2")
    bits = 8 * pixels.dtype.itemsize
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits, bits - 1, 0
    if rgb:
        data.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.PixelData = pixels.tobytes()
    for key, value in changes.items():
        if value is None:
            delattr(data, key)
        else:
            setattr(data, key, value)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """The same photograph in all kinds of files, three that are grey, and broken ones."""
    folder = tmp_path_factory.mktemp("photographs")
    image = Image.fromarray(COLOUR)
    for name in ("a.png", "b.bmp", "c.tif"):
        image.save(folder / name)
    image.convert("RGBA").save(folder / "d.png")
    write_dicom(folder / "e.dcm", COLOUR)
    grey = COLOUR[..., 1]
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "grey16.png")
    write_dicom(folder / "grey", grey.astype(np.uint16) * 257)
    write_dicom(folder / "inverted.dcm", 255 - grey, PhotometricInterpretation="MONOCHROME1")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "x_black.png")
    (folder / "x_empty.png").write_bytes(b"")
    write_dicom(folder / "x_frames.dcm", np.stack([grey, grey]))
    write_dicom(folder / "x_none.dcm", grey, PixelData=None)
    (folder / "x_text.txt").write_text("no image")
    Image.new("RGB", (9, 9), (99, 99, 99)).save(folder / "x_tiny.png")
    (folder / "x_volume.nii").write_bytes(b"volume")
    frames = [Image.new("L", (40, 40), i) for i in (0, 90)]
    frames[0].save(folder / "x_moving.gif", save_all=True, append_images=frames[1:])
    return folder


REASONS = {
    "x_black.png": "no pixel is brighter than 1",
    "x_empty.png": "empty file",
    "x_frames.dcm": "found 2 frames, expected one image",
    "x_none.dcm": "DICOM without pixels",
    "x_text.txt": "cannot be read as an image (not a picture of a known kind)",
    "x_tiny.png": "found 9 x 9 pixels, expected at least 32 x 32",
    "x_volume.nii": "a NIfTI volume",
    "x_moving.gif": "found 2 frames",
}


def test_colour_comes_from_every_kind_of_file(photographs, tmp_path):
    for name in ("a.png", "b.bmp", "c.tif", "d.png", "e.dcm"):
        np.testing.assert_array_equal(io.read_colour(photographs / name), COLOUR, err_msg=name)
    grey = np.repeat(COLOUR[..., 1:2], 3, 2)
    for name in ("grey16.png", "grey", "inverted.dcm"):
        np.testing.assert_array_equal(io.read_colour(photographs / name), grey, err_msg=name)
    # luminance and chrominance; a palette of 16 bits
    y, b, r = (np.asarray(c, np.uint8) for c in np.moveaxis(np.array(Image.fromarray(COLOUR).convert("YCbCr")), -1, 0))
    path = write_dicom(tmp_path / "y.dcm", np.stack([y, b, r], -1), PhotometricInterpretation="YBR_FULL")
    assert np.abs(io.read_colour(path).astype(int) - COLOUR).max() <= 3
    index = RNG.integers(0, 3, (32, 32)).astype(np.uint8)
    table = np.array([[0, 65535, 257 * 9], [257 * 7, 0, 65535], [65535, 257 * 5, 0]], np.uint16)
    entries = {}
    for colour, values in zip(("Red", "Green", "Blue"), table.T):
        entries[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        entries[f"{colour}PaletteColorLookupTableData"] = values.tobytes()
    path = write_dicom(tmp_path / "p.dcm", index, PhotometricInterpretation="PALETTE COLOR", **entries)
    np.testing.assert_array_equal(io.read_colour(path), (table // 257)[index])


def test_frames_are_items_of_their_own(tmp_path):
    frames = RNG.integers(0, 65_535, (3, 32, 40)).astype(np.uint16)
    path = write_dicom(tmp_path / "eye.dcm", frames)
    Image.fromarray(frames[0]).save(tmp_path / "z#1.png")
    items = io.scan_items([tmp_path])
    assert [p.name for p in items] == ["eye.dcm#0", "eye.dcm#1", "eye.dcm#2", "z#1.png"]
    assert folders.names(items) == ["eye-0", "eye-1", "eye-2", "z#1"]
    for i, item in enumerate(items[:3]):
        np.testing.assert_allclose(io.read_scan(item).image, frames[i] / 65_535.0, atol=1e-6)
    assert io.frame_of(items[3]) == (items[3], None)
    with pytest.raises(UserError, match="found 3 frames, numbered from 0"):
        io.read_scan(path.with_name("eye.dcm#3"))
    with pytest.raises(UserError, match="found 3 frames, expected one image"):
        io.read_scan(path)


def with_eyepy(monkeypatch, volumes):
    """Put a package in the place of eyepy that gives `volumes`, (B-scans, scale in mm, eye) each."""
    made = lambda data, scale, eye: types.SimpleNamespace(data=data, scale_x=scale[0], scale_y=scale[1], laterality=eye)

    class File:
        def __init__(self, path):
            if b"broken" in path.read_bytes():
                raise KeyError("no chunks\nat all")
            data, scale, eye = volumes[0]
            scans = [types.SimpleNamespace(data=d) for d in data]
            self.parsed_file = types.SimpleNamespace(
                bscans=scans, scale_x=scale[0], scale_y=scale[1], scan_position=eye
            )
            self.volumes = [made(*v) for v in volumes]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    parts = {"eyepy": {}, "eyepy.io": dict(HeVolReader=File, HeE2eReader=File)}
    parts |= {"eyepy.core": {}, "eyepy.core.utils": dict(vol_intensity_transform=lambda x: (255 * x).astype(np.uint8))}
    for name, inside in parts.items():
        module = types.ModuleType(name)
        vars(module).update(inside)
        monkeypatch.setitem(sys.modules, name, module)


def test_heidelberg_files_are_their_b_scans(tmp_path, monkeypatch, capsys):
    data = RNG.uniform(size=(2, 32, 48)).astype(np.float32)
    bytes_ = (255 * data).astype(np.uint8)
    for name in ("eye.vol", "both.e2e", "broken.vol"):
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setitem(sys.modules, "eyepy", None)
    assert [p.name for p in io.scan_items([tmp_path])] == ["both.e2e", "broken.vol", "eye.vol"]
    with pytest.raises(
        UserError, match=r"eye.vol: Heidelberg's files need eyepy; pip install 'jaxstack\[heidelberg\]'"
    ):
        io.read_scan(tmp_path / "eye.vol")
    with_eyepy(monkeypatch, [(data, (0.0115, 0.0039), "OD\0"), (bytes_[:1], (0.01, 0.004), "OS")])
    he._read.cache_clear()
    scan = io.read_scan(tmp_path / "eye.vol#1")
    np.testing.assert_array_equal(scan.image, bytes_[1] / np.float32(255))
    assert scan.scale == pytest.approx((11.5, 3.9))
    assert (scan.laterality, scan.source) == ("R", "Heidelberg .vol")
    monkeypatch.setattr(he, "_read", he._read.__wrapped__)
    with_eyepy(monkeypatch, [(bytes_, (0.0115, 0.0039), "R"), (bytes_[:1], (0.01, 0.004), "L")])
    assert [p.name for p in io.scan_items([tmp_path])][:3] == ["both.e2e#0", "both.e2e#1", "both.e2e#2"]
    last = io.read_scan(tmp_path / "both.e2e#2")
    assert (last.laterality, last.scale) == ("L", pytest.approx((10.0, 4.0)))
    for name, message in (
        ("broken.vol", "cannot be read as a Heidelberg file \\('no chunks"),
        ("both.e2e", "found 3 B-scans, expected one; both.e2e#0 is the first"),
        ("both.e2e#3", "found 3 B-scans in both.e2e, numbered from 0"),
        ("none.vol", "cannot be read .No such file"),
    ):
        with pytest.raises(UserError, match=message):
            io.read_scan(tmp_path / name)
    # a command gives each B-scan a row
    monkeypatch.setattr(
        segmenting, "segmenter", lambda *_: (lambda x: np.where(x > 0.5, 1.0, 0.0), {"sha256": "0" * 16})
    )
    assert call("segment-oct", tmp_path, "--model", tmp_path, "--out", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert {n: r["status"] for n, r in rows.items()} == {
        **{f"both.e2e#{i}": "ok" for i in range(3)},
        **{f"eye.vol#{i}": "ok" for i in range(2)},
        "broken.vol": "skipped",
    }
    assert sorted(p.name for p in (tmp_path / "out" / "overlays").iterdir())[:3] == [
        "both-0.png",
        "both-1.png",
        "both-2.png",
    ]
    capsys.readouterr()


def vol_file(scans, scale, eye):
    """A .vol file as Heidelberg describes it: 2,048 bytes of header, a localizer of 4 x 4 pixels, B-scans [N, H, W]
    float32 with 256 bytes of header and one segmented layer each."""
    count, height, width = scans.shape
    head = struct.pack("<12s3I3d2I2d", b"HSF-OCT-103", width, count, height, scale[0], 0.1, scale[1], 4, 4, 0.1, 0.1)
    head += struct.pack("<Id4sQiI16s16sI24sd", 30, 0.0, eye, 0, 2, 256 + 4 * width, b"1", b"", 0, b"p", 0.0)
    head += struct.pack("<I24sd4I34s", 0, b"", 0.0, 0, 0, 0, 0, b"")
    own = struct.pack("<12sI4d2IfI6f", b"HSF-BS-103", 256 + 4 * width, *[0.0] * 4, 1, 256, 30.0, 0, *[0.0] * 6)
    each = own.ljust(256, b"\0") + np.zeros(width, "<f4").tobytes()
    return head.ljust(2048, b"\0") + bytes(16) + b"".join(each + x.astype("<f4").tobytes() for x in scans)


def test_a_real_vol_file_is_read(tmp_path):
    """Only where eyepy is installed."""
    pytest.importorskip("eyepy")
    from eyepy.core.utils import vol_intensity_transform  # pyright: ignore[reportMissingImports]

    raw = RNG.uniform(0, 1, (2, 32, 40)).astype(np.float32)
    raw[0, :3] = np.finfo(np.float32).max  # beyond the scan
    (tmp_path / "eye.vol").write_bytes(vol_file(raw, (0.0115, 0.0039), b"OS"))
    assert [p.name for p in io.scan_items([tmp_path])] == ["eye.vol#0", "eye.vol#1"]
    for i in range(2):
        scan = io.read_scan(tmp_path / f"eye.vol#{i}")
        np.testing.assert_array_equal(scan.image, vol_intensity_transform(raw[i].copy()) / np.float32(255))
        assert scan.scale == pytest.approx((11.5, 3.9))
        assert scan.laterality == "L"
    assert not io.read_scan(tmp_path / "eye.vol#0").image[:3].any()
    (tmp_path / "cut.vol").write_bytes((tmp_path / "eye.vol").read_bytes()[:3000])
    (tmp_path / "text.e2e").write_text("no scans")
    for name in ("cut.vol", "text.e2e"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as a Heidelberg file"):
            io.read_scan(tmp_path / name)


def test_photographs_are_graded_resumed_and_drawn(photographs, tmp_path, capsys, monkeypatch):
    """The command with measures that cost nothing in the networks' place."""
    level = lambda pixels: {"quality": quickqual.CLASSES[int(pixels.mean()) % 3], "p_good": f"{pixels.mean():.6f}"}
    dark = lambda given: fundus.Grader(level, quickqual.bright_box, {"sha256": "1" * 16})

    def trait(pixels):
        return {"trait": f"{dart.photograph(pixels, 32).mean():.6f}"}

    monkeypatch.setattr(dart, "photograph", lambda p, n: io.resized(p.mean(2), (n, n)), raising=False)
    monkeypatch.setattr(fundus, "_trait", lambda given: fundus.Grader(trait, lambda p: None, {"sha256": "2" * 16}))
    monkeypatch.setattr(
        fundus, "_quality", lambda given: dark(given)._replace(columns=lambda p: level(require_light(p)))
    )

    def require_light(pixels):
        if quickqual.bright_box(pixels) is None:
            raise UserError("image: no pixel is brighter than 15 of 255, brightest mean 0")
        return pixels

    out = tmp_path / "out"
    argv = ("grade-fundus", photographs, "--model", "run", "--quality", "q.npz", "--out", out)
    assert call(*argv) == 0
    rows = rows_of(out)
    assert {n: r["status"] for n, r in rows.items()} == {n: "skipped" if n in REASONS else "ok" for n in rows}
    assert len(rows) == 16
    for name, reason in REASONS.items():
        assert rows[name]["reason"].startswith(reason), rows[name]
    assert len({rows[n]["p_good"] for n in ("a.png", "b.bmp", "c.tif", "d.png", "e.dcm")}) == 1
    assert rows["a.png"]["model"] == f"{'1' * 16} {'2' * 16}"
    picture = np.asarray(Image.open(out / rows["a.png"]["overlay"]))
    assert picture.shape == (384 + 18, 480, 3)
    assert (picture[2, 240] == fundus.FRAMES[rows["a.png"]["quality"]]).all()
    assert picture[-14:].max() > 200  # the values
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert (record["status"], record["files"], record["measured"]) == ("finished", 16, 8)
    assert record["options"] == {"quality": {"sha256": "1" * 16}, "model": {"sha256": "2" * 16}}
    # resuming reads what has no row, with the same options alone
    table = (out / "results.csv").read_text()
    (out / "results.csv").write_text("\n".join(line for line in table.splitlines() if "b.bmp" not in line))
    for path in (out / "overlays").iterdir():
        path.unlink()
    assert call(*argv) == 2
    assert "exists and is not an empty folder; --resume continues in it" in capsys.readouterr().err
    assert call(*argv, "--resume") == 0
    assert (out / "results.csv").read_text() == table
    assert [p.name for p in (out / "overlays").iterdir()] == ["b.png"]
    assert call(*argv[:-4], "--out", out, "--resume") == 2
    assert "--resume: quality: found None, expected {'sha256'" in capsys.readouterr().err
    monkeypatch.undo()
    for given, message in (
        (("--model", tmp_path / "no"), "no: not found, expected a run of `jaxstack train dart` or weights"),
        ((), "--model, --quality: expected at least one of them"),
        (("--quality", tmp_path / "no.npz"), "no.npz: "),
    ):
        assert call("grade-fundus", photographs, *given, "--out", tmp_path / "none") == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_ultra_widefield_images_are_screened_resumed_and_counted(photographs, tmp_path, capsys, monkeypatch):
    shares = jnp.linspace(0.1, 0.9, 8)
    predict = lambda x: x.mean((1, 2, 3))[:, None] * shares
    net = screening.Screener(predict, lambda x, label: x[..., 0], (32, 40), None, {"sha256": "3" * 16})
    monkeypatch.setattr(screening, "screener", lambda given: net)
    out, table = tmp_path / "out", photographs / "labels.csv"
    names = [p.name for p in sorted(photographs.iterdir())]
    lines = [f"file,patient,laterality,{','.join(LABELS)}", *(f"{n},p{i},R{',0,1' * 4}" for i, n in enumerate(names))]
    table.write_text("\n".join([*lines[:-1], "gone.png,p99,L" + ",1,0" * 4]))
    argv = ("screen-uwf", photographs, "--model", "run", "--threshold", 0.2, "--table", table, "--out", out)
    assert call(*argv) == 0
    said = capsys.readouterr().out
    assert "labels.csv: 1 rows without a file: gone.png" in said
    rows = rows_of(out)
    good = {n for n, r in rows.items() if r["status"] == "ok"}
    assert good == (set(names) - set(REASONS)) | {"x_black.png"}
    assert rows["x_volume.nii"]["reason"].startswith("a NIfTI volume")
    assert rows["a.png"]["p_MH"] == rows["e.dcm"]["p_MH"]
    assert (rows["a.png"]["laterality"], rows["a.png"]["model"]) == ("R", "3" * 16)
    areas = {r["label"]: r for r in csv.DictReader((out / "auc.csv").open())}
    assert {r["images"] for r in areas.values()} == {str(len(good))}
    assert {r["auc"] for r in areas.values()} == {""}  # each label has one class: nothing, not 1/2
    before = (out / "results.csv").read_text()
    (out / "results.csv").write_text("\n".join(before.splitlines()[:4]) + "\n")
    assert call(*argv, "--resume") == 0
    assert (out / "results.csv").read_text() == before
    assert {r["images"] for r in csv.DictReader((out / "auc.csv").open())} == {str(len(good))}
    capsys.readouterr()
    assert call(*argv[:5], 0.3, *argv[6:], "--resume") == 2
    assert "--resume: thresholds: found [0.3" in capsys.readouterr().err
    assert yaml.safe_load((out / "run.yaml").read_text())["status"] == "finished"


def random_state(network, example, left_out=()):
    """Random variables of a network, and the state dict of all collections but some."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)
    rng = np.random.default_rng(0)
    draw = lambda path, s: (0.05 * rng.normal(size=s.shape) + (path[-1].key in ("scale", "var"))).astype(np.float32)
    given = jax.tree_util.tree_map_with_path(draw, shapes)
    return given, tw.to_torch(network, {k: v for k, v in given.items() if k not in left_out})


def test_released_weights_are_read_and_checked(tmp_path, capsys, monkeypatch):
    x = jnp.asarray(RNG.uniform(size=(1, 64, 64, 3)), jnp.float32)
    paper = jax.eval_shape(dart.ReleasedNetwork(dart.ResNet(18, 0, "imagenet")).init, jax.random.key(0), x)
    assert sum(p.size for p in jax.tree.leaves(paper["params"])) == 11_209_537
    narrow = dart.ResNet(18, 0, "imagenet", widths=(2, 2, 3, 4))
    monkeypatch.setattr(dart, "ResNet", lambda *_: narrow)
    network = dart.ReleasedNetwork(narrow)
    given, state = random_state(network, x)
    run = jax.jit(network.apply)
    # the head's names are free, its order is not; a prefix of the backbone does not matter
    head = [k for k in state if k.startswith("fc")]
    order = [f"fc.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    assert set(head) == set(order)
    own = {f"backbone.{k}": v for k, v in state.items() if k not in head}
    own |= {f"head.layers.{i}": state[k] for i, k in enumerate(order)}
    np.savez(tmp_path / "fd.npz", **own)
    read, variables = dart.load_weights(tmp_path / "fd.npz")
    jax.tree.map(np.testing.assert_array_equal, variables, given)
    scaled = (x - jnp.asarray(dart.IMAGE_MEAN)) / jnp.asarray(dart.IMAGE_STD)
    expected = dart.to_trait(run(given, scaled), *dart.RELEASED)
    found = jax.jit(lambda v, x: dart.predict_fd(read, v, x))(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # random weights are read, and found to differ from what is published
    assert call("weights", "dart", tmp_path / "fd.npz") == 0
    assert " parameters of dart, digest " in capsys.readouterr().out
    monkeypatch.setattr(dart, "RELEASED_SIZE", 64)
    assert call("weights", "dart", tmp_path / "fd.npz", "--check") == 1
    assert "output, zeros: " in (said := capsys.readouterr().out)
    assert said.count("DIFFERS") == 2
    zeros = float(run(given, jnp.zeros((1, 64, 64, 3)))[0])
    monkeypatch.setattr(dart, "RELEASED_ZEROS", zeros)
    assert call("weights", "dart", tmp_path / "fd.npz", "--check") == 0
    assert capsys.readouterr().out.count("agrees") == 2
    del own["head.layers.5"]
    np.savez(tmp_path / "less.npz", **own)
    with pytest.raises(UserError, match=r"less.npz: .*fc.2.bias is missing"):
        dart.load_weights(tmp_path / "less.npz")
    for argv, message in (
        (("deepgpet", tmp_path / "fd.npz", "--check"), "--check: no output of deepgpet's weights is published"),
        (("choroidalyzer", tmp_path / "fd.npz", "--check"), "--image: expected the published example"),
        (("dart", tmp_path / "fd.npz", "--image", "x.png"), "--image: expected none"),
        (("uwf-diseases", tmp_path / "fd.npz", "--check"), "fd.npz: bn1.running_mean is missing; "),
        (("reachnet", tmp_path / "fd.npz"), "found tensors backbone."),
        (("dart", tmp_path / "no.npz"), "no.npz: no such file"),
    ):
        assert call("weights", *argv) == 2
        assert message in capsys.readouterr().err


def test_published_logits_of_ultra_widefield_are_compared_one_by_one(tmp_path, capsys, monkeypatch):
    network = uwf.Network(uwf.ResNet(18, 0, "imagenet", widths=(2, 2, 3, 4), counts=(1,) * 4), hidden=4)
    monkeypatch.setattr(uwf, "resnet_34", lambda: network)
    monkeypatch.setattr(uwf, "RELEASED_SIZE", (64, 64))
    given, state = random_state(network, jnp.zeros((1, 64, 64, 2)), ("pixels",))
    np.savez(tmp_path / "top.npz", **state)
    logits = np.asarray(jax.jit(network.apply)(given, jnp.zeros((1, 64, 64, 2)))[0])
    monkeypatch.setattr(uwf, "RELEASED_LOGITS", tuple(map(float, logits)))
    code = call("weights", "uwf-diseases", tmp_path / "top.npz", "--check")
    assert (code, capsys.readouterr().out.count("agrees")) == (0, 8)
    monkeypatch.setattr(uwf, "RELEASED_LOGITS", (*map(float, logits[:7]), float(logits[7]) + 0.002))
    assert call("weights", "uwf-diseases", tmp_path / "top.npz", "--check") == 1
    assert "logit of any_retina_disease, zeros" in (said := capsys.readouterr().out)
    assert said.count("DIFFERS") == 1
