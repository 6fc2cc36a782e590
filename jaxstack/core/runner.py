"""The one training loop. Seeds are vmapped, steps run in chunks of one compiled program, the host reports in between.

The number of steps of a chunk is an argument of the program, so the last chunk, an evaluation or a stop never
recompiles, and how steps are grouped never changes a result. All buffers are donated.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core import cache, config, distributed, guard, ledger, memo, program, signals
from jaxstack.core.checkpoint import Checkpoints, NoCheckpoint, Retention, from_table, to_table
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, as_hypers, better, require_one
from jaxstack.core.progress import Progress
from jaxstack.core.rundir import RunDir, by_step, read_plan
from jaxstack.core.signals import COMPILING, Interrupted
from jaxstack.core.sinks import Row, Sink
from jaxstack.core.source import Feed, Source


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
    metrics: Any
    alive: np.ndarray
    ledger: ledger.Ledger
    run_dir: Path | None


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
    num_steps = _num_steps(learner, num_steps, total_samples)
    seeds = check_seeds(seeds) if settings is None else _check_rows(seeds, settings)
    settings = None if settings is None else [int(i) for i in settings]
    data = _data(learner, data)
    plan = {"agent": learner.name, "config": plain_config(learner), "seeds": seeds, "num_steps": num_steps} | (
        plan or {}
    )
    plan |= {"objective": list(learner.objective)}
    plan |= {} if settings is None else {"settings": settings}
    path = None if run_dir is None else Path(run_dir)
    distributed.on_first(lambda: path and RunDir.check(path))
    cache.enable()
    book = ledger.Ledger(options.max_compiles)
    job = Job(learner, num_steps, seeds, hypers, data, path, plan, options, sinks, book, [], [], settings, num_steps)
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
    same_config(run_dir, old["config"], new)
    seeds = list(old["seeds"])
    if schedule not in ("extend", "keep"):
        raise UserError(f"schedule={schedule!r}: expected 'extend' or 'keep'")
    length = num_steps if schedule == "extend" else None
    num_steps = int(old["num_steps"] if num_steps is None else num_steps)
    if learner.with_length is not None and num_steps != old["num_steps"]:
        what = f"{num_steps} steps instead of {old['num_steps']}: schedule={schedule}"
        distributed.on_first(lambda: print(f"run directory {run_dir}: {what}", flush=True))  # noqa: T201
    data = _data(learner, data)
    cache.enable()
    book = ledger.Ledger(options.max_compiles)
    hypers = _stored_hypers(learner, old) if hypers is None else hypers
    run, settings = Path(run_dir), old.get("settings")
    job = Job(learner, num_steps, seeds, hypers, data, run, old, options, sinks, book, [], [], settings, length)
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.collected(job.stop))
        for sink in sinks:
            stack.callback(sink.close)
        groups = old.get("groups", ())
        return _some_alive(_split(job, len(groups), resumed=True) if groups else _continued(job), job)


def _restore(job: Job, run: RunDir | None) -> tuple[int, Any, dict[str, Any], list[Row]]:
    """(step, (state, alive), meta, rows before it) of the newest checkpoint whose files and metrics are as they were
    written; step 0, None and no meta when there is none yet. What is newer and damaged is named and set aside."""
    template = jax.eval_shape(lambda: program.initial(job.learner, job.seeds, job.hypers))

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


def _stored_hypers(learner: Learner, plan: dict[str, Any]) -> Any:
    """The hyperparameters that were given to `train` beside the config, None for the config's own."""
    if "hypers" not in plan:
        return None
    return jax.tree_util.tree_map_with_path(
        lambda path, _: np.asarray(plan["hypers"][jax.tree_util.keystr(path)], np.float32), learner.hypers
    )


def evaluate(learner: Learner, state: Any, key: Key | None = None) -> dict[str, np.ndarray]:
    """What the learner measures of a state [S, ...], by name [S]; over its whole `eval_source`, where it has one.

    Args:
        learner: with an `evaluate`.
        state: as `train` and `load_state` return it.
        key: of what is drawn; default: the one of all runs, so that evaluations of a run are repeated.

    Raises:
        UserError: for a learner without evaluation.
    """
    with memo.programs(learner._replace(given=None, hypers=None)) as store:
        begun = program.evaluating(learner, jax.eval_shape(lambda: state), ledger.Ledger(), key=key, store=store)
        if begun is None:
            raise UserError(f"{learner.name}: has no evaluation")
        return begun()(state)


def load_state(learner: Learner, run_dir: str | Path) -> Any:
    """The newest stored state [S, ...] of a run, for evaluation. Raises `UserError` when there is none."""
    return stored(learner, run_dir)[0]


