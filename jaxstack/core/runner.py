"""The one training loop. Seeds are vmapped, steps run in chunks of one compiled program, the host reports in between.

The number of steps of a chunk is an argument of the program, so the last chunk, an evaluation or a stop never
recompiles, and how steps are grouped never changes a result. All buffers are donated.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core import cache, config, guard, ledger, program
from jaxstack.core.checkpoint import Checkpoints, Retention
from jaxstack.core.data import Source
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner
from jaxstack.core.progress import Progress
from jaxstack.core.rundir import RunDir, read_plan
from jaxstack.core.sinks import Row, Sink


@dataclass(frozen=True)
class RunOptions(config.Config):
    """How a run is carried out; none of it changes results."""

    chunk: int = 0
    """Steps between two looks of the host; 0 picks about 50 looks a run."""
    dispatch: Literal["auto", "scan", "loop"] = "auto"
    """scan: many steps in one program; loop: one step a call (faster for convolutions on CPU)."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only, -1 never."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end and when interrupted."""
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = "eval/return"
    max_compiles: int | None = None
    """A further compile is an error."""
    guard: bool = True
    """Freeze seeds whose loss or parameters go non-finite."""
    devices: int = 1
    """Spread the seeds over this many devices."""
    split_seeds: int | Literal["auto"] | None = None
    """At most so many seeds at once, in groups one after another; auto: as many as fit; default: refuse a run that
    does not fit. In a run directory each group is a run of its own, in a folder named after its seeds."""
    progress: bool = True
    memory_limit_mb: int | None = None
    """Refuse a run that needs more; default: what is free."""

    def validate(self) -> None:
        config.require_at_least(self, 0, "chunk", "checkpoint_every", "keep_best")
        config.require_at_least(self, -1, "eval_every")
        config.require_at_least(self, 1, "keep_last", "devices")
        for field in ("max_compiles", "split_seeds", "memory_limit_mb"):
            value = getattr(self, field)
            config.require(self, field, not isinstance(value, int) or value >= 1, "a number >= 1")


class Result(NamedTuple):
    """A finished run: final state [S, ...], metrics as a pandas frame (a row for each step and seed, ordered by step),
    seeds alive [S]."""

    state: Any
    metrics: Any
    alive: np.ndarray
    ledger: ledger.Ledger
    run_dir: Path | None


class Interrupted(Exception):
    """SIGINT or SIGTERM stopped the run after a chunk; everything is saved. `signum` tells which."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Job(NamedTuple):
    """What is to be done, checked and with defaults filled in."""

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


