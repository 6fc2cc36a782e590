"""The one training loop. Seeds are vmapped, steps run in chunks of one compiled program, the host reports in between.

The number of steps of a chunk is an argument of the program, so the last chunk, an evaluation or a stop never
recompiles, and how steps are grouped never changes a result. All buffers are donated.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core import cache, chunks, config, distributed, guard, ledger, profiler, program, signals
from jaxstack.core.checkpoint import Checkpoints, NoCheckpoint, Retention, from_table, to_table
from jaxstack.core.errors import UserError
from jaxstack.core.job import (
    Callback,
    Job,
    Moment,
    Result,
    RunOptions,
    check_rows,
    check_seeds,
    data_of,
    default_config,
    plain_config,
    same_config,
    same_hypers,
    steps_of,
)
from jaxstack.core.learner import Learner, better, require_one
from jaxstack.core.progress import Progress
from jaxstack.core.rundir import RunDir, by_step, closing, read_plan
from jaxstack.core.signals import COMPILING, Interrupted
from jaxstack.core.sinks import Row, Sink
from jaxstack.core.source import Feed, Source
from jaxstack.core.states import evaluate, load_state, save, side_by_side, start_from, stored, stored_hypers

__all__ = [
    "Callback",
    "Interrupted",
    "Moment",
    "Result",
    "RunOptions",
    "check_seeds",
    "default_config",
    "evaluate",
    "load_state",
    "plain_config",
    "resume",
    "same_config",
    "save",
    "start_from",
    "stored",
    "train",
]


def train(
    learner: Learner,
    num_steps: int | None = None,
    seeds: int | Sequence[int] = 1,
    *,
    total_samples: int | None = None,
    hypers: Any = None,
    settings: Sequence[int] | None = None,
    data: Source | None = None,
    run_dir: str | Path | None = None,
    plan: dict[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> Result:
    """Train a learner with all seeds at once.

    Args:
        learner: What is trained.
        num_steps: Its steps (PPO: updates); default: the learner's own. Its schedules end with the last one.
        seeds: S seeds, or how many: 0, 1, ...
        total_samples: Samples per seed, instead of `num_steps`.
        hypers: Hyperparameters with scalar leaves, or leaves [S]: one setting per seed; default: the learner's.
        settings: [S] numbers of the settings. Rows are then pairs (setting, seed), in which seeds may repeat, metrics
            have a column `setting`, and rows that all went non-finite are returned instead of raised.
        data: Source of batches; default: the learner's.
        run_dir: Where the run is stored; default: nowhere.
        plan: What is stored there beside what `resume` needs.
        options: Chunks, checkpoints, evaluation, devices, see `RunOptions`.
        sinks: Where metrics go as they come.
        callbacks: Called with a `Moment` after each chunk (of `chunk` steps), before it is stored. One that returns a
            state of the same shapes changes the run, without a new program: a curriculum.
        **changes: Fields of `options` by name.

    Returns:
        The last states [S, ...], metrics as a table, which seeds are alive, and the ledger of compiled programs.

    Raises:
        UserError: For wrong arguments, a run that does not fit into memory, or when every seed went non-finite.
        Interrupted: After SIGINT or SIGTERM.

    Example:
        learner = jaxstack.make_agent("ippo", env="dispersion")
        result = jaxstack.train(learner, 100, seeds=4, chunk=10)
        result.metrics.groupby("step")["rollout/return"].mean()
    """
    require_one(learner, "train (`core.stages.train` takes it)")
    options = config.replace(options, **changes)
    num_steps = steps_of(learner, num_steps, total_samples)
    seeds = check_seeds(seeds) if settings is None else check_rows(seeds, settings)
    settings = None if settings is None else [int(i) for i in settings]
    data = data_of(learner, data)
    plan = {"agent": learner.name, "config": plain_config(learner), "seeds": seeds, "num_steps": num_steps} | (
        plan or {}
    )
    plan |= {"objective": list(learner.objective)}
    plan |= {} if settings is None else {"settings": settings}
    path = None if run_dir is None else Path(run_dir)
    distributed.on_first(lambda: path and RunDir.check(path))
    cache.enable()
    book = ledger.Ledger(options.max_compiles)
    job = Job(
        learner,
        num_steps,
        seeds,
        hypers,
        data,
        path,
        plan,
        options,
        sinks,
        book,
        [],
        [],
        settings,
        num_steps,
        callbacks,
    )
    at_once = options.split_seeds if isinstance(options.split_seeds, int) else len(seeds)
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.collected(job.stop))
        for sink in sinks:
            stack.callback(sink.close)
        while True:
            try:
                groups = -(-len(seeds) // at_once)
                return _some_alive(_split(job, groups) if groups > 1 else _fresh(job), job)
            except ledger.DoesNotFit as e:  # measured by compiling, before anything runs
                if options.split_seeds != "auto" or e.fit < 1:
                    raise
                book.programs.clear()
                at_once = e.fit


def resume(
    learner: Learner,
    run_dir: str | Path,
    num_steps: int | None = None,
    *,
    schedule: Literal["extend", "keep"] = "extend",
    hypers: Any = None,
    data: Source | None = None,
    plan: dict[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> Result:
    """Continue a run from its newest undamaged checkpoint, bitwise identical to one that had not stopped.

    It starts from its beginning when it was stopped before the first checkpoint.

    What is damaged is named and moved to `damaged/` in the run directory.

    Args:
        learner: The learner that the run was made with.
        run_dir: Of the run.
        num_steps: Steps of the whole run; default: those it was made with.
        schedule: Where the learner's schedules end with another number of steps. `extend`: with the new last step, so
            the learning rate continues from where the longer schedule would be; `keep`: where the stored run had them
            end, so it stays at its final value, zero for one annealed to zero. Which one is printed.
        hypers: Those given to `train`, checked against the stored ones.
        data: As in `train`.
        plan: Whose config is compared with the run's; default: the learner's.
        options: As in `train`.
        sinks: As in `train`.
        callbacks: As in `train`.
        **changes: Fields of `options` by name.

    Returns:
        As `train` does, with the metrics of all steps.

    Raises:
        UserError: When every checkpoint is damaged, for fewer steps than the run has reached, or naming the fields in
            which the config differs from that of the run.
    """
    options = config.replace(options, **changes)
    old = distributed.share(distributed.on_first(lambda: read_plan(run_dir)))
    new = (plan or {}).get("config", plain_config(learner))
    same_config(run_dir, old["config"], new, default_config(learner))
    seeds = list(old["seeds"])
    if schedule not in ("extend", "keep"):
        raise UserError(f"schedule={schedule!r}: expected 'extend' or 'keep'")
    length = num_steps if schedule == "extend" else None
    num_steps = int(old["num_steps"] if num_steps is None else num_steps)
    if learner.with_length is not None and num_steps != old["num_steps"]:
        what = f"{num_steps} steps instead of {old['num_steps']}: schedule={schedule}"
        distributed.on_first(lambda: print(f"run directory {run_dir}: {what}", flush=True))  # noqa: T201
    data = data_of(learner, data)
    cache.enable()
    book = ledger.Ledger(options.max_compiles)
    hypers = stored_hypers(learner, old) if hypers is None else hypers
    run, settings = Path(run_dir), old.get("settings")
    job = Job(
        learner, num_steps, seeds, hypers, data, run, old, options, sinks, book, [], [], settings, length, callbacks
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.collected(job.stop))
        for sink in sinks:
            stack.callback(sink.close)
        groups = old.get("groups", ())
        return _some_alive(_split(job, len(groups), resumed=True) if groups else _continued(job), job)


def _restore(job: Job, run: RunDir | None) -> tuple[int, Any, dict[str, Any], list[Row]]:
    """(step, (state, alive), meta, rows before it) of the newest checkpoint whose files and metrics are as they were
    written; step 0, None and no meta when there is none yet. What is newer and damaged is named and set aside."""
    template = program.shapes_of(job.learner, job.seeds, job.hypers)

    def read(run: RunDir) -> tuple[int, Any, dict[str, Any], list[Row]]:
        with contextlib.closing(Checkpoints(run.checkpoints)) as store:
            try:
                step, restored, meta, problems = store.restore(template, lambda meta: run.damage(meta.get("metrics")))
            except NoCheckpoint as e:
                step, restored, meta, problems = 0, None, {}, [str(e)]
            if step > job.num_steps:
                raise UserError(f"num_steps={job.num_steps}: expected at least {step}, which {job.run_dir} has reached")
            how = f"using the one of step {step}" if step else "from the beginning"
            for problem in problems:
                print(f"{problem}; {how}", flush=True)  # noqa: T201
            store.set_aside_after(step)
        table = run.cut(step, meta.get("metrics"))
        run.status("running", resumed_at_step=step)
        return step, restored, meta, table

    found = distributed.on_first(lambda: run and read(run)) or (0, None, {}, [])
    if distributed.count() == 1:
        return found
    step, meta, table = distributed.share((found[0], found[2], found[3]))
    arrays = distributed.share_arrays(None if found[1] is None else to_table(found[1]))
    return step, from_table(arrays, template) if step else None, meta, table


def _create(job: Job) -> RunDir | None:
    """The directory of a job that begins."""
    plan = job.plan
    if job.hypers is not None:
        values = jax.tree_util.tree_leaves_with_path(job.hypers)
        plan = plan | {"hypers": {jax.tree_util.keystr(k): np.asarray(v, np.float32).tolist() for k, v in values}}
    return distributed.on_first(lambda: None if job.run_dir is None else RunDir.create(job.run_dir, plan))


def _fresh(job: Job, programs: program.Programs | None = None) -> Result:
    """All seeds of the job from their first step."""
    # compiled before the directory is made: a run that does not fit leaves none behind
    try:
        programs = _programs(job) if programs is None else programs
    except Interrupted:
        run = _create(job)
        with closing(run):
            _interrupt_after(job, run, 0)
    run = _create(job)
    with closing(run):
        return _loop(job, programs, run, *programs.init(), 0)


def _continued(job: Job, programs: program.Programs | None = None) -> Result:
    """The stored run of the job from its newest checkpoint on."""
    run = distributed.on_first(lambda: RunDir.open(job.run_dir or ""))
    with closing(run):
        step, restored, meta, table = _restore(job, run)
        try:
            programs = _programs(job) if programs is None else programs
        except Interrupted:
            _interrupt_after(job, run, step)
        if restored is not None:
            same_hypers(job, restored[0])
            if job.length is not None and job.learner.with_length is not None:
                restored = job.learner.with_length(restored[0], job.length), restored[1]
        if job.data is not None and restored is not None:
            job.data.restore(meta["data"])
        state, alive = programs.init() if restored is None else programs.place(restored)
        return _loop(job, programs, run, state, alive, step, table)


def _split(job: Job, count: int, resumed: bool = False) -> Result:
    """`count` groups of seeds, of one size or two, one after another; their results side by side. The run's directory
    names the groups and holds a run for each."""
    groups = _groups(job, count)
    job = job._replace(plan=job.plan | {"groups": [name for name, _ in groups]})
    programs, results = {}, []
    with contextlib.suppress(Interrupted):  # told below, when the directory is there
        programs = {size: _programs(group) for size, group in {len(g.seeds): g for _, g in groups}.items()}
    run = distributed.on_first(lambda: RunDir.open(job.run_dir or "")) if resumed else _create(job)
    with closing(run):
        try:
            if not programs:
                raise Interrupted(job.stop[0], COMPILING)
            data = None if job.data is None else job.data.state()
            for _, group in groups:
                if job.data is not None:
                    job.data.restore(data)  # every group sees the same batches
                bound = programs[len(group.seeds)].bind(group.seeds, group.hypers, group.learner.given)
                begun = resumed and distributed.share((Path(group.run_dir or "") / "run.yaml").exists())
                results.append(_continued(group, bound) if begun else _fresh(group, bound))
        except Interrupted:
            _interrupt(job, run, f"with {len(results)} of {count} groups of seeds done", groups_done=len(results))
        alive = np.concatenate([r.alive for r in results])
        if run is not None:
            run.write_json("ledger.json", job.book.rows())
            run.status("finished" if alive.any() else "failed", step=job.num_steps)
    metrics = by_step([r.metrics for r in results])
    return Result(side_by_side([r.state for r in results]), metrics, alive, job.book, job.run_dir)


def _groups(job: Job, count: int) -> list[tuple[str, Job]]:
    """(name, job) of each group."""
    groups = []
    for index in np.array_split(np.arange(len(job.seeds)), count):
        part = slice(index[0], index[-1] + 1)
        take = lambda x, part=part: jnp.asarray(x)[part] if np.ndim(x) else x
        hypers = None if job.hypers is None else jax.tree.map(take, job.hypers)
        learner = job.learner._replace(given=jax.tree.map(lambda x, part=part: x[part], job.learner.given))
        seeds, settings = job.seeds[part], job.settings
        plan = {k: v for k, v in job.plan.items() if k != "groups"} | {"seeds": seeds}
        name = f"seeds_{'_'.join(map(str, seeds))}"
        if settings is not None:
            settings, name = settings[part], f"rows_{index[0]}_{index[-1]}"
            plan |= {"settings": settings}
        folder = None if job.run_dir is None else job.run_dir / name
        group = job._replace(learner=learner, seeds=seeds, hypers=hypers, run_dir=folder, plan=plan, settings=settings)
        groups.append((name, group))
    return groups


def _programs(job: Job) -> program.Programs:
    """Compile. Raises `Interrupted` at the first signal, as there is no chunk to finish; of several processes none goes
    alone, so they agree after the first chunk."""
    options, limit = job.options, job.options.memory_limit_mb
    alone = distributed.count() == 1
    with signals.collected(job.stop, at_once=alone):
        programs = program.build(
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
            env_devices=options.env_devices,
            memory_limit=None if limit is None else limit * 2**20,
            length=int(job.plan["num_steps"]) if job.length is None else job.length,
        )
    if alone and job.stop:  # the compiler's own handling of exceptions may have kept it
        raise Interrupted(job.stop[0], COMPILING)
    return programs


def _loop(
    job: Job,
    programs: program.Programs,
    run: RunDir | None,
    state: Any,
    alive: guard.Alive,
    step: int,
    table: Sequence[Row] = (),
) -> Result:
    """Run chunks until the last step, a signal or all seeds have diverged. `table` has the rows before `step`."""
    options, total = job.options, job.num_steps
    table, stop, dispatched = list(table), _agreed(job), 0
    if run is not None:
        run.write_json("ledger.json", job.book.rows())
    failed = np.asarray(distributed.fetch(alive.failed_step))
    shown = options.progress and distributed.is_first()
    progress = Progress(job.learner, total, step, len(job.seeds), job.book, shown)
    with _saving(job, run) as store, progress, _feeding(programs) as feed:
        while step < total and not stop and not failed.all():
            count = chunks.until(step, total, programs.chunk, options)
            begun = time.perf_counter()
            items = (
                ()
                if feed is None
                else feed.take(step, count, chunks.until(step + count, total, programs.chunk, options))
            )
            with profiler.trace(options.profile, dispatched == 1 or (dispatched == 0 and step + count == total)):
                state, alive, metrics = programs.advance(state, alive, step, count, items)
            dispatched += 1
            seconds = time.perf_counter() - begun
            evaluate = programs.evaluate is not None and chunks.due(step + count, total, options.eval_every)
            extra = programs.evaluate(state) if evaluate and programs.evaluate else {}
            before, failed = failed, np.asarray(distributed.fetch(alive.failed_step))
            rows = chunks.rows_of(job, step, metrics, extra, failed)
            step += count
            table += rows
            distributed.on_first(lambda rows=rows: _write(job, run, rows))
            progress.update(step, rows, count, seconds)
            state = _called(job, programs, Moment(step, total, state, rows), alive)
            for s in np.flatnonzero((failed > 0) & (before == 0)):
                row = "" if job.settings is None else f"setting {job.settings[s]}, "
                why = f"{programs.causes[np.asarray(distributed.fetch(alive.cause))[s]]} not finite"
                job.said.append(why)
                progress.say(f"{row}seed {job.seeds[s]}: {why} at step {failed[s]}; frozen before it")
            stop = _agreed(job)
            if job.run_dir is not None and (chunks.due(step, total, options.checkpoint_every) or stop or failed.all()):
                _save(job, run, store, step, state, alive, rows, None if feed is None else feed.state())
                stop = stop or _agreed(job)
    _settle(job, run, step, failed)
    import pandas as pd

    return Result(state, pd.DataFrame(table), failed == 0, job.book, job.run_dir)


def _called(job: Job, programs: program.Programs, now: Moment, alive: guard.Alive) -> Any:
    """The state after the callbacks. Raises `UserError` where one returns something else than such a state."""
    for callback in job.callbacks:
        new = callback(now)
        if new is None:
            continue
        old, found = (jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), s) for s in (now.state, new))
        if old != found:
            name = getattr(callback, "__name__", type(callback).__name__)
            raise UserError(f"callback {name}: returned another structure, shapes or types than the state it was given")
        now = now._replace(state=programs.place((new, alive))[0])
    return now.state


def _agreed(job: Job) -> bool:
    """Whether a signal came to any of the processes: they end after the same chunk."""
    signum = distributed.largest(job.stop[0] if job.stop else 0)
    if signum and not job.stop:
        job.stop.append(signum)
    return signum > 0


def _write(job: Job, run: RunDir | None, rows: list[Row]) -> None:
    if run is not None:
        run.append(rows)
    for sink in job.sinks:
        sink.write(rows)


@contextlib.contextmanager
def _saving(job: Job, run: RunDir | None) -> Iterator[Checkpoints | None]:
    """The run's checkpoints; the last save ends before the directory is released, also after an error."""
    if run is None:
        yield None
        return
    options = job.options
    store = Checkpoints(run.checkpoints, Retention(options.keep_last, options.keep_best))
    try:
        yield store
    except BaseException:
        with contextlib.suppress(UserError):  # the first error is the one to tell
            store.close()
        raise
    store.close()


