"""What commands on folders of images share: names for their pictures, a table with a row for each file, run.yaml."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxstack.core.errors import UserError

SAVE_SECONDS = 5.0
"""Between two saves of a table that is being filled."""


def names(files: Sequence[Path]) -> list[str]:
    """A name for each file's pictures: its stem, numbered where several would have the same; of "eye.vol#3" it is
    "eye-3"."""
    from jaxstack.medical.io import frame_of

    taken: set[str] = set()
    found = []
    for path in files:
        file, frame = frame_of(path)
        stem = file.stem if frame is None else f"{file.stem}-{frame}"
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
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


def save_picture(picture: Any, path: Path) -> None:
    """Write a PNG at zlib's fastest level: a fifth of the time of the usual one, which would cost as much as a network
    does, for somewhat larger files."""
    picture.save(path, compress_level=1)


class Session(NamedTuple):
    """A call of a command on a folder: what its folder of results is told, and what it has already."""

    out: Path
    options: dict[str, Any]
    known: dict[str, dict[str, Any]]
    """Rows by file that an earlier call wrote."""

    def store(self, **more: Any) -> None:
        """Write run.yaml with the options, the environment and `more`."""
        import yaml

        from jaxstack.core import rundir
        from jaxstack.core.files import write_whole

        about = {"options": self.options, "environment": rundir.environment()} | more
        write_whole(self.out / "run.yaml", yaml.safe_dump(about, sort_keys=False))


def check_out(out: Path, given: str, resume: bool) -> None:
    """Raise `UserError` where --out is there already, holds something and is not continued."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not resume:
        raise UserError(f"--out {given}: exists and is not an empty folder; --resume continues in it")


def begun(
    given: str,
    options: dict[str, Any],
    command: str,
    resume: bool,
    folders: Sequence[str] = ("overlays",),
    columns: Sequence[str] | None = None,
) -> Session:
    """Open the folder of a command's results: make it, read what it has, write run.yaml.

    Args:
        given: --out, as the user typed it.
        options: what results depend on; a call that resumes must have the same.
        command: its name, for messages.
        resume: whether the call continues an earlier one.
        folders: of pictures, that are made.
        columns: of its table; None: any.

    Raises:
        UserError: for a folder that holds something and is not continued, or of other options.
    """
    out = Path(given)
    check_out(out, given, resume)
    session = Session(out, options, done(out, options, command, columns) if resume else {})
    for folder in ("", *folders):
        (out / folder).mkdir(parents=True, exist_ok=True)
    session.store(status="running")
    return session


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; gives what moves it on."""
    import sys

    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def parquet(out: Path) -> None:
    """The table out/results.csv once more as results.parquet, where pyarrow is installed."""
    import importlib.util

    if importlib.util.find_spec("pyarrow") is not None:
        import pandas as pd

        pd.read_csv(out / "results.csv").to_parquet(out / "results.parquet", index=False)


def write_table(
    files: Sequence[Path],
    session: Session,
    measure: Callable[[Path], dict[str, Any]],
    beside: str = "",
) -> int:
    """Write results.csv, one row per file with its status, and print how many files were measured.

    The table is saved every few seconds, so that a call that is killed can be continued.

    Args:
        files: what is measured, in this order.
        session: of the call; rows that it knows are not measured again.
        measure: file -> its columns. A `UserError` makes the file a skipped row with its reason.
        beside: what else the folder holds, for the printed line.

    Returns:
        Exit code: 0 unless no file could be measured.
    """
    import pandas as pd

    from jaxstack.core.files import write_whole

    out, saved = session.out, time.monotonic()
    rows: list[dict[str, Any]] = []
    # objects, so that whole numbers stay whole beside rows without any
    save = lambda: write_whole(out / "results.csv", pd.DataFrame(rows, dtype=object).to_csv(index=False))
    with progress("files", len(files)) as advance:
        try:
            for path in files:
                row: dict[str, Any] = {"file": str(path), "status": "ok", "reason": ""}
                try:
                    row |= session.known[str(path)] if str(path) in session.known else measure(path)
                except UserError as e:
                    row |= {"status": "skipped", "reason": str(e).removeprefix(f"{path}: ")}
                    print(f"{path}: {row['reason']}, skipped")
                rows.append(row)
                advance(1)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            # also of a call that is interrupted
            save()
    parquet(out)
    good = sum(row["status"] == "ok" for row in rows)
    session.store(status="finished", files=len(files), measured=good)
    print(f"{good} of {len(files)} files: {out / 'results.csv'}{beside}")
    return 0 if good else 2


def lost_rows(table: str | None, missing: Sequence[str]) -> None:
    """Print the rows of a table that have no file among those that are given."""
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        print(f"{table}: {len(missing)} rows without a file: {', '.join(sorted(missing)[:5])}{more}")


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
