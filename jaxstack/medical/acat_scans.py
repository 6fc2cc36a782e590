"""Scans that ACAT learns from: phantoms of CT, or volumes with a table or in the folders healthy/ and lesion/."""

import csv
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.medical.head_ct import VIEW_MM, WINDOW, prepare, window
from jaxstack.medical.multilabel import stratified_patient_split
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


class Labelled(NamedTuple):
    """Scans of a folder and whose they are."""

    scans: Scans
    patients: np.ndarray
    """[M] of text."""


def read_folder(folder: str | Path, slices: int, size: int, seen: Pair) -> Labelled:
    """Scans of a folder, NIfTI files or folders of DICOM series.

    Args:
        folder: with scans.csv, columns file (relative to the folder), side (none for a healthy scan) and, as far as
            known, patient; or with the folders healthy/ and lesion/, each scan of a patient of its own.
        slices: of each scan.
        size: pixels of a side.
        seen: the window, in HU.

    Raises:
        UserError: for a missing folder, a broken table, too few scans of a class, or one that cannot be read.
    """
    root = Path(folder)
    found = _table(root / "scans.csv") if (root / "scans.csv").is_file() else _classes(root)
    labels = np.array([label for _, label, _ in found], np.int32)
    for label, name in enumerate(CLASSES):
        if (count := int((labels == label).sum())) < FEWEST:
            raise UserError(f"{folder}: found {count} scans of the class {name}, expected at least {FEWEST}")
    images = np.stack([read_scan(path, slices, size, seen).image for path, _, _ in found])
    return Labelled(Scans(images, labels), np.array([patient for _, _, patient in found]))


def _table(table: Path) -> list[tuple[Path, int, str]]:
    """(path, label, patient) of each row."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{table}: cannot be read ({reason}); expected a table of file, side, patient") from e
    if not rows or not {"file", "side"} <= set(rows[0]):
        raise UserError(f"{table}: found columns {', '.join(rows[0]) if rows else 'none'}, expected file, side")
    for line, row in enumerate(rows, 2):
        if not row["file"] or not row["side"]:
            raise UserError(f"{table}: line {line}: found an empty file or side, expected both")
    return [(table.parent / r["file"], int(r["side"] != "none"), r.get("patient") or r["file"]) for r in rows]


def _classes(root: Path) -> list[tuple[Path, int, str]]:
    """(path, label, patient) of each scan in healthy/ and lesion/."""
    found = []
    for label, name in enumerate(CLASSES):
        if not (root / name).is_dir():
            raise UserError(f"{root}: found neither scans.csv nor a folder {name}, expected {' and '.join(CLASSES)}")
        found += [(path, label, str(path)) for path in scan_paths([root / name])]
    return found


@lru_cache(2)
def split_folder(folder: str, slices: int, size: int, seen: Pair, seed: int) -> tuple[Scans, Scans]:
    """Scans of a folder for training and, a tenth of the patients of each class, for validation. Arguments as of
    `read_folder`; `seed` of the choice."""
    scans, patients = read_folder(folder, slices, size, seen)
    valid = stratified_patient_split(patients, scans.labels[:, None] > 0, (0.9, 0.1), seed) == 1
    part = lambda rows: Scans(scans.images[rows], scans.labels[rows])
    return part(~valid), part(valid)
