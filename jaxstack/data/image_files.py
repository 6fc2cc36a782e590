"""Labelled images in one's own files, as NAME=PATH.

`folder=DIR`: a folder per class, in DIR or in DIR/train and DIR/test. `csv=FILE`: a table with the columns file (beside
the table) and label, or file and several columns of 0 and 1. `npz=FILE`: arrays x and y, or x_train, y_train, x_test
and y_test; integers y [N] are classes, 0 and 1 [N, L] labels, floats [N] or [N, K] values. `idx=DIR`: four files of
MNIST's form. `cifar10=DIR`, `cifar100=DIR`: the binary version. Pictures have 8 bits per channel and one size, are grey
or RGB; among RGB ones grey ones get three equal channels.
"""

import csv
import functools
import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.data.pictures import opened

KINDS = ("folder", "csv", "npz", "idx", "cifar10", "cifar100")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
Task = Literal["classes", "labels", "values"]
"""What is told of an image: its class, several yes-or-no labels, numbers."""
Images = tuple[np.ndarray, np.ndarray]
IDX_TYPES = {
    8: np.uint8,
    9: np.int8,
    11: np.dtype(">i2"),
    12: np.dtype(">i4"),
    13: np.dtype(">f4"),
    14: np.dtype(">f8"),
}


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, as MNIST's, compressed where it ends in .gz. Raises `UserError` for a broken file."""
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as e:
        raise UserError(f"{path}: cannot be read ({e.strerror if isinstance(e, OSError) and e.strerror else e})") from e
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise UserError(f"{path}: is no IDX file")
    kind, ndim = np.dtype(IDX_TYPES[content[2]]), content[3]
    start = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", content[4:start]) if len(content) >= start else ()
    if len(shape) != ndim or len(content) - start != kind.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path}: found {len(content)} bytes, expected others for an array of shape {list(shape)}")
    return np.frombuffer(content, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))


def idx_folder(folder: str | Path, split: str) -> Images:
    """Images [N, H, W, 1] uint8 and labels [N] int32 of a folder of MNIST's form. Raises `UserError`."""
    folder, stem = Path(folder), {"train": "train", "test": "t10k"}[split]
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        names = [folder / f"{stem}-{kind}-ubyte{end}" for end in (".gz", "")]
        there = [n for n in names if n.exists()]
        if not there:
            raise UserError(f"{names[0]}: not found, nor without .gz")
        found.append(read_idx(there[0]))
    x, y = found
    if x.ndim != 3 or y.shape != x.shape[:1]:
        raise UserError(
            f"{folder}: found images {list(x.shape)} and labels {list(y.shape)}, expected [N, H, W] and [N]"
        )
    return x[..., None], y.astype(np.int32)


class Files(NamedTuple):
    """A set that was read."""

    train: Images
    """Images [N, H, W, C] uint8; classes [N] int32, labels [N, L] float32 or values [N, K] float32."""
    test: Images | None
    task: Task
    outputs: int
    """Classes, labels or values."""
    names: tuple[str, ...] = ()
    """Of the classes, where they have some."""


def picture(path: Path) -> np.ndarray:
    """A picture [H, W, 1 or 3] uint8. Raises `UserError` for what is neither grey nor RGB with 8 bits per channel."""
    with opened(path) as image:
        mode = image.mode
        if mode in ("L", "RGB"):
            return np.asarray(image).reshape(image.height, image.width, -1)
        if mode == "1":
            return np.asarray(image.convert("L"))[..., None]
        if mode == "P" and "transparency" not in image.info:
            return np.asarray(image.convert("RGB"))
    found = {"I;16": "16 bits", "I;16B": "16 bits", "I": "32 bits", "F": "floats", "P": "transparency"}.get(mode, mode)
    raise UserError(f"{path}: found {found}, expected grey or RGB with 8 bits per channel")


