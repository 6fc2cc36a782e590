"""A run's directory.

run.yaml        agent, config, seeds, run options: what `resume` needs
run.json        command, versions, device, git commit, start, status
metrics.jsonl   one line a step and seed; pandas.read_json(path, lines=True, precise_float=True) reads it to the bit
ledger.json     compiles
checkpoints/    orbax, with checksums/ beside it
"""

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import yaml

from jaxstack.core.errors import UserError

Row = dict[str, Any]


class RunDir:
    """An open, locked run directory. Two processes cannot hold the same one."""

    def __init__(self, path: Path, lock: IO):
        self.path, self._lock = path, lock

    @staticmethod
    def check(path: str | Path) -> Path:
        """`path` if a new run may be made there; raises `UserError` if it has content already."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"run directory {path}: is a file")
        if (path / "run.yaml").exists():
            raise UserError(f"run directory {path}: holds a run already; `jaxstack resume {path}` continues it")
        if path.is_dir() and any(p.name != ".lock" for p in path.iterdir()):
            raise UserError(f"run directory {path}: is not empty and not a run; choose another")
        return path

    @classmethod
    def create(cls, path: str | Path, plan: dict[str, Any]) -> "RunDir":
        """A new directory for `plan`; raises `UserError` if it has content, is in use or cannot be written."""
        path = cls.check(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"run directory {path}: cannot be written ({e.strerror})") from e
        run = cls(path, _lock(path))
        try:
            cls.check(path)  # another process may have been faster
            run._write("run.yaml", yaml.safe_dump(plan, sort_keys=False))
            run.status("running", **environment())
        except BaseException as e:
            run.close()
            if isinstance(e, OSError):
                raise UserError(f"run directory {path}: cannot be written ({e.strerror})") from e
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """An existing run; raises `UserError` if it is none or in use."""
        path = Path(path)
        if not (path / "run.yaml").exists():
            raise UserError(f"run directory {path}: no run found (run.yaml is missing)")
        return cls(path, _lock(path))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def append(self, rows: list[Row]) -> None:
        """Append metric rows; non-finite numbers become null. Raises `UserError` when the disk is full."""
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(_clean(row)) + "\n" for row in rows))
        except OSError as e:
            raise UserError(f"{self.path}/metrics.jsonl: cannot be written ({e.strerror})") from e

    def cut(self, step: int) -> list[Row]:
        """Drop metric lines after `step` and a torn last line, which a resumed run writes again; returns the others."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        keep, rows = [], []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                early = row["step"] <= step
            except (ValueError, KeyError, TypeError):
                continue
            if early:
                keep.append(line + "\n")
                rows.append({k: math.nan if v is None else v for k, v in row.items()})
        self._write("metrics.jsonl", "".join(keep))
        return rows

    def status(self, status: str, **facts: Any) -> None:
        """Update run.json."""
        path = self.path / "run.json"
        try:
            old = json.loads(path.read_text())
        except (OSError, ValueError):
            old = {}
        self._write("run.json", json.dumps(old | facts | {"status": status}, indent=1))

    def write_json(self, name: str, content: Any) -> None:
        self._write(name, json.dumps(content, indent=1))

    def close(self) -> None:
        self._lock.close()

    def _write(self, name: str, text: str) -> None:
        """Replace a file whole, so that no reader and no crash sees half of it."""
        part = self.path / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self.path / name)


def read_plan(path: str | Path) -> dict[str, Any]:
    """run.yaml of a run directory; raises `UserError` when it is missing or corrupt."""
    file = Path(path) / "run.yaml"
    if not file.exists():
        raise UserError(f"run directory {path}: no run found (run.yaml is missing)")
    try:
        plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(e).split())[:200]}") from e
    if not isinstance(plan, dict) or not {"agent", "config", "seeds"} <= set(plan):
        raise UserError(f"{file}: expected the fields agent, config and seeds")
    return plan


def read_metrics(path: str | Path) -> Any:
    """metrics.jsonl as a pandas frame; raises `UserError` when there is none."""
    import pandas as pd

    file = Path(path) / "metrics.jsonl"
    if not file.exists() or not file.stat().st_size:
        raise UserError(f"run directory {path}: no metrics found (metrics.jsonl is missing or empty)")
    # pandas' default parser is off by an ulp now and then
    return pd.read_json(file, lines=True, precise_float=True)


def environment() -> dict[str, Any]:
    """Command, versions, device, git commit and time of this process."""
    from importlib.metadata import PackageNotFoundError, version

    import jax

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    device = jax.devices()[0]
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {n: of(n) for n in ("jaxstack", "jax", "jaxlib", "flax", "optax", "numpy")}
        | {"python": platform.python_version()},
        "device": f"{device.platform} {device.device_kind} x{jax.device_count()}",
        "cores": os.cpu_count(),
        "git_commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    try:
        out = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        return out.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _lock(path: Path) -> IO:
    try:
        lock = open(path / ".lock", "w")  # noqa: SIM115 - held as long as the run
    except OSError as e:
        raise UserError(f"run directory {path}: cannot be written ({e.strerror})") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"run directory {path}: in use by another process") from None
    return lock


def _clean(row: Row) -> Row:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
