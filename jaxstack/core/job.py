"""What a run is: its options, its validated specification, its result, and the checks of what it is asked for."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from jaxstack.core import config, ledger
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner
from jaxstack.core.sinks import Sink
from jaxstack.core.source import Source

if TYPE_CHECKING:  # imported when a run ends
    import pandas


@dataclass(frozen=True)
class RunOptions(config.Config):
    """How a run is carried out; none of it changes results."""

    chunk: int = 0
    """Training steps per dispatch; 0 picks about 50 dispatches per run."""
    dispatch: Literal["auto", "scan", "loop"] = "auto"
    """scan: many steps in one program; loop: one step a call (faster for convolutions on CPU)."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only, -1 never."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end and when interrupted."""
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = ""
    """What `keep_best` goes by; default: the learner's objective."""
    best_direction: Literal["max", "min", ""] = ""
    """Whether it is better large or small; default: as the learner's objective, of another metric large."""
    max_compiles: int | None = None
    """A further compile is an error. What an earlier call in this process compiled (see memo.py) does not count."""
    guard: bool = True
    """Freeze seeds whose losses, state or inputs go non-finite, see guard.py."""
    devices: int = 1
    """Spread the seeds over this many devices, or groups of `env_devices`; over those of all hosts, see scaling.md."""
    env_devices: int = 1
    """Devices that share the environments of one seed, see devices.py."""
    split_seeds: int | Literal["auto"] | None = None
    """At most so many seeds at once, in groups one after another; auto: as many as fit; default: refuse a run that
    does not fit. In a run directory each group is a run of its own, in a folder named after its seeds; what reads or
    resumes the run reads and resumes them all."""
    progress: bool = True
    memory_limit_mb: int | None = None
    """Refuse a run that needs more; default: what is free."""
    profile: str = ""
    """Directory for a trace of one dispatch, the second of the run, for TensorBoard's profiler or Perfetto."""

    def validate(self) -> None:
        config.require_at_least(self, 0, "chunk", "checkpoint_every", "keep_best")
        config.require_at_least(self, -1, "eval_every")
        config.require_at_least(self, 1, "keep_last", "devices", "env_devices")
        for field in ("max_compiles", "split_seeds", "memory_limit_mb"):
            value = getattr(self, field)
            config.require(self, field, not isinstance(value, int) or value >= 1, "a number >= 1")


class Result(NamedTuple):
    """A finished run: final state [S, ...], metrics as a pandas frame (a row for each step and seed, ordered by step),
    seeds alive [S]."""

    state: Any
    metrics: "pandas.DataFrame"
    alive: np.ndarray
    ledger: ledger.Ledger
    run_dir: Path | None

    def __repr__(self) -> str:
        steps = int(self.metrics.step.max()) if len(self.metrics) else 0
        count = f"{int(self.alive.sum())} of {len(self.alive)} seeds alive"
        columns = ", ".join(c for c in self.metrics if "/" in c)
        return f"Result({steps} steps, {count}, run_dir={self.run_dir}; metrics: {columns})"


class Moment(NamedTuple):
    """What a callback is told after a chunk of steps."""

    step: int
    """Steps done."""
    num_steps: int
    state: Any
    """States of all seeds [S, ...]. Its buffers are donated to the next chunk: copy what is to be kept."""
    rows: list[dict[str, Any]]
    """Metrics of the chunk, one row per step and seed."""


Callback = Callable[[Moment], Any]
"""Returns None, or a state of the same structure, from which the run continues."""


class Job(NamedTuple):
    """Validated run specification."""

    learner: Learner
    num_steps: int
    seeds: list[int]
    hypers: Any
    data: Source | None
    run_dir: Path | None
    plan: dict[str, Any]
    options: RunOptions
    sinks: Sequence[Sink]
    book: ledger.Ledger
    stop: list[int]
    """Signals received."""
    said: list[str]
    """Why seeds were frozen, in the order in which it was seen."""
    settings: list[int] | None = None
    """Number of each row's setting: rows are then (setting, seed) pairs."""
    length: int | None = None
    """Steps after which schedules end, where a resumed run does not keep its own."""
    callbacks: Sequence[Callback] = ()


