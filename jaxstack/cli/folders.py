"""What commands on folders of images share: names for their pictures, and a table with a row for each file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxstack.core.errors import UserError


def names(files: Sequence[Path]) -> list[str]:
    """A name for each file's pictures: its stem, numbered where several files would have the same."""
    taken: set[str] = set()
    found = []
    for path in files:
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        found.append(name)
    return found


def write_table(files: Sequence[Path], out: Path, measure: Callable[[Path], dict[str, Any]], beside: str = "") -> int:
    """Write out/results.csv, one row per file with its status, and print how many files were measured.

    Args:
        files: what is measured, in this order.
        out: a folder, made where it is missing.
        measure: file -> its columns. A `UserError` makes the file a skipped row with its reason.
        beside: what else the folder holds, for the printed line.

    Returns:
        Exit code: 0 unless no file could be measured.
    """
    import pandas as pd

    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in files:
        row: dict[str, Any] = {"file": str(path), "status": "ok", "reason": ""}
        try:
            row |= measure(path)
        except UserError as e:
            row |= {"status": "skipped", "reason": str(e).removeprefix(f"{path}: ")}
            print(f"{path}: {row['reason']}, skipped")
        rows.append(row)
    pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    good = sum(row["status"] == "ok" for row in rows)
    print(f"{good} of {len(files)} files: {out / 'results.csv'}{beside}")
    return 0 if good else 2
