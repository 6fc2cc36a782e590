"""Methods in several stages: each is a run of its own, and its learner is made from the states of those before it.

In a run directory each stage has a folder, a run like any other, beside one run.yaml that names them in order. A run
that was stopped anywhere, also between two stages, continues in the right one, bitwise identical to a run that was not.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jaxstack.core import config, distributed, runner, signals
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner
from jaxstack.core.rundir import RunDir, finished, read_plan, read_rows
from jaxstack.core.runner import RunOptions
from jaxstack.core.signals import Interrupted
from jaxstack.core.sinks import Row, Sink
from jaxstack.core.source import Source


class Stage(NamedTuple):
    """One stage of a method."""

    name: str
    make: Callable[[Mapping[str, Any]], Learner]
    """Final states [S, ...] of the earlier stages by name -> this stage's learner. What it takes of them goes into
    `Learner.given`, an argument of its `init`: what `make` closes over would become a constant of the program."""
    source: Callable[[Any], Source] | None = None
    """Config of the stage's learner -> its batches; default: the learner's own source."""
    steps: int | None = None
    """Default: the learner's own number."""


class Staged(NamedTuple):
    """A method in stages, what its factory returns in place of a `Learner`."""

    name: str
    stages: Sequence[Stage]
    config: Any = None


class Result(NamedTuple):
    """A finished method: `state` [S, ...] of its last stage, `metrics` as a pandas frame with a column `stage`, seeds
    `alive` [S] in all stages, the states of all stages by name, and the last stage's learner."""

    state: Any
    metrics: Any
    alive: np.ndarray
    run_dir: Path | None
    states: dict[str, Any]
    learner: Learner

    def of_last_stage(self) -> "Result":
        """The same with the metrics of the last stage alone."""
        return self._replace(metrics=self.metrics[self.metrics.stage == self.metrics.stage.iloc[-1]])


