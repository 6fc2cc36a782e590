"""`jaxstack predict`: boxes in the pictures' own pixels, pictures of them, classes, bad files and calls; scenes as a
folder of COCO's form."""

import csv
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxstack import cli, learners
from jaxstack.cli import runs
from jaxstack.data import boxes
from jaxstack.data.scenes import scenes
from jaxstack.nn import classifier, detector
from jaxstack.nn.vision.boxes import Detections


class Weights(NamedTuple):
    params: dict
    stats: dict
    ema: dict


STATE = Weights({"w": np.zeros(3, np.float32)}, {}, {})


def call(*argv):
    return cli.main([str(a) for a in argv])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def scene(monkeypatch):
    """In a network's place what finds bright pixels: one good box, one weak one, one in the filling."""

    def predict(state, images):
        seen = images[0, :, :, 0] > 128
        rows, columns = jnp.nonzero(seen.any(1), size=1)[0][0], jnp.nonzero(seen.any(0), size=1)[0][0]
        size = seen.any(1).sum(), seen.any(0).sum()
        box = jnp.stack([columns, rows, columns + size[1], rows + size[0]]).astype(jnp.float32)
        found = jnp.stack([box, box + 1.0, jnp.array([0.0, 60, 20, 64]), box])[None]
        known = jnp.array([[True, True, True, False]])
        return Detections(found, jnp.array([[0.9, 0.1, 0.8, 0.0]]), jnp.array([[1, 2, 3, 0]]), known)

    learner = detector.detector()._replace(predict=predict)
    monkeypatch.setattr(runs, "one_row", lambda args, acts: (learner, STATE))


def test_boxes_are_in_the_pictures_own_pixels(scene, tmp_path, capsys):
    pixels = np.zeros((96, 192), np.uint8)
    pixels[24:60, 90:120] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")  # grey, three times the network's size
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(tmp_path / "deep.png")
    out = tmp_path / "out"
    files = [tmp_path / f"{name}.png" for name in ("wide", "broken", "deep")]
    assert call("predict", "run", *files, "--out", out) == 0
    assert "1 of 3 files" in capsys.readouterr().out
    rows = table(out / "results.csv")
    assert [r["status"] for r in rows] == ["ok", "skipped", "skipped"]
    assert (rows[0]["width"], rows[0]["height"], rows[0]["boxes"]) == ("192", "96", "1")
    assert "cannot be read as an image" in rows[1]["reason"]
    assert rows[2]["reason"] == "found pixels of mode I;16, expected 8 bits"
    (box,) = table(out / "boxes.csv")
    assert box["file"] == str(files[0])
    assert (box["label"], box["score"]) == ("square", "0.9000")
    np.testing.assert_allclose([float(box[k]) for k in ("x1", "y1", "x2", "y2")], [90, 24, 120, 60], atol=3.0)
    picture = np.asarray(Image.open(out / "pictures" / "wide.png"))
    assert picture.shape == (288, 576, 3)
    assert sorted(p.name for p in (out / "pictures").iterdir()) == ["wide.png"]
    assert (picture == (0, 200, 255)).all(-1).sum() > 300  # the colour of squares
    # a lower threshold shows the weak one
    weak = tmp_path / "weak"
    assert call("predict", "run", files[0], "--out", weak, "--threshold", 0.05) == 0
    assert [r["label"] for r in table(weak / "boxes.csv")] == ["square", "triangle"]
    # continued: what is known stays, the mended file comes
    Image.fromarray(pixels).save(files[1])
    assert call("predict", "run", *files, "--out", out, "--resume") == 0
    assert [r["status"] for r in table(out / "results.csv")] == ["ok", "ok", "skipped"]
    assert [r["file"] for r in table(out / "boxes.csv")] == [str(f) for f in files[:2]]
    assert call("predict", "run", files[0], "--out", out) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert call("predict", "run", files[2], "--out", tmp_path / "a") == 2
    assert call("predict", "run", files[0], "--out", tmp_path / "b", "--threshold", 2) == 2
    assert "--threshold 2: expected 0 to 1" in capsys.readouterr().err
    assert call("predict", "run", tmp_path / "none.png", "--out", tmp_path / "c") == 2
    assert "none.png: not found" in capsys.readouterr().err


def test_a_classifier_names_the_class(monkeypatch, tmp_path, capsys):
    learner = classifier.classifier(features=(4,))
    state = jax.jit(learner.init)(jax.random.key(0), learner.hypers)
    monkeypatch.setattr(runs, "one_row", lambda args, acts: (learner, state))
    x, _ = classifier.arrays(learner.config, "valid")
    Image.fromarray((x[0, :, :, 0].astype(int) * 255 // 16).astype(np.uint8)).save(tmp_path / "digit.png")
    assert call("predict", "run", tmp_path / "digit.png", "--out", tmp_path / "out") == 0
    (row,) = table(tmp_path / "out" / "results.csv")
    p = jax.nn.softmax(learner.predict(state, x[:1])[0])
    assert int(row["label"]) == int(p.argmax())
    assert float(row["probability"]) == pytest.approx(float(p.max()), abs=0.02)
    assert call("predict", "run", tmp_path / "digit.png", "--out", tmp_path / "out", "--threshold", 0.5) == 2
    monkeypatch.setattr(runs, "one_row", lambda args, acts: (learner._replace(config=None, name="ppo"), state))
    assert call("predict", "run", tmp_path / "digit.png", "--out", tmp_path / "out") == 2
    assert "run: found a run of ppo, expected one of a detector or a classifier" in capsys.readouterr().err


def test_scenes_are_written_as_a_folder_that_the_detector_reads(tmp_path, capsys):
    out = tmp_path / "scenes"
    assert call("phantoms", "scenes", "--num", 9, "--size", 32, "--out", out) == 0
    assert "9 scenes for training, 2 for validation" in capsys.readouterr().out
    # classes of other names, which a stored run keeps: it then needs the folder no more
    for path in (out / "annotations").iterdir():
        path.write_text(path.read_text().replace("cross", "plus"))
    name = f"coco={out}"
    test = boxes.part(name, "test", 32)
    images, truth = test.read([0, 1])
    drawn = scenes(1, 2, 32)
    np.testing.assert_array_equal(images, drawn.image)
    for i in range(2):
        np.testing.assert_array_equal(truth.boxes[i][truth.valid[i]], drawn.boxes[i][drawn.valid[i]])
        np.testing.assert_array_equal(truth.labels[i][truth.valid[i]], drawn.labels[i][drawn.valid[i]])
    config = learners.make("detector", data=name, size=32, batch_size=4).config
    assert config.classes == ("disc", "square", "triangle", "plus") == detector.class_names(config)
    assert detector.network(config).classes == 4
    assert detector.source(config).count == 8
    assert detector.Config(data="coco=gone", classes=config.classes).classes == config.classes
    assert call("phantoms", "scenes", "--size", 20, "--out", tmp_path / "small") == 2
