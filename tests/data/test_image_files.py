"""Labelled images in one's own files: what each kind gives, how it is split, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.data import image_files, images
from jaxstack.nn.classifier import Config, facts, prepared

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 6, 5, 3), np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(autouse=True)
def forget():
    image_files.read.cache_clear()
    images._file_facts.cache_clear()


def test_a_folder_for_each_class(tmp_path):
    for i, pixels in enumerate(PIXELS):
        save(tmp_path / ("a", "b")[i % 2] / f"{i:02d}.png", pixels)
    save(tmp_path / "b" / "99.png", PIXELS[0, :, :, 0])  # grey among RGB
    name = f"folder={tmp_path}"
    known = images.facts(name)
    assert (known.shape, known.classes, known.task) == ((6, 5, 3), 2, "classes")
    parts = [images.part(name, which, 1) for which in ("train", "valid", "test")]
    assert [len(y) for _, y in parts] == [18, 3, 4]
    x, y = (np.concatenate(each) for each in zip(*parts))
    found = {image.tobytes(): label for image, label in zip(x, y)}
    assert all(found[pixels.tobytes()] == i % 2 for i, pixels in enumerate(PIXELS))
    assert found[np.repeat(PIXELS[0, :, :, :1], 3, 2).tobytes()] == 1
    # what a run stores of the set outlives its files
    config = Config(data=name, model="cnn", num_updates=1)
    image_files.read.cache_clear()
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    stored = Config(data=name, model="cnn", num_updates=1, known=config.known)
    assert facts(stored)._replace(mean=0, std=0) == known._replace(mean=0, std=0)
    whole = prepared(stored, x)
    assert abs(float(whole.mean())) < 1e-3
    assert abs(float(whole.std()) - 1) < 1e-3


def test_folders_for_training_and_test(tmp_path):
    for i, pixels in enumerate(PIXELS):
        save(tmp_path / ("train" if i < 16 else "test") / "ab"[i % 2] / f"{i}.png", pixels)
    parts = [images.part(f"folder={tmp_path}", which) for which in ("train", "valid", "test")]
    assert [len(y) for _, y in parts] == [14, 2, 8]
    (tmp_path / "test" / "c").mkdir()
    image_files.read.cache_clear()
    with pytest.raises(UserError, match=r"found the classes \['a', 'b', 'c'\], expected those of training"):
        images.part(f"folder={tmp_path}", "train")


def test_tables_and_arrays_tell_classes_labels_and_values(tmp_path):
    for i, pixels in enumerate(PIXELS):
        save(tmp_path / f"{i}.png", pixels[..., 0])
    table = tmp_path / "t.csv"
    table.write_text("file,label\n" + "".join(f"{i}.png,{'xyz'[i % 3]}\n" for i in range(24)))
    found = image_files.read(f"csv={table}")
    assert (found.task, found.outputs, found.names) == ("classes", 3, ("x", "y", "z"))
    assert (found.train[1] == np.arange(24) % 3).all()
    assert (found.train[0][..., 0] == PIXELS[..., 0]).all()
    labels = RNG.integers(0, 2, (24, 2))
    table.write_text("file,old,new\n" + "".join(f"{i}.png,{a},{b}\n" for i, (a, b) in enumerate(labels)))
    image_files.read.cache_clear()
    found = image_files.read(f"csv={table}")
    assert (found.task, found.names) == ("labels", ("old", "new"))
    assert (found.train[1] == labels).all()
    for name, y, task, outputs in (
        ("classes", np.arange(24) % 4, "classes", 4),
        ("labels", labels, "labels", 2),
        ("values", PIXELS.mean((1, 2, 3)), "values", 1),
    ):
        np.savez(tmp_path / f"{name}.npz", x=PIXELS, y=y)
        found = image_files.read(f"npz={tmp_path / name}.npz")
        assert (found.task, found.outputs, found.test) == (task, outputs, None)
    np.savez(
        tmp_path / "own.npz", x_train=PIXELS, y_train=np.arange(24) % 4, x_test=PIXELS[:5], y_test=np.zeros(5, int)
    )
    assert len(images.part(f"npz={tmp_path / 'own.npz'}", "test")[0]) == 5


def test_cifar_has_planes_of_colours(tmp_path):
    planes = RNG.integers(0, 256, (10, 3, 32, 32), np.uint8)
    rows = [bytes([i]) + planes[i].tobytes() for i in range(10)]
    for i in range(5):
        (tmp_path / f"data_batch_{i + 1}.bin").write_bytes(b"".join(rows[2 * i : 2 * i + 2]))
    (tmp_path / "test_batch.bin").write_bytes(rows[3])
    found = image_files.read(f"cifar10={tmp_path}")
    assert (found.train[1] == np.arange(10)).all()
    assert (found.train[0][7, 4, 9] == planes[7, :, 4, 9]).all()
    assert found.test[1] == [3]
    (tmp_path / "test_batch.bin").write_bytes(rows[3][:-1])
    image_files.read.cache_clear()
    with pytest.raises(UserError, match=r"test_batch.bin: found 3072 bytes, expected rows of 3073"):
        image_files.read(f"cifar10={tmp_path}")


def test_what_does_not_fit_is_named(tmp_path):
    def refused(name, message):
        image_files.read.cache_clear()
        with pytest.raises(UserError, match=message):
            image_files.read(name)

    folder = f"folder={tmp_path / 'f'}"
    refused(folder, "f: no such folder")
    (tmp_path / "f" / "a").mkdir(parents=True)
    refused(folder, "f: expected two folders or more, one for each class, found 1")
    (tmp_path / "f" / "b").mkdir()
    refused(folder, "a: found no pictures, expected .png")
    for i in range(8):
        save(tmp_path / "f" / "ab"[i % 2] / f"{i}.png", PIXELS[i])
    other = tmp_path / "f" / "b" / "9.png"
    for pixels, message in (
        (PIXELS[0][:4], "9.png: found 5x4 pixels, expected 5x6, as 0.png"),
        (RNG.integers(0, 256, (6, 5, 4), np.uint8), "9.png: found RGBA, expected grey or RGB with 8 bits"),
        (RNG.integers(0, 60_000, (6, 5)).astype(np.uint16), "9.png: found 16 bits, expected grey or RGB"),
    ):
        save(other, pixels)
        refused(folder, message)
    save(other, PIXELS[0])
    other.write_bytes(other.read_bytes()[:60])
    refused(folder, "9.png: truncated")
    arrays, x = tmp_path / "a.npz", PIXELS[:10]
    for given, message in (
        (dict(x=x, y=np.arange(10) - 1), "a.npz: y: found class -1, expected 0 or more"),
        (dict(x=x, y=np.zeros(10, int)), "a.npz: y: found 1 class"),
        (dict(x=x, y=np.arange(9)), "a.npz: y: found 9 rows, expected 10"),
        (dict(x=x / np.nan, y=np.arange(10)), "a.npz: x: found .* float64, expected uint8"),
        (dict(x=x, y=np.full(10, np.nan)), "a.npz: y: found .* expected finite values"),
        (dict(x=x, y=np.full((10, 2), 3)), "a.npz: y: found 3 to 3, expected labels 0 or 1"),
        (dict(x=x), r"a.npz: found \['x'\], expected y"),
        (dict(x=x[:5], y=np.arange(5)), "found 5 images for training, expected at least 7"),
    ):
        np.savez(arrays, **given)
        refused(f"npz={arrays}", message)
    (tmp_path / "t.csv").write_text("file,label\na.png,\n")
    refused(f"csv={tmp_path / 't.csv'}", "t.csv: line 2: found an empty cell, expected file, label")
    refused("csv", "data=csv: expected csv=PATH")
