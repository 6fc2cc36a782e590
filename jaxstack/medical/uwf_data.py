"""Ultra-widefield images as the methods take them: aligned as left eyes, with labels and patients, in parts."""

import csv
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.medical.fundus import read_pixels, read_table
from jaxstack.medical.multilabel import check_patients, stratified_patient_split
from jaxstack.medical.phantoms_uwf import LABELS, aligned, uwf_set

PARTS = ("train", "valid", "test")


class Eyes(NamedTuple):
    """Images of one part, aligned as left eyes."""

    images: np.ndarray
    """[M, H, W, 2] uint8."""
    labels: np.ndarray
    """[M, 8] bool."""
    patients: np.ndarray
    """[M]."""


def phantom_eyes(seed: int, count: int, size: tuple[int, int]) -> Eyes:
    """Phantoms of a seed, aligned."""
    eyes = uwf_set(seed, count, size)
    return Eyes(aligned(eyes.images, eyes.right), eyes.labels, eyes.patients)


def read_uwf(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """Red and green of an image, [H, W, 2] uint8: resized to fit into `size` with its aspect, black around.

    Raises:
        UserError: for a file that is no image or broken; the message names it.
    """
    pixels = read_pixels(path)[..., :2]
    height, width = size
    by = min(height / pixels.shape[0], width / pixels.shape[1])
    rows, columns = (max(1, min(round(by * n), most)) for n, most in zip(pixels.shape, size))
    channels = [
        Image.fromarray(np.ascontiguousarray(c)).resize((columns, rows), Image.Resampling.BILINEAR)
        for c in np.moveaxis(pixels, -1, 0)
    ]
    out = np.zeros((height, width, 2), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    out[top : top + rows, left : left + columns] = np.stack([np.asarray(c) for c in channels], -1)
    return out


class Row(NamedTuple):
    """What a table says about an image."""

    path: Path
    patient: str
    right: bool
    labels: tuple[bool, ...] | None
    """None where the table has no labels."""
    split: str


def read_labels(path: str | Path, need_labels: bool = True) -> list[Row]:
    """Rows of a CSV file with the columns file, laterality (L or R) and, as far as there are, patient (default: the
    file), the eight labels (0 or 1) and split.

    Args:
        path: the table; files are relative to its folder.
        need_labels: refuse a table without the labels.

    Raises:
        UserError: for a missing table, missing columns or other entries, naming line and column.
    """
    path = Path(path)
    rows = []
    for line, file, text in read_table(path.parent, path.name, "laterality"):
        where = f"{path}: line {line}"
        if text not in ("L", "R"):
            raise UserError(f"{where}: laterality: found {text!r}, expected L or R")
        rows.append((where, file, text == "R"))
    with open(path, newline="") as opened:
        table = list(csv.DictReader(opened))
    missing = [name for name in LABELS if name not in table[0]]
    if missing and (need_labels or len(missing) < len(LABELS)):
        raise UserError(f"{path}: found no column {missing[0]}, expected {', '.join(LABELS)}")
    found = []
    for (where, file, right), entries in zip(rows, table):
        labels = None
        if not missing:
            for name in LABELS:
                if entries[name] not in ("0", "1"):
                    raise UserError(f"{where}: {name}: found {entries[name]!r}, expected 0 or 1")
            labels = tuple(entries[name] == "1" for name in LABELS)
        split = entries.get("split") or ""
        if split not in ("", *PARTS):
            raise UserError(f"{where}: split: found {split!r}, expected train, valid, test or nothing")
        found.append(Row(file, entries.get("patient") or file.name, right, labels, split))
    return found


@lru_cache(2)
def read_folder(folder: str, size: tuple[int, int], seed: int) -> dict[str, Eyes]:
    """The parts of a folder with labels.csv, by the column split where it is given, else 70, 15 and 15% of the
    patients, stratified.

    Raises:
        UserError: for a broken table or image, a patient in two parts, or an empty part.
    """
    table = Path(folder) / "labels.csv"
    rows = read_labels(table)
    labels = np.array([row.labels for row in rows], bool)
    patients = np.array([row.patient for row in rows])
    if all(row.split for row in rows):
        part = np.array([PARTS.index(row.split) for row in rows])
        check_patients(patients, [row.split for row in rows], f"{table}: split")
    else:
        part = stratified_patient_split(patients, labels[:, :-1], seed=seed)
    for i, name in enumerate(PARTS[:2]):
        if not (part == i).any():
            raise UserError(f"{table}: found no images for {name} among {len(rows)}, expected more patients")
    right = np.array([row.right for row in rows])
    images = aligned(np.stack([read_uwf(row.path, size) for row in rows]), right)
    return {name: Eyes(images[part == i], labels[part == i], patients[part == i]) for i, name in enumerate(PARTS)}