def stored(learner: Learner, run_dir: str | Path) -> tuple[Any, np.ndarray]:
    """The newest stored (state [S, ...], alive [S]) of a run, of its last stage where it has stages. Raises `UserError`
    when there is none."""
    plan = read_plan(run_dir)
    if "groups" in plan:
        groups = [stored(learner, Path(run_dir) / name) for name in plan["groups"]]
        return side_by_side([state for state, _ in groups]), np.concatenate([alive for _, alive in groups])
    if "stages" in plan:
        return stored(learner, Path(run_dir) / plan["stages"][-1])
    # shapes alone: rows of what is given are those of another number of seeds in a group
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(plan["seeds"]), *x.shape[1:]), x.dtype), learner.given)
    template = jax.eval_shape(lambda given: program.initial(learner, plan["seeds"], None, given), rows)
    with contextlib.closing(Checkpoints(Path(run_dir) / "checkpoints", read_only=True)) as store:
        _, (state, alive), _, _ = store.restore(template)
    return state, np.asarray(alive.failed_step) == 0


def start_from(learner: Learner, states: Any) -> Learner:
    """Make the learner of a run that starts from what another run of such a learner has learned.

    It takes over `params`, or what the method says (`Learner.adapted`); environments, random numbers, steps and
    hyperparameters are those of the new run.

    Args:
        learner: What is trained; its config may differ from that of the other run in whatever has no part in the shapes
            of `params`.
        states: The other run's, leaves [S, ...], one row per seed of the new run.

    Returns:
        The learner, for `train` with S seeds.

    Raises:
        UserError: Naming the parameter that does not fit.
    """
    fresh = jax.eval_shape(learner.init, jax.random.key(0), as_hypers(learner.hypers))
    shapes = lambda tree: {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    found, expected = shapes(states.params), shapes(fresh.params)
    for name in sorted([*expected, *found], key=lambda name: name in found and name in expected):
        have = f"shape {found[name].shape[1:]}" if name in found else "none"
        want = f"shape {expected[name].shape}" if name in expected else "none"
        if have != want:
            raise UserError(f"params{name}: found {have}, expected {want}")
    if learner.adapted is not None:
        return learner.adapted()._replace(given=states)

    def init(key: Key, hypers: Any, params: Any) -> Any:
        return learner.init(key, hypers)._replace(params=params)

    return learner._replace(init=init, given=states.params)


def save(
    learner: Learner, states: Any, seeds: Sequence[int], run_dir: str | Path, metrics: dict[str, Any] | None = None
) -> Path:
    """Store states that were not made by `train` as a finished run, for all that reads runs.

    Args:
        learner: Whose states they are; its `num_steps` are the run's.
        states: Leaves [S, ...], one row per seed, with the shapes of the learner's own.
        seeds: S numbers by which the rows are called.
        run_dir: Empty or new.
        metrics: Of the last step, name -> [S].

    Returns:
        The directory.

    Raises:
        UserError: For a directory with content, or states that do not fit.
    """
    seeds, num_steps = check_seeds(seeds), _num_steps(learner, None, None)
    template = jax.eval_shape(lambda: program.initial(learner, seeds, None))[0]
    shapes = lambda tree: {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    found, expected = shapes(states), shapes(template)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise UserError(f"state{name}: found shape {found.get(name)}, expected {expected.get(name)}")
    plan = {"agent": learner.name, "config": plain_config(learner), "seeds": seeds, "num_steps": num_steps}
    run = RunDir.create(run_dir, plan | {"objective": list(learner.objective)})
    with _closing(run):
        values = {k: np.asarray(v, np.float64) for k, v in (metrics or {}).items()}
        row: Row = {"step": num_steps, "samples": num_steps * learner.samples_per_step}
        run.append([row | {"seed": s} | {k: float(v[i]) for k, v in values.items()} for i, s in enumerate(seeds)])
        with contextlib.closing(Checkpoints(run.checkpoints)) as store:
            store.save(num_steps, (states, guard.start(len(seeds))), {"data": None, "metrics": run.mark()})
        run.status("finished", step=num_steps)
    return Path(run_dir)


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
        with _closing(run):
            _interrupt_after(job, run, 0)
    run = _create(job)
    with _closing(run):
        return _loop(job, programs, run, *programs.init(), 0)


def _continued(job: Job, programs: program.Programs | None = None) -> Result:
    """The stored run of the job from its newest checkpoint on."""
    run = distributed.on_first(lambda: RunDir.open(job.run_dir or ""))
    with _closing(run):
        step, restored, meta, table = _restore(job, run)
        try:
            programs = _programs(job) if programs is None else programs
        except Interrupted:
            _interrupt_after(job, run, step)
        if restored is not None:
            _same_hypers(job, restored[0])
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
    with _closing(run):
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


def side_by_side(states: Sequence[Any]) -> Any:
    """States [S, ...] of several runs as those of one."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *states)


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
    table, stop = list(table), _agreed(job)
    if run is not None:
        run.write_json("ledger.json", job.book.rows())
    failed = np.asarray(distributed.fetch(alive.failed_step))
    shown = options.progress and distributed.is_first()
    progress = Progress(job.learner, total, step, len(job.seeds), job.book, shown)
    with _saving(job, run) as store, progress, _feeding(programs) as feed:
        while step < total and not stop and not failed.all():
            count = _until(step, total, programs.chunk, options)
            begun = time.perf_counter()
            items = () if feed is None else feed.take(step, count, _until(step + count, total, programs.chunk, options))
            state, alive, metrics = programs.advance(state, alive, step, count, items)
            seconds = time.perf_counter() - begun
            evaluate = programs.evaluate is not None and _due(step + count, total, options.eval_every)
            extra = programs.evaluate(state) if evaluate and programs.evaluate else {}
            before, failed = failed, np.asarray(distributed.fetch(alive.failed_step))
            rows = _rows(job, step, metrics, extra, failed)
            step += count
            table += rows
            distributed.on_first(lambda rows=rows: _write(job, run, rows))
            progress.update(step, rows, count, seconds)
            for s in np.flatnonzero((failed > 0) & (before == 0)):
                row = "" if job.settings is None else f"setting {job.settings[s]}, "
                why = f"{programs.causes[np.asarray(distributed.fetch(alive.cause))[s]]} not finite"
                job.said.append(why)
                progress.say(f"{row}seed {job.seeds[s]}: {why} at step {failed[s]}; frozen before it")
            stop = _agreed(job)
            if job.run_dir is not None and (_due(step, total, options.checkpoint_every) or stop or failed.all()):
                _save(job, run, store, step, state, alive, rows, None if feed is None else feed.state())
                stop = stop or _agreed(job)
    _settle(job, run, step, failed)
    import pandas as pd

    return Result(state, pd.DataFrame(table), failed == 0, job.book, job.run_dir)


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
            row |= {} if job.settings is None else {"setting": job.settings[s]}
            row |= {k: v[i][s] for k, v in lists.items()}
            if i == count - 1:
                row |= {k: float(v[s]) for k, v in extra.items()}
            rows.append(row)
    return rows


def plain_config(learner: Any) -> dict[str, Any]:
    """The config of a learner, or of a method in stages, as plain dicts; empty where there is none."""
    return config.to_dict(learner.config) if dataclasses.is_dataclass(learner.config) else {}


def same_config(run_dir: str | Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if changed:
        what = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
        raise UserError(f"run directory {run_dir}: the config was changed since the run began ({what})")


def _same_hypers(job: Job, state: Any) -> None:
    """Stored hyperparameters go on: raise `UserError` naming one that is given otherwise now."""
    given = job.learner.hypers if job.hypers is None else job.hypers
    stored = jax.tree_util.tree_leaves_with_path(state.hypers)
    for (where, old), new in zip(stored, jax.tree.leaves(given)):
        if not np.array_equal(np.asarray(old), np.broadcast_to(np.asarray(new, np.float32), np.shape(old))):
            name = jax.tree_util.keystr(where).lstrip(".")
            old, new = np.asarray(old).tolist(), np.asarray(new).tolist()
            raise UserError(f"run directory {job.run_dir}: {name}={new}: expected {old}, with which the run began")


def _num_steps(learner: Learner, num_steps: int | None, total_samples: int | None) -> int:
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


def _check_rows(seeds: int | Sequence[int], settings: Sequence[int]) -> list[int]:
    """The seeds of rows (setting, seed); raises `UserError` when there is not one for each, or for equal rows."""
    out = [seeds] if isinstance(seeds, int) else [int(s) for s in seeds]
    check_seeds(sorted(set(out)))
    if len(out) != len(settings) or len({*zip(settings, out)}) != len(out):
        raise UserError(f"seeds={seeds}, settings={settings}: expected a seed for each setting, and different pairs")
    return out


def _data(learner: Learner, data: Source | None) -> Source | None:
    """The source of the run: the one given, else the learner's own."""
    if data is None and learner.source is not None:
        return learner.source(learner.config)
    if learner.takes_batch and data is None:
        raise UserError(f"{learner.name}: data is needed, e.g. ArrayData(arrays, batch_size)")
    if data is not None and not learner.takes_batch and learner.source is None:
        raise UserError(f"{learner.name}: generates its own batches; data must be None")
    return data


@contextlib.contextmanager
def _closing(run: RunDir | None) -> Iterator[None]:
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
