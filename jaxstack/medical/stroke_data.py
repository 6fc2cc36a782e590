"""CT scans with labels of strokes: phantoms, or a folder of scans with a table; prepared as halves of the head."""

import contextlib
import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.medical.head_ct import VIEW_MM, prepare
from jaxstack.medical.multilabel import check_patients, stratified_patient_split
from jaxstack.medical.phantoms_ct import SIDES, SIZES, TABLE, Design, ct_set, gap_mm, rows
from jaxstack.medical.phantoms_ct import VIEW_MM as DRAWN_MM
from jaxstack.medical.volumes import Volume, read_volume, scan_paths

PARTS = ("train", "valid", "test")
LABELS = ("side", "old", "size", "atrophy", "calcified")
SIDE, OLD, SIZE, ATROPHY, CALCIFIED = range(5)
"""Columns of `Scans.labels`."""
FACTORS = ("size", "number", "timing", "old", "calcified", "atrophy", "background")
"""Columns of a table by which accuracy is told."""
UNKNOWN = -1


class Scans(NamedTuple):
    """Prepared scans."""

    halves: np.ndarray
    """[M, 2, T, S, S / 2] uint8: left and right, as `jaxstack.medical.head_ct.prepare` gives them; with jitter more
    slices."""
    labels: np.ndarray
    """[M, 5] int8, see `LABELS`; -1 where the table says nothing. Sides: 0 none, 1 left, 2 right, 3 both."""
    patients: np.ndarray
    """[M] text."""
    factors: dict[str, np.ndarray]
    """Name -> [M] text."""

    def part(self, chosen: np.ndarray) -> "Scans":
        """Those that are chosen."""
        factors = {name: values[chosen] for name, values in self.factors.items()}
        return Scans(self.halves[chosen], self.labels[chosen], self.patients[chosen], factors)


