"""Rows of a claim on disk: appended as they come, read again when the claim continues.

One JSON object per line, with a `kind`: "session" (environment of a process), "tuning" and "row" (of one experiment and
arm), "done" (an arm's seeds and seconds) and "drop" (forget what stands above for an arm). Every line of an arm carries
the digest of the code that made it, so rows of other code are recognised.
"""

import fcntl
import functools
import hashlib
import inspect
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxstack.core import files
from jaxstack.core.errors import UserError


class Tuning(NamedTuple):
    """How one arm's options were chosen: every setting that was tried, and its score for each tuning seed."""

    settings: tuple[dict[str, Any], ...]
    scores: tuple[tuple[float, ...], ...]
    """[setting][seed]; not finite for a failed run."""
    seeds: tuple[int, ...]
    """Not those of the claim's runs."""
    metric: str
    largest: bool = True
    """False when the smallest score is the best."""
    steps: int = 0
    """Training steps (updates or samples) per trial."""

    @classmethod
    def of(cls, sweep: Any, metric: str | None = None, largest: bool | None = None, steps: int = 0) -> "Tuning":
        """The tuning that a `jaxstack.sweeps.Sweep` did, by its learner's objective unless a `metric` is named; failed
        runs have NaN scores."""
        name, best = sweep.goal(metric, largest)
        table = sweep.table.sort_values(["setting", "seed"])
        values = table[name].where(table.alive)
        scores = [tuple(float(v) for v in values[table.setting == i]) for i in sweep.settings.index]
        settings = tuple({k: _plain(v) for k, v in row.items()} for row in sweep.settings.to_dict("records"))
        return cls(settings, tuple(scores), tuple(int(s) for s in sweep.seeds), name, best, steps)

    @property
    def chosen(self) -> dict[str, Any]:
        """The setting with the best mean over seeds, the first of equals; one with a failed seed only if all have one.

        Raises:
            UserError: every setting failed.
        """
        table = np.asarray(self.scores, np.float64)
        good = np.isfinite(table)
        if not good.any():
            raise UserError(f"tuning: found no finite {self.metric} in {len(self.settings)} settings, expected one")
        with np.errstate(invalid="ignore"):
            means = np.where(good, table, 0.0).sum(1) / np.maximum(good.sum(1), 1)
        cost = -means if self.largest else means
        cost = np.where(good.any(1), cost, np.inf)
        return dict(self.settings[int(np.lexsort((cost, ~good.all(1)))[0])])

    @property
    def budget(self) -> str:
        """For example "6 settings x 2 seeds x 1000 steps"."""
        text = f"{len(self.settings)} settings x {len(self.seeds)} seeds"
        return f"{text} x {self.steps} steps" if self.steps else text

    def problem(self) -> str | None:
        """What is wrong with it, None if nothing."""
        shape = [len(s) for s in self.scores]
        if not self.settings or shape != [len(self.seeds)] * len(self.settings):
            return f"scores of {shape} seeds, expected {len(self.settings)} settings of {len(self.seeds)} seeds"
        return None


class Arm(NamedTuple):
    """What is stored of one arm of one experiment."""

    digest: str
    rows: dict[int, dict[str, Any]]
    """seed -> metrics."""
    tuning: Tuning | None = None
    seconds: float = 0.0
    tuned: bool = False
    """The tuning is done (it may have had nothing to tune)."""
    session: int = -1
    """The process that made the last of it."""


