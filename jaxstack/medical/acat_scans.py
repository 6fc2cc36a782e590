"""Scans that ACAT learns from: phantoms of CT, or volumes in the folders healthy/ and lesion/."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.medical.head_ct import VIEW_MM, WINDOW, prepare, window
from jaxstack.medical.phantoms_ct import Design, ct_set
from jaxstack.medical.volumes import read_volume, scan_paths

Pair = tuple[float, float]
CLASSES = ("healthy", "lesion")
FEWEST = 10
"""Scans of each class in a folder."""


class Scans(NamedTuple):
    """Scans [M, S, N, N] float32 in 0..1 and labels [M] int32, 1 with a lesion."""

    images: np.ndarray
    labels: np.ndarray


class Drawn(NamedTuple):
    """Phantoms and the truth of each."""

    scans: Scans
    lesion: np.ndarray
    """[M, S, N, N] bool."""
    inside: np.ndarray
    """[N, N] bool: brain in most of the slices."""


@lru_cache(4)
def phantoms(
    seed: int,
    count: int,
    slices: int,
    size: int,
    present: float,
    contrast: Pair,
    atrophied: float,
    seen: Pair,
    template: str,
) -> Drawn:
    """CT phantoms of as many people: one lesion of medium size or none, and no other disease.

    The noise is that of 64 pixels of a side, 6 HU, averaged where pixels are larger.

    Args:
        seed: another one gives other people.
        count: M.
        slices: S.
        size: pixels of a side, N.
        present: probability of a lesion.
        contrast: how much darker it is, in HU, from and to.
        atrophied: probability of wider CSF spaces.
        seen: the window, in HU.
        template: see `jaxstack.medical.brain.template`.

    Raises:
        UserError: as `jaxstack.medical.phantoms_ct.ct_set`.
    """
    design = Design(
        slices=slices,
        size=size,
        present=present,
        numbers=(1.0, 0.0, 0.0),
        sizes=(0.0, 1.0, 0.0),
        baseline=contrast,
        follow_up=contrast,
        scans=(1.0,),
        old=0.0,
        calcified=0.0,
        atrophied=atrophied,
        noise=6.0 * min(size / 64, 1.0),
        source=template,
    )
    made = ct_set(seed, count, design)
    within = made.marks > 0
    images = window(made.hu.astype(np.float32), *seen) * within
    return Drawn(Scans(images, (made.side > 0).astype(np.int32)), made.lesion, within.mean((0, 1)) > 0.5)


class Read(NamedTuple):
    """A scan of a file."""

    image: np.ndarray
    """[S, N, N] float32 in 0..1."""
    pixel_mm2: float
    """Area of its pixels."""
    slices: list[int]
    """Which of the volume's these are, from the foot, from 0."""


def read_scan(path: str | Path, slices: int, size: int, seen: Pair) -> Read:
    """Evenly spaced slices of a volume with the mid-line upright, in a square of 230 mm, without what is not brain.

    Args:
        path: a NIfTI file, or a folder of a DICOM series.
        slices: how many, S.
        size: pixels of a side, N.
        seen: the window, in HU, within 0 to 80.

    Raises:
        UserError: naming the path, as `read_volume` and `jaxstack.medical.head_ct.prepare`.
    """
    volume = read_volume(path)
    try:
        found = prepare(volume, slices, size)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    left, right = found.halves
    hu = np.concatenate([left, right[..., ::-1]], -1).astype(np.float32) / 255.0 * (WINDOW[1] - WINDOW[0]) + WINDOW[0]
    return Read(window(hu, *seen), (VIEW_MM / size) ** 2, found.slices)


def read_folder(folder: str | Path, slices: int, size: int, seen: Pair) -> Scans:
    """Scans of a folder with the folders healthy/ and lesion/ of NIfTI files or DICOM series.

    Raises:
        UserError: for a missing folder, too few scans, or one that cannot be read.
    """
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        place = Path(folder) / name
        if not place.is_dir():
            raise UserError(f"{folder}: found no folder {name}, expected {' and '.join(CLASSES)} of CT volumes")
        paths = scan_paths([place])
        if len(paths) < FEWEST:
            raise UserError(f"{place}: found {len(paths)} scans, expected at least {FEWEST}")
        images += [read_scan(path, slices, size, seen).image for path in paths]
        labels += [label] * len(paths)
    return Scans(np.stack(images), np.array(labels, np.int32))


@lru_cache(2)
def split_folder(folder: str, slices: int, size: int, seen: Pair, seed: int) -> tuple[Scans, Scans]:
    """Scans of a folder for training and, every tenth of each class, for validation. Arguments as of `read_folder`;
    `seed` of the choice."""
    whole = read_folder(folder, slices, size, seen)
    rng = np.random.default_rng(seed)
    valid = np.zeros(len(whole.labels), bool)
    for label in range(2):
        valid[rng.permutation(np.flatnonzero(whole.labels == label))[::10]] = True
    part = lambda rows: Scans(whole.images[rows], whole.labels[rows])
    return part(~valid), part(valid)