def _save(
    job: Job,
    run: RunDir | None,
    store: Checkpoints | None,
    step: int,
    state: Any,
    alive: guard.Alive,
    rows: list[Row],
    position: Any,
) -> None:
    metric, direction = job.learner.objective
    name = job.options.best_metric or metric
    sign = better(job.options.best_direction or (direction if name == metric else "max"))
    scores = [sign * r[name] for r in rows if r["step"] == step and name in r]
    meta = {"data": position, "metrics": run and run.mark()}
    whole = distributed.fetch((state, alive))
    distributed.on_first(lambda: store and store.save(step, whole, meta, float(np.mean(scores)) if scores else None))


@contextlib.contextmanager
def _feeding(programs: program.Programs) -> Iterator[Feed | None]:
    feed = programs.feed()
    try:
        yield feed
    finally:
        if feed is not None:
            feed.close()


def _settle(job: Job, run: RunDir | None, step: int, failed: np.ndarray) -> None:
    """Record how the loop ended; raises `Interrupted` when a signal ended it early."""
    if step < job.num_steps and job.stop and not failed.all():
        _interrupt_after(job, run, step)
    if run is not None:
        run.status("failed" if failed.all() else "finished", step=step)


def _interrupt(job: Job, run: RunDir | None, where: str, **facts: int) -> NoReturn:
    """Record that a signal ended the run, and say how to go on."""
    how = "nothing was saved: the run has no directory"
    if run is not None:
        run.status("interrupted", **facts)
    if job.run_dir is not None:
        longer = f" --steps {job.num_steps}" if job.num_steps != job.plan["num_steps"] else ""
        kept = " --schedule keep" if longer and job.length is None else ""
        how = f"`jaxstack resume {job.run_dir}{longer}{kept}` continues"
    raise Interrupted(job.stop[0], f"stopped {where}; {how}")


def _interrupt_after(job: Job, run: RunDir | None, step: int) -> NoReturn:
    _interrupt(job, run, f"after step {step} of {job.num_steps}", step=step)


def _some_alive(result: Result, job: Job) -> Result:
    if not result.alive.any() and job.settings is None:
        first = int(result.metrics.groupby("seed").step.max().min())
        kept = "" if result.run_dir is None else f"; the last good states are in {result.run_dir}"
        why = "; ".join(dict.fromkeys(job.said)) or "numbers are not finite"
        raise UserError(f"{job.learner.name}: {why} in every seed, first at step {first}{kept}")
    return result
