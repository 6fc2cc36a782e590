"""What a benchmark leaves behind: rows with the command, date, versions and machine that made them, as JSON."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "jaxmarl", "gymnax", "brax", "numpy")


def cpu() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def installed(package: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows that `path` holds; none where there is no such file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write `rows` and `facts` to `path`, whose folder is made."""
    report = {
        # paths are machine-specific
        "command": [Path(a).name if Path(a).is_absolute() else a for a in sys.argv],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {p: version for p in PACKAGES if (version := installed(p))},
        "machine": {"cores": os.cpu_count(), "cpu": cpu(), "platform": platform.platform()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **facts,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
