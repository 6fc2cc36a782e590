"""Samples of trajectories, such as forecasts and what was observed, from NPZ and CSV files.

NPZ: `values` [N, M, L, d], M trajectories for each of N conditions, or [M, L, d]; NaN is a missing number. Optional are
`times` and `mask` (True: present), of any shape that broadcasts to [N, M, L].
CSV: a row for each stamp, with the columns `time`, optionally `condition` and `sample`, and a column for each variable.
"""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxstack.core.errors import UserError


class Trajectories(NamedTuple):
    """Trajectories, equally many for each condition (a forecast's origin, a case); see `trajectories`."""

    values: Float[np.ndarray, "n m l d"]
    """0 where missing."""
    times: Float[np.ndarray, "n m l"]
    """Stamps; they increase where they are present."""
    mask: Bool[np.ndarray, "n m l"]
    """True where a stamp is present."""
    conditions: tuple[str, ...] = ()
    """Names of the N conditions; empty where all trajectories are of one law, N = 1."""
    variables: tuple[str, ...] = ()
    """Names of the d variables."""
    numbered: bool = False
    """The names of the conditions are their numbers."""


def trajectories(
    values: Any,
    times: Any = None,
    mask: Any = None,
    conditions: tuple[str, ...] | None = None,
    variables: tuple[str, ...] | None = None,
    source: str = "values",
) -> Trajectories:
    """Check arrays of trajectories.

    Args:
        values: [N, M, L, d], or [M, L, d] for trajectories of one law. A stamp with a number that is NaN is missing.
        times: Stamps that broadcast to [N, M, L]; default: 0, 1, ...
        mask: True where a stamp is present, likewise; default: everywhere.
        conditions: N names; default: numbers.
        variables: d names; default: numbers.
        source: The file, for errors.

    Raises:
        UserError: For shapes that do not fit, infinite numbers, a trajectory without a stamp, or stamps that do not
            increase.
    """
    try:
        values = np.asarray(values, np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"{source}: values: expected numbers in rows of one length") from e
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise UserError(f"{source}: values: found shape {list(values.shape)}, expected [N, M, L, d] or [M, L, d]")
    one_law = values.ndim == 3
    values = values[None] if one_law else values
    shape = values.shape[:3]

    def spread(what: str, given: Any, dtype: Any) -> np.ndarray:
        try:
            return np.broadcast_to(np.asarray(given, dtype), shape).copy()
        except (TypeError, ValueError) as e:
            found = f"found shape {list(np.shape(given))}, " if np.size(given) else ""
            raise UserError(f"{source}: {what}: {found}expected {list(shape[one_law:])}") from e

    stamps = spread("times", np.arange(shape[2]) if times is None else times, np.float64)
    present = spread("mask", True if mask is None else mask, bool)
    if np.isinf(values[present]).any():
        raise UserError(f"{source}: values: found infinite numbers")
    present &= ~np.isnan(values).any(-1)
    if not present.any(-1).all():
        n, m = np.argwhere(~present.any(-1))[0]
        raise UserError(f"{source}: trajectory {m}{'' if one_law else f' of condition {n}'} has no stamp")
    if not np.isfinite(stamps[present]).all():
        raise UserError(f"{source}: times: found a stamp that is not finite")
    highest = np.maximum.accumulate(np.where(present, stamps, -np.inf), -1)
    if not (stamps[..., 1:] > highest[..., :-1])[present[..., 1:]].all():
        raise UserError(f"{source}: times: found stamps that do not increase along a trajectory")
    names = () if one_law else tuple(conditions or map(str, range(shape[0])))
    variables = tuple(variables or (f"x{i}" for i in range(values.shape[3])))
    if len(names) not in (0, shape[0]) or len(set(names)) < len(names):
        raise UserError(f"{source}: conditions: expected {shape[0]} different names, found {len(names)}")
    values = np.where(present[..., None], values, 0.0)
    return Trajectories(values, stamps, present, names, variables, numbered=not one_law and not conditions)