class Store:
    """The file of one claim and scale, held by one process at a time.

    Raises:
        UserError: the folder cannot be written, is in use, or holds a file that is not of this kind.
    """

    def __init__(self, folder: Path, fresh: bool = False):
        """Open or make the file; with `fresh`, a damaged one is moved aside."""
        self.path = folder / "rows.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115 - held as long as the claim runs
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror})") from e
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.path}: in use by another process") from None
        self.sessions: list[dict[str, Any]] = []
        self.arms: dict[tuple[str, str], Arm] = {}
        try:
            self._read()
        except UserError:
            if not fresh:
                raise
            self.sessions, self.arms = [], {}
            files.write_whole(files.free_name(self.path, folder / "damaged"), self._text())
            self._file.truncate(0)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the process died while it wrote the last line
            self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"{self.path}: line {number} is damaged; --fresh starts anew") from e

    def _text(self) -> str:
        self._file.seek(0)
        return self._file.read().decode(errors="replace")

    def _apply(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind == "session":
            self.sessions.append(line["run"])
            return
        key = (line["experiment"], line["arm"])
        if kind == "drop":
            self.arms.pop(key, None)
            return
        arm = self.arms.get(key)
        if arm is None or arm.digest != line["digest"]:
            arm = Arm(line["digest"], {})
        arm = arm._replace(session=len(self.sessions) - 1)
        if kind == "row":
            arm = arm._replace(rows=arm.rows | {int(line["seed"]): line["metrics"]})
        elif kind == "tuning":
            arm = arm._replace(tuned=True, seconds=arm.seconds + line["seconds"])
            if line["tuning"] is not None:
                t = line["tuning"]
                scores = tuple(tuple(s) for s in t["scores"])
                tuning = Tuning(tuple(t["settings"]), scores, tuple(t["seeds"]), t["metric"], t["largest"], t["steps"])
                arm = arm._replace(tuning=tuning)
        elif kind == "done":
            arm = arm._replace(seconds=arm.seconds + line["seconds"])
        else:
            raise ValueError(kind)
        self.arms[key] = arm

    def _append(self, **line: Any) -> None:
        text = json.dumps(line)
        try:
            self._file.write(text.encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror})") from e
        self._apply(json.loads(text))

    def session(self, run: dict[str, Any]) -> None:
        """Note the environment of this process."""
        self._append(kind="session", run=run)

    def drop(self, experiment: str, arm: str) -> None:
        """Forget all of an arm; its lines stay in the file."""
        self._append(kind="drop", experiment=experiment, arm=arm)

    def tuning(self, experiment: str, arm: str, digest: str, tuning: Tuning | None, seconds: float) -> None:
        """Store the finished tuning of an arm, None for one that has nothing to tune."""
        content = None if tuning is None else tuning._asdict()
        self._append(
            kind="tuning", experiment=experiment, arm=arm, digest=digest, seconds=round(seconds, 3), tuning=content
        )

    def row(self, experiment: str, arm: str, digest: str, seed: int, metrics: dict[str, Any]) -> None:
        """Store the metrics of one seed."""
        self._append(kind="row", experiment=experiment, arm=arm, digest=digest, seed=seed, metrics=metrics)

    def done(self, experiment: str, arm: str, digest: str, seeds: tuple[int, ...], seconds: float) -> None:
        """Note that these seeds of an arm are complete, and how long they took."""
        self._append(
            kind="done", experiment=experiment, arm=arm, digest=digest, seeds=list(seeds), seconds=round(seconds, 3)
        )


def metrics_of(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a row as plain numbers. Raises TypeError for a value that is none."""
    out = {}
    for name, value in row.items():
        if name in ("experiment", "arm", "seed"):
            continue
        value = _plain(value)
        if not isinstance(value, (int, float)):
            raise TypeError(f"metric {name!r}: found {type(value).__name__}, expected a number")
        out[name] = value
    return out


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value


def digest(*objects: Any) -> str:
    """A digest of functions and plain data, the same in every process.

    A function counts by its source, its defaults, what it closes over, and what it names of its own module: functions
    and classes likewise, data by value. What it takes from other modules counts by name only: a changed library shows
    in the versions and the commit of the session.
    """
    parts: list[str] = []
    _describe(list(objects), parts, set())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _describe(value: Any, parts: list[str], seen: set[int]) -> None:
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, dict):
        for k, v in value.items():
            parts.append(f"{k!r}:")
            _describe(v, parts, seen)
    elif isinstance(value, (list, tuple)):
        parts.append(f"{type(value).__name__}[{len(value)}]")
        for v in value:
            _describe(v, parts, seen)
    elif isinstance(value, types.FunctionType):
        if id(value) not in seen:  # a function may name itself
            seen.add(id(value))
            _describe_function(value, parts, seen)
    elif isinstance(value, (type, types.ModuleType)):
        parts.append(f"{getattr(value, '__module__', '')}.{value.__name__}")
    elif isinstance(value, np.ndarray):
        parts.append(hashlib.sha256(value.tobytes()).hexdigest())
    elif isinstance(value, functools.partial):
        _describe([value.func, value.args, value.keywords], parts, seen)
    elif hasattr(value, "__wrapped__"):  # functools.cache, jax.jit
        _describe(value.__wrapped__, parts, seen)
    else:
        parts.append(re.sub(r" at 0x[0-9a-f]+", "", repr(value)))


def _describe_function(f: Callable[..., Any], parts: list[str], seen: set[int]) -> None:
    code = f.__code__
    parts.append(_source(f) or repr((code.co_code, [c for c in code.co_consts if not isinstance(c, types.CodeType)])))
    _describe([f.__defaults__, f.__kwdefaults__], parts, seen)
    for cell in f.__closure__ or ():
        _describe(cell.cell_contents, parts, seen)
    for name in _names(code):
        if name not in f.__globals__:
            continue
        value = f.__globals__[name]
        code_of = isinstance(value, type) or inspect.isroutine(value) or hasattr(value, "__wrapped__")
        if isinstance(value, types.ModuleType) or (code_of and getattr(value, "__module__", None) != f.__module__):
            parts.append(name)
        elif isinstance(value, type):
            parts.append(_source(value) or name)
        else:
            _describe(value, parts, seen)


def _source(thing: Any) -> str | None:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed at a prompt
        return None


def _names(code: types.CodeType) -> list[str]:
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return list(dict.fromkeys([*code.co_names, *inner]))