def train(
    method: Staged,
    seeds: int | Sequence[int] = 1,
    *,
    run_dir: str | Path | None = None,
    plan: dict[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
    **changes: Any,
) -> Result:
    """Train all stages of `method`, each with all seeds at once.

    Args:
        method: the stages.
        seeds: their number, or a list of them.
        run_dir: where to store the run, a folder a stage; None stores nothing.
        plan: stored in run.yaml beside what `resume` needs.
        options: of the runner, the same for each stage; single ones also by name.
        sinks: where metrics go too; their samples count on over the stages.

    Raises:
        UserError: for stages without names of their own, wrong arguments, or a stage in which every seed failed.
        Interrupted: after SIGINT or SIGTERM.
    """
    options = config.replace(options, **changes)
    names = _names(method)
    plan = {
        "agent": method.name,
        "config": runner.plain_config(method),
        "seeds": runner.check_seeds(seeds),
        "num_steps": sum(stage.steps or 0 for stage in method.stages),
    } | (plan or {})
    plan["stages"] = names
    path = None if run_dir is None else Path(run_dir)
    run = distributed.on_first(lambda: None if path is None else RunDir.create(path, plan))
    return _run(method, plan, path, run, options, sinks)


def resume(
    method: Staged,
    run_dir: str | Path,
    *,
    plan: dict[str, Any] | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
    **changes: Any,
) -> Result:
    """Continue a run in stages, in the stage in which it was stopped.

    Raises:
        UserError: as `runner.resume`, and where the stages are others than those of the run.
    """
    options = config.replace(options, **changes)
    old = distributed.share(distributed.on_first(lambda: read_plan(run_dir)))
    names = _names(method)
    if old.get("stages") != names:
        raise UserError(f"run directory {run_dir}: stages {old.get('stages')}, expected those of the method, {names}")
    new = (plan or {}).get("config", runner.plain_config(method))
    runner.same_config(run_dir, old["config"], new, runner.default_config(method))
    run = distributed.on_first(lambda: RunDir.open(run_dir))
    return _run(method, old, Path(run_dir), run, options, sinks)


def last(method: Staged, run_dir: str | Path) -> Learner:
    """The learner of the last stage of a stored run, whose state `runner.load_state` then reads.

    Raises:
        UserError: where a stage has no checkpoint yet.
    """
    names, states = read_plan(run_dir)["stages"], {}
    for stage, folder in zip(method.stages[:-1], names[:-1], strict=True):
        states[stage.name] = runner.load_state(stage.make(dict(states)), Path(run_dir) / folder)
    return method.stages[-1].make(states)


def _names(method: Staged) -> list[str]:
    """The stages' folders, in order."""
    names = [stage.name for stage in method.stages]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{method.name}: stages {names}: expected at least one, each with a name of its own")
    return [f"{i}_{name}" for i, name in enumerate(names, 1)]


def _run(
    method: Staged,
    plan: dict[str, Any],
    path: Path | None,
    run: RunDir | None,
    options: RunOptions,
    sinks: Sequence[Sink],
) -> Result:
    import pandas as pd

    seeds = list(plan["seeds"])
    states: dict[str, Any] = {}
    frames, alive, before = [], np.ones(len(seeds), bool), 0
    stop: list[int] = []
    with contextlib.ExitStack() as stack:
        if run is not None:
            stack.callback(run.close)
        for sink in sinks:
            stack.callback(sink.close)
        stack.enter_context(signals.collected(stop))
        for stage, folder in zip(method.stages, plan["stages"], strict=True):
            if distributed.largest(stop[0] if stop else 0):
                _interrupt(run, path, stop, f"before stage {stage.name}")
            learner = stage.make(dict(states))
            into = [_Numbered(sink, stage.name, before) for sink in sinks]
            try:
                state, rows, lives = _stage(stage, learner, seeds, path and path / folder, options, into)
            except Interrupted as e:
                stop = stop or [e.signum]
                _interrupt(run, path, stop, f"in stage {stage.name}, {str(e).partition(';')[0]}")
            except BaseException as e:
                if run is not None:
                    with contextlib.suppress(UserError):
                        run.status("failed", stage=stage.name, error=f"{type(e).__name__}: {e}"[:500])
                raise
            rows.insert(0, "stage", stage.name)
            states[stage.name], before = state, before + int(rows["samples"].max())
            frames.append(rows)
            alive &= lives
        if run is not None:
            run.status("finished" if alive.any() else "failed")
    return Result(state, pd.concat(frames, ignore_index=True), alive, path, states, learner)


def _stage(
    stage: Stage, learner: Learner, seeds: list[int], path: Path | None, options: RunOptions, sinks: list[Any]
) -> tuple[Any, Any, np.ndarray]:
    """(state, metrics frame, alive) of a stage: read where it is finished, resumed where it was begun, else trained."""
    data = None if stage.source is None else stage.source(learner.config)
    how = distributed.share(distributed.on_first(lambda: "new" if path is None else _progress(path)))
    if path is not None and how == "finished":
        state, alive = runner.stored(learner, path)
        import pandas as pd

        return state, pd.DataFrame(read_rows(path)), alive
    if path is not None and how == "begun":
        done = runner.resume(learner, path, stage.steps, data=data, options=options, sinks=sinks)
    else:
        done = runner.train(learner, stage.steps, seeds, data=data, run_dir=path, options=options, sinks=sinks)
    return done.state, done.metrics.copy(), done.alive


def _progress(path: Path) -> str:
    """How far the stage in a folder came: new, begun or finished."""
    if not (path / "run.yaml").exists():
        return "new"
    return "finished" if finished(path) else "begun"


def _interrupt(run: RunDir | None, path: Path | None, stop: list[int], where: str) -> NoReturn:
    if run is not None:
        run.status("interrupted")
    how = "nothing was saved: the run has no directory" if path is None else f"`jaxstack resume {path}` continues"
    raise Interrupted(stop[0], f"stopped {where.replace(', stopped', ',')}; {how}")


class _Numbered:
    """A sink of one stage: rows name the stage, samples count on, and the sink stays open."""

    def __init__(self, sink: Sink, stage: str, before: int):
        self._sink, self._stage, self._before = sink, stage, before

    def write(self, rows: list[Row]) -> None:
        self._sink.write([{"stage": self._stage} | row | {"samples": row["samples"] + self._before} for row in rows])

    def close(self) -> None:
        """The run closes its sinks after the last stage."""
