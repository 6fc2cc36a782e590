"""The one training loop. Seeds are vmapped, steps run in chunks of one compiled program, the host reports in between.

The number of steps of a chunk is an argument of the program, so the last chunk, an evaluation or a stop never
recompiles, and how steps are grouped never changes a result. All buffers are donated.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core import cache, config, guard, ledger
from jaxstack.core.checkpoint import Checkpoints, Retention
from jaxstack.core.data import Source
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner, as_hypers
from jaxstack.core.progress import Progress
from jaxstack.core.rundir import RunDir
from jaxstack.core.sinks import Sink

EVAL_STREAM = 7_777_777
"""Evaluation draws from this key: the same episodes for all seeds, steps and methods, apart from training."""


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
    progress: bool = True
    memory_limit_mb: int | None = None
    """Refuse a run that needs more; default: what is free."""

    def validate(self) -> None:
        config.require_at_least(self, 0, "chunk", "checkpoint_every", "keep_best")
        config.require_at_least(self, -1, "eval_every")
        config.require_at_least(self, 1, "keep_last", "devices")


class Result(NamedTuple):
    """A finished run: final state [S, ...], metrics as a pandas frame (a row for each step and seed), seeds alive [S]."""

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


class Programs(NamedTuple):
    """The compiled parts of a run."""

    advance: Callable[[Any, guard.Alive, int, int, Any, Any], tuple[Any, guard.Alive, dict[str, np.ndarray]]]
    evaluate: Callable[[Any], dict[str, np.ndarray]] | None
    chunk: int


def train(
    learner: Learner,
    num_steps: int | None = None,
    seeds: int | Sequence[int] = 1,
    *,
    hypers: Any = None,
    data: Source | None = None,
    run_dir: str | Path | None = None,
    plan: dict[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
) -> Result:
    """Train `learner` for `num_steps` steps with each of `seeds` at once.

    `num_steps` defaults to the config's `num_updates`; `hypers` may have leaves [S] (one setting a seed). `plan` is
    stored in the run directory for `resume`. Raises `UserError` for wrong arguments before anything compiles, or when
    every seed went non-finite; `Interrupted` after SIGINT or SIGTERM.
    """
    num_steps = _num_steps(learner, num_steps)
    seeds = _seeds(seeds)
    _check_data(learner, data)
    run = None
    if run_dir is not None:
        full = {"agent": learner.name, "config": {}, "seeds": list(seeds), "num_steps": num_steps} | (plan or {})
        run = RunDir.create(run_dir, full)
    with _closing(run):
        cache.enable()
        book = ledger.Ledger(options.max_compiles)
        state = jax.jit(lambda: _init(learner, seeds, hypers))()
        alive = guard.start(len(seeds))
        config = (plan or {}).get("config")
        return _loop(learner, state, alive, 0, num_steps, seeds, data, run, options, sinks, book, config)


def resume(
    learner: Learner,
    run_dir: str | Path,
    num_steps: int,
    seeds: Sequence[int],
    *,
    hypers: Any = None,
    data: Source | None = None,
    plan: dict[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
) -> Result:
    """Continue a run from its newest undamaged checkpoint, to the bit as if it had not stopped.

    Raises `UserError` when no checkpoint can be used, or when `plan` holds another config than the run was made with.
    """
    run = RunDir.open(run_dir)
    with _closing(run):
        cache.enable()
        book = ledger.Ledger(options.max_compiles)
        template = jax.eval_shape(lambda: (_init(learner, seeds, hypers), guard.start(len(seeds))))
        store = Checkpoints(run.checkpoints)
        step, (state, alive), meta, problems = store.restore(template)
        for problem in problems:
            print(f"{problem}; using the one of step {step}", flush=True)  # noqa: T201
        store.drop_after(step)
        store.close()
        config = (plan or {}).get("config")
        _same_config(run_dir, meta.get("config"), config)
        if data is not None and meta.get("data") is not None:
            data.restore(meta["data"])
        run.cut(step)
        run.status("running", resumed_at_step=step)
        return _loop(learner, state, alive, step, num_steps, list(seeds), data, run, options, sinks, book, config)


def _same_config(run_dir: str | Path, old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
    if old is None or new is None:
        return
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if changed:
        what = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
        raise UserError(f"run directory {run_dir}: the config was changed since the run began ({what})")


def load_state(learner: Learner, run_dir: str | Path, seeds: Sequence[int]) -> Any:
    """The newest stored state [S, ...] of a run, for evaluation. Raises `UserError` when there is none."""
    template = jax.eval_shape(lambda: (_init(learner, seeds, None), guard.start(len(seeds))))
    store = Checkpoints(Path(run_dir) / "checkpoints")
    _, (state, _), _, _ = store.restore(template)
    store.close()
    return state


def _init(learner: Learner, seeds: Sequence[int], hypers: Any) -> Any:
    hypers = as_hypers(learner.hypers if hypers is None else hypers)
    axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, hypers)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return jax.vmap(learner.init, in_axes=(0, axes))(keys, hypers)


def build(
    learner: Learner, state: Any, data: Source | None, options: RunOptions, num_steps: int, book: ledger.Ledger
) -> Programs:
    """Compile the chunk (and the evaluation) for a state [S, ...]; refuses what does not fit into memory."""
    num_seeds = jax.tree.leaves(state)[0].shape[0]
    constants = () if data is None else data.constants()
    body = _step_body(learner, data, options.guard)
    chunk = options.chunk or int(np.clip(num_steps // 50, 1, 1000))
    item = () if data is None else data.chunk(0, 1, chunk)
    alive = guard.start(num_seeds)
    scan = options.dispatch == "scan" or (options.dispatch == "auto" and not _convolves(learner, state, data, item))
    zero = np.int32(0)
    if scan:
        program = _chunk_program(body, chunk)
        compiled = book.compile("chunk", program, state, alive, zero, zero, constants, item, donate=(0, 1))
    else:
        single = lambda s, a, number, const, one: body(s, a, number, const, one)
        one = jax.tree.map(lambda x: x[0], item)
        compiled = book.compile("step", single, state, alive, zero, constants, one, donate=(0, 1))
    limit = options.memory_limit_mb
    ledger.check_memory(book.programs[-1], num_seeds, None if limit is None else limit * 2**20)

    def advance(state: Any, alive: guard.Alive, start: int, count: int, const: Any, items: Any) -> tuple:
        if scan:
            state, alive, metrics = compiled(state, alive, np.int32(start), np.int32(count), const, items)
            return state, alive, {k: np.asarray(v)[:count] for k, v in metrics.items()}
        rows = []
        for i in range(count):
            one = jax.tree.map(lambda x, i=i: x[i], items)
            state, alive, metrics = compiled(state, alive, np.int32(start + i + 1), const, one)
            rows.append(metrics)
        return state, alive, {k: np.stack([np.asarray(r[k]) for r in rows]) for k in rows[0]}

    evaluate = None
    if learner.evaluate is not None and options.eval_every >= 0:
        key = jax.random.key(EVAL_STREAM)
        compiled_eval = book.compile("evaluate", jax.vmap(learner.evaluate, in_axes=(0, None)), state, key)
        evaluate = lambda s: {k: np.asarray(v) for k, v in compiled_eval(s, key).items()}
    return Programs(advance, evaluate, chunk)


def _step_body(learner: Learner, data: Source | None, guarded: bool) -> Callable:
    """(state [S], alive, number, constants, item) -> one step of all seeds; the batch is shared by them."""
    step = guard.guarded(learner.step) if guarded else _unguarded(learner.step)

    def body(state: Any, alive: guard.Alive, number: jax.Array, constants: Any, item: Any) -> tuple:
        batch = () if data is None else (data.batch(constants, item),)
        return jax.vmap(lambda s, a: step(s, a, number, *batch))(state, alive)

    return body


def _unguarded(step: Callable) -> Callable:
    def run(state: Any, alive: guard.Alive, number: jax.Array, *batch: Any) -> tuple:
        new, metrics = step(state, *batch)
        return new, alive, metrics

    return run


def _chunk_program(body: Callable, chunk: int) -> Callable:
    """A loop over `count` <= chunk steps whose metrics go into buffers [chunk, S]."""

    def program(state: Any, alive: guard.Alive, start: Any, count: Any, constants: Any, items: Any) -> tuple:
        at = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), items)
        shapes = jax.eval_shape(body, state, alive, jnp.int32(0), constants, at(0))[2]
        empty = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape), s.dtype), shapes)

        def one(i: jax.Array, c: tuple) -> tuple:
            state, alive, buffers = c
            state, alive, metrics = body(state, alive, start + i + 1, constants, at(i))
            return state, alive, jax.tree.map(lambda b, m: b.at[i].set(m), buffers, metrics)

        return jax.lax.fori_loop(0, count, one, (state, alive, empty))

    return program


def _loop(
    learner: Learner,
    state: Any,
    alive: guard.Alive,
    step: int,
    num_steps: int,
    seeds: Sequence[int],
    data: Source | None,
    run: RunDir | None,
    options: RunOptions,
    sinks: Sequence[Sink],
    book: ledger.Ledger,
    config: dict[str, Any] | None,
) -> Result:
    state, alive = _spread((state, alive), len(seeds), options.devices)
    programs = build(learner, state, data, options, num_steps, book)
    retention = Retention(options.keep_last, options.keep_best, options.best_metric)
    store = None if run is None else Checkpoints(run.checkpoints, retention)
    constants = () if data is None else data.constants()
    table: list[dict[str, Any]] = []
    reported = np.asarray(alive.failed_step).copy()
    rows: list[dict[str, Any]] = []
    if run is not None:
        run.write_json("ledger.json", book.rows())
    progress = Progress(learner, num_steps, step, len(seeds), book, options.progress)
    with _signals() as stop, progress:
        while step < num_steps and not stop:
            count = _until(step, num_steps, programs.chunk, options)
            items = () if data is None else data.chunk(step, count, programs.chunk)
            t0 = time.perf_counter()
            state, alive, metrics = programs.advance(state, alive, step, count, constants, items)
            seconds = time.perf_counter() - t0
            extra = {}
            if programs.evaluate is not None and _due(step + count, num_steps, options.eval_every):
                extra = programs.evaluate(state)
            rows = _rows(learner, seeds, step, metrics, extra, reported)
            step += count
            table += rows
            if run is not None:
                run.append(rows)
            for sink in sinks:
                sink.write(rows)
            progress.update(step, rows, count, seconds)
            reported = _report_dead(alive, reported, seeds, progress)
            if (
                store is not None
                and run is not None
                and (_due(step, num_steps, options.checkpoint_every) or stop or reported.all())
            ):
                scores = [r[options.best_metric] for r in rows if r["step"] == step and options.best_metric in r]
                meta = {"data": None if data is None else data.state(), "config": config}
                store.save(step, (state, alive), meta, float(np.mean(scores)) if scores else None)
            if reported.all():
                break
    return _finish(learner, state, alive, step, num_steps, table, run, store, sinks, book, stop)


def _finish(
    learner: Learner,
    state: Any,
    alive: guard.Alive,
    step: int,
    num_steps: int,
    table: list[dict[str, Any]],
    run: RunDir | None,
    store: Checkpoints | None,
    sinks: Sequence[Sink],
    book: ledger.Ledger,
    stop: list[int],
) -> Result:
    import pandas as pd

    for sink in sinks:
        sink.close()
    if store is not None:
        store.close()
    ok = np.asarray(alive.ok)
    if not ok.any():
        if run is not None:
            run.status("failed", step=step)
        first = int(np.asarray(alive.failed_step).min())
        raise UserError(f"{learner.name}: loss or parameters went non-finite in every seed, first at step {first}")
    if step < num_steps and stop:
        how = "nothing was saved: the run has no directory" if run is None else f"`jaxstack resume {run.path}` goes on"
        if run is not None:
            run.status("interrupted", step=step)
        raise Interrupted(stop[0], f"stopped after step {step} of {num_steps}; {how}")
    if run is not None:
        run.status("finished", step=step)
    return Result(state, pd.DataFrame(table), ok, book, None if run is None else run.path)


def _until(step: int, num_steps: int, chunk: int, options: RunOptions) -> int:
    """Steps to the next stop: end of chunk, evaluation, checkpoint or run."""
    stops = [num_steps - step, chunk - step % chunk]
    stops += [every - step % every for every in (options.eval_every, options.checkpoint_every) if every > 0]
    return min(stops)


def _due(step: int, num_steps: int, every: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _rows(
    learner: Learner, seeds: Sequence[int], start: int, metrics: dict, extra: dict, failed: np.ndarray
) -> list[dict[str, Any]]:
    """A row for each step and seed; the evaluation belongs to the last step. Frozen seeds write no rows."""
    count = next(iter(metrics.values())).shape[0] if metrics else 0
    rows = []
    for i in range(count):
        for s, seed in enumerate(seeds):
            if failed[s]:
                continue
            step = start + i + 1
            row = {"step": step, "samples": step * learner.samples_per_step, "seed": int(seed)}
            row |= {k: float(v[i, s]) for k, v in metrics.items()}
            if i == count - 1:
                row |= {k: float(v[s]) for k, v in extra.items()}
            rows.append(row)
    return rows


def _report_dead(alive: guard.Alive, reported: np.ndarray, seeds: Sequence[int], progress: Progress) -> np.ndarray:
    failed = np.asarray(alive.failed_step)
    for s in np.flatnonzero((failed > 0) & (reported == 0)):
        progress.say(f"seed {seeds[s]}: loss or parameters went non-finite at step {failed[s]}; frozen before it")
    return failed.copy()


def _spread(tree: Any, num_seeds: int, devices: int) -> Any:
    """Lay the seed axis over a mesh of devices."""
    if devices == 1:
        return tree
    if devices > jax.device_count():
        raise UserError(f"devices={devices}: expected at most {jax.device_count()}, what this machine has")
    if num_seeds % devices:
        raise UserError(f"devices={devices}: expected a divisor of the {num_seeds} seeds")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("seed",))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("seed")))


def _convolves(learner: Learner, state: Any, data: Source | None, item: Any) -> bool:
    """Convolution gradients inside a loop are several times slower than outside on XLA's CPU backend."""
    if jax.default_backend() != "cpu":
        return False
    body = _step_body(learner, data, False)
    constants = () if data is None else data.constants()
    one = jax.tree.map(lambda x: x[0], item)
    jaxpr = jax.make_jaxpr(body)(state, guard.start(jax.tree.leaves(state)[0].shape[0]), jnp.int32(0), constants, one)
    return "conv_general_dilated" in str(jaxpr)


def _num_steps(learner: Learner, num_steps: int | None) -> int:
    if num_steps is None:
        num_steps = getattr(learner.config, "num_updates", None)
    if num_steps is None or num_steps < 1:
        raise UserError(f"num_steps={num_steps}: expected at least 1")
    return int(num_steps)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
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
def _closing(run: RunDir | None) -> Iterator[None]:
    try:
        yield
    finally:
        if run is not None:
            run.close()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that the chunk can finish; only the main thread may do so."""
    import threading

    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    old = {}
    for s in (signal.SIGINT, signal.SIGTERM):
        old[s] = signal.signal(s, lambda number, _: caught.append(number))
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
