"""What commands on folders of images share: names for their pictures, and a table with a row for each file."""

from collections.abc import Callable, Mapping, Sequence
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


def done(
    out: Path, options: dict[str, Any], command: str, columns: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Rows by file that an earlier call of the same options wrote, but for skipped ones.

    Args:
        out: its folder, with run.yaml.
        options: of this call, as run.yaml has them.
        command: its name, for messages.
        columns: of its table; None: any.

    Raises:
        UserError: for other options or columns, or a run.yaml that is none.
    """
    import pandas as pd
    import yaml

    if not (out / "run.yaml").exists():
        return {}
    try:
        old = yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["options"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as e:
        raise UserError(f"{out / 'run.yaml'}: is no record of {command}; choose another --out") from e
    for name, value in options.items():
        if old.get(name) != value:
            raise UserError(f"--resume: {name}: found {value}, expected {old.get(name)} as in {out / 'run.yaml'}")
    if not (out / "results.csv").exists():
        return {}
    frame = pd.read_csv(out / "results.csv", dtype=str, keep_default_na=False)
    if columns is not None and list(frame.columns) != list(columns):
        raise UserError(f"{out / 'results.csv'}: has other columns than {command} writes; choose another --out")
    return {row["file"]: row for row in frame.to_dict("records") if row["status"] == "ok"}


def parquet(out: Path) -> None:
    """The table out/results.csv once more as results.parquet, where pyarrow is installed."""
    import importlib.util

    if importlib.util.find_spec("pyarrow") is not None:
        import pandas as pd

        pd.read_csv(out / "results.csv").to_parquet(out / "results.parquet", index=False)


def write_table(
    files: Sequence[Path],
    out: Path,
    measure: Callable[[Path], dict[str, Any]],
    beside: str = "",
    known: Mapping[str, dict[str, Any]] | None = None,
) -> int:
    """Write out/results.csv, one row per file with its status, and print how many files were measured.

    Args:
        files: what is measured, in this order.
        out: a folder, made where it is missing.
        measure: file -> its columns. A `UserError` makes the file a skipped row with its reason.
        beside: what else the folder holds, for the printed line.
        known: rows by file that are not measured again, as `done` gives them.

    Returns:
        Exit code: 0 unless no file could be measured.
    """
    import pandas as pd

    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        for path in files:
            row: dict[str, Any] = {"file": str(path), "status": "ok", "reason": ""}
            try:
                row |= known[str(path)] if known and str(path) in known else measure(path)
            except UserError as e:
                row |= {"status": "skipped", "reason": str(e).removeprefix(f"{path}: ")}
                print(f"{path}: {row['reason']}, skipped")
            rows.append(row)
    finally:
        # also of a call that is interrupted
        pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    parquet(out)
    good = sum(row["status"] == "ok" for row in rows)
    print(f"{good} of {len(files)} files: {out / 'results.csv'}{beside}")
    return 0 if good else 2


def model_facts(kind: str, path: Path, variables: Any, channels: Sequence[int], seeds: int) -> dict[str, Any]:
    """What run.yaml says about a model; `sha256` is of its numbers, whatever file they come from."""
    import hashlib

    import jax
    import numpy as np

    digest = hashlib.sha256()
    for name, x in sorted((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(variables)):
        digest.update(name.encode() + np.asarray(x).tobytes())
    number = sum(x.size for x in jax.tree.leaves(variables["params"])) // seeds
    facts = {"kind": kind, "name": path.name, "sha256": digest.hexdigest()[:16], "channels": list(channels)}
    return facts | {"parameters": number, "networks": seeds}
