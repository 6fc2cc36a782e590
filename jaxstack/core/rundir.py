"""A run's directory.

run.yaml        agent, config, seeds, run options: what `resume` needs, below its checksum; a copy is in checksums/
run.json        command, versions, device, git commit, start, status
metrics.jsonl   one line per step and seed; pandas.read_json(path, lines=True, precise_float=True) reads it exactly
ledger.json     compiles of the last process
checkpoints/    orbax, with checksums/ beside it
damaged/        whatever was found damaged, or newer than the checkpoint that a resume went on from

A run in groups of seeds (`split_seeds`) has a directory like this for each group, which its run.yaml names, and no
metrics or checkpoints beside them; a method in stages one for each stage.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jaxstack.core import options
from jaxstack.core.errors import UserError
from jaxstack.core.files import free_name, set_aside, write_whole
from jaxstack.core.signals import Interrupted

CHECKSUM = "# sha256 "
FREE = "num_steps or options"
"""What may be changed in a run.yaml: a run continues with it. All else was decided when the run began."""
UNBORN = {".lock", ".run.yaml.part"}
"""What a process leaves behind that was killed before run.yaml existed."""

Row = dict[str, Any]


class RunDir:
    """An open, locked run directory. Two processes cannot hold the same one."""

    def __init__(self, path: Path, lock: IO):
        self.path, self._lock = path, lock
        self._metrics, self._written = hashlib.sha256(), 0

    @staticmethod
    def check(path: str | Path) -> Path:
        """`path` if a new run may be made there; raises `UserError` if it has content already."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"run directory {path}: is a file")
        if (path / "run.yaml").exists():
            raise UserError(f"run directory {path}: holds a run already; `jaxstack resume {path}` continues it")
        if path.is_dir() and any(p.name not in UNBORN for p in path.iterdir()):
            raise UserError(f"run directory {path}: is not empty and not a run; choose another")
        return path

    @classmethod
    def create(cls, path: str | Path, plan: dict[str, Any]) -> "RunDir":
        """A new directory for `plan`; raises `UserError` if it has content, is in use or cannot be written, and where
        no other process could find what the plan names."""
        path = cls.check(path)
        refuse_scripts(plan, f"run directory {path}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"run directory {path}: cannot be written ({e.strerror})") from e
        run = cls(path, _lock(path))
        try:
            cls.check(path)  # another process may have been faster
            text = options.dump(plan)
            text = f"{CHECKSUM}{_sha256(text)} of the lines below; remove this line if you change {FREE}\n{text}"
            write_whole(path / "run.yaml", text)
            (path / "checksums").mkdir(exist_ok=True)
            write_whole(path / "checksums" / "run.yaml", text)
            run.write_json("run.json", environment() | {"status": "running"})
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
        data = "".join(json.dumps(_clean(row)) + "\n" for row in rows).encode()
        try:
            with open(self.path / "metrics.jsonl", "ab") as file:
                file.write(data)
        except OSError as e:
            raise UserError(f"{self.path}/metrics.jsonl: cannot be written ({e.strerror})") from e
        self._metrics.update(data)
        self._written += len(data)

    def mark(self) -> dict[str, Any]:
        """Length and checksum of metrics.jsonl as it was written, stored with a checkpoint."""
        return {"bytes": self._written, "sha256": self._metrics.hexdigest()}

    def damage(self, mark: dict[str, Any] | None) -> str | None:
        """What is wrong with the part of metrics.jsonl that `mark` describes, None if it is as it was written."""
        if not mark or not mark["bytes"]:
            return None
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return "metrics.jsonl is missing"
        with open(path, "rb") as file:
            data = file.read(mark["bytes"])
        if len(data) < mark["bytes"]:
            return "metrics.jsonl ends before it"
        return None if hashlib.sha256(data).hexdigest() == mark["sha256"] else "metrics.jsonl is damaged before it"

    def cut(self, step: int, mark: dict[str, Any] | None = None) -> list[Row]:
        """Drop metric lines after `step` and a torn last line, which a resumed run writes again; returns the others.

        Where lines up to `step` (or `mark`, of its checkpoint) are damaged, those that can be read are kept, and the
        file as it was goes to `damaged/`. Raises `UserError` when the disk is full.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        parsed = [_parse(line) for line in lines]
        rows = [row for row in parsed if row is not None and row["step"] <= step]
        good = [row is not None and row["step"] <= step for row in parsed]
        end = len(good) - good[::-1].index(True) if rows else 0
        kept = b"".join(line for line, ok in zip(lines, good) if ok)
        try:
            if not all(good[:end]) or (lines and self.damage(mark)):
                copy = shutil.copyfile(path, free_name(path, self.path / "damaged"))
                lost = f", {good[:end].count(False)} of them lost" if not all(good[:end]) else ""
                _say(f"{path}: lines up to step {step} are damaged{lost}; the file as it was is in {copy}")
                write_whole(path, kept.decode())
            elif end < len(lines):
                os.truncate(path, len(kept))
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror})") from e
        self._metrics, self._written = hashlib.sha256(kept), len(kept)
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]

    def status(self, status: str, **facts: Any) -> None:
        """Update run.json; a damaged one is set aside and begun anew. Raises `UserError` when the disk is full."""
        path = self.path / "run.json"
        try:
            old = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            aside = f" (moved to {set_aside(path, self.path / 'damaged')})" if path.exists() else ""
            _say(f"{path}: missing or damaged{aside}; begun anew")
            old = environment()
        self.write_json("run.json", old | facts | {"status": status})

    def write_json(self, name: str, content: Any) -> None:
        write_whole(self.path / name, json.dumps(content, indent=1))

    def close(self) -> None:
        self._lock.close()


def refuse_scripts(plan: dict[str, Any], where: str) -> None:
    """Raise `UserError` where a learner, environment or wrapper is named that only this script or notebook has."""
    config = plan.get("config") or {}
    named = {"agent": plan.get("agent"), **{k: config.get(k) for k in ("env", "network", "dataset")}}
    named |= {f"wrap[{i}]": entry for i, entry in enumerate(config.get("wrap") or ())}
    for field, name in named.items():
        if isinstance(name, str) and name.startswith("__main__:"):
            why = "is defined in the script itself, which other processes cannot import"
            cure = "move it into a module of its own, or train without a run directory"
            raise UserError(f"{where}: {field}={name!r} {why}; {cure}")


def read_plan(path: str | Path) -> dict[str, Any]:
    """run.yaml of a run directory; raises `UserError` when it is missing, corrupt or not what was written.

    `num_steps` and `options` may be changed, where the checksum is removed; the run then continues with them. Any other
    change would apply to a part of the run only and is refused.
    """
    file, copy = Path(path) / "run.yaml", Path(path) / "checksums" / "run.yaml"
    cure = f"; restore it with `cp {copy} {file}`" if copy.exists() else ""
    if not file.exists() and is_sweep(path):
        raise UserError(f"{path}: found a sweep, expected a run: {', '.join(map(str, parts(path)))}")
    if not file.exists():
        raise UserError(f"run directory {path}: no run found (run.yaml is missing){cure}")
    try:
        text = file.read_text(encoding="utf-8")
        plan = options.load(text, str(file))
    except (UserError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not valid YAML: {str(e).removeprefix(f'{file}: not valid YAML: ')}{cure}") from e
    if not isinstance(plan, dict) or not {"agent", "config", "num_steps", "seeds"} <= set(plan):
        raise UserError(f"{file}: expected the fields agent, config, num_steps and seeds{cure}")
    head, _, body = text.partition("\n")
    if head.startswith(CHECKSUM) and head.removeprefix(CHECKSUM).split()[:1] != [_sha256(body)]:
        raise UserError(f"{file}: does not match its checksum{cure}, or remove its first line if you changed {FREE}")
    if copy.exists() and (changed := _changes(_written(copy), plan)):
        raise UserError(
            f"{file}: changed since the run began: {', '.join(changed)}. Only {FREE} may be changed{cure}, and train "
            "anew with other values"
        )
    return plan


def finished(path: str | Path) -> bool:
    """Whether the run in a directory has come to its end, as its run.json says."""
    try:
        return json.loads((Path(path) / "run.json").read_bytes())["status"] == "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _written(copy: Path) -> dict[str, Any]:
    """What `create` wrote; nothing to compare with where the copy is damaged itself."""
    try:
        head, _, body = copy.read_text(encoding="utf-8").partition("\n")
    except UnicodeDecodeError:
        return {}
    whole = head.startswith(CHECKSUM) and head.removeprefix(CHECKSUM).split()[:1] == [_sha256(body)]
    return options.load(body, str(copy)) if whole else {}


def _changes(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """`field: old -> new` of all fields that differ, but for those that may."""
    out = []
    for name in [*old, *(n for n in new if n not in old)] if old else ():
        if not where and name in ("num_steps", "options"):
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _changes(a, b, f"{where}{name}.")
        elif a != b:
            out.append(f"{where}{name}: {a!r} -> {b!r}")
    return out


def labels(paths: Sequence[str | Path]) -> list[str]:
    """The shortest endings of `paths` that are different, in order: `x/a` and `y/a` stay, `x/b` becomes `b`."""
    parts = [Path(p).absolute().parts for p in paths]
    out = []
    for own in parts:
        others = [p for p in set(parts) if p != own]
        length = next(n for n in range(1, len(own) + 1) if n == len(own) or all(p[-n:] != own[-n:] for p in others))
        out.append("/".join(own[-length:]).replace("//", "/"))
    return out


def is_sweep(path: str | Path) -> bool:
    """Whether a directory is that of `jaxstack sweep`: no run itself, with a run for each of its programs."""
    path = Path(path)
    return not (path / "run.yaml").exists() and any(path.glob("runs/*/run.yaml"))


def parts(path: str | Path) -> list[Path]:
    """The runs of a directory: those of a sweep's programs in order, else the directory itself."""
    path = Path(path)
    found = [file.parent for file in path.glob("runs/*/run.yaml")] if is_sweep(path) else [path]
    number = lambda p: int(tail) if (tail := p.name.rpartition("_")[2]).isdigit() else -1
    return sorted(found, key=lambda p: (number(p), p.name))


def setting_names(plan: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> list[str]:
    """For each row of a run, its setting as `setting 0 (lr=0.001)`; empty texts for a run of one setting.

    A sweep's run has a row for each pair (setting, seed); its plan has the hyperparameters that differ. `others` are
    the plans of the sweep's other programs, whose configs differ in static options.
    """
    if "settings" not in plan:
        return [""] * len(plan["seeds"])
    values = {k.lstrip("."): v for k, v in plan.get("hypers", {}).items() if isinstance(v, list) and len({*v}) > 1}
    own = {k: v for k, v in plan["config"].items() if k != "hypers"}
    static = [f"{k}={v}" for k, v in own.items() if any(other["config"].get(k) != v for other in others)]
    numbers = [[f"{k}={v[row]:.4g}" for k, v in values.items()] for row in range(len(plan["seeds"]))]
    names = [", ".join([*one, *static]) for one in numbers]
    return [f"setting {i}" + (f" ({text})" if text else "") for i, text in zip(plan["settings"], names)]


def read_metrics(path: str | Path) -> Any:
    """metrics.jsonl as a pandas frame, that of all groups of a run in groups; raises `UserError` when there is none."""
    import pandas as pd

    if (Path(path) / "run.yaml").exists() and (groups := read_plan(path).get("groups")):
        folders = [Path(path) / name for name in groups]
        begun = [folder for folder in folders if (folder / "metrics.jsonl").exists()]
        return by_step([read_metrics(folder) for folder in begun or folders[:1]])
    if (Path(path) / "run.yaml").exists() and (stages := read_plan(path).get("stages")):
        parts = []
        for name in stages:
            # of a stage in groups each has lines of its own
            if not parts or any((Path(path) / name).rglob("metrics.jsonl")):
                part = read_metrics(Path(path) / name)
                part.insert(0, "stage", name.partition("_")[2])
                parts.append(part)
        return pd.concat(parts, ignore_index=True)
    file = Path(path) / "metrics.jsonl"
    if not file.exists() or not file.stat().st_size:
        raise UserError(f"run directory {path}: no metrics found (metrics.jsonl is missing or empty)")
    # pandas' default parser is off by an ulp now and then
    return pd.read_json(file, lines=True, precise_float=True)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a run's metrics.jsonl as they were written, or those of all its groups; damaged lines left out."""
    if groups := read_plan(path).get("groups"):
        return sorted((row for name in groups for row in read_rows(Path(path) / name)), key=lambda row: row["step"])
    lines = (Path(path) / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    rows = [row for row in map(_parse, lines) if row is not None]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def by_step(frames: Sequence[Any]) -> Any:
    """Metrics of several groups of seeds as those of one run, ordered by step."""
    import pandas as pd

    return pd.concat(frames).sort_values("step", kind="stable", ignore_index=True)


def environment() -> dict[str, Any]:
    """Command, versions, device, XLA's flags, git commit and time of this process."""
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
        "xla_flags": os.environ.get("XLA_FLAGS"),  # other flags, other rounding
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


def _parse(line: bytes) -> Row | None:
    """A metric row, None for a line that is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - what was damaged matters even when progress is off


def _clean(row: Row) -> Row:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


@contextlib.contextmanager
def closing(run: RunDir | None) -> Iterator[None]:
    """Release the directory; a run that ends with an error is marked so."""
    try:
        yield
    except Interrupted:
        raise
    except BaseException as e:
        if run is not None:
            with contextlib.suppress(UserError):  # the error itself may be a full disk
                run.status("failed", error=f"{type(e).__name__}: {e}"[:500])
        raise
    finally:
        if run is not None:
            run.close()