def read_trajectories(path: str | Path) -> Trajectories:
    """Read a file of trajectories; the format is told by its ending (see this module).

    Raises:
        UserError: For a file that is not there, or not such a file.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".csv"):
        raise UserError(f"{path}: found a name ending in {path.suffix!r}, expected .npz or .csv")
    if not path.is_file():
        raise UserError(f"{path}: not found")
    return _npz(path) if path.suffix == ".npz" else _csv(path)


def _npz(path: Path) -> Trajectories:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as e:
        raise UserError(f"{path}: not a readable NPZ file ({' '.join(str(e).split())[:120]})") from e
    known = ("values", "times", "mask")
    if "values" not in arrays or set(arrays) - set(known):
        raise UserError(f"{path}: found arrays {', '.join(sorted(arrays)) or 'none'}, expected values, times and mask")
    return trajectories(**arrays, source=str(path))


def _csv(path: Path) -> Trajectories:
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype={"condition": str, "sample": str})
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable CSV file ({' '.join(str(e).split())[:120]})") from e
    names = [str(c) for c in table.columns if c not in ("condition", "sample", "time")]
    if "time" not in table.columns or not names or not len(table):
        columns = ", ".join(map(str, table.columns)) or "none"
        raise UserError(f"{path}: found columns {columns}, expected time, variables and, if need be, condition, sample")
    for name in ("time", *names):
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UserError(f"{path}: column {name!r}: found a text, expected numbers")
    keys = [k for k in ("condition", "sample") if k in table.columns]
    for key in keys:
        if table[key].isna().to_numpy().any():
            raise UserError(f"{path}: column {key!r}: found an empty field")
    if table["time"].isna().to_numpy().any():
        raise UserError(f"{path}: column 'time': found an empty field")
    if table.duplicated([*keys, "time"]).to_numpy().any():
        row = table[table.duplicated([*keys, "time"])].iloc[0]
        where = "".join(f"{k} {row[k]}, " for k in keys)
        raise UserError(f"{path}: {where}time {row['time']:g}: found two rows, expected one")
    whole = {k: table[k] if k in keys else pd.Series("0", table.index) for k in ("condition", "sample")}
    found: dict[str, list[pd.DataFrame]] = {}
    for condition, part in table.assign(**whole).groupby("condition", sort=False):
        found[str(condition)] = [rows.sort_values("time") for _, rows in part.groupby("sample", sort=False)]
    counts = {name: len(group) for name, group in found.items()}
    if len(set(counts.values())) > 1:
        (a, n), *rest = counts.items()
        b, m = next((b, m) for b, m in rest if m != n)
        raise UserError(f"{path}: condition {b}: found {m} samples, expected {n}, as of condition {a}")
    shape = (len(found), len(next(iter(found.values()))), max(len(rows) for group in found.values() for rows in group))
    values, times, mask = np.zeros((*shape, len(names))), np.zeros(shape), np.zeros(shape, bool)
    for n, group in enumerate(found.values()):
        for m, rows in enumerate(group):
            values[n, m, : len(rows)] = rows[names].to_numpy(np.float64)
            times[n, m, : len(rows)] = rows["time"]
            mask[n, m, : len(rows)] = True
    if "condition" in keys:
        return trajectories(values, times, mask, tuple(found), tuple(names), str(path))
    return trajectories(values[0], times[0], mask[0], None, tuple(names), str(path))


def aligned(sets: tuple[Trajectories, ...]) -> tuple[Trajectories, ...]:
    """Put trajectories of the same conditions on common stamps: those of a condition that any of its trajectories has.

    Returns:
        The sets with equal `times` in a condition, padded by its last stamp; what a trajectory lacks is masked.
    """
    count = len(sets[0].values)
    grids = [np.unique(np.concatenate([s.times[n][s.mask[n]] for s in sets])) for n in range(count)]
    length = max(map(len, grids))
    out = []
    for s in sets:
        shape = (*s.values.shape[:2], length)
        values, mask = np.zeros((*shape, s.values.shape[3])), np.zeros(shape, bool)
        times = np.stack([np.pad(g, (0, length - len(g)), mode="edge") for g in grids])
        for n, grid in enumerate(grids):
            m, l = np.nonzero(s.mask[n])
            at = np.searchsorted(grid, s.times[n][m, l])
            values[n, m, at], mask[n, m, at] = s.values[n][m, l], True
        out.append(s._replace(values=values, times=np.broadcast_to(times[:, None], shape), mask=mask))
    return tuple(out)