def labelled(table: Sequence[dict[str, str]], where: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Labels [M, 5], patients [M] and factors (see `Scans`) of the rows of a table. Raises `UserError`."""
    labels = np.array([_labels(row, f"{where}: {row['file']}") for row in table], np.int8)
    factors = {}
    for name in FACTORS:
        values = [row.get(name) or "" for row in table]
        if name == "atrophy":
            values = [{1: "yes", 0: "no"}.get(int(k), "") for k in labels[:, ATROPHY]]
        if any(values):
            factors[name] = np.array([v or "unknown" for v in values])
    return labels, np.array([row.get("patient") or row["file"] for row in table]), factors


def _labels(row: dict[str, str], where: str) -> list[int]:
    def choice(name: str, options: Sequence[str]) -> int:
        text = (row.get(name) or "").strip()
        if text and text not in options:
            raise UserError(f"{where}: {name}: found {text!r}, expected one of {', '.join(options)}")
        return options.index(text) if text else UNKNOWN

    side = choice("side", SIDES)
    if side == UNKNOWN:
        raise UserError(f"{where}: side: found nothing, expected one of {', '.join(SIDES)}")
    text, atrophy = (row.get("atrophy") or "").strip(), UNKNOWN
    if text:
        try:
            atrophy = int(float({"yes": "1", "no": "0"}.get(text, text)) > 0)
        except ValueError:
            raise UserError(f"{where}: atrophy: found {text!r}, expected yes, no or a degree") from None
    return [side, choice("old", SIDES), choice("size", SIZES), atrophy, choice("calcified", ("no", "yes"))]


@lru_cache(16)
def phantom_scans(seed: int, count: int, slices: int, size: int, design: Design = Design(), jitter: int = 0) -> Scans:
    """Prepared phantoms of a seed; `slices` and `size` take the place of the design's, with `jitter` they have so many
    slices more at both ends. Scans that cannot be prepared, about one in a thousand whose mid-line is not found, are
    left out."""
    drawn = slices + 2 * jitter
    made = ct_set(seed, count, design._replace(slices=drawn, size=size))
    spacing = (float(gap_mm(drawn)), DRAWN_MM / size, DRAWN_MM / size)
    halves, table = [], []
    for hu, row in zip(made.hu, rows(made, [f"{i}" for i in range(count)])):
        with contextlib.suppress(UserError):
            volume = Volume(hu.astype(np.float32), spacing, "")
            halves.append(prepare(volume, slices, size, jitter=jitter).halves)
            table.append(dict(zip(TABLE, row)))
    return Scans(np.stack(halves), *labelled(table, "phantoms"))


def read_scans_table(path: Path) -> list[dict[str, str]]:
    """Rows of a table with the columns file and side. Raises `UserError`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{path}: cannot be read ({reason}); expected a table of file, patient, side") from e
    if not table or not {"file", "side"} <= set(table[0]):
        found = ", ".join(map(str, table[0])) if table else "none"
        raise UserError(f"{path}: found columns {found}, expected file, side and, as far as known, patient, split, ...")
    names = [row["file"] or "" for row in table]
    for line, name in enumerate(names, 2):
        if not name:
            raise UserError(f"{path}: line {line}: file: found nothing, expected a name")
        if names.index(name) != line - 2:
            raise UserError(f"{path}: line {line}: file: found {name} a second time")
    return table


@lru_cache(2)
def read_folder(
    folder: str, slices: int, size: int, view_mm: float = VIEW_MM, seed: int = 0, jitter: int = 0
) -> tuple[Scans, np.ndarray]:
    """Scans of a folder and [M] the part of each: 0 train, 1 valid, 2 test.

    Args:
        folder: with scans.csv: columns file (NIfTI, or a folder of a DICOM series; relative to the folder), side (none,
            left, right, both: the patient's) and, as far as known, patient (default: the file), old (sides of old
            strokes), size (none, S, M, L), number, timing, atrophy, calcified (no, yes), background, and split (train,
            valid, test; default: 70, 15 and 15% of the patients, stratified by side).
        slices: chosen from each, T.
        size: pixels of a side, S.
        view_mm: the side.
        seed: of the split.
        jitter: see `jaxstack.medical.head_ct.prepare`.

    Raises:
        UserError: for a broken table or file, a row without a scan or the reverse, a patient in two parts, or too few
            patients. A scan that cannot be prepared (few slices, no brain, tilt) is left out, and its reason printed.
    """
    root = Path(folder)
    path = root / "scans.csv"
    table = read_scans_table(path)
    labels, patients, factors = labelled(table, str(path))
    if any(row.get("split") for row in table):
        names = [row.get("split") for row in table]
        for line, name in enumerate(names, 2):
            if name not in PARTS:
                raise UserError(f"{path}: line {line}: split: found {name!r}, expected {', '.join(PARTS)}")
        check_patients(patients, names, f"{path}: split")
        part = np.array([PARTS.index(name) for name in names if name])
    else:
        side = labels[:, SIDE]
        part = stratified_patient_split(patients, np.stack([side & 1, side & 2], 1) > 0, seed=seed)
    for row in table:
        if not (root / row["file"]).exists():
            raise UserError(f"{root / row['file']}: not found, named in {path}")
    rowed = {(root / row["file"]).resolve() for row in table}
    if alone := [p for p in scan_paths([root]) if p.resolve() not in rowed]:
        raise UserError(
            f"{alone[0]}: found no row in {path} (and for {len(alone) - 1} more scans), expected one for each"
        )
    halves, kept = [], []
    for i, row in enumerate(table):
        at = root / row["file"]
        volume = read_volume(at)
        try:
            halves.append(prepare(volume, slices, size, view_mm, jitter=jitter).halves)
            kept.append(i)
        except UserError as e:
            print(f"{at}: {e}, left out", flush=True)  # noqa: T201 - what is not learned from matters
    if not kept:
        raise UserError(f"{folder}: found no scan that can be prepared, expected many")
    factors = {name: values[kept] for name, values in factors.items()}
    return Scans(np.stack(halves), labels[kept], patients[kept], factors), part[kept]