def pictures(paths: Sequence[Path]) -> np.ndarray:
    """Pictures of one size, [N, H, W, C] uint8. Raises `UserError` naming the one that differs from the first."""
    found = []
    for path in paths:
        found.append(picture(path))
        (rows, columns), (first, second) = found[-1].shape[:2], found[0].shape[:2]
        if (rows, columns) != (first, second):
            raise UserError(f"{path}: found {columns}x{rows} pixels, expected {second}x{first}, as {paths[0].name}")
    channels = max(x.shape[2] for x in found)
    return np.stack([np.broadcast_to(x, (*x.shape[:2], channels)) for x in found])


def _classes(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"folder={folder}: no such folder")
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(found) < 2:
        raise UserError(f"{folder}: expected two folders or more, one for each class, found {len(found)}")
    return found


def _class_folder(folder: Path, names: Sequence[str] | None = None) -> tuple[Images, tuple[str, ...]]:
    each = _classes(folder)
    if names is not None and [p.name for p in each] != list(names):
        raise UserError(
            f"{folder}: found the classes {[p.name for p in each]}, expected those of training, {list(names)}"
        )
    paths, labels = [], []
    for number, one in enumerate(each):
        own = sorted(p for p in one.iterdir() if p.suffix.lower() in SUFFIXES)
        if not own:
            raise UserError(f"{one}: found no pictures, expected {', '.join(SUFFIXES)}")
        paths += own
        labels += [number] * len(own)
    return (pictures(paths), np.array(labels, np.int32)), tuple(p.name for p in each)


def _folder(path: Path) -> Files:
    if not (path / "train").is_dir():
        train, names = _class_folder(path)
        return Files(train, None, "classes", len(names), names)
    train, names = _class_folder(path / "train")
    test = _class_folder(path / "test", names)[0] if (path / "test").is_dir() else None
    return Files(train, _alike(path, train, test), "classes", len(names), names)


def _alike(path: Path, train: Images, test: Images | None) -> Images | None:
    if test is not None and test[0].shape[1:] != train[0].shape[1:]:
        raise UserError(f"{path}: found test images {list(test[0].shape[1:])}, expected {list(train[0].shape[1:])}")
    return test


def _table(path: Path) -> Files:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{path}: cannot be read as a table ({reason})") from e
    columns = [c for c in (rows[0] if rows else {}) if c != "file"]
    if not rows or "file" not in rows[0] or not columns:
        raise UserError(
            f"{path}: found {len(rows)} rows, columns {list(rows[0]) if rows else []}, expected file and label"
        )
    cells = [[row[c] for c in columns] for row in rows]
    for number, (row, own) in enumerate(zip(rows, cells), 2):
        if not row["file"] or any(v in (None, "") for v in own):
            raise UserError(f"{path}: line {number}: found an empty cell, expected file, {', '.join(columns)}")
        if len(columns) > 1 and not set(own) <= {"0", "1"}:
            raise UserError(f"{path}: line {number}: found {own}, expected 0 or 1 in each column")
    x = pictures([path.parent / row["file"] for row in rows])
    if len(columns) > 1:
        return Files((x, np.array(cells, np.float32)), None, "labels", len(columns), tuple(columns))
    names = sorted({own[0] for own in cells})
    if len(names) < 2:
        raise UserError(f"{path}: found 1 class, {names[0]!r}, expected two or more")
    return Files(
        (x, np.array([names.index(own[0]) for own in cells], np.int32)), None, "classes", len(names), tuple(names)
    )


def _targets(path: Path, name: str, y: np.ndarray) -> tuple[np.ndarray, Task]:
    where = f"{path}: {name}"
    if np.issubdtype(y.dtype, np.floating):
        if y.ndim not in (1, 2) or not np.isfinite(y).all():
            raise UserError(f"{where}: found {list(y.shape)} {y.dtype}, expected finite values [N] or [N, K]")
        return y.reshape(len(y), -1).astype(np.float32), "values"
    if y.ndim == 2 and (y.dtype == bool or np.issubdtype(y.dtype, np.integer)):
        if not ((y == 0) | (y == 1)).all():
            raise UserError(f"{where}: found {y.min()} to {y.max()}, expected labels 0 or 1, [N, L]")
        return y.astype(np.float32), "labels"
    if y.ndim == 1 and np.issubdtype(y.dtype, np.integer) and len(y) and y.min() < 0:
        raise UserError(f"{where}: found class {y.min()}, expected 0 or more")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{where}: found {list(y.shape)} {y.dtype}, expected classes [N] from 0, or floats")
    return y.astype(np.int32), "classes"