def train(
    learner: Learner,
    num_steps: int | None = None,
    seeds: int | Sequence[int] = 1,
    *,
    total_samples: int | None = None,
    hypers: Any = None,
    data: Source | None = None,
    run_dir: str | Path | None = None,
    plan: dict[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
    **changes: Any,
) -> Result:
    """Train `learner` for `num_steps` steps, or `total_samples` samples a seed, with each of `seeds` at once.

    Steps default to the config's `num_updates`; `hypers` may have leaves [S] (one setting a seed). Options can be given
    by name: `train(learner, 100, chunk=10)`. `plan` is stored in the run directory beside what `resume` needs. Raises
    `UserError` for wrong arguments, a run that does not fit into memory, or when every seed went non-finite;
    `Interrupted` after SIGINT or SIGTERM.
    """
    options = config.replace(options, **changes)
    num_steps = _num_steps(learner, num_steps, total_samples)
    seeds = check_seeds(seeds)
    _check_data(learner, data)
    plan = {"agent": learner.name, "config": _config(learner), "seeds": seeds, "num_steps": num_steps} | (plan or {})
    path = None if run_dir is None else RunDir.check(run_dir)
    cache.enable()
    book = ledger.Ledger(options.max_compiles)
    job = Job(learner, num_steps, seeds, hypers, data, path, plan, options, sinks, book)
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        try:
            at_once = options.split_seeds
            result = _split(job, at_once) if isinstance(at_once, int) and at_once < len(seeds) else _fresh(job)
        except ledger.DoesNotFit as e:
            if options.split_seeds != "auto" or e.fit < 1:
                raise
            book.programs.clear()
            result = _split(job, e.fit)
    return _some_alive(result, job)


def resume(
    learner: Learner,
    run_dir: str | Path,
    num_steps: int | None = None,
    seeds: Sequence[int] | None = None,
    *,
    hypers: Any = None,
    data: Source | None = None,
    plan: dict[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
    **changes: Any,
) -> Result:
    """Continue a run from its newest undamaged checkpoint, to the bit as if it had not stopped.

    Steps and seeds default to those the run was made with. Raises `UserError` when no checkpoint can be used, or naming
    the fields in which the learner's config (or `plan`'s) differs from that of the run.
    """
    options = config.replace(options, **changes)
    old = read_plan(run_dir)
    new = (plan or {}).get("config", _config(learner))
    _same_config(run_dir, old["config"], new)
    seeds = list(old["seeds"] if seeds is None else seeds)
    num_steps = int(old["num_steps"] if num_steps is None else num_steps)
    _check_data(learner, data)
    cache.enable()
    run = RunDir.open(run_dir)
    book = ledger.Ledger(options.max_compiles)
    job = Job(learner, num_steps, seeds, hypers, data, run.path, old, options, sinks, book)
    with _closing(run, sinks):
        template = jax.eval_shape(lambda: program.initial(learner, seeds, hypers))
        store = Checkpoints(run.checkpoints)
        step, (state, alive), meta, problems = store.restore(template)
        for problem in problems:
            print(f"{problem}; using the one of step {step}", flush=True)  # noqa: T201
        store.drop_after(step)
        store.close()
        programs = _programs(job)
        if data is not None:
            data.restore(meta["data"])
        run.status("running", resumed_at_step=step)
        state, alive = programs.place((state, alive))
        result = _loop(job, programs, run, state, alive, step)
    return _some_alive(result, job)


def load_state(learner: Learner, run_dir: str | Path, seeds: Sequence[int] | None = None) -> Any:
    """The newest stored state [S, ...] of a run, for evaluation. Raises `UserError` when there is none."""
    chosen: Sequence[int] = read_plan(run_dir)["seeds"] if seeds is None else seeds
    template = jax.eval_shape(lambda: program.initial(learner, chosen, None))
    store = Checkpoints(Path(run_dir) / "checkpoints")
    _, (state, _), _, _ = store.restore(template)
    store.close()
    return state


def _fresh(job: Job) -> Result:
    """All seeds of the job from their first step."""
    programs = _programs(job)  # before the directory is made: a run that does not fit leaves none behind
    run = None if job.run_dir is None else RunDir.create(job.run_dir, job.plan)
    with _closing(run):
        return _loop(job, programs, run, *programs.init(), 0)


def _split(job: Job, at_once: int) -> Result:
    """Groups of at most `at_once` seeds, one after another; their results side by side."""
    import pandas as pd

    results = []
    for i in range(0, len(job.seeds), at_once):
        part = slice(i, i + at_once)
        seeds = job.seeds[part]
        take = lambda x, part=part: jnp.asarray(x)[part] if np.ndim(x) else x
        hypers = None if job.hypers is None else jax.tree.map(take, job.hypers)
        folder = None if job.run_dir is None else job.run_dir / f"seeds_{'_'.join(map(str, seeds))}"
        group = job._replace(seeds=seeds, hypers=hypers, run_dir=folder, plan=job.plan | {"seeds": seeds})
        results.append(_fresh(group))
    state = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(r.state for r in results))
    metrics = pd.concat([r.metrics for r in results]).sort_values("step", kind="stable", ignore_index=True)
    return Result(state, metrics, np.concatenate([r.alive for r in results]), job.book, job.run_dir)


def _programs(job: Job) -> program.Programs:
    options, limit = job.options, job.options.memory_limit_mb
    return program.build(
        job.learner,
        job.seeds,
        job.book,
        hypers=job.hypers,
        data=job.data,
        chunk=options.chunk or int(np.clip(job.num_steps // 50, 1, 1000)),
        dispatch=options.dispatch,
        guarded=options.guard,
        evaluate=options.eval_every >= 0,
        devices=options.devices,
        memory_limit=None if limit is None else limit * 2**20,
    )


def _loop(
    job: Job, programs: program.Programs, run: RunDir | None, state: Any, alive: guard.Alive, step: int
) -> Result:
    """Chunks until the last step, a signal or the death of all seeds; the host's side of the run."""
    options, total = job.options, job.num_steps
    store = None
    if run is not None:
        store = Checkpoints(run.checkpoints, Retention(options.keep_last, options.keep_best, options.best_metric))
        run.write_json("ledger.json", job.book.rows())
    table = [] if run is None else run.cut(step)  # the part before a resume
    failed = np.asarray(alive.failed_step)
    progress = Progress(job.learner, total, step, len(job.seeds), job.book, options.progress)
    with _signals() as stop, progress:
        while step < total and not stop and not failed.all():
            count = _until(step, total, programs.chunk, options)
            begun = time.perf_counter()
            state, alive, metrics = programs.advance(state, alive, step, count)
            seconds = time.perf_counter() - begun
            evaluate = programs.evaluate is not None and _due(step + count, total, options.eval_every)
            extra = programs.evaluate(state) if evaluate and programs.evaluate else {}
            before, failed = failed, np.asarray(alive.failed_step)
            rows = _rows(job, step, metrics, extra, failed)
            step += count
            table += rows
            if run is not None:
                run.append(rows)
            for sink in job.sinks:
                sink.write(rows)
            progress.update(step, rows, count, seconds)
            for s in np.flatnonzero((failed > 0) & (before == 0)):
                progress.say(
                    f"seed {job.seeds[s]}: loss or parameters not finite at step {failed[s]}; frozen before it"
                )
            if store is not None and (_due(step, total, options.checkpoint_every) or stop or failed.all()):
                _save(job, store, step, state, alive, rows)
    if store is not None:
        store.close()
    _settle(job, run, step, failed, stop)
    import pandas as pd

    return Result(state, pd.DataFrame(table), failed == 0, job.book, job.run_dir)


def _save(job: Job, store: Checkpoints, step: int, state: Any, alive: guard.Alive, rows: list[Row]) -> None:
    name = job.options.best_metric
    scores = [r[name] for r in rows if r["step"] == step and name in r]
    meta = {"data": None if job.data is None else job.data.state()}
    store.save(step, (state, alive), meta, float(np.mean(scores)) if scores else None)


def _settle(job: Job, run: RunDir | None, step: int, failed: np.ndarray, stop: list[int]) -> None:
    """Record how the loop ended; raises `Interrupted` when a signal ended it early."""
    interrupted = step < job.num_steps and bool(stop) and not failed.all()
    if run is not None:
        run.status("interrupted" if interrupted else "failed" if failed.all() else "finished", step=step)
    if interrupted:
        how = "nothing was saved: the run has no directory" if run is None else f"`jaxstack resume {run.path}` goes on"
        raise Interrupted(stop[0], f"stopped after step {step} of {job.num_steps}; {how}")


def _some_alive(result: Result, job: Job) -> Result:
    if not result.alive.any():
        first = int(result.metrics.groupby("seed").step.max().min())
        kept = "" if result.run_dir is None else f"; the last good states are in {result.run_dir}"
        raise UserError(f"{job.learner.name}: loss or parameters not finite in every seed, first at step {first}{kept}")
    return result


def _until(step: int, num_steps: int, chunk: int, options: RunOptions) -> int:
    """Steps to the next stop: end of chunk, evaluation, checkpoint or run."""
    stops = [num_steps - step, chunk - step % chunk]
    stops += [every - step % every for every in (options.eval_every, options.checkpoint_every) if every > 0]
    return min(stops)


def _due(step: int, num_steps: int, every: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _rows(job: Job, start: int, metrics: dict, extra: dict, failed: np.ndarray) -> list[Row]:
    """A row for each step and seed, for a frozen seed up to the step it failed in; evaluations go to the last step."""
    lists = {k: v.astype(float).tolist() for k, v in metrics.items()}
    rows = []
    count = len(next(iter(lists.values()))) if lists else 0
    for i in range(count):
        step = start + i + 1
        for s, seed in enumerate(job.seeds):
            if 0 < failed[s] < step:
                continue
            row: Row = {"step": step, "samples": step * job.learner.samples_per_step, "seed": seed}
            row |= {k: v[i][s] for k, v in lists.items()}
            if i == count - 1:
                row |= {k: float(v[s]) for k, v in extra.items()}
            rows.append(row)
    return rows


def _config(learner: Learner) -> dict[str, Any]:
    return config.to_dict(learner.config) if dataclasses.is_dataclass(learner.config) else {}


def _same_config(run_dir: str | Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if changed:
        what = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
        raise UserError(f"run directory {run_dir}: the config was changed since the run began ({what})")


def _num_steps(learner: Learner, num_steps: int | None, total_samples: int | None) -> int:
    if num_steps is not None and total_samples is not None:
        raise UserError(f"num_steps={num_steps}, total_samples={total_samples}: expected one of the two")
    if total_samples is not None:
        num_steps = -(-int(total_samples) // learner.samples_per_step)
    elif num_steps is None:
        num_steps = getattr(learner.config, "num_updates", None)
    if num_steps is None or not 1 <= num_steps < 2**31:
        raise UserError(f"num_steps={num_steps}: expected 1 to 2^31-1")
    return int(num_steps)


def check_seeds(seeds: int | Sequence[int]) -> list[int]:
    """The seeds as a list; raises `UserError` for none, equal ones or numbers that are no seeds."""
    out = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    if not out or len(set(out)) != len(out) or min(out) < 0 or max(out) >= 2**32:
        raise UserError(f"seeds={seeds}: expected a number >= 1 or different seeds in 0..2^32-1")
    return out


def _check_data(learner: Learner, data: Source | None) -> None:
    if learner.takes_batch and data is None:
        raise UserError(f"{learner.name}: data is needed, e.g. ArrayData(arrays, batch_size)")
    if data is not None and not learner.takes_batch:
        raise UserError(f"{learner.name}: makes its own data; data must be None")


@contextlib.contextmanager
def _closing(run: RunDir | None, sinks: Sequence[Sink] = ()) -> Iterator[None]:
    """Release the directory; a run that ends with an error is marked so."""
    try:
        yield
    except Interrupted:
        raise
    except BaseException as e:
        if run is not None:
            with contextlib.suppress(OSError):  # the error itself may be a full disk
                run.status("failed", error=f"{type(e).__name__}: {e}"[:500])
        raise
    finally:
        for sink in sinks:
            sink.close()
        if run is not None:
            run.close()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that the chunk can finish; a second one acts at once. Main thread only."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    old: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, old[number])

    for s in (signal.SIGINT, signal.SIGTERM):
        old[s] = signal.signal(s, note)
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
