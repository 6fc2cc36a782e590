"""Sets of images by name, IDX files, sizes; the command that scores architectures on them."""

import gzip
import struct

import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.data import images

X = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
Y = np.arange(7, dtype=np.uint8)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(X)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(Y))
    return tmp_path


def test_idx_files_are_read(folder):
    x, y = images.load(f"fashion-mnist={folder}", "test")
    assert x.shape == (7, 28, 28, 1)
    assert (x[..., 0] == X).all()
    assert (y == Y).all()
    assert y.dtype == np.int32


def test_digits_use_the_whole_range():
    x, y = images.load("digits")
    assert x.max() == 255
    assert len(x) == len(y) > 1000


def test_sizes():
    x = X[..., None]
    large, small, same = (images.resized(x, size) for size in (32, 16, 28))
    assert large.shape == (7, 32, 32, 1)
    np.testing.assert_allclose(large[:, 2:30, 2:30], same)
    assert large[:, :2].max() == 0
    np.testing.assert_allclose(small[0, 1, 1, 0], X[0, :2, :2].mean() / 255, rtol=1e-6)
    norm = images.normalised(same)
    assert abs(norm.mean()) < 1e-5
    assert abs(norm.std() - 1) < 1e-5


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"hello", "is no IDX file"), (idx(X)[:-3], r"expected others for an array of shape \[7, 28, 28\]")],
)
def test_broken_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        images.read_idx(path)
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        images.read_idx(path)


def test_what_is_missing_is_named(folder, monkeypatch):
    with pytest.raises(UserError, match="unknown data set 'mnist'"):
        images.load("mnist")
    with pytest.raises(UserError, match="split='valid'"):
        images.load("digits", "valid")
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz: not found, nor without .gz"):
        images.load(f"fashion-mnist={folder}")
    monkeypatch.setattr(images, "DEBIAN", folder / "none")
    with pytest.raises(UserError, match="install dataset-fashion-mnist or give --data fashion-mnist=DIR"):
        images.load("fashion-mnist")


def test_the_command_shows_the_best_cells(capsys):
    options = ["--num", "6", "--images", "8", "--channels", "4", "--top", "2"]
    assert cli.main(["architectures", "search", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (line.split() for line in lines[1:3])
    assert float(first[0]) >= float(second[0])
    assert cli.main(["architectures", "score", first[2], *options]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == first[1:]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["score"], "architectures score: expected cells"),
        (["search", "--num", "0"], "--num 0: expected"),
        (["search", "--images", "100000"], "--images 100000: expected 1 to"),
        (["search", "--size", "10"], "--size 10: expected a multiple of 4"),
        (["score", "|x~0|"], "cell '|x~0|': expected"),
    ],
)
def test_the_command_refuses_in_one_line(argv, message, capsys):
    assert cli.main(["architectures", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