def _arrays(path: Path) -> Files:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path}: cannot be read as an NPZ file of arrays ({e})") from e
    names = ("x_train", "y_train", "x_test", "y_test") if "x_train" in found else ("x", "y")
    if missing := [n for n in names[:2] if n not in found]:
        raise UserError(f"{path}: found {sorted(found)}, expected {', '.join(missing)}")
    parts, tasks = [], []
    for x_name, y_name in zip(names[::2], names[1::2]):
        if x_name not in found or y_name not in found:
            continue
        x, (y, task) = found[x_name], _targets(path, y_name, found[y_name])
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or not x.size:
            raise UserError(
                f"{path}: {x_name}: found {list(x.shape)} {x.dtype}, expected uint8 [N, H, W] or [N, H, W, C]"
            )
        if len(x) != len(y):
            raise UserError(f"{path}: {y_name}: found {len(y)} rows, expected {len(x)}, one for each image")
        parts.append((x if x.ndim == 4 else x[..., None], y))
        tasks.append(task)
    (x, y), test = parts[0], parts[1] if len(parts) > 1 else None
    _alike(path, parts[0], test)
    outputs = int(y.max()) + 1 if tasks[0] == "classes" else y.shape[1]
    if tasks[0] == "classes" and outputs < 2:
        raise UserError(f"{path}: {names[1]}: found 1 class, expected two or more")
    if test is not None and (tasks[1] != tasks[0] or (tasks[0] == "classes" and test[1].max() >= outputs)):
        raise UserError(f"{path}: y_test: found other classes or targets than in y_train")
    return Files((x, y), test, tasks[0], outputs)


def _idx(path: Path) -> Files:
    train, test = (idx_folder(path, split) for split in ("train", "test"))
    return Files(train, _alike(path, train, test), "classes", int(train[1].max()) + 1)


def _cifar(path: Path, many: bool) -> Files:
    """Rows of one label (two of CIFAR-100: coarse, fine) and 3,072 bytes: red, green and blue planes of 32x32."""
    lead = 2 if many else 1
    names = (
        (["train.bin"], ["test.bin"]) if many else ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"])
    )

    def one(files: Sequence[str]) -> Images:
        tables = []
        for file in (path / name for name in files):
            if not file.is_file():
                raise UserError(f"{file}: not found, expected the binary version of CIFAR-{100 if many else 10}")
            content = np.frombuffer(file.read_bytes(), np.uint8)
            if not len(content) or len(content) % (3072 + lead):
                raise UserError(f"{file}: found {len(content)} bytes, expected rows of {3072 + lead}")
            tables.append(content.reshape(-1, 3072 + lead))
        rows = np.concatenate(tables)
        y = rows[:, lead - 1].astype(np.int32)
        if y.max() >= (100 if many else 10):
            raise UserError(f"{path}: found class {y.max()}, expected 0 to {99 if many else 9}")
        return rows[:, lead:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), y

    train, test = map(one, names)
    return Files(train, test, "classes", 100 if many else 10)


@functools.lru_cache(2)
def read(name: str) -> Files:
    """Read a set KIND=PATH, once per process.

    Raises:
        UserError: for a missing path, files that are broken or do not fit together, or too few images for three parts.
    """
    kind, _, text = name.partition("=")
    if not text:
        raise UserError(f"data={kind}: expected {kind}=PATH")
    path = Path(text).expanduser()
    readers = {"folder": _folder, "csv": _table, "npz": _arrays, "idx": _idx}
    found = readers[kind](path) if kind in readers else _cifar(path, kind == "cifar100")
    least = 7 if found.test is None else 6
    if len(found.train[0]) < least:
        raise UserError(f"{name}: found {len(found.train[0])} images for training, expected at least {least}")
    return found