def plain_config(learner: Any) -> dict[str, Any]:
    """The config of a learner, or of a method in stages, as plain dicts; empty where there is none."""
    return config.to_dict(learner.config) if dataclasses.is_dataclass(learner.config) else {}


def same_config(run_dir: str | Path, old: dict[str, Any], new: dict[str, Any], default: dict[str, Any]) -> None:
    """Raise `UserError` naming the fields in which a run's config and the learner's differ. A run from before a field
    existed has its `default`."""
    old = {k: v for k, v in default.items() if k in new and k not in old} | old
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if changed:
        what = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
        raise UserError(f"run directory {run_dir}: the config was changed since the run began ({what})")


def default_config(learner: Any) -> dict[str, Any]:
    """The defaults of a learner's config, as far as they have some."""
    if not dataclasses.is_dataclass(learner.config):
        return {}
    fields = dataclasses.fields(learner.config)
    return {f.name: config.plain(f.default) for f in fields if f.default is not dataclasses.MISSING}


def same_hypers(job: Job, state: Any) -> None:
    """Stored hyperparameters stay in force: raise `UserError` naming one that is given another value now."""
    given = job.learner.hypers if job.hypers is None else job.hypers
    stored = jax.tree_util.tree_leaves_with_path(state.hypers)
    for (where, old), new in zip(stored, jax.tree.leaves(given)):
        if not np.array_equal(np.asarray(old), np.broadcast_to(np.asarray(new, np.float32), np.shape(old))):
            name = jax.tree_util.keystr(where).lstrip(".")
            old, new = np.asarray(old).tolist(), np.asarray(new).tolist()
            raise UserError(f"run directory {job.run_dir}: {name}={new}: expected {old}, with which the run began")


def steps_of(learner: Learner, num_steps: int | None, total_samples: int | None) -> int:
    if num_steps is not None and total_samples is not None:
        raise UserError(f"num_steps={num_steps}, total_samples={total_samples}: expected one of the two")
    if total_samples is not None:
        num_steps = -(-int(total_samples) // learner.samples_per_step)
    elif num_steps is None:
        num_steps = learner.num_steps
    if num_steps is None or not 1 <= num_steps < 2**31:
        raise UserError(f"num_steps={num_steps}: expected 1 to 2^31-1")
    return int(num_steps)


def check_seeds(seeds: int | Sequence[int]) -> list[int]:
    """The seeds as a list; raises `UserError` for none, equal ones or numbers that are no seeds."""
    out = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    if not out or len(set(out)) != len(out) or min(out) < 0 or max(out) >= 2**32:
        raise UserError(f"seeds={seeds}: expected a number >= 1 or different seeds in 0..2^32-1")
    return out


def check_rows(seeds: int | Sequence[int], settings: Sequence[int]) -> list[int]:
    """The seeds of rows (setting, seed); raises `UserError` when there is not one for each, or for equal rows."""
    out = [seeds] if isinstance(seeds, int) else [int(s) for s in seeds]
    check_seeds(sorted(set(out)))
    if len(out) != len(settings) or len({*zip(settings, out)}) != len(out):
        raise UserError(f"seeds={seeds}, settings={settings}: expected a seed for each setting, and different pairs")
    return out


def data_of(learner: Learner, data: Source | None) -> Source | None:
    """The source of the run: the one given, else the learner's own."""
    if data is None and learner.source is not None:
        return learner.source(learner.config)
    if learner.takes_batch and data is None:
        raise UserError(f"{learner.name}: data is needed, e.g. ArrayData(arrays, batch_size)")
    if data is not None and not learner.takes_batch and learner.source is None:
        raise UserError(f"{learner.name}: generates its own batches; data must be None")
    return data
